"""EmojiEval: does a picture show what its prompt asks for? GenEval's six tasks on scenes of emoji, by our own detector.

553 fixed prompts (emoji_prompts.json) in GenEval's proportions, all of compositions that emoji-infinity never saw in
training. The rules are GenEval's: every object in its number, for counting not one more; colours object by object;
places by the centres of boxes with a margin. The overall score is the mean of the six tasks' scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.evaluate.detector import Detector, Found
from toprovar_compile.evaluate.intervals import Interval, resamples

PROMPTS = Path(__file__).with_name("emoji_prompts.json")
TASKS = ("single object", "two objects", "counting", "colors", "position", "attribute binding")
SIZES = (80, 99, 80, 94, 100, 100)
"""Prompts of each task, as GenEval has them."""

GROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 150),
    "green": (186, 235, 180),
    "blue": (176, 216, 255),
    "pink": (255, 206, 226),
    "purple": (216, 200, 250),
    "gray": (205, 205, 210),
}
"""Colours of the plain grounds of scenes."""

_EDGE = 6  # pixels at the sides of a picture of 256 whose median is its ground
_MARGIN = 0.1  # of both boxes' sizes, by which centres have to differ in place, as in GenEval
_DRAWS = 2000


@dataclass(frozen=True)
class Wanted:
    """`count` objects of one noun; of `colour`, unless that is None."""

    noun: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Entry:
    """One prompt and what it asks for. `relation` is that of the first group to the second, if there is one."""

    task: str
    prompt: str
    groups: tuple[Wanted, ...]
    relation: str | None = None
    ground: str = "white"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Entry:
        """From an object of the prompts file."""
        groups = tuple(Wanted(**g) for g in raw["groups"])
        return cls(raw["task"], raw["prompt"], groups, raw["relation"], raw["ground"])


def load_prompts(every: int = 1, path: Path = PROMPTS) -> list[Entry]:
    """The fixed prompts, or every so many of them. Raises OptionError."""
    if every < 1:
        raise OptionError(f"every {every} prompts", where="load_prompts", expected="a step of at least 1")
    return [Entry.from_json(raw) for raw in json.loads(path.read_text())][::every]


def judge(found: Sequence[Found], entry: Entry) -> str:
    """What is wrong with a picture in which these objects were found; empty when nothing is."""
    groups: list[list[Found]] = []
    for wanted in entry.groups:
        same = [f for f in found if f.noun == wanted.noun]
        if len(same) < wanted.count:
            return f"{len(same)} of {wanted.count} {wanted.noun}"
        if (entry.task == "counting" or wanted.count > 1) and len(same) > wanted.count:
            return f"{len(same)} {wanted.noun}, not {wanted.count}"
        right = [f for f in same if wanted.colour in (None, f.colour)]
        if len(right) < wanted.count:
            return f"{wanted.noun} is {same[0].colour}, not {wanted.colour}"
        groups.append(right[: wanted.count])
    if entry.relation in (None, "and"):
        return ""
    for a in groups[0]:
        for b in groups[1]:
            if entry.relation not in places(a, b):
                return f"{a.noun} is {' and '.join(sorted(places(a, b))) or 'at'} {b.noun}, not {entry.relation}"
    return ""


def places(a: Found, b: Found) -> set[str]:
    """Where a is as seen from b: none, one or two of left of, right of, above, below, by GenEval's rule."""
    offset = []
    for axis in (0, 1):
        sizes = sum(f.box[axis + 2] - f.box[axis] for f in (a, b))
        d = a.centre[axis] - b.centre[axis]
        offset.append(max(abs(d) - _MARGIN * sizes, 0.0) * (1 if d > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length == 0:
        return set()
    x, y = offset[0] / length, offset[1] / length
    told = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in told.items() if holds}


def grounds(images: Tensor) -> list[str]:
    """Which of the known grounds comes nearest to the edges of each of the images (N, 3, H, W) in 0..1."""
    edge = max(1, _EDGE * images.shape[-1] // 256)
    x = images.detach().float().cpu()
    sides = (x[..., :edge, :], x[..., -edge:, :], x[..., :edge], x[..., -edge:])
    middle = torch.cat([s.flatten(2) for s in sides], 2).median(2).values
    known = torch.tensor(list(GROUNDS.values())) / 255
    return [list(GROUNDS)[i] for i in torch.cdist(middle, known).argmin(1).tolist()]


def reasons(images: Tensor, entries: Sequence[Entry], detector: Detector, threshold: float = 0.3) -> list[str]:
    """What is wrong with each of the images (N, 3, H, W) in 0..1, of N entries; empty where nothing is."""
    return [judge(f, e) for f, e in zip(detector.find(images, threshold), entries, strict=True)]


def score(images: Tensor, entry: Entry, detector: Detector, threshold: float = 0.3) -> dict[str, Any]:
    """How well images (N, 3, H, W) in 0..1 of one prompt do.

    `correct` has a bool and `wrong` a reason, empty where it is correct, for each image; `score` is the share that is.
    `ground` says for each whether it has the ground asked for, which the score leaves out, as GenEval would.
    """
    wrong = reasons(images, [entry] * len(images), detector, threshold)
    correct = [not reason for reason in wrong]
    ground = [name == entry.ground for name in grounds(images)]
    return {"score": sum(correct) / len(correct), "correct": correct, "wrong": wrong, "ground": ground}


def summarise(entries: Sequence[Entry], scores: Iterable[float]) -> dict[str, Interval]:
    """Mean score of each task and "overall", their mean, with intervals from prompts resampled within their tasks.

    `scores` has one for each entry. Tasks without an entry are left out.
    """
    values = torch.tensor(list(scores), dtype=torch.float64)
    out: dict[str, Interval] = {}
    means, draws = [], []
    for number, task in enumerate(TASKS):
        rows = values[[i for i, e in enumerate(entries) if e.task == task]]
        if len(rows):
            means.append(rows.mean())
            draws.append(resamples(len(rows), _DRAWS, seed=number) @ rows)
            out[task] = Interval.of(means[-1], draws[-1])
    if means:
        out["overall"] = Interval.of(torch.stack(means).mean(), torch.stack(draws).mean(0))
    return out
