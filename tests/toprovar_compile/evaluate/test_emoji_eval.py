"""EmojiEval: its prompts, its rules, its detector's reading, and runs that go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from toprovar_compile import models
from toprovar_compile.cli import app
from toprovar_compile.errors import CheckpointError, OptionError
from toprovar_compile.evaluate import detector as detecting
from toprovar_compile.evaluate.detector import Detector, Found, load_detector, overlap
from toprovar_compile.evaluate.emoji_eval import (
    GROUNDS,
    Entry,
    Wanted,
    grounds,
    judge,
    load_prompts,
    places,
    score,
    summarise,
)
from toprovar_compile.evaluate.emoji_run import evaluate, markdown
from toprovar_compile.models.var import VAR

ENTRIES = [
    Entry("single object", "an apple", (Wanted("apple"),)),
    Entry("counting", "two keys", (Wanted("key", 2),)),
    Entry("position", "an apple left of a key", (Wanted("apple"), Wanted("key")), "left of"),
]


def _found(noun: str, x: float, y: float, colour: str | None = None, size: float = 60.0) -> Found:
    return Found(noun, colour, 0.9, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


class Oracle(Detector):
    """Finds what the pictures' first pixel tells: red 1 an apple, green 1 two keys, blue 1 an apple left of a key."""

    def find(self, images: Tensor, threshold: float = 0.3) -> list[list[Found]]:
        out = []
        for r, g, b in images[:, :, 0, 0].round().tolist():
            apple = [_found("apple", 60, 128)] if r or b else []
            keys = [_found("key", 190, 60), *([_found("key", 190, 190)] if g else [])] if g or b else []
            out.append(apple + keys)
        return out


def _pictures(prompts: list[str], right: bool = True) -> Tensor:
    images = torch.rand(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(len(prompts)))
    images[:, :, 0, 0] = 0
    for image, prompt in zip(images, prompts, strict=True):
        image[[e.prompt for e in ENTRIES].index(prompt), 0, 0] = float(right)
    return images


@pytest.mark.parametrize(
    ("entry", "found", "reason"),
    [
        (ENTRIES[0], [_found("apple", 1, 1)], ""),
        (ENTRIES[0], [_found("apple", 1, 1), _found("apple", 99, 1)], ""),
        (ENTRIES[0], [_found("key", 1, 1)], "0 of 1 apple"),
        (ENTRIES[1], [_found("key", 1, 1), _found("key", 99, 1)], ""),
        (ENTRIES[1], [_found("key", 1, 1)], "1 of 2 key"),
        (ENTRIES[1], [_found("key", 99 * i, 1) for i in range(3)], "3 key, not 2"),
        (ENTRIES[2], [_found("apple", 60, 128), _found("key", 190, 120)], ""),
        (ENTRIES[2], [_found("apple", 190, 128), _found("key", 60, 120)], "apple is right of key, not left of"),
        (ENTRIES[2], [_found("apple", 60, 190), _found("key", 60, 60)], "apple is below key, not left of"),
        (ENTRIES[2], [_found("apple", 60, 60), _found("key", 65, 60)], "apple is at key, not left of"),
    ],
)
def test_pictures_are_judged(entry: Entry, found: list[Found], reason: str) -> None:
    assert judge(found, entry) == reason


def test_colours_belong_to_objects() -> None:
    entry = Entry(
        "attribute binding", "a red apple and a blue key", (Wanted("apple", 1, "red"), Wanted("key", 1, "blue")), "and"
    )
    assert judge([_found("apple", 60, 60, "red"), _found("key", 190, 60, "blue")], entry) == ""
    swapped = [_found("apple", 60, 60, "blue"), _found("key", 190, 60, "red")]
    assert judge(swapped, entry) == "apple is blue, not red"


def test_places_have_a_margin_and_diagonals_are_two() -> None:
    assert places(_found("a", 60, 60), _found("b", 190, 190)) == {"left of", "above"}
    assert places(_found("a", 72, 60), _found("b", 60, 60)) == set()  # a tenth of both sizes is 12
    assert places(_found("a", 73, 60), _found("b", 60, 60)) == {"right of"}


def test_scores_are_means_of_tasks() -> None:
    summary = summarise([ENTRIES[0]] * 3 + [ENTRIES[1]], [1.0, 1.0, 0.0, 0.0])
    assert list(summary) == ["single object", "counting", "overall"]
    assert summary["overall"].mean == pytest.approx(1 / 3, abs=1e-4)
    assert summary["single object"].low < 2 / 3 < summary["single object"].high
    assert summarise(load_prompts(), [1.0] * 553)["overall"].low == 1.0
    with pytest.raises(OptionError, match="a step of at least 1"):
        load_prompts(0)


def test_images_of_one_prompt_are_scored() -> None:
    net = Oracle(["apple", "key"], ["red"], 4)
    images = torch.cat([_pictures(["two keys"]), _pictures(["two keys"], right=False)])
    result = score(images, ENTRIES[1], net)
    assert result.pop("ground") == [False, False]  # noise of middle gray, while white is asked for
    assert result == {"score": 0.5, "correct": [True, False], "wrong": ["", "0 of 2 key"]}


