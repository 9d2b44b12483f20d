"""Time attention with entropy on the CPU at emoji-VAR's shapes: JSON in benchmarks/results/fae_cpu.json.

Plain attention, toprovar::fae without and with entropy, and the naive form that stores the whole matrix, measured in
turns so that a busy moment hits all of them. One thread is timed by the processor time it used, which other processes
hardly change; several threads by the wall clock. Run it as `python benchmarks/fae_cpu.py` (a minute or two).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from toprovar_compile.files import write_json
from toprovar_compile.kernels import fae, fae_reference
from toprovar_compile.measure import machine

RESULTS = Path(__file__).parent / "results"
SHAPES = ((2, 4, 324, 640, 64), (2, 4, 576, 1216, 64), (2, 4, 1024, 2240, 64))  # B, H, n, m, D: the last three scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    given = parser.parse_args()
    rows = []
    for threads in sorted({1, given.threads}):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            rows.append(measure(shape, getattr(torch, given.dtype), given.rounds))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    name = "fae_cpu" if given.dtype == "float32" else f"fae_cpu_{given.dtype}"
    path = given.results / f"{name}.json"
    load = round(os.getloadavg()[0], 2)
    about = {"machine": machine(torch.device("cpu")), "load_average": load, "rounds": given.rounds}
    write_json(path, {**about, "rows": rows})
    print(f"wrote {path}")


@torch.no_grad()
def measure(shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median and best milliseconds of each form at B, H, n, m, D, and the largest error of the entropy in nats."""
    b, h, n, m, d = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, x, h, d).to(dtype).transpose(1, 2) for x in (n, m, m))
    scale = d**-0.5
    forms: dict[str, Callable[[], Any]] = {
        "attention": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale),
        "fae_without_entropy": lambda: fae(q, k, v, None, scale, False),
        "fae_with_entropy": lambda: fae(q, k, v, None, scale, True),
        "naive_with_entropy": lambda: fae_reference(q, k, v, None, scale),
    }
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 2):
        for name, form in forms.items():
            start = clock()
            form()
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (clock() - start))
    exact = fae_reference(q.double(), k.double(), v.double(), None, scale)[1]
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype), "threads": threads, "clock": clock.__name__}
    for kind, pick in (("median_ms", statistics.median), ("best_ms", min)):
        row[kind] = {name: round(pick(values), 3) for name, values in times.items()}
        row[f"entropy_over_attention_{kind[:-3]}"] = round(row[kind]["fae_with_entropy"] / row[kind]["attention"], 3)
    row["error_nats"] = (fae(q, k, v, None, scale, True)[1].double() - exact).abs().max().item()
    return row


if __name__ == "__main__":
    main()
