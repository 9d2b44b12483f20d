"""Composed pictures with their prompts: emoji objects in counts, colours and places, and single emoji by their names.

    composer = Composer(load_assets(Path("data")), device)
    batch = composer.batch(64, random.Random(0))          # batch.images, batch.prompts, batch.scenes, batch.boxes

A scene is what a prompt says: groups of equal objects, a relation between two of them, a plain ground. What is drawn by
chance (sizes, places) is not part of it. Compositions that `reserved` names are kept out of training; the prompts of
EmojiEval ask for them.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from toprovar_compile.evaluate.emoji_eval import GROUNDS

SIDE = 256
SPRITE = 192  # side of a stored sprite
_PAD = 2  # transparent pixels around an object that is cut out

COLOURS = {  # lightness, chroma, hue in OKLCH
    "red": (0.62, 0.22, 20.0),
    "orange": (0.75, 0.17, 58.0),
    "yellow": (0.89, 0.17, 100.0),
    "green": (0.70, 0.18, 146.0),
    "blue": (0.62, 0.19, 255.0),
    "purple": (0.54, 0.22, 300.0),
    "pink": (0.80, 0.14, 350.0),
    "brown": (0.46, 0.075, 50.0),
}
RELATIONS = ("left of", "right of", "above", "below", "and")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}
_NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
_PLURALS = {"scarf": "scarves", "snowman": "snowmen", "fish": "fish", "mailbox": "mailboxes", "octopus": "octopuses"}
_SHARES = {"pair": 0.2, "relation": 0.2, "colour": 0.22, "count": 0.3, "ground": 0.2}  # of each kind reserved


@dataclass(frozen=True)
class Object:
    """One object of the vocabulary: its emoji, its own colour's name where it has one, whether it can be recoloured."""

    noun: str
    code: str
    own: str | None
    recoloured: bool


@dataclass(frozen=True)
class Group:
    """`count` equal objects; without a colour they have their own."""

    noun: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """One group, or two with the relation of the first to the second. Plain data both ways by to_json and from_json."""

    groups: tuple[Group, ...]
    relation: str | None = None
    ground: str = "white"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"groups": [asdict(g) for g in self.groups], "relation": self.relation, "ground": self.ground}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Scene:
        """From what `to_json` gave."""
        return cls(tuple(Group(**g) for g in raw["groups"]), raw["relation"], raw["ground"])

    def turned(self) -> Scene:
        """The same scene, told from the other group."""
        assert self.relation is not None
        return Scene(self.groups[::-1], _OPPOSITE[self.relation], self.ground)


@cache
def vocabulary() -> dict[str, Object]:
    """The objects by noun, in the order of the file."""
    out = {}
    for line in Path(__file__).with_name("vocabulary.txt").read_text().splitlines():
        if not line.startswith("#"):
            noun, code, own, *star = (part.strip() for part in line.split("|"))
            out[noun] = Object(noun, code, None if own == "-" else own, star == ["*"])
    return out


@cache
def emoji_names() -> dict[str, list[str]]:
    """Name and keywords of every emoji by its code points, sorted by these."""
    names: dict[str, list[str]] = json.loads(Path(__file__).with_name("emoji_names.json").read_text())
    return names


