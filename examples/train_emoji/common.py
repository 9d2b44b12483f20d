"""What the training scripts share: processes, the clock of a run, checkpoints, augmentation, sheets, Muon."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAE, VQVAEConfig

console = Console(width=160)

# Options that the training scripts share; defaults are theirs.
Data = Annotated[Path, typer.Option("--data", help="Folder with the npm package file.")]
Run = Annotated[Path, typer.Option("--work", help="Folder of this run.")]
Minutes = Annotated[float, typer.Option(help="Training time in all.")]
Steps = Annotated[int, typer.Option(help="Train for so many steps instead.")]
StopAfter = Annotated[float, typer.Option(help="Stop this call after so many minutes (0: do not).")]
Tokens = Annotated[int, typer.Option(help="Tokens a step and GPU.")]
MuonLr = Annotated[float, typer.Option(help="Peak learning rate of Muon.")]
AdamLr = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
Singles = Annotated[float, typer.Option(help="Share of single emoji.")]
Packed = Annotated[Path | None, typer.Option(help="Folder of packed weights to start from.")]


def emoji_config(classes: int, tiny: bool = False) -> VARConfig:
    """The shape of emoji-VAR; `tiny` is the same architecture small enough for a CPU test, for 32x32 images."""
    if tiny:
        vae = VQVAEConfig(32, 8, 32, (1, 1, 1), num_res_blocks=1, patch_nums=(1, 2, 4, 8))
        return VARConfig(2, 64, 2, shared_aln=True, num_classes=classes, vae=vae)
    vae = VQVAEConfig(1024, 16, 32, (1, 2, 2, 4), share_quant_resi=0, patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    return VARConfig(16, 256, 4, shared_aln=True, num_classes=classes, vae=vae)


class Workers:
    """The processes of one run: one, or those that torchrun started, one GPU each."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.cuda else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        if self.world > 1:
            tensors = list(tensors)
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            parts = flat.div_(self.world).split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def same(self, *tensors: Tensor) -> None:
        """Give every process the values of the first."""
        if self.world > 1:
            for t in tensors:
                dist.broadcast(t.detach(), 0)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world > 1:
            dist.barrier()

    def autocast(self) -> torch.autocast:
        """bfloat16 where the hardware has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)


class Clock:
    """Progress of a run that may be cut into several calls: `share` goes from 0 to 1 over `minutes` of training.

    The first three steps, which compile, take no time unless `compile_counts`. With `steps`, the run takes so many
    steps instead. All processes read the same values.
    """

    def __init__(
        self,
        minutes: float,
        steps: int,
        stop_after: float,
        done: float,
        workers: Workers,
        *,
        compile_counts: bool = False,
    ) -> None:
        self.minutes, self.steps, self.stop_after, self.workers = minutes, steps, stop_after, workers
        self.compile_counts = compile_counts
        self.start_share = self.share = done
        self._begin = time.perf_counter()
        self._count = 0

    @property
    def running(self) -> bool:
        """False once the run is complete or this call has used its minutes."""
        limit = 1.0 if self.steps or not self.stop_after else self.start_share + self.stop_after / self.minutes
        return self.share < min(1.0, limit)

    def tick(self) -> None:
        """Count one step."""
        self._count += 1
        if self.steps:
            self.share = self.start_share + self._count / self.steps
        elif self._count == 3 and not self.compile_counts:
            if self.workers.cuda:
                torch.cuda.synchronize()
            self._begin = time.perf_counter()
        elif self._count % 5 == 0:
            now = torch.tensor(time.perf_counter() - self._begin, dtype=torch.float64, device=self.workers.device)
            self.workers.same(now)
            self.share = self.start_share + float(now) / 60 / self.minutes


@contextmanager
def progress(title: str, workers: Workers, clock: Clock, every: float = 15.0) -> Iterator[Any]:
    """A progress bar: yields update(text), which also prints a line every `every` seconds without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    last = time.perf_counter()
    with Progress(*columns, console=console, disable=not workers.first) as bar:
        task = bar.add_task(title, total=1.0, text="")

        def update(text: str) -> None:
            nonlocal last
            bar.update(task, completed=clock.share, text=text)
            if workers.first and not console.is_terminal and time.perf_counter() - last > every:
                last = time.perf_counter()
                print(f"{title} {clock.share:.1%} {text}", flush=True)

        yield update


def rate(share: float, warm_up: float, flat_until: float) -> float:
    """Learning-rate factor at `share` of the run: linear warm-up, flat, then a cosine to zero."""
    if share < warm_up:
        return (share + 1e-4) / (warm_up + 1e-4)
    if share < flat_until:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - flat_until) / (1 - flat_until))))


def save(path: Path, **parts: Any) -> None:
    """Write a checkpoint so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parts, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_tokenizer(run: Path, device: torch.device) -> VQVAE:
    """The trained tokenizer of a run, frozen."""
    state = torch.load(run / "tokenizer.pt", map_location="cpu", weights_only=True)
    cfg = VARConfig.from_json(state["config"]).vae
    vae = VQVAE(cfg)
    vae.load_state_dict(state["model"])
    return vae.to(device).eval().requires_grad_(False)


def load_model(run: Path, device: torch.device) -> VAR:
    """The trained model of a run (averaged weights) with its tokenizer, frozen."""
    state = torch.load(run / "var.pt", map_location="cpu", weights_only=True)
    model = VAR(VARConfig.from_json(state["config"]))
    model.load_state_dict(state["ema"], strict=False)
    model.vae.load_state_dict(load_tokenizer(run, torch.device("cpu")).state_dict())
    return model.to(device).eval().requires_grad_(False)


def warm_start(module: nn.Module, folder: Path, prefix: str = "") -> None:
    """Start a module from the weights of a packed run (model*.safetensors), those whose names begin with `prefix`."""
    state = {k: v for shard in sorted(folder.glob("model*.safetensors")) for k, v in load_file(shard).items()}
    wanted = module.state_dict()
    module.load_state_dict({k: state[prefix + k].float() for k in wanted})


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to floats in -1..1 on the device."""
    return images.to(device).float().div(127.5).sub(1)


