"""Per image: measure the features of a plan's decisions after a scale, and follow the alternative they choose.

One small copy from the device to the host a scale that decides; code and graphs of all alternatives are those of plans
that were always so, and nothing is compiled for a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    found = {key: _measured(d, session, plan, feature_map, decode) for key, d in {_reads(d): d for d in due}.items()}
    if (sink := session.store.get(FEATURES_SINK)) is not None:
        for decision in due:
            sink(decision, found[_reads(decision)][0])
    values = torch.cat([mean for _, mean in found.values()]).tolist()
    measured = {}
    for key, (_, mean) in found.items():
        measured[key], values = values[: len(mean)], values[len(mean) :]
    for decision in due:
        outcome = decision.choose(measured[_reads(decision)])
        counters.add("decision", f"after scale {s}: {'goes on' if outcome is None else f'alternative {outcome}'}")
        if outcome is not None:
            session.plan = plan.alternatives[outcome]
            return


def undecided(plan: Plan) -> Plan:
    """The plan, measuring the features of its decisions and never choosing an alternative."""
    return replace(plan, decisions=tuple(replace(d, outcomes=(None,) * len(d.outcomes)) for d in plan.decisions))


def always(plan: Plan, leaf: str) -> Plan:
    """The plan, measuring what it does and coming for every image to the alternative whose digest is `leaf`."""
    branches = [always(alternative, leaf) for alternative in plan.alternatives]
    towards = next((i for i, a in enumerate(plan.alternatives) if leaf in _digests(a)), None)
    decisions = []
    for d in plan.decisions:
        outcome = towards if towards in d.outcomes else None
        decisions.append(replace(d, outcomes=(outcome,) * len(d.outcomes)))
    return replace(plan, decisions=tuple(decisions), alternatives=tuple(branches))


def _digests(plan: Plan) -> set[str]:
    """Of a plan and all that it may become."""
    return {plan.digest()}.union(*map(_digests, plan.alternatives))


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


def _reads(decision: Decision) -> Hashable:
    """What a decision measures, by name."""
    return decision.features, decision.beta, decision.preview


def _measured(
    decision: Decision, session: Session, plan: Plan, feature_map: Tensor, decode: Decode
) -> tuple[Tensor, Tensor]:
    """Features (B, F) and their mean over the batch, in one launch where the steps are CUDA graphs."""
    key = ("features", plan.digest(), session.scale, _reads(decision))
    if decision.features == "entropy":
        maps = session.store[ENTROPY_SOURCE]()
        run = partial(_with_mean, entropy_features, maps, decision.beta)
        if plan.selection == "gumbel":  # steps are no graphs then, and their maps lie elsewhere in each image
            return _pair(run())
        return _pair(session.launch(key, run, (), [m for m, _ in maps]))
    side = plan.schedule.grids[decision.preview]
    run, given = partial(_previews, side=side, decode=decode), (session.store[_BEFORE], feature_map)
    owner = getattr(decode, "__self__", None)
    if not isinstance(owner, nn.Module):  # nobody knows what it reads
        return _pair(run(*given))
    return _pair(session.launch(key, run, given, [*owner.parameters(), *owner.buffers()]))


def _with_mean(measure: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    features = measure(*args)
    return [features, features.mean(0)]


def _previews(before: Tensor, after: Tensor, *, side: Grid, decode: Decode) -> list[Tensor]:
    return _with_mean(preview_features, before, after, side, decode)


def _pair(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    features, mean = values
    return features, mean
