"""The two largest singular values of many small matrices at once: what layer ratios are made of.

Shapes: maps (L, h, w), any strides, floating point; result (L, 2) float32, first >= second >= 0. Where h or w is 1 the
second is 0, as it is for a map of zeros; a map that holds NaN or infinity gives NaN. For inference: no gradient.

Numerics: the relative error of both is below 1e-4 for first / second up to 1e4, whatever the gaps between them and the
third, and usually 1e-6 or less; above 1e6 the second is lost in the rounding of a float32 map.

With G the Gram matrix of the shorter side, G^(2^k) / trace tends to the projector on the largest eigenvectors, whose
longest column v gives s1 = |X v|; the same of X - (X v) v^T gives s2. Taking s2 from the deflated map, not from G, is
what keeps it exact where s1 >> s2, and squaring 13 times bounds the error where s1 ~ s2 ~ s3: a Rayleigh quotient after
power p is at most n / (2 e p) off, a bound that is hard to come near. On CUDA that is one Triton program a map, in one
launch; elsewhere, and for maps larger than entropy maps get, the eigenvalues of G in float64.
"""

# Triton infers the types of a kernel's arguments; annotations other than constexpr would change what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.kernels._triton import HAS_TRITON, tl, triton

_SQUARINGS = 13
_MAX_SHORT, _MAX_LONG = (
    64,
    128,
)  # sides of the largest map that the kernel takes: two tiles of the short side fit registers
_NUM_WARPS = 8


def top_singular_values_reference(maps: Tensor) -> Tensor:
    """The definition of correct: (L, h, w) -> (L, 2) in float64."""
    values: Tensor = torch.linalg.svdvals(maps.double())[..., :2]
    return torch.nn.functional.pad(values, (0, 2 - values.shape[-1]))


@triton.jit
def _top_direction(x, SQUARINGS: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """A unit vector [BC] that x [BR, BC] stretches most, or 0 for a map of zeros."""
    index = tl.arange(0, BC)
    diagonal = index[:, None] == index[None, :]
    g = tl.dot(tl.trans(x), x, input_precision=PRECISION)  # [BC, BC]
    total = tl.sum(tl.sum(tl.where(diagonal, g, 0.0), 1), 0)
    for _ in range(SQUARINGS):
        g *= 1.0 / tl.where(total > 0, total, 1.0)
        g = tl.dot(g, g, input_precision=PRECISION)
        total = tl.sum(tl.sum(tl.where(diagonal, g, 0.0), 1), 0)
    longest = tl.argmax(tl.sum(tl.where(diagonal, g, 0.0), 0), 0)
    v = tl.sum(tl.where(index[:, None] == longest, g, 0.0), 0)
    v /= tl.where(total > 0, tl.max(tl.abs(v), 0), 1.0)
    length = tl.sqrt(tl.sum(v * v, 0))
    return v / tl.where(length > 0, length, 1.0)


@triton.jit(do_not_specialize=["rows", "cols"])
def _singular_values_kernel(
    maps_ptr,
    out_ptr,
    stride_map,
    stride_row,
    stride_col,
    rows,
    cols,
    SQUARINGS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BR).to(tl.int64)
    col = tl.arange(0, BC).to(tl.int64)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    where = maps_ptr + which * stride_map + row[:, None] * stride_row + col[None, :] * stride_col
    x = tl.load(where, mask=inside, other=0.0).to(tl.float32)  # [BR, BC]
    poison = tl.sum(tl.sum(0.0 * x, 1), 0)  # NaN where the map has NaN or infinity, else 0
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    size = tl.max(tl.max(tl.abs(x), 1), 0)
    x /= tl.where(size > 0, size, 1.0)  # its squares neither overflow nor vanish

    v = _top_direction(x, SQUARINGS, BC, PRECISION)
    u = tl.sum(x * v[None, :], 1)  # [BR]
    first = tl.sqrt(tl.sum(u * u, 0))
    x -= u[:, None] * v[None, :]
    v = _top_direction(x, SQUARINGS, BC, PRECISION)
    u = tl.sum(x * v[None, :], 1)
    second = tl.minimum(tl.sqrt(tl.sum(u * u, 0)), first)
    tl.store(out_ptr + 2 * which, first * size + poison)
    tl.store(out_ptr + 2 * which + 1, second * size + poison)


def _launch_singular_values(maps: Tensor) -> Tensor:
    """Run the Triton kernel; sides within _MAX_SHORT and _MAX_LONG."""
    count, h, w = maps.shape
    if w > h:
        maps, h, w = maps.transpose(1, 2), w, h
    out = torch.empty((count, 2), dtype=torch.float32, device=maps.device)
    with torch.cuda.device(maps.device) if maps.is_cuda else nullcontext():
        _singular_values_kernel[(count,)](
            maps,
            out,
            *maps.stride(),
            h,
            w,
            SQUARINGS=_SQUARINGS,
            BR=max(16, triton.next_power_of_2(h)),
            BC=max(16, triton.next_power_of_2(w)),
            PRECISION="ieee",
            num_warps=_NUM_WARPS,
        )
    return out


def _check(maps: Tensor) -> None:
    if maps.dim() != 3 or not maps.is_floating_point():
        raise OptionError(
            f"got {maps.dtype} of shape {tuple(maps.shape)}",
            where="toprovar::top_singular_values",
            expected="floating point maps (L, h, w)",
        )


def _by_eigenvalues(maps: Tensor) -> Tensor:
    """The PyTorch form."""
    _check(maps)
    if maps.numel() == 0:
        return torch.zeros((maps.shape[0], 2), dtype=torch.float32, device=maps.device)
    x = maps.double()
    broken = ~torch.isfinite(x).all(-1).all(-1)
    x = x.masked_fill(broken[:, None, None], 0.0)  # LAPACK would raise
    size = x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    x = (x.mT if x.shape[1] > x.shape[2] else x) / size
    values = torch.linalg.eigvalsh(x @ x.mT)[:, -2:].clamp_min(0.0).sqrt().flip(-1) * size.squeeze(-1)
    values = torch.nn.functional.pad(values, (0, 2 - values.shape[-1]))
    return values.masked_fill(broken[:, None], torch.nan).float()


def _top_singular_values_cuda(maps: Tensor) -> Tensor:
    _check(maps)
    h, w = maps.shape[1:]
    fits = 0 < min(h, w) <= _MAX_SHORT and max(h, w) <= _MAX_LONG and maps.dtype != torch.float64
    if not HAS_TRITON or not fits or maps.numel() == 0:
        return _by_eigenvalues(maps)
    return _launch_singular_values(maps)


torch.library.define(
    "toprovar::top_singular_values",
    "(Tensor maps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.impl("toprovar::top_singular_values", "CPU", _by_eigenvalues)
torch.library.impl("toprovar::top_singular_values", "CUDA", _top_singular_values_cuda)


def _fake(maps: Tensor) -> Tensor:
    return maps.new_empty((maps.shape[0], 2), dtype=torch.float32)


torch.library.register_fake("toprovar::top_singular_values", _fake)

top_singular_values = torch.ops.toprovar.top_singular_values.default
