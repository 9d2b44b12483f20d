"""Choosing the fastest plain attention, with kernels that run on CPU and times that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.kernels import fae_reference, plain_attention
from toprovar_compile.report import counters

SCALE = 0.3
MACHINE = {"gpu": "none"}


class Lab:
    """Stands in for the device: candidates note that they ran, and take the milliseconds they are told to."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {"cudnn": 1.0, "flash": 2.0, "efficient": 3.0, "ours": 4.0}
        self.ran: list[str] = []
        self.timed: list[str] = []
        self.capturing = False

    def candidate(self, name: str) -> plain_attention.Candidate:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
            if name not in self.ms:
                raise RuntimeError(f"{name} does not run here\nwith details")
            self.ran.append(name)
            return plain_attention.by_pytorch(q, k, v, bias, scale)

        return run

    def time_ms(self, run: Callable[[], Tensor], device: torch.device) -> float:
        before = len(self.ran)
        run()
        self.timed.append(self.ran.pop() if len(self.ran) > before else "pytorch")
        if self.ran and self.ran[-1] == self.timed[-1]:
            self.ran.pop()  # it ran to be compared before it was timed
        return self.ms.get(self.timed[-1], 0.5)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plain_attention, "_candidates", {name: lab.candidate(name) for name in lab.ms})
    monkeypatch.setattr(plain_attention, "_known", {})
    monkeypatch.setattr(plain_attention, "time_ms", lab.time_ms)
    monkeypatch.setattr(plain_attention, "_machine", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: lab.capturing)
    counters.reset()
    yield lab
    counters.reset()


def new_process() -> None:
    plain_attention._known.clear()


def inputs(n: int = 9, m: int = 14, b: int = 2, h: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q = torch.randn(b, n, h, 16).to(dtype).transpose(1, 2)
    k, v = (torch.randn(b, h, m, 16).to(dtype) for _ in range(2))
    return q, k, v


def attend(n: int = 9, m: int = 14, bias: Tensor | None = None, **given: Any) -> Tensor:
    q, k, v = inputs(n, m, **given)
    return plain_attention.attend(q, k, v, bias, SCALE)


def test_the_fastest_serves_its_class_and_is_measured_once(lab: Lab) -> None:
    lab.ms["efficient"] = 0.25
    q, k, v = inputs()
    out = plain_attention.attend(q, k, v, None, SCALE)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=SCALE))
    assert out.transpose(1, 2).is_contiguous()
    for n, m in ((9, 14), (16, 16), (10, 9)):
        attend(n, m)
    assert lab.timed == ["cudnn", "flash", "efficient", "ours"]
    assert lab.ran == ["efficient"] * 4
    (event,) = counters.snapshot()
    assert event.startswith(
        "plain attention measured: efficient (cudnn 1 ms, flash 2 ms, efficient 0.25 ms, ours 4 ms)"
    )
    ((kind, choice),) = plain_attention.chosen().items()
    assert kind == "float32 D16 without bias, q (B, n, H, D), B*H <= 8, n <= 16, m <= 16"
    assert choice == {"winner": "efficient", "ms": lab.ms, "failed": {}}


@pytest.mark.parametrize(
    "other",
    [
        {"n": 17},
        {"m": 17},
        {"b": 3},
        {"dtype": torch.bfloat16},
        {"bias": torch.zeros(14)},
        {"bias": torch.ones(14) > 0},
    ],
)
def test_another_class_is_measured_for_itself(lab: Lab, other: dict[str, Any]) -> None:
    attend()
    attend(**other)
    assert len(lab.timed) == 8 and len(plain_attention.chosen()) == 2


def test_the_memory_of_the_queries_makes_a_class(lab: Lab) -> None:
    q, k, v = inputs()
    plain_attention.attend(q, k, v, None, SCALE)
    plain_attention.attend(q.contiguous(), k, v, None, SCALE)
    assert len(plain_attention.chosen()) == 2


def test_kernels_that_do_not_run_are_left_out(lab: Lab) -> None:
    del lab.ms["cudnn"], lab.ms["flash"]
    attend()
    (choice,) = plain_attention.chosen().values()
    assert choice["winner"] == "efficient"
    assert choice["failed"] == {name: f"{name} does not run here" for name in ("cudnn", "flash")}


def test_a_kernel_of_wrong_numbers_is_left_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: Any) -> Tensor:
        return plain_attention.by_pytorch(*inputs) + torch.nan

    plain_attention.register("cudnn", wrong)
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    out = plain_attention.attend(q, k, v, None, SCALE)
    assert not out.isnan().any()
    (choice,) = plain_attention.chosen().values()
    assert choice["winner"] == "flash" and choice["failed"] == {"cudnn": "its result is off by nan"}


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(lab: Lab, scale: float) -> None:
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    want = fae_reference(q, k, v, None, scale)[0]
    torch.testing.assert_close(plain_attention.attend(q, k, v, None, scale), want)


