"""Train the multi-scale VQ-VAE on the emoji renders.

    python train_tokenizer.py --data ../../data --work runs/emoji --minutes 5

With several GPUs: torchrun --standalone --nproc-per-node 2 train_tokenizer.py ... An interrupted run goes on where its
last checkpoint was.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from toprovar_compile.models.var import VARConfig
from toprovar_compile.models.vqvae import VQVAE

import common
import data

_PLAIN_SHARE = 0.12  # share of the run without quantisation, before the codebook is initialised
_REVIVE_UNTIL = 0.7  # share of the run
_UNCHANGED = 0.75  # share of the images that are not augmented
_CUT = 0.5  # share of the images decoded from a random number of scales, so that leaving early looks well


def image_loss(out: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 on pixels and L1 on their horizontal and vertical differences."""
    d = out.float() - x
    edges = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
    return d.abs().mean() + 2 * d.square().mean() + 0.5 * edges


@torch.no_grad()
def init_codebook(vae: VQVAE, features: Tensor) -> None:
    """Set the codebook to k-means centres of the residuals that area-pooling leaves at each scale of the features."""
    quantize, size = vae.quantize, vae.cfg.vocab_size
    rest, pool = features.float(), []
    for pn in quantize.patch_nums:
        z = F.interpolate(rest, size=(pn, pn), mode="area")
        rest = rest - F.interpolate(z, size=rest.shape[-2:], mode="bicubic")
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        pool.append(rows[torch.randperm(len(rows), device=rows.device)[: 8 * size]])
    rows = torch.cat(pool)
    centres = rows[torch.randint(len(rows), (size,), device=rows.device)]
    for _ in range(12):
        nearest = torch.cdist(rows, centres).argmin(1)
        count = torch.bincount(nearest, minlength=size).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        fresh = rows[torch.randint(len(rows), (size,), device=rows.device)]
        centres = torch.where(count > 0, sums / count.clamp_min(1), fresh)
    quantize.embedding.weight.copy_(centres)


