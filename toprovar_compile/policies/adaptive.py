"""ToProVAR by image: the layers to prune and the scale to start at follow from the entropies of the image itself.

The plan holds one alternative for every number of pruned layers and every start, built in advance from calibration, as
one compiled variant for each (layer class, kept count) has to exist. What an image measures only chooses among them:

    after the representative scale    the nested set of Detail layers that fits the R of its layers best;
    after each scale from there on    whether rho has reached tau, so that pruning starts at the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from toprovar_compile.decision import Decision
from toprovar_compile.errors import OptionError
from toprovar_compile.plan import DENSE, Plan
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds, ToProVarPolicy, plan_from_statistics

PARTS = (1 / 3, 2 / 3, 1.0)
"""Shares of the prunable layers that the prepared sets have."""


def adaptive_plan(stats: Statistics, thresholds: Thresholds | None = None, *, parts: Sequence[float] = PARTS) -> Plan:
    """The plan whose depth and layers are chosen by each image, under the thresholds (default: `Thresholds()`).

    Layers that calibration calls Detail may be pruned, those of highest score first. Of the sets that `parts` make, an
    image takes the one with the largest sum of R - detail_above over its layers. `thresholds.tau` bounds rho, which
    counts as rising; `depth` and `crossing` have no part in it.
    Raises OptionError where no layer is Detail, or fewer than two scales follow the representative one.
    """
    thresholds = thresholds or Thresholds()
    base = replace(thresholds, depth=None, crossing="rising")
    policy = ToProVarPolicy(stats, base)
    first, last = policy.representative_scale, len(stats.schedule) - 1
    detail = [i for i in range(stats.num_layers) if policy.layer_class(i) == "detail"]
    if not detail:
        raise OptionError("no layer is Detail", where="adaptive_plan", expected="a lower detail_above")
    starts = range(first + 2, last + 1 if base.exit_scale is None else min(last + 1, base.exit_scale))
    if not starts:
        raise OptionError(
            f"the representative scale is {first}, the last {last}",
            where="adaptive_plan",
            expected="at least two scales after it that run",
        )
    ranked = sorted(detail, key=lambda i: -policy.scores[i])
    sets = [frozenset(ranked[: max(1, round(part * len(ranked)))]) for part in parts]
    trunk = _started(stats, base, frozenset(), last)
    branches = []
    for chosen in sets:
        by_start = tuple(_started(stats, base, chosen, start) for start in starts)
        decisions = tuple(
            Decision(
                start - 1,
                "entropy",
                ((1.0, *(0.0,) * stats.num_layers), (0.0,) * (1 + stats.num_layers)),
                (0.0, base.tau),
                (i, None),
                policy.beta,
            )
            for i, start in enumerate(starts)
        )
        branches.append(replace(trunk, decisions=decisions, alternatives=by_start))
    weights = tuple((0.0, *(float(i in chosen) for i in range(stats.num_layers))) for chosen in sets)
    biases = tuple(-base.detail_above * len(chosen) for chosen in sets)
    choice = Decision(first, "entropy", weights, biases, tuple(range(len(sets))), policy.beta)
    return replace(
        trunk,
        decisions=(choice,),
        alternatives=tuple(branches),
        provenance={
            "made_by": "toprovar, adaptive",
            "thresholds": {**asdict(base), "buckets": list(base.buckets)},
            "layer_sets": [sorted(chosen) for chosen in sets],
            "starts": list(starts),
            "statistics": stats.to_json(),
        },
    )


def _started(stats: Statistics, thresholds: Thresholds, layers: frozenset[int], start: int) -> Plan:
    """The calibrated plan that starts at `start`, with all other layers dense."""
    plan = plan_from_statistics(stats, replace(thresholds, depth=start))
    rows = [tuple(a if i in layers else DENSE for i, a in enumerate(s.layers)) for s in plan.scales]
    scales = tuple(replace(s, layers=row) for s, row in zip(plan.scales, rows, strict=True))
    return replace(plan, scales=scales, provenance={})
