"""What every pass shares: its context, its report, and the runner that checks and records it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from torch.fx import GraphModule

from toprovar_compile.report import logger

switched_off: ContextVar[frozenset[str]] = ContextVar("toprovar_switched_off", default=frozenset())
"""Names of the passes and stages that `bisect_passes` does without."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides its graph: nothing of models or scales, only settings.

    `settings` holds the options of passes by name. `observe` is shown the graph before each pass and returns what is to
    be called with the pass's report when it is done.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    observe: Callable[[GraphModule], Callable[[PassReport], None]] | None = None


@dataclass(frozen=True)
class PassReport:
    """What a pass did: sites rewritten (`matched`) and sites left alone, counted by reason (`skipped`).

    `notes` are readable lines (a node, a user line) behind the reasons; `ms` is what the pass, lint and check took.
    """

    name: str
    matched: int = 0
    skipped: Counter[Enum] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    ms: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        left = ", ".join(f"{count} skipped: {reason.value}" for reason, count in self.skipped.items())
        return f"{self.name}: {self.matched} rewritten" + (f", {left}" if left else "")


@dataclass(frozen=True)
class Pass:
    """A pass that rewrites a graph in place, and its own check of what it promises."""

    run: Callable[[GraphModule, PassContext], PassReport]
    check: Callable[[GraphModule], None]


def run_passes(gm: GraphModule, passes: Sequence[Pass], ctx: PassContext) -> list[PassReport]:
    """Run passes in order on `gm`, each followed by lint and its check, which raises PassInvariantError.

    Passes named in `switched_off` are left out.
    """
    reports = []
    for entry in passes:
        if entry.run.__name__ in switched_off.get():
            continue
        done = ctx.observe(gm) if ctx.observe is not None else None
        start = time.perf_counter()
        report = entry.run(gm, ctx)
        gm.graph.lint()
        gm.recompile()
        entry.check(gm)
        report = replace(report, ms=1e3 * (time.perf_counter() - start))
        logger.debug("%s, in %.1f ms", report, report.ms)
        reports.append(report)
        if done is not None:
            done(report)
    return reports
