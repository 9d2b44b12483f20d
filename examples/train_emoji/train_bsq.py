"""Train the bitwise multi-scale tokenizer of emoji-infinity on composed pictures.

    python train_bsq.py --data ../../data --work runs/infinity --minutes 10

With several GPUs: torchrun --standalone --nproc-per-node 2 train_bsq.py ... An interrupted run goes on where its last
checkpoint was. `--minutes` is the time of training in all, compilation included; a call also takes some 30 s to start.
Writes bsq.pt (to go on from), bsq-1.safetensors (float16 weights), bsq.json and bsq.png.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig

import bits
import common

_CUT = 0.5  # share of the images decoded from a random number of scales, so that leaving early looks well
_COMMIT = 1.0
_ENTROPY = 0.01
_SHARPNESS = 4.0  # of the soft bits that the entropy is taken of: a bit of usual size has probability 0.98
_WARM_UP = 100  # steps
_CHECKPOINT = 60.0  # seconds between checkpoints
_EVALUATED = 512


def image_loss(out: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 on pixels and L1 on their horizontal and vertical differences."""
    d = out.float() - x
    edges = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
    return d.abs().mean() + 2 * d.square().mean() + 0.5 * edges


def quantize(
    vae: BSQVAE, features: Tensor, grids: Sequence[tuple[int, int]], kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's input, the commitment loss and the entropy loss of features float32 (B, d, h, w).

    `kept` (B,) is how many scales of each image are decoded. Gradients pass straight through the sum of codes. The
    commitment pulls features towards what the scales add up to, the finer ones counting more. The entropy loss makes
    each bit of a picture certain and each bit used both ways over the batch.
    """
    side = (features.shape[2], features.shape[3])
    total, used = torch.zeros_like(features), torch.zeros_like(features)
    commit, entropy = features.new_zeros(()), features.new_zeros(())
    weights = [grid[0] / sum(g[0] for g in grids) for grid in grids]
    for s, (grid, weight) in enumerate(zip(grids, weights, strict=True)):
        rest = features - total
        z = rest if grid == side else F.interpolate(rest, size=grid, mode="area")
        p = torch.sigmoid(_SHARPNESS * F.normalize(z, dim=1) * vae.codebook_dim**0.5)
        entropy = entropy + weight * (_entropy(p).mean() - _entropy(p.mean((0, 2, 3))).mean())
        with torch.no_grad():
            codes = vae.bits_to_codes((z > 0).permute(0, 2, 3, 1))
            step = codes if grid == side else F.interpolate(codes, size=side, mode="bilinear")
            total = total + step
            used = used + step * (kept > s).view(-1, 1, 1, 1)
        commit = commit + weight * (features - total).square().mean()
    return features + (used - features).detach(), commit, entropy


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-5, 1 - 1e-5)
    return -(p * p.log() + (1 - p) * (1 - p).log())


@torch.no_grad()
def evaluate(
    vae: BSQVAE, images: Tensor, grids: Sequence[tuple[int, int]], device: torch.device, batch: int = 64
) -> dict[str, object]:
    """PSNR of uint8 images through all scales, and cut after each of the last four, and how often bits are 1."""
    scales = len(grids)
    psnr: dict[int, list[Tensor]] = {k: [] for k in range(scales, max(scales - 4, 0), -1)}
    ones = torch.zeros(scales, vae.codebook_dim, device=device)
    for start in range(0, len(images), batch):
        x = common.to_float(images[start : start + batch], device)
        _, found = vae.quantize(vae.encoder(x), tuple(grids))
        total: Tensor | None = None
        for s, b in enumerate(found):
            ones[s] += b.float().mean((1, 2)).sum(0) / len(images)
            total, _ = vae.next_input(s, total, vae.bits_to_codes(b), tuple(grids))
            if s + 1 in psnr:
                psnr[s + 1].append(common.psnr_of(vae.decode(total), (x + 1) / 2).cpu())
    values = {k: torch.cat(v) for k, v in psnr.items()}
    full = values[scales]
    return {
        "psnr_mean_db": float(full.mean()),
        "psnr_p05_db": float(full.quantile(0.05)),
        "psnr_min_db": float(full.min()),
        "psnr_mean_db_by_scales_kept": {str(k): float(v.mean()) for k, v in values.items()},
        "bits_stuck": int(((ones < 0.01) | (ones > 0.99)).sum(1)[2:].sum()),
        "images": len(images),
    }


def train(
    make: Callable[[int, random.Random], Tensor],
    cfg: BSQVAEConfig,
    run: Path,
    *,
    patch_nums: Sequence[int] = bits.PATCH_NUMS,
    minutes: float = 10.0,
    steps: int = 0,
    stop_after: float = 0.0,
    batch: int = 16,
    lr: float = 1e-3,
    muon_lr: float = 0.02,
    fresh: float = 0.5,
    pool_size: int = 4096,
    init: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train on uint8 images (n, 3, H, W) that `make(n, rng)` draws; writes the files that the module names.

    `fresh` is the share of new images in a batch; the others are drawn again from the latest `pool_size`.
    """
    workers = common.Workers()
    device, grids = workers.device, bits.grids_of(patch_nums)
    torch.manual_seed(workers.rank)
    vae = BSQVAE(cfg).to(device)
    if init:
        bits.start_from(vae, bits.exported(init, "bsq"))
    workers.same(*(p.data for p in vae.parameters()))
    matrices = [p for p in vae.parameters() if p.ndim == 4 and p.shape[2] == 3 and min(p.shape[:2]) >= 16]
    chosen = {id(p) for p in matrices} if muon_lr else set()
    muon = common.Muon([p for p in vae.parameters() if id(p) in chosen], lr=muon_lr) if muon_lr else None
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=workers.cuda)
    optimizers = [(adam, lr), *([(muon, muon_lr)] if muon is not None else [])]
    done, step, seconds, history = 0.0, 0, 0.0, []
    checkpoint = run / "bsq.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        if muon is not None:
            muon.load_state_dict(state["muon"])
        done, step, seconds, history = state["share"], state["step"], state["seconds"], state["history"]
    rng = random.Random(f"tokenizer/{workers.rank}/{step}")
    pool = bits.Pool(pool_size, 128, lambda n: (make(n, rng),))
    encoder, decoder = vae.encoder, vae.decoder
    if compiled:
        encoder = torch.compile(vae.encoder, dynamic=False)  # type: ignore[assignment]
        decoder = torch.compile(vae.decoder, dynamic=False)  # type: ignore[assignment]
    parameters, scales = list(vae.parameters()), len(grids)
    new = max(1, round(batch * fresh))
    clock = common.Clock(minutes, steps, stop_after, done, workers, compile_counts=True)
    seen, begin = 0, time.perf_counter()
    saved = begin

    def save() -> None:
        parts = {"model": vae.state_dict(), "adam": adam.state_dict(), "history": history, "step": step}
        spent = seconds + time.perf_counter() - begin
        common.save(
            checkpoint, share=clock.share, seconds=spent, muon=muon.state_dict() if muon is not None else None, **parts
        )
        bits.export(vae.state_dict(), run, "bsq")

    vae.train()
    with common.progress("tokenizer", workers, clock, every=10.0) as update:
        while clock.running:
            pool.refresh(new)
            x = common.to_float(pool.draw(batch)[0], device)
            with workers.autocast():
                features = encoder(x)
            cut = torch.randint(max(scales - 4, 1), scales + 1, (batch,), device=device)
            kept = torch.where(torch.rand(batch, device=device) < _CUT, cut, scales)
            z, commit, entropy = quantize(vae, features.float(), grids, kept)
            with workers.autocast():
                out = decoder(z)
            pixel_loss = image_loss(out, x)
            (pixel_loss + _COMMIT * commit + _ENTROPY * entropy).backward()
            workers.average([p.grad for p in parameters if p.grad is not None])
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            factor = min(1.0, (step + 1) / _WARM_UP) * common.rate(clock.share, 0.0, 0.4)
            common.update(optimizers, factor)
            step, seen = step + 1, seen + batch * workers.world
            clock.tick()
            if step % 20 == 0:
                whole = kept == scales
                mse = ((out.detach().float() - x).square().mean((1, 2, 3)) * whole).sum() / whole.sum().clamp_min(1)
                values = torch.stack((pixel_loss, commit, entropy, -10 * (mse / 4).log10())).detach()
                history.append([clock.share, *values.tolist()])
                speed = seen / (time.perf_counter() - begin)
                loss, pull, uncertain, psnr = values.tolist()
                update(
                    f"step {step} psnr {psnr:.2f} loss {loss:.4f} commit {pull:.4f} entropy {uncertain:.3f} "
                    f"{speed:.0f} images/s"
                )
                if workers.first and time.perf_counter() - saved > _CHECKPOINT:
                    save()
                    saved = time.perf_counter()
    if not workers.first:
        workers.wait()
        return
    vae.eval()
    save()
    images = make(_EVALUATED if pool_size >= _EVALUATED else pool_size, random.Random("tokenizer/evaluation"))
    seconds += time.perf_counter() - begin
    report = evaluate(vae, images, grids, device) | {
        "share": clock.share,
        "seconds": seconds,
        "steps": step,
        "images_per_second": seen / (time.perf_counter() - begin),
        **common.hardware(),
    }
    common.write_json(run / "bsq.json", report | {"history": history})
    with torch.no_grad():
        x = common.to_float(images[:32], device)
        out = vae.decode(vae.quantize(vae.encoder(x), grids)[0])
        pairs = torch.stack(((x + 1) / 2, out.float()), 1).flatten(0, 1)
    common.sheet(pairs, 8, run / "bsq.png", side=min(192, x.shape[-1]))
    common.console.print(report)
    workers.wait()


