"""Folders of images as the official evaluators of text-to-image models read them, from prompt files of the user.

| benchmark   | prompt file                                  | what is written                                  |
|-------------|----------------------------------------------|--------------------------------------------------|
| geneval     | evaluation_metadata.jsonl of GenEval         | 00000/metadata.jsonl, 00000/samples/00000.png    |
| dpg         | folder of .txt files of DPG-Bench            | NAME.png, four samples in a 2 x 2 grid           |
| hpsv2       | JSON {style: [prompt, ...]}                  | STYLE/00000.jpg                                  |
| imagereward | benchmark-prompts.json: [{"id", "prompt"}]   | ID/ID_0.jpg, metadata.jsonl with all paths       |
| mjhq        | meta_data.json: {id: {"category", "prompt"}} | CATEGORY/ID.png                                  |
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.files import write_bytes, write_png

if TYPE_CHECKING:
    from PIL.Image import Image

Generator = Callable[[str, int], Any]
"""Makes an image of (prompt, seed): a tensor (3, H, W) or (1, 3, H, W) in 0..1, or a picture of Pillow."""

_JPEG_QUALITY = 95
_GRID = 2


@dataclass(frozen=True)
class Item:
    """A prompt, the files of its samples, relative to the output folder, and what else is known of it.

    `grid`: the one file holds all `samples` in a grid.
    """

    prompt: str
    files: tuple[str, ...]
    samples: int
    grid: bool = False
    metadata: Any = None


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark names its files. `samples` is the usual number for each prompt."""

    read: Callable[[Path, int], list[Item]]
    samples: int


def export(
    benchmark: str,
    prompts: Path,
    out: Path,
    generate: Generator,
    *,
    samples: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the folder of one benchmark; sample i of every prompt has seed + i. The number of images made.

    Files that exist are left alone, so an interrupted export goes on. `shard` (i, n) takes every n-th prompt from the
    i-th on, for several machines. Raises OptionError for an unknown benchmark or a prompt file of another form.
    """
    if benchmark not in BENCHMARKS:
        close = nearest(benchmark, BENCHMARKS)
        raise OptionError(
            f"there is no benchmark {benchmark!r}",
            where="eval export",
            expected="one of " + ", ".join(BENCHMARKS),
            todo=f"did you mean {close!r}?" if close else "",
        )
    form = BENCHMARKS[benchmark]
    count = form.samples if samples is None else samples
    if count < 1 or not 0 <= shard[0] < shard[1]:
        raise OptionError(
            f"samples {count}, shard {shard}", where="eval export", expected="at least 1, and (i, n) with 0 <= i < n"
        )
    items = _read(form, prompts, count)
    _check_names(items)
    mine, made = items[shard[0] :: shard[1]], 0
    for done, item in enumerate(mine):
        made += _make(item, out, generate, seed)
        progress(done + 1, len(mine))
    if benchmark == "imagereward":
        paths = [{**i.metadata, "gen_image_paths": [str(out / f) for f in i.files]} for i in items]
        write_bytes(out / "metadata.jsonl", json.dumps(paths).encode())
    return made


def find_generator(text: str) -> Generator:
    """The function that "module:name" names, looked for in the current folder first. Raises OptionError without one."""
    module, _, name = text.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"cannot import {text!r}: {error}",
            where="--generate",
            expected="module:function of (prompt, seed)",
            todo="run from the folder of the module",
        ) from error
    if not callable(found):
        raise OptionError(f"{text!r} is no function", where="--generate", expected="module:function of (prompt, seed)")
    return found  # type: ignore[no-any-return]


def _make(item: Item, out: Path, generate: Generator, seed: int) -> int:
    """Make the files of one item that are missing."""
    if item.metadata is not None and "/samples/" in item.files[0]:
        write_bytes(out / item.files[0].split("/")[0] / "metadata.jsonl", json.dumps(item.metadata).encode())
    if item.grid:
        if (out / item.files[0]).exists():
            return 0
        _write(out / item.files[0], _in_grid([picture(generate(item.prompt, seed + i)) for i in range(item.samples)]))
        return item.samples
    made = 0
    for i, file in enumerate(item.files):
        if not (out / file).exists():
            _write(out / file, picture(generate(item.prompt, seed + i)))
            made += 1
    return made


def picture(image: Any) -> Image:
    """A picture of Pillow from what a generator returns. Raises OptionError for anything else."""
    import torch
    from PIL import Image as pillow

    from toprovar_compile.demo import to_image

    if isinstance(image, pillow.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image[0] if image.ndim == 4 and len(image) == 1 else image
        if image.ndim == 3 and image.shape[0] == 3:
            return to_image(image.detach().float().cpu().clamp(0, 1))
    raise OptionError(
        f"the generator returned {type(image).__name__}",
        where="eval export",
        expected="a tensor (3, H, W) in 0..1 or a Pillow picture",
    )


def _write(path: Path, image: Image) -> None:
    if path.suffix == ".png":
        write_png(path, image)
        return
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    write_bytes(path, buffer.getvalue())


def _in_grid(images: Sequence[Image]) -> Image:
    from PIL import Image as pillow

    width, height = images[0].size
    rows = -(-len(images) // _GRID)
    sheet = pillow.new("RGB", (_GRID * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % _GRID * width, i // _GRID * height))
    return sheet


def _read(form: Benchmark, prompts: Path, count: int) -> list[Item]:
    try:
        items = form.read(prompts, count)
    except OSError as error:
        raise OptionError(f"cannot read it: {error.strerror}", where=str(prompts), expected="a prompt file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"cannot read it: {type(error).__name__} {error}",
            where=str(prompts),
            expected="the prompt file of this benchmark",
        ) from error
    if not items:
        raise OptionError("there are no prompts", where=str(prompts), expected="at least one")
    return items


def _check_names(items: Sequence[Item]) -> None:
    """Names in a prompt file must not lead out of the folder."""
    for item in items:
        for file in item.files:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts or "\\" in file:
                raise OptionError(f"the name {file!r} leads elsewhere", where="prompts", expected="plain names")


def _geneval(path: Path, count: int) -> list[Item]:
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [
        Item(e["prompt"], tuple(f"{n:05d}/samples/{i:05d}.png" for i in range(count)), count, metadata=e)
        for n, e in enumerate(entries)
    ]


def _dpg(path: Path, count: int) -> list[Item]:
    if not path.is_dir():
        raise ValueError("it is no folder")
    return [Item(f.read_text().strip(), (f"{f.stem}.png",), count, grid=True) for f in sorted(path.glob("*.txt"))]


def _hpsv2(path: Path, count: int) -> list[Item]:
    styles: dict[str, list[str]] = json.loads(path.read_text())
    return [Item(p, (f"{style}/{n:05d}.jpg",), 1) for style, prompts in styles.items() for n, p in enumerate(prompts)]


def _imagereward(path: Path, count: int) -> list[Item]:
    return [
        Item(e["prompt"], tuple(f"{e['id']}/{e['id']}_{i}.jpg" for i in range(count)), count, metadata=e)
        for e in json.loads(path.read_text())
    ]


def _mjhq(path: Path, count: int) -> list[Item]:
    entries: dict[str, dict[str, str]] = json.loads(path.read_text())
    return [Item(e["prompt"], (f"{e['category']}/{name}.png",), 1) for name, e in entries.items()]


BENCHMARKS = {
    "geneval": Benchmark(_geneval, 4),
    "dpg": Benchmark(_dpg, 4),
    "hpsv2": Benchmark(_hpsv2, 1),
    "imagereward": Benchmark(_imagereward, 10),
    "mjhq": Benchmark(_mjhq, 1),
}
