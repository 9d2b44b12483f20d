"""Maps that are hard on top_singular_values; run as a program, they go through its kernel in Triton's interpreter.

The program is started by test_singular_values.py.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from toprovar_compile.kernels.singular_values import _launch_singular_values, top_singular_values_reference

TOLERANCE = 1e-4  # of either value, relative: what the docstring of the operator promises
ROUNDING = 2e-7  # of the first value: what float32 cannot tell from zero in the second


def hard_maps() -> dict[str, Tensor]:
    """Maps (L, h, w) by what makes them hard: no gaps, a dominant value, no second one, odd and long sides."""
    torch.manual_seed(0)
    steps = torch.linspace(0, 1, 64)
    maps = {
        "entropy": torch.stack([7 + amount * torch.rand(48, 64) for amount in (5.0, 0.5, 0.05)]),
        "ratio 1e4": _with_values([1e4, 1, 0.9]),
        "second = third": _with_values([100, 1, 1, 1, 0.5]),
        "first = second": _with_values([1, 1, 1]),
        "dense at the top": _with_values((1 - 1e-3 * steps).tolist()),
        "dense below the first": _with_values([500, *(1 - 1e-3 * steps[1:]).tolist()]),
        "spread over all columns": _hadamard(1 - 1e-3 * steps),
        "identity": torch.eye(64).expand(2, 64, 64),
        "diagonal": torch.diag(1 - 2e-4 * (steps > 0)).unsqueeze(0),
        "constant": torch.full((1, 64, 64), 3.3),
        "zeros": torch.zeros(2, 16, 16),
        "tiny and huge": torch.rand(2, 9, 9) * torch.tensor([1e-30, 1e30]).view(2, 1, 1),
        "transposed": torch.rand(2, 63, 25).transpose(1, 2),
    }
    sides = ((1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (13, 13), (37, 111))
    return maps | {f"{h} x {w}": 1 + torch.rand(2, h, w) for h, w in sides}


def check(got: Tensor, maps: Tensor) -> None:
    """Raise AssertionError where `got` is not the two largest singular values of the maps."""
    want = top_singular_values_reference(maps)
    torch.testing.assert_close(got[:, 0].double(), want[:, 0], rtol=TOLERANCE, atol=0)
    close = (got[:, 1] - want[:, 1]).abs() <= TOLERANCE * want[:, 1] + ROUNDING * want[:, 0]
    if got.dtype != torch.float32 or not close.all():
        raise AssertionError(f"{got.tolist()} instead of {want.tolist()}")


def _with_values(values: list[float]) -> Tensor:
    sides = [torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q[:, : len(values)] for _ in range(2)]
    return ((sides[0] * torch.tensor(values)) @ sides[1].mT).float().unsqueeze(0)


def _hadamard(values: Tensor) -> Tensor:
    """All entries of the singular vectors have one size, so that no column of the map stands out."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < len(values):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h * values @ h.mT / len(h)).float().unsqueeze(0)


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about NaN
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    for maps in hard_maps().values():
        check(_launch_singular_values(maps), maps)
    broken = torch.ones(3, 9, 14)
    broken[0, 2, 3], broken[2, 0, 0] = math.nan, math.inf
    if _launch_singular_values(broken).isnan().all(1).tolist() != [True, False, True]:
        raise AssertionError("NaN and infinity must show in the values of their map, and only there")
    print("checked")


if __name__ == "__main__":
    main()
