"""What happened in a call, and why, as text: `explain`, and `diff` of two of its reports."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toprovar_compile.errors import OptionError
from toprovar_compile.report import GraphReport, counters, watch_graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toprovar_compile.plan import Plan

_ADVICE = (
    (r"plain_graph: gradients", "call the model under torch.no_grad() or torch.inference_mode()"),
    (r"fallback: plan='auto' runs dense", "calibrate a plan (`toprovar calibrate`), or say plan='dense'"),
    (r"fallback: .*runs dense instead of", "the named node mixes tokens: see docs/limits.md for what can be proven"),
    (r"fallback: a scale ran outside", "raise the limit: torch.compile(..., recompile_limit=64)"),
    (r"guard_miss: ", "give the model the schedule it really runs, or make a plan for this one"),
    (r"cache_copied: ", "return the caches of a step unchanged to the next one"),
    (r"skipped: write_kv_cache", "see the reason: the cache is concatenated anew at each scale"),
    (r"variant_guard_miss: ", "none: other sizes were compiled for once; they are kept"),
)
_REASON_OF_A_BREAK = re.compile(r"Graph Break Reason:\s*(.+)")


@dataclass(frozen=True)
class Report:
    """What `explain` saw: the graphs that ran and the events counted during the call. `str()` makes it readable.

    `frames` are frames that Dynamo compiled: (function, file, line, seconds, reason to compile it again); `breaks` its
    graph breaks as (user line, reason). `kernels` counts what generated code defines and calls, by graph and variant.
    """

    graphs: tuple[GraphReport, ...]
    events: dict[str, int]
    result: Any = None
    attention: Mapping[str, Any] = field(default_factory=dict)
    frames: tuple[tuple[str, str, int, float, str], ...] = ()
    breaks: tuple[tuple[str, str], ...] = ()
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    plan: Plan | None = None

    def __str__(self) -> str:
        parts = [self._dynamo(), *self._graphs(), self._plan(), self._kernels(), self._events(), self._advice()]
        return "\n".join(line for part in parts for line in part)

    def _dynamo(self) -> list[str]:
        again = [f for f in self.frames if f[4]]
        lines = []
        if self.frames:
            seconds = sum(f[3] for f in self.frames)
            lines.append(f"dynamo: {len(self.frames)} frames compiled in {seconds:.1f} s, {len(again)} of them again")
            lines += [f"  recompiled {name} ({file}:{line}): {reason}" for name, file, line, _, reason in again]
        lines += [f"  graph break at {where}: {reason}" for where, reason in self.breaks]
        return lines

    def _graphs(self) -> Iterator[list[str]]:
        for i, graph in enumerate(self.graphs):
            lines = [f"graph {i}: {graph.kind} ({graph.reason})"]
            lines += [f"  {text}" if text.startswith("attention") else f"  pass {text}" for text in graph.passes]
            for key in dict.fromkeys(key for _, key, _ in graph.layers):
                names = [name for name, k, _ in graph.layers if k == key]
                proof = next(p for _, k, p in graph.layers if k == key)
                lines.append(f"  layer class {key}: {len(names)} layers, {names[0]} to {names[-1]}; {proof}")
            lines += [f"  guard {text}" for text in graph.guards()]
            lines += [f"  variant {text}" for text in graph.variants()]
            yield lines

    def _plan(self) -> list[str]:
        if self.plan is None:
            return []
        from toprovar_compile.dump.reasons import describe, why

        plan = self.plan
        lines = [f"plan {plan.digest()}:", *(f"  {text}" for text in describe(plan))]
        whole = [
            i for i in range(plan.num_layers) if not any(s.run and s.layers[i].kind != "dense" for s in plan.scales)
        ]
        running = [s for s, scale in enumerate(plan.scales) if scale.run]
        for i in whole if len(whole) < plan.num_layers else []:
            lines.append(f"  layer {i} is never pruned. " + " ".join(why(plan, running[-1], i)[1:]))
        return lines

    def _kernels(self) -> list[str]:
        lines = [f"plain attention: {choice['winner']} for {kind}" for kind, choice in self.attention.items()]
        for name, kernels in self.kernels.items():
            lines.append(f"kernels of {name}: " + ", ".join(f"{n} x {kernel}" for kernel, n in kernels.items()))
        return lines

    def _events(self) -> list[str]:
        lines = ["events:" if self.events else "events: none"]
        return lines + [f"  {count} x {event}" for event, count in sorted(self.events.items())]

    def _advice(self) -> list[str]:
        told = [text for pattern, text in _ADVICE if any(re.match(pattern, event) for event in self.events)]
        if self.breaks:
            told.append("a graph break splits a step: move what the line does out of the step")
        if any(graph.kind == "step" for graph in self.graphs) or not self.graphs:
            return ["what to do:", *(f"  {text}" for text in dict.fromkeys(told))] if told else []
        told.append("no graph was taken for a step: is the step of one scale one callable, with attention inside?")
        return ["what to do:", *(f"  {text}" for text in dict.fromkeys(told))]


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Call `fn` and report which compiled graphs ran, how their layers were treated, and every event with its reason.

    `result` of the report is what `fn` returned. Whatever `fn` raises is raised.
    """
    from toprovar_compile.inductor import watch_dynamo
    from toprovar_compile.kernels import plain_attention  # which counts its choices here

    before = counters.snapshot()
    with watch_graphs() as seen, watch_dynamo() as news:
        result = fn(*args, **kwargs)
    after = counters.snapshot()
    events = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
    graphs = tuple(seen.values())
    plans = [graph.plan for graph in graphs if graph.plan is not None]
    return Report(
        graphs,
        events,
        result,
        plain_attention.chosen(),
        tuple(news.frames),
        tuple(_break(text) for text in news.breaks),
        _kernels_of(graphs),
        plans[-1] if plans else None,
    )


