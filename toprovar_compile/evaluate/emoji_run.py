"""EmojiEval of one model in several ways, such as plans: scores, closeness to the first way's images, and times.

Every batch is generated in all ways before the next one, and is then written down: an interrupted run goes on there.
"""

from __future__ import annotations

import json
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprovar_compile.demo import to_image
from toprovar_compile.errors import OptionError
from toprovar_compile.evaluate.detector import Detector, load_detector
from toprovar_compile.evaluate.emoji_eval import TASKS, Entry, grounds, reasons, summarise
from toprovar_compile.evaluate.images import numbers
from toprovar_compile.evaluate.intervals import mean_interval
from toprovar_compile.evaluate.quality import closeness
from toprovar_compile.files import write_json, write_png
from toprovar_compile.measure import require_metrics

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT_VERSION = 1
SHOWN = 10
"""Prompts on the contact sheet."""

Generate = Callable[[list[str], list[int]], Tensor]
"""Makes images (N, 3, H, W) in 0..1 of N prompts. A model that takes one seed for a batch uses the first."""

_UNTIMED = 2  # batches at the beginning, in which a way compiles and records
_SIDE, _GAP, _LEFT, _TOP = 192, 6, 118, 60  # pixels of the contact sheet
_MEASURES = ("ssim", "psnr", "distance", "ground")


