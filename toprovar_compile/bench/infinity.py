"""The Infinity benchmark: the official code, FastVAR's and ours, dense and pruned, generating one image on one GPU.

Weights are random, the same for all: times do not depend on them. What is finished is kept in the output folder, so
that ways can be measured in several calls and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprovar_compile import measure
from toprovar_compile.bench import infinity_official, infinity_ways
from toprovar_compile.bench.floor import Rates, decoder_flops, scale_floors
from toprovar_compile.bench.infinity_ways import REST, SAMPLING, SCALE, TEXT, VAE, Picture, Running, Way
from toprovar_compile.bench.timeline import Span
from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.files import write_bytes, write_json
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import INFINITY_2B, INFINITY_8B, InfinityConfig
from toprovar_compile.models.infinity_schedule import infinity_schedule
from toprovar_compile.plan_spec import parse_plan
from toprovar_compile.report import counters

if TYPE_CHECKING:
    from rich.console import Group

    from toprovar_compile.schedule import ScaleSchedule

FORMAT_VERSION = 1
TINY = InfinityConfig(
    depth=2,
    embed_dim=64,
    num_heads=2,
    text_channels=128,
    vae=BSQVAEConfig(codebook_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1),
)
MODELS = {"2b": INFINITY_2B, "8b": INFINITY_8B, "tiny": TINY}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLANS = "plans"  # the way that stands for all plans


@dataclass(frozen=True)
class Settings:
    """What to measure. `ways`: names of `way_names`, or "plans"; empty: all that there is a checkout for.

    `plans` are in the words of `plan_spec.parse_plan`, empty: `default_plans`. `inner` compiles the pieces of toprovar.
    `warm` measures the first image once more with what the first time left on disk. `minutes` bounds when a new way
    may start.
    """

    model: str = "2b"
    ways: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    official: str = ""
    fastvar: str = ""
    ratio: str = "1:1"
    size: str = "1M"
    dtype: str = "bf16"
    text_tokens: int = 24
    seed: int = 0
    images: int = 5
    warmup: int = 3
    warm: bool = True
    device: str = "auto"
    inner: str = "inductor"
    rates: Rates = field(default_factory=Rates)
    minutes: float = 120.0


def tiny(settings: Settings) -> Settings:
    """The same on a model of two layers that any CPU runs in seconds, without generating code: a test of the tool."""
    return replace(
        settings,
        model="tiny",
        size="0.06M",
        dtype="fp32",
        images=2,
        warmup=1,
        warm=False,
        device="cpu",
        inner="eager",
    )


def default_plans(schedule: ScaleSchedule) -> tuple[str, ...]:
    """Keep 40 % and 25 % of the last four scales; leave before the last two and prune the two before them.

    At 1024x1024 the last four are 32x32 to 64x64. The last plan keeps as much as FastVAR does, and in its layers.
    """
    start, end = len(schedule) - 4, len(schedule) - 2
    return (
        f"keep=0.4,from={start}",
        f"keep=0.25,from={start}",
        f"keep=0.4,from={start},exit={end}",
        f"keep=0.6/0.5,from={start},exit={end}",
    )


def way_names(settings: Settings, schedule: ScaleSchedule) -> list[str]:
    """All ways there are, in the order of the results."""
    plans = settings.plans or default_plans(schedule)
    return ["official", "official-compiled", "fastvar", "fastvar-compiled", "eager", "inductor", "dense", *plans]


def run(settings: Settings, folder: Path, log: Callable[[str], None] = print) -> Path:
    """Measure the wanted ways that are not finished; write infinity_MODEL_DEVICE.json and its plot: the JSON's path.

    Finished ways are kept in `folder`/parts, and those of the same machine, model and image are in the results too.
    Raises OptionError for settings that do not fit and where there is no GPU for a full-size model.
    """
    started = time.monotonic()
    device = measure.pick_device(settings.device)
    cfg, dtype = _model(settings, device)
    schedule = infinity_schedule(settings.ratio, settings.size)
    picture = _picture(settings, cfg, schedule)
    ways = _chosen(settings, cfg, picture, device, dtype)
    context = _context(settings, cfg, picture, device)
    parts = _Parts(folder / "parts", context)
    log(f"infinity-{settings.model} on {context['machine']['hardware']}, torch {context['machine']['torch']}")
    measured = 0
    reference: list[Tensor] = []
    not_measured = []
    for way in ways:
        entry = parts.entry(way.name)
        if entry is None:
            if measured and time.monotonic() - started > 60 * settings.minutes:
                not_measured.append(way.name)
                continue
            reference = reference or _reference(cfg, picture, device, dtype, settings.seed)
            entry = _measure(way, settings, cfg, picture, device, dtype, reference)
            parts.save(way.name, entry)
            measured += 1
        log(_line(entry))
    return _write(folder, context, parts.all(), way_names(settings, schedule), not_measured)


def merge(folder: Path, model: str) -> Path:
    """Write the results of the parts that several calls left in `folder`/parts, without measuring: the JSON's path.

    Raises OptionError when there are none of this model, or when they come from different machines or settings.
    """
    found = [json.loads(p.read_text()) for p in sorted((folder / "parts").glob("*.json"))]
    found = [part for part in found if part["context"]["model"]["name"] == model]
    if not found:
        raise OptionError(f"no parts of {model} in {folder / 'parts'}", where="bench infinity")
    context = found[0]["context"]
    for part in found:
        if part["context"] != context:
            keys = [k for k in context if part["context"].get(k) != context[k]]
            raise OptionError(
                f"{part['entry']['name']} was measured with another {', '.join(keys)} than {found[0]['entry']['name']}",
                where="bench infinity",
                todo="merge parts of one machine and one setting only",
            )
    return _write(folder, context, [part["entry"] for part in found], [], [])


def _write(
    folder: Path, context: dict[str, Any], entries: Iterable[dict[str, Any]], order: Sequence[str], missing: list[str]
) -> Path:
    fixed = ["official", "official-compiled", "fastvar", "fastvar-compiled", "eager", "inductor", "dense", *order]
    by_order = sorted(entries, key=lambda e: fixed.index(e["name"]) if e["name"] in fixed else len(fixed))
    results = {
        "version": FORMAT_VERSION,
        "benchmark": f"infinity-{context['model']['name']}",
        **context,
        "stand_ins": infinity_official.STAND_INS,
        "one_gpu": len({e["gpu"] for e in by_order}) == 1,
        "ways": by_order,
        "not_measured": missing,
    }
    path = write_json(folder / f"infinity_{context['model']['name']}_{context['machine']['device']}.json", results)
    plot(results, path.with_suffix(".png"))
    return path


class _Parts:
    """Finished ways in a folder, one file each, found again only under the same context."""

    def __init__(self, folder: Path, context: dict[str, Any]) -> None:
        self.folder, self.context = folder, json.loads(json.dumps(context))

    def _path(self, name: str) -> Path:
        text = json.dumps([self.context, name], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def entry(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text())["entry"] if path.exists() else None

    def save(self, name: str, entry: dict[str, Any]) -> None:
        write_json(self._path(name), {"context": self.context, "entry": entry})

    def all(self) -> list[dict[str, Any]]:
        found = [json.loads(p.read_text()) for p in sorted(self.folder.glob("*.json"))]
        return [part["entry"] for part in found if part["context"] == self.context]


def _model(settings: Settings, device: torch.device) -> tuple[InfinityConfig, torch.dtype]:
    for name, value, valid in (("model", settings.model, MODELS), ("dtype", settings.dtype, DTYPES)):
        if value not in valid:
            close = nearest(value, valid)
            raise OptionError(
                f"there is no {name} {value!r}",
                where="bench infinity",
                expected="one of " + ", ".join(valid),
                todo=f"did you mean {close!r}?" if close else "",
            )
    if device.type != "cuda" and settings.model != "tiny":
        raise OptionError(
            f"infinity-{settings.model} is measured on a GPU, and there is none",
            where="bench infinity",
            expected="a working NVIDIA GPU and a CUDA build of torch",
            todo="run toprovar doctor, or try the tool with --tiny",
        )
    return MODELS[settings.model], DTYPES[settings.dtype]


def _picture(settings: Settings, cfg: InfinityConfig, schedule: ScaleSchedule) -> Picture:
    generator = torch.Generator().manual_seed(settings.seed)
    return Picture(schedule, torch.randn(settings.text_tokens, cfg.text_channels, generator=generator))


def _context(settings: Settings, cfg: InfinityConfig, picture: Picture, device: torch.device) -> dict[str, Any]:
    """What measurements have to share to be compared."""
    h, w = picture.schedule.grids[-1]
    fold = (2 if cfg.spatial_patchify else 1) * cfg.vae.patch_size
    machine = {**measure.machine(device), "precision": settings.dtype}
    flops = decoder_flops(cfg.vae, (h * fold // cfg.vae.patch_size, w * fold // cfg.vae.patch_size))
    return {
        "model": {"name": settings.model, "config": json.loads(cfg.to_json()), "weights": "random, seed 0"},
        "machine": machine,
        "image": {
            "pixels": [h * fold, w * fold],
            "grids": [list(grid) for grid in picture.schedule.grids],
            "batch": 1,
            "rows": 2,
            "text_tokens": settings.text_tokens,
            "seed": settings.seed,
            **picture.sampling(),
        },
        "rates": asdict(settings.rates),
        "decoder": {"tflop": flops / 1e12, "floor_ms": flops / (settings.rates.tflops * 1e9)},
        "images": settings.images,
        "warmup": settings.warmup,
        "inner": settings.inner,
    }


def _chosen(
    settings: Settings, cfg: InfinityConfig, picture: Picture, device: torch.device, dtype: torch.dtype
) -> list[Way]:
    valid = way_names(settings, picture.schedule)
    plans = settings.plans or default_plans(picture.schedule)
    checkouts = {"official": settings.official, "fastvar": settings.fastvar}
    wanted = [name for asked in settings.ways for name in (plans if asked == PLANS else (asked,))]
    if not wanted:
        wanted = [n for n in valid if n != "inductor" and checkouts.get(n.removesuffix("-compiled"), "given")]
    for name in wanted:
        if name not in valid:
            close = nearest(name, [*valid, PLANS])
            raise OptionError(
                f"there is no way {name!r}",
                where="--way",
                expected="one of " + ", ".join([*valid, PLANS]),
                todo=f"did you mean {close!r}?" if close else "",
            )
        base = name.removesuffix("-compiled")
        if not checkouts.get(base, "given"):
            raise OptionError(f"the way {name!r} needs --{base}", where="--way", expected="a path to a checkout")
    return [_way(n, settings, cfg, picture, device, dtype) for n in valid if n in wanted]


def _way(
    name: str,
    settings: Settings,
    cfg: InfinityConfig,
    picture: Picture,
    device: torch.device,
    dtype: torch.dtype,
) -> Way:
    ours = partial(infinity_ways.our_model, cfg, picture, device, dtype)
    theirs = partial(infinity_ways.official_model, cfg, picture, device, dtype)
    if name in ("official", "official-compiled"):
        compiled = name.endswith("-compiled")
        about = "official code, " + ("block.compile() of each layer" if compiled else "eager")
        return Way(name, about, lambda: theirs(settings.official, compile_blocks=compiled))
    if name in ("fastvar", "fastvar-compiled"):
        compiled = name.endswith("-compiled")
        about = "FastVAR's code, " + ("block.compile() of each layer" if compiled else "eager")
        return Way(name, about, lambda: theirs(settings.fastvar, compile_blocks=compiled), dense=False)
    if name == "eager":
        return Way(name, "our model, eager", lambda: ours(lambda model: model), compiles=False)
    if name == "inductor":
        return Way(name, "our model, torch.compile(backend='inductor')", lambda: ours(torch.compile))
    plan = parse_plan(name, picture.schedule, cfg.depth)
    options: dict[str, Any] = {"plan": plan, "inner": settings.inner}
    about = f"our model, torch.compile(backend='toprovar'), plan {name}"
    return Way(
        name,
        about,
        lambda: ours(lambda model: torch.compile(model, backend="toprovar", options=options)),
        plan,
    )


def _reference(
    cfg: InfinityConfig, picture: Picture, device: torch.device, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """The bits that our eager model draws at each scale."""
    with infinity_ways.our_model(cfg, picture, device, dtype, lambda model: model) as running:
        running.compiled()(seed)
        return list(running.drawn)


def _measure(
    way: Way,
    settings: Settings,
    cfg: InfinityConfig,
    picture: Picture,
    device: torch.device,
    dtype: torch.dtype,
    reference: list[Tensor],
) -> dict[str, Any]:
    load = os.getloadavg()[0]
    _free(device)
    with measure.cold_caches(), way.start() as running:
        _free(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = _first_image(running, settings.seed)
        again = _first_image(running, settings.seed) if settings.warm and way.compiles else None
        generate = running.compiled()
        for _ in range(settings.warmup):
            generate(settings.seed)
        graphs = _graphs()
        images = [
            running.timeline.record(partial(generate, settings.seed + i), TEXT)[1] for i in range(settings.images)
        ]
        later_graphs = _graphs() - graphs
        peak = _peak_gib(device)
        forced = infinity_ways.as_forced(reference, picture.schedule, spatial_patchify=cfg.spatial_patchify)
        running.drawn.clear()
        generate(settings.seed, forced)
        flips = [float((a != b).float().mean()) for a, b in zip(running.drawn, reference, strict=False)]
        work = []
        if device.type == "cuda":
            work = running.timeline.profile(partial(generate, settings.seed), TEXT)
    return {
        "name": way.name,
        "about": way.about,
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "none",
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **_times(images),
        "first_image_seconds": first,
        "first_image_again_seconds": again,
        "peak_gib": peak,
        "graphs": graphs,
        "graphs_after_warmup": later_graphs,
        "bit_flips": flips,
        "work": [asdict(w) for w in work],
        "floor": _floor(way, cfg, picture, settings, dtype),
        "plan": way.plan.digest() if way.plan else None,
        "token_share": way.plan.token_share() if way.plan else None,
        "counters": counters.snapshot(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
    }


def _first_image(running: Running, seed: int) -> float:
    """Seconds of the first image of a process that has compiled nothing; finds what is on disk."""
    measure.forget_compiled()
    torch._dynamo.utils.counters.clear()
    counters.reset()
    generate = running.compiled()
    start = time.perf_counter()
    running.timeline.record(partial(generate, seed), TEXT)
    return time.perf_counter() - start


def _graphs() -> int:
    """Graphs that Dynamo has captured since the counters were cleared."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _free(device: torch.device) -> None:
    """Free what an earlier way holds: lanes keep graphs, and those the model that they were made for."""
    measure.forget_compiled()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak_gib(device: torch.device) -> dict[str, float] | None:
    """From the first image on: memory of live tensors, and what the allocator held, pools of CUDA graphs included."""
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def _times(images: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Medians over the images, in milliseconds. A span's device time includes waiting for the host."""
    names = [span.name for span in images[0]]
    device = [statistics.median(image[i].ms for image in images) for i in range(len(names))]
    host = [statistics.median(image[i].host_ms for image in images) for i in range(len(names))]

    def total(*kinds: str) -> float:
        return statistics.median(sum(span.ms for span in image if span.name in kinds) for image in images)

    return {
        "image_ms": total(TEXT, SCALE, SAMPLING, VAE, REST),
        "image_ms_each": [sum(span.ms for span in image) for image in images],
        "transformer_ms": total(SCALE),
        "sampling_ms": total(SAMPLING),
        "vae_ms": total(VAE),
        "text_ms": total(TEXT),
        "scale_ms": [ms for name, ms in zip(names, device, strict=True) if name == SCALE],
        "scale_host_ms": [ms for name, ms in zip(names, host, strict=True) if name == SCALE],
        "scale_sampling_ms": [ms for name, ms in zip(names, device, strict=True) if name == SAMPLING],
    }


def _floor(
    way: Way, cfg: InfinityConfig, picture: Picture, settings: Settings, dtype: torch.dtype
) -> dict[str, Any] | None:
    """The floor of what the way computes; None where it prunes in a way of its own."""
    if not way.dense:
        return None
    floors = scale_floors(
        cfg,
        picture.schedule,
        way.plan,
        settings.rates,
        text_tokens=settings.text_tokens,
        width=torch.empty(0, dtype=dtype).element_size(),
    )
    return {
        "scale_ms": [f.ms for f in floors],
        "transformer_ms": sum(f.ms for f in floors),
        "linear_tflop": sum(f.linear_flops for f in floors) / 1e12,
        "attention_tflop": sum(f.attention_flops for f in floors) / 1e12,
    }


def _line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['name']}: image {entry['image_ms']:.1f} ms, transformer {entry['transformer_ms']:.1f}, sampling "
        f"{entry['sampling_ms']:.1f}, VAE {entry['vae_ms']:.1f}; first image {entry['first_image_seconds']:.1f} s"
    )