@cache
def _nouns() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All nouns, and those that can be recoloured."""
    every = vocabulary()
    return tuple(every), tuple(n for n, o in every.items() if o.recoloured)


@cache
def _kept_out(kind: str, *parts: str) -> bool:
    """The fixed rule by which a composition is reserved: a hash of its words below the share of its kind."""
    digest = hashlib.blake2b("|".join((kind, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < _SHARES[kind]


def reserved_parts(scene: Scene) -> list[tuple[str, ...]]:
    """The compositions in a scene that training never sees, each as its kind and words; none for most scenes."""
    out: list[tuple[str, ...]] = []
    for g in scene.groups:
        own = vocabulary()[g.noun].own
        if g.colour is not None and g.colour != own and _kept_out("colour", g.noun, g.colour):
            out.append(("colour", g.noun, g.colour))
        if g.count > 1 and _kept_out("count", g.noun, str(g.count)):
            out.append(("count", g.noun, str(g.count)))
        if scene.ground != "white" and _kept_out("ground", g.noun, scene.ground):
            out.append(("ground", g.noun, scene.ground))
    if len(scene.groups) == 2:
        a, b = (g.noun for g in scene.groups)
        pair = (min(a, b), max(a, b))
        if _kept_out("pair", *pair):
            out.append(("pair", *pair))
        told = scene if scene.relation in ("left of", "above") else scene.turned()
        triple = (told.groups[0].noun, str(told.relation), told.groups[1].noun)
        if told.relation != "and" and _kept_out("relation", *triple):
            out.append(("relation", *triple))
        if told.relation == "and" and not _orders(a, b):
            out += [("relation", *sides) for sides in ((pair[0], "left of", pair[1]), (pair[1], "left of", pair[0]))]
    return out


@cache
def _orders(a: str, b: str) -> tuple[str, ...]:
    """How two objects may stand side by side, the first seen from the second, without being a reserved relation."""
    sides = {"left of": (a, b), "right of": (b, a)}
    return tuple(r for r, (left, right) in sides.items() if not _kept_out("relation", left, "left of", right))


def reserved(scene: Scene) -> bool:
    """Whether a scene holds a composition that is kept out of training."""
    return bool(reserved_parts(scene))


def reserved_single(name: str) -> bool:
    """Whether an emoji's name says a reserved composition, such as "blue heart"."""
    words = name.split()
    for noun in _nouns()[0]:
        for colour in COLOURS:
            if f" {colour} {noun} " in f" {name} " and reserved(Scene((Group(noun, 1, colour),))):
                return True
        for count in (2, 3, 4):
            if _NUMBERS[count] in words and plural(noun) in name and reserved(Scene((Group(noun, count),))):
                return True
    return False


def draw_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A random scene; without `held_out`, one that training may see."""
    while True:
        scene = _draw(rng)
        if held_out or not reserved(scene):
            return scene


def _draw(rng: random.Random) -> Scene:
    every, recoloured = _nouns()
    ground = "white" if rng.random() < 0.6 else rng.choice(tuple(GROUNDS)[1:])

    def group(count: int) -> Group:
        if rng.random() < 0.5:
            return Group(rng.choice(recoloured), count, rng.choice(tuple(COLOURS)))
        return Group(rng.choice(every), count)

    if rng.random() < 0.45:
        return Scene((group(rng.choices((1, 2, 3, 4), (0.34, 0.22, 0.22, 0.22))[0]),), None, ground)
    counts = rng.choices(((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)), (0.6, 0.1, 0.1, 0.08, 0.06, 0.06))[0]
    first, second = group(counts[0]), group(counts[1])
    while second.noun == first.noun:
        second = group(counts[1])
    relation = rng.choices(RELATIONS, (0.19, 0.19, 0.19, 0.19, 0.24))[0]
    return Scene((first, second), relation, ground)


def plural(noun: str) -> str:
    """The plural of a noun of the vocabulary."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _say(g: Group, rng: random.Random | None) -> str:
    words = [*([g.colour] if g.colour else []), plural(g.noun) if g.count > 1 else g.noun]
    number = _NUMBERS[g.count]
    if g.count == 1:
        number = "an" if words[0][0] in "aeiou" else "a"
        if rng is not None and rng.random() < 0.1:
            number = "one"
    return " ".join((number, *words))


_WAYS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "and": ("and", "next to", "beside"),
}
_OPENINGS = ("", "", "", "a picture of ", "a photo of ", "an image of ")
_GROUND_WAYS = ("on a {} background", "on a {} background", "on {}", "on a {} ground", "with a {} background")


