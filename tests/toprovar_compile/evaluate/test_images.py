"""Many images at a time, each with its own decisions."""

from __future__ import annotations

import dataclasses

import torch

from toprovar_compile.decision import Decision
from toprovar_compile.evaluate.images import generate
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.reference import pruned

LABELS = torch.tensor([0, 3, 5, 8, 1])


def _deciding(model: VAR, bound: float) -> Plan:
    inner = Plan.keep_share(model.schedule, 3, 0.5, 4, bucket=1)
    weigh = (1.0, 0.0, 0.0, 0.0)
    nested = dataclasses.replace(
        Plan.dense(model.schedule, 3),
        decisions=(Decision(3, "entropy", (weigh, (0.0,) * 4), (0.0, bound), (0, None)),),
        alternatives=(inner,),
    )
    exits = Plan.keep_share(model.schedule, 3, 1.0, 5, exit_scale=4)
    return dataclasses.replace(
        Plan.dense(model.schedule, 3),
        decisions=(Decision(2, "entropy", (weigh, (0.0,) * 4), (0.0, bound), (0, 1)),),
        alternatives=(nested, exits),
    )


def test_fixed_plans(tiny_var: VAR) -> None:
    plan = Plan.keep_share(tiny_var.schedule, 3, 0.5, 4, bucket=1)
    got = generate(tiny_var, plan, LABELS, seed=2, batch=3)
    with pruned(tiny_var, plan):
        wanted = torch.cat([tiny_var(LABELS[:3], seed=2), tiny_var(LABELS[3:], seed=5)])
    assert torch.equal(got.images, wanted)
    assert got.shares.tolist() == [plan.total_share()] * 5


def test_each_image_decides_for_itself(tiny_var: VAR) -> None:
    """Every image equals that of the fixed plan which it followed, in the same batch, and all branches are taken."""
    plan = _deciding(tiny_var, 0.43)
    got = generate(tiny_var, plan, LABELS, seed=2, batch=5)
    assert len({p.digest() for p in got.plans}) >= 2
    for i, followed in enumerate(got.plans):
        fixed = dataclasses.replace(followed, decisions=(), alternatives=())
        same = generate(tiny_var, fixed, LABELS, seed=2, batch=5)
        torch.testing.assert_close(got.images[i], same.images[i])
    assert got.shares.shape == (5,) and got.shares.max() <= 1


def test_tokens_are_compared_scale_by_scale(tiny_var: VAR) -> None:
    dense = generate(tiny_var, Plan.dense(tiny_var.schedule, 3), LABELS, seed=2, batch=3)
    assert [t.shape for t in dense.tokens] == [(5, n) for n in tiny_var.schedule.tokens]
    assert dense.flips(dense) == [0.0] * len(tiny_var.schedule)
    exits = Plan.keep_share(tiny_var.schedule, 3, 1.0, 5, exit_scale=4)
    assert generate(tiny_var, exits, LABELS, seed=2, batch=3).flips(dense) == [0.0] * 4 + [None] * (
        len(tiny_var.schedule) - 4
    )
    half = Plan.keep_share(tiny_var.schedule, 3, 0.5, 3, bucket=1, restore="identity")
    rates = generate(tiny_var, half, LABELS, seed=2, batch=3).flips(dense)
    assert rates[:3] == [0.0] * 3 and (rates[4] or 0) > 0
    mixed = generate(tiny_var, _deciding(tiny_var, 0.43), LABELS, seed=2, batch=5)
    left = [p.exit_scale == 4 for p in mixed.plans]
    assert any(left) and not all(left) and ((mixed.tokens[4] < 0).all(1)).tolist() == left
