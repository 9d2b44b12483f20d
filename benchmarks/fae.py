"""Measure attention with entropy and publish it: JSON and plot in benchmarks/results.

Run it as `python benchmarks/fae.py` on a GPU (three minutes), with `--device cpu` for the CPU (one); it does the same
as `toprovar bench fae`. `--sweep` prints the fastest tile configurations of the CUDA kernel instead.
"""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from toprovar_compile.bench import fae as bench_fae
from toprovar_compile.kernels import fae, plain_attention
from toprovar_compile.kernels._triton import TritonError
from toprovar_compile.measure import pick_device

RESULTS = Path(__file__).parent / "results"
CANDIDATES = tuple(
    (bm, bn, warps, stages)
    for bm, warps in ((64, 4), (128, 4), (128, 8), (256, 8))
    for bn in (32, 64, 128, 256)
    for stages in (2, 3, 4)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="on the CPU, besides one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    settings = bench_fae.Settings(given.device, given.dtype, given.models, given.rounds, given.threads)
    console = Console()
    if given.sweep:
        sweep(settings, console)
        return
    path = bench_fae.run(settings, given.results, log=lambda text: console.print(text, highlight=False))
    console.print(f"wrote {path}", highlight=False)


def sweep(settings: bench_fae.Settings, console: Console) -> None:
    """Print, for every case, milliseconds of the configurations that compile and fit, fastest first."""
    module = importlib.import_module("toprovar_compile.kernels.fae")
    device = pick_device(settings.device)
    pinned = module.pick_config
    try:
        for case in bench_fae.CUDA_CASES:
            if settings.models.lower() not in case.model.lower():
                continue
            q, k, v, mask = bench_fae.inputs(case, settings.dtype or "bfloat16", device)
            scale, found = case.head_dim**-0.5, {}
            for candidate in CANDIDATES:
                config = module.Config(*candidate)
                module.pick_config = lambda *_, config=config: config
                try:
                    found[candidate] = plain_attention.time_ms(partial(fae, q, k, v, mask, scale, True), device)
                except (RuntimeError, TritonError):
                    torch.cuda.empty_cache()
            best = sorted(found.items(), key=lambda item: item[1])[:6]
            console.print(f"{case.model} {case.scale}: " + ", ".join(f"{c} {ms}" for c, ms in best), highlight=False)
    finally:
        module.pick_config = pinned


if __name__ == "__main__":
    main()
