import json
from pathlib import Path

import pytest
import torch
from torch import nn

from toprovar_compile import measure, models
from toprovar_compile.bench import emoji_var as bench
from toprovar_compile.bench.emoji_var import Settings
from toprovar_compile.errors import PlanError
from toprovar_compile.measure import Generate, Way
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan

SETTINGS = Settings(classes=3, plans=("keep=0.5,from=4,bucket=4", "exit=4"), device="cpu")
NAMES = [
    "eager", "inductor", "toprovar dense", "toprovar dense, entropy measured", "toprovar keep=0.5,from=4,bucket=4",
    "toprovar exit=4",
]  # fmt: skip


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tiny_var: VAR) -> list[str]:
    """The benchmark on the tiny model with ways that compile nothing: the names of the ways as they are prepared."""
    seen: list[str] = []

    def way(name: str, plan: Plan | None = None) -> Way:
        def prepare(model: nn.Module) -> Generate:
            seen.append(name)
            return model

        return Way(name, prepare, plan)

    monkeypatch.setattr(models, "load", lambda name, device: tiny_var)
    monkeypatch.setattr(measure, "eager_way", lambda: way("eager"))
    monkeypatch.setattr(measure, "inductor_way", lambda mode=None: way("inductor" if mode is None else mode))
    monkeypatch.setattr(measure, "toprovar_way", lambda plan, name: way(name, plan))
    return seen


def test_all_ways_are_measured_and_compared(prepared: list[str], tmp_path: Path, tiny_var: VAR) -> None:
    path = bench.run(SETTINGS, tmp_path, log=lambda text: None)
    data = json.loads(path.read_text())
    assert path.name == "emoji_var_cpu.json"
    assert path.with_suffix(".png").exists()
    assert [way["name"] for way in data["ways"]] == NAMES == prepared
    assert data["model"]["fingerprint"] == tiny_var.fingerprint()
    assert data["not_measured"] == []
    assert all(way["ssim"] == pytest.approx(1.0) and way["psnr"] == 100.0 for way in data["ways"])
    assert data["ways"][-1]["token_share"][-1] == 0.0
    assert data["entropy_cost"]["share"] == pytest.approx(
        data["ways"][3]["median_seconds"] / data["ways"][2]["median_seconds"] - 1
    )


def test_what_is_finished_is_not_measured_again(prepared: list[str], tmp_path: Path) -> None:
    bench.run(SETTINGS, tmp_path, log=lambda text: None)
    prepared.clear()
    more = Settings(**{**vars(SETTINGS), "plans": (*SETTINGS.plans, "exit=3")})
    data = json.loads(bench.run(more, tmp_path, log=lambda text: None).read_text())
    assert prepared == ["toprovar exit=3"]
    assert [way["name"] for way in data["ways"]] == [*NAMES, "toprovar exit=3"]


def test_other_classes_are_measured_anew(prepared: list[str], tmp_path: Path) -> None:
    bench.run(SETTINGS, tmp_path, log=lambda text: None)
    prepared.clear()
    bench.run(Settings(**{**vars(SETTINGS), "seed": 1}), tmp_path, log=lambda text: None)
    assert prepared == NAMES


def test_the_time_limit_leaves_ways_out_and_says_so(prepared: list[str], tmp_path: Path) -> None:
    limited = Settings(**{**vars(SETTINGS), "minutes": 0.0})
    data = json.loads(bench.run(limited, tmp_path, log=lambda text: None).read_text())
    assert prepared == ["eager"]
    assert data["not_measured"] == NAMES[1:]
    assert data["entropy_cost"] is None


def test_an_impossible_plan_is_said_before_anything_is_measured(prepared: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        bench.run(Settings(**{**vars(SETTINGS), "plans": ("keep=2,from=2",)}), tmp_path, log=lambda text: None)
    assert prepared == []


def test_rows_compare_with_the_fastest_inductor_way() -> None:
    def way(name: str, seconds: float) -> dict[str, object]:
        closeness = {"ssim": 0.9, "ssim_worst": 0.8, "psnr": 30.0, "psnr_worst": 20.0}
        return {"name": name, "median_seconds": seconds, "compile_seconds": 5.0, "total_share": 0.5, **closeness}

    ways = [way("eager", 4.0), way("inductor", 3.0), way("inductor max-autotune", 2.0), way("toprovar auto", 1.0)]
    rows = bench.rows({"ways": ways})
    assert rows[0][:5] == ["eager", "-", "4.000", "1.00", "0.50"]
    assert rows[3] == ["toprovar auto", "5", "1.000", "4.00", "2.00", "0.900", "0.800", "30.0", "20.0", "50%"]
    assert len(rows[0]) == len(bench.COLUMNS)


def test_the_measuring_plan_is_dense_and_reads_every_layer(tiny_var: VAR) -> None:
    dense = Plan.dense(tiny_var.schedule, 3)
    plan = bench._MeasuringPlan(dense.schedule, 3, dense.scales)
    assert plan.is_dense
    assert plan.reads_entropy() == {(s, layer) for s in range(4) for layer in range(3)}


def test_images_are_compared_with_the_unpruned_ones(prepared: list[str], tmp_path: Path, tiny_var: VAR) -> None:
    bench.run(SETTINGS, tmp_path, log=lambda text: None)
    (images,) = (torch.load(p, weights_only=True) for p in tmp_path.rglob("unpruned.pt"))
    jobs = measure.choose_jobs(tiny_var, 3, 0)
    assert torch.equal(images[1:2], tiny_var(torch.tensor([jobs[1].label]), seed=jobs[1].seed))