COLUMNS = (
    "way", "image ms", "steps", "sampling", "VAE", "x official", "of floor", "first s", "again s", "GiB",
    "launches", "kernels", "host ms", "flips",
)  # fmt: skip
_TIMES = 7  # columns of the first table; launches, kernels and host time, in the second, are those of one scale


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The results as text, one row a way, in the order of `COLUMNS`."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    official = next((e["image_ms"] for e in results["ways"] if e["name"] == "official"), None)
    out = []
    for e in results["ways"]:
        scales = [w for w in e["work"] if w["name"] == SCALE]
        floor = e["floor"]["transformer_ms"] / e["transformer_ms"] if e["floor"] else None
        out.append(
            [
                e["name"],
                f"{e['image_ms']:.1f}",
                f"{e['transformer_ms']:.1f}",
                f"{e['sampling_ms']:.1f}",
                f"{e['vae_ms']:.1f}",
                number(official / e["image_ms"] if official else None, ".2f"),
                number(floor, ".0%"),
                f"{e['first_image_seconds']:.1f}",
                number(e["first_image_again_seconds"], ".1f"),
                number(e["peak_gib"]["allocated"] if e["peak_gib"] else None, ".1f"),
                number(sum(w["launches"] for w in scales) / len(scales) if scales else None, ".0f"),
                number(sum(w["kernels"] for w in scales) / len(scales) if scales else None, ".0f"),
                f"{statistics.median(e['scale_host_ms']):.2f}",
                number(statistics.mean(e["bit_flips"]) if e["bit_flips"] else None, ".2%"),
            ]
        )
    return out