def test_where_no_kernel_of_pytorch_runs_alone_what_it_prefers_competes(lab: Lab) -> None:
    for name in ("cudnn", "flash", "efficient"):
        del lab.ms[name]
    attend()
    attend()
    (choice,) = plain_attention.chosen().values()
    assert choice["winner"] == "pytorch" and choice["ms"] == {"ours": 4.0, "pytorch": 0.5}
    assert lab.ran == []


def test_switches_of_pytorch_are_respected(lab: Lab) -> None:
    attend()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        attend()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    attend()
    assert lab.ran == ["cudnn", "flash", "cudnn"]
    assert [choice["failed"] for choice in plain_attention.chosen().values()] == [{}, {"cudnn": "switched off"}]


def test_later_processes_read_what_was_measured(lab: Lab, tmp_path: Path) -> None:
    attend()
    first = plain_attention.chosen()
    (path,) = (tmp_path / "toprovar_compile").iterdir()
    assert json.loads(path.read_text())["machine"] == MACHINE
    new_process()
    lab.ms["flash"] = 0.1
    attend()
    assert len(lab.timed) == 4 and plain_attention.chosen() == first


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": [{"class": {}, "choice": {}}]}'])
def test_a_damaged_file_is_measured_again(lab: Lab, tmp_path: Path, text: str) -> None:
    attend()
    (path,) = (tmp_path / "toprovar_compile").iterdir()
    path.write_text(text)
    new_process()
    attend()
    assert len(lab.timed) == 8
    assert any(event.startswith("plain attention measured again: ") for event in counters.snapshot())


def test_a_winner_that_is_gone_is_measured_again(lab: Lab) -> None:
    lab.ms["ours"] = 0.1
    attend()
    new_process()
    del plain_attention._candidates["ours"]
    attend()
    assert lab.ran == ["ours", "cudnn"]


def test_a_folder_that_cannot_be_written_is_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_attention, "cache_folder", lambda: Path("/proc/nothing"))
    attend()
    assert any(event.startswith("plain attention not kept: ") for event in counters.snapshot())


def test_nothing_is_timed_inside_a_capture(lab: Lab) -> None:
    lab.capturing = True
    attend()
    assert lab.timed == lab.ran == [] and plain_attention.chosen() == {}
    (event,) = counters.snapshot()
    assert event.startswith("plain attention not measured: a CUDA graph is captured; pytorch serves float32 D16 ")
    lab.capturing = False
    attend()
    assert lab.timed == ["cudnn", "flash", "efficient", "ours"]


def test_inside_a_capture_the_nearest_class_serves(lab: Lab) -> None:
    lab.ms["ours"] = 0.1
    attend(n=9)
    lab.ms["ours"] = 9.0
    attend(n=900)
    lab.capturing = True
    attend(n=40)
    attend(n=400)
    attend(n=400, bias=torch.zeros(14))
    assert lab.ran == ["ours", "cudnn", "ours", "cudnn"]


def test_out_of_memory_is_no_measurement(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(plain_attention, "time_ms", full)
    attend()
    monkeypatch.setattr(plain_attention, "time_ms", lab.time_ms)
    attend()
    assert [name for name in counters.snapshot() if "out of memory" in name]
    assert set(lab.ran) == {"cudnn"}


@pytest.mark.parametrize("m", [14, 16])
@pytest.mark.parametrize("shape", [(2, 3, 9, 0), (2, 1, 9, 0), (9, 0), (1, 1, 1, 0), (0,), (2, 1, 1, 1), ()])
def test_biases_and_masks_of_any_shape(shape: tuple[int, ...], m: int) -> None:
    shape = tuple(size or m for size in shape)
    q, k, v = inputs(9, m)
    mask = torch.rand(shape) > 0.3
    for bias in (mask, torch.randn(shape), torch.zeros(shape).masked_fill_(~mask, -math.inf)):
        want = fae_reference(q, k, v, bias, SCALE)[0]
        torch.testing.assert_close(plain_attention.by_pytorch(q, k, v, bias, SCALE), want)
        prepared = plain_attention.additive(q, k, bias)
        assert prepared is not None and prepared.shape == (2, 3, 9, m)
        assert all(stride % 8 == 0 for stride in prepared.stride()[:-1])
        torch.testing.assert_close(fae_reference(q, k, v, prepared, SCALE)[0], want)


def test_fully_masked_rows_are_zero_whatever_a_kernel_makes_of_them() -> None:
    keep = torch.ones(3, 9, 14, dtype=torch.bool)
    keep[1, 3] = False
    for bias in (keep, torch.zeros(3, 9, 14).masked_fill_(~keep, -math.inf)):
        out = plain_attention._finish(torch.full((2, 3, 9, 16), math.nan).index_fill_(1, torch.tensor([0, 2]), 1), bias)
        assert (out[:, 1, 3] == 0).all() and (out[:, 0] == 1).all() and out[:, 1, 4].isnan().all()