def prompt(scene: Scene, rng: random.Random | None = None) -> str:
    """What a scene shows, in English; with `rng` one of several ways to say it."""
    if rng is not None and scene.relation is not None and rng.random() < 0.3:
        scene = scene.turned()
    parts = [_say(g, rng) for g in scene.groups]
    text = parts[0]
    if scene.relation is not None:
        ways = _WAYS[scene.relation]
        way = ways[0] if rng is None else rng.choices(ways, (0.6, 0.2, 0.2))[0]
        text = f"{text} {way} {parts[1]}"
    if scene.ground != "white" or (rng is not None and rng.random() < 0.15):
        way = _GROUND_WAYS[0] if rng is None else rng.choice(_GROUND_WAYS)
        text = f"{text} {way.format(scene.ground)}"
    return text if rng is None else rng.choice(_OPENINGS) + text


def single_prompt(code: str, ground: str = "white", rng: random.Random | None = None) -> str:
    """A single emoji's name, with `rng` in one of several ways and with some of its keywords."""
    name, *more = emoji_names()[code]
    if rng is None:
        return name
    kind = rng.random()
    if more and kind < 0.15:
        name = f"{name}, {rng.choice(more)}"
    elif kind < 0.3:
        name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    elif kind < 0.4:
        name = f"{name} emoji"
    if ground != "white" or rng.random() < 0.05:
        name = f"{name} {rng.choice(_GROUND_WAYS).format(ground)}"
    return name


def words(text: str) -> list[str]:
    """The words of a prompt: lower-case letters and digits, an apostrophe inside; a comma is a word."""
    return re.findall(r"[a-z0-9']+|,", text.lower())


@cache
def all_words() -> tuple[str, ...]:
    """Every word that a prompt of these functions can hold, sorted."""
    texts = [w for ways in (*_WAYS.values(), _OPENINGS, _GROUND_WAYS) for w in ways]
    texts += [*COLOURS, *GROUNDS, *_NUMBERS.values(), "an", "one", "emoji", ","]
    texts += [form for noun in vocabulary() for form in (noun, plural(noun))]
    texts += list(itertools.chain.from_iterable(emoji_names().values()))
    return tuple(sorted({w for t in texts for w in words(t)}))


@dataclass(frozen=True)
class Placed:
    """One sprite in one picture: rows of `Plan.placed`, in this order."""

    image: int
    sprite: int
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Plan:
    """Pictures to draw. `placed` float32 (K, 5) holds `Placed` rows; `boxes` an array (k, 6) for each picture.

    A row of boxes is x0, y0, x1, y1, the object's index in the vocabulary and its colour's: 0 for none of the eight,
    else 1 + its index in COLOURS. `scenes` has None where the picture is a single emoji, whose boxes are empty.
    """

    placed: NDArray[np.float32]
    grounds: NDArray[np.uint8]
    prompts: list[str]
    scenes: list[Scene | None]
    boxes: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Batch:
    """Drawn pictures: `images` uint8 (n, 3, 256, 256) on the composer's device, the rest as in `Plan`."""

    images: Tensor
    prompts: list[str]
    scenes: list[Scene | None]
    boxes: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Shapes:
    """What planning needs to know of the sprites: extents (w, h) of each as shares of its side, and where each is.

    Sprites are the singles, in the order of `emoji_names`, then for each object its own look and, where it can be
    recoloured, the eight colours. `first` is the index of an object's own look.
    """

    extents: NDArray[np.float32]
    first: dict[str, int]

    def sprite(self, noun: str, colour: str | None) -> int:
        """Index of the sprite of an object in a colour. Its own colour is its own look."""
        o = vocabulary()[noun]
        if colour is None or colour == o.own:
            return self.first[noun]
        if not o.recoloured:
            raise ValueError(f"{noun} cannot be {colour}")
        return self.first[noun] + 1 + list(COLOURS).index(colour)


