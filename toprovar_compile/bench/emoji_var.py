"""The emoji-VAR benchmark: time, closeness and tokens of a frontier of plans, against eager PyTorch and Inductor.

Every way is measured on the same classes and seeds, batch 1. What is finished is kept in the output folder, so an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprovar_compile import measure
from toprovar_compile.files import write_bytes, write_json
from toprovar_compile.plan import Plan
from toprovar_compile.plan_spec import plan_for

if TYPE_CHECKING:
    from rich.table import Table

    from toprovar_compile.measure import Job, Way
    from toprovar_compile.models.var import VAR

FORMAT_VERSION = 1
MODEL = "emoji-var"
DENSE = "toprovar dense"
MEASURED = "toprovar dense, entropy measured"

FRONTIER = (
    "auto",
    # the last scale alone
    "keep=0.5,from=9",
    "keep=0.25,from=9",
    "keep=0,from=9",
    "exit=9",
    # the last two
    "keep=0.75,from=8",
    "keep=0.5,from=8",
    "keep=0.25,from=8",
    "keep=0.5,from=8,restore=identity",
    "keep=0.5,from=8,exit=9",
    "keep=0.25,from=8,exit=9",
    "exit=8",
    # the last three
    "keep=0.5,from=7",
    "keep=0.25,from=7",
    "keep=0.25,from=7,exit=8",
)


@dataclass(frozen=True)
class Settings:
    """What to measure: plans in the words of `plan_spec.parse_plan`; `minutes` bounds when a new way may start."""

    classes: int = 64
    seed: int = 0
    device: str = "auto"
    minutes: float = 120.0
    plans: tuple[str, ...] = FRONTIER
    inductor_modes: tuple[str, ...] = ()


class _MeasuringPlan(Plan):
    """A dense plan that measures entropy wherever a plan that prunes every layer to the end would."""

    def reads_entropy(self) -> frozenset[tuple[int, int]]:
        return frozenset((s, layer) for s in range(len(self.schedule) - 1) for layer in range(self.num_layers))


def run(settings: Settings, folder: Path, work: Path | None = None, log: Callable[[str], None] = print) -> Path:
    """Measure what is not yet in `work`; write emoji_var_{cpu,cuda}.json and its plot into `folder`: the JSON's path.

    `work` (default: "parts" inside `folder`) keeps one file a finished way and the unpruned images.
    """
    from toprovar_compile import models

    started = time.monotonic()
    device = measure.pick_device(settings.device)
    model = models.load(MODEL, device=device)
    jobs = measure.choose_jobs(model, settings.classes, settings.seed)
    facts = measure.machine(device)
    parts = _Parts(
        work or folder / "parts", [facts, model.fingerprint(), asdict(model.sampling), list(map(asdict, jobs))]
    )
    log(f"{MODEL} on {facts['hardware']}, {facts['threads']} threads, torch {facts['torch']}, {facts['precision']}")
    entries: list[dict[str, Any]] = []
    left_out = []
    for way in _ways(settings, model):
        entry = parts.entry(way)
        if entry is None:
            if entries and time.monotonic() - started > 60 * settings.minutes:
                left_out.append(way.name)
                continue
            entry = _measure(way, model, jobs, device, parts)
        entries.append(entry)
        log(
            f"{way.name}: {entry['median_seconds']:.3f} s an image, SSIM {entry['ssim']:.3f} (worst "
            f"{entry['ssim_worst']:.3f}), compiled in {entry['compile_seconds']:.0f} s"
        )
    results = {
        "version": FORMAT_VERSION,
        "benchmark": MODEL,
        "model": {"name": MODEL, "fingerprint": model.fingerprint()},
        "machine": facts,
        "batch": 1,
        "sampling": asdict(model.sampling),
        "images": [asdict(job) for job in jobs],
        "ways": entries,
        "entropy_cost": _entropy_cost(entries),
        "not_measured": left_out,
    }
    path = write_json(folder / f"emoji_var_{device.type}.json", results)
    plot(results, path.with_suffix(".png"))
    return path


def table(results: dict[str, Any]) -> Table:
    """The results for the terminal."""
    from rich.table import Table

    out = Table(title=f"{results['benchmark']}, {len(results['images'])} classes, {results['machine']['hardware']}")
    head, *rest = COLUMNS
    out.add_column(head)
    for column in rest:
        out.add_column(column, justify="right")
    for row in rows(results):
        out.add_row(*row)
    return out


COLUMNS = ("way", "compile s", "s / image", "x eager", "x Inductor", "SSIM", "worst", "PSNR dB", "worst", "tokens")


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The results as text, one row a way, in the order of `COLUMNS`."""
    times = {entry["name"]: entry["median_seconds"] for entry in results["ways"]}
    inductor = min((t for name, t in times.items() if name.startswith("inductor")), default=None)
    out = []
    for entry in results["ways"]:
        seconds = entry["median_seconds"]
        out.append(
            [
                entry["name"],
                "-" if entry["name"] == "eager" else f"{entry['compile_seconds']:.0f}",
                f"{seconds:.3f}",
                f"{times['eager'] / seconds:.2f}",
                f"{inductor / seconds:.2f}" if inductor else "-",
                f"{entry['ssim']:.3f}",
                f"{entry['ssim_worst']:.3f}",
                measure.Quality.decibels(entry["psnr"]),
                measure.Quality.decibels(entry["psnr_worst"]),
                f"{entry['total_share']:.0%}",
            ]
        )
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw speed-up over the fastest Inductor way against SSIM as a PNG; without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        return
    import io

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = {entry["name"]: entry["median_seconds"] for entry in results["ways"]}
    base = min((t for name, t in times.items() if name.startswith("inductor")), default=times["eager"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    for entry in results["ways"]:
        x, y = base / entry["median_seconds"], entry["ssim"]
        colour = "tab:orange" if entry["name"].startswith("toprovar") else "tab:blue"
        axes.plot(x, y, "o", color=colour)
        axes.annotate(entry["name"], (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("speed-up over the fastest torch.compile(backend='inductor')")
    axes.set_ylabel(f"mean SSIM to the unpruned image, {len(results['images'])} classes")
    axes.set_title(f"{results['benchmark']}, batch 1, {results['machine']['hardware']}", fontsize=9)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())


class _Parts:
    """Finished ways in a folder, found again only under the same machine, model, sampling and images."""

    def __init__(self, folder: Path, context: list[Any]) -> None:
        self.folder = folder / _digest(context)

    def entry(self, way: Way) -> dict[str, Any] | None:
        path = self._path(way)
        if not path.exists():
            return None
        entry: dict[str, Any] = json.loads(path.read_text())
        return entry

    def save(self, way: Way, entry: dict[str, Any]) -> None:
        write_json(self._path(way), entry)

    def unpruned(self) -> Tensor:
        images: Tensor = torch.load(self.folder / "unpruned.pt", weights_only=True)
        return images

    def save_unpruned(self, images: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(images, self.folder / "unpruned.pt")

    def _path(self, way: Way) -> Path:
        return self.folder / f"{_digest([way.name, way.plan.digest() if way.plan else None])}.json"


def _ways(settings: Settings, model: VAR) -> list[Way]:
    depth = len(model.blocks)
    dense = Plan.dense(model.schedule, depth)
    measuring = _MeasuringPlan(model.schedule, depth, dense.scales)
    ways = [measure.eager_way(), measure.inductor_way()]
    ways += [measure.inductor_way(mode) for mode in settings.inductor_modes]
    ways += [measure.toprovar_way(dense, DENSE), measure.toprovar_way(measuring, MEASURED)]
    for text in settings.plans:
        ways.append(measure.toprovar_way(plan_for(text, model), f"toprovar {text}"))
    return ways


def _measure(way: Way, model: VAR, jobs: list[Job], device: torch.device, parts: _Parts) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with measure.cold_caches():
        outcome = measure.run_way(way, model, jobs, device=device, sampling={})
    if way.name == "eager":
        parts.save_unpruned(outcome.images)
    ssim, psnr = measure.closeness(outcome.images, parts.unpruned())
    entry = {
        "name": way.name,
        "compile_seconds": outcome.compile_time,
        "warmup_seconds": list(outcome.warmup),
        "median_seconds": outcome.median,
        "seconds": list(outcome.seconds),
        **asdict(measure.Quality.of(ssim, psnr)),
        "ssim_each": ssim.tolist(),
        "psnr_each": psnr.tolist(),
        "plan": way.plan.to_json() if way.plan else None,
        "token_share": way.plan.token_share() if way.plan else None,
        "total_share": way.plan.total_share() if way.plan else 1.0,
        # Of the whole machine: times are worth little where it was busy with other things.
        "load_average": {"before": load, "after": os.getloadavg()[0]},
    }
    parts.save(way, entry)
    return entry


def _entropy_cost(entries: list[dict[str, Any]]) -> dict[str, float] | None:
    """The same dense plan with and without measuring the entropy of every layer at every scale but the last."""
    times = {entry["name"]: entry["median_seconds"] for entry in entries}
    if DENSE not in times or MEASURED not in times:
        return None
    without, measured = times[DENSE], times[MEASURED]
    return {"without_seconds": without, "with_seconds": measured, "share": measured / without - 1}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
