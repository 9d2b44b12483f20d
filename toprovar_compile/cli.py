"""The command line: `toprovar demo | generate | bench | calibrate | tune | eval | explain | doctor`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from toprovar_compile import cli_bench, cli_eval
from toprovar_compile.cli_bench import Device, Seed
from toprovar_compile.errors import OptionError, ToproVarError, nearest

if TYPE_CHECKING:
    from toprovar_compile.measure import Job, Way
    from toprovar_compile.models.emoji_infinity import EmojiInfinity
    from toprovar_compile.models.var import VAR

EXIT_ERROR = 2

DEMO_CLASSES = (
    "red apple", "smiling face with sunglasses", "rocket", "birthday cake", "octopus", "thumbs up sign",
    "house with garden", "ferris wheel", "hot beverage", "cactus", "dog face", "bicyclist",
)  # fmt: skip

DEMO_PROMPTS = (
    "two red apples above a blue key", "a teapot on a pink background", "a yellow car and a purple tree",
    "three yellow stars", "a blue fish to the left of a red star", "a hamburger",
)  # fmt: skip

_BACKENDS = ("eager", "inductor", "toprovar")


class _Commands(TyperGroup):
    """Ends a command that raised one of our errors with a readable line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            ours = find_own_error(error)
            if ours is None:
                raise
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(ours))}", soft_wrap=True, highlight=False)
            raise typer.Exit(EXIT_ERROR) from error


