"""The comparison of policies, from end to end on a small model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from toprovar_compile import models
from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import OptionError
from toprovar_compile.evaluate import candidates, compare
from toprovar_compile.evaluate.draw import curves
from toprovar_compile.evaluate.emoji_eval import load_prompts
from toprovar_compile.evaluate.merging import merge
from toprovar_compile.evaluate.quality import closeness
from toprovar_compile.evaluate.tables import markdown
from toprovar_compile.metrics import psnr, ssim
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.emoji_infinity import EmojiInfinity, init_weights
from toprovar_compile.models.infinity import InfinityConfig
from toprovar_compile.models.var import VAR
from toprovar_compile.models.word_text import WordTextConfig, vocabulary_of
from toprovar_compile.plan import Plan
from toprovar_compile.policies.toprovar import Thresholds

LOOSE = Thresholds(beta=1e-4, global_below=0, detail_above=0, representative_scale=2)
SMALL = compare.Settings(images=3, training=4, batch=2, device="cpu", minutes=5)


@pytest.fixture
def model(make_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> VAR:
    model = make_var(depth=2, patch_nums=(1, 2, 3, 4, 5, 6, 7))
    model.plan = calibrate(model, prompts=2, thresholds=LOOSE)
    monkeypatch.setattr(models, "load", lambda name, device: model)
    return model


def test_closeness_is_that_of_metrics() -> None:
    a, b = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    similar, decibels = closeness(a, b)
    torch.testing.assert_close(similar, ssim(a, b))
    torch.testing.assert_close(decibels, psnr(a, b))
    assert closeness(a, a)[1].tolist() == [100.0] * 3


def test_a_whole_comparison(model: VAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "SKIPVAR_TARGETS", (0.9,))
    monkeypatch.setattr(compare, "_DRAWS", 50)
    mine = tmp_path / "mine.json"
    Plan.keep_share(model.schedule, 2, 0.5, 5).save(mine)
    settings = dataclasses.replace(SMALL, policies=("fixed", "fastvar", "skipvar"), tuned=(str(mine),))
    path = compare.run(settings, tmp_path, lambda text: None)
    results = json.loads(path.read_text())
    assert [row["policy"] for row in results["plans"][:2]] == ["tuned", "exit"]
    for row in results["plans"]:
        assert len(row["ssim_each"]) == 3 and 0 < row["share"] < 1.0001
        assert row["ssim"]["low"] <= row["ssim"]["mean"] <= row["ssim"]["high"]
    assert set(results["ours_against"]) == {"exit", "unguided", "fastvar", "skipvar"}
    assert results["frontiers"]["exit"] and (tmp_path / "policies_cpu.png").exists()
    assert (tmp_path / "policies_cpu_worst.jpg").exists()
    text = markdown(results)
    assert "### Ours minus theirs" in text and "| tuned | mine |" in text and "nan" not in text
    assert len(set(results["labels"])) == 3 and not results["not_measured"]
    trained = [row for row in results["plans"] if row["policy"] == "skipvar"]
    assert trained[0]["provenance"]["images"] == 4


def test_parts_add_up(model: VAR, tmp_path: Path) -> None:
    """What is there is not made again, and parts made apart are the whole."""
    done: list[str] = []
    first = dataclasses.replace(SMALL, policies=("fixed",))
    both = dataclasses.replace(SMALL, policies=("fixed", "fastvar"))
    compare.run(first, tmp_path / "whole", done.append)
    count = len(done)
    whole = json.loads(compare.run(both, tmp_path / "whole", done.append).read_text())
    assert len(whole["plans"]) == 8 + 9 and len(done) - count == 1 + 9
    parts = [
        compare.run(dataclasses.replace(both, shard=(i, 2)), tmp_path / str(i), lambda text: None) for i in range(2)
    ]
    merged = json.loads(merge(parts, tmp_path / "merged").read_text())
    assert [len(json.loads(part.read_text())["plans"]) for part in parts] == [9, 8]
    assert merged["plans"] == [row | {"times": {}} for row in whole["plans"]]
    assert merged["frontiers"] == whole["frontiers"] and merged["worst"]
    assert (tmp_path / "merged" / "policies_cpu_worst.jpg").stat().st_size < 300_000
    other = compare.run(dataclasses.replace(first, seed=1), tmp_path / "whole", done.append)
    assert len(json.loads(other.read_text())["plans"]) == 8
    with pytest.raises(OptionError, match="labels is not that of"):
        merge([parts[0], other], tmp_path / "merged")


def test_a_judge_is_asked(model: VAR, tmp_path: Path) -> None:
    def judge(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(10)[:3], images.flatten(1)

    settings = dataclasses.replace(SMALL, policies=("fixed",))
    results = json.loads(compare.run(settings, tmp_path, lambda text: None, judge).read_text())
    right = sum(label == i for i, label in enumerate(results["labels"])) / 3
    assert results["unpruned"]["named"]["mean"] == pytest.approx(right, abs=1e-4)
    assert results["unpruned"]["feature_distance"]["mean"] == pytest.approx(0, abs=1e-5)
    assert all(row["feature_distance"]["mean"] > 0 for row in results["plans"])
    assert "A classifier of its own" in markdown(results)


def test_a_model_of_prompts_is_read_by_emoji_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae = BSQVAEConfig(4, 8, (1, 2), 1, shuffle=2, groups=4)
    cfg = InfinityConfig(2, 64, 2, text_channels=128, text_maxlen=12, text_pad=8, vae=vae)
    words = vocabulary_of(" ".join(e.prompt for e in load_prompts()).split())
    text = WordTextConfig(words, depth=1, max_words=12)
    model = EmojiInfinity(cfg, text, range(1, 8)).eval().requires_grad_(False)
    init_weights(model)
    for p in (model.head.weight, *(b.ada_gss for b in model.blocks)):
        p.normal_(std=0.3)  # type: ignore[operator]
    model.example_prompts = tuple(e.prompt for e in load_prompts(100))
    model.plan = calibrate(model, prompts=2, thresholds=LOOSE)
    monkeypatch.setattr(models, "load", lambda name, device: model)
    monkeypatch.setattr(candidates, "SKIPVAR_TARGETS", (0.9,))
    settings = dataclasses.replace(SMALL, model="emoji-infinity", policies=("fixed", "skipvar"))
    path = compare.run(settings, tmp_path, lambda text: None)
    assert path.name == "policies_emoji_infinity_cpu.json"
    results = json.loads(path.read_text())
    every = [e.prompt for e in load_prompts()]
    assert results["labels"] == [every[0], every[len(every) // 3], every[2 * len(every) // 3]]
    assert set(results["unpruned"]["scores"]) >= {"overall", "single object"}
    assert results["unpruned"]["minus_unpruned"]["mean"] == 0 == results["unpruned"]["feature_distance"]["mean"]
    assert results["plans"][-1]["policy"] == "skipvar" and results["plans"][0]["feature_distance"]["mean"] > 0
    assert "| minus unpruned |" in markdown(results)


def test_work_is_dealt_evenly() -> None:
    costs = (6.0, 1.0, 1.0, 1.0, 4.0, 1.0, 2.0)
    taken = [[deal.mine(cost) for cost in costs] for deal in (compare._Deal(i, 2) for i in range(2))]
    assert [sum(both) for both in zip(*taken, strict=True)] == [1] * len(costs)
    assert sum(cost for cost, mine in zip(costs, taken[0], strict=True) if mine) == 9.0
    with pytest.raises(OptionError, match="part 2 of 2"):
        compare._Deal(2, 2)


def test_scores_are_paired(model: VAR, tmp_path: Path) -> None:
    shapes = [c for c in candidates.shapes(model.schedule, 2) if c.shape == "keep=0.5,from=5,exit=6"]
    assert [c.policy for c in shapes] == [f"score: {name}" for name in candidates.SCORES]
    assert len({c.plan.total_share() for c in shapes}) == 1 and len({c.plan.digest() for c in shapes}) == 5
    rows = [
        {"policy": c.policy, "name": c.name, "shape": c.shape, "share": 0.5, "ssim_each": [0.9 - i / 10, 0.8 - i / 10]}
        for i, c in enumerate(shapes)
    ]
    pairs = compare.summary(rows)["pairs"]
    assert [p["entropy_minus"] for p in pairs] == [f"score: {name}" for name in candidates.SCORES[1:]]
    assert pairs[1]["ssim"] == pytest.approx({"mean": 0.2, "low": 0.2, "high": 0.2}, abs=1e-4)


def test_what_time_leaves_out_is_named(model: VAR, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, policies=("fixed",), minutes=0.0)
    results: dict[str, Any] = json.loads(compare.run(settings, tmp_path, lambda text: None).read_text())
    assert not results["plans"] and len(results["not_measured"]) == 8


def test_errors(model: VAR, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no policy 'fastvr'"):
        compare.run(dataclasses.replace(SMALL, policies=("fastvr",)), tmp_path, lambda text: None)
    model.plan = None
    with pytest.raises(OptionError, match="no calibration statistics"):
        compare.run(SMALL, tmp_path, lambda text: None)


def test_a_search_adds_plans(model: VAR, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    settings = dataclasses.replace(SMALL, policies=("tuned",), search=9)
    results = json.loads(compare.run(settings, tmp_path, lambda text: None).read_text())
    assert results["plans"] and {row["policy"] for row in results["plans"]} == {"tuned"}
    assert any("exit=6" in row["name"] for row in results["plans"])


def test_candidates_of_the_ablation(model: VAR) -> None:
    plans = {c.name: c.plan for c in candidates.ablation(compare._statistics(model, "tiny"))}
    assert len(plans) == 5 + 9 + 10
    shares = [
        plans[name].total_share() for name in ("scale", "scale + layer", "scale + layer + token", "scale + token")
    ]
    assert plans["fixed exit"].exit_scale == 5 and shares[0] <= shares[1] <= shares[2]
    assert plans["keep=0.5,identity"].restore == "identity" and plans["keep=0.5,gumbel"].selection == "gumbel"
    assert plans["keep=0.3,high_entropy tokens"].direction == "high_entropy"


def test_calibrations_are_drawn(model: VAR, tmp_path: Path) -> None:
    assert curves([compare._statistics(model, "tiny")] * 2, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_candidates_of_toprovar(model: VAR) -> None:
    assert model.plan is not None
    found = list(candidates.toprovar(compare._statistics(model, "tiny")))
    assert {c.policy for c in found} == {"toprovar", "toprovar adaptive"} and len(found) == 10
    assert found[-1].plan.decisions and found[-1].plan.alternatives
