"""Train the text-conditioned transformer of emoji-infinity on the bits of a trained tokenizer.

    python train_infinity.py --data ../../data --work runs/infinity --minutes 20

With several GPUs: torchrun --standalone --nproc-per-node 2 train_infinity.py ... An interrupted run goes on where its
last checkpoint was. `--minutes` is the time of training in all, compilation included; a call also takes some 40 s to
start and to write samples. Needs bsq-1.safetensors of train_bsq.py in the same folder. Writes infinity.pt (to go on
from), infinity-*.safetensors (averaged weights, float16), infinity.json and infinity.png.

Pictures are composed and encoded while training; each is used several times, with other wrong bits every time. Training
is progressive: coarse scales first, which settle what is where, then all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from toprovar_compile.models.bsq import BSQVAE
from toprovar_compile.models.emoji_infinity import EmojiInfinity, init_weights
from toprovar_compile.models.infinity_schedule import pair_tables
from toprovar_compile.models.infinity_text import TextBatch
from toprovar_compile.models.word_text import UNKNOWN, vocabulary_of

import bits
import common

STAGES = ((0.0, 3), (0.3, 0))  # (share of the run from which it holds, finest scales left out)
DROPPED_TEXT = 0.1  # share of the prompts that are replaced by the unconditional text
DROPPED_WORDS = 0.02  # share of words that are replaced by the unknown one
_EMA = 0.998
_WARM_UP = 100  # steps
_CHECKPOINT = 60.0  # seconds between checkpoints
PROMPTS = (
    "two red apples above a blue key",
    "a red apple",
    "three blue keys",
    "a green key to the left of a red apple",
    "four yellow stars on a blue background",
    "a purple car and a yellow balloon",
    "a banana below a clock",
    "two rockets on a pink background",
    "a dog next to a cat",
    "a pink rocket to the right of a guitar",
    "three bananas",
    "a birthday cake",
    "a blue heart above a red heart",
    "a crab below an umbrella",
    "grinning face",
    "thumbs up, dark skin tone",
)

Source = Callable[[int, random.Random], tuple[Tensor, list[str]]]


def begin(model: EmojiInfinity, ids: Tensor, counts: Tensor, inputs: Tensor) -> tuple[Tensor, Any, Any]:
    """What the blocks run on, of word ids (B, T), how many there are, and inputs (B, L - first, d).

    Returns tokens (B, L, C), condition with its modulation, and the text's keys, values and mask of every layer. In
    training mode some words and some whole prompts are dropped.
    """
    b, t = ids.shape
    mask = torch.arange(t, device=ids.device) < counts[:, None]
    if model.training:
        ids = torch.where(torch.rand(ids.shape, device=ids.device) < DROPPED_WORDS, UNKNOWN, ids)
    features = model.text_encoder(ids, mask)["last_hidden_state"].float()
    if model.training:
        dropped = torch.rand(b, 1, 1, device=ids.device) < DROPPED_TEXT
        features = torch.where(dropped, model.cfg_uncond[:t].float(), features)
    start = model.begin(TextBatch(features * mask[..., None], mask))
    levels = torch.arange(len(model.schedule), device=ids.device)
    tokens = torch.tensor(model.schedule.tokens, device=ids.device)
    level = levels.repeat_interleave(tokens, output_size=model.schedule.total)[1 : 1 + inputs.shape[1]]
    rest = model.word_embed(inputs).float() + model.lvl_embed.weight[level].float()
    x = torch.cat((start.x, rest), 1)
    return x, (start.cond, start.mod), (start.text_k, start.text_v, start.text_mask)


def rows_and_spans(model: EmojiInfinity, scales: int) -> tuple[tuple[Tensor, Tensor], tuple[tuple[int, int], ...]]:
    """Cosines and sines of the tokens of the first scales, and (start, end) of each."""
    cfg, schedule = model.cfg, model.schedule
    device = model.cfg_uncond.device
    tables = pair_tables(schedule, cfg.embed_dim // cfg.num_heads, cfg.rope_normalised, device)[:scales]
    cos, sin = (torch.cat([pair[i] for pair in tables], 2) for i in range(2))
    spans = [(p, p + n) for n, p in zip(schedule.tokens, schedule.prior, strict=True)]
    return (cos, sin), tuple(spans[:scales])


def teacher_forced(model: EmojiInfinity, ids: Tensor, counts: Tensor, inputs: Tensor, scales: int) -> Tensor:
    """Logits (B, L, 2 * bits) of the first scales; arguments as of `begin`."""
    rows, spans = rows_and_spans(model, scales)
    x, (cond, mod), (text_k, text_v, mask) = begin(model, ids, counts, inputs)
    for block, k, v in zip(model.blocks, text_k, text_v, strict=True):
        x, _, _ = block(x, mod, None, None, rows, (k, v, mask), spans=spans)
    return model.get_logits(x, cond)


def bit_losses(model: EmojiInfinity, x: Tensor, cond: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of bits, and mean loss and accuracy of each position, (2, L)."""
    with torch.autocast(x.device.type, enabled=False):
        logits = model.get_logits(x.float(), cond.float()).unflatten(-1, (-1, 2))
    margin = logits[..., 1] - logits[..., 0]
    loss = F.softplus(torch.where(targets, -margin, margin)).mean((0, 2))
    right = ((margin > 0) == targets).float().mean((0, 2))
    return (loss * weight).sum(), torch.stack((loss, right)).detach()


