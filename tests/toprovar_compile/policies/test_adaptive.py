"""The adaptive form of ToProVAR: what it prepares, and what images choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.adaptive import adaptive_plan
from toprovar_compile.policies.decide import entropy_features
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds
from toprovar_compile.reference import pruned

LOOSE = Thresholds(
    beta=1e-4, global_below=0, detail_above=0, buckets=(0.25, 0.5), representative_scale=2, alpha_min=0.4, min_share=0
)


@pytest.fixture(scope="module")
def model(make_var: Callable[..., VAR]) -> VAR:
    return make_var(patch_nums=(1, 2, 3, 4, 6, 7))


@pytest.fixture(scope="module")
def stats(model: VAR) -> Statistics:
    return Statistics.from_json(calibrate(model, prompts=2).provenance["statistics"])


def test_what_is_prepared(stats: Statistics) -> None:
    plan = adaptive_plan(stats, LOOSE)
    assert [p.decisions[0].after for p in plan.alternatives] == [3, 3, 3] and plan.decisions[0].after == 2
    sets = plan.provenance["layer_sets"]
    assert [len(s) for s in sets] == [1, 2, 3] and set(sets[0]) < set(sets[1]) < set(sets[2])
    for chosen, branch in zip(sets, plan.alternatives, strict=True):
        assert [p.action(4, 0).kind for p in branch.alternatives][1] == "dense"
        early, late = branch.alternatives
        assert [i for i in range(3) if early.action(4, i).kind == "prune"] == chosen
        assert [i for i in range(3) if late.action(5, i).kind == "prune"] == chosen
    assert Plan.from_json(plan.to_json()) == plan
    plan.validate_first()


def test_images_choose_by_their_own_entropies(model: VAR, stats: Statistics) -> None:
    dense = Plan.dense(model.schedule, 3)
    with pruned(model, dense, measure_all=True) as trace:
        model(torch.tensor([3]), seed=7)
    rho = entropy_features(((trace.entropy[3, i], (4, 4)) for i in range(3)), 1.0)[:, 0].mean().item()
    for tau, start in ((rho - 1e-3, 4), (rho + 1e-3, 5)):
        plan = adaptive_plan(stats, Thresholds(**{**vars(LOOSE), "tau": tau}))
        with pruned(model, plan) as trace:
            model(torch.tensor([3]), seed=7)
        assert trace.plan is not None
        kinds = [{trace.plan.action(s, i).kind for i in range(3)} for s in range(6)]
        first = next((s for s, k in enumerate(kinds) if "prune" in k), None)
        assert first == start or (start == 5 and first is None)


def test_layer_sets_follow_the_scores(model: VAR, stats: Statistics) -> None:
    """With a bound below every score all layers are pruned, with one above them the fewest."""
    for detail_above, count in ((0.0, 3), (1.0, 1)):
        plan = adaptive_plan(stats, LOOSE)
        decision = plan.decisions[0]
        scores = [0.5] * 4
        biased = [-detail_above * len(s) for s in plan.provenance["layer_sets"]]
        chosen = type(decision)(2, "entropy", decision.weights, tuple(biased), decision.outcomes).choose(scores)
        assert chosen is not None and len(plan.provenance["layer_sets"][chosen]) == count


def test_errors(stats: Statistics) -> None:
    with pytest.raises(OptionError, match="no layer is Detail"):
        adaptive_plan(stats, Thresholds(beta=1e6))
    with pytest.raises(OptionError, match="two scales after it"):
        adaptive_plan(stats, Thresholds(**{**vars(LOOSE), "representative_scale": 5}))
