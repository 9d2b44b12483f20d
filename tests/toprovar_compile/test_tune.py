"""The search for plans: goals, the frontier, confirmation, and the evidence in the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toprovar_compile import cli
from toprovar_compile.calibrate import calibrate
from toprovar_compile.costs import Costs
from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.toprovar import Thresholds
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.tune import Goal, Settings, Trial, frontier_of, tune

LOOSE = Thresholds(beta=1e-4, global_below=0, detail_above=0, representative_scale=2)
FEW = Settings(trials=12, images=2, held_out=3, images_at_once=3)


@pytest.fixture
def model(make_var: Callable[..., VAR]) -> VAR:
    model = make_var(patch_nums=(1, 2, 3, 4, 6, 7))
    model.plan = calibrate(model, prompts=2, thresholds=LOOSE)
    return model


def test_frontier() -> None:
    plan = Plan.dense(ScaleSchedule.from_patch_nums((1, 2, 3, 4)), 1)
    points = [(0.9, 1.5), (0.95, 1.2), (0.8, 1.4), (0.9, 1.6), (1.0, 1.0), (0.7, 3.0)]
    found = frontier_of([Trial(plan, *p) for p in points])
    assert [(t.ssim, t.speedup) for t in found] == [(1.0, 1.0), (0.95, 1.2), (0.9, 1.6), (0.7, 3.0)]


def test_closeness_as_goal(model: VAR, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    found = tune(model, Goal(ssim=0.5), FEW)
    tuned = found.plan.provenance["tuned"]
    assert found.reached and tuned["ssim_held_out"]["mean"] >= 0.5 and len(tuned["ssim_held_out_each"]) == 3
    assert found.plan.model == model.fingerprint() and found.trials <= 12
    assert found.frontier[0].ssim >= found.frontier[-1].ssim
    found.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found.plan
    found.plan.check_model(model.fingerprint(), model.schedule, 3)
    again = tune(model, Goal(ssim=0.5), FEW)
    assert again.plan == found.plan


def test_speed_as_goal(model: VAR) -> None:
    pytest.importorskip("optuna")
    found = tune(model, Goal(speedup=1.3), FEW)
    costs = Costs.by_tokens(found.plan)
    assert found.reached and costs.speedup(found.plan) >= 1.3
    assert found.plan.provenance["tuned"]["speedup"]["by"] == "tokens"


def test_command(model: VAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(cli, "_load", lambda name, device: model)
    few = ["--trials", "9", "--images", "1", "--held-out", "1", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, ["tune", "-o", str(tmp_path / "p.json"), "--target-speedup", "1.2", *few])
    assert done.exit_code == 0 and "frontier: SSIM" in done.output
    assert Plan.load(tmp_path / "p.json").provenance["made_by"] == "toprovar tune"


def test_a_goal_out_of_reach(model: VAR) -> None:
    pytest.importorskip("optuna")
    found = tune(model, Goal(speedup=1e6), Settings(trials=8, images=1, held_out=1))
    assert not found.reached and not found.plan.provenance["tuned"]["reached"]


@pytest.mark.parametrize(("ssim", "speedup"), [(None, None), (0.9, 2.0), (1.0, None), (None, 0.5)])
def test_goals_are_validated(ssim: float | None, speedup: float | None) -> None:
    with pytest.raises(OptionError, match="tune"):
        Goal(ssim, speedup)


def test_what_is_missing_is_said(model: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        Settings(trials=0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"toprovar_compile\[tune\]"):
        tune(model, Goal(ssim=0.9), FEW)
    monkeypatch.undo()
    pytest.importorskip("optuna")
    model.plan = None
    with pytest.raises(OptionError, match="no calibration statistics"):
        tune(model, Goal(ssim=0.9), FEW)
