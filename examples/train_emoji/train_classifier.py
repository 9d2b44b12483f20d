"""Train the small classifier that judges generated emoji, on augmented renders only.

python train_classifier.py --data ../../data --work runs/emoji --minutes 1
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import common
import data

SIDE = 64


class Classifier(nn.Module):
    """A residual CNN: images (B, 3, H, W) in -1..1 to logits (B, classes). It looks at them at 64x64."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.stages = nn.ModuleList()
        last = width
        for w in widths:
            self.stages.append(_Stage(last, w))
            last = w
        self.squeeze = nn.Linear(4 * last, 512)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.interpolate(x, size=(SIDE, SIDE), mode="area") if x.shape[-1] != SIDE else x)
        for stage in self.stages:
            x = stage(x)
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)  # four quadrants: where things are matters
        out: Tensor = self.head(F.dropout(F.relu(self.squeeze(x)), 0.2, self.training))
        return out


class _Stage(nn.Module):
    """Halves the resolution, then one residual block."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer))
        self.conv1 = nn.Sequential(nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer))
        self.conv2 = nn.Sequential(nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        out: Tensor = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return out


def disturb(x: Tensor) -> Tensor:
    """Shift, scale, turn, tint, blur and noise of images in -1..1, in random strengths."""
    x = common.augment(x, shift=0.06, scale=0.12, turn=8, flip=False, hue=6)
    b, device = len(x), x.device
    x = 1 - (1 - x) * (1 + 0.15 * (torch.rand(b, 1, 1, 1, device=device) * 2 - 1))
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    tiny = F.interpolate(x, scale_factor=0.25, mode="area")
    blurred = [F.interpolate(y, size=x.shape[-2:], mode="bilinear") for y in (small, tiny)]
    pick = torch.rand(b, 1, 1, 1, device=device)
    x = torch.where(pick < 0.2, blurred[0], torch.where(pick < 0.3, blurred[1], x))
    return x + 0.1 * torch.rand(b, 1, 1, 1, device=device) * torch.randn_like(x)


@torch.no_grad()
def top5(net: Classifier, images: Tensor, batch: int = 256) -> Tensor:
    """The five best labels, int64 (N, 5), of images in 0..1."""
    device = next(net.parameters()).device
    parts = [net(x.to(device).float() * 2 - 1).topk(5, dim=1).indices.cpu() for x in images.split(batch)]
    return torch.cat(parts)


def load_classifier(run: Path, device: torch.device) -> Classifier:
    """The trained classifier of a run."""
    state = torch.load(run / "classifier.pt", map_location="cpu", weights_only=True)
    net = Classifier(state["classes"])
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state["model"].items()})
    return net.to(device).eval()


def train(
    images: Tensor,
    run: Path,
    *,
    minutes: float = 1.0,
    steps: int = 0,
    batch: int = 256,
    lr: float = 2e-3,
    compiled: bool = False,
) -> None:
    """Train on uint8 images, image i being class i; writes run/classifier.pt."""
    workers = common.Workers()
    device = workers.device
    torch.manual_seed(0)
    small = torch.cat(
        [F.interpolate(common.to_float(x, device), size=(SIDE, SIDE), mode="area") for x in images.split(256)]
    )
    net = Classifier(len(images)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05, fused=workers.cuda)
    clock = common.Clock(minutes, steps, 0.0, 0.0, workers)
    run_net = torch.compile(net, dynamic=False) if compiled else net
    count, begin = 0, time.perf_counter()
    with common.progress("classifier", workers, clock) as update:
        while clock.running:
            labels = torch.randint(len(images), (batch,), device=device)
            x = disturb(small[labels]).contiguous(memory_format=torch.channels_last)
            with workers.autocast():
                logits = run_net(x)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * common.rate(clock.share, 0.05, 0.3)
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
            count += 1
            if count % 25 == 0:
                right = (logits.argmax(1) == labels).float().mean()
                update(f"step {count} loss {loss.item():.3f} top-1 {float(right):.3f}")
    net.eval()
    torch.manual_seed(1)
    clean = top5(net, (small + 1) / 2)
    disturbed = top5(net, (torch.cat([disturb(x) for x in small.split(256)]).clamp(-1, 1) + 1) / 2)
    labels = torch.arange(len(images))
    report = {
        "steps": count,
        "seconds": time.perf_counter() - begin,
        "top1_renders": _share(clean[:, :1], labels),
        "top5_renders": _share(clean, labels),
        "top1_augmented_renders": _share(disturbed[:, :1], labels),
        "top5_augmented_renders": _share(disturbed, labels),
    }
    half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    common.save(run / "classifier.pt", model=half, classes=len(images))
    common.write_json(run / "classifier.json", report | common.hardware())
    common.console.print(report)


def _share(found: Tensor, labels: Tensor) -> float:
    return float((found == labels.unsqueeze(1)).any(1).float().mean())


def main(
    folder: common.Data = Path("data"),
    run: common.Run = Path("runs/emoji"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 1.0,
    steps: common.Steps = 0,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 256,
    compiled: Annotated[bool, typer.Option(help="Compile the training step.")] = False,
) -> None:
    """Train the judging classifier."""
    train(data.load(folder).images, run, minutes=minutes, steps=steps, batch=batch, compiled=compiled)


if __name__ == "__main__":
    typer.run(main)
