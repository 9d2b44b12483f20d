"""Per image: measure the features of a plan's decisions after a scale, and follow the alternative they choose.

One small copy from the device to the host a scale that decides; code and graphs of all alternatives are those of plans
that were always so, and nothing is compiled for a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.decision import Decision
from toprovar_compile.plan import Plan
from toprovar_compile.policies.frequency import frequency_features
from toprovar_compile.policies.tokens import Grid
from toprovar_compile.policies.toprovar import layer_ratios, layer_scores, low_entropy_share
from toprovar_compile.report import counters
from toprovar_compile.session import Session

Decode = Callable[[Tensor], Tensor]

ENTROPY_SOURCE = "latest entropy"
"""Key in `Session.store` of a callable that gives the latest map (B, N) and its grid for every layer."""

FEATURES_SINK = "features"
"""Key in `Session.store` of a callable that is given (decision, features (B, F)) of every decision."""

_BEFORE = "features before the scale"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def decide(session: Session, feature_map: Tensor, decode: Decode) -> None:
    """Let the plan of `session` decide after its current scale; a chosen alternative becomes the session's plan.

    `feature_map` (B, C, H, W) is what the model has summed up so far, `decode` makes images in 0..1 of such maps.
    Images of one batch go the same way: by the mean of their features.
    """
    plan = session.plan
    if plan is None or not plan.decisions:
        return
    s = session.scale
    due = [d for d in plan.decisions if d.after == s]
    if any(d.features == "frequency" and d.after == s + 1 for d in plan.decisions):
        session.store[_BEFORE] = feature_map
    if not due:
        return
    found = [_features(d, session, plan, feature_map, decode) for d in due]
    if (sink := session.store.get(FEATURES_SINK)) is not None:
        for decision, features in zip(due, found, strict=True):
            sink(decision, features)
    measured = torch.cat([features.mean(0) for features in found]).tolist()
    for decision in due:
        count = len(decision.weights[0])
        outcome = decision.choose(measured[:count])
        measured = measured[count:]
        counters.add("decision", f"after scale {s}: {'goes on' if outcome is None else f'alternative {outcome}'}")
        if outcome is not None:
            session.plan = plan.alternatives[outcome]
            return


def undecided(plan: Plan) -> Plan:
    """The plan, measuring the features of its decisions and never choosing an alternative."""
    return replace(plan, decisions=tuple(replace(d, outcomes=(None,) * len(d.outcomes)) for d in plan.decisions))


def choose_rows(plan: Plan, features: Iterable[Tensor], batch: int) -> list[int | None]:
    """What each of `batch` images chooses when it is alone, from the features (B, F) that `undecided` measured.

    The features come in the order of the decisions. Rows beyond `batch` are the images again, the other half of
    guidance.
    """
    rows = [f.reshape(-1, batch, f.shape[-1]).mean(0).tolist() for f in features]
    asked = sorted(plan.decisions, key=lambda d: d.after)
    return [
        next((o for d, row in zip(asked, rows, strict=True) if (o := d.choose(row[i])) is not None), None)
        for i in range(batch)
    ]


def entropy_features(maps: Iterable[tuple[Tensor, Grid]], beta: float) -> Tensor:
    """rho, averaged over layers, and R of every layer: float32 (B, 1 + L) from one map (B, N) a layer, with its grid.

    Rows of both halves of guidance count alike.
    """
    known = list(maps)
    grid = known[0][1]
    entropy = torch.stack([m for m, _ in known], dim=1)  # (B, L, N)
    rho = low_entropy_share(entropy).mean(1, keepdim=True)
    return torch.cat((rho, layer_scores(layer_ratios(entropy.view(*entropy.shape[:-1], *grid)), beta)), dim=1)


def preview_features(before: Tensor, after: Tensor, side: tuple[int, int], decode: Decode) -> Tensor:
    """`frequency_features` of previews of two feature maps (B, C, H, W), shrunk to `side` before they are decoded."""
    small = [F.interpolate(m.float(), size=side, mode="bilinear").to(m.dtype) for m in (before, after)]
    first, second = (decode(torch.cat(small)) * 2 - 1).chunk(2)
    return frequency_features(first, second)


def _features(decision: Decision, session: Session, plan: Plan, feature_map: Tensor, decode: Decode) -> Tensor:
    if decision.features == "entropy":
        return entropy_features(session.store[ENTROPY_SOURCE](), decision.beta)
    return preview_features(session.store[_BEFORE], feature_map, plan.schedule.grids[decision.preview], decode)