@torch.no_grad()
def revive(vae: VQVAE, usage: Tensor, features: Tensor) -> int:
    """Move codes that are hardly used to residuals of random scales; the number moved."""
    dead = usage < 0.02 * usage.mean()
    quantize = vae.quantize
    _, _, indices = quantize(features[:16])
    rest, rows = features[:16].float(), []
    for s, (pn, idx) in enumerate(zip(quantize.patch_nums, indices, strict=True)):
        z = F.interpolate(rest, size=(pn, pn), mode="area")
        rows.append(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
        h = quantize.embedding(idx).transpose(1, 2).reshape(len(idx), -1, pn, pn)
        rest = rest - quantize.contribution(h, s, (rest.shape[-2], rest.shape[-1]))
    pool = torch.cat(rows)
    picked = pool[torch.randint(len(pool), (len(dead),), device=pool.device)]
    quantize.embedding.weight.copy_(torch.where(dead.unsqueeze(1), picked, quantize.embedding.weight))
    return int(dead.sum())


@torch.no_grad()
def evaluate(vae: VQVAE, images: Tensor, device: torch.device, batch: int = 128) -> tuple[dict[str, object], Tensor]:
    """PSNR of all images through the quantiser, also cut after each of the last four scales, and the token counts."""
    scales = len(vae.cfg.patch_nums)
    values: dict[int, list[Tensor]] = {k: [] for k in range(scales, max(scales - 4, 0), -1)}
    hits = torch.zeros(scales, vae.cfg.vocab_size, device=device)
    for start in range(0, len(images), batch):
        x = common.to_float(images[start : start + batch], device)
        f = vae.quant_conv(vae.encoder(x)).float()
        for k, kept in values.items():
            f_hat, _, indices = vae.quantize(f, torch.full((len(x),), k, device=device))
            kept.append(common.psnr_of(vae.decode(f_hat), (x + 1) / 2).cpu())
        for s, idx in enumerate(indices):
            hits[s] += torch.bincount(idx.flatten(), minlength=vae.cfg.vocab_size)
    psnr = {k: torch.cat(v) for k, v in values.items()}
    usage = hits.sum(0) / hits.sum()
    report = {
        "psnr_mean_db": float(psnr[scales].mean()),
        "psnr_p05_db": float(psnr[scales].quantile(0.05)),
        "psnr_min_db": float(psnr[scales].min()),
        "psnr_mean_db_by_scales_kept": {str(k): float(v.mean()) for k, v in psnr.items()},
        "codes_used": int((usage > 0).sum()),
        "code_perplexity": float((-usage * usage.clamp_min(1e-12).log()).sum().exp()),
        "images": len(images),
    }
    return report, hits


def train(
    images: Tensor,
    cfg: VARConfig,
    run: Path,
    *,
    minutes: float = 5.0,
    steps: int = 0,
    stop_after: float = 0.0,
    batch: int = 24,
    lr: float = 5e-4,
    init: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train on uint8 images (N, 3, H, W); writes run/tokenizer.pt and, when complete, its report and sheet."""
    workers = common.Workers()
    device = workers.device
    torch.manual_seed(workers.rank)
    vae = VQVAE(cfg.vae).to(device)
    if init:
        common.warm_start(vae, init, "vae.")
    workers.same(*vae.parameters())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=workers.cuda)
    done, history = 0.0, []
    checkpoint = run / "tokenizer.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, history = state["share"], state["history"]
    images = images.to(device)
    usage = torch.ones(cfg.vae.vocab_size, device=device)
    clock = common.Clock(minutes, steps, stop_after, done, workers)
    encoder, decoder = vae.encoder, vae.decoder
    started = init is not None or done > _PLAIN_SHARE
    if compiled:
        encoder = torch.compile(vae.encoder, dynamic=False)
        decoder = torch.compile(vae.decoder, dynamic=False)
    count, seen, begin = 0, 0, time.perf_counter()
    with common.progress("tokenizer", workers, clock) as update:
        while clock.running:
            x = common.to_float(images[torch.randint(len(images), (batch,), device=device)], device)
            changed = common.augment(x, shift=0.1, scale=0.2, turn=10, flip=True, hue=20)
            plain = torch.rand(batch, device=device) < _UNCHANGED
            x = torch.where(plain.view(-1, 1, 1, 1), x, changed)
            with workers.autocast():
                f = vae.quant_conv(encoder(x))
            f = f.float()
            if not started and clock.share > _PLAIN_SHARE:
                init_codebook(vae, f.detach())
                workers.same(vae.quantize.embedding.weight.data)
                started = True
            if started:
                scales = len(cfg.patch_nums)
                cut = torch.randint(max(scales - 4, 1), scales + 1, (batch,), device=device)
                kept = torch.where(torch.rand(batch, device=device) < _CUT, cut, scales)
                f_hat, vq_loss, indices = vae.quantize(f, kept)
            else:
                f_hat, vq_loss, indices = f, 0.01 * f.square().mean(), []
            with workers.autocast():
                out = decoder(vae.post_quant_conv(f_hat))
            pixel_loss = image_loss(out, x)
            (pixel_loss + vq_loss).backward()
            grads = [p.grad for p in vae.parameters() if p.grad is not None]
            workers.average(grads)
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = lr * common.rate(clock.share, 0.02, 0.4)
            optimizer.step()
            optimizer.zero_grad()
            if indices:
                now = torch.bincount(torch.cat(indices, 1).flatten(), minlength=len(usage)).float()
                workers.average([now])
                usage.lerp_(now, 0.02 if count > 50 else 0.2)
            count, seen = count + 1, seen + batch * workers.world
            if started and count % 50 == 0 and clock.share < _REVIVE_UNTIL:
                revive(vae, usage, f.detach())
                workers.same(vae.quantize.embedding.weight.data)
            clock.tick()
            if count % 20 == 0:
                mse = (out.detach().float() - x).square().mean() / 4
                values = torch.stack((pixel_loss.detach(), vq_loss.detach(), -10 * mse.log10()))
                row = [clock.share, *values.tolist()]
                history.append(row)
                speed = seen / (time.perf_counter() - begin)
                update(f"step {count} psnr {row[3]:.2f} loss {row[1]:.4f} vq {row[2]:.4f} {speed:.0f} images/s")
    if not workers.first:
        workers.wait()
        return
    vae.eval()
    report, hits = evaluate(vae, images, device)
    vae.quantize.ema_vocab_hit_SV.copy_(hits)
    parts = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    common.save(checkpoint, share=clock.share, config=cfg.to_json(), **parts)
    seconds = time.perf_counter() - begin
    report |= {"seconds": seconds, "steps": count, "images_per_second": seen / seconds, **common.hardware()}
    common.write_json(run / "tokenizer.json", report | {"history": history})
    with torch.no_grad():
        x = common.to_float(images[:: max(1, len(images) // 32)][:32], device)
        out = vae.decode(vae.quantize(vae.quant_conv(vae.encoder(x)))[0])
        pairs = torch.stack(((x + 1) / 2, out), 1).flatten(0, 1)
    common.sheet(pairs, 16, run / "tokenizer.png")
    common.console.print({k: v for k, v in report.items() if k != "history"})
    workers.wait()


def main(
    folder: common.Data = Path("data"),
    run: common.Run = Path("runs/emoji"),
    minutes: common.Minutes = 5.0,
    steps: common.Steps = 0,
    stop_after: common.StopAfter = 0.0,
    batch: Annotated[int, typer.Option(help="Images a step and GPU.")] = 24,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    init: common.Packed = None,
    compiled: Annotated[
        bool, typer.Option(help="Compile encoder and decoder: pays off after some ten minutes.")
    ] = False,
) -> None:
    """Train the multi-scale VQ-VAE."""
    emoji = data.load(folder)
    cfg = common.emoji_config(len(emoji.classes))
    train(
        emoji.images,
        cfg,
        run,
        minutes=minutes,
        steps=steps,
        stop_after=stop_after,
        batch=batch,
        lr=lr,
        init=init,
        compiled=compiled,
    )


if __name__ == "__main__":
    typer.run(main)
