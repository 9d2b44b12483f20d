"""Composed scenes: what they say and show, what is kept out of training, and the detector trained on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from toprovar_compile.evaluate.detector import Detector, load_detector
from toprovar_compile.evaluate.emoji_eval import PROMPTS, SIZES, TASKS, Entry, Wanted, load_prompts

SCRIPTS = ("common", "data", "scenes", "eval_prompts", "emoji_names", "train_detector")


@pytest.fixture
def composer(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A composer of three objects and two other emoji; each is a red ellipse with a green spot."""
    s = scripts.scenes
    names = {"1": ["apple"], "2": ["key"], "3": ["star"], "4": ["blue hearts", "love"], "5": ["grinning face"]}
    objects = {n: s.Object(n, c, None, n != "star") for n, c in (("apple", "1"), ("key", "2"), ("star", "3"))}
    monkeypatch.setattr(s, "emoji_names", lambda: names)
    monkeypatch.setattr(s, "vocabulary", lambda: objects)
    s._nouns.cache_clear()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    picture = torch.zeros(4, 256, 256, dtype=torch.uint8)
    picture[:, (x / 0.8) ** 2 + (y / 0.4) ** 2 < 1] = torch.tensor([220, 30, 40, 255], dtype=torch.uint8)[:, None]
    picture[:, (x / 0.1) ** 2 + (y / 0.1) ** 2 < 1] = torch.tensor([30, 200, 60, 255], dtype=torch.uint8)[:, None]
    yield s.Composer(picture.expand(5, 4, 256, 256), "cpu", singles=0.3)
    s._nouns.cache_clear()


