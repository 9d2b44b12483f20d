"""Calibration: measure attention entropy on sample images and make a plan of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from toprovar_compile import reference
from toprovar_compile.errors import OptionError
from toprovar_compile.plan import Plan
from toprovar_compile.policies.statistics import SPREAD_POINTS, Statistics
from toprovar_compile.policies.toprovar import Thresholds, layer_ratios, low_entropy_share, plan_from_statistics
from toprovar_compile.schedule import ScaleSchedule

Progress = Callable[[int, int], None]


def calibrate(
    model: Any,
    prompts: int = 50,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
    *,
    batch: int = 4,
    sampling: Mapping[str, Any] | None = None,
) -> Plan:
    """Generate images unpruned in eager mode, measure all layers at all scales, and return the plan for this model.

    `prompts` labels, or example prompts of a model that takes prompts, are drawn with `seed`, generated `batch` at a
    time with the keyword arguments `sampling` of the model's forward. `progress` is called with the images done and
    their total. The statistics are in provenance["statistics"], from which `plan_from_statistics` makes plans for other
    thresholds. Equal arguments on the same machine give equal plans. Raises OptionError for numbers below 1 and for a
    model in training mode.
    """
    for name, value in (("prompts", prompts), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is {value!r}", where="calibrate", expected="an integer of at least 1")
    if model.training:
        raise OptionError("the model is in training mode", where="calibrate", expected="model.eval()")
    labels: Any
    if hasattr(model, "sample_prompts"):
        labels = model.sample_prompts(prompts, seed)
    else:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.randint(model.cfg.num_classes, (prompts,), generator=rng).to(next(model.parameters()).device)
    sums = _Sums(model.schedule, len(model.blocks))
    dense = Plan.dense(model.schedule, len(model.blocks))
    with reference.pruned(model, dense, measure_all=True) as trace:
        for start in range(0, prompts, batch):
            part = labels[start : start + batch]
            model(part, seed=seed + start, **(sampling or {}))
            for (s, layer), entropy in trace.entropy.items():
                sums.add(s, layer, entropy)
            if progress is not None:
                progress(start + len(part), prompts)
    stats = sums.statistics(model=model.fingerprint(), prompts=prompts, seed=seed)
    return plan_from_statistics(stats, thresholds)


class _Sums:
    """Sums over all rows of all batches, in float64."""

    def __init__(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.schedule, self.num_layers = schedule, num_layers
        shape = (len(schedule), num_layers)
        self.rows = torch.zeros(shape, dtype=torch.float64)
        self.rho, self.entropy, self.log_ratio = (torch.zeros_like(self.rows) for _ in range(3))
        self.spread = torch.zeros((*shape, SPREAD_POINTS), dtype=torch.float64)

    def add(self, s: int, layer: int, entropy: Tensor) -> None:
        """Count the maps (B, N) of one layer at one scale."""
        entropy = entropy.cpu()
        at = (s, layer)
        mean = entropy.mean(-1, keepdim=True)
        # A map of zeros (one key to attend to) is uniform: every token is at its mean.
        relative = torch.where(mean > 0, entropy / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
        points = (torch.arange(SPREAD_POINTS) + 0.5) / SPREAD_POINTS
        self.rows[at] += entropy.shape[0]
        self.rho[at] += low_entropy_share(entropy).double().sum()
        self.entropy[at] += mean.double().sum()
        # The mean of logarithms: a few maps of almost one component would dominate the mean of the ratios.
        self.log_ratio[at] += layer_ratios(entropy.view(-1, *self.schedule.grids[s])).double().log().sum()
        self.spread[at] += torch.quantile(relative, points, dim=-1).double().sum(-1)

    def statistics(self, *, model: str, prompts: int, seed: int) -> Statistics:
        """The means."""
        rho = (self.rho / self.rows).mean(-1).tolist()
        return Statistics(
            model=model,
            schedule=self.schedule,
            num_layers=self.num_layers,
            prompts=prompts,
            seed=seed,
            rho=tuple(_rounded(r) if n > 1 else None for r, n in zip(rho, self.schedule.tokens, strict=True)),
            entropy=_rounded((self.entropy / self.rows).tolist()),
            ratio=_rounded((self.log_ratio / self.rows).exp().tolist()),
            spread=_rounded((self.spread / self.rows.unsqueeze(-1)).tolist()),
        )


def _rounded(values: Any) -> Any:
    """Nested lists as tuples with five significant digits, which is more than the sampling error leaves."""
    return tuple(_rounded(v) for v in values) if isinstance(values, list) else float(f"{values:.5g}")
