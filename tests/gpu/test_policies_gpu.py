"""Policies on a CUDA device: other scores, guidance that ends, and decisions by image, while graphs are replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from toprovar_compile import reference
from toprovar_compile.decision import Decision
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.selection import random_order
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.report import counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PIXEL_TOLERANCE = 1e-3  # mean difference: a sampled token that flips by rounding changes a patch, not the image


def _share(model: VAR, keep: float, start: int, **fields: Any) -> Plan:
    return Plan.keep_share(model.schedule, len(model.blocks), keep, start, bucket=2, **fields)


def _deciding(model: VAR, bound: float) -> Plan:
    """Half of the tokens where rho of scale 2 reaches `bound`, else guidance ends; both are graphs of their own."""
    weigh, none = (1.0, 0.0, 0.0, 0.0), (0.0,) * 4
    return dataclasses.replace(
        Plan.dense(model.schedule, 3),
        decisions=(Decision(2, "entropy", (weigh, none), (0.0, bound), (0, 1), 0.1),),
        alternatives=(_share(model, 0.5, 3), _share(model, 0.5, 4, unguided_from=3)),
    )


def _check(model: VAR, fast: Any, plan: Plan, seeds: range) -> list[Plan | None]:
    """The plans that were followed; images are those of the reference."""
    labels, followed = torch.tensor([1, 2], device="cuda"), []
    model.plan = plan
    for seed in seeds:
        image = fast(labels, seed=seed)
        with reference.pruned(model, plan) as trace:
            expected = model(labels, seed=seed)
        assert float((image - expected).abs().mean()) < PIXEL_TOLERANCE
        followed.append(trace.plan)
    return followed


@pytest.fixture
def model(tiny_var: VAR) -> VAR:
    torch._dynamo.reset()
    counters.reset()
    return tiny_var.cuda()


@pytest.mark.parametrize("score", ["entropy", "mean_distance", "frequency", "random"])
def test_scores_and_the_end_of_guidance(model: VAR, score: Any) -> None:
    fast = compile_steps(model, {})
    _check(model, fast, _share(model, 0.5, 3, score=score, unguided_from=4), range(4))
    counts = counters.snapshot()
    assert counts["cuda_graph_captured"] >= len(model.schedule)
    assert not any(key.startswith(("cuda_graph_miss", "fallback")) for key in counts), counts


def test_decisions_while_graphs_are_replayed(model: VAR) -> None:
    fast = compile_steps(model, {})
    with reference.pruned(model, _deciding(model, 0.0)) as trace:
        model(torch.tensor([1, 2], device="cuda"), seed=3)
    bound = float(trace.features[0][:, 0].mean())
    followed = [_check(model, fast, _deciding(model, bound + shift), range(3, 7)) for shift in (-0.01, 0.01)]
    chosen = {p.digest() for plans in followed for p in plans if p is not None}
    assert len(chosen) == 2
    assert not any(key.startswith(("cuda_graph_miss", "fallback")) for key in counters.snapshot()), counters.snapshot()


def test_previews_while_graphs_are_replayed(model: VAR) -> None:
    fast = compile_steps(model, {})
    decision = Decision(2, "frequency", ((0.0, 0.0), (0.0, 1.0)), (1.0, 0.0), (None, 0), preview=4)
    exits = _share(model, 1.0, 5, exit_scale=4)
    plan = dataclasses.replace(Plan.dense(model.schedule, 3), decisions=(decision,), alternatives=(exits,))
    assert set(_check(model, fast, plan, range(4))) == {plan}  # a share of high frequencies never passes 1
    assert not any(key.startswith(("cuda_graph_miss", "fallback")) for key in counters.snapshot()), counters.snapshot()


def test_random_order_is_that_of_the_cpu() -> None:
    assert torch.equal(random_order(2, 300, 3, 1, 5, "cuda").cpu(), random_order(2, 300, 3, 1, 5, "cpu"))
