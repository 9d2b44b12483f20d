"""How close images stay to unpruned ones under many plans, in the eager reference: quality without any compiler.

    python benchmarks/eager_frontier.py --labels 16 --out benchmarks/results/eager_frontier.json

Each plan generates the same labels with the same seeds as the unpruned model; SSIM and PSNR are taken against those
images. The share of tokens computed stands for the cost, which the compiled benchmark measures. Calibration statistics
of several seeds are written too, so that their stability can be seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprovar_compile import models
from toprovar_compile.calibrate import calibrate
from toprovar_compile.metrics import psnr, ssim
from toprovar_compile.plan import Plan
from toprovar_compile.policies.toprovar import Thresholds, plan_from_statistics
from toprovar_compile.reference import pruned

KEEPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def plans(model: Any, statistics: dict[str, Any]) -> Iterator[tuple[str, Plan]]:
    """Named plans: the grid of keep shares, its variations, exits, skipped layers and calibrated ones."""
    schedule, depth = model.schedule, len(model.blocks)
    last = len(schedule) - 1

    def share(keep: Any, start: int, **more: Any) -> Plan:
        return Plan.keep_share(schedule, depth, keep, start, **more)

    for start in (last - 2, last - 1, last):
        for keep in KEEPS:
            yield f"keep={keep},from={start}", share(keep, start)
        yield f"keep=0,from={start}", share(0.0, start)
    for name, option in (("restore", "identity"), ("direction", "high_entropy"), ("selection", "gumbel")):
        for start, keep in ((last - 1, 0.3), (last - 1, 0.5), (last, 0.3)):
            changes: dict[str, Any] = {name: option}
            yield f"keep={keep},from={start},{name}={option}", share(keep, start, **changes)
    for stop in (last - 1, last):
        yield f"exit={stop}", share(1.0, last, exit_scale=stop)
    for keep in (0.0, *KEEPS):
        yield f"keep={keep},from={last - 1},exit={last}", share(keep, last - 1, exit_scale=last)
    for keep in (0.3, 0.5, 0.7):
        yield f"keep={keep},from={last - 2},exit={last}", share(keep, last - 2, exit_scale=last)
    for name, option in (("restore", "identity"), ("direction", "high_entropy")):
        changes = {name: option}
        yield f"keep=0.4,from={last - 1},exit={last},{name}={option}", share(0.4, last - 1, exit_scale=last, **changes)
    for first, second in ((0.5, 0.2), (0.7, 0.2), (0.3, 0.0), (0.5, 0.0), (0.7, 0.0)):
        yield f"keep={first}/{second},from={last - 1}", share({last - 1: first, last: second}, last - 1)
    for keeps in ((0.7, 0.4, 0.1), (0.8, 0.4, 0.0), (0.5, 0.3, 0.1)):
        text = "/".join(str(k) for k in keeps)
        yield f"keep={text},from={last - 2}", share(dict(enumerate(keeps, last - 2)), last - 2)
    ratios = statistics["ratio"][6]
    order = sorted(range(depth), key=lambda layer: ratios[layer])
    groups = {
        "detail half": order[: depth // 2],
        "global half": order[depth // 2 :],
        "detail most": order[: -depth // 4],
    }
    for name, layers in groups.items():
        for keep in (0.0, 0.3):
            yield f"keep={keep},from={last - 1},layers={name}", share(keep, last - 1, layers=layers)
        yield (
            f"keep=0.0,from={last - 1},exit={last},layers={name}",
            share(0.0, last - 1, layers=layers, exit_scale=last),
        )
    for start in (last - 2, last - 1):
        for alpha_min, bound in ((0.2, 0.3), (0.5, 0.3), (0.7, 0.3), (0.5, 0.1), (0.7, 0.1)):
            for leave in (None, last):
                thresholds = Thresholds(
                    depth=start, alpha_min=alpha_min, global_below=bound, detail_above=bound, exit_scale=leave
                )
                name = f"toprovar depth={start},alpha_min={alpha_min},detail_above={bound},exit={leave}"
                yield name, plan_from_statistics(statistics, thresholds)


def generate(model: Any, plan: Plan, labels: Tensor, seed: int, batch: int) -> Tensor:
    """Images (N, 3, H, W) on the CPU."""
    with pruned(model, plan):
        starts = range(0, len(labels), batch)
        parts = [model(labels[i : i + batch], seed=seed + i).float().cpu() for i in starts]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-var")
    parser.add_argument("--labels", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=50, help="images of a calibration")
    parser.add_argument("--calibrations", type=int, default=3, help="calibrations with different seeds")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = models.load(given.model, device=given.device)
    made = [calibrate(model, given.prompts, seed, batch=given.batch) for seed in range(given.calibrations)]
    statistics = [plan.provenance["statistics"] for plan in made]
    rng = torch.Generator().manual_seed(given.seed + 1)
    labels = torch.randperm(model.cfg.num_classes, generator=rng)[: given.labels].to(given.device)
    dense = Plan.dense(model.schedule, len(model.blocks))
    wanted = generate(model, dense, labels, given.seed, given.batch)
    rows: list[dict[str, Any]] = []
    report = {
        "model": given.model,
        "fingerprint": model.fingerprint(),
        "device": given.device,
        "labels": labels.tolist(),
        "seed": given.seed,
        "statistics": statistics,
        "plans": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, plan in plans(model, statistics[0]):
        images = generate(model, plan, labels, given.seed, given.batch)
        close, decibels = ssim(images, wanted), psnr(images, wanted).clamp(max=100)
        rows.append(
            {
                "plan": name,
                "tokens": round(plan.total_share(), 4),
                "ssim": round(close.mean().item(), 4),
                "ssim_worst": round(close.min().item(), 4),
                "psnr": round(decibels.mean().item(), 2),
            }
        )
        print(*rows[-1].values(), flush=True)
        given.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
