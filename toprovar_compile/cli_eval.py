"""The command `toprovar eval`: what official evaluators need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from toprovar_compile.cli_bench import Device, Seed
from toprovar_compile.errors import OptionError

if TYPE_CHECKING:
    from toprovar_compile.evaluate.export import Generator

app = typer.Typer(no_args_is_help=True, help="Images for the evaluators of other projects.")


@app.callback()
def _group() -> None:
    """Images for the evaluators of other projects."""


@app.command()
def export(
    benchmark: Annotated[str, typer.Argument(help="geneval, dpg, hpsv2, imagereward or mjhq.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="The benchmark's prompt file; a folder for dpg.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    generate: Annotated[
        str | None, typer.Option("--generate", help="module:function of (prompt, seed) that makes an image.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Shipped model, compiled, when there is no --generate.")
    ] = "emoji-var",
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images of each prompt.")] = None,
    shard: Annotated[str, typer.Option("--shard", help="i/n: every n-th prompt from the i-th on.")] = "0/1",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write the folder that an official evaluator reads; an interrupted run goes on where it stopped."""
    from toprovar_compile.evaluate import export as exporting

    maker = exporting.find_generator(generate) if generate else _shipped(model, device)
    made = exporting.export(benchmark, prompts, out, maker, samples=samples, seed=seed, shard=_shard(shard))
    Console().print(f"wrote {made} images into {out}", highlight=False)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal()):
        raise OptionError(f"cannot read {text!r}", where="--shard", expected="i/n, such as 0/4")
    return int(first), int(count)


def _shipped(name: str, device: str) -> Generator:
    """A shipped class-conditional model, which knows prompts that name its classes."""
    import torch

    from toprovar_compile import measure, models

    target = measure.pick_device(device)
    network = models.load(name, device=target)
    fast = torch.compile(network, backend="toprovar")

    def make(prompt: str, seed: int) -> torch.Tensor:
        labels = torch.tensor([models.find_class(prompt, name)[0]], device=target)
        with torch.no_grad(), measure.autocast(target):
            images: torch.Tensor = fast(labels, seed=seed)
        return images[0]

    return make
