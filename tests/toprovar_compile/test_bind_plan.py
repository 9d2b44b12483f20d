"""Which plan a generation follows, and when that is decided again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.bind_plan import PlanBinder
from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.models.var import VAR
from toprovar_compile.options import Options
from toprovar_compile.plan import Plan
from toprovar_compile.policies.toprovar import Thresholds, plan_from_statistics
from toprovar_compile.report import counters
from toprovar_compile.session import generation


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.reset()


@pytest.fixture(scope="module")
def model(make_var: Callable[..., VAR]) -> VAR:
    """Three layers; its plan is given test by test."""
    return make_var()


@pytest.fixture(scope="module")
def calibrated(model: VAR) -> Plan:
    """A plan made by calibration, with its statistics."""
    return calibrate(model, prompts=2)


def bind(binder: PlanBinder, model: VAR, known: Plan | None = None, weights: Any = None) -> Plan | None:
    """The plan of one generation of `model`, as its first compiled step asks for it."""
    with generation(model.schedule, model.fingerprint, known) as session:
        plan = binder.plan(list(model.parameters()) if weights is None else weights, len(model.blocks))
        assert session.plan is plan
        assert binder.plan([], 99) is plan, "a generation keeps its plan"
    return plan


def binder(**options: Any) -> PlanBinder:
    """A binder for these options."""
    return PlanBinder(Options.parse(options))


def half(var: VAR, **fields: Any) -> Plan:
    """A plan that keeps half of the tokens at the last scale."""
    return replace(Plan.keep_share(var.schedule, 3, 0.5, 4, bucket=2), **fields)


def test_outside_a_generation(model: VAR) -> None:
    assert binder(plan=half(model)).plan([], 3) is None


def test_dense(model: VAR) -> None:
    assert bind(binder(plan="dense"), model, half(model)) is None
    assert counters.snapshot() == {}


def test_auto_takes_the_models_own_plan(model: VAR) -> None:
    plan = half(model, model=model.fingerprint())
    assert bind(binder(), model, plan) is plan
    assert counters.snapshot() == {}


def test_auto_without_one(model: VAR) -> None:
    assert bind(binder(), model) is None
    (event,) = counters.snapshot()
    assert "runs dense: the model brings no plan" in event


def test_auto_with_one_of_other_weights(model: VAR) -> None:
    assert bind(binder(), model, half(model, model="0123")) is None
    (event,) = counters.snapshot()
    assert "the model's own plan does not fit it" in event and "0123" in event


def test_explicit(model: VAR, tmp_path: Path) -> None:
    plan, path = half(model), tmp_path / "plan.json"
    plan.save(path)
    assert bind(binder(plan=plan), model) is plan
    assert bind(binder(plan=path), model) == bind(binder(plan=str(path)), model) == plan


@pytest.mark.parametrize("wrong", ["model", "depth", "schedule"])
def test_explicit_that_does_not_fit(model: VAR, make_var: Callable[..., VAR], wrong: str) -> None:
    plans = {
        "model": half(model, model="0123"),
        "depth": Plan.dense(model.schedule, 4),
        "schedule": Plan.dense(make_var(patch_nums=(1, 2, 3)).schedule, 3),
    }
    with pytest.raises(PlanError):
        bind(binder(plan=plans[wrong]), model)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        binder(plan=tmp_path / "none.json")


# overrides and thresholds


def test_overrides_need_no_statistics(model: VAR) -> None:
    plan = half(model)
    bound = bind(binder(plan=plan, restore="identity", direction="high_entropy"), model)
    assert bound == replace(plan, restore="identity", direction="high_entropy")
    assert bind(binder(selection="gumbel"), model, plan) == replace(plan, selection="gumbel")


def test_thresholds_make_the_plan_anew(model: VAR, calibrated: Plan) -> None:
    bound = bind(binder(alpha_min=0.5, tau=0.3), model, calibrated)
    assert bound is not None and bound.alpha_min == 0.5
    statistics = calibrated.provenance["statistics"]
    before = {k: v for k, v in calibrated.provenance["thresholds"].items() if v is not None}
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in before.items()}
    assert bound == plan_from_statistics(statistics, Thresholds(**{**before, "alpha_min": 0.5, "tau": 0.3}))


def test_other_thresholds_stay_as_they_were(model: VAR, calibrated: Plan) -> None:
    first = bind(binder(restore="identity", alpha_max=0.6), model, calibrated)
    assert first is not None and first.model == calibrated.model
    again = bind(binder(alpha_min=0.2), model, first)
    assert again is not None
    assert (again.restore, again.alpha_min, again.alpha_max) == ("identity", 0.2, 0.6)


def test_tau_takes_the_place_of_a_depth_set_by_hand(model: VAR, calibrated: Plan) -> None:
    statistics = calibrated.provenance["statistics"]
    by_hand = plan_from_statistics(statistics, Thresholds(depth=4))
    assert bind(binder(alpha_min=0.2), model, by_hand) == plan_from_statistics(
        statistics, Thresholds(depth=4, alpha_min=0.2)
    )
    assert bind(binder(tau=0.3), model, by_hand) == plan_from_statistics(statistics, Thresholds(tau=0.3))


def test_thresholds_through_a_file(model: VAR, calibrated: Plan, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "plan.json")
    bound = bind(binder(plan=tmp_path / "plan.json", buckets=[0.5, 0.75]), model)
    assert bound == bind(binder(plan=calibrated, buckets=(0.5, 0.75)), model)


def test_thresholds_without_statistics(model: VAR) -> None:
    with pytest.raises(OptionError, match=r"tau, beta given, but the plan holds no statistics.*toprovar calibrate"):
        binder(plan=half(model), tau=0.5, beta=1.0)
    with pytest.raises(OptionError, match="the plan holds no statistics"):
        bind(binder(tau=0.5), model, half(model))


def test_thresholds_with_dense() -> None:
    with pytest.raises(OptionError, match="tau given with plan='dense'"):
        binder(plan="dense", tau=0.5)


# when it is checked


def test_checked_once_for_each_state_of_the_weights(model: VAR) -> None:
    asked: list[int] = []

    def fingerprint() -> str:
        asked.append(1)
        return "0123"

    weights, bound = [torch.zeros(2), torch.ones(2)], binder()
    plan, other = half(model, model="0123"), half(model, model="0123", restore="identity")

    def once(known: Plan = plan, given: list[Tensor] = weights) -> Plan | None:
        with generation(model.schedule, fingerprint, known):
            return bound.plan(given, 3)

    assert once() is plan and once() is plan
    assert len(asked) == 1
    weights[1].add_(1)
    assert once() is plan
    assert len(asked) == 2, "a weight was written to"
    assert once(given=[weights[0], torch.ones(2)]) is plan
    assert len(asked) == 3, "a weight was exchanged"
    assert once(other, [weights[0]]) is other, "the model was given another plan"


def test_a_plan_that_no_longer_fits_is_noticed(make_var: Callable[..., VAR]) -> None:
    model = make_var()
    bound = binder(plan=half(model, model=model.fingerprint()))
    assert bind(bound, model) is not None
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(PlanError, match="model"):
        bind(bound, model)


def test_weights_made_in_inference_mode(model: VAR) -> None:
    with torch.inference_mode():
        weights = [torch.zeros(2)]
    plan = half(model)
    assert bind(binder(), model, plan, weights) is plan