def test_prompts_say_what_a_scene_shows(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    scene = s.Scene((s.Group("apple", 2, "red"), s.Group("key", 1, "blue")), "above", "yellow")
    assert s.prompt(scene) == "two red apples above a blue key on a yellow background"
    assert s.prompt(scene.turned()) == "a blue key below two red apples on a yellow background"
    assert s.Scene.from_json(scene.to_json()) == scene == scene.turned().turned()
    assert s.prompt(s.Scene((s.Group("egg"),))) == "an egg"
    assert s.prompt(s.Scene((s.Group("strawberry", 3), s.Group("mailbox", 2)), "left of")) == (
        "three strawberries to the left of two mailboxes"
    )
    rng = random.Random(0)
    ways = {s.prompt(scene, rng) for _ in range(300)}
    assert len(ways) > 60 and any(w.startswith("a photo of a blue key beneath") for w in ways)
    assert all("yellow" in w and "red apples" in w and "blue key" in w for w in ways)


def test_every_word_of_a_prompt_is_known(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    rng, known = random.Random(1), set(s.all_words())
    texts = [s.prompt(s.draw_scene(rng), rng) for _ in range(2000)]
    texts += [s.single_prompt(rng.choice(list(s.emoji_names())), "pink", rng) for _ in range(2000)]
    assert {w for t in texts for w in s.words(t)} <= known
    assert all(name == scripts.emoji_names.plain(name) for name, *_ in s.emoji_names().values())


def test_the_vocabulary_is_of_the_renders(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    codes = {c.replace("-fe0f", "") for c in s.emoji_names()}
    assert 100 <= len(s.vocabulary()) <= 128 and len(s.emoji_names()) == 3391
    assert all(o.code in codes and (o.own is None or o.own in s.COLOURS) for o in s.vocabulary().values())


def test_the_prompts_of_the_evaluation_are_never_drawn_in_training(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    entries = load_prompts()
    asked = [scripts.train_detector.scene_of(e) for e in entries]
    assert all(s.reserved(scene) for scene in asked)
    same = {form for scene in asked for form in ((scene, scene.turned()) if scene.relation else (scene,))}
    shapes = s.Shapes(np.ones((10_000, 2), np.float32), {n: 9 * i for i, n in enumerate(s.vocabulary())})
    planner = s.Planner(shapes, singles=0.2)
    plan = planner.plan(4000, random.Random(2))
    drawn = [scene for scene in plan.scenes if scene is not None]
    assert not any(s.reserved(scene) for scene in drawn) and not same & set(drawn)
    assert not {e.prompt for e in entries} & set(plan.prompts)
    # Objects side by side in no relation do not stand as a reserved one would have them.
    for scene, boxes in zip(plan.scenes, plan.boxes, strict=True):
        if scene is not None and scene.relation == "and":
            shown = "left of" if boxes[0, 0] < boxes[-1, 0] else "right of"
            assert not s.reserved(s.Scene(scene.groups, shown, scene.ground))
    told = {s.emoji_names()[code][0] for _, code in planner._codes}
    assert "red heart" in told and not any(s.reserved_single(name) for name in told)
    # What a planner of training draws cannot hold a reserved part, whatever the numbers: drawing again is the rule.
    assert any(s.reserved(s.draw_scene(random.Random(i), held_out=True)) for i in range(40))


def test_a_reserved_composition_is_so_however_it_is_told(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    rng = random.Random(3)
    for _ in range(300):
        scene = s.draw_scene(rng, held_out=True)
        if scene.relation is not None:
            assert sorted(s.reserved_parts(scene)) == sorted(s.reserved_parts(scene.turned()))


def test_the_prompts_file_is_what_the_script_writes(scripts: SimpleNamespace) -> None:
    assert PROMPTS.read_text() == scripts.eval_prompts.text()
    entries = load_prompts()
    assert [sum(e.task == t for e in entries) for t in TASKS] == list(SIZES)
    assert len({e.prompt for e in entries}) == len(entries) == 553
    assert load_prompts(7) == entries[::7]


def test_pictures_show_their_scenes(scripts: SimpleNamespace, composer: Any) -> None:
    s = scripts.scenes
    scenes = [
        s.Scene((s.Group("apple", 2, "blue"), s.Group("key")), "above", "yellow"),
        s.Scene((s.Group("star", 4),)),
    ]
    batch = composer.compose(scenes, random.Random(0))
    assert batch.images.shape == (2, 3, 256, 256) and batch.images.dtype == torch.uint8
    assert batch.prompts[0] == "two blue apples above a key on a yellow background"
    assert batch.images[0, :, 0, 0].tolist() == list(s.GROUNDS["yellow"])
    top, bottom = batch.boxes[0][:2], batch.boxes[0][2:]
    assert (top[:, 3] < bottom[:, 1].min()).all() and top[:, 5].tolist() == [5, 5] and bottom[:, 5].tolist() == [0]
    for image, boxes in zip(batch.images, batch.boxes, strict=True):
        for i, (x0, y0, x1, y1, _, colour) in enumerate(boxes.tolist()):
            assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256 and max(x1 - x0, y1 - y0) >= 60
            assert all(x1 <= o[0] or o[2] <= x0 or y1 <= o[1] or o[3] <= y0 for o in boxes[:i])
            r, _, b = image[:, int((y0 + y1) / 2), int(x0 + 0.2 * (x1 - x0))].tolist()
            assert b > r + 80 if colour else r > b + 80
            spot = image[:, int((y0 + y1) / 2), int((x0 + x1) / 2)].tolist()
            assert spot[1] > max(spot[0], spot[2]) + 80  # the spot keeps its colour


def test_batches_follow_from_the_seed(scripts: SimpleNamespace, composer: Any) -> None:
    first, again, other = (composer.batch(12, random.Random(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images) and first.prompts == again.prompts
    assert not torch.equal(first.images, other.images)
    assert any(scene is None for scene in first.scenes) and any(scene is not None for scene in first.scenes)
    stream = composer.stream(3, seed=5)
    batches = [next(stream), next(stream)]
    stream = composer.stream(3, seed=5)
    assert [next(stream).prompts, next(stream).prompts] == [b.prompts for b in batches]
    composer.planner.leave_out(["face"])
    assert {code for _, code in composer.planner._codes} == {"1", "2", "3", "4"}


def test_recolouring_reaches_the_colour(scripts: SimpleNamespace) -> None:
    s = scripts.scenes
    red = torch.zeros(4, 8, 8)
    red[0], red[3] = 0.8, 1.0
    for colour, (light, chroma, hue) in s.COLOURS.items():
        lab = s._to_oklab(s.recolour(red, colour)[:3])[:, 4, 4]
        angle = float(torch.atan2(lab[2], lab[1]).rad2deg()) % 360
        assert abs(float(lab[0]) - light) < 0.06 and abs(float(lab[1:].norm()) - chroma) < 0.06
        assert min(abs(angle - hue), 360 - abs(angle - hue)) < 14, colour


def _perfect(boxes: Tensor, nouns: int) -> Tensor:
    """Maps that say exactly these boxes."""
    maps = torch.full((len(boxes), nouns + 4 + 9, 32, 32), -12.0)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    for i, picture in enumerate(boxes):
        for x0, y0, x1, y1, noun, colour in picture[picture[:, 5] >= 0].tolist():
            cx, cy = int((x0 + x1) / 16), int((y0 + y1) / 16)
            maps[i, int(noun), cy, cx] = 12
            near = (slice(max(cy - 1, 0), cy + 2), slice(max(cx - 1, 0), cx + 2))
            sides = torch.stack((x - x0 / 8, y - y0 / 8, x1 / 8 - x, y1 / 8 - y)).clamp_min(0.1).log()
            maps[i, nouns : nouns + 4, near[0], near[1]] = sides[:, near[0], near[1]]
            maps[i, nouns + 4 + int(colour), near[0], near[1]] = 12
    return maps


def test_the_loss_is_least_for_the_truth_and_reading_returns_it(scripts: SimpleNamespace, composer: Any) -> None:
    t = scripts.train_detector
    composer.planner.singles = 0.0
    batch = composer.batch(6, random.Random(4))
    boxes = t.pad_boxes(batch.boxes, torch.device("cpu"))
    maps = _perfect(boxes, 3)
    losses = t.loss_of(maps, boxes, 3)
    assert all(float(loss) < 0.25 for loss in losses) and float(losses[1]) < 1e-4
    worse = t.loss_of(maps + 3 * torch.randn_like(maps), boxes, 3)
    assert all(float(w) > float(x) for w, x in zip(worse, losses, strict=True))
    net = Detector(["apple", "key", "star"], list(scripts.scenes.COLOURS))
    for found, wanted in zip(net.read(maps), batch.boxes, strict=True):
        assert len(found) == len(wanted)
        for f in found:
            row = min(wanted.tolist(), key=lambda r, f=f: abs(r[0] - f.box[0]) + abs(r[1] - f.box[1]))  # type: ignore[misc]
            assert f.box == pytest.approx(tuple(row[:4]), abs=0.1) and f.noun == net.nouns[int(row[4])]
            assert f.colour == (None, *net.colours)[int(row[5])]


def test_a_detector_is_trained_checked_and_loaded(scripts: SimpleNamespace, composer: Any, tmp_path: Path) -> None:
    composer.planner.held_out = True
    entries = [
        Entry("colors", "a blue apple", (Wanted("apple", 1, "blue"),)),
        Entry("position", "a star above a key", (Wanted("star"), Wanted("key")), "above"),
    ]
    options = {"steps": 2, "batch": 2, "width": 4, "checked": 2, "prompts": entries}
    report = scripts.train_detector.train(composer, tmp_path, **options)
    assert report["steps"] == 2 and set(report["score of composed pictures"]) == {"colors", "position", "overall"}
    scripts.train_detector.train(composer, tmp_path / "more", init=tmp_path, **options)
    net = load_detector(tmp_path)
    assert net.nouns == ("apple", "key", "star") and not net.training
    assert len(net.find(torch.rand(2, 3, 64, 64))) == 2


def test_spoilt_pictures_stay_pictures(scripts: SimpleNamespace) -> None:
    torch.manual_seed(0)
    x = torch.ones(3, 3, 256, 256)
    x[:, :, 60:200, 60:200] = -0.5
    spoilt = scripts.train_detector.spoil(x, 1.6)
    assert spoilt.shape == x.shape and spoilt.min() >= -1 and spoilt.max() <= 1
    assert (spoilt - x).abs().mean((1, 2, 3)).max() < 0.5 and not torch.equal(spoilt, x)
    torch.testing.assert_close(scripts.train_detector._blocks(x, torch.full((3, 1, 1, 1), 1e-4)), x, atol=1e-2, rtol=0)