def position_weights(patch_nums: Sequence[int], device: torch.device) -> Tensor:
    """Loss weight of each position: a scale of side p counts p times, its tokens share that; the sum is 1."""
    w = torch.cat([torch.full((n * n,), 1.0 / n) for n in patch_nums])
    return (w / w.sum()).to(device)


def examples(vae: BSQVAE, model: EmojiInfinity, source: Source, rng: random.Random) -> Callable[[int], Any]:
    """What a pool makes: features (float16), word ids and their number, of n new pictures."""
    width = model.text_cfg.max_words
    device = model.cfg_uncond.device

    @torch.no_grad()
    def make(n: int) -> tuple[Tensor, ...]:
        images, prompts = source(n, rng)
        found = [model.tokenizer.ids(p, quiet=True) for p in prompts]
        ids = torch.tensor([row + [UNKNOWN] * (width - len(row)) for row in found], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = vae.encoder(common.to_float(images, device))
        return features.half(), ids, torch.tensor([len(row) for row in found], device=device)

    return make


def start_from(model: EmojiInfinity, folder: Path) -> None:
    """Start from exported weights; a word's embedding goes to the same word of this vocabulary."""
    state = bits.exported(folder, "infinity")
    words = common.read_json(folder / "infinity.json")["config"]["text"]["words"]
    old = {w: i for i, w in enumerate(words, 1)}
    ours = model.text_encoder.embed.weight.detach().clone()
    for i, word in enumerate(model.text_cfg.words, 1):
        if word in old:
            ours[i] = state["text_encoder.embed.weight"][old[word]]
    ours[UNKNOWN] = state["text_encoder.embed.weight"][UNKNOWN]
    state["text_encoder.embed.weight"] = ours
    missing = [n for n in model.state_dict() if n not in state and not n.startswith("vae.")]
    if missing:
        raise SystemExit(f"{folder} lacks {missing[0]}")
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("vae.")}, strict=False)


@torch.no_grad()
def samples(model: EmojiInfinity, prompts: Sequence[str], path: Path, columns: int, **sampling: Any) -> Tensor:
    """Generate an image of each prompt, write them as a sheet and return them on the CPU."""
    parts = [prompts[i : i + 32] for i in range(0, len(prompts), 32)]
    images = torch.cat([model(list(part), seed=i, **sampling).float().cpu() for i, part in enumerate(parts)])
    common.sheet(images, columns, path, side=min(192, images.shape[-1]))
    return images