def find_own_error(error: BaseException) -> ToproVarError | None:
    """The ToproVarError that `error` is, wraps or came from; torch.compile wraps what a backend raises."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, ToproVarError):
            return found
        seen.add(id(found))
        todo += [found.__context__, found.__cause__, getattr(found, "inner_exception", None)]
    return None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Visual autoregressive image models, compiled with entropy-guided pruning.",
)
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_eval.app, name="eval")

Model = Annotated[str, typer.Option("--model", help="Shipped model.")]
PlanText = Annotated[
    str,
    typer.Option("--plan", help="auto, dense, a plan file, or a description such as keep=0.4,from=8."),
]
Cfg = Annotated[float | None, typer.Option("--cfg", help="Guidance strength; default: the model's own.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Most likely tokens to draw from; 0: all.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Probability mass to draw from; 0: all.")]


@app.command()
def demo(
    model: Model = "emoji-var",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images a way.")] = 6,
    seed: Seed = 0,
    plan: PlanText = "auto",
    device: Device = "auto",
    cfg: Cfg = None,
    top_k: TopK = None,
    top_p: TopP = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for demo.png and demo.json.")] = Path("toprovar-out"),
    warm: Annotated[bool, typer.Option("--warm", help="Use what earlier runs compiled; compile times shrink.")] = False,
) -> None:
    """Generate the same pictures in eager PyTorch, with Inductor and with toprovar, and compare."""
    from toprovar_compile import demo as demo_module
    from toprovar_compile import measure
    from toprovar_compile.plan_spec import plan_for

    measure.require_metrics("demo")
    console = Console()
    target = measure.pick_device(device)
    network = _load(model, target)
    chosen = plan_for(plan, network)
    jobs = _named_jobs(network, count, seed)
    ways = [measure.eager_way(), measure.inductor_way(), measure.toprovar_way(chosen)]
    facts = measure.machine(target)
    console.print(
        f"{model} on {facts['hardware']}, {facts['threads']} threads, torch {facts['torch']}, {facts['precision']}\n"
        f"{count} images a way, one at a time; compiling from {'the cache' if warm else 'nothing'}",
        highlight=False,
    )
    with _progress(ways, count, console) as on_image:
        result = demo_module.run(
            network, jobs, ways, device=target, sampling=_sampling(cfg, top_k, top_p), cold=not warm, on_image=on_image
        )
    demo_module.show(result, console)
    context = {
        "model": {"name": model, "fingerprint": network.fingerprint()},
        "machine": facts,
        "sampling": _sampling(cfg, top_k, top_p) or asdict(network.sampling),
        "cold": not warm,
        "plan": {"digest": chosen.digest(), **chosen.to_json()},
    }
    for path in demo_module.save(result, out, context):
        console.print(f"wrote {path}", highlight=False)


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            help="Class names, parts of them, emoji characters or class numbers; for emoji-infinity, whole prompts."
        ),
    ],
    model: Model = "emoji-var",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images of each prompt.")] = 1,
    seed: Seed = 0,
    backend: Annotated[str, typer.Option("--backend", help="eager, inductor or toprovar.")] = "toprovar",
    plan: PlanText = "auto",
    device: Device = "auto",
    cfg: Cfg = None,
    top_k: TopK = None,
    top_p: TopP = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pictures, or the .png file of a single one.")
    ] = Path("toprovar-out"),
) -> None:
    """Generate pictures and write each as a PNG file."""
    import torch

    from toprovar_compile import measure
    from toprovar_compile.demo import to_image
    from toprovar_compile.files import write_png
    from toprovar_compile.models.emoji_infinity import EmojiInfinity

    if out.suffix == ".png" and len(prompts) * count > 1:
        raise OptionError(f"{len(prompts) * count} pictures for one file {out}", where="--out", expected="a folder")
    target, sampling = measure.pick_device(device), _sampling(cfg, top_k, top_p)
    network: VAR | EmojiInfinity = _load(model, target)
    console = Console()
    if isinstance(network, EmojiInfinity):
        named: list[tuple[str, Any]] = [(prompt, [prompt]) for prompt in prompts]
        bar: AbstractContextManager[Any] = _scale_bar(network, len(prompts) * count, console)
    else:
        labels = [_label(network, model, prompt) for prompt in prompts]
        named = [(measure.class_name(network, label), torch.tensor([label], device=target)) for label in labels]
        bar = nullcontext()
    precision = measure.in_user_precision(network, target)
    run = _way(backend, plan, network).prepare(network)
    with torch.no_grad(), precision, bar:
        for text, given in named:
            for i in range(count):
                images = run(given, seed=seed + i, **sampling)
                name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "picture"
                path = out if out.suffix == ".png" else out / f"{name[:80]}-{seed + i}.png"
                path = write_png(path, to_image(images[0].float().cpu()))
                console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")],
    model: Model = "emoji-var",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Sample prompts.")] = 50,
    seed: Seed = 0,
    device: Device = "auto",
    threshold: Annotated[
        list[str] | None, typer.Option("--set", help="A threshold, such as tau=0.4 or restore=identity; repeatable.")
    ] = None,
) -> None:
    """Measure attention entropy on sample prompts and write the plan that follows from it."""
    from toprovar_compile.calibrate import calibrate as run_calibration
    from toprovar_compile.measure import pick_device
    from toprovar_compile.policies.toprovar import Thresholds

    thresholds = Thresholds.from_mapping(dict(_assignment(text) for text in threshold or ()))
    network = _load(model, pick_device(device))
    console = Console()
    with _bar(console) as progress:
        task = progress.add_task("calibrating", total=prompts)
        plan = run_calibration(
            network,
            prompts=prompts,
            seed=seed,
            thresholds=thresholds,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    plan.save(out)
    share = ", ".join(f"{x:.0%}" for x in plan.token_share())
    console.print(f"computes {plan.total_share():.0%} of the tokens; scale by scale {share}", highlight=False)
    console.print(f"wrote {out}", highlight=False)


@app.command()
def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")],
    model: Model = "emoji-var",
    target_ssim: Annotated[float | None, typer.Option("--target-ssim", help="Least mean SSIM to unpruned.")] = None,
    target_speedup: Annotated[float | None, typer.Option("--target-speedup", help="Least speed-up over dense.")] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Plans to try.")] = 60,
    images: Annotated[int, typer.Option("--images", min=1, help="Images to try each plan on.")] = 16,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Other images, to confirm the best on.")] = 64,
    guidance: Annotated[bool, typer.Option(help="The plan may switch guidance off in late scales.")] = True,
    timed: Annotated[bool, typer.Option("--timed", help="Measure times on this machine; else tokens count.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Search the fastest plan that stays close enough, or the closest that is fast enough, and write it."""
    from toprovar_compile import tune as tuning
    from toprovar_compile.costs import measure_costs
    from toprovar_compile.measure import pick_device, require_metrics

    require_metrics("tune")
    goal = tuning.Goal(target_ssim, target_speedup)
    settings = tuning.Settings(trials, images, held_out, seed, guidance=guidance)
    network, console = _load(model, pick_device(device)), Console()

    def log(text: str) -> None:
        console.print(text, highlight=False)

    costs = measure_costs(network, log=log) if timed else None
    found = tuning.tune(network, goal, settings, costs=costs, log=log)
    for trial in found.frontier:
        log(f"frontier: SSIM {trial.ssim:.4f} at {trial.speedup:.2f} x")
    if not found.reached:
        log("no plan kept the goal on held-out images; this is the nearest")
    found.plan.save(out)
    log(f"wrote {out}")


