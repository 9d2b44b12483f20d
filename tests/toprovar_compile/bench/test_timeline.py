from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from toprovar_compile.bench import timeline
from toprovar_compile.bench.timeline import Timeline, Work

CPU = torch.device("cpu")


def test_spans_lie_between_marks() -> None:
    line = Timeline(CPU)

    def call() -> str:
        time.sleep(0.01)
        line.mark("second")
        line.mark("third")
        time.sleep(0.02)
        return "done"

    out, spans = line.record(call, "first")
    assert out == "done"
    assert [span.name for span in spans] == ["first", "second", "third"]
    assert spans[0].ms >= 10 and spans[1].ms < 10 and spans[2].ms >= 20
    assert all(span.ms == span.host_ms for span in spans)


def test_marks_outside_a_recording_are_forgotten() -> None:
    line = Timeline(CPU)
    line.mark("before")
    with pytest.raises(ZeroDivisionError):
        line.record(lambda: 1 / 0, "first")
    line.mark("between")
    assert [span.name for span in line.record(lambda: None, "first")[1]] == ["first"]


def event(name: str, start: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start))


def test_events_belong_to_the_span_they_start_in() -> None:
    events = [
        event("cudaLaunchKernel", 1.0),  # before the first mark
        event("timeline mark 0", 10.0),
        event("timeline mark 0", 10.5, DeviceType.CUDA),
        event("cudaLaunchKernel", 11.0),
        event("cuLaunchKernelEx", 12.0),
        event("aten::mm", 12.5),
        event("gemm", 13.0, DeviceType.CUDA),
        event("Memcpy DtoD", 14.0, DeviceType.CUDA),
        event("timeline mark 1", 20.0),
        event("cudaGraphLaunch", 21.0),
        event("gemm", 22.0, DeviceType.CUDA),
        event("norm", 23.0, DeviceType.CUDA),
        event("timeline mark 2", 30.0),  # the end, no span
    ]
    assert timeline._work(["text", "scale"], events) == [Work("text", 1, 2), Work("scale", 2, 1)]