def train(
    source: Source,
    words: Sequence[str],
    run: Path,
    *,
    tiny: bool = False,
    minutes: float = 20.0,
    steps: int = 0,
    stop_after: float = 0.0,
    tokens: int = 110_000,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-3,
    noise: float = 0.2,
    fresh: int = 24,
    pool_size: int = 8192,
    init: Path | None = None,
    stages: Sequence[tuple[float, int]] = STAGES,
    compiled: bool = True,
    prompts: Sequence[str] = PROMPTS,
) -> None:
    """Train on uint8 pictures (n, 3, H, W) and prompts that `source(n, rng)` draws; see the module for what is written.

    `fresh` pictures a step and GPU are new, the others are drawn again from the latest `pool_size`.
    """
    workers = common.Workers()
    device = workers.device
    torch.manual_seed(workers.rank)
    vae = bits.load_tokenizer(run, bits.tokenizer_config(tiny), device)
    model = bits.make_model(vocabulary_of(words), vae.cfg, tiny)
    init_weights(model)
    if init:
        start_from(model, init)
    model.vae = vae
    model.to(device)
    patch_nums = [h for h, _ in model.schedule.grids]
    trained = common.Trained(
        model, ("blocks.", "text_encoder.layers."), workers, muon_lr=muon_lr, adam_lr=adam_lr, averaging=_EMA
    )
    done, step, history, before = 0.0, 0, [], {"steps": 0, "seconds": 0.0, "images": 0}
    checkpoint = run / "infinity.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trained.load(state)
        done, history, before = state["share"], state["history"], state["spent"]
        step = before["steps"]
    first_step = step
    rng = random.Random(f"transformer/{workers.rank}/{step}")
    torch.manual_seed(1000 * (step + 1) + workers.rank)
    pool = bits.Pool(pool_size, 64, examples(vae, model, source, rng))
    blocks, losses = list(model.blocks), bit_losses
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.compile(dynamic=False)
        losses = torch.compile(bit_losses, dynamic=False)
    clock = common.Clock(minutes, steps, stop_after, done, workers, compile_counts=True)
    total = len(patch_nums)
    seen, begin_time = 0, time.perf_counter()
    saved = begin_time

    def save() -> dict[str, Any]:
        spent = {
            "steps": step,
            "seconds": before["seconds"] + time.perf_counter() - begin_time,
            "images": before["images"] + seen,
        }
        common.save(checkpoint, share=clock.share, history=history, spent=spent, **trained.state())
        constants = {n: b for n, b in model.named_buffers() if not n.startswith("vae.")}
        bits.export({**trained.average, **constants}, run, "infinity")
        report = {"share": clock.share, **spent, **common.hardware(), "config": model.to_json(), "history": history}
        common.write_json(run / "infinity.json", report)
        return {"share": clock.share, **spent}

    model.train()
    with common.progress("transformer", workers, clock, every=10.0) as update:
        while clock.running:
            left_out = next(cut for start, cut in reversed(stages) if clock.share >= start)
            scales = max(total - left_out, 2)
            grids = bits.grids_of(patch_nums[:scales])
            length = sum(model.schedule.tokens[:scales])
            batch = max(1, tokens // length // 8 * 8)
            if step > first_step:
                pool.refresh(fresh)
            features, ids, counts = pool.draw(batch)
            share = torch.rand(batch, 1, 1, 1, device=device) * noise
            share = share * (torch.rand(batch, 1, 1, 1, device=device) < 0.7)
            targets, inputs = bits.residual_bits(vae, features, grids, share)
            rows, spans = rows_and_spans(model, scales)
            with workers.autocast():
                x, (cond, mod), (text_k, text_v, mask) = begin(model, ids, counts, inputs)
                for block, k, v in zip(blocks, text_k, text_v, strict=True):
                    x, _, _ = block(x, mod, None, None, rows, (k, v, mask), spans=spans)
                loss, by_position = losses(model, x, cond, targets, position_weights(patch_nums[:scales], device))
            loss.backward()
            factor = min(1.0, (step - first_step + 1) / _WARM_UP) * common.rate(clock.share, 0.0, 0.4)
            step, seen = step + 1, seen + batch * workers.world
            trained.step(factor, step)
            clock.tick()
            if step % 20 == 0 or step <= first_step + 2:
                by_scale = common.by_scale(by_position, model.schedule.tokens[:scales])
                history.append([clock.share, *by_scale.flatten().tolist()])
                speed = seen / (time.perf_counter() - begin_time)
                loss_text = " ".join(f"{a:.3f}" for a in by_scale[:, 0].tolist())
                right = " ".join(f"{a:.2f}" for a in by_scale[:, 1].tolist())
                update(f"step {step} loss {loss.item():.4f} [{loss_text}] accuracy [{right}] {speed:.0f} images/s")
                if workers.first and time.perf_counter() - saved > _CHECKPOINT:
                    save()
                    saved = time.perf_counter()
    if not workers.first:
        workers.wait()
        return
    spent = save()
    model.load_state_dict(trained.average, strict=False)
    for block in blocks:
        block._compiled_call_impl = None  # the compiled form is that of training
    model.eval()
    if prompts:
        samples(model, prompts, run / "infinity.png", 8)
    common.console.print(spent)
    workers.wait()


def main(
    folder: common.Data = Path("data"),
    run: common.Run = Path("runs/infinity"),
    minutes: common.Minutes = 20.0,
    steps: common.Steps = 0,
    stop_after: common.StopAfter = 0.0,
    tokens: common.Tokens = 110_000,
    muon_lr: common.MuonLr = 0.02,
    adam_lr: common.AdamLr = 3e-3,
    noise: Annotated[float, typer.Option(help="Largest share of wrong bits.")] = 0.2,
    fresh: Annotated[int, typer.Option(help="Newly composed pictures a step and GPU.")] = 24,
    pool_size: Annotated[int, typer.Option("--pool", help="Pictures kept to draw from.")] = 8192,
    singles: common.Singles = 0.25,
    coarse: Annotated[float, typer.Option(help="Share of the time on the coarse scales alone.")] = 0.3,
    init: Annotated[Path | None, typer.Option(help="Folder of infinity-*.safetensors to start from.")] = None,
    cudnn: Annotated[bool, typer.Option(help="Let cuDNN compute attention where PyTorch prefers it.")] = True,
    compiled: Annotated[bool, typer.Option(help="Compile the layers.")] = True,
) -> None:
    """Train the transformer."""
    import scenes

    torch.backends.cuda.enable_cudnn_sdp(cudnn)

    composer = bits.composer(folder, common.Workers().device, singles)

    def source(n: int, rng: random.Random) -> tuple[Tensor, list[str]]:
        drawn = composer.batch(n, rng)
        return drawn.images, drawn.prompts

    grinning = [p for p in scenes.emoji_names().values() if p[0] in ("rocket", "thumbs up", "octopus", "pizza")]
    plain = random.Random(5)
    drawn = [scenes.prompt(scenes.draw_scene(plain, held_out=True)) for _ in range(44)]
    train(
        source,
        scenes.all_words(),
        run,
        minutes=minutes,
        steps=steps,
        stop_after=stop_after,
        tokens=tokens,
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        noise=noise,
        fresh=fresh,
        pool_size=pool_size,
        init=init,
        stages=((0.0, STAGES[0][1]), (coarse, 0)),
        compiled=compiled,
        prompts=[*PROMPTS, *(p[0] for p in grinning), *drawn],
    )


if __name__ == "__main__":
    typer.run(main)