@pytest.mark.parametrize("side", [32, 256])
def test_grounds_are_told_from_the_edges(side: int) -> None:
    colours = torch.tensor(list(GROUNDS.values())) / 255
    images = colours[:, :, None, None].repeat(1, 1, side, side)
    images[:, :, side // 3 :, side // 4 : side // 2] = 0.0  # an object that touches the lower edge
    assert grounds((images + 0.02 * torch.randn_like(images)).clamp(0, 1)) == list(GROUNDS)


def test_peaks_are_read_once_each() -> None:
    net = Detector(["apple", "key"], ["red", "blue"], 4)
    maps = torch.full((1, 2 + 4 + 3, 32, 32), -9.0)
    maps[0, 2:6] = torch.tensor(4.0).log()  # four cells to every side: 64 pixels
    maps[0, 0, 8, 8], maps[0, 0, 8, 9], maps[0, 1, 9, 8], maps[0, 1, 24, 24] = 3.0, 2.0, 1.0, 2.5
    maps[0, 6 + 2] = 1.0
    (found,) = net.read(maps)
    assert [(f.noun, f.colour) for f in found] == [("apple", "blue"), ("key", "blue")]
    assert found[0].box == pytest.approx((36, 36, 100, 100)) and found[0].centre == (68, 68)
    assert overlap(found[0].box, found[0].box) == 1 and overlap(found[0].box, found[1].box) == 0
    with pytest.raises(OptionError, match="floats"):
        net.find(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_equal_pictures_have_no_distance() -> None:
    torch.manual_seed(0)
    net = Detector(["apple"], ["red"], 4).eval()
    a = torch.rand(2, 3, 256, 256)
    b = torch.stack((a[0], a[1].flip(1)))
    same, other = net.distance(a, b).tolist()
    assert same == 0 and other > 1e-4


def test_a_missing_detector_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train_detector"):
        load_detector(tmp_path)


def test_a_run_compares_ways_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    net, calls = Oracle(["apple", "key"], ["red"], 4), []

    def good(prompts: list[str], seeds: list[int]) -> Tensor:
        calls.append(list(zip(prompts, seeds, strict=True)))
        if len(calls) == 2 and stop:
            raise KeyboardInterrupt
        return _pictures(prompts)

    def bad(prompts: list[str], seeds: list[int]) -> Tensor:
        return (_pictures(prompts, right=False) * 0.9).clamp(0, 1)

    ways, options = {"dense": good, "keep=0.4": bad}, {"images_per_prompt": 2, "batch": 4, "detector": net, "seed": 7}
    stop = True
    with pytest.raises(KeyboardInterrupt):
        evaluate(ways, ENTRIES, folder=tmp_path, context={"model": "m"}, **options)  # type: ignore[arg-type]
    assert calls[0] == [("an apple", 7), ("an apple", 8), ("two keys", 9), ("two keys", 10)]
    stop = False
    (tmp_path / "emoji_eval.jsonl").open("a").write('{"half a li')
    results = evaluate(ways, ENTRIES, folder=tmp_path, context={"model": "m"}, **options)  # type: ignore[arg-type]
    assert len(calls) == 3 and [len(c) for c in calls] == [4, 4, 4]  # the last batch is filled up
    dense, pruned = results["results"]
    assert dense["scores"]["overall"]["mean"] == 1 and dense["speedup"] == 1 and dense["psnr"]["mean"] == 100
    assert pruned["scores"]["overall"]["mean"] == 0 and pruned["minus_first"]["overall"]["mean"] == -1
    assert dense["ground"]["mean"] == 0 and "| ground |" in markdown(results)
    assert pruned["ssim"]["mean"] < 1 and pruned["distance"]["mean"] > 0 and len(pruned["wrong"]) == 3
    assert json.loads((tmp_path / "emoji_eval.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "emoji_eval.png").exists()
    table = markdown(results).splitlines()
    assert len(table) == 4 and table[3].startswith("| keep=0.4 | 0.000 (0.000..0.000) | -1.000")

    evaluate(ways, ENTRIES, folder=tmp_path, context={"model": "m"}, **options)  # type: ignore[arg-type]
    assert len(calls) == 3
    evaluate(ways, ENTRIES, folder=tmp_path, context={"model": "another"}, **options)  # type: ignore[arg-type]
    assert len(calls) == 5


def test_a_run_refuses_what_it_cannot_score() -> None:
    net = Oracle(["apple", "key"], ["red"], 4)
    with pytest.raises(OptionError, match="nothing to generate"):
        evaluate(lambda prompts, seeds: torch.rand(1), [], detector=net)
    with pytest.raises(OptionError, match=r"gave \(1,\)"):
        evaluate(lambda prompts, seeds: torch.rand(1), ENTRIES, detector=net)


class _Prompted(VAR):
    """A class-conditional model that takes prompts."""

    def forward(self, labels: Any, **options: Any) -> Tensor:
        return super().forward(torch.tensor([len(prompt) % 10 for prompt in labels]), **options)


def test_the_command_scores_plans_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_var: Callable[..., VAR]
) -> None:
    net, model = Oracle(["apple", "key"], ["red"], 4), make_var()
    model.__class__ = _Prompted
    monkeypatch.setattr(models, "load", lambda name, device: model)
    monkeypatch.setattr(detecting, "load_detector", lambda device: net)
    command = ["eval", "emoji", "--plan", "dense", "--plan", "exit=4", "--prompts", "300", "--images", "1"]
    result = CliRunner().invoke(app, [*command, "--backend", "eager", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| exit=4 | 0.000" in result.output
    results = json.loads((tmp_path / "emoji_eval.json").read_text())
    assert len(results["prompts"]) == 2 and results["context"]["backend"] == "eager"
    wrong = CliRunner().invoke(app, [*command, "--backend", "inductor"])
    assert wrong.exit_code == 2
