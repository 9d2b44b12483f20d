"""toprovar::fae_rotated on CPU, and its kernel in Triton's interpreter, against the operators that it replaces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.errors import CacheOverflowError
from toprovar_compile.kernels import fae_cached, fae_rotated

module: Any = importlib.import_module("toprovar_compile.kernels.fae_rotated")
EPS = 1e-12
NAMES = ("q", "k", "v", "factor", "cos", "sin")


def operands(n: int, d: int, dtype: torch.dtype, heads: int = 4) -> dict[str, Tensor]:
    """q, k, v as views of one product, and caches of 40 tokens."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, n, 3, heads, d, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    angles = torch.rand(2, 1, n, d)
    caches = torch.randn(2, 40, 2, heads, d, dtype=dtype)
    named = {"q": q, "k": k, "v": v, "factor": torch.rand(1, heads, 1, 1) + 1, "cos": angles.cos(), "sin": angles.sin()}
    return named | {"k_cache": caches[0], "v_cache": caches[1]}


def by_operators(given: dict[str, Tensor], start: int) -> tuple[Tensor, Tensor]:
    q = module.rotate_reference(given["q"], given["factor"], given["cos"], given["sin"], EPS).to(given["v"].dtype)
    k = module.rotate_reference(given["k"], None, given["cos"], given["sin"], EPS)
    out: tuple[Tensor, Tensor] = fae_cached(
        q, k, given["v"], given["k_cache"], given["v_cache"], start, None, 1.0, True
    )
    return out


def test_it_is_what_the_operators_give() -> None:
    mine, theirs = operands(5, 16, torch.float32), operands(5, 16, torch.float32)
    got = fae_rotated(*(mine[x] for x in NAMES), EPS, mine["k_cache"], mine["v_cache"], 7, None, 1.0, True)
    for a, b in zip(got, by_operators(theirs, 7), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mine["k_cache"], theirs["k_cache"]) and torch.equal(mine["v_cache"], theirs["v_cache"])


def test_a_full_cache_is_refused() -> None:
    given = operands(5, 16, torch.float32)
    with pytest.raises(CacheOverflowError, match="5 tokens at row 36"):
        fae_rotated(*(given[x] for x in NAMES), EPS, given["k_cache"], given["v_cache"], 36, None, 1.0, False)


@pytest.mark.slow
def test_kernel_in_the_interpreter(interpret: Callable[[str], str]) -> None:
    interpret(__file__)


def main() -> None:
    """What the interpreter runs: few tokens, one head a program; many tokens, four."""
    for n, many in ((5, 256), (33, 1)):
        module._MANY = many
        mine, theirs = operands(n, 32, torch.float16), operands(n, 32, torch.float16)
        caches = module.open_cache(mine["k_cache"], mine["v_cache"], 3, mine["k"])
        q = module._launch(*(mine[x] for x in NAMES), EPS, *caches, 3)
        want = module.rotate_reference(theirs["q"], theirs["factor"], theirs["cos"], theirs["sin"], EPS)
        by_operators(theirs, 3)
        torch.testing.assert_close(q.float(), want, rtol=2e-3, atol=2e-3)
        for cache in ("k_cache", "v_cache"):
            torch.testing.assert_close(mine[cache], theirs[cache], rtol=2e-3, atol=2e-3)


if __name__ == "__main__":
    main()
