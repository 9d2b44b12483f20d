"""Confidence intervals by resampling images, for means and for frontiers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: Tensor, draws: Tensor) -> Interval:
        """From a scalar and its resampled values (D,)."""
        tail = (1 - _LEVEL) / 2
        low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return cls(round(float(mean), 5), round(low, 5), round(high, 5))


def resamples(n: int, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Weights float64 (draws, n), each row the shares of n images drawn from n with replacement."""
    picks = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, n, dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return counts / n


def mean_interval(values: Tensor, draws: int = DRAWS) -> Interval:
    """The mean of one value an image (N,)."""
    values = values.double()
    return Interval.of(values.mean(), resamples(len(values), draws) @ values)


def frontier(share: Tensor, quality: Tensor, at: Tensor) -> Tensor:
    """Best quality that costs at most `at` (T,): from points (..., P) of share and quality, (..., T).

    Between points the upper hull is followed, as one that takes either plan image by image would. -inf where no point
    is cheap enough.
    """
    lead, points, targets = share.shape[:-1], share.shape[-1], at.shape[0]
    x, y = share.double().reshape(-1, points), quality.double().reshape(-1, points)
    best = torch.where(x.unsqueeze(1) <= at.view(1, -1, 1), y.unsqueeze(1), -torch.inf).amax(-1)
    for i in range(points):  # every line between a point left and one right of the target
        dx = x - x[:, i : i + 1]
        slope = (y - y[:, i : i + 1]) / torch.where(dx > 0, dx, 1.0)
        for t in range(targets):
            spans = (dx > 0) & (x[:, i : i + 1] <= at[t]) & (x >= at[t])
            line = y[:, i : i + 1] + slope * (at[t] - x[:, i : i + 1])
            best[:, t] = torch.maximum(best[:, t], torch.where(spans, line, -torch.inf).amax(-1))
    return best.view(*lead, targets)
