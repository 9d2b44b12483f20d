"""Judge a trained run: does the classifier name what the model generates, and which sampling settings are best?

    python evaluate.py --data ../../data --work runs/emoji

Writes run/quality.json, with the chosen sampling settings, and run/samples.png.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from torch import Tensor
from train_classifier import Classifier, load_classifier, top5

import data
from toprovar_compile.models.var import VAR

SETTINGS: tuple[dict[str, float], ...] = (
    {"cfg": 2.0, "top_k": 20, "top_p": 0.7},
    {"cfg": 0.0, "top_k": 0, "top_p": 0.0},
    {"cfg": 1.0, "top_k": 50, "top_p": 0.9},
    {"cfg": 2.0, "top_k": 1, "top_p": 0.0},
    {"cfg": 4.0, "top_k": 20, "top_p": 0.7},
)


@torch.no_grad()
def generate(model: VAR, labels: Tensor, workers: common.Workers, sampling: dict[str, Any], batch: int = 100) -> Tensor:
    """Images (N, 3, H, W) in 0..1 on the CPU; seed i for the i-th batch."""
    parts = []
    with workers.autocast():
        for seed, part in enumerate(labels.split(batch)):
            parts.append(model(part.to(workers.device), seed=seed, **sampling).float().cpu())
    return torch.cat(parts)


def scores(net: Classifier, images: Tensor, labels: Tensor, base: Tensor, renders: Tensor) -> dict[str, float]:
    """Share of images that the classifier names, exactly and up to skin tone, and their PSNR against the renders."""
    found = top5(net, images)
    exact = found == labels.unsqueeze(1)
    alike = base[found] == base[labels].unsqueeze(1)
    return {
        "top1": float(exact[:, 0].float().mean()),
        "top5": float(exact.any(1).float().mean()),
        "top1_base": float(alike[:, 0].float().mean()),
        "top5_base": float(alike.any(1).float().mean()),
        "psnr_to_render_db": float(common.psnr_of(images, renders[labels].float() / 255).mean()),
    }


def evaluate(
    emoji: data.Emoji, model: VAR, net: Classifier, count: int, settings: tuple[dict[str, float], ...] = SETTINGS
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The report of all settings on `count` classes drawn at random, and labels and images of the best one."""
    workers = common.Workers()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(len(emoji.classes), generator=generator)[:count]
    base = torch.tensor([c.base for c in emoji.classes])
    rows, best = [], None
    for sampling in settings:
        begin = time.perf_counter()
        images = generate(model, labels, workers, sampling)
        row = {"sampling": sampling, **scores(net, images, labels, base, emoji.images)}
        row["seconds"] = time.perf_counter() - begin
        rows.append(row)
        common.console.print(row)
        if best is None or (row["top5"], row["top1"]) > (best[0]["top5"], best[0]["top1"]):
            best = (row, images)
    assert best is not None
    wrong = labels.roll(1)  # the score of right pictures under wrong labels: what chance looks like
    report = {
        "count": count,
        "settings": rows,
        "best": best[0],
        "renders": scores(net, emoji.images[labels].float() / 255, labels, base, emoji.images),
        "chance": scores(net, best[1], wrong, base, emoji.images),
        **common.hardware(),
    }
    return report, labels, best[1]


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder with the npm package file.")] = Path("data"),
    run: Annotated[Path, typer.Option("--work", help="Folder of this run.")] = Path("runs/emoji"),
    count: Annotated[int, typer.Option(help="How many classes to generate, once each.")] = 500,
) -> None:
    """Score generated emoji."""
    device = common.Workers().device
    emoji = data.load(folder)
    model, net = common.load_model(run, device), load_classifier(run, device)
    report, labels, images = evaluate(emoji, model, net, count)
    common.write_json(run / "quality.json", report)
    common.sheet(images[:96], 12, run / "samples.png", side=96)
    renders = emoji.images[labels[:48]].float() / 255
    common.sheet(torch.stack((renders, images[:48]), 1).flatten(0, 1), 12, run / "pairs.png", side=128)


if __name__ == "__main__":
    typer.run(main)
