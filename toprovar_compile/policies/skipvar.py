"""SkipVAR as a policy (arXiv 2506.08908): after one scale, each image decides how its last scales are saved.

Two frequency features of a small preview go through two logistic models. The first says how many of the last scales to
leave out (0..3). Where it says none, the second says in how many of them the conditional logits replace the guided ones
(0..3), so that the unconditional half need not run. Both are trained on images of the model itself, by
`train_skipvar`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.decision import Decision
from toprovar_compile.errors import OptionError
from toprovar_compile.plan import DENSE, Plan, ScalePlan
from toprovar_compile.reference import Trace, pruned
from toprovar_compile.schedule import ScaleSchedule

MOST = 3
"""Most scales that are left out, or run without guidance."""

_PREVIEW = 8  # side of the grid that previews are made on
_ROUNDS = 200  # of L-BFGS, far more than a convex problem of 12 numbers takes

Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LogisticModel:
    """Standardisation and multinomial logistic regression: features (F,) to one of `classes`."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]
    classes: tuple[int, ...]

    def decision(self, after: int, preview: int, outcomes: Mapping[int, int]) -> Decision:
        """The model as a decision on raw features; classes that `outcomes` does not name go on with the plan."""
        rows = tuple(tuple(w / d for w, d in zip(row, self.deviation, strict=True)) for row in self.weights)
        biases = tuple(
            b - sum(w * m for w, m in zip(row, self.mean, strict=True))
            for row, b in zip(rows, self.biases, strict=True)
        )
        return Decision(after, "frequency", rows, biases, tuple(outcomes.get(c) for c in self.classes), preview=preview)


