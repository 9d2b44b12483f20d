"""Judge a model: does the classifier name what it generates, and which sampling settings are best?

    python evaluate.py --data ../../data --work runs/emoji
    python evaluate.py --data ../../data --work runs/emoji --weights ../../toprovar_compile/models/weights/emoji_var

The second form judges packed weights; the classifier comes from the run in both. Writes quality.json, samples.png and
pairs.png (a render and what was generated for its class, side by side) into the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from toprovar_compile import models
from toprovar_compile.models.var import VAR

import common
import data
from train_classifier import Classifier, load_classifier, top5

DEFAULT: dict[str, float] = {"cfg": 1.0, "top_k": 10, "top_p": 0.0}
SETTINGS: tuple[dict[str, float], ...] = (
    DEFAULT,
    {"cfg": 0.0, "top_k": 0, "top_p": 0.0},
    {"cfg": 0.0, "top_k": 10, "top_p": 0.0},
    {"cfg": 1.0, "top_k": 50, "top_p": 0.9},
    {"cfg": 2.0, "top_k": 20, "top_p": 0.7},
    {"cfg": 2.0, "top_k": 10, "top_p": 0.0},
    {"cfg": 1.0, "top_k": 1, "top_p": 0.0},
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
    emoji: data.Emoji, model: VAR, net: Classifier, count: int, settings: Sequence[dict[str, float]], batch: int = 100
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The report of all settings on `count` classes drawn at random, and labels and images of the first setting."""
    workers = common.Workers()
    labels = torch.randperm(len(emoji.classes), generator=torch.Generator().manual_seed(0))[:count]
    base = torch.tensor([c.base for c in emoji.classes])
    rows, first = [], torch.empty(0)
    for sampling in settings:
        begin = time.perf_counter()
        images = generate(model, labels, workers, sampling, batch)
        row = {"sampling": sampling, **scores(net, images, labels, base, emoji.images)}
        row["seconds"] = time.perf_counter() - begin
        rows.append(row)
        common.console.print(row)
        first = images if not len(first) else first
    wrong = labels.roll(1)  # right pictures under wrong labels: what chance looks like
    report = {
        "classes_generated": count,
        "settings": rows,
        "renders": scores(net, emoji.images[labels].float() / 255, labels, base, emoji.images),
        "wrong_labels": scores(net, first, wrong, base, emoji.images),
        **common.hardware(),
    }
    return report, labels, first


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder with the npm package file.")] = Path("data"),
    run: Annotated[Path, typer.Option("--work", help="Folder of the run.")] = Path("runs/emoji"),
    weights: Annotated[Path | None, typer.Option(help="Folder of packed weights to judge, not the run's.")] = None,
    count: Annotated[int, typer.Option(help="How many classes to generate, once each.")] = 500,
    batch: Annotated[int, typer.Option(help="Images generated at a time.")] = 100,
    all_settings: Annotated[bool, typer.Option(help="Compare sampling settings, or judge the default only.")] = True,
) -> None:
    """Score generated emoji."""
    device = common.Workers().device
    emoji = data.load(folder)
    model = models.load_folder(weights).to(device) if weights else common.load_model(run, device)
    net = load_classifier(run, device)
    report, labels, images = evaluate(emoji, model, net, count, SETTINGS if all_settings else SETTINGS[:1], batch)
    common.write_json(run / "quality.json", report | {"fingerprint": model.fingerprint()})
    common.sheet(images[:96], 12, run / "samples.png", side=128)
    renders = emoji.images[labels[:48]].float() / 255
    common.sheet(torch.stack((renders, images[:48]), 1).flatten(0, 1), 12, run / "pairs.png")


if __name__ == "__main__":
    typer.run(main)
