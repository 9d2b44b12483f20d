"""The one place where kernels take `triton` and `tl` from.

Where Triton is not installed both are stand-ins: kernels still import, as do their references and operator schemas,
and launching a kernel raises MissingTritonError.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from toprovar_compile.errors import MissingTritonError


class _Language:
    """Stand-in for `triton.language`: every attribute exists and is None, which annotations and defaults need."""

    def __getattr__(self, name: str) -> None:
        return None


class _Kernel:
    """Stand-in for a jitted function: importable, not launchable."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._name = fn.__name__

    def __getitem__(self, grid: object) -> Any:
        raise MissingTritonError(
            f"{self._name} cannot run: Triton is not installed",
            where="toprovar_compile.kernels",
            expected="the triton package, which the CUDA wheels of torch bring with them",
            todo="install torch from its CUDA index, or `pip install triton`",
        )


class _Triton:
    """Stand-in for the `triton` module."""

    @staticmethod
    def jit(fn: Callable[..., Any] | None = None, **options: object) -> Any:
        return _Kernel if fn is None else _Kernel(fn)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length()


class _NeverRaised(Exception):
    """Stand-in for what Triton raises where a kernel does not build or does not fit the device."""


try:
    _triton: Any = import_module("triton")
    _tl: Any = import_module("triton.language")
    TritonError: type[Exception] = import_module("triton.errors").TritonError
    HAS_TRITON = True
except ImportError:
    _triton, _tl, TritonError, HAS_TRITON = _Triton(), _Language(), _NeverRaised, False
triton, tl = _triton, _tl

__all__ = ["HAS_TRITON", "TritonError", "tl", "triton"]
