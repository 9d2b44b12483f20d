"""Resampled intervals and frontiers."""

from __future__ import annotations

import math

import pytest
import torch

from toprovar_compile.evaluate.intervals import frontier, mean_interval, resamples


def test_interval_is_that_of_the_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = mean_interval(values)
    error = 1.96 * values.std().item() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert found.high - found.mean == pytest.approx(error, rel=0.15)
    assert found.mean - found.low == pytest.approx(error, rel=0.15)


def test_resamples_are_shares() -> None:
    weights = resamples(7, 50)
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(weights, resamples(7, 50))


def test_frontier_is_the_upper_hull() -> None:
    share = torch.tensor([0.2, 0.4, 0.5, 0.8])
    quality = torch.tensor([0.5, 0.9, 0.8, 1.0])
    got = frontier(share, quality, torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6, 0.9]))
    wanted = [-math.inf, 0.5, 0.7, 0.9 + 0.1 / 4, 0.95, 1.0]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    both = frontier(share.expand(2, 4), torch.stack((quality, quality / 2)), torch.tensor([0.3]))
    torch.testing.assert_close(both, torch.tensor([[0.7], [0.35]], dtype=torch.float64), rtol=1e-6, atol=1e-6)
