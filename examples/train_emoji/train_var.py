"""Train the transformer of emoji-VAR on the token maps of a trained tokenizer.

    python train_var.py --data ../../data --work runs/emoji --minutes 24

With several GPUs: torchrun --standalone --nproc-per-node 2 train_var.py ... An interrupted run goes on where its last
checkpoint was. Training is progressive: coarse scales first, then all. Tokens of earlier scales are replaced at random
and the residual is recomputed, so that later scales learn to repair what sampling gets wrong (as in Infinity,
arXiv 2412.04431).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAE, MultiScaleQuantizer

import common
import data

# (share of the run from which it holds, finest scales left out)
STAGES = ((0.0, 2), (0.25, 0))
_NEIGHBOURS = 8
_EMA = 0.995


@torch.no_grad()
def encode_features(vae: VQVAE, images: Tensor, device: torch.device, batch: int = 128) -> Tensor:
    """Encoder features of uint8 images, float32 (N, C, h, w) on the device."""
    parts = [common.to_float(images[i : i + batch], device) for i in range(0, len(images), batch)]
    return torch.cat([vae.quant_conv(vae.encoder(x)).float() for x in parts])


def principal_components(features: Tensor, size: int) -> Tensor:
    """Coordinates of each row's features along their `size` main directions, half-whitened, RMS 1: (N, size)."""
    x = features.flatten(1)
    x = x - x.mean(0)
    rank = min(size, *x.shape)
    u, s, _ = torch.svd_lowrank(x, q=rank, niter=4)
    out = F.pad(u * s.sqrt(), (0, size - rank))
    return out / out.square().mean().sqrt()


@torch.no_grad()
def init_model(model: VAR, features: Tensor) -> None:
    """Initialise the transformer; each class starts from the principal components of its own image's features."""
    model.init_weights()
    weight = model.shared_ada_lin[1].weight  # type: ignore[index]
    nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
    weight[: 2 * model.cfg.embed_dim] *= 0.2  # type: ignore[index, operator]
    for block in model.blocks:
        block.ada_gss[:, :, :2] = 0.5  # type: ignore[index, operator]
    model.class_emb.weight[:-1] = principal_components(features, model.cfg.embed_dim)
    model.class_emb.weight[-1] = 0.0


@torch.no_grad()
def noisy_tokens(
    quantize: MultiScaleQuantizer, features: Tensor, neighbours: Tensor, noise: float, scales: int
) -> tuple[Tensor, Tensor]:
    """Targets (B, L) and transformer inputs (B, L - first, C) of the first `scales` scales.

    Half of the samples get errors: a random share, up to `noise`, of their tokens is replaced by close or, one time in
    five, arbitrary codes in what the finer scales see. Targets are always the best codes for the residual as it is.
    """
    b, c, side, _ = features.shape
    device, codes = features.device, len(neighbours)
    share = torch.rand(b, 1, device=device) * noise * (torch.rand(b, 1, device=device) < 0.5)
    rest, f_hat = features.clone(), torch.zeros_like(features)
    targets, inputs = [], []
    for s, pn in enumerate(quantize.patch_nums[:scales]):
        z = F.interpolate(rest, size=(pn, pn), mode="area") if pn != side else rest
        idx = quantize.nearest(z.permute(0, 2, 3, 1).reshape(-1, c)).view(b, pn * pn)
        targets.append(idx)
        if s + 1 == scales:
            break
        close = neighbours[idx, torch.randint(neighbours.shape[1], idx.shape, device=device)]
        anything = torch.randint(codes, idx.shape, device=device)
        wrong = torch.where(torch.rand(idx.shape, device=device) < 0.2, anything, close)
        idx = torch.where(torch.rand(idx.shape, device=device) < share, wrong, idx)
        h = quantize.embedding(idx).transpose(1, 2).reshape(b, c, pn, pn)
        step = quantize.contribution(h, s, (side, side))
        f_hat, rest = f_hat + step, rest - step
        nxt = quantize.patch_nums[s + 1]
        pooled = F.interpolate(f_hat, size=(nxt, nxt), mode="area") if nxt != side else f_hat
        inputs.append(pooled.flatten(2).transpose(1, 2))
    return torch.cat(targets, 1), torch.cat(inputs, 1)


