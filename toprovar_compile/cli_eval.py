"""The command `toprovar eval`: EmojiEval, and what official evaluators need."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from toprovar_compile.cli_bench import Device, Seed
from toprovar_compile.errors import OptionError

if TYPE_CHECKING:
    import torch

    from toprovar_compile.evaluate.emoji_run import Generate
    from toprovar_compile.evaluate.export import Generator
    from toprovar_compile.plan import Plan

app = typer.Typer(no_args_is_help=True, help="EmojiEval, and images for the evaluators of other projects.")


@app.callback()
def _group() -> None:
    """EmojiEval, and images for the evaluators of other projects."""


@app.command()
def emoji(
    model: Annotated[str, typer.Option("--model", help="Shipped model that takes prompts.")] = "emoji-infinity",
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan", help="dense, auto, a plan file or keep=0.4,from=8; repeatable. The first is the reference."
        ),
    ] = None,
    every: Annotated[int, typer.Option("--prompts", min=1, help="Take every so many of the 553 prompts.")] = 1,
    images: Annotated[int, typer.Option("--images", min=1, help="Images of each prompt.")] = 4,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images generated at once.")] = 1,
    backend: Annotated[str, typer.Option("--backend", help="toprovar, or eager, which compiles nothing.")] = "toprovar",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results and pictures.")] = Path("toprovar-out"),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score a text-to-image model by EmojiEval, under several plans; an interrupted run goes on where it stopped."""
    import torch

    from toprovar_compile import measure, models
    from toprovar_compile.evaluate.detector import load_detector
    from toprovar_compile.evaluate.emoji_eval import load_prompts
    from toprovar_compile.evaluate.emoji_run import evaluate, markdown
    from toprovar_compile.plan_spec import plan_for

    if backend not in ("toprovar", "eager"):
        raise OptionError(f"there is no backend {backend!r}", where="--backend", expected="toprovar or eager")
    measure.require_metrics("eval emoji")
    target, entries = measure.pick_device(device), load_prompts(every)
    detector = load_detector(device=target)
    network: Any = models.load(model, device=target)
    precision = measure.in_user_precision(network, target)
    plans = {text: plan_for(text, network) for text in plan or ["dense"]}
    context = {
        "model": {"name": model, "fingerprint": network.fingerprint()},
        "machine": measure.machine(target),
        "backend": backend,
        "plans": {text: p.digest() for text, p in plans.items()},
    }
    ways = {text: _way(network, p, backend, precision) for text, p in plans.items()}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with torch.no_grad(), Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{len(entries)} prompts, batches", total=None)
        results = evaluate(
            ways,
            entries,
            images_per_prompt=images,
            batch=batch,
            seed=seed,
            detector=detector,
            folder=out,
            context=context,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(markdown(results), highlight=False, soft_wrap=True)
    console.print(f"wrote {out / 'emoji_eval.json'} and {out / 'emoji_eval.png'}", highlight=False, soft_wrap=True)


def _way(network: Any, plan: Plan, backend: str, precision: AbstractContextManager[Any]) -> Generate:
    """How a model makes the images of a batch of prompts under a plan; the batch has the first seed."""
    from toprovar_compile import measure
    from toprovar_compile.evaluate.images import generate

    run = measure.toprovar_way(plan).prepare(network) if backend == "toprovar" else None

    def make(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        with precision:
            if run is None:
                return generate(network, plan, prompts, seed=seeds[0], batch=len(prompts)).images
            return run(prompts, seed=seeds[0])

    return make


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