def layout(scene: Scene, rng: random.Random) -> list[tuple[float, float, float, float]]:
    """A cell (x0, y0, x1, y1) in pixels for every object, group by group; cells do not overlap."""
    margin, side = 4.0, float(SIDE)
    lo, hi = margin, side - margin
    if len(scene.groups) == 1:
        count = scene.groups[0].count
        if count == 1:
            return [(lo, lo, hi, hi)]
        if count == 2:
            return _line((lo, lo, hi, hi), 2, across=rng.random() < 0.75)
        if count == 3 and rng.random() < 0.4:
            return _line((lo, lo, hi, hi), 3, across=True)
        middle = side / 2 + rng.uniform(-8, 8)
        top, bottom = (2, 2) if count == 4 else rng.choice(((1, 2), (2, 1)))
        return _line((lo, lo, hi, middle), top, across=True) + _line((lo, middle, hi, hi), bottom, across=True)
    a, b = scene.groups
    relation = scene.relation
    if relation == "and":
        relation = rng.choice(_orders(a.noun, b.noun) or ("left of", "right of"))
    cut = side / 2 + rng.uniform(-12, 12)
    if relation in ("left of", "right of"):
        halves = [(lo, lo, cut - 2, hi), (cut + 2, lo, hi, hi)]
    else:
        halves = [(lo, lo, hi, cut - 2), (lo, cut + 2, hi, hi)]
    if relation in ("right of", "below"):
        halves.reverse()
    across = relation in ("above", "below")
    return _line(halves[0], a.count, across=across) + _line(halves[1], b.count, across=across)


def _line(
    cell: tuple[float, float, float, float], count: int, *, across: bool
) -> list[tuple[float, float, float, float]]:
    """A cell cut into `count` equal ones side by side, or one above the other."""
    x0, y0, x1, y1 = cell
    if across:
        w = (x1 - x0) / count
        return [(x0 + i * w, y0, x0 + (i + 1) * w, y1) for i in range(count)]
    h = (y1 - y0) / count
    return [(x0, y0 + i * h, x1, y0 + (i + 1) * h) for i in range(count)]


class Planner:
    """Draws scenes and places; plain data only, so that it can run in another process.

    `singles` is the share of single emoji. `held_out` draws reserved compositions too.
    """

    def __init__(self, shapes: Shapes, singles: float = 0.3, held_out: bool = False) -> None:
        self.shapes, self.singles, self.held_out = shapes, singles, held_out
        codes = list(emoji_names())
        self._codes = [(i, c) for i, c in enumerate(codes) if held_out or not reserved_single(emoji_names()[c][0])]

    def leave_out(self, nouns: Sequence[str]) -> None:
        """Draw no single emoji whose name holds one of these words."""
        self._codes = [(i, c) for i, c in self._codes if not any(n in emoji_names()[c][0] for n in nouns)]

    def plan(self, n: int, rng: random.Random) -> Plan:
        """n random pictures."""
        items: list[Scene | None] = [
            None if rng.random() < self.singles else draw_scene(rng, held_out=self.held_out) for _ in range(n)
        ]
        return self.plan_scenes(items, rng)

    def plan_scenes(self, scenes: Sequence[Scene | None], rng: random.Random, prompts: bool = True) -> Plan:
        """Places for these scenes, a random single emoji for None; prompts in their plain form without `prompts`."""
        placed: list[tuple[float, ...]] = []
        grounds, texts, boxes = [], [], []
        for i, scene in enumerate(scenes):
            if scene is None:
                index, code = rng.choice(self._codes)
                ground = "white" if rng.random() < 0.85 else rng.choice(tuple(GROUNDS)[1:])
                side = SIDE * rng.uniform(0.76, 0.92)
                slack = (SIDE - side) / 3
                centre = (SIDE / 2 + rng.uniform(-slack, slack), SIDE / 2 + rng.uniform(-slack, slack))
                placed.append((i, index, *centre, side))
                texts.append(single_prompt(code, ground, rng if prompts else None))
                grounds.append(GROUNDS[ground])
                boxes.append(np.zeros((0, 6), np.float32))
                continue
            rows = self._place(i, scene, rng)
            placed += [r[0] for r in rows]
            boxes.append(np.array([r[1] for r in rows], np.float32))
            grounds.append(GROUNDS[scene.ground])
            texts.append(prompt(scene, rng if prompts else None))
        return Plan(np.array(placed, np.float32), np.array(grounds, np.uint8), texts, list(scenes), boxes)

    def _place(self, image: int, scene: Scene, rng: random.Random) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """The sprites of one picture with their boxes. Objects of one group are equally large, give or take."""
        cells, out = layout(scene, rng), []
        position = 0
        for g in scene.groups:
            sprite = self.shapes.sprite(g.noun, g.colour)
            ew, eh = self.shapes.extents[sprite].tolist()
            mine = cells[position : position + g.count]
            position += g.count
            room = min(min((x1 - x0) / ew, (y1 - y0) / eh) for x0, y0, x1, y1 in mine)
            largest = min(room, 0.92 * SIDE, 150.0 if len(cells) > 1 else SIDE)
            size = largest * rng.uniform(0.82, 0.96) if len(cells) > 1 else largest * rng.uniform(0.5, 0.95)
            colour = g.colour or vocabulary()[g.noun].own
            label = 0 if colour is None else 1 + list(COLOURS).index(colour)
            for x0, y0, x1, y1 in mine:
                side = size * rng.uniform(0.95, 1.0)
                w, h = side * ew, side * eh
                slack_x, slack_y = min((x1 - x0 - w) / 2, 28.0), min((y1 - y0 - h) / 2, 28.0)
                x = (x0 + x1) / 2 + rng.uniform(-slack_x, slack_x)
                y = (y0 + y1) / 2 + rng.uniform(-slack_y, slack_y)
                box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2, list(vocabulary()).index(g.noun), label)
                out.append(((image, sprite, x, y, side), box))
        return out


