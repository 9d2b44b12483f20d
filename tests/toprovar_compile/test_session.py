"""Sessions: one for each generation, thread and nesting, freed however the generation ends."""

from __future__ import annotations

import logging
import threading

import pytest

from toprovar_compile.plan import Plan
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import Session, current_session, generation

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 3))


def _open() -> Session:
    return Session(SCHEDULE, lambda: "0123")


def test_no_session_outside_a_generation() -> None:
    assert current_session() is None
    with generation(SCHEDULE, lambda: "0123") as session:
        assert current_session() is session
        assert (session.fingerprint(), session.scale, session.plan, session.ran) == ("0123", -1, None, None)
    assert current_session() is None


def test_nested_generations() -> None:
    with generation(SCHEDULE, lambda: "outer") as outer:
        with generation(SCHEDULE, lambda: "inner") as inner:
            assert current_session() is inner
        assert current_session() is outer


def test_closed_after_an_exception() -> None:
    closed: list[str] = []
    with pytest.raises(ValueError, match="half way"), generation(SCHEDULE, lambda: "0123") as session:
        session.on_close += [lambda: closed.append("first"), lambda: closed.append("second")]
        raise ValueError("half way")
    assert closed == ["first", "second"]
    assert current_session() is None


def test_on_close_runs_outside_the_session() -> None:
    seen: list[Session | None] = []
    with generation(SCHEDULE, lambda: "0123") as session:
        session.on_close.append(lambda: seen.append(current_session()))
    assert seen == [None]


def test_what_was_stored_is_freed_at_the_end() -> None:
    with generation(SCHEDULE, lambda: "0123") as session:
        session.store["session"] = session  # as steps refer back to it
        session.on_close.append(lambda: session.store["session"].store.update(last=1))
    assert session.store == {}
    assert session.on_close == []


def test_scales() -> None:
    session = _open()
    assert [(s, session.scale) for s in session.scales()] == [(0, 0), (1, 1), (2, 2)]


def test_scales_up_to_the_exit_of_the_plan() -> None:
    session, seen = _open(), []
    for s in session.scales():
        if s == 0:  # bound by the first compiled step
            session.plan = Plan.keep_share(SCHEDULE, 1, 1.0, 3, exit_scale=2)
        seen.append(s)
    assert seen == [0, 1]


def test_scales_that_a_compiled_step_did_not_run(caplog: pytest.LogCaptureFixture) -> None:
    counters.reset()
    session = _open()
    with caplog.at_level(logging.WARNING, "toprovar_compile"):
        for s in session.scales():
            if s == 0:
                session.ran = 0
    (event,) = counters.snapshot()
    assert event.startswith("fallback: a scale ran outside the compiled steps") and counters.snapshot()[event] == 2
    assert "recompile_limit" in caplog.text


@pytest.mark.parametrize("compiled", [True, False])
def test_scales_all_compiled_or_none(compiled: bool) -> None:
    counters.reset()
    session = _open()
    for s in session.scales():
        session.ran = s if compiled else None
    assert counters.snapshot() == {}


def test_threads_have_their_own() -> None:
    seen: list[Session | None] = []
    with generation(SCHEDULE, lambda: "0123"):
        thread = threading.Thread(target=lambda: seen.append(current_session()))
        thread.start()
        thread.join()
    assert seen == [None]
