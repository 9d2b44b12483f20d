"""Counters and the report of `explain`."""

from __future__ import annotations

import pytest

from toprovar_compile import explain
from toprovar_compile.report import Counters, GraphReport, Report, counters, ran


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.reset()


def test_counters() -> None:
    mine = Counters()
    mine.add("miss", "9 tokens")
    mine.add("miss", "9 tokens", count=2)
    mine.add("hit")
    snapshot = mine.snapshot()
    assert snapshot == {"miss: 9 tokens": 3, "hit": 1}
    mine.reset()
    assert mine.snapshot() == {} and snapshot["hit"] == 1


def test_explain_sees_what_runs_during_the_call() -> None:
    before, during = GraphReport("plain", "before"), GraphReport("step", "during")
    ran(before)
    counters.add("old")

    def call(a: int, *, b: int) -> int:
        for _ in range(2):
            ran(during)
        counters.add("old")
        counters.add("new", "why", 3)
        return a + b

    report = explain(call, 1, b=2)
    assert report.result == 3
    assert report.graphs == (during,)
    assert report.events == {"old": 1, "new: why": 3}


def test_nested_explain() -> None:
    graph = GraphReport("plain", "inner")
    outer = explain(lambda: explain(ran, graph))
    assert outer.graphs == outer.result.graphs == (graph,)


def test_explain_passes_exceptions_on() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        explain(fail)
    assert explain(lambda: None).graphs == ()


def test_text() -> None:
    step = GraphReport(
        "step",
        "one scale",
        ["rewrite_attention: 3 rewritten"],
        [("blocks.0", "ab", "proven"), ("blocks.1", "ab", "proven"), ("blocks.2", "cd", "not pruned: mean")],
        lambda: ["dense: 2 runs"],
        lambda: ["Eq(n, 4): 1 hits"],
    )
    assert str(Report((step,), {"z": 1, "a: b": 2})).splitlines() == [
        "graph 0: step (one scale)",
        "  pass rewrite_attention: 3 rewritten",
        "  layer class ab: 2 layers, blocks.0 to blocks.1; proven",
        "  layer class cd: 1 layers, blocks.2 to blocks.2; not pruned: mean",
        "  guard Eq(n, 4): 1 hits",
        "  variant dense: 2 runs",
        "events:",
        "  2 x a: b",
        "  1 x z",
    ]
    assert str(Report((), {})) == "events: none"
