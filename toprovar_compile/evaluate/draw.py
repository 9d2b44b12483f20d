"""Plots of comparisons. Needs the "plots" extra; without it nothing is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from toprovar_compile.demo import to_image
from toprovar_compile.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from toprovar_compile.evaluate.candidates import Candidate
    from toprovar_compile.evaluate.images import Generated
    from toprovar_compile.policies.statistics import Statistics

_SHARE, _COLUMNS, _SIDE, _TITLE, _QUALITY = 0.4, 6, 80, 18, 75
_MARKS = "os^vDPX*<>hp"


def plot(results: dict[str, Any], path: Path) -> bool:
    """Mean SSIM with its interval against the share of tokens computed, one colour a policy: whether it was drawn."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(8.5, 5.5), dpi=120)
    policies = list(dict.fromkeys(row["policy"] for row in results["plans"]))
    colours = pyplot.get_cmap("tab20")
    for i, policy in enumerate(policies):
        rows = [row for row in results["plans"] if row["policy"] == policy]
        x = [row["share"] for row in rows]
        y = [row["ssim"]["mean"] for row in rows]
        below = [r["ssim"]["mean"] - r["ssim"]["low"] for r in rows]
        above = [r["ssim"]["high"] - r["ssim"]["mean"] for r in rows]
        look: dict[str, Any] = {"fmt": _MARKS[i % len(_MARKS)], "color": colours(i % 20), "markersize": 5}
        axes.errorbar(x, y, yerr=[below, above], label=policy, elinewidth=0.8, **look)
        line = results["frontiers"].get(policy, [])
        axes.plot([p["share"] for p in line], [p["mean"] for p in line], color=colours(i % 20), linewidth=0.8)
    axes.set_xlabel("share of the tokens computed")
    axes.set_ylabel("mean SSIM to the unpruned image, 95 % interval")
    count = len(results["labels"])
    axes.set_title(f"{results['model']['name']}, {count} images, {results['machine']['hardware']}", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    _save(pyplot, figure, path)
    return True


def curves(calibrations: Sequence[Statistics], path: Path) -> bool:
    """rho and mean entropy by scale, and the ratio of every layer at scale 6, one line a calibration: whether drawn."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), dpi=120)
    for i, stats in enumerate(calibrations):
        label = f"seed {stats.seed}, {stats.prompts} images"
        scales = [s for s, rho in enumerate(stats.rho) if rho is not None]
        left.plot(scales, [stats.rho[s] for s in scales], marker="o", markersize=3, label=label)
        entropy = [sum(layers) / len(layers) for layers in stats.entropy]
        middle.plot(range(len(entropy)), entropy, marker="o", markersize=3, label=label)
        at = min(6, len(stats.schedule) - 1)
        layers = [layer + 0.2 * i for layer in range(stats.num_layers)]
        right.bar(layers, stats.ratio[at], width=0.2, label=label)
    for axes, x, y in (
        (left, "scale", "share of tokens below the mean entropy"),
        (middle, "scale", "mean entropy, nats"),
        (right, "layer", "first / second singular value, scale 6"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y, fontsize=8)
    left.legend(fontsize=7)
    _save(pyplot, figure, path)
    return True


class Worst:
    """The worst images of one plan for each policy, the one whose cost is nearest to `_SHARE`."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Image]] = {}

    def offer(self, candidate: Candidate, made: Generated, similar: Tensor, unpruned: Tensor) -> None:
        """Take the images of a plan if it is nearer than what its policy has."""
        share = float(made.shares.mean())
        distance = abs(share - _SHARE)
        if not self._better(candidate.policy, distance):
            return
        rows = similar.argsort()[:_COLUMNS].tolist()
        values = ", ".join(f"{similar[i]:.3f}" for i in rows)
        text = f"{candidate.policy}: {candidate.name}, {share:.0%} of the tokens; SSIM {values}"
        self._kept[candidate.policy] = (distance, _strip(text, unpruned[rows], made.images[rows]))

    def lines(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the sheet shows, from above: policies as `rows` have them."""
        order = dict.fromkeys(row["policy"] for row in rows if row["policy"] in self._kept)
        self._kept = {policy: self._kept[policy] for policy in order}
        return [{"policy": policy, "distance": distance} for policy, (distance, _) in self._kept.items()]

    def load(self, lines: Sequence[dict[str, Any]], results: Path) -> None:
        """Take what is nearer from the sheet beside another comparison's JSON, which said these `lines` of it."""
        from PIL import Image

        if not lines or not worst_images(results).exists():
            return
        with Image.open(worst_images(results)) as sheet:
            height = sheet.height // len(lines)
            for i, line in enumerate(lines):
                if self._better(line["policy"], line["distance"]):
                    strip = sheet.crop((0, i * height, sheet.width, (i + 1) * height))
                    self._kept[line["policy"]] = (line["distance"], strip)

    def draw(self, results: Path) -> None:
        """Write the sheet beside the JSON: for each policy a line of unpruned images, and below what the plan made."""
        from PIL import Image

        strips = [strip for _, strip in self._kept.values()]
        if not strips:
            return
        height = strips[0].height
        sheet = Image.new("RGB", (strips[0].width, height * len(strips)), "white")
        for i, strip in enumerate(strips):
            sheet.paste(strip, (0, i * height))
        buffer = io.BytesIO()
        sheet.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
        write_bytes(worst_images(results), buffer.getvalue())

    def _better(self, policy: str, distance: float) -> bool:
        return policy not in self._kept or distance < self._kept[policy][0]


def worst_images(results: Path) -> Path:
    """The sheet of worst images that belongs to a comparison's JSON."""
    return results.with_name(f"{results.stem}_worst.jpg")


def _strip(text: str, unpruned: Tensor, pruned: Tensor) -> Image:
    """One policy's part of the sheet."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (_COLUMNS * _SIDE, _TITLE + 2 * _SIDE), "white")
    ImageDraw.Draw(strip).text((4, 4), text, fill="black")
    for column, pair in enumerate(zip(unpruned, pruned, strict=True)):
        for row, image in enumerate(pair):
            strip.paste(to_image(image).resize((_SIDE, _SIDE)), (column * _SIDE, _TITLE + row * _SIDE))
    return strip


def _pyplot() -> Any:
    """matplotlib.pyplot, drawing into memory; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())
