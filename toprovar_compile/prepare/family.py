"""What an adapter of a model family says about itself."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

_RECOMPILE_LIMIT = 64  # forms of a step: models, dtypes, batch sizes and first scales each have their own


@dataclass(frozen=True)
class Family:
    """A family of official models.

    `missing(model)` lists what the family's models have and this one lacks; nothing for a member. `prepare(model)` is
    the module that generates with compilable steps on the model's parameters, and `make_entry(prepared, compiled)` the
    function that takes the place of the method `entry`, whose arguments are `arguments`.
    """

    name: str
    entry: str
    arguments: tuple[str, ...]
    missing: Callable[[nn.Module], list[str]]
    prepare: Callable[[nn.Module], nn.Module]
    make_entry: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]


def compile_steps(module: nn.Module, options: Mapping[str, Any], *, fullgraph: bool = False) -> Any:
    """`torch.compile` with this backend and room for the forms that a step has."""
    compile_with: Any = partial(torch.compile, module, backend="toprovar", options=dict(options), fullgraph=fullgraph)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return compile_with(recompile_limit=_RECOMPILE_LIMIT)
    return _room.around(compile_with())


class _Room:
    """Raises the process's limit while any thread is in a call: before torch 2.12 a function had none of its own.

    The limit is read when a call compiles.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, called with the limit raised."""

        @wraps(compiled)
        def call(*args: Any, **how: Any) -> Any:
            self._enter()
            try:
                return compiled(*args, **how)
            finally:
                self._leave()

        return call

    def _enter(self) -> None:
        config = torch._dynamo.config
        with self._lock:
            if self._inside == 0:
                self._before, config.recompile_limit = config.recompile_limit, _RECOMPILE_LIMIT
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch._dynamo.config.recompile_limit = self._before


_room = _Room()  # one for all: the limit is the process's


def lacks(model: nn.Module, modules: tuple[str, ...], attributes: tuple[str, ...]) -> list[str]:
    """The module paths and attributes that `model` does not have."""
    return [p for p in modules if not has_module(model, p)] + [a for a in attributes if not hasattr(model, a)]


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a submodule at `path`."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