def fit_logistic(features: Tensor, labels: Tensor, strength: float = 1.0) -> LogisticModel:
    """Fit by L-BFGS: features float (N, F), labels int64 (N,).

    Minimises the summed cross-entropy plus |weights|^2 / (2 * strength), biases free, on features of mean 0 and
    variance 1: the settings of the published models. With one class alone it is always the answer.
    """
    x = features.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = deviation.where(deviation > 0, 1.0)
    classes, target = torch.unique(labels, return_inverse=True)
    w = torch.zeros(len(classes), x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    standard = (x - mean) / deviation
    solver = torch.optim.LBFGS([w, b], max_iter=_ROUNDS, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(standard @ w.T + b, target, reduction="sum") + w.square().sum() / (2 * strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    if len(classes) > 1:
        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
    return LogisticModel(
        tuple(mean.tolist()),
        tuple(deviation.tolist()),
        tuple(map(tuple, w.detach().tolist())),
        tuple(b.detach().tolist()),
        tuple(classes.tolist()),
    )


def strategies(schedule: ScaleSchedule, num_layers: int, fingerprint: str = "") -> list[Plan]:
    """The plans that an image chooses from: one, two and three last scales left out, then as many without guidance."""
    last = len(schedule)
    if last < MOST + 3:
        raise OptionError(f"the model has {last} scales", where="skipvar", expected=f"at least {MOST + 3}")
    dense = ScalePlan(layers=(DENSE,) * num_layers)
    bare = ScalePlan(layers=dense.layers, cfg=False)
    rows = [(dense,) * (last - n) + (ScalePlan(run=False),) * n for n in range(1, MOST + 1)]
    rows += [(dense,) * (last - n) + (bare,) * n for n in range(1, MOST + 1)]
    return [Plan(schedule, num_layers, row, model=fingerprint) for row in rows]


def skipvar_plan(
    schedule: ScaleSchedule,
    num_layers: int,
    skip: LogisticModel,
    unguide: LogisticModel,
    *,
    fingerprint: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that decides by two trained models, after the last scale that no strategy touches."""
    after = _after(schedule)
    preview = preview_scale(schedule)
    return Plan(
        schedule,
        num_layers,
        (ScalePlan(layers=(DENSE,) * num_layers),) * len(schedule),
        model=fingerprint,
        decisions=(
            skip.decision(after, preview, {n: n - 1 for n in range(1, MOST + 1)}),
            unguide.decision(after, preview, {n: MOST + n - 1 for n in range(1, MOST + 1)}),
        ),
        alternatives=tuple(strategies(schedule, num_layers, fingerprint)),
        provenance={"made_by": "skipvar", **(provenance or {})},
    )


def preview_scale(schedule: ScaleSchedule) -> int:
    """The scale whose grid is nearest to 8 x 8, the size of the published previews."""
    return min(range(len(schedule)), key=lambda s: abs(schedule.tokens[s] - _PREVIEW**2))


def labels_of(similar: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Classes of both models, int64 (N,) each, from the similarity (N, 6) of each image under `strategies`.

    The boldest strategy that reaches `target` is right, leaving out before switching off.
    """
    reached = similar >= target
    steps = torch.arange(1, MOST + 1)
    skip, unguide = ((part * steps).amax(1) for part in torch.split(reached, MOST, dim=1))
    return skip, unguide


@dataclass(frozen=True)
class Trials:
    """What training needs of N images: `similar` (N, 6) under `strategies`, `features` (N, 2), both on the CPU."""

    schedule: ScaleSchedule
    num_layers: int
    fingerprint: str
    seed: int
    similar: Tensor
    features: Tensor


@torch.no_grad()
def try_strategies(
    model: Any,
    labels: Any,
    *,
    seed: int,
    similarity: Similarity,
    batch: int = 16,
    sampling: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trials:
    """Generate `labels` (N,), or N prompts, under every strategy, and measure by `similarity`.

    That gives one number an image for two sets of them. Images are generated `batch` at a time, the batch that starts
    at index i with seed + i; `sampling` goes to the model's forward.
    """
    schedule, depth, fingerprint = model.schedule, len(model.blocks), model.fingerprint()
    plans = strategies(schedule, depth, fingerprint)
    measure = Decision(_after(schedule), "frequency", ((0.0, 0.0),), (0.0,), (None,), preview=preview_scale(schedule))
    probe = replace(Plan.dense(schedule, depth, fingerprint), decisions=(measure,))
    rows, features = [], []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        wanted, trace = generated(model, probe, part, seed + start, sampling)
        features.append(trace.features[0].cpu())
        close = [similarity(generated(model, p, part, seed + start, sampling)[0], wanted) for p in plans]
        rows.append(torch.stack(close, dim=1).cpu())
        progress(start + len(part), len(labels))
    return Trials(schedule, depth, fingerprint, seed, torch.cat(rows), torch.cat(features))


def train_skipvar(trials: Trials, target: float) -> Plan:
    """Learn which strategy is the boldest that keeps an image's similarity at `target`, and make the plan of it.

    The published models have SSIM 0.84, 0.86 and 0.88 as targets. The second model learns from the images for which
    the first has to say none, from all where there is no such image.
    """
    skip, unguide = labels_of(trials.similar, target)
    guided = skip == 0 if bool((skip == 0).any()) else torch.ones_like(skip, dtype=torch.bool)
    return skipvar_plan(
        trials.schedule,
        trials.num_layers,
        fit_logistic(trials.features, skip),
        fit_logistic(trials.features[guided], unguide[guided]),
        fingerprint=trials.fingerprint,
        provenance={
            "target": target,
            "images": len(skip),
            "seed": trials.seed,
            "skip_classes": skip.bincount(minlength=MOST + 1).tolist(),
            "unguide_classes": unguide[guided].bincount(minlength=MOST + 1).tolist(),
            "features_mean": trials.features.mean(0).tolist(),
        },
    )


def generated(
    model: Any, plan: Plan, labels: Any, seed: int, sampling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Trace]:
    """Images (N, 3, H, W) of the eager reference, float32 on the CPU, and what happened."""
    with pruned(model, plan) as trace:
        images: Tensor = model(labels, seed=seed, **(sampling or {}))
    return images.float().cpu(), trace


def _after(schedule: ScaleSchedule) -> int:
    """The last scale that no strategy touches."""
    return len(schedule) - MOST - 1
