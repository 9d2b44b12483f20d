"""Attention with a cache whose queries and keys are still to be normalised and rotated, by one kernel.

Formula, for one head, with x' the unit vector of x and R(x) = x cos + (neighbours of x) sin, pairs (2i, 2i + 1) being
neighbours:
    q := R(q' factor), k := R(k');  rows start to start + n of the caches become k and v;  then `fae` of q with them.

Shapes: q, k, v (B, H, n, D), any strides but a contiguous last dimension; factor (1, H, 1, 1), cos and sin
(B or 1, 1, n, D), all float32; the rest as in `fae_cached`. D is even. For inference: no gradient.

Numerics: float32 inside, rounded once, as the operators that this replaces (`passes/fuse_rotation.py`). On CUDA in half
precision one Triton kernel reads the product that q, k and v are views of, and writes queries and both caches.
"""

# Triton infers the types of a kernel's arguments; annotations other than constexpr would change what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.kernels._triton import HAS_TRITON, tl, triton
from toprovar_compile.kernels.fae import append, attend_to_cache, fake_result, open_cache

_ROWS = 16  # tokens of a program
_MANY = 256  # tokens from which a program takes several heads, for which it reads cosines and sines once


@triton.jit
def _turned(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """x [ROWS, D] in float32, each pair turned."""
    even, odd = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
    neighbours = tl.reshape(tl.join(odd, even), [ROWS, D])
    return x * cos + neighbours * sin


@triton.jit
def _unit(x, eps):
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), eps)[:, None]


# Token counts are not specialised: one compiled kernel serves every scale.
@triton.jit(do_not_specialize=["n", "start"])
def _rotate_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    factor_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qsb,
    qsh,
    qsn,
    ksb,
    ksh,
    ksn,
    vsb,
    vsh,
    vsn,
    csb,
    csn,
    ssb,
    ssn,
    kcb,
    kch,
    kcn,
    vcb,
    vch,
    vcn,
    n,
    start,
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % (H // HEADS)) * HEADS
    rows = ((tl.program_id(0) // (H // HEADS)) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    dims = tl.arange(0, D)[None, :]
    ok = rows < n
    cos = tl.load(cos_ptr + b * csb + rows * csn + dims, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + b * ssb + rows * ssn + dims, mask=ok, other=0.0)
    for i in range(HEADS):
        h = (first + i).to(tl.int64)
        q = tl.load(q_ptr + b * qsb + h * qsh + rows * qsn + dims, mask=ok, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + b * ksb + h * ksh + rows * ksn + dims, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + b * vsb + h * vsh + rows * vsn + dims, mask=ok, other=0.0)
        q = _turned(_unit(q, eps) * tl.load(factor_ptr + h), cos, sin, ROWS, D)
        k = _turned(_unit(k, eps), cos, sin, ROWS, D)
        tl.store(out_ptr + ((b * n + rows) * H + h) * D + dims, q.to(out_ptr.dtype.element_ty), mask=ok)
        to = rows + start
        tl.store(k_cache_ptr + b * kcb + h * kch + to * kcn + dims, k.to(k_cache_ptr.dtype.element_ty), mask=ok)
        tl.store(v_cache_ptr + b * vcb + h * vch + to * vcn + dims, v, mask=ok)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
) -> Tensor:
    """Run the kernel: the queries (B, H, n, D), in the memory of (B, n, H, D)."""
    b, h, n, d = q.shape
    out = q.new_empty((b, n, h, d))
    cos, sin = cos.expand(b, -1, -1, -1), sin.expand(b, -1, -1, -1)
    heads = 4 if n >= _MANY and h % 4 == 0 else 1
    three, two = ([s for x in xs for s in x.stride()[:3]] for xs in ((q, k, v), (k_cache, v_cache)))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _rotate_kernel[(triton.cdiv(n, _ROWS) * (h // heads), b)](
            q,
            k,
            v,
            factor,
            cos,
            sin,
            out,
            k_cache,
            v_cache,
            *three,
            cos.stride(0),
            cos.stride(2),
            sin.stride(0),
            sin.stride(2),
            *two,
            n,
            start,
            eps,
            H=h,
            HEADS=heads,
            D=d,
            ROWS=_ROWS,
            num_warps=4,
        )
    return out.transpose(1, 2)


def rotate_reference(x: Tensor, factor: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """R(x' factor) in float32 for x (B, H, n, D); without a factor R(x')."""
    x = F.normalize(x.float(), dim=-1, eps=eps)
    x = x if factor is None else x * factor
    neighbours = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned: Tensor = x * cos + neighbours * sin
    return turned


def _fae_rotated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    n, d = q.shape[2:]
    k_cache, v_cache = open_cache(k_cache, v_cache, start, k)
    in_rows = all(x.stride(3) == 1 for x in (q, k, v, cos, sin, k_cache, v_cache))
    if q.is_cuda and HAS_TRITON and in_rows and d & (d - 1) == 0 and d >= 16 and q.numel():
        q = _launch(q, k, v, factor.contiguous(), cos, sin, eps, k_cache, v_cache, start)
    else:
        append(rotate_reference(k, None, cos, sin, eps), v, k_cache, v_cache, start)
        q = rotate_reference(q, factor, cos, sin, eps).to(v.dtype)
    return attend_to_cache(q, k_cache, v_cache, start + n, bias, scale, entropy)


torch.library.define(
    "toprovar::fae_rotated",
    "(Tensor q, Tensor k, Tensor v, Tensor factor, Tensor cos, Tensor sin, float eps, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, SymInt start, Tensor? bias, float scale, bool entropy) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
torch.library.impl("toprovar::fae_rotated", "CPU", _fae_rotated)
torch.library.impl("toprovar::fae_rotated", "CUDA", _fae_rotated)


def _fae_rotated_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    return fake_result(q, entropy)


torch.library.register_fake("toprovar::fae_rotated", _fae_rotated_fake)

fae_rotated = torch.ops.toprovar.fae_rotated.default
