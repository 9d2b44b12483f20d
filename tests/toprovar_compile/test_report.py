"""Counters, and who is told of the graphs that run."""

from __future__ import annotations

import pytest

from toprovar_compile.report import Counters, GraphReport, counters, ran, watch_graphs


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


def test_graphs_that_run_are_seen_by_all_who_watch() -> None:
    early, late = GraphReport("plain", "early"), GraphReport("step", "late")
    ran(early)
    with watch_graphs() as outer:
        with watch_graphs() as inner:
            ran(late)
        ran(early)
    ran(late)
    assert list(outer.values()) == [late, early] and list(inner.values()) == [late]
