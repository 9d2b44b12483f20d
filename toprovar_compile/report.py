"""What was compiled and what happened: every fallback, skipped match and guard miss, counted with its reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toprovar_compile.plan import Plan

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
    `guards` and `variants` lines that grow as the graph runs. `units` are the compiled pieces by name, `plan` is
    that of the latest run.
    """

    kind: str
    reason: str
    passes: list[str] = field(default_factory=list)
    layers: list[tuple[str, str, str]] = field(default_factory=list)
    variants: Callable[[], list[str]] = list
    guards: Callable[[], list[str]] = list
    units: Callable[[], dict[str, Any]] = dict
    plan: Plan | None = None


_watchers: list[dict[int, GraphReport]] = []


def ran(graph: GraphReport) -> None:
    """Note that a compiled graph runs, for whoever is explaining."""
    for seen in _watchers:
        seen.setdefault(id(graph), graph)


@contextmanager
def watch_graphs() -> Iterator[dict[int, GraphReport]]:
    """The reports of the graphs that run in the `with` block, by their `id`."""
    seen: dict[int, GraphReport] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [w for w in _watchers if w is not seen]  # not by equality: two may have seen the same
