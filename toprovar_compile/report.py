"""What was compiled and what happened: every fallback, skipped match and guard miss, counted with its reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("toprovar_compile")


class Counters:
    """Counts of events of this process, by a name such as "guard_miss: 100 tokens fit no scale"."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, event: str, reason: str = "", count: int = 1) -> None:
        """Count an event."""
        self._counts[f"{event}: {reason}" if reason else event] += count

    def snapshot(self) -> dict[str, int]:
        """The counts so far, a copy."""
        return dict(self._counts)

    def reset(self) -> None:
        """Start again at zero."""
        self._counts.clear()


counters = Counters()


@dataclass
class GraphReport:
    """One captured graph: what it was taken for (`kind` "step" or "plain"), why, and what became of it.

    `passes` are lines of what each pass did, `layers` (path, class key, proof or the reason there is none),
    `guards` and `variants` lines that grow as the graph runs.
    """

    kind: str
    reason: str
    passes: list[str] = field(default_factory=list)
    layers: list[tuple[str, str, str]] = field(default_factory=list)
    variants: Callable[[], list[str]] = list
    guards: Callable[[], list[str]] = list


@dataclass(frozen=True)
class Report:
    """What `explain` saw: the graphs that ran and the events counted during the call. `str()` makes it readable.

    `attention` is what serves attention without entropy in this process, see `kernels.plain_attention.chosen`.
    """

    graphs: tuple[GraphReport, ...]
    events: dict[str, int]
    result: Any = None
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for i, graph in enumerate(self.graphs):
            lines.append(f"graph {i}: {graph.kind} ({graph.reason})")
            lines += [f"  pass {text}" for text in graph.passes]
            for key in dict.fromkeys(key for _, key, _ in graph.layers):
                names = [name for name, k, _ in graph.layers if k == key]
                proof = next(p for _, k, p in graph.layers if k == key)
                lines.append(f"  layer class {key}: {len(names)} layers, {names[0]} to {names[-1]}; {proof}")
            lines += [f"  guard {text}" for text in graph.guards()]
            lines += [f"  variant {text}" for text in graph.variants()]
        lines += [f"plain attention: {choice['winner']} for {kind}" for kind, choice in self.attention.items()]
        lines.append("events:" if self.events else "events: none")
        lines += [f"  {count} x {event}" for event, count in sorted(self.events.items())]
        return "\n".join(lines)


_watchers: list[dict[int, GraphReport]] = []


def ran(graph: GraphReport) -> None:
    """Note that a compiled graph runs, for whoever is explaining."""
    for seen in _watchers:
        seen.setdefault(id(graph), graph)


@contextmanager
def _watch() -> Iterator[dict[int, GraphReport]]:
    seen: dict[int, GraphReport] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Call `fn` and report which compiled graphs ran, how their layers were treated, and every event with its reason.

    `result` of the report is what `fn` returned. Whatever `fn` raises is raised.
    """
    from toprovar_compile.kernels import plain_attention  # which counts its choices here

    before = counters.snapshot()
    with _watch() as seen:
        result = fn(*args, **kwargs)
    after = counters.snapshot()
    events = {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0)}
    return Report(tuple(seen.values()), events, result, plain_attention.chosen())