def token_losses(model: VAR, x: Tensor, cond: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy, and mean loss and accuracy of each position, (2, L)."""
    logits = model.get_logits(x, cond)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(0)
    right = (logits.argmax(-1) == targets).float().mean(0)
    return (loss * weight).sum(), torch.stack((loss, right)).detach()


def position_weights(cfg: VARConfig, scales: int, device: torch.device) -> Tensor:
    """Loss weight of each position: a scale of side p counts p times, its tokens share that; the sum is 1."""
    w = torch.cat([torch.full((pn * pn,), 1.0 / pn) for pn in cfg.patch_nums[:scales]])
    return (w / w.sum()).to(device)


@torch.no_grad()
def samples(model: VAR, labels: Tensor, path: Path, columns: int, **sampling: float) -> Tensor:
    """Generate images of the labels, write them as a sheet and return them on the CPU."""
    images = torch.cat([model(part, seed=0, **sampling).float().cpu() for part in labels.split(64)])  # type: ignore[arg-type]
    common.sheet(images, columns, path)
    return images


def train(
    images: Tensor,
    cfg: VARConfig,
    run: Path,
    *,
    minutes: float = 24.0,
    steps: int = 0,
    stop_after: float = 0.0,
    tokens: int = 140_000,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-3,
    noise: float = 0.15,
    init: Path | None = None,
    compiled: bool = True,
) -> None:
    """Train on uint8 images (N, 3, H, W), image i being class i; writes run/var.pt, its metrics and a sample sheet."""
    workers = common.Workers()
    device = workers.device
    torch.manual_seed(workers.rank)
    vae = common.load_tokenizer(run, device)
    features = encode_features(vae, images, device)
    book = vae.quantize.embedding.weight
    neighbours = torch.cdist(book, book).topk(min(_NEIGHBOURS + 1, len(book)), largest=False).indices[:, 1:]
    model = VAR(cfg).to(device)
    if init:
        common.warm_start(model, init)
    else:
        init_model(model, features)
    model.vae.load_state_dict(vae.state_dict())
    model.vae.requires_grad_(False)
    trained = common.Trained(model, ("blocks.",), workers, muon_lr=muon_lr, adam_lr=adam_lr, averaging=_EMA)
    done, step, history, before = 0.0, 0, [], {"steps": 0, "seconds": 0.0, "images": 0}
    checkpoint = run / "var.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trained.load(state)
        done, history, before = state["share"], state["history"], state["spent"]
        step = before["steps"]
    blocks = list(model.blocks)
    losses = token_losses
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.compile(dynamic=False)
        losses = torch.compile(token_losses, dynamic=False)
    clock = common.Clock(minutes, steps, stop_after, done, workers)
    total = len(cfg.patch_nums)
    seen, begin = 0, time.perf_counter()
    model.train()
    with common.progress("transformer", workers, clock) as update:
        while clock.running:
            left_out = next(cut for start, cut in reversed(STAGES) if clock.share >= start)
            scales = max(total - left_out, 2)
            length = sum(model.schedule.tokens[:scales])
            batch = max(1, tokens // length // 8 * 8)
            picked = torch.randint(len(images), (batch,), device=device)
            targets, inputs = noisy_tokens(vae.quantize, features[picked], neighbours, noise, scales)
            with workers.autocast():
                x, cond, mod, spans = model.teacher_begin(picked, inputs)
                for block in blocks:
                    x, _, _ = block(x, mod, None, None, spans)
                loss, by_position = losses(model, x, cond, targets, position_weights(cfg, scales, device))
            loss.backward()
            factor = common.rate(clock.share, 0.01, 0.4)
            step, seen = step + 1, seen + batch * workers.world
            trained.step(factor, step)
            clock.tick()
            if step % 25 == 0:
                by_scale = common.by_scale(by_position, model.schedule.tokens[:scales])
                history.append([clock.share, *by_scale.flatten().tolist()])
                speed = seen / (time.perf_counter() - begin)
                accuracy = " ".join(f"{a:.2f}" for a in by_scale[:, 1].tolist())
                update(f"step {step} loss {loss.item():.3f} accuracy {accuracy} {speed:.0f} images/s")
    if not workers.first:
        workers.wait()
        return
    seconds = time.perf_counter() - begin
    spent = {
        "steps": step,
        "seconds": before["seconds"] + seconds,
        "images": before["images"] + seen,
    }
    parts = {"history": history, "spent": spent, "config": cfg.to_json()}
    common.save(checkpoint, share=clock.share, **parts, **trained.state())
    common.write_json(run / "var.json", {"share": clock.share, **spent, **common.hardware(), "history": history})
    model = common.load_model(run, device)
    labels = torch.arange(64, device=device) * len(images) // 64 + len(images) // 128
    with workers.autocast():
        samples(model, labels, run / "var.png", 8, cfg=2.0, top_k=10)
    common.console.print({"share": clock.share, **spent})
    workers.wait()


def main(
    folder: common.Data = Path("data"),
    run: common.Run = Path("runs/emoji"),
    minutes: common.Minutes = 24.0,
    steps: common.Steps = 0,
    stop_after: common.StopAfter = 0.0,
    tokens: common.Tokens = 140_000,
    muon_lr: common.MuonLr = 0.02,
    adam_lr: common.AdamLr = 3e-3,
    noise: Annotated[float, typer.Option(help="Largest share of replaced tokens.")] = 0.15,
    init: common.Packed = None,
) -> None:
    """Train the transformer."""
    emoji = data.load(folder)
    cfg = common.emoji_config(len(emoji.classes))
    train(
        emoji.images,
        cfg,
        run,
        minutes=minutes,
        steps=steps,
        stop_after=stop_after,
        tokens=tokens,
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        noise=noise,
        init=init,
    )


if __name__ == "__main__":
    typer.run(main)
