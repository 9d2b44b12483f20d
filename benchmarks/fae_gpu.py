"""Time attention with entropy on a GPU against PyTorch's own attention kernels: JSON in benchmarks/results.

For every shape: each SDPA backend, toprovar::fae without and with entropy, the log-sum-exp identity on FlashAttention-2
and the naive form that stores the whole matrix. Times are medians of CUDA events, the L2 cache cold. `--sweep` times
candidate tile configurations of the kernel as well.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from toprovar_compile.files import write_json
from toprovar_compile.kernels import fae, fae_reference
from toprovar_compile.measure import machine

fae_module = importlib.import_module("toprovar_compile.kernels.fae")

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # B, H, n, m, D: late scales with classifier-free guidance
    "infinity-2b 64x64": (2, 16, 4096, 10521, 128),
    "infinity-2b 48x48": (2, 16, 2304, 6425, 128),
    "infinity-2b 40x40": (2, 16, 1600, 4121, 128),
    "infinity-2b 32x32": (2, 16, 1024, 2521, 128),
    "infinity-2b 64x64, a quarter kept": (2, 16, 1024, 7449, 128),
    "infinity-8b 64x64": (2, 28, 4096, 10521, 128),
    "var-d30 16x16": (2, 30, 256, 680, 64),
    "var-d30 16x16, batch 8": (16, 30, 256, 680, 64),
    "emoji-var 32x32": (2, 4, 1024, 2240, 64),
}
CANDIDATES = tuple(
    (bm, bn, warps, stages)
    for bm, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
    for bn in (32, 64, 128, 256)
    for stages in (2, 3, 4)
)
Shape = tuple[int, int, int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    given = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    rows = []
    for name, shape in SHAPES.items():
        if given.shapes in name:
            rows.append(measure(name, shape, dtype, given.rounds))
            print_row(rows[-1])
            if given.sweep:
                rows[-1]["sweep_ms"] = sweep(shape, dtype)
                print("    " + ", ".join(f"{k} {v}" for k, v in list(rows[-1]["sweep_ms"].items())[:6]))
    path = given.results / f"fae_gpu_{given.dtype}.json"
    report = {"machine": machine(torch.device("cuda")), "gpu": torch.cuda.get_device_name(), "rounds": given.rounds}
    write_json(path, {**report, "rows": rows})
    print(f"wrote {path}")


def measure(name: str, shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each form (None where it cannot run), TFLOP/s, and errors against float64."""
    q, k, v = inputs(shape, dtype)
    scale = shape[4] ** -0.5

    def backend(which: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, scale=scale)

        return run

    def identity() -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        F.scaled_dot_product_attention(q, k, v, scale=scale)
        mean_key, lse = flash(q, k, k, scale=scale)[:2]
        return (lse - scale * (q * mean_key).sum(-1, dtype=torch.float32)).mean(1)

    forms: dict[str, Callable[[], Any]] = {
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "flash2": backend(SDPBackend.FLASH_ATTENTION),
        "efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
        "fae_without_entropy": lambda: fae(q, k, v, None, scale, False),
        "fae_with_entropy": lambda: fae(q, k, v, None, scale, True),
        "identity_flash2": identity,
        "naive_with_entropy": lambda: naive(q, k, v, scale),
    }
    b, h, n, m, d = shape
    times = {form: time_ms(run, rounds) for form, run in forms.items()}
    ours = times["fae_with_entropy"]
    rows = slice(0, 64)  # the reference stores the matrix in float64
    out, entropy = fae(q, k, v, None, scale, True)
    want, want_entropy = fae_reference(q[:, :, rows].double(), k.double(), v.double(), None, scale)
    return {
        "name": name,
        "shape": shape,
        "dtype": str(dtype),
        "ms": times,
        "tflops_with_entropy": ours and round(4e-9 * b * h * n * m * d / ours, 1),
        "out_error": (out[:, :, rows] - want).abs().max().item(),
        "entropy_error_nats": (entropy[:, rows] - want_entropy).abs().max().item(),
    }


def print_row(row: dict[str, Any]) -> None:
    times = ", ".join(f"{form} {ms}" for form, ms in row["ms"].items())
    error = f"{row['entropy_error_nats']:.1e} nats"
    print(f"{row['name']}: {times}; {row['tflops_with_entropy']} TFLOP/s, {error}", flush=True)


def sweep(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of the kernel for every candidate configuration that compiles, fastest first."""
    q, k, v = inputs(shape, dtype)
    found = {}
    pinned = fae_module.pick_config
    try:
        for candidate in CANDIDATES:
            config = fae_module.Config(*candidate)
            fae_module.pick_config = lambda *_, config=config: config
            ms = time_ms(lambda: fae(q, k, v, None, shape[4] ** -0.5, True), 8)
            if ms is not None:
                found[str(candidate)] = ms
    finally:
        fae_module.pick_config = pinned
    return dict(sorted(found.items(), key=lambda item: item[1]))


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, m, d = shape
    q = torch.randn(b, n, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(b, h, m, d, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    a = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    return a @ v, torch.special.entr(a.float()).sum(-1).mean(1)


def time_ms(run: Callable[[], Any], rounds: int) -> float | None:
    """Median milliseconds with a cold L2 cache, or None where the form does not run at this shape."""
    try:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    except (RuntimeError, OutOfResources):  # not supported at this shape, or out of memory
        return None
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in marks), 4)


if __name__ == "__main__":
    main()
