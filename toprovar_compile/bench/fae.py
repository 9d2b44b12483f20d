"""The attention benchmark: every way to get attention, and attention with entropy, at the shapes of late scales.

On a GPU: time with a cold L2 cache (medians of CUDA events), TFLOP/s, extra memory, error of the entropy against
float64, and the names of the kernels, for Infinity, VAR, HART and emoji-VAR. On the CPU: emoji-VAR, all forms in turns
so that a busy moment hits all of them; one thread is timed by the processor time it used, several by the wall clock.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toprovar_compile import measure
from toprovar_compile.errors import ToproVarError
from toprovar_compile.files import write_bytes, write_json
from toprovar_compile.kernels import fae, fae_reference, plain_attention, top_singular_values
from toprovar_compile.kernels._triton import TritonError

if TYPE_CHECKING:
    from rich.table import Table

FORMAT_VERSION = 2
Run = Callable[[], Any]

PLAIN = "fae"
MEASURED = "fae + entropy"
_NAMES = {"flash": "FA2", "cudnn": "cuDNN", "fae": "fae kernel"}  # candidates called otherwise here
_CHECKED_ROWS = 64  # the reference stores the scores of these in float64
_BUDGET_MS = 150.0  # for one form at one shape
_TEXT = 300  # HART's context tokens, the first of which are padded


@dataclass(frozen=True)
class Case:
    """One self-attention: all H heads of `batch` samples, n queries against m keys; `masked`: some keys are padding."""

    model: str
    scale: str
    batch: int
    heads: int
    n: int
    m: int
    head_dim: int
    masked: bool = False

    @property
    def flops(self) -> int:
        """Floating point operations of the two products."""
        return 4 * self.batch * self.heads * self.n * self.m * self.head_dim


@dataclass(frozen=True)
class Settings:
    """`models` keeps the cases whose model's name contains it; `dtype` "" is float32 on the CPU, else bfloat16."""

    device: str = "auto"
    dtype: str = ""
    models: str = ""
    rounds: int = 20
    threads: int = 2


@dataclass(frozen=True)
class _Form:
    run: Run
    entropy: Callable[[Any], Tensor] | None = None  # (B, n), of what `run` returns


def _late_scales(
    model: str, sides: tuple[int, ...], last: int, batch: int, heads: int, head_dim: int, text: int = 0
) -> list[Case]:
    """The `last` scales; `text`: tokens in the place of the first scale."""
    tokens = [side * side for side in sides]
    if text:
        tokens[0] = text
    return [
        Case(model, f"{sides[i]}x{sides[i]}", batch, heads, tokens[i], sum(tokens[: i + 1]), head_dim, bool(text))
        for i in range(len(sides) - last, len(sides))
    ]


_INFINITY = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
_VAR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_HART = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
_EMOJI = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
CPU_CASES = _late_scales("emoji-VAR", _EMOJI, 3, 2, 4, 64)
CUDA_CASES = [
    *_late_scales("Infinity-2B", _INFINITY, 4, 2, 16, 128),
    *_late_scales("Infinity-8B", _INFINITY, 4, 2, 28, 128),
    *_late_scales("VAR-d30", _VAR, 4, 2, 30, 64),
    *_late_scales("VAR-d30", _VAR, 4, 16, 30, 64),
    *_late_scales("HART", _HART, 4, 2, 24, 64, text=_TEXT),
    *CPU_CASES,
]


def run(settings: Settings, folder: Path, log: Callable[[str], None] = print) -> Path:
    """Measure every case; write fae_{cpu,cuda}.json (with the dtype where it is not the usual one) and its plot."""
    device = measure.pick_device(settings.device)
    usual = "float32" if device.type == "cpu" else "bfloat16"
    dtype = settings.dtype or usual
    facts = measure.machine(device) | {"precision": dtype, "load_average": round(os.getloadavg()[0], 2)}
    log(f"attention on {facts['hardware']}, {facts['threads']} threads, torch {facts['torch']}, {dtype}")
    rows = []
    with torch.no_grad():
        measured = _on_cpu(settings, dtype) if device.type == "cpu" else _on_cuda(settings, dtype, device)
        for row in measured:
            rows.append(row)
            log(_line(row))
        values = _singular_values(device)
    results = {
        "version": FORMAT_VERSION,
        "benchmark": "fae",
        "machine": facts,
        "rounds": settings.rounds,
        "rows": rows,
        "singular_values": values,
        "plain_attention": plain_attention.chosen(),
    }
    name = f"fae_{device.type}" if dtype == usual else f"fae_{device.type}_{dtype}"
    path = write_json(folder / f"{name}.json", results)
    plot(results, path.with_suffix(".png"))
    return path