def main(
    folder: common.Data = Path("data"),
    run: common.Run = Path("runs/infinity"),
    minutes: common.Minutes = 10.0,
    steps: common.Steps = 0,
    stop_after: common.StopAfter = 0.0,
    batch: Annotated[int, typer.Option(help="Images a step and GPU.")] = 16,
    lr: common.AdamLr = 1e-3,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon for convolutions (0: AdamW).")] = 0.02,
    fresh: Annotated[float, typer.Option(help="Share of newly composed images in a batch.")] = 0.5,
    pool_size: Annotated[int, typer.Option("--pool", help="Images kept to draw from.")] = 4096,
    singles: common.Singles = 0.35,
    init: Annotated[Path | None, typer.Option(help="Folder of bsq-*.safetensors to start from.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile encoder and decoder.")] = False,
) -> None:
    """Train the tokenizer."""
    source = bits.composer(folder, common.Workers().device, singles)
    train(
        lambda n, rng: source.batch(n, rng).images,
        bits.tokenizer_config(),
        run,
        minutes=minutes,
        steps=steps,
        stop_after=stop_after,
        batch=batch,
        lr=lr,
        muon_lr=muon_lr,
        fresh=fresh,
        pool_size=pool_size,
        init=init,
        compiled=compiled,
    )


if __name__ == "__main__":
    typer.run(main)