def evaluate(
    generate: Generate | Mapping[str, Generate],
    entries: Sequence[Entry],
    *,
    images_per_prompt: int = 4,
    batch: int = 4,
    seed: int = 0,
    detector: Detector | None = None,
    folder: Path | None = None,
    context: Mapping[str, Any] | None = None,
    threshold: float = 0.3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Score one way to generate, or several by name, of which the first is what the others are compared with.

    Image k of the run has seed + k; all ways get the same batches, all of one size. With `folder`, batches that an
    earlier run with the same arguments and `context` (plain data: model, plans, machine) left there are not made again,
    and emoji_eval.json and emoji_eval.png are written into it. `progress` gets the batches done and in all.
    Raises OptionError for no prompts or images of another form, MissingDependencyError without torchmetrics.
    """
    ways = {"model": generate} if callable(generate) else dict(generate)
    if not entries or not ways or min(images_per_prompt, batch) < 1:
        raise OptionError("there is nothing to generate", where="emoji_eval", expected="prompts, ways, images, a batch")
    require_metrics("emoji_eval")
    detector = detector or load_detector()
    items = [i for i in range(len(entries)) for _ in range(images_per_prompt)]
    starts = range(0, len(items), batch)
    header = {
        "version": FORMAT_VERSION,
        "ways": list(ways),
        "prompts": [e.prompt for e in entries],
        "settings": {"images_per_prompt": images_per_prompt, "batch": batch, "seed": seed, "threshold": threshold},
        "context": dict(context or {}),
    }
    book = _Book(folder, header)
    shown = _shown(entries, images_per_prompt)
    for number, start in enumerate(starts):
        progress(number, len(starts))
        if number < len(book.rows):
            continue
        wanted = [items[min(start + j, len(items) - 1)] for j in range(batch)]  # the last batch is filled up
        count = min(batch, len(items) - start)
        prompts, seeds = [entries[i].prompt for i in wanted], [seed + start + j for j in range(batch)]
        row: dict[str, Any] = {}
        first: Tensor | None = None
        for name, make in ways.items():
            begin = time.perf_counter()
            images = make(prompts, seeds)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds = (time.perf_counter() - begin) / batch
            images = _checked(images, batch)[:count]
            first = images if first is None else first
            asked = [entries[i] for i in wanted[:count]]
            near, decibels = closeness(images, first)
            row[name] = {
                "wrong": reasons(images, asked, detector, threshold),
                "seconds": seconds,
                "ssim": numbers(near),
                "psnr": numbers(decibels, 3),
                "distance": numbers(detector.distance(images, first)),
                "ground": [int(name == e.ground) for name, e in zip(grounds(images), asked, strict=True)],
            }
            for j in range(count):
                if start + j in shown and folder is not None:
                    write_png(folder / "emoji_eval_images" / f"{start + j}_{_slug(name)}.png", to_image(images[j]))
        book.add(row)
    progress(len(starts), len(starts))
    results = header | _results(list(ways), entries, items, book.rows)
    if folder is not None:
        write_json(folder / "emoji_eval.json", results)
        write_png(folder / "emoji_eval.png", contact_sheet(results, entries, items, shown, book.rows, folder))
    return results


class _Book:
    """The batches done so far, a line each after a line that says of what, in a file where there is a folder."""

    def __init__(self, folder: Path | None, header: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / "emoji_eval.jsonl"
        if self._path is None:
            return
        first = json.dumps(header)
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        if lines[:1] == [first]:
            # What follows the last line break was cut off while it was written.
            self.rows = [json.loads(line) for line in lines[1:-1]]
        kept = [first, *lines[1 : len(self.rows) + 1]]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join(kept) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _checked(images: Tensor, count: int) -> Tensor:
    if images.dim() != 4 or images.shape[:2] != (count, 3) or not images.is_floating_point():
        raise OptionError(
            f"the model gave {tuple(images.shape)} {images.dtype} for {count} prompts",
            where="emoji_eval",
            expected="floats (N, 3, H, W) in 0..1",
        )
    return images.detach().float().cpu().clamp(0, 1)


def _results(
    ways: Sequence[str], entries: Sequence[Entry], items: Sequence[int], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Scores, closeness and times of all ways from the rows of all batches."""
    out: list[dict[str, Any]] = []
    right: dict[str, Tensor] = {}
    for name in ways:
        wrong = list(chain.from_iterable(row[name]["wrong"] for row in rows))
        total, good = torch.zeros(len(entries)), torch.zeros(len(entries))
        index = torch.tensor(items)
        total.index_add_(0, index, torch.ones(len(items)))
        good.index_add_(0, index, torch.tensor([float(not w) for w in wrong]))
        right[name] = good / total
        seconds = [row[name]["seconds"] for row in rows]
        result: dict[str, Any] = {
            "name": name,
            "scores": {k: asdict(v) for k, v in summarise(entries, right[name].tolist()).items()},
            "minus_first": {
                k: asdict(v) for k, v in summarise(entries, (right[name] - right[ways[0]]).tolist()).items()
            },
            "seconds": statistics.median(seconds[_UNTIMED:] or seconds),
            "wrong": {entries[i].prompt: w for i, w in zip(items, wrong, strict=True) if w},
        }
        for measure in _MEASURES:
            values = torch.tensor(list(chain.from_iterable(row[name][measure] for row in rows)))
            result[measure] = asdict(mean_interval(values))
        out.append(result)
    for result in out:
        result["speedup"] = out[0]["seconds"] / result["seconds"]
    return {"results": out}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table, with 95 % intervals."""
    tasks = [t for t in TASKS if t in results["results"][0]["scores"]]
    head = ["", "overall", "minus first", *tasks, "ground", "SSIM", "PSNR dB", "distance", "s an image", "x"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for r in results["results"]:
        cells = [r["name"], _interval(r["scores"]["overall"]), _interval(r["minus_first"]["overall"], signed=True)]
        cells += [f"{r['scores'][t]['mean']:.2f}" for t in tasks]
        cells += [f"{r['ground']['mean']:.2f}"]
        cells += [f"{r['ssim']['mean']:.3f}", f"{r['psnr']['mean']:.1f}", f"{r['distance']['mean']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.3f}", f"{r['speedup']:.2f}"]) + " |")
    return "\n".join(lines)


def _interval(value: Mapping[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['mean']:{sign}.3f} ({value['low']:{sign}.3f}..{value['high']:{sign}.3f})"


def contact_sheet(
    results: Mapping[str, Any],
    entries: Sequence[Entry],
    items: Sequence[int],
    shown: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> Image:
    """One row a way, with its score and time, one column a prompt; pictures judged wrong are framed in red."""
    from PIL import Image, ImageDraw, ImageFont

    ways = results["results"]
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_LEFT + len(shown) * step, _TOP + len(ways) * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, k in enumerate(shown):
        text = "\n".join(textwrap.wrap(entries[items[k]].prompt, 26)[:3])
        draw.text((_LEFT + column * step, 4), text, fill="black", font=font)
    for row, r in enumerate(ways):
        y = _TOP + row * step
        name = "\n".join(textwrap.wrap(r["name"], 15)[:5])
        text = f"{name}\n{r['scores']['overall']['mean']:.3f}\n{r['seconds']:.2f} s\n{r['speedup']:.2f} x"
        draw.text((4, y + 4), text, fill="black", font=font)
        wrong = list(chain.from_iterable(line[r["name"]]["wrong"] for line in rows))
        for column, k in enumerate(shown):
            x = _LEFT + column * step
            picture = Image.open(folder / "emoji_eval_images" / f"{k}_{_slug(r['name'])}.png").resize((_SIDE, _SIDE))
            sheet.paste(picture, (x, y))
            if wrong[k]:
                draw.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), outline="red", width=3)
    return sheet


def _shown(entries: Sequence[Entry], images_per_prompt: int) -> list[int]:
    """The images on the sheet: the first of prompts evenly spread."""
    count = min(SHOWN, len(entries))
    return [(i * len(entries) // count) * images_per_prompt for i in range(count)]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