def load_assets(folder: Path) -> Tensor:
    """All renders, uint8 (3391, 4, 256, 256) RGBA in the order of `emoji_names`; the first call makes a cache of them.

    `folder` holds the npm package file; see data.py for how it is fetched.
    """
    cache_file = folder / "emoji_rgba.npy"
    if not cache_file.exists():
        with tarfile.open(sorted(folder.glob("*fluent-emoji-3d*.tgz"))[0]) as tar:
            files = {Path(m.name).stem: tar.extractfile(m).read() for m in tar if m.name.endswith(".webp")}  # type: ignore[union-attr]
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(lambda c: _rgba(files[c]), emoji_names())))
        temporary = folder / f"emoji_rgba.{multiprocessing.current_process().pid}.tmp.npy"
        np.save(temporary, images)
        temporary.replace(cache_file)
    return torch.from_numpy(np.load(cache_file, mmap_mode="c"))


def _rgba(raw: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(raw)).convert("RGBA")
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).transpose(2, 0, 1)


class Composer:
    """Draws scenes and single emoji on `device`, all pictures of a batch at once.

    `assets` are those of `load_assets`. Equal generators give equal pictures on one device. Sprites take 0.8 GB, a
    seventh of it where `singles`, the share of single emoji, is 0. `held_out` draws reserved compositions too.
    """

    def __init__(
        self, assets: Tensor, device: torch.device | str, *, singles: float = 0.3, held_out: bool = False
    ) -> None:
        self.device = torch.device(device)
        codes = {c.replace("-fe0f", ""): i for i, c in enumerate(emoji_names())}
        emoji = assets if singles else assets[:0]
        large = [_shrink(_premultiplied(x.to(self.device)), SPRITE) for x in emoji.split(128) if len(x)]
        extents = [np.ones((len(emoji), 2), np.float32)]
        first, count = {}, len(emoji)
        for noun, o in vocabulary().items():
            own = assets[codes[o.code]].to(self.device).float() / 255
            looks = torch.stack([own, *(recolour(own, c) for c in (COLOURS if o.recoloured else ()))])
            cut, extent = _cut_out(looks)
            large.append(cut)
            first[noun] = count
            count += len(looks)
            extents.append(np.tile(np.array(extent, np.float32), (len(looks), 1)))
        self._large = torch.cat(large)
        self._small = torch.cat([_shrink(x.float() / 255, SPRITE // 2) for x in self._large.split(256)])
        self.shapes = Shapes(np.concatenate(extents), first)
        self.planner = Planner(self.shapes, singles, held_out)

    def batch(self, n: int, rng: random.Random) -> Batch:
        """n random pictures."""
        return self.render(self.planner.plan(n, rng))

    def compose(self, scenes: Sequence[Scene], rng: random.Random) -> Batch:
        """Pictures of these scenes, with plain prompts."""
        return self.render(self.planner.plan_scenes(scenes, rng, prompts=False))

    @torch.no_grad()
    def render(self, plan: Plan) -> Batch:
        """Draw what was planned."""
        placed = torch.from_numpy(plan.placed)
        image, sprite = placed[:, 0].long(), placed[:, 1].long()
        # The n-th object of every picture is drawn in one go.
        order = torch.arange(len(image)) - torch.searchsorted(image, image)
        canvas = torch.from_numpy(plan.grounds).to(self.device).float().view(-1, 3, 1, 1).div(255)
        canvas = canvas.expand(-1, -1, SIDE, SIDE).contiguous()
        for k in range(int(order.max()) + 1):
            for sprites, level in ((self._large, placed[:, 4] > 110), (self._small, placed[:, 4] <= 110)):
                chosen = ((order == k) & level).nonzero().squeeze(1)
                for chunk in chosen.split(128) if len(chosen) else ():
                    rows = image[chunk].to(self.device)
                    ink = _place(sprites[sprite[chunk].to(self.device)], placed[chunk, 2:].to(self.device))
                    canvas[rows] = canvas[rows] * (1 - ink[:, 3:]) + ink[:, :3]
        images = canvas.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        return Batch(images, plan.prompts, plan.scenes, plan.boxes)

    def stream(self, n: int, seed: int, workers: int = 0) -> Iterator[Batch]:
        """Endless batches of n. With `workers`, that many other processes plan them ahead.

        The batches depend on `seed` only, not on `workers`.
        """
        if not workers:
            for i in itertools.count():
                yield self.batch(n, random.Random(f"{seed}/{i}"))
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (self.planner, n, seed)) as pool:
            waiting = [pool.apply_async(_plan_in_worker, (i,)) for i in range(4 * workers)]
            for i in itertools.count(len(waiting)):
                plan = waiting.pop(0).get()
                waiting.append(pool.apply_async(_plan_in_worker, (i,)))
                yield self.render(plan)


_worker: tuple[Planner, int, int] | None = None  # what a process that plans ahead was started with


def _start_worker(planner: Planner, n: int, seed: int) -> None:
    global _worker
    _worker = planner, n, seed


def _plan_in_worker(i: int) -> Plan:
    assert _worker is not None
    planner, n, seed = _worker
    return planner.plan(n, random.Random(f"{seed}/{i}"))


def _premultiplied(rgba: Tensor) -> Tensor:
    x = rgba.float() / 255
    return torch.cat((x[:, :3] * x[:, 3:], x[:, 3:]), 1)


def _shrink(x: Tensor, side: int) -> Tensor:
    """Premultiplied pictures in 0..1 at another size, uint8."""
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


def _cut_out(looks: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """RGBA looks (N, 4, H, W) of one object cut to its outline and made to fill a sprite; and its extent in it."""
    solid = looks[0, 3] > 0.3
    rows, columns = solid.any(1).nonzero().squeeze(1), solid.any(0).nonzero().squeeze(1)
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    w, h = x1 - x0, y1 - y0
    side = round(max(w, h) * SPRITE / (SPRITE - 2 * _PAD))
    left, top = (side - w) // 2, (side - h) // 2
    x = torch.cat((looks[:, :3] * looks[:, 3:], looks[:, 3:]), 1)[:, :, y0:y1, x0:x1]
    x = F.pad(x, (left, side - w - left, top, side - h - top))
    return _shrink(x, SPRITE), (w / side, h / side)


def _place(sprites: Tensor, where: Tensor) -> Tensor:
    """Premultiplied sprites uint8 (N, 4, S, S) as layers (N, 4, 256, 256) in 0..1, at rows x, y, side of `where`."""
    zoom = SIDE / where[:, 2]
    shift = (SIDE - 2 * where[:, :2]) / where[:, 2:]
    theta = torch.zeros(len(sprites), 2, 3, device=sprites.device)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(sprites), 4, SIDE, SIDE], align_corners=False)
    return F.grid_sample(sprites.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False) / 255


def recolour(rgba: Tensor, colour: str) -> Tensor:
    """An RGBA picture (4, H, W) in 0..1 whose main colour has become another; other colours stay as they are.

    The main colour is the commonest hue; its shades keep their differences in lightness and hue in OKLCH.
    """
    light, chroma, hue = COLOURS[colour]
    lab = _to_oklab(rgba[:3])
    c, h = torch.hypot(lab[1], lab[2]), torch.atan2(lab[2], lab[1])
    weight = c * rgba[3]
    # The commonest hue: where the density of hues, smoothed over 25 degrees, is highest.
    bins = torch.histc((h[weight > 0.02]).float().cpu(), bins=72, min=-torch.pi, max=torch.pi)
    smooth = F.conv1d(F.pad(bins.view(1, 1, -1), (2, 2), mode="circular"), torch.ones(1, 1, 5)).view(-1)
    main = (float(smooth.argmax()) + 0.5) / 72 * 2 * torch.pi - torch.pi
    away = torch.remainder(h - main + torch.pi, 2 * torch.pi) - torch.pi
    mask = ((75 - away.abs().rad2deg()) / 20).clamp(0, 1) * ((c - 0.015) / 0.03).clamp(0, 1)
    inside = (mask > 0.5) & (rgba[3] > 0.5)
    middle_light, middle_chroma = lab[0][inside].median(), c[inside].median()
    new_light = (light + 0.75 * (lab[0] - middle_light)).clamp(0.12, 0.97)
    new_chroma = chroma * (c / middle_chroma).clamp(0.25, 1.15)
    new_hue = torch.deg2rad(torch.tensor(hue)) + 0.25 * away.clamp(-1, 1)
    new = torch.stack((new_light, new_chroma * new_hue.cos(), new_chroma * new_hue.sin()))
    mixed = lab + mask * (new - lab)
    return torch.cat((_from_oklab(mixed).clamp(0, 1), rgba[3:]))


_TO_LMS = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
           (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
_TO_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
           (0.0259040371, 0.7827717662, -0.8086757660))  # fmt: skip


def _to_oklab(rgb: Tensor) -> Tensor:
    """sRGB (3, H, W) in 0..1 to OKLab. Source: https://bottosson.github.io/posts/oklab/"""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = torch.einsum("ij,jhw->ihw", torch.tensor(_TO_LMS, device=rgb.device), linear)
    return torch.einsum("ij,jhw->ihw", torch.tensor(_TO_LAB, device=rgb.device), lms ** (1 / 3))


def _from_oklab(lab: Tensor) -> Tensor:
    lms = torch.einsum("ij,jhw->ihw", torch.linalg.inv(torch.tensor(_TO_LAB)).to(lab.device), lab) ** 3
    linear = torch.einsum("ij,jhw->ihw", torch.linalg.inv(torch.tensor(_TO_LMS)).to(lab.device), lms).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder of the renders' package file.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("scenes.png"),
    count: Annotated[int, typer.Option(help="Pictures.")] = 48,
    seed: Annotated[int, typer.Option(help="Draws of the scenes.")] = 0,
    singles: Annotated[float, typer.Option(help="Share of single emoji.")] = 0.25,
) -> None:
    """Write a sheet of random pictures and print their prompts."""
    import common

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = Composer(load_assets(folder), device, singles=singles).batch(count, random.Random(seed))
    common.sheet(batch.images.float() / 255, 8, out, side=192)
    for i, text in enumerate(batch.prompts):
        print(i, text)


if __name__ == "__main__":
    typer.run(main)
