"""Tables of the area resize hold what `resize_tokens` computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from toprovar_compile.policies.tokens import Grid, area_tables, resize_tokens

CPU = torch.device("cpu")
SIDES = [(1, 1), (1, 6), (2, 2), (2, 3), (3, 4), (3, 5), (5, 7), (6, 6), (7, 12)]
GROWING = [(s, t) for s, t in itertools.product(SIDES, SIDES) if s[0] <= t[0] and s[1] <= t[1]]


@pytest.mark.parametrize(("source", "target"), GROWING)
def test_tables_are_the_resize(source: Grid, target: Grid) -> None:
    rows, shares = area_tables(source, target, CPU)
    n = target[0] * target[1]
    assert (rows.shape, rows.dtype) == ((4, n), torch.int64) and (shares.shape, shares.dtype) == ((4, n), torch.float32)
    x = torch.randn(2, source[0] * source[1], 3)
    assert torch.equal(sum(x[:, rows[j]] * shares[j, :, None] for j in range(4)), resize_tokens(x, source, target))


def test_tables_stay_where_they_are() -> None:
    with torch.inference_mode():
        first = area_tables((2, 5), (3, 5), CPU)
    again = area_tables((2, 5), (3, 5), CPU)
    assert all(a is b and not a.is_inference() for a, b in zip(first, again, strict=True))
