"""Pruning policies: how a scale and a layer are scored, how much is kept, how the rest is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, Restore, ScalePlan, Score
from toprovar_compile.schedule import ScaleSchedule

__all__ = ["Policy", "make_plan"]


class Policy(Protocol):
    """Decides, for one model, what each layer does at each scale. `make_plan` turns the decisions into a plan."""

    def scores_by(self) -> Score:
        """What tokens are chosen by."""
        ...

    def keep_count(self, s: int, layer: int) -> int:
        """Tokens that `layer` computes at scale `s`: all of the scale for a dense layer, 0 for a skipped one."""
        ...

    def restore(self) -> Restore:
        """What a token that is not computed becomes."""
        ...

    def exits(self, s: int) -> bool:
        """Whether the generation is left before scale `s`."""
        ...

    def guided(self, s: int) -> bool:
        """Whether scale `s` runs with its unconditional half."""
        ...


def make_plan(
    policy: Policy, schedule: ScaleSchedule, num_layers: int, *, provenance: Mapping[str, Any], **fields: Any
) -> Plan:
    """The plan of a policy; `fields` are further fields of `Plan`. Raises PlanError when the plan cannot run."""
    scales = []
    left = False
    for s, n in enumerate(schedule.tokens):
        left = left or policy.exits(s)
        actions = tuple(_action(policy.keep_count(s, i), n) for i in range(num_layers))
        scales.append(ScalePlan(not left, actions, policy.guided(s)))
    plan = Plan(
        schedule,
        num_layers,
        tuple(scales),
        restore=policy.restore(),
        score=policy.scores_by(),
        provenance=provenance,
        **fields,
    )
    plan.validate_first()
    return plan


def _action(keep: int, n: int) -> LayerAction:
    if keep >= n:
        return DENSE
    return LayerAction("prune", keep) if keep else SKIP
