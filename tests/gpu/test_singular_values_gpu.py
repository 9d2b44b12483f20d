"""toprovar::top_singular_values on a CUDA device, held to float64."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from toprovar_compile.kernels import top_singular_values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

shared = runpy.run_path(str(Path(__file__).parents[1] / "kernels" / "interpret_singular_values.py"))
MAPS = shared["hard_maps"]()


@pytest.mark.parametrize("kind", MAPS)
def test_hard_maps(kind: str) -> None:
    maps = MAPS[kind].cuda()
    shared["check"](top_singular_values(maps), maps)


def test_half_precision_and_larger_maps() -> None:
    for maps in (torch.rand(2, 9, 9).bfloat16(), torch.rand(2, 70, 200), torch.rand(1, 9, 9).double()):
        shared["check"](top_singular_values(maps.cuda()), maps.cuda())


def test_nan_and_infinity_stay_in_their_map() -> None:
    maps = torch.ones(3, 9, 14, device="cuda")
    maps[0, 2, 3], maps[2, 0, 0] = math.nan, math.inf
    assert top_singular_values(maps).isnan().all(1).tolist() == [True, False, True]


def test_capture_and_replay() -> None:
    maps = torch.rand(40, 64, 64, device="cuda")
    top_singular_values(maps)  # builds the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = top_singular_values(maps)
    maps.copy_(5 + torch.rand_like(maps))
    graph.replay()
    assert torch.equal(values, top_singular_values(maps))


def test_opcheck() -> None:
    torch.library.opcheck(top_singular_values, (torch.rand(3, 5, 7, device="cuda"),))


def test_forty_layers_take_less_than_half_a_millisecond() -> None:
    maps = 5 + torch.rand(40, 64, 64, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        start.record()
        top_singular_values(maps)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    assert min(times) < 0.5
