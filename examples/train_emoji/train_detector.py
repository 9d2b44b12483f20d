"""Train the detector of EmojiEval on composed scenes, spoilt as generated pictures are, and check it.

    python train_detector.py --data data --out ../../toprovar_compile/models/weights/emoji_eval --minutes 1

Writes detector.safetensors (float16) and detector.json with the checks: the share of pictures read without a mistake,
by how much they are spoilt, and EmojiEval's score of composed pictures of its own prompts.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from toprovar_compile.evaluate.detector import SIDE, STRIDE, Detector, load_detector
from toprovar_compile.evaluate.emoji_eval import Entry, judge, load_prompts, summarise

import common
import scenes
from scenes import Composer, Group, Scene

_CELLS = SIDE // STRIDE
_FOREIGN = 0.08  # share of pictures of other emoji, in which there is nothing to find
_ROOM = 8  # most objects in a picture


def pad_boxes(boxes: Sequence[NDArray[np.float32]], device: torch.device) -> Tensor:
    """Boxes of all pictures as one tensor (B, 8, 6), -1 where there is none."""
    out = np.full((len(boxes), _ROOM, 6), -1, np.float32)
    for row, b in zip(out, boxes, strict=True):
        row[: len(b)] = b
    return torch.from_numpy(out).to(device)


def loss_of(maps: Tensor, boxes: Tensor, nouns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the heat map, the distances and the colours; maps float32 (B, C, 32, 32), boxes of `pad_boxes`."""
    there = boxes[..., 5] >= 0  # (B, 8)
    scaled = boxes[..., :4] / STRIDE
    centre = (scaled[..., :2] + scaled[..., 2:]) / 2
    cell = centre.floor().clamp(0, _CELLS - 1)
    size = scaled[..., 2:] - scaled[..., :2]
    axis = torch.arange(_CELLS, device=maps.device, dtype=torch.float32)
    sigma = (0.07 * size.amax(-1)).clamp(0.7, 1.5)[..., None, None]
    dx = axis.view(1, 1, 1, -1) - cell[..., 0, None, None]
    dy = axis.view(1, 1, -1, 1) - cell[..., 1, None, None]
    bumps = (-(dx**2 + dy**2) / (2 * sigma**2)).exp() * there[..., None, None]
    heat = torch.zeros(len(maps), nouns, _CELLS, _CELLS, device=maps.device)
    index = boxes[..., 4].clamp_min(0).long()[..., None, None].expand_as(bumps)
    heat.scatter_reduce_(1, index, bumps, "amax")
    logits = maps[:, :nouns]
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = heat > 0.999
    hit = -((1 - p) ** 2 * p.log())[peak].sum()
    miss = -((1 - heat) ** 4 * p**2 * (1 - p).log())[~peak].sum()
    count = there.sum().clamp_min(1)

    # Distances and colour are asked of the 3 x 3 cells around a centre.
    around = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], device=maps.device, dtype=torch.float32)
    cells = (cell[:, :, None] + around).clamp(0, _CELLS - 1)  # (B, 8, 9, 2)
    places = (cells[..., 1] * _CELLS + cells[..., 0]).long().flatten(1)
    rest = maps[:, nouns:].flatten(2).gather(2, places[:, None].expand(-1, maps.shape[1] - nouns, -1))
    rest = rest.transpose(1, 2).view(len(maps), _ROOM, 9, -1)
    middle = cells + 0.5
    wanted = torch.cat((middle - scaled[:, :, None, :2], scaled[:, :, None, 2:] - middle), -1).clamp_min(0.1).log()
    near = there[..., None].expand(-1, -1, 9)
    distance = (rest[..., :4] - wanted).abs().mean(-1)[near].sum() / (9 * count)
    colours = boxes[..., 5].clamp_min(0).long()[..., None].expand(-1, -1, 9)
    colour = F.cross_entropy(rest[..., 4:][near], colours[near], reduction="sum") / (9 * count)
    return (hit + miss) / count, distance, colour


