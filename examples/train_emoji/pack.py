"""Write a trained run as the weights folder that the package ships.

    python pack.py --data ../../data --work runs/emoji --out ../../toprovar_compile/models/weights/emoji_var

`--weights-only` writes the safetensors alone, in shards, to carry a run from one machine to another. `--earlier` names
a run whose packed weights this one started from (`--init`); its training goes into the model card too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from toprovar_compile.models.var import VAR

import common
import data
from evaluate import DEFAULT

CARD = """# emoji-VAR

A class-conditional visual autoregressive model of 3D emoji at 256x256: {parameters:.1f} M parameters, {depth} layers of
width {width}, {scales} scales up to {side}x{side} tokens ({tokens} tokens), {classes} classes, a multi-scale VQ-VAE
with {codes} codes. It exists to develop and demonstrate `torch.compile(model, backend="toprovar")`.

- Weights: `model.safetensors`, float16. Fingerprint `{fingerprint}`; sha256 of `config.json`: `{config_hash}`.
- Default sampling: {sampling}.
- Licence of the weights: Apache-2.0, as the rest of the package.

## Data
All {classes} renders of the npm package `@lobehub/fluent-emoji-3d` 1.1.0 (MIT), which packages Microsoft's Fluent Emoji
(MIT), composited on white; class i is file i in sorted order. One image a class: the model is meant to know these
pictures, not to invent others. `classes.json` has the names, made from Unicode's. No other data was used.

## Training
Scripts: `examples/train_emoji`. bfloat16, data-parallel. Minutes are wall time of training, compilation included.

{training}

![loss curves](loss.png)

## Quality
Reconstruction by the VQ-VAE through all scales, every image of the data: {psnr:.2f} dB PSNR (worst twentieth below
{psnr_low:.2f} dB). Left after the first scales only: {psnr_cut}.

![renders and their reconstructions](reconstruction.png)

A small CNN, trained on augmented renders alone ({judge_top1:.1%} top-1 and {judge_top5:.1%} top-5 on the renders
themselves), names the generated emoji:

| sampling | generated classes | top-1 | top-5 | top-1 up to skin tone | PSNR to the render |
|---|---|---|---|---|---|
{quality}

With right pictures under wrong labels it answers {wrong:.1%} in its top five. Skin-tone variants look alike, hence the
column that counts all tones of an emoji as one. Samples of the default setting, classes drawn at random:

![samples](samples.png)

## Limits
Small text, thin lines, faces at small size and the finest texture are blurred or wrong. The uncertain fine scales give
some images coloured specks. It knows nothing but these pictures.
"""


def write_weights(model: VAR, out: Path, shard_mib: float = 0.0) -> None:
    """Write model.safetensors in float16, or shards model-1.safetensors, ... of at most `shard_mib` MiB."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if shard_mib and size + half.nbytes > shard_mib * 2**20:
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    for i, shard in enumerate(shards, 1):
        path = out / (f"model-{i}.safetensors" if shard_mib else "model.safetensors")
        save_file(shard, path)
        path.chmod(0o644)


def draw_losses(runs: list[Path], patch_nums: tuple[int, ...], path: Path) -> None:
    """Plot what the tokenizer and the transformer logged, earlier runs before later ones. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    x = 0
    for run in runs:
        rows = _read(run / "tokenizer.json")["history"]
        left.plot(range(x, x + len(rows)), [r[3] for r in rows], color="tab:blue")
        x += len(rows)
        left.axvline(x, color="0.8")
    left.set(title="VQ-VAE: PSNR of training batches, dB", xlabel="20 steps")
    x = 0
    for run in runs:
        rows = _read(run / "var.json")["history"]
        for s, pn in enumerate(patch_nums):
            points = [(x + i, r[1 + 2 * s]) for i, r in enumerate(rows) if s < (len(r) - 1) // 2]
            label = f"{pn}x{pn}" if run == runs[-1] else None
            right.plot([p[0] for p in points], [p[1] for p in points], color=f"C{s}", label=label, linewidth=1)
        x += len(rows)
        right.axvline(x, color="0.8")
    right.set(title="Transformer: cross-entropy of each scale, nats a token", xlabel="25 steps", ylim=(0, 7))
    right.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def card(model: VAR, run: Path, earlier: list[Path], config_hash: str) -> str:
    """The text of MODEL_CARD.md."""
    tokenizer, judge, quality = (_read(run / f"{n}.json") for n in ("tokenizer", "classifier", "quality"))
    cuts = sorted(((int(k), v) for k, v in tokenizer["psnr_mean_db_by_scales_kept"].items()), reverse=True)[1:]
    rows = []
    for row in quality["settings"]:
        score = " | ".join(f"{row[k]:.1%}" for k in ("top1", "top5", "top1_base"))
        count = row.get("classes_generated", quality["classes_generated"])
        rows.append(f"| {_words(row['sampling'])} | {count} | {score} | {row['psnr_to_render_db']:.2f} dB |")
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        depth=model.cfg.depth,
        width=model.cfg.embed_dim,
        scales=len(model.cfg.patch_nums),
        side=model.cfg.patch_nums[-1],
        tokens=model.schedule.total,
        classes=model.cfg.num_classes,
        codes=model.cfg.vae.vocab_size,
        fingerprint=model.fingerprint(),
        config_hash=config_hash,
        sampling=_words(DEFAULT),
        training="\n".join(_training(r) for r in [*earlier, run]),
        psnr=tokenizer["psnr_mean_db"],
        psnr_low=tokenizer["psnr_p05_db"],
        psnr_cut=", ".join(f"{v:.2f} dB after {k}" for k, v in cuts),
        judge_top1=judge["top1_renders"],
        judge_top5=judge["top5_renders"],
        quality="\n".join(rows),
        wrong=quality["wrong_labels"]["top5"],
    )


def _training(run: Path) -> str:
    lines = []
    for what, name in (("VQ-VAE", "tokenizer"), ("Transformer", "var")):
        r = _read(run / f"{name}.json")
        lines.append(
            f"- {what}: {r['steps']:,} steps in {r['seconds'] / 60:.1f} minutes on {r['gpus']} x {r['gpu']} "
            f"(torch {r['torch']})."
        )
    return "\n".join(lines)


def _words(sampling: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in sampling.items())


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder with the npm package file.")] = Path("data"),
    run: Annotated[Path, typer.Option("--work", help="Folder of the trained run.")] = Path("runs/emoji"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("weights"),
    earlier: Annotated[list[Path] | None, typer.Option(help="Runs that this one started from, in order.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Write only the weights, in shards.")] = False,
) -> None:
    """Pack a run."""
    model = common.load_model(run, torch.device("cpu"))
    write_weights(model, out, shard_mib=15.0 if weights_only else 0.0)
    if weights_only:
        return
    common.write_json(out / "config.json", {"model": common.config_json(model.cfg), "sampling": DEFAULT})
    classes = [{"name": c.name, "code": c.code, "base": c.base} for c in data.load(folder).classes]
    (out / "classes.json").write_text("[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in classes) + "\n]\n")
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})  # as it will be loaded
    shutil.copy(run / "tokenizer.png", out / "reconstruction.png")
    shutil.copy(run / "samples.png", out / "samples.png")
    draw_losses([*(earlier or []), run], model.cfg.patch_nums, out / "loss.png")
    config_hash = hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
    (out / "MODEL_CARD.md").write_text(card(model, run, earlier or [], config_hash))


if __name__ == "__main__":
    typer.run(main)
