"""toprovar::top_singular_values on CPU, and its kernel in Triton's interpreter, held to float64."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from toprovar_compile.errors import OptionError
from toprovar_compile.kernels import top_singular_values

SCRIPT = Path(__file__).with_name("interpret_singular_values.py")
shared = runpy.run_path(str(SCRIPT))
MAPS = shared["hard_maps"]()


@pytest.mark.parametrize("kind", MAPS)
def test_hard_maps(kind: str) -> None:
    shared["check"](top_singular_values(MAPS[kind]), MAPS[kind])


def test_half_precision_and_larger_maps() -> None:
    for maps in (torch.rand(2, 9, 9).bfloat16(), torch.rand(2, 70, 200), torch.rand(1, 9, 9).double()):
        shared["check"](top_singular_values(maps), maps)


def test_one_value_means_no_second() -> None:
    assert (top_singular_values(torch.rand(3, 1, 7))[:, 1] == 0).all()
    assert (top_singular_values(torch.zeros(3, 9, 9)) == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_no_maps_or_no_places(shape: tuple[int, ...]) -> None:
    assert top_singular_values(torch.rand(shape)).tolist() == [[0.0, 0.0]] * shape[0]


def test_nan_and_infinity_stay_in_their_map() -> None:
    maps = torch.ones(3, 9, 14)
    maps[0, 2, 3], maps[2, 0, 0] = math.nan, math.inf
    values = top_singular_values(maps)
    assert values.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("maps", [torch.rand(4, 4), torch.ones(2, 4, 4, dtype=torch.int64)])
def test_other_inputs_are_refused(maps: torch.Tensor) -> None:
    with pytest.raises(OptionError, match=r"expected floating point maps \(L, h, w\)"):
        top_singular_values(maps)


def test_opcheck() -> None:
    for maps in (torch.rand(3, 5, 7), torch.rand(2, 7, 5).transpose(1, 2), torch.rand(1, 1, 1, dtype=torch.float64)):
        torch.library.opcheck(top_singular_values, (maps,))


def test_fullgraph_with_any_size() -> None:
    compiled = torch.compile(
        lambda maps: top_singular_values(maps * 2), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for side in (1, 4, 9):
        maps = torch.rand(2, side, side)
        torch.testing.assert_close(compiled(maps), top_singular_values(maps) * 2)


def test_triton_kernel_in_the_interpreter(interpret: Callable[[Path], str]) -> None:
    assert interpret(SCRIPT).split()[-1] == "checked"