def inputs(case: Case, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q as a projection leaves it, k and v as caches hold them, and the mask (B, 1, 1, m) of padded text."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    q = torch.randn(case.batch, case.n, case.heads, case.head_dim, device=device).to(kind).transpose(1, 2)
    shape = (case.batch, case.heads, case.m, case.head_dim)
    k, v = (torch.randn(shape, device=device).to(kind) for _ in range(2))
    if not case.masked:
        return q, k, v, None
    padding = torch.linspace(0.1, 0.9, case.batch, device=device).mul(_TEXT).int()
    return q, k, v, (torch.arange(case.m, device=device) >= padding[:, None]).view(case.batch, 1, 1, case.m)


def _forms(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> dict[str, _Form]:
    def second(result: Any) -> Tensor:
        entropy: Tensor = result[1]
        return entropy

    forms = {PLAIN: _Form(lambda: fae(q, k, v, mask, scale, False))}
    forms[MEASURED] = _Form(lambda: fae(q, k, v, mask, scale, True), second)
    if q.is_cuda:
        for name, attend in plain_attention.candidates().items():
            forms[_NAMES.get(name, name)] = _Form(partial(attend, q, k, v, mask, scale))
        forms["flex"] = _Form(lambda: _flex(q, k, v, mask, scale))
        forms["flex identity"] = _Form(lambda: _by_flex(q, k, v, mask, scale), second)
        forms["identity"] = _Form(lambda: _by_identity(q, k, v, mask, scale), second)
    else:
        forms["PyTorch"] = _Form(lambda: plain_attention.by_pytorch(q, k, v, mask, scale))
    forms["naive"] = _Form(lambda: _naive(q, k, v, mask, scale), second)
    return forms


def _naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The whole matrix, in the dtype of the inputs."""
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    a = torch.softmax(scores, dim=-1)
    return a @ v, torch.special.entr(a.float()).sum(-1).mean(1)


def _by_identity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """A second attention, to the keys, by the kernel of the first: FlashAttention-2, memory-efficient with a mask."""
    if mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        out, (mean_key, lse) = flash(q, k, v, scale=scale)[0], flash(q, k, k, scale=scale)[:2]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        bias = plain_attention.additive(q, k, mask)
        out = efficient(q, k, v, bias, False, scale=scale)[0]
        mean_key, lse = efficient(q, k, k, bias, True, scale=scale)[:2]
    return out, _identity(q, mean_key, lse[..., : q.shape[2]], scale)


def _by_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same by compiled flex_attention."""
    out, _ = _flex(q, k, v, mask, scale)
    mean_key, lse = _flex(q, k, k.view_as(k), mask, scale)  # k twice would be compiled for itself
    return out, _identity(q, mean_key, lse, scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp)"""
    from torch.nn.attention.flex_attention import AuxRequest

    keep = q if mask is None else mask[:, 0, 0]

    def padded(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(keep[b, j], score, -math.inf)

    score = None if mask is None else padded
    out, aux = _compiled_flex()(q, k, v, score, None, scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def _identity(q: Tensor, mean_key: Tensor, lse: Tensor, scale: float) -> Tensor:
    return (lse - scale * (q * mean_key).sum(-1, dtype=torch.float32)).mean(1)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _on_cuda(settings: Settings, dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    cases = [case for case in CUDA_CASES if settings.models.lower() in case.model.lower()]
    for case, following in zip(cases, [*cases[1:], None], strict=True):
        q, k, v, mask = inputs(case, dtype, device)
        scale = case.head_dim**-0.5
        exact, picked = _exact(q, k, v, mask, scale)
        largest = following is None or (following.model, following.batch) != (case.model, case.batch)
        forms = {}
        for name, form in _forms(q, k, v, mask, scale).items():
            forms[name] = _cuda_form(form, case, settings, exact, picked, names=largest)
        yield _row(case, dtype, forms)
        if following is not None and following.heads != case.heads:
            torch.compiler.reset()  # flex_attention compiles for a number of heads, and Dynamo keeps only a few


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Entropy in float64 of some of the rows, and which."""
    n = q.shape[2]
    picked = torch.linspace(0, n - 1, min(n, _CHECKED_ROWS), device=q.device).long()
    return fae_reference(q[:, :, picked].double(), k.double(), v.double(), mask, scale)[1], picked


def _cuda_form(
    form: _Form, case: Case, settings: Settings, exact: Tensor, picked: Tensor, *, names: bool
) -> dict[str, Any]:
    """Milliseconds and the rest, or {"failed": why} where the form cannot run."""
    device = exact.device
    try:
        form.run()  # compiles
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = form.run()
        torch.cuda.synchronize(device)
        # What is returned is no extra.
        extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        off = (form.entropy(result)[:, picked].double() - exact).abs().max().item() if form.entropy else None
        del result
        rough = plain_attention.time_ms(form.run, device, 3)
        rounds = max(3, min(settings.rounds, int(_BUDGET_MS / max(rough, 0.1))))
        ms = plain_attention.time_ms(form.run, device, rounds)
    except (RuntimeError, ToproVarError, TritonError) as error:
        torch.cuda.empty_cache()
        return {"failed": str(error).strip().partition("\n")[0][:200]}
    found: dict[str, Any] = {"ms": ms, "tflops": round(case.flops / ms / 1e9, 1)}
    found |= {"extra_mib": round(extra / 2**20, 2), "allocated_before_mib": round(before / 2**20, 2)}
    if off is not None:
        found["entropy_error_nats"] = off
    if names:
        found["kernels"] = _kernel_names(form.run)
    return found


def _kernel_names(run: Run) -> list[str]:
    """The kernels that one run launches, none where this machine does not let them be seen."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    return [name[:160] for name in on_device if not name.startswith("Mem")]


def _on_cpu(settings: Settings, dtype: str) -> Iterator[dict[str, Any]]:
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, settings.threads}):
            torch.set_num_threads(threads)
            for case in CPU_CASES:
                if settings.models.lower() in case.model.lower():
                    yield _row(case, dtype, _cpu_forms(case, dtype, settings.rounds), threads)
    finally:
        torch.set_num_threads(before)


def _cpu_forms(case: Case, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    q, k, v, mask = inputs(case, dtype, torch.device("cpu"))
    scale = case.head_dim**-0.5
    exact, picked = _exact(q, k, v, mask, scale)
    forms = _forms(q, k, v, mask, scale)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 2):
        for name, form in forms.items():
            start = clock()
            form.run()
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (clock() - start))
    found: dict[str, dict[str, Any]] = {}
    for name, form in forms.items():
        ms = statistics.median(times[name])
        found[name] = {"ms": round(ms, 3), "best_ms": round(min(times[name]), 3)}
        found[name] |= {"tflops": round(case.flops / ms / 1e9, 4), "clock": clock.__name__}
        if form.entropy:
            found[name]["entropy_error_nats"] = (form.entropy(form.run())[:, picked] - exact).abs().max().item()
    return found


def _row(case: Case, dtype: str, forms: dict[str, Any], threads: int | None = None) -> dict[str, Any]:
    shape = {"B": case.batch, "H": case.heads, "n": case.n, "m": case.m, "D": case.head_dim}
    row = {"model": case.model, "scale": case.scale, "shape": shape, "masked": case.masked, "dtype": dtype}
    return row | ({"threads": threads} if threads else {}) | {"forms": forms}


def _singular_values(device: torch.device) -> dict[str, Any]:
    """The two largest singular values of the entropy maps of 40 layers of 64 x 64 tokens, and PyTorch's SVD of them."""
    torch.manual_seed(0)
    maps = 7 + torch.rand(40, 64, 64, device=device)
    forms: dict[str, Callable[[], Tensor]] = {
        "top_singular_values": lambda: top_singular_values(maps),
        "torch.linalg.svdvals": lambda: torch.linalg.svdvals(maps),
    }
    if device.type == "cuda":
        # PyTorch's SVD waits for the device, so that it can be no CUDA graph.
        ours = {"top_singular_values": plain_attention.time_ms(forms["top_singular_values"], device)}
        ms = ours | {"torch.linalg.svdvals": 1e3 * _seconds(forms["torch.linalg.svdvals"])}
    else:
        ms = {name: _processor_ms(form) for name, form in forms.items()}
    want = torch.linalg.svdvals(maps.double())[:, :2]
    error = ((top_singular_values(maps) - want).abs() / want).max().item()
    return {"maps": list(maps.shape), "ms": ms, "relative_error": error}


def _seconds(run: Run) -> float:
    """Median wall-clock seconds of a run to the end of the device's work."""
    spent = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def _processor_ms(run: Run) -> float:
    """Median milliseconds of processor time that one thread takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(7):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    torch.set_num_threads(before)
    return round(statistics.median(times), 3)


def _title(row: dict[str, Any]) -> str:
    threads = f", threads {row['threads']}" if row.get("threads") else ""
    return f"{row['model']} B{row['shape']['B']}{threads}" + (", masked" if row["masked"] else "")


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}{size}" for name, size in row["shape"].items())
    times = ", ".join(f"{name} {form['ms']:.3f}" for name, form in row["forms"].items() if "ms" in form)
    return f"{_title(row)}, {row['scale']} ({shape}): {times} ms"


def table(results: dict[str, Any]) -> Table:
    """The results for the terminal: milliseconds of every form, the fastest of each case marked, and ours in detail."""
    from rich import box
    from rich.table import Table

    names = list(dict.fromkeys(name for row in results["rows"] for name in row["forms"]))
    title = f"milliseconds of attention, {results['machine']['hardware']}, {results['machine']['precision']}"
    out = Table(title=title, box=box.SIMPLE, padding=0, caption=f"last columns: {MEASURED!r}")
    for i, column in enumerate(("", *names, "TFLOP/s", "MiB", "nats off")):
        out.add_column(column, justify="right" if i else "left", min_width=6 if i else 12)
    for row in results["rows"]:
        forms = row["forms"]
        best = min((form["ms"] for form in forms.values() if "ms" in form), default=None)
        times = []
        for name in names:
            ms = forms.get(name, {}).get("ms")
            times.append("-" if ms is None else f"[bold]{ms:.3f}[/]" if ms == best else f"{ms:.3f}")
        ours = forms.get(MEASURED, {})
        details = (("tflops", ".3g"), ("extra_mib", ".1f"), ("entropy_error_nats", ".1e"))
        out.add_row(
            f"{_title(row)}, {row['scale']}", *times, *(format(ours[k], f) if k in ours else "-" for k, f in details)
        )
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw, for each model, the time of each form over that of "fae with entropy"; without matplotlib nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    import io

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        panels.setdefault(_title(row), []).append(row)
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["forms"]))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), dpi=120, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            points = [(j, row["forms"][name]["ms"] / row["forms"][MEASURED]["ms"]) for j, row in _both(rows, name)]
            if points:
                style = "o-" if name in (PLAIN, MEASURED) else ".--"
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=name)
        axes.set_xticks(range(len(rows)), [row["scale"] for row in rows])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.set_title(title, fontsize=9)
        axes.grid(visible=True, which="both", linewidth=0.3)
    grid[0][0].set_ylabel(f"time over {MEASURED!r}")
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.suptitle(f"attention, {results['machine']['hardware']}, {results['machine']['precision']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.16 / lines, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    write_bytes(path, buffer.getvalue())


def _both(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for j, row in enumerate(rows):
        if all("ms" in row["forms"].get(form, {}) for form in (name, MEASURED)):
            yield j, row
