"""toprovar::text_probabilities on CPU, its kernel in Triton's interpreter, and the tiles that are picked."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.kernels import text_probabilities

module: Any = importlib.import_module("toprovar_compile.kernels.text_probabilities")


def operands(n: int, heads: int, per_head: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, keys and a bias that leaves out the last third of the keys, and all of the first head of the second sample."""
    torch.manual_seed(0)
    bias = torch.randn(2, heads, per_head)
    bias[..., per_head * 2 // 3 :] = -torch.inf
    bias[1, 0] = -torch.inf
    return torch.randn(2, n, width, dtype=dtype), torch.randn(2, heads * per_head, width, dtype=dtype), bias.flatten(1)


def test_probabilities_of_each_head() -> None:
    x, keys, bias = operands(5, 3, 16, 24, torch.float32)
    p = text_probabilities(x, keys, bias, 0.3, 3)
    want = torch.softmax((0.3 * x @ keys.mT + bias.unsqueeze(1)).view(2, 5, 3, 16), -1)
    want[1, :, 0] = 0  # no key at all
    torch.testing.assert_close(p, want.flatten(2))


def test_fake_form_and_compilation() -> None:
    x, keys, bias = operands(4, 2, 16, 8, torch.float32)
    torch.library.opcheck(text_probabilities, (x, keys, bias, 0.3, 2), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("heads", [5, 4])
def test_what_does_not_fit_is_refused(heads: int) -> None:
    x, keys, bias = operands(4, 2, 24, 8, torch.float32)  # neither 48 / 5 nor 12 is a power of two
    with pytest.raises(OptionError, match="a power of two"):
        text_probabilities(x, keys, bias, 0.3, heads)


@pytest.mark.parametrize(
    ("cols", "per_head", "width"), [(512, 32, 2048), (896, 32, 3584), (1024, 64, 2048), (48, 16, 96)]
)
def test_a_tile_holds_whole_heads_and_divides_keys_and_width(cols: int, per_head: int, width: int) -> None:
    for small in (False, True):
        for n in (1, 4, 36, 144, 400, 1024, 4096):
            tile = module.pick_tile(n, 2, cols, per_head, width, 132, small=small)
            if cols == 48:
                assert tile is None
                continue
            assert cols % tile.block_n == 0 and tile.block_n % per_head == 0 and width % tile.block_k == 0


@pytest.mark.slow
def test_kernel_in_the_interpreter(interpret: Callable[[str], str]) -> None:
    interpret(__file__)


def main() -> None:
    """What the interpreter runs."""
    for n, heads, per_head in ((5, 4, 16), (33, 2, 32), (16, 2, 64)):
        x, keys, bias = operands(n, heads, per_head, 64, torch.float16)
        tile = module.Tile(16, 64, 32, 4, 2, 1.0)
        p = module._launch(x, keys, bias, 0.1, heads, tile)
        want = module.text_probabilities_reference(x.double(), keys.double(), bias.double(), 0.1, heads)
        torch.testing.assert_close(p.double(), want, rtol=2e-3, atol=2e-3)


if __name__ == "__main__":
    main()
