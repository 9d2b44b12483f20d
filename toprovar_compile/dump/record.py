"""What is recorded while graphs are compiled and images generated; nothing at all where no dump is asked for."""

from __future__ import annotations

import atexit
import difflib
import functools
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from toprovar_compile.dump.repro import repro_text
from toprovar_compile.errors import OptionError
from toprovar_compile.inductor import is_traced, trace_artifact
from toprovar_compile.passes import PassReport, copy_graph, graph_key, write_kv_cache
from toprovar_compile.session import IMAGE_SINK, Session, current_session

if TYPE_CHECKING:
    from toprovar_compile.dispatch import LayerState, StepProgram
    from toprovar_compile.passes import SplitStep
    from toprovar_compile.plan import LayerAction, Plan
    from toprovar_compile.report import GraphReport


_GENERATION = "generation of the dump"


def graph_text(gm: GraphModule, name: str = "graph") -> str:
    """A graph as readable Python."""
    text = gm.print_readable(print_output=False, include_stride=True)
    return text.replace("class <lambda>(", f"class {name}(")  # AOT's name is no Python


@dataclass
class Stage:
    """One thing done to a graph. `matched` is None for what is no pass; `before` is None where nothing was there."""

    name: str
    after: str
    before: str | None = None
    matched: int | None = None
    skipped: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    ms: float = 0.0

    def diff(self) -> str:
        """What changed, as a unified diff; empty if nothing did."""
        if self.before is None or self.before == self.after:
            return ""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="")
        return "\n".join(lines) + "\n"


@dataclass
class GraphRecord:
    """One captured graph and what became of it."""

    name: str
    report: GraphReport
    stages: list[Stage]
    program: StepProgram | None = None


@dataclass(frozen=True)
class Part:
    """A part of a step that ran: "prologue", "epilogue" or the index of a layer; times of `time.perf_counter`.

    `kept` (K,) int64 are the tokens of the first sample that a pruned layer computed. `entropy` (n,) float32 is the
    layer's map of that sample if it was measured, in nats.
    """

    scale: int
    what: str | int
    start: float
    end: float
    action: str = ""
    kept: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class Generation:
    """One generation that was watched. `image` (3, H, W) in 0..1 is its first one."""

    number: int
    started: float
    plan: Plan | None = None
    parts: list[Part] = field(default_factory=list)
    image: Tensor | None = None
    ended: float = 0.0


