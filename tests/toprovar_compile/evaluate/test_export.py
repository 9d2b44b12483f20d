"""Folders for official evaluators: names, seeds, resuming, and prompt files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from toprovar_compile.cli import app
from toprovar_compile.errors import OptionError
from toprovar_compile.evaluate.export import export, find_generator, picture

CALLS: list[tuple[str, int]] = []


def make(prompt: str, seed: int) -> torch.Tensor:
    CALLS.append((prompt, seed))
    return torch.full((1, 3, 4, 6), seed / 10)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def _files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_geneval(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    entries = [{"tag": "counting", "prompt": f"{n} cats", "include": []} for n in range(3)]
    prompts.write_text("\n".join(map(json.dumps, entries)))
    out = tmp_path / "out"
    assert export("geneval", prompts, out, make, samples=2, seed=5) == 6
    assert _files(out)[:3] == ["00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png"]
    assert json.loads((out / "00002" / "metadata.jsonl").read_text()) == entries[2]
    assert CALLS[:3] == [("0 cats", 5), ("0 cats", 6), ("1 cats", 5)]
    (out / "00001" / "samples" / "00001.png").unlink()
    assert export("geneval", prompts, out, make, samples=2, seed=5) == 1 and CALLS[-1] == ("1 cats", 6)


def test_dpg_is_a_grid(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.txt").write_text("two\n")
    (folder / "a.txt").write_text("one")
    assert export("dpg", folder, tmp_path / "out", make) == 8
    image = Image.open(tmp_path / "out" / "a.png")
    assert image.size == (12, 8) and [image.getpixel(p)[0] for p in ((0, 0), (7, 0), (0, 5), (7, 5))] == [0, 26, 51, 76]  # type: ignore[index]
    assert export("dpg", folder, tmp_path / "out", make) == 0


def test_hpsv2_imagereward_mjhq(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "hpsv2": {"anime": ["a", "b"], "photo": ["c"]},
        "imagereward": [{"id": "x1", "prompt": "d"}],
        "mjhq": {"ff0": {"category": "people", "prompt": "e"}},
    }
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        export(name, tmp_path / f"{name}.json", tmp_path / name, make, samples=2)
    assert _files(tmp_path / "hpsv2") == ["anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg"]
    assert _files(tmp_path / "imagereward") == ["metadata.jsonl", "x1/x1_0.jpg", "x1/x1_1.jpg"]
    found = json.loads((tmp_path / "imagereward" / "metadata.jsonl").read_text())
    assert found[0]["prompt"] == "d" and [Path(p).exists() for p in found[0]["gen_image_paths"]] == [True, True]
    assert _files(tmp_path / "mjhq") == ["people/ff0.png"]


def test_shards_cover_everything_once(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"s": [str(i) for i in range(5)]}))
    for i in range(2):
        export("hpsv2", tmp_path / "p.json", tmp_path / "out", make, shard=(i, 2))
    assert sorted(p for p, _ in CALLS) == list("01234")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("genevl", "", "did you mean 'geneval'"),
        ("geneval", "not json", "cannot read"),
        ("geneval", "", "no prompts"),
        ("geneval", '{"tag": "x"}', "KeyError"),
        ("dpg", "", "no folder"),
        ("imagereward", '[{"id": "../up", "prompt": "a"}]', "leads elsewhere"),
        ("mjhq", "[1]", "cannot read"),
    ],
)
def test_files_that_do_not_fit(name: str, text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(OptionError, match=match):
        export(name, tmp_path / "p", tmp_path / "out", make)
    with pytest.raises(OptionError, match="cannot read"):
        export("geneval", tmp_path / "missing", tmp_path / "out", make)
    with pytest.raises(OptionError, match="shard"):
        export("geneval", tmp_path / "p", tmp_path / "out", make, shard=(2, 2))


def test_pictures_and_generators() -> None:
    image = Image.new("RGB", (2, 2))
    assert picture(image) is image and picture(torch.rand(3, 4, 6)).size == (6, 4)
    with pytest.raises(OptionError, match="returned list"):
        picture([1])
    assert find_generator("json:dumps") is json.dumps
    for text in ("nowhere:f", "json:nothing", "json", "json:__name__"):
        with pytest.raises(OptionError, match="--generate"):
            find_generator(text)


def test_command(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"s": ["a"]}))
    command = ["eval", "export", "hpsv2", "--prompts", str(tmp_path / "p.json"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--generate", "PIL.Image:new"])
    assert done.exit_code != 0  # Image.new(prompt, seed) is no generator
    wrong = CliRunner().invoke(app, [*command, "--shard", "x"])
    assert wrong.exit_code == 2 or "cannot read" in str(wrong.exception)