def spoil(x: Tensor, strength: float = 1.0) -> Tensor:
    """Images in -1..1 blurred, warped, tinted, quantised in 8x8 blocks and noised, each by random amounts."""
    b, device = len(x), x.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(b, *shape, device=device)

    def often(share: float) -> Tensor:
        return strength * draw(1, 1, 1) * (draw(1, 1, 1) < share)

    x = _warp(x, 0.035 * often(0.5))
    tint = 1 + 0.2 * often(0.4) * (torch.rand(b, 3, 1, 1, device=device) * 2 - 1)
    x = (1 - (1 - x) * tint) + 0.12 * often(0.3) * (draw(1, 1, 1) * 2 - 1)
    for factor, share in ((2, 0.5), (4, 0.3), (6, 0.1)):
        # Softer everywhere or in patches, as details that a tokenizer loses.
        soft = F.interpolate(x, size=(SIDE // factor,) * 2, mode="area")
        soft = F.interpolate(soft, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        patchy = F.interpolate(draw(1, 5, 5), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        patchy = torch.where(draw(1, 1, 1) < 0.5, ((patchy - 0.5) * 6 + 0.5).clamp(0, 1), 1.0)
        x = x + (soft - x) * patchy * often(share).sqrt()
    x = torch.where(draw(1, 1, 1) < 0.4 * min(strength, 1.0), _blocks(x, 0.03 + 0.3 * draw(1, 1, 1) * strength), x)
    blotches = torch.randn(b, 3, 12, 12, device=device)
    x = x + 0.12 * often(0.4) * F.interpolate(blotches, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    return (x + 0.15 * often(0.4) * torch.randn_like(x)).clamp(-1, 1)


def _warp(x: Tensor, amount: Tensor) -> Tensor:
    """Smooth random shifts of up to about `amount` (B, 1, 1, 1), in halves of the side."""
    shifts = torch.randn(len(x), 2, 6, 6, device=x.device) * amount
    shifts = F.interpolate(shifts, size=x.shape[-2:], mode="bicubic", align_corners=False)
    eye = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(eye, list(x.shape), align_corners=False) + shifts.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blocks(x: Tensor, step: Tensor) -> Tensor:
    """Cosine coefficients of 8x8 blocks rounded, high frequencies more, as JPEG does; `step` (B, 1, 1, 1)."""
    n = torch.arange(8, device=x.device, dtype=torch.float32)
    basis = torch.cos(math.pi * (n + 0.5) * n.view(-1, 1) / 8) * 0.5
    basis[0] /= math.sqrt(2)
    cut = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # B C i y j x
    coefficients = torch.einsum("uy,bciyjx,vx->bciujv", basis, cut, basis)
    coarse = step.view(-1, 1, 1, 1, 1, 1) * (1 + n.view(-1, 1, 1) + n.view(1, 1, -1))
    rounded = (coefficients / coarse).round() * coarse
    return torch.einsum("uy,bciujv,vx->bciyjx", basis, rounded, basis).flatten(4, 5).flatten(2, 3)


def composer(assets: Tensor, device: torch.device, singles: float = _FOREIGN) -> Composer:
    """Draws what the detector sees: scenes of all compositions, and emoji that are none of the objects."""
    made = Composer(assets, device, singles=singles, held_out=True)
    made.planner.leave_out([*scenes.vocabulary(), "ball", "light", "doll"])
    return made


def train(
    source: Composer,
    out: Path,
    *,
    minutes: float = 1.0,
    steps: int = 0,
    batch: int = 128,
    lr: float = 3e-3,
    width: int = 16,
    checked: int = 1024,
    compiled: bool = False,
    prompts: Sequence[Entry] | None = None,
    init: Path | None = None,
) -> dict[str, Any]:
    """Train, write the detector to `out`, check it on `checked` pictures a check and write the report; the report.

    With `init` training starts from the detector in that folder.
    """
    workers = common.Workers()
    device = workers.device
    torch.manual_seed(0)
    nouns = list(scenes.vocabulary())
    net = Detector(nouns, list(scenes.COLOURS), width)
    if init is not None:
        net.load_state_dict(load_detector(init).state_dict())
    net = net.to(device, memory_format=torch.channels_last)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=workers.cuda)
    clock = common.Clock(minutes, steps, 0.0, 0.0, workers)
    run_net = torch.compile(net, dynamic=False) if compiled else net
    stream = source.stream(batch, seed=1)
    count, begin, said = 0, time.perf_counter(), 0.0
    while clock.running:
        drawn = next(stream)
        x = spoil(common.to_float(drawn.images, device)).contiguous(memory_format=torch.channels_last)
        with workers.autocast():
            maps = run_net(x)
        heat, distance, colour = loss_of(maps.float(), pad_boxes(drawn.boxes, device), len(nouns))
        (heat + distance + colour).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * common.rate(clock.share, 0.05, 0.3)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        count += 1
        now = time.perf_counter() - begin
        if now - said > 8 or not clock.running:
            said = now
            print(
                f"detector {clock.share:.0%} step {count} {count * batch / now:.0f} images/s heat {heat.item():.3f} "
                f"distance {distance.item():.3f} colour {colour.item():.3f}",
                flush=True,
            )
    report = {"steps": count, "batch": batch, "seconds": round(time.perf_counter() - begin, 1)}
    net = net.eval()
    out.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file({k: v.cpu().contiguous() for k, v in half.items()}, out / "detector.safetensors")
    config = {"nouns": nouns, "colours": list(scenes.COLOURS), "width": width}
    _write(out, config, report)
    report |= check(source, load_detector(out, device), checked, load_prompts() if prompts is None else prompts)
    _write(out, config, report | common.hardware())
    print(json.dumps(report, indent=1), flush=True)
    return report


def _write(out: Path, config: dict[str, Any], report: dict[str, Any]) -> None:
    (out / "detector.json").write_text(json.dumps(config | {"report": report}, indent=1) + "\n")


@torch.no_grad()
def check(source: Composer, net: Detector, pictures: int, prompts: Sequence[Entry]) -> dict[str, Any]:
    """Shares of random pictures in which exactly what is there was found, and EmojiEval's score of composed ones."""
    report: dict[str, Any] = {}
    device = next(net.parameters()).device
    for name, strength in (("clean", 0.0), ("spoilt", 1.0), ("badly spoilt", 1.6)):
        rng, right, total, colours, kinds = random.Random("check"), 0, 0, 0, 0
        torch.manual_seed(1)
        while total < pictures:
            drawn = source.batch(min(64, pictures - total), rng)
            x = common.to_float(drawn.images, device)
            x = spoil(x, strength) if strength else x
            for found, scene in zip(net.find((x + 1) / 2), drawn.scenes, strict=True):
                wanted = [g.noun for g in scene.groups for _ in range(g.count)] if scene else []
                same = sorted(f.noun for f in found) == sorted(wanted)
                told = {f.noun: f.colour for f in found}
                hues = (
                    all(told[g.noun] in (g.colour or scenes.vocabulary()[g.noun].own,) for g in scene.groups)
                    if (same and scene)
                    else same
                )
                right, kinds, colours = right + (same and hues), kinds + same, colours + hues
            total += len(drawn.images)
        report[name] = {"objects": round(kinds / total, 4), "objects and colours": round(right / total, 4)}
    for name, strength in (("score of composed pictures", 0.0), ("score of spoilt composed pictures", 1.0)):
        rng, scores, wrong = random.Random("prompts"), [], []
        torch.manual_seed(2)
        for start in range(0, len(prompts), 64):
            part = prompts[start : start + 64]
            drawn = source.compose([scene_of(e) for e in part], rng)
            x = common.to_float(drawn.images, device)
            x = spoil(x, strength) if strength else x
            for entry, found in zip(part, net.find((x + 1) / 2), strict=True):
                reason = judge(found, entry)
                scores.append(float(not reason))
                wrong += [f"{entry.prompt}: {reason}"] if reason else []
        report[name] = {task: value.mean for task, value in summarise(prompts, scores).items()}
        report[f"wrong in it, {len(wrong)}"] = wrong[:20]
    return report


def scene_of(entry: Entry) -> Scene:
    """The scene that a prompt of EmojiEval asks for."""
    return Scene(tuple(Group(g.noun, g.count, g.colour) for g in entry.groups), entry.relation, entry.ground)


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder of the renders' package file.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder for the detector.")] = Path("detector"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Train for so many steps instead.")] = 0,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 128,
    checked: Annotated[int, typer.Option(help="Pictures of each check.")] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    init: Annotated[Path | None, typer.Option(help="Folder of a detector to start from.")] = None,
    compiled: Annotated[bool, typer.Option(help="Compile the network.")] = False,
) -> None:
    """Train and check the detector."""
    begin = time.perf_counter()
    device = common.Workers().device
    source = composer(scenes.load_assets(folder), device)
    print(f"sprites after {time.perf_counter() - begin:.0f} s", flush=True)
    options = {"lr": lr, "checked": checked, "compiled": compiled, "init": init}
    train(source, out, minutes=minutes, steps=steps, batch=batch, **options)


if __name__ == "__main__":
    typer.run(main)