def explain_script(path: str | Path, arguments: Sequence[str] = ()) -> Report:
    """Run a Python script as the main program, with these command line arguments, and report on it.

    Raises OptionError when there is no such file, and whatever the script raises; its exit is the end of the report.
    """
    if not Path(path).is_file():
        raise OptionError("there is no such script", where=str(path), expected="a Python file")

    def run() -> None:
        with _main(str(path), arguments):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise

    return explain(run)


@contextmanager
def _main(path: str, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv, sys.path
    sys.argv, sys.path = [path, *arguments], [str(Path(path).resolve().parent), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before


def diff(a: Report | Plan, b: Report | Plan) -> str:
    """What differs between two reports, or two plans: lines with - are those of `a`, with + those of `b`.

    Times and counts of runs are left out. Empty if nothing differs.
    """
    import difflib

    lines = difflib.unified_diff(_facts(a), _facts(b), "a", "b", lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def _facts(state: Report | Plan) -> list[str]:
    if not isinstance(state, Report):
        from toprovar_compile.dump.reasons import describe

        actions = [
            f"scale {s}, layer {i}: {action}"
            for s, scale in enumerate(state.scales)
            for i, action in enumerate(scale.layers)
        ]
        runs = [f"scale {s}: run {p.run}, guided {p.cfg}" for s, p in enumerate(state.scales)]
        return [f"plan {state.digest()}", *describe(state), *runs, *actions]
    text = re.sub(r": \d+ (runs|hits)|compiled in [\d.]+ s,? ?| in [\d.]+ s\b", "", str(state))
    return text.splitlines()


def _break(text: str) -> tuple[str, str]:
    """(user line, reason) of Dynamo's message."""
    where = re.search(r"[Gg]raph break.*?user code at (.+?:\d+)", text)
    reason = _REASON_OF_A_BREAK.search(text)
    return where[1] if where else "?", reason[1].strip() if reason else text.strip().splitlines()[0]


def _kernels_of(graphs: Sequence[GraphReport]) -> dict[str, dict[str, int]]:
    from toprovar_compile.dump.facts import variants_of

    units = {name: unit for graph in graphs for name, unit in graph.units().items()}
    found = {f"{name}, {v.name}": v.kernels for name, unit in units.items() for v in variants_of(unit)}
    return {name: kernels for name, kernels in found.items() if kernels}
