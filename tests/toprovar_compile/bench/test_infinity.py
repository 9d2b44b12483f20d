from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from toprovar_compile.bench import infinity as bench_infinity
from toprovar_compile.bench import infinity_ways
from toprovar_compile.bench.infinity import COLUMNS, Settings, rows, tiny
from toprovar_compile.bench.infinity_ways import REST, SAMPLING, SCALE, TEXT, VAE, Picture
from toprovar_compile.bench.timeline import Span
from toprovar_compile.cli import app
from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.models.infinity_schedule import infinity_schedule

EAGER = tiny(Settings(ways=("eager",)))


def quiet(text: str) -> None:
    pass


def test_the_command_measures_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = ["bench", "infinity", "--tiny", "--out", str(tmp_path), "--images", "2"]
    result = CliRunner().invoke(app, [*command, "--way", "eager"])
    assert result.exit_code == 0, result.output
    first = json.loads((tmp_path / "infinity_tiny_cpu.json").read_text())
    result = CliRunner().invoke(app, [*command, "--way", "dense"])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "infinity_tiny_cpu.json").read_text())
    assert [way["name"] for way in data["ways"]] == ["eager", "dense"]
    eager, dense = data["ways"]
    assert first["ways"] == [eager]  # kept, not measured again
    for way in (eager, dense):
        assert len(way["scale_ms"]) == len(way["scale_host_ms"]) == len(way["scale_sampling_ms"]) == 7
        parts = [way[f"{part}_ms"] for part in ("text", "transformer", "sampling", "vae")]
        assert min(parts) > 0
        assert sum(way["image_ms_each"]) / 2 == pytest.approx(way["image_ms"], rel=0.01)
    assert eager["graphs"] == 0 and dense["graphs"] > 0
    assert eager["bit_flips"] == dense["bit_flips"] == [0.0] * 7
    assert dense["graphs_after_warmup"] == 0
    assert dense["token_share"] == [1.0] * 7
    assert data["image"]["pixels"] == [32, 32]
    assert (tmp_path / "infinity_tiny_cpu.png").exists()


def test_parts_of_several_calls_are_merged(tmp_path: Path) -> None:
    bench_infinity.run(EAGER, tmp_path, log=quiet)
    (part,) = (tmp_path / "parts").glob("*.json")
    data = json.loads(part.read_text())
    data["entry"]["name"] = "official"
    (tmp_path / "parts" / "other.json").write_text(json.dumps(data))
    merged = json.loads(bench_infinity.merge(tmp_path, "tiny").read_text())
    assert [way["name"] for way in merged["ways"]] == ["official", "eager"]
    assert merged["one_gpu"]
    data["context"]["machine"]["hardware"] = "another"
    (tmp_path / "parts" / "other.json").write_text(json.dumps(data))
    with pytest.raises(OptionError, match="another machine than"):
        bench_infinity.merge(tmp_path, "tiny")
    with pytest.raises(OptionError, match="no parts of 2b"):
        bench_infinity.merge(tmp_path, "2b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "3b"}, "there is no model '3b'"),
        ({"dtype": "bf61"}, "did you mean 'bf16'"),
        ({"ways": ("dence",)}, "did you mean 'dense'"),
        ({"ways": ("official",)}, "needs --official"),
        ({"ways": ("fastvar-compiled",)}, "needs --fastvar"),
        ({"ways": ("official",), "official": "nowhere"}, "nowhere has no package `infinity`"),
        ({"model": "2b"}, "measured on a GPU"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench_infinity.run(replace(EAGER, **changes), tmp_path, log=quiet)
    assert not list(tmp_path.rglob("*.json"))


def test_an_impossible_plan_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        bench_infinity.run(replace(EAGER, ways=("eager", "plans"), plans=("keep=2,from=2",)), tmp_path, log=quiet)
    assert not list(tmp_path.rglob("*.json"))


def test_the_usual_plans_prune_from_32x32_on() -> None:
    schedule = infinity_schedule("1:1", "1M")
    assert schedule.grids[9] == (32, 32) and schedule.grids[11] == (48, 48)
    assert bench_infinity.default_plans(schedule)[2] == "keep=0.4,from=9,exit=11"


def test_ways_without_a_checkout_are_left_out_by_default() -> None:
    picture = Picture(infinity_schedule("1:1", "0.06M"), torch.zeros(1, 128))
    chosen = [
        way.name
        for way in bench_infinity._chosen(
            replace(EAGER, ways=(), plans=("keep=0.5,from=4",), official="here"),
            bench_infinity.TINY,
            picture,
            torch.device("cpu"),
            torch.float32,
        )
    ]
    assert chosen == ["official", "official-compiled", "eager", "dense", "keep=0.5,from=4"]


def test_times_are_medians() -> None:
    def image(scale: float) -> list[Span]:
        ms = {TEXT: 1.0, SCALE: scale, SAMPLING: 2.0, VAE: 8.0, REST: 0.5}
        return [Span(name, ms[name], ms[name] / 2) for name in (TEXT, SCALE, SAMPLING, SCALE, SAMPLING, VAE, REST)]

    times = bench_infinity._times([image(10.0), image(100.0), image(20.0)])
    assert times["scale_ms"] == [20.0, 20.0]
    assert times["scale_host_ms"] == [10.0, 10.0]
    assert (times["transformer_ms"], times["sampling_ms"], times["vae_ms"], times["text_ms"]) == (40.0, 4.0, 8.0, 1.0)
    assert times["image_ms"] == 53.5


def test_rows_compare_with_the_official_code() -> None:
    def way(name: str, ms: float, floor: dict[str, float] | None) -> dict[str, Any]:
        work = [{"name": SCALE, "kernels": 40, "launches": 1}, {"name": VAE, "kernels": 99, "launches": 99}]
        return {
            "name": name, "image_ms": ms, "transformer_ms": ms / 2, "sampling_ms": 1.0, "vae_ms": 2.0, "floor": floor,
            "first_image_seconds": 9.0, "first_image_again_seconds": None, "peak_gib": {"allocated": 5.0}, "work": work,
            "scale_host_ms": [0.1, 0.3, 0.2], "bit_flips": [0.0, 0.01],
        }  # fmt: skip

    table = rows({"ways": [way("official", 100.0, None), way("dense", 20.0, {"transformer_ms": 5.0})]})
    assert table[0][5:7] == ["1.00", "-"]
    assert table[1] == [
        "dense", "20.0", "10.0", "1.0", "2.0", "5.00", "50%", "9.0", "-", "5.0", "1", "40", "0.20", "0.50%",
    ]  # fmt: skip
    assert len(table[0]) == len(COLUMNS)


def test_drawn_bits_become_those_of_the_tokenizer() -> None:
    schedule = infinity_schedule("1:1", "0.06M")
    bits = torch.arange(4 * 8).view(1, 4, 8)
    (plain,) = infinity_ways.as_forced([bits[:, :1]], schedule, spatial_patchify=False)
    assert plain.shape == (1, 1, 1, 8)
    first, second = infinity_ways.as_forced([bits[:, :1], bits], schedule, spatial_patchify=True)
    assert first.shape == (1, 2, 2, 2) and second.shape == (1, 4, 4, 2)
    # channel d of the four positions of a token are its bits 4 d to 4 d + 3, row by row
    assert first[0, :, :, 1].tolist() == [[4, 5], [6, 7]]
