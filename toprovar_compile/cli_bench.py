"""The command `toprovar bench`: one sub-command for each benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from toprovar_compile.errors import OptionError, nearest


class _Benchmarks(TyperGroup):
    """Refuses a benchmark that does not exist as our own errors do."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, valid = args[0], self.list_commands(ctx)
        if name not in valid and not name.startswith("-"):
            close = nearest(name, valid)
            raise OptionError(
                f"there is no benchmark {name!r}",
                where="bench",
                expected="one of " + ", ".join(valid),
                todo=f"did you mean {close!r}?" if close else "",
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Benchmarks, no_args_is_help=True, help="Measure: a model, or a kernel alone.")

_DTYPES = ("", "bfloat16", "float16", "float32")
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first image; the others count up from it.")]
Results = Annotated[Path, typer.Option("--out", "-o", help="Folder for the JSON and the plot.")]


@app.command("emoji-var")
def emoji_var(
    classes: Annotated[int, typer.Option("--classes", min=1, help="Classes, one image each.")] = 64,
    plan: Annotated[
        list[str] | None, typer.Option("--plan", help="Plan to measure; repeat for more. Default: a whole frontier.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option("--inductor-mode", help="Mode of torch.compile to measure as well; repeatable.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    minutes: Annotated[float, typer.Option("--minutes", help="Start no new way after this long.")] = 120.0,
    out: Results = Path("toprovar-out"),
) -> None:
    """Measure time and closeness of many plans over many classes; an interrupted run goes on where it stopped."""
    from toprovar_compile.bench import emoji_var as bench_module
    from toprovar_compile.measure import require_metrics

    require_metrics("bench")
    settings = bench_module.Settings(
        classes=classes,
        seed=seed,
        device=device,
        minutes=minutes,
        plans=tuple(plan) if plan else bench_module.FRONTIER,
        inductor_modes=tuple(mode or ()),
    )
    console = Console()
    path = bench_module.run(settings, out, log=lambda text: console.print(text, highlight=False))
    console.print(bench_module.table(json.loads(path.read_text())))
    console.print(f"wrote {path}", highlight=False)


@app.command("fae")
def fae(
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32; default: by device.")] = "",
    models: Annotated[str, typer.Option("--models", help="Only models whose name contains this.")] = "",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measurements of each form.")] = 20,
    threads: Annotated[int, typer.Option("--threads", min=1, help="On the CPU, besides one.")] = 2,
    device: Device = "auto",
    out: Results = Path("toprovar-out"),
) -> None:
    """Measure attention with entropy against every other attention, at the shapes of late scales."""
    from toprovar_compile.bench import fae as bench_fae

    if dtype not in _DTYPES:
        close = nearest(dtype, _DTYPES)
        raise OptionError(
            f"{dtype!r} is not a dtype that is measured",
            where="--dtype",
            expected="one of " + ", ".join(_DTYPES[1:]),
            todo=f"did you mean {close!r}?" if close else "",
        )
    console = Console()
    settings = bench_fae.Settings(device=device, dtype=dtype, models=models, rounds=rounds, threads=threads)
    path = bench_fae.run(settings, out, log=lambda text: console.print(text, highlight=False))
    console.print(bench_fae.table(json.loads(path.read_text())))
    console.print(f"wrote {path}", highlight=False)


@app.command("infinity")
def infinity(
    model: Annotated[str, typer.Option("--model", help="2b or 8b.")] = "2b",
    way: Annotated[
        list[str] | None,
        typer.Option("--way", help="official, eager, dense, plans, a plan ...; repeatable. Default: all but inductor."),
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option("--plan", help="Plan to measure in place of the usual ones.")
    ] = None,
    official: Annotated[str, typer.Option("--official", help="Checkout of FoundationVision/Infinity.")] = "",
    fastvar: Annotated[str, typer.Option("--fastvar", help="Checkout of csguoh/FastVAR.")] = "",
    ratio: Annotated[str, typer.Option("--ratio", help="width:height")] = "1:1",
    size: Annotated[str, typer.Option("--size", help="0.06M, 0.25M, 0.60M or 1M pixels.")] = "1M",
    dtype: Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32.")] = "bf16",
    images: Annotated[int, typer.Option("--images", min=1, help="Timed images a way.")] = 5,
    warm: Annotated[bool, typer.Option("--warm/--no-warm", help="Time a first image with a full cache too.")] = True,
    tflops: Annotated[float, typer.Option("--tflops", help="Arithmetic rate of the floor, TFLOP/s.")] = 600.0,
    tbytes: Annotated[float, typer.Option("--tbytes", help="Memory rate of the floor, TB/s.")] = 3.0,
    seed: Seed = 0,
    device: Device = "auto",
    minutes: Annotated[float, typer.Option("--minutes", help="Start no new way after this long.")] = 120.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model on the CPU, to try the tool.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Measure nothing; join the parts in the folder.")] = False,
    out: Results = Path("toprovar-out"),
) -> None:
    """Measure official code, FastVAR and ours on one GPU; what is finished is kept, so ways can come one at a time."""
    from toprovar_compile.bench import infinity as bench_infinity
    from toprovar_compile.bench.floor import Rates

    console = Console()
    if merge:
        path = bench_infinity.merge(out, "tiny" if tiny else model)
    else:
        settings = bench_infinity.Settings(
            model=model,
            ways=tuple(way or ()),
            plans=tuple(plan or ()),
            official=official,
            fastvar=fastvar,
            ratio=ratio,
            size=size,
            dtype=dtype,
            seed=seed,
            images=images,
            warm=warm,
            device=device,
            rates=Rates(tflops, tbytes),
            minutes=minutes,
        )
        settings = bench_infinity.tiny(settings) if tiny else settings
        path = bench_infinity.run(settings, out, log=lambda text: console.print(text, highlight=False))
    console.print(bench_infinity.table(json.loads(path.read_text())))
    console.print(f"wrote {path}", highlight=False)


@app.command()
def policies(
    model: Annotated[str, typer.Option("--model", help="Shipped model.")] = "emoji-var",
    images: Annotated[int, typer.Option("--images", min=2, help="Classes or prompts, one image each.")] = 256,
    training: Annotated[int, typer.Option("--training", min=2, help="Images that SkipVAR is trained on.")] = 256,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Such as fastvar; repeatable. Default: all.")
    ] = None,
    tuned: Annotated[list[str] | None, typer.Option("--tuned", help="A plan file to compare as well.")] = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images generated at a time.")] = 32,
    device: Device = "auto",
    minutes: Annotated[float, typer.Option("--minutes", help="Start no new plan after this long.")] = 60.0,
    timing: Annotated[float, typer.Option("--timing", help="Minutes of these for timing compiled plans.")] = 0.0,
    out: Results = Path("toprovar-out"),
) -> None:
    """Compare FastVAR, SkipVAR, ToProVAR and other scores: quality on the same images against tokens computed."""
    from toprovar_compile.evaluate import compare
    from toprovar_compile.measure import require_metrics

    require_metrics("bench policies")
    settings = compare.Settings(
        model=model,
        images=images,
        training=training,
        seed=seed,
        batch=batch,
        device=device,
        minutes=minutes,
        timing=timing,
        policies=tuple(policy or ()),
        tuned=tuple(tuned or ()),
    )
    console = Console()
    path = compare.run(settings, out, log=lambda text: console.print(text, highlight=False))
    console.print(f"wrote {path}", highlight=False)