class Recorder:
    """All that one process writes to one directory: the folder `<directory>/<pid>_<number>`.

    A page is written after the first, second, fourth, eighth... generation, and when the process ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.graphs: list[GraphRecord] = []
        self.plans: dict[str, Plan] = {}
        self.generation: Generation | None = None
        self.ended = 0
        self._written = -1
        self._pid = os.getpid()
        self._lock = threading.Lock()
        atexit.register(self.write)

    def watch(self, session: Session, plan: Plan | None) -> None:
        """Record the generation of `session`, whose first step is about to run, if a page is to be written after it."""
        number = self.ended + 1
        shown = number & (number - 1) == 0  # a power of two
        generation = Generation(number, time.perf_counter(), plan)
        session.on_close.append(functools.partial(self._end, generation if shown else None))
        if not shown:
            return
        last = [generation.started]

        def watch(
            what: str | int, s: int, action: LayerAction | None, layer: LayerState | None, stream: Tensor
        ) -> None:
            if stream.is_cuda:
                torch.cuda.synchronize(stream.device)
            kept, entropy = None, None
            state = session.store.get("steps")
            if layer is not None:
                kept = layer.kept[0].cpu() if layer.kept is not None else None
                if layer.entropy is not None and state is not None and (s, what) in state.reads:
                    entropy = layer.entropy[0][0].float().cpu()
            now = time.perf_counter()
            start = last[0] if what != "prologue" else min(now, max(last[0], self._entered))
            generation.parts.append(Part(session.scale, what, start, now, str(action or ""), kept, entropy))
            last[0] = time.perf_counter()

        def image(images: Tensor) -> None:
            generation.image = images[0].detach().float().cpu()

        session.store[_GENERATION] = generation
        session.store["watch"] = watch
        session.store[IMAGE_SINK] = image

    _entered = 0.0

    def enter(self) -> None:
        """A step starts now."""
        self._entered = time.perf_counter()

    def note(self, plan: Plan | None) -> None:
        """A step ran with this plan."""
        if plan is not None and plan.digest() not in self.plans:
            self.plans[plan.digest()] = plan

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, generation: Generation | None) -> None:
        self.ended += 1
        if generation is not None:
            generation.ended = time.perf_counter()
            self.generation = generation
            self.write()

    def write(self) -> None:
        """Write the page and the files beside it, unless nothing happened since; a forked child writes nothing."""
        from toprovar_compile.dump.page import write_page

        if os.getpid() != self._pid:
            return
        with self._lock:
            if self.graphs and self._written != self.ended:
                self._written = self.ended
                write_page(self)


_recorders: dict[tuple[str, int], Recorder] = {}


def _recorder(directory: str | os.PathLike[str]) -> Recorder:
    key = (os.path.abspath(directory), os.getpid())
    if key not in _recorders:
        _recorders[key] = Recorder(_new_folder(Path(directory)))
    return _recorders[key]


def _new_folder(directory: Path) -> Path:
    for number in itertools.count():
        folder = directory / f"{os.getpid()}_{number:03d}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError as error:
            if folder.exists():
                continue
            raise _unwritable(directory, error) from error
        except OSError as error:
            raise _unwritable(directory, error) from error
    raise AssertionError("unreachable")


def _unwritable(directory: Path, error: OSError) -> OptionError:
    return OptionError(
        f"cannot write dumps: {error.strerror}", where=str(directory), expected="a directory that can be written"
    )


class Dump:
    """The dump of one captured graph. With neither a directory nor a structured log, nothing is done."""

    def __init__(self, recorder: Recorder | None, traced: bool) -> None:
        self.recorder = recorder
        self.on = recorder is not None or traced
        self._stages: list[Stage] = []
        self._plans: set[str] = set()
        self._record: GraphRecord | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike[str] | None) -> Dump:
        """The dump of the next graph. Raises OptionError where the directory cannot be written."""
        return cls(None if directory is None else _recorder(directory), is_traced())

    @property
    def observe(self) -> Callable[[GraphModule], Callable[[PassReport], None]] | None:
        """What `PassContext.observe` is to be."""
        return self._observe if self.on else None

    def _observe(self, gm: GraphModule) -> Callable[[PassReport], None]:
        before = graph_text(gm)

        def done(report: PassReport) -> None:
            self._add(stage_of(report, before, graph_text(gm)))

        return done

    def graph(self, name: str, gm: GraphModule) -> None:
        """A graph at a stage between passes."""
        if self.on:
            self._add(Stage(name, graph_text(gm, name)))

    def captured(self, gm: GraphModule, inputs: Sequence[Any], inner: str) -> None:
        """The graph as Dynamo hands it over, and a script that runs it alone."""
        if self.on:
            self._add(Stage("captured", graph_text(gm, "captured")))
            self._add(Stage("repro", repro_text(gm, inputs, inner)))

    def split(self, split: SplitStep) -> None:
        """The pieces of a split step, each class of layers once, with what `write_kv_cache` makes of it."""
        if not self.on:
            return
        self.graph("prologue", split.prologue.graph)
        for graph in {graph_key(layer.piece.graph): layer.piece.graph for layer in split.layers}.values():
            rewritten, start = copy_graph(graph), time.perf_counter()
            rewrite = write_kv_cache(rewritten)
            ms = 1e3 * (time.perf_counter() - start)
            name = f"layer_{graph_key(rewritten)}"  # as the class of these layers is called
            before = graph_text(graph, name)
            skipped = tuple((r.value, n) for r, n in Counter(rewrite.skipped).items())
            after = graph_text(rewritten, name)
            self._add(Stage(f"write_kv_cache.{name}", after, before, len(rewrite.sites), skipped, (), ms))
        self.graph("epilogue", split.epilogue.graph)

    def program(self, program: StepProgram) -> None:
        """The step is ready to run."""
        if self.on:
            self._keep(program.report, program)

    def plain(self, report: GraphReport) -> None:
        """The graph is no step."""
        if self.on:
            self._keep(report, None)

    def _keep(self, report: GraphReport, program: StepProgram | None) -> None:
        trace_artifact("graph_report", lambda: f"{report.kind}: {report.reason}")
        if self.recorder is not None:
            name = f"graph_{len(self.recorder.graphs)}"
            self._record = GraphRecord(name, report, self._stages, program)
            self.recorder.graphs.append(self._record)

    def begin(self, plan: Plan | None) -> None:
        """A step is about to run."""
        if plan is not None and self.on and plan.digest() not in self._plans:
            self._plans.add(plan.digest())
            trace_artifact(f"plan_{plan.digest()}", lambda: json.dumps(plan.to_json()))
        if self.recorder is None:
            return
        session = current_session()
        self.recorder.enter()
        if session is not None and "steps" not in session.store:
            self.recorder.watch(session, plan)
        if session is not None and (generation := session.store.get(_GENERATION)) is not None:
            generation.plan = plan  # the image may have chosen an alternative
        self.recorder.note(plan)

    def _add(self, stage: Stage) -> None:
        self._stages.append(stage)
        trace_artifact(stage.name, lambda: stage.after)
        if stage.before is not None and stage.before != stage.after:
            trace_artifact(f"{stage.name}.diff", stage.diff)


def stage_of(report: PassReport, before: str, after: str) -> Stage:
    """The stage that a pass was."""
    skipped = tuple((str(reason.value), count) for reason, count in report.skipped.items())
    return Stage(report.name, after, before, report.matched, skipped, report.notes, report.ms)