@app.command(context_settings={"allow_extra_args": True})
def explain(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(help="SCRIPT.py (its arguments after --), or a shipped model.")
    ] = "emoji-var",
    plan: PlanText = "auto",
    device: Device = "auto",
    inner: Annotated[str, typer.Option("--inner", help="inductor, or eager to explain without compiling.")] = "eager",
) -> None:
    """Run a script, or generate one image, and print what was captured, proved, specialised and run, with reasons.

    The options are for shipped models; a script gets what follows --.
    """
    import torch

    from toprovar_compile import explaining, measure
    from toprovar_compile.plan_spec import plan_for

    if target.endswith(".py"):
        typer.echo(str(explaining.explain_script(target, ctx.args)))
        return
    if ctx.args:
        raise OptionError(f"unknown argument {ctx.args[0]!r}", where="toprovar explain", expected="--help shows them")
    place = measure.pick_device(device)
    network = _load(target, place)
    run = measure.toprovar_way(plan_for(plan, network), inner=inner).prepare(network)
    with torch.no_grad(), measure.autocast(place):
        report = explaining.explain(run, torch.tensor([0], device=place), seed=0)
    typer.echo(str(report))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable findings.")] = False,
) -> None:
    """Say what this machine can do and what is missing. Exit code 1: the demo cannot run."""
    from toprovar_compile import doctor as doctor_module

    checks = doctor_module.examine()
    if as_json:
        typer.echo(json.dumps(doctor_module.as_json(checks), indent=1))
    else:
        doctor_module.show(checks, Console())
    if not doctor_module.demo_can_run(checks):
        raise typer.Exit(1)


def _load(name: str, device: Any) -> VAR | EmojiInfinity:
    from toprovar_compile import models

    return models.load(name, device=device)


def _way(backend: str, plan: str, model: VAR | EmojiInfinity) -> Way:
    from toprovar_compile import measure
    from toprovar_compile.plan_spec import plan_for

    if backend not in _BACKENDS:
        close = nearest(backend, _BACKENDS)
        raise OptionError(
            f"there is no backend {backend!r}",
            where="--backend",
            expected="one of " + ", ".join(_BACKENDS),
            todo=f"did you mean {close!r}?" if close else "",
        )
    if backend == "eager":
        return measure.eager_way()
    if backend == "inductor":
        return measure.inductor_way()
    return measure.toprovar_way(plan_for(plan, model))


def _label(model: VAR, name: str, prompt: str) -> int:
    from toprovar_compile import models

    if not prompt.isdecimal():
        return models.find_class(prompt, name)[0]
    label = int(prompt)
    if label >= model.cfg.num_classes:
        raise OptionError(f"there is no class {label}", where=name, expected=f"0..{model.cfg.num_classes - 1}")
    return label


def _named_jobs(model: VAR | EmojiInfinity, count: int, seed: int) -> list[Job]:
    """Jobs for the prompts of the demo, or for its classes that the model has; then for drawn ones."""
    from toprovar_compile.measure import Job, choose_jobs
    from toprovar_compile.models.emoji_infinity import EmojiInfinity

    if isinstance(model, EmojiInfinity):
        jobs = [Job(None, prompt, 0) for prompt in (*DEMO_PROMPTS, *model.sample_prompts(count, seed))]
    else:
        known = model.class_names or []
        jobs = [Job(known.index(text), text, 0) for text in DEMO_CLASSES if text in known]
        drawn = choose_jobs(model, min(2 * count, model.cfg.num_classes), seed)
        jobs += [job for job in drawn if job.label not in {wanted.label for wanted in jobs}]
    return [replace(job, seed=seed + i) for i, job in enumerate(jobs[:count])]


def _sampling(cfg: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    given = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    return {key: value for key, value in given.items() if value is not None}


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"cannot read {text!r}", where="--set", expected="KEY=VALUE, such as tau=0.4")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@contextmanager
def _scale_bar(model: EmojiInfinity, images: int, console: Console) -> Iterator[None]:
    """A bar over the scales of all images; the first image compiles while it stands still."""
    with _bar(console) as progress:
        total = len(model.schedule)
        task = progress.add_task("generating", total=images * total)
        image = -1

        def on_scale(done: int, of: int) -> None:
            nonlocal image
            image += done == 1
            progress.update(task, completed=image * total + done)

        model.on_scale = on_scale
        try:
            yield
        finally:
            del model.on_scale
            progress.update(task, completed=images * total)


@contextmanager
def _progress(ways: list[Way], count: int, console: Console) -> Iterator[Callable[[Way, str, int], None]]:
    """One bar a way; the first image, which compiles, is the bar's first step."""
    with _bar(console) as progress:
        tasks = {way.name: progress.add_task(way.name, total=count, start=False) for way in ways}
        for task in tasks.values():
            progress.update(task, visible=False)

        def on_image(way: Way, phase: str, done: int) -> None:
            task = tasks[way.name]
            if phase == "compile":
                words = f"{way.name}: {'warming up' if way.name == 'eager' else 'compiling'}"
                progress.update(task, description=words, visible=True)
                if done == 0:
                    progress.start_task(task)
            else:
                progress.update(task, description=way.name, completed=done)

        yield on_image
