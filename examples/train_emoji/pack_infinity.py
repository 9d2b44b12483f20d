"""Write a trained emoji-infinity as the weights folder that the package ships.

    python pack_infinity.py --work runs/infinity --out ../../toprovar_compile/models/weights/emoji_infinity

Reads the exports infinity-*.safetensors, infinity.json, bsq-*.safetensors and bsq.json of a run and, where they are
there, its pictures. Weights are int8 with a factor a row. `--earlier` names a folder of an earlier call's infinity.json
or bsq.json; its training goes into the model card too.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from toprovar_compile.models.emoji_infinity import EmojiInfinity
from toprovar_compile.models.loading import load_folder
from toprovar_compile.models.packed import pack

import bits
import common

CARD = """# emoji-infinity

A text-to-image model of 3D emoji scenes at {pixels}x{pixels} on the architecture of Infinity (arXiv 2412.04431): a
bitwise transformer with cross-attention to the prompt, {depth} layers of width {width}, {scales} scales up to
{side}x{side} tokens ({tokens} tokens of {bits} bits), a multi-scale binary-spherical tokenizer, and a text encoder over
{words:,} whole words. {parameters:.1f} M parameters. It exists to develop and demonstrate
`torch.compile(model, backend="toprovar")` on text-to-image generation.

- Weights: `model.safetensors`, {size:.1f} MiB: int8 with a float16 factor for each row, else float16. Fingerprint
  `{fingerprint}`; sha256 of `config.json`: `{config_hash}`. {encoder}
- Default sampling: {sampling}.
- Licence of the weights: Apache-2.0, as the rest of the package.

## Data
Pictures composed by `examples/train_emoji/scenes.py` from the renders of the npm package `@lobehub/fluent-emoji-3d`
1.1.0 (MIT), which packages Microsoft's Fluent Emoji (MIT): one or two groups of up to four equal objects, recoloured or
not, in a spatial relation, on a plain ground; and single emoji by their Unicode names. Prompts are made by the same
script. Some compositions are never shown in training; EmojiEval asks for them. No other data was used.

## Training
Scripts: `examples/train_emoji`. bfloat16, data-parallel. Minutes are wall time of training, compilation included.

{training}

## Quality
Reconstruction of {images} composed pictures by the tokenizer through all scales: {psnr:.2f} dB PSNR (worst twentieth
below {psnr_low:.2f} dB). Left after the first scales only: {psnr_cut}. Accuracy of bits that the transformer guesses,
scale by scale, at the end of training: {accuracy}.
{pictures}
## Limits
It knows the words of its prompts' grammar and of the emoji names; any other word is one unknown word to it. Small text,
thin lines and faces at small size are blurred or wrong. More than four equal objects, more than two groups, and other
relations than left, right, above, below and beside were never shown to it.
"""


def load_run(run: Path) -> EmojiInfinity:
    """The exported model of a run with its tokenizer, on the CPU, in eval mode."""
    model = EmojiInfinity.from_json(common.read_json(run / "infinity.json")["config"])
    state = bits.exported(run, "infinity")
    state |= {f"vae.{k}": v for k, v in bits.exported(run, "bsq").items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def example_prompts(count: int = 400) -> list[str]:
    """Prompts as training draws them, to calibrate and tune with."""
    import scenes

    rng = random.Random("examples")
    return [scenes.prompt(scenes.draw_scene(rng), rng) for _ in range(count)]


def write_model(model: EmojiInfinity, out: Path, prompts: list[str], *, encoder: bool) -> None:
    """Write model.safetensors, config.json and prompts.json."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if encoder or not k.startswith("vae.encoder.")}
    save_file(pack(state), out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    common.write_json(out / "config.json", model.to_json() | {"encoder": encoder})
    common.write_json(out / "prompts.json", prompts)


def card(model: EmojiInfinity, run: Path, earlier: list[Path], out: Path, encoder: bool) -> str:
    """The text of MODEL_CARD.md."""
    tokenizer, transformer = common.read_json(run / "bsq.json"), common.read_json(run / "infinity.json")
    cuts = sorted(((int(k), v) for k, v in tokenizer["psnr_mean_db_by_scales_kept"].items()), reverse=True)[1:]
    last = transformer["history"][-1][1:]
    text = [("reconstruction.png", "pictures and their reconstructions"), ("samples.png", "samples")]
    side = model.schedule.grids[-1][0]
    return CARD.format(
        pixels=side * model.vae.patch_size,
        depth=model.cfg.depth,
        width=model.cfg.embed_dim,
        scales=len(model.schedule),
        side=side,
        tokens=model.schedule.total,
        bits=model.cfg.bits,
        words=len(model.text_cfg.words),
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        size=(out / "model.safetensors").stat().st_size / 2**20,
        fingerprint=model.fingerprint(),
        config_hash=hashlib.sha256((out / "config.json").read_bytes()).hexdigest(),
        encoder="" if encoder else "The tokenizer's encoder, which generation does not need, is left out.",
        sampling=", ".join(f"{k} {v}" for k, v in asdict(model.sampling).items()),
        training="\n".join(line for r in [*earlier, run] for line in _training(r)),
        images=tokenizer["images"],
        psnr=tokenizer["psnr_mean_db"],
        psnr_low=tokenizer["psnr_p05_db"],
        psnr_cut=", ".join(f"{v:.2f} dB after {k}" for k, v in cuts),
        accuracy=", ".join(f"{a:.2f}" for a in last[1::2]),
        pictures="".join(f"\n![{words}]({name})\n" for name, words in text if (out / name).exists()),
    )


def _training(run: Path) -> list[str]:
    out = []
    for what, name in (("Tokenizer", "bsq"), ("Transformer", "infinity")):
        if (run / f"{name}.json").exists():
            r = common.read_json(run / f"{name}.json")
            out.append(
                f"- {what}: {r['steps']:,} steps in {r['seconds'] / 60:.1f} minutes on {r['gpus']} x {r['gpu']} "
                f"(torch {r['torch']})."
            )
    return out


def main(
    run: Annotated[Path, typer.Option("--work", help="Folder of the trained run.")] = Path("runs/infinity"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("weights"),
    cfg: Annotated[float | None, typer.Option(help="Default guidance strength, if not the run's.")] = None,
    tau: Annotated[float | None, typer.Option(help="Default temperature, if not the run's.")] = None,
    encoder: Annotated[bool, typer.Option("--encoder", help="Ship the tokenizer's encoder too.")] = False,
    earlier: Annotated[list[Path] | None, typer.Option(help="Runs that this one started from, in order.")] = None,
) -> None:
    """Pack a run."""
    model = load_run(run)
    given: dict[str, Any] = {k: v for k, v in (("cfg", cfg), ("tau", tau)) if v is not None}
    model.sampling = replace(model.sampling, **given)
    write_model(model, out, example_prompts(), encoder=encoder)
    for name, kept in (("bsq.png", "reconstruction.png"), ("infinity.png", "samples.png")):
        if (run / name).exists():
            with Image.open(run / name) as picture:  # 256 colours: a third of the size
                picture.convert("RGB").quantize(256).save(out / kept, optimize=True)
    packed = load_folder(out)  # the fingerprint is that of the weights as they will be loaded
    assert isinstance(packed, EmojiInfinity)
    with torch.no_grad():
        (out / "MODEL_CARD.md").write_text(card(packed, run, earlier or [], out, encoder))
    print(f"{(out / 'model.safetensors').stat().st_size / 2**20:.1f} MiB in {out}")


if __name__ == "__main__":
    typer.run(main)
