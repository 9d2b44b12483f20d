"""The kernels that plain attention chooses from, on a CUDA device, and the choice itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toprovar_compile.kernels import fae_reference, plain_attention
from toprovar_compile.report import counters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = 2e-2  # of bfloat16: the probabilities are rounded to it before the product with v, and so is the result
SCALE = 0.3


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing known, in memory or on disk; every torch.empty filled with NaN."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plain_attention, "_known", {})
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: int, m: int, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, n, 3, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 2, 3, m, d, device="cuda", dtype=torch.bfloat16).unbind(0)
    return q, k, v


@pytest.mark.parametrize("name", plain_attention.candidates())
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 64), (9, 14, 64), (169, 424, 128)])
def test_candidates_are_right_or_say_that_they_do_not_run(name: str, n: int, m: int, d: int) -> None:
    q, k, v = inputs(n, m, d)
    keep = torch.rand(2, 1, n, m, device="cuda") > 0.3
    keep[0, :, 0] = False
    bias = torch.randn(3, n, m, device="cuda")
    run = plain_attention.candidates()[name]
    for mask in (None, keep, keep.any(1).any(1)[:, None, None], bias, bias.masked_fill(~keep, -math.inf)):
        try:
            out = run(q, k, v, mask, SCALE)
        except RuntimeError:
            continue
        want = fae_reference(q.double(), k.double(), v.double(), mask, SCALE)[0]
        torch.testing.assert_close(out.double(), want, atol=TOLERANCE, rtol=TOLERANCE)
        assert out.transpose(1, 2).is_contiguous()


def test_the_winner_is_no_slower_than_what_pytorch_prefers() -> None:
    q, k, v = inputs(1024, 2240)
    plain_attention.attend(q, k, v, None, SCALE)
    ((_, choice),) = plain_attention.chosen().items()
    usual = plain_attention.time_ms(lambda: plain_attention.by_pytorch(q, k, v, None, SCALE), q.device)
    assert choice["ms"][choice["winner"]] <= 1.25 * usual


def test_a_capture_times_nothing() -> None:
    q, k, v = inputs(100, 200)
    counters.reset()
    plain_attention.by_pytorch(q, k, v, None, SCALE)  # cuDNN prepares itself outside
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plain_attention.attend(q, k, v, None, SCALE)
    graph.replay()
    want = fae_reference(q.double(), k.double(), v.double(), None, SCALE)[0]
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE, rtol=TOLERANCE)
    assert plain_attention.chosen() == {}
    assert any("a CUDA graph is captured" in event for event in counters.snapshot())


def test_later_processes_read_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(100, 200)
    plain_attention.attend(q, k, v, None, SCALE)
    first = plain_attention.chosen()
    monkeypatch.setattr(plain_attention, "_known", {})
    monkeypatch.setattr(plain_attention, "time_ms", None)
    plain_attention.attend(q, k, v, None, SCALE)
    assert plain_attention.chosen() == first
