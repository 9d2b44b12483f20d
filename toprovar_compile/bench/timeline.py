"""Where the time of one image goes: marks set while it is generated, on the device's stream and on the host."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_MARK = "timeline mark"


@dataclass(frozen=True)
class Span:
    """From a mark to the next one: milliseconds on the device (where there is none, on the host) and on the host."""

    name: str
    ms: float
    host_ms: float


@dataclass(frozen=True)
class Work:
    """What a span had the device do: kernels run, and calls of the host that launched them (a CUDA graph is one)."""

    name: str
    kernels: int
    launches: int


class Timeline:
    """Set `mark` at the points of interest; `record` and `profile` give what lay between them.

    Marks outside of `record` and `profile` cost nothing and are forgotten.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._set: Callable[[str], None] | None = None

    @property
    def on(self) -> bool:
        """Whether marks are being recorded."""
        return self._set is not None

    def mark(self, name: str) -> None:
        """What follows, up to the next mark, is `name`."""
        if self._set is not None:
            self._set(name)

    def record(self, call: Callable[[], Any], first: str) -> tuple[Any, list[Span]]:
        """The result of `call` and the spans of it; the one up to the first mark is called `first`."""
        cuda = self.device.type == "cuda"
        points: list[tuple[str, Any, float]] = []

        def point(name: str) -> None:
            event: Any = torch.cuda.Event(enable_timing=True) if cuda else None  # type: ignore[no-untyped-call]
            if cuda:
                event.record()
            points.append((name, event, time.perf_counter()))

        if cuda:
            torch.cuda.synchronize(self.device)
        out = self._run(call, first, point)
        if cuda:
            torch.cuda.synchronize(self.device)
        spans = []
        for (name, event, at), (_, next_event, next_at) in itertools.pairwise(points):
            host = 1e3 * (next_at - at)
            spans.append(Span(name, event.elapsed_time(next_event) if cuda else host, host))
        return out, spans

    def profile(self, call: Callable[[], Any], first: str) -> list[Work]:
        """Kernels and launches of each span, by torch.profiler; the device is waited for at each mark. CUDA only."""
        from torch.profiler import ProfilerActivity, profile, record_function

        names: list[str] = []
        open_range: list[Any] = []

        def close() -> None:
            torch.cuda.synchronize(self.device)
            while open_range:
                open_range.pop().__exit__(None, None, None)

        def point(name: str) -> None:
            close()
            names.append(name)
            open_range.append(record_function(f"{_MARK} {len(names) - 1}"))
            open_range[-1].__enter__()

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            self._run(call, first, point)
            close()
        return _work(names[:-1], profiler.events() or [])

    def _run(self, call: Callable[[], Any], first: str, point: Callable[[str], None]) -> Any:
        self._set = point
        try:
            point(first)
            out = call()
            point("")
            return out
        finally:
            self._set = None


def _work(names: Sequence[str], events: Sequence[Any]) -> list[Work]:
    """Attribute events to the spans that they start in."""
    device_type: Any = torch.autograd.DeviceType  # type: ignore[attr-defined]
    starts = [0.0] * len(names)
    kernels, launches = [0] * len(names), [0] * len(names)
    on_host = [e for e in events if e.device_type == device_type.CPU]
    for event in on_host:
        if event.name.startswith(_MARK) and (i := int(event.name.rpartition(" ")[2])) < len(names):
            starts[i] = event.time_range.start

    def count(into: list[int], event: Any) -> None:
        i = bisect_right(starts, event.time_range.start) - 1
        if i >= 0:
            into[i] += 1

    for event in on_host:
        if event.name.startswith(_LAUNCHES):
            count(launches, event)
    for event in events:
        if event.device_type == device_type.CUDA and not event.name.startswith(("Mem", _MARK)):
            count(kernels, event)
    return [Work(*row) for row in zip(names, kernels, launches, strict=True)]