def augment(x: Tensor, *, shift: float, scale: float, turn: float, flip: bool, hue: float) -> Tensor:
    """Random affine and colour changes of images (B, 3, H, W) in -1..1 on white.

    `shift` is a share of the side, `scale` the largest relative change of size, `turn` and `hue` degrees.
    """
    b, device = x.shape[0], x.device

    def draw(limit: float) -> Tensor:
        return (torch.rand(b, device=device) * 2 - 1) * limit

    angle, size = draw(math.radians(turn)), 1 + draw(scale)
    mirror = torch.where(torch.rand(b, device=device) < 0.5, -1.0, 1.0) if flip else torch.ones(b, device=device)
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = (torch.stack((cos * mirror, -sin, 2 * draw(shift)), 1), torch.stack((sin * mirror, cos, 2 * draw(shift)), 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    ink = F.grid_sample(1 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # white is 0
    turn_by = draw(math.radians(hue))
    c, s = turn_by.cos(), turn_by.sin() / math.sqrt(3)
    same, up, down = (1 + 2 * c) / 3, (1 - c) / 3 - s, (1 - c) / 3 + s
    mix = torch.stack((same, up, down, down, same, up, up, down, same), 1).view(b, 3, 3)
    return 1 - torch.einsum("bij,bjhw->bihw", mix, ink).clamp(0, 2)


def sheet(images: Tensor, columns: int, path: Path, side: int = 128) -> None:
    """Write images (N, 3, H, W) in 0..1 as one picture, row by row."""
    x = F.interpolate(images.detach().float().cpu(), size=(side, side), mode="area")
    rows = math.ceil(len(x) / columns)
    x = torch.cat((x, torch.ones(rows * columns - len(x), 3, side, side)))
    x = x.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.clamp(0, 1).mul(255).round().byte().numpy()).save(path)


def psnr_of(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each pair of images in 0..1, dB."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def write_json(path: Path, data: Any) -> None:
    """Write a readable JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text())


def hardware() -> dict[str, Any]:
    """What a published number was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "gpu": gpu, "gpus": torch.cuda.device_count(), "numpy": np.__version__}


def config_json(cfg: VARConfig) -> dict[str, Any]:
    """A configuration as plain data."""
    return json.loads(json.dumps(asdict(cfg)))  # type: ignore[no-any-return]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, one batched product for all matrices of one shape.

    For the matrices of transformer blocks, and convolutions as matrices of one row an output.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                # A matrix that stacks several square ones (query, key, value) is orthogonalised square by square.
                flat, update = p.data.flatten(1), update.flatten(1)  # views
                rows, columns = flat.shape
                pieces = rows // columns if rows == 3 * columns else 1
                for target, u in zip(flat.chunk(pieces), update.chunk(pieces), strict=True):
                    by_shape.setdefault((target.shape[0], target.shape[1]), []).append((target, u))
            for (rows, columns), pairs in by_shape.items():
                direction = _orthogonal(torch.stack([u for _, u in pairs]))
                factor = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_([t for t, _ in pairs], list(direction.unbind()), alpha=-factor)


def _orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to g (N, rows, columns), about: singular values end near 1."""
    tall = g.shape[1] > g.shape[2]
    x = g.to(torch.bfloat16 if g.is_cuda else g.dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


def update(optimizers: Iterable[tuple[torch.optim.Optimizer, float]], factor: float) -> None:
    """Step optimizers, given with their peak learning rates, at `factor` times those; gradients are forgotten."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad()


class Trained:
    """A transformer's parameters in training, the tokenizer's left out: Muon for the matrices of modules whose names
    begin with one of `layers`, AdamW for the rest, and moving averages of all, in which the past weighs `averaging`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[str, ...],
        workers: Workers,
        *,
        muon_lr: float,
        adam_lr: float,
        averaging: float,
    ) -> None:
        self.model, self.workers, self.averaging = model, workers, averaging
        self.parameters = {n: p for n, p in model.named_parameters() if not n.startswith("vae.")}
        workers.same(*(p.data for p in self.parameters.values()))
        matrices = {n: p for n, p in self.parameters.items() if n.startswith(layers) and p.ndim == 2}
        rest = [p for n, p in self.parameters.items() if n not in matrices]
        self.muon = Muon(list(matrices.values()), lr=muon_lr)
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=workers.cuda)
        self._peaks = ((self.muon, muon_lr), (self.adam, adam_lr))
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"], strict=False)
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.average = state["ema"]

    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        own = {n: p.detach() for n, p in self.parameters.items()}
        return {"model": own, "muon": self.muon.state_dict(), "adam": self.adam.state_dict(), "ema": self.average}

    def step(self, factor: float, count: int) -> None:
        """Step number `count`, from 1, with the mean gradients of all processes, at `factor` of the learning rates."""
        self.workers.average([p.grad for p in self.parameters.values() if p.grad is not None])
        update(self._peaks, factor)
        keep = min(self.averaging, count / (count + 9))
        own = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), own, 1 - keep)


def by_scale(values: Tensor, tokens: Sequence[int]) -> Tensor:
    """Means (S, rows) on the CPU, one of each scale, of values (rows, L) of all positions."""
    return torch.stack([part.mean(1) for part in values.split(list(tokens), dim=1)]).cpu()
