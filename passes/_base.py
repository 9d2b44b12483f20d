"""What every pass shares: its context, its report, and the runner that checks and records it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch.fx import GraphModule


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides its graph: nothing of models or scales, only settings.

    `settings` holds the options of passes by name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassReport:
    """What a pass did: sites rewritten (`matched`) and sites left alone, counted by reason (`skipped`).

    `notes` are readable lines (a node, a user line) behind the reasons.
    """

    name: str
    matched: int = 0
    skipped: Counter[Enum] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = ", ".join(f"{count} skipped: {reason.value}" for reason, count in self.skipped.items())
        return f"{self.name}: {self.matched} rewritten" + (f", {left}" if left else "")


@dataclass(frozen=True)
class Pass:
    """A pass that rewrites a graph in place, and its own check of what it promises."""

    run: Callable[[GraphModule, PassContext], PassReport]
    check: Callable[[GraphModule], None]


def run_passes(gm: GraphModule, passes: Sequence[Pass], ctx: PassContext) -> list[PassReport]:
    """Run passes in order on `gm`, each followed by lint and its check, which raises PassInvariantError."""
    reports = []
    for entry in passes:
        reports.append(entry.run(gm, ctx))
        gm.graph.lint()
        gm.recompile()
        entry.check(gm)
    return reports
