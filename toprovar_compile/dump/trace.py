"""Compile time and run time as a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

from typing import Any

from toprovar_compile.dump.facts import UnitFacts
from toprovar_compile.dump.record import Generation

_COMPILE, _SCALES, _PARTS = 1, 2, 3
_LANES = {_COMPILE: "compilation of variants", _SCALES: "generation: scales", _PARTS: "generation: layers"}


def trace_events(units: dict[str, UnitFacts], generation: Generation | None) -> dict[str, Any]:
    """The trace in the Chrome format, times in microseconds of one clock."""
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
        for lane, name in _LANES.items()
    ]
    for name, unit in units.items():
        for v in unit.variants:
            events.append(_event(f"{name}: {v.name}", _COMPILE, v.started, v.started + v.seconds, runs=v.hits))
    if generation is not None:
        by_scale: dict[int, list[Any]] = {}
        for part in generation.parts:
            by_scale.setdefault(part.scale, []).append(part)
            what = f"layer {part.what}" if isinstance(part.what, int) else part.what
            events.append(_event(what, _PARTS, part.start, part.end, scale=part.scale, action=part.action))
        for s, parts in by_scale.items():
            events.append(_event(f"scale {s}", _SCALES, parts[0].start, parts[-1].end))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(name: str, lane: int, start: float, end: float, **args: Any) -> dict[str, Any]:
    return {
        "name": name, "ph": "X", "pid": 1, "tid": lane, "ts": 1e6 * start, "dur": 1e6 * (end - start), "args": args
    }  # fmt: skip