def table(results: dict[str, Any]) -> Group:
    """The results for the terminal: one table of times, one of what they cost."""
    from rich.console import Group
    from rich.table import Table

    height, width = results["image"]["pixels"]
    title = f"{results['benchmark']}, {width}x{height}, batch 1 with CFG, {results['machine']['hardware']}"
    out: list[Table] = []
    for part in (range(_TIMES), (0, *range(_TIMES, len(COLUMNS)))):
        out.append(Table(title=title if not out else None))
        for i in part:
            out[-1].add_column(COLUMNS[i], justify="right" if i else "left")
        for row in rows(results):
            out[-1].add_row(*(row[i] for i in part))
    return Group(*out)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the transformer's time at each scale, and its floor, as a PNG; without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        return
    import io

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{h}x{w}" for h, w in results["image"]["grids"]]
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for entry in results["ways"]:
        ms = entry["scale_ms"]
        axes.plot(range(len(ms)), ms, "o-", markersize=3, label=f"{entry['name']}: {entry['transformer_ms']:.0f} ms")
    floor = next((e["floor"]["scale_ms"] for e in results["ways"] if e["floor"] and not e["plan"]), None)
    if floor:
        axes.plot(range(len(floor)), floor, "k:", label=f"floor, dense: {sum(floor):.0f} ms")
    axes.set_yscale("log")
    axes.set_xticks(range(len(labels)), labels, rotation=45, fontsize=7)
    axes.set_xlabel("token grid of the scale")
    axes.set_ylabel("transformer, ms")
    axes.set_title(f"{results['benchmark']}, batch 1 with CFG, {results['machine']['hardware']}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())
