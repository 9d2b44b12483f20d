"""Choose the default guidance strength and temperature of a packed emoji-infinity.

    python choose_sampling.py --weights ../../toprovar_compile/models/weights/emoji_infinity --write

Scenes as training draws them, of compositions that it has seen, are generated at every pair of values and read by the
detector of EmojiEval; the share that is right decides, so no prompt of EmojiEval has a say. `--write` puts the best
pair into the model's config.json.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from toprovar_compile import measure
from toprovar_compile.evaluate.detector import Detector, load_detector
from toprovar_compile.evaluate.emoji_eval import Entry, reasons
from toprovar_compile.evaluate.intervals import mean_interval
from toprovar_compile.models.emoji_infinity import EmojiInfinity
from toprovar_compile.models.loading import load_folder

import common
import scenes


def draw_entries(count: int, seed: int = 0) -> list[Entry]:
    """What `count` random scenes of training ask for; objects of one group are counted."""
    rng = random.Random(f"sampling {seed}")
    drawn = [scenes.draw_scene(rng) for _ in range(count)]
    tasks = ["counting" if len(scene.groups) == 1 else "position" for scene in drawn]
    return [
        Entry.from_json({"task": task, "prompt": scenes.prompt(scene)} | scene.to_json())
        for task, scene in zip(tasks, drawn, strict=True)
    ]


@torch.no_grad()
def share_right(model: EmojiInfinity, detector: Detector, entries: list[Entry], batch: int) -> torch.Tensor:
    """Whether each image is right under the model's default sampling, float64 (entries,)."""
    right: list[float] = []
    for start in range(0, len(entries), batch):
        part = entries[start : start + batch]
        images = model([e.prompt for e in part], seed=start).float().cpu().clamp(0, 1)
        right += [float(not reason) for reason in reasons(images, part, detector)]
    return torch.tensor(right, dtype=torch.float64)


def main(
    weights: Annotated[Path, typer.Option(help="Folder of the packed model.")] = Path("weights"),
    cfg: Annotated[list[float] | None, typer.Option(help="Guidance strengths to try; repeatable.")] = None,
    tau: Annotated[list[float] | None, typer.Option(help="Temperatures to try; repeatable.")] = None,
    count: Annotated[int, typer.Option("--images", min=1, help="Images of each pair.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images generated at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    write: Annotated[bool, typer.Option("--write", help="Put the best pair into config.json.")] = False,
) -> None:
    """Try all pairs, print the share of right images for each, the best last."""
    target = measure.pick_device(device)
    model = load_folder(weights)
    assert isinstance(model, EmojiInfinity)
    model.to(target)
    detector, entries, own = load_detector(device=target), draw_entries(count), model.sampling
    found: list[tuple[float, float, float]] = []
    with measure.in_user_precision(model, target):
        for strength in cfg or (1.5, 2.0, 3.0, 4.0, 5.0):
            for temperature in tau or (0.3, 0.5, 0.7, 1.0):
                model.sampling = replace(own, cfg=strength, tau=temperature)
                share = mean_interval(share_right(model, detector, entries, batch))
                found.append((share.mean, strength, temperature))
                between = f"({share.low:.3f}..{share.high:.3f})"
                print(f"cfg {strength} tau {temperature}: {share.mean:.3f} {between}", flush=True)
    best = max(found)
    print(f"best: cfg {best[1]} tau {best[2]}: {best[0]:.3f} of {len(entries)}")
    if write:
        raw: dict[str, Any] = common.read_json(weights / "config.json")
        raw["sampling"] |= {"cfg": best[1], "tau": best[2]}
        common.write_json(weights / "config.json", raw)


if __name__ == "__main__":
    typer.run(main)
