"""Probabilities of a cross-attention whose keys hold the projection of the queries (see passes/absorb_projections.py).

Formula, for head h and t = softmax over its own keys alone:
    p[b, i, h T + j] = t_j(scale * x[b, i] . keys[b, h T + j] + bias[b, h T + j])

Shapes: x (B, n, C), last dimension contiguous; keys (B, H T, C), contiguous, T a power of two; bias (B, H T) float32,
-inf where a key is not there. p (B, n, H T) has the dtype of x; a head without any key has p = 0. For inference: no
gradient.

Numerics: products are accumulated and the softmax is taken in float32. On CUDA one Triton program makes the scores of
a tile and their softmax, so that scores are never written; elsewhere, and in float32, a product and a softmax of
PyTorch.
"""

# Triton infers the types of a kernel's arguments; annotations other than constexpr would change what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.kernels._triton import HAS_TRITON, tl, triton


class Tile(NamedTuple):
    """Tokens and keys of a tile, the length of its steps along C, launch parameters, and the microseconds that one
    takes on an H200 at C = 2048."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    microseconds: float


TILES = (
    Tile(128, 256, 64, 8, 3, 30.0),
    Tile(64, 128, 64, 4, 4, 13.7),
    Tile(64, 64, 128, 4, 4, 9.7),
    Tile(16, 32, 256, 4, 4, 6.8),
)
SMALL_TILES = (  # for less than 160 KiB of shared memory; checked by building for such devices, not timed
    Tile(128, 128, 32, 8, 3, 20.0),
    Tile(64, 64, 64, 4, 3, 9.7),
    Tile(16, 64, 128, 4, 2, 8.0),
    Tile(16, 32, 128, 4, 3, 6.8),
)
MAX_KEYS = 64  # of a head; each tile holds whole heads


def pick_tile(n: int, batch: int, cols: int, per_head: int, width: int, processors: int, *, small: bool) -> Tile | None:
    """The tile that takes the fewest rounds on so many multiprocessors, for their length; None where none fits."""

    def took(tile: Tile) -> float:
        programs = -(-n // tile.block_m) * (cols // tile.block_n) * batch
        return -(-programs // processors) * tile.microseconds

    def fits(tile: Tile) -> bool:
        return cols % tile.block_n == 0 and tile.block_n >= per_head and width % tile.block_k == 0

    return min(filter(fits, SMALL_TILES if small else TILES), key=took, default=None)


def text_probabilities_reference(x: Tensor, keys: Tensor, bias: Tensor, scale: float, heads: int) -> Tensor:
    """The definition of correct, in float32, or float64 if x is."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = torch.baddbmm(bias.to(dtype).unsqueeze(1), x.to(dtype), keys.to(dtype).mT, alpha=scale)
    p = torch.softmax(scores.view(*scores.shape[:2], heads, -1), -1).nan_to_num(0.0)  # a head without keys is 0 / 0
    return p.flatten(-2).to(x.dtype)


@triton.jit(do_not_specialize=["n"])
def _probabilities_kernel(
    x_ptr,
    keys_ptr,
    bias_ptr,
    out_ptr,
    xsb,
    xsn,
    n,
    scale_log2,
    C: tl.constexpr,
    COLS: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % (COLS // BN)) * BN  # programs that share tokens are neighbours
    rows = (tl.program_id(0) // (COLS // BN)) * BM + tl.arange(0, BM)
    ok = rows < n
    cols = first + tl.arange(0, BN)
    step = tl.arange(0, BK)
    x_ptrs = x_ptr + b * xsb + rows[:, None].to(tl.int64) * xsn + step[None, :]
    k_ptrs = keys_ptr + b * COLS * C + cols[None, :] * C + step[:, None]
    s = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, C, BK):
        x = tl.load(x_ptrs, mask=ok[:, None], other=0.0)
        k = tl.load(k_ptrs)
        s = tl.dot(x, k, s)
        x_ptrs += BK
        k_ptrs += BK
    s = s * scale_log2 + tl.load(bias_ptr + b * COLS + cols)[None, :] * 1.4426950408889634
    s = tl.reshape(s, [BM, BN // T, T])
    top = tl.max(s, 2)
    p = tl.math.exp2(s - tl.where(top > float("-inf"), top, 0.0)[:, :, None])
    total = tl.sum(p, 2)
    p = tl.reshape(p / tl.where(total > 0, total, 1.0)[:, :, None], [BM, BN])
    out_ptrs = out_ptr + (b * n + rows[:, None]) * COLS + cols[None, :]
    tl.store(out_ptrs, p.to(out_ptr.dtype.element_ty), mask=ok[:, None])


def _launch(x: Tensor, keys: Tensor, bias: Tensor, scale: float, heads: int, tile: Tile) -> Tensor:
    batch, n, width = x.shape
    cols = keys.shape[1]
    out = x.new_empty((batch, n, cols))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _probabilities_kernel[(triton.cdiv(n, tile.block_m) * (cols // tile.block_n), batch)](
            x,
            keys,
            bias,
            out,
            x.stride(0),
            x.stride(1),
            n,
            scale * math.log2(math.e),
            C=width,
            COLS=cols,
            T=cols // heads,
            BM=tile.block_m,
            BN=tile.block_n,
            BK=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def _check(x: Tensor, keys: Tensor, bias: Tensor, heads: int) -> None:
    per_head, left = divmod(keys.shape[1], heads)
    if left or per_head & (per_head - 1) or bias.shape != keys.shape[:2] or x.shape[::2] != keys.shape[::2]:
        raise OptionError(
            f"got x {tuple(x.shape)}, keys {tuple(keys.shape)}, bias {tuple(bias.shape)} and {heads} heads",
            where="toprovar::text_probabilities",
            expected="(B, n, C), (B, H T, C), (B, H T), T a power of two",
        )


def _by_pytorch(x: Tensor, keys: Tensor, bias: Tensor, scale: float, heads: int) -> Tensor:
    _check(x, keys, bias, heads)
    return text_probabilities_reference(x, keys, bias, scale, heads)


def _on_cuda(x: Tensor, keys: Tensor, bias: Tensor, scale: float, heads: int) -> Tensor:
    _check(x, keys, bias, heads)
    device: Any = torch.cuda.get_device_properties(x.device)
    small = device.shared_memory_per_block_optin < 160 << 10
    (batch, n, width), cols = x.shape, keys.shape[1]
    per_head = cols // heads
    tile = pick_tile(n, batch, cols, per_head, width, device.multi_processor_count, small=small)
    plain = x.stride(2) == 1 and keys.is_contiguous() and x.dtype in (torch.bfloat16, torch.float16)
    if not HAS_TRITON or tile is None or not plain or not 16 <= per_head <= MAX_KEYS or 0 in x.shape:
        return text_probabilities_reference(x, keys, bias, scale, heads)
    return _launch(x, keys, bias.contiguous(), scale, heads, tile)


torch.library.define(
    "toprovar::text_probabilities",
    "(Tensor x, Tensor keys, Tensor bias, float scale, int heads) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.impl("toprovar::text_probabilities", "CPU", _by_pytorch)
torch.library.impl("toprovar::text_probabilities", "CUDA", _on_cuda)


def _fake(x: Tensor, keys: Tensor, bias: Tensor, scale: float, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], keys.shape[1]))


torch.library.register_fake("toprovar::text_probabilities", _fake)

text_probabilities = torch.ops.toprovar.text_probabilities.default
