"""FlashAttention-Entropy for compute capability 9.0 (H100, H200, GH200): tensor memory accelerator and warpgroup MMA.

A program attends 64 query rows for each of its consumer warpgroups; one more warp loads the tiles of keys and values.
A consumer starts the next score product before it turns the last scores into probabilities, so that the tensor cores
work while the exponentials are computed, as in FlashAttention-3 (Shah et al., 2024). Sums over a row stay split over
the threads that hold its parts until the end. The last tile of keys, which may be cut off, comes first, so that the
loop needs no masks.

Written in Gluon, Triton's dialect with explicit layouts. Importing this module fails where Triton has none.
"""

# Gluon infers the types of a kernel's arguments; annotations other than constexpr would change what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 has other names for the copies.
_copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
MAX_HEAD_DIM = 256
_ROWS = 64  # of one warpgroup
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_REGISTERS = 240  # a consumer thread's: what the loading warp leaves
_LOADER_REGISTERS = 24


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether `launch` takes these inputs: half precision, scale in 0..1e6, rows that the copy engine can address.

    `mask` (B, H, n, m) must be boolean, the same for all heads and queries (expanded along them).
    """
    by_key = mask is None or (mask.dtype == torch.bool and mask.stride(1) == mask.stride(2) == 0)
    return (
        by_key
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] <= MAX_HEAD_DIM
        and 0.0 < scale < 1e6
        and all(_addressable(x) for x in (q, k, v))
        and q.shape[3] * q.element_size() % 16 == 0
    )


def _addressable(x: Tensor) -> bool:
    aligned = all(s * x.element_size() % 16 == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float, entropy: Tensor | None
) -> None:
    """Write attention into `out` (B, H, n, D) and, if given, its row entropies in nats into `entropy` (B, n, H)."""
    b, h, n, d = q.shape
    block_d = max(64, next_power_of_2(d))
    block_n = 64 if block_d > 128 else 128
    stages = 2 if block_d > 64 else 3
    # Two consumers share a tile of keys, but half as many programs have to fill the device.
    consumers = 2 if n > _ROWS and cdiv(n, 2 * _ROWS) * b * h >= 0.75 * _multiprocessors(q.device) else 1
    rows = consumers * _ROWS
    with torch.cuda.device(q.device):
        _kernel[(cdiv(n, rows) * b * h,)](
            _describe(q, _ROWS, block_d),
            _describe(k, block_n, block_d),
            _describe(v, block_n, block_d),
            _describe(out, _ROWS, block_d),
            out if entropy is None else entropy,
            out if mask is None else mask.view(torch.uint8),
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(3),
            h,
            n,
            k.shape[2],
            scale / math.log(2.0),
            D=block_d,
            BN=block_n,
            STAGES=stages,
            CONSUMERS=consumers,
            ENTROPY=entropy is not None,
            MASKED=mask is not None,
            REGISTERS=_REGISTERS,
            LOADER_REGISTERS=_LOADER_REGISTERS,
            num_warps=4,
        )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def _describe(x: Tensor, rows: int, block_d: int):
    """Tensor map of x (B, H, tokens, D) in tiles (1, 1, rows, block_d); what is outside of x reads as 0."""
    block = (1, 1, rows, block_d)
    # The stride of a dimension of size 1 is anything, and never used.
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block), _layout(block, x.dtype))


@gluon.jit
def _load(
    q_desc,
    k_desc,
    v_desc,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    b,
    h,
    row,
    tiles,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """The loading warp: queries, then tiles of keys and values from the last to the first."""
    mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        _copy_in(q_desc, [b, h, row + w * 64, 0], q_full, q_smem.index(w))
    for j in range(tiles):
        at = (tiles - 1 - j) * BN
        stage = j % STAGES
        free = ((j // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        _copy_in(k_desc, [b, h, at, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        _copy_in(v_desc, [b, h, at, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _softmax(s, row_max, scale_log2, MASKED: gl.constexpr):
    """Scores [64, BN] to (t = score - max in the log-2 domain, p = 2^t, the new row maxima [64])."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    t = s * scale_log2 - new_max[:, None]
    if MASKED:
        t = gl.maximum(t, -1.0e4)  # p is 0 either way, and 0 * -inf would be nan
    return t, gl.exp2(t), new_max


@gluon.jit
def _keep(mask_ptr, stride, cols, m):
    """Which of the keys `cols` [BN] may be attended to."""
    return gl.load(mask_ptr + cols.to(gl.int64) * stride, mask=cols < m, other=0) != 0


@gluon.jit
def _partial(x):
    """Sums [64, 4] of x [64, BN]: what each of the four threads that share a row holds of it."""
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(gl.reshape(x, [64, N // 8, 4, 2]), 1), 2)


@gluon.jit
def _consume(
    W: gl.constexpr,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    out_desc,
    ent_ptr,
    mask_ptr,
    mask_stride,
    b,
    h,
    heads,
    row,
    n,
    m,
    tiles,
    scale_log2,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    ENTROPY: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Consumer warpgroup W: rows row + 64 W to row + 64 W + 63 against all keys."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    A_ROWS: gl.constexpr = gl.SliceLayout(1, A)
    dtype: gl.constexpr = q_smem.dtype
    q = q_smem.index(W).reshape([64, D])
    zero = gl.zeros([64, BN], gl.float32, S)
    acc = gl.zeros([64, D], gl.float32, A)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_smem.index(0).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    cols = gl.arange(0, BN, gl.SliceLayout(0, S))
    if MASKED:
        s = gl.where(_keep(mask_ptr, mask_stride, (tiles - 1) * BN + cols, m)[None, :], s, float("-inf"))
    else:
        s = gl.where(((tiles - 1) * BN + cols < m)[None, :], s, -1.0e30)
    t, p32, row_max = _softmax(s, gl.full([64], -1.0e30, gl.float32, S_ROWS), scale_log2, MASKED)
    row_sum = _partial(p32)
    if ENTROPY:
        row_ent = _partial(p32 * t)
    PARTS: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    p = gl.convert_layout(p32.to(dtype), P)

    for j in range(1, tiles):
        stage = j % STAGES
        before = (j - 1) % STAGES
        if MASKED:
            keep = _keep(mask_ptr, mask_stride, (tiles - 1 - j) * BN + cols, m)
        mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
        k = k_smem.index(stage).reshape([BN, D]).permute((1, 0))
        s_token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p, v_smem.index(before).reshape([BN, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_token,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MASKED:
            s = gl.where(keep[None, :], s, float("-inf"))
        t, p32, new_max = _softmax(s, row_max, scale_log2, MASKED)
        shift = row_max - new_max
        row_max = new_max
        alpha = gl.exp2(shift)
        parts_alpha = gl.convert_layout(alpha, PARTS)[:, None]
        if ENTROPY:
            parts_shift = gl.convert_layout(shift, PARTS)[:, None]
            row_ent = parts_alpha * (row_ent + parts_shift * row_sum) + _partial(p32 * t)
        row_sum = parts_alpha * row_sum + _partial(p32)
        acc = warpgroup_mma_wait(0, deps=(o_token,))
        mbarrier.arrive(v_empty.index(before), count=1)
        p = gl.convert_layout(p32.to(dtype), P)
        acc = acc * gl.convert_layout(alpha, A_ROWS)[:, None]

    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    o_token = warpgroup_mma(p, v_smem.index(last).reshape([BN, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(o_token,))
    total = gl.convert_layout(gl.sum(row_sum, 1), S_ROWS)
    if MASKED:
        total = gl.where(total > 0, total, 1.0)  # a row that attends to nothing: out 0 and entropy 0
    out = acc / gl.convert_layout(total, A_ROWS)[:, None]
    q.store(out.to(dtype))  # this warpgroup alone reads these rows
    fence_async_shared()
    _copy_out(out_desc, [b, h, row + W * 64, 0], q_smem.index(W))
    if ENTROPY:
        rows = row + W * 64 + gl.arange(0, 64, S_ROWS)
        energy = gl.convert_layout(gl.sum(row_ent, 1), S_ROWS)
        entropy = (gl.log2(total) - energy / total) * 0.6931471805599453
        gl.store(ent_ptr + (b.to(gl.int64) * n + rows) * heads + h, entropy, mask=rows < n)
    tma.store_wait(0)


# Token counts are not specialised: one compiled kernel serves every scale.
@gluon.jit(do_not_specialize=["mask_batch_stride", "mask_stride", "heads", "n", "m"])
def _kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    ent_ptr,
    mask_ptr,
    mask_batch_stride,
    mask_stride,
    heads,
    n,
    m,
    scale_log2,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ENTROPY: gl.constexpr,
    MASKED: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = 64 * CONSUMERS
    row_tiles = (n + ROWS - 1) // ROWS
    pid = gl.program_id(0)
    bh = pid // row_tiles  # neighbours share keys and values in the L2 cache
    b = bh // heads
    h = bh % heads
    row = (pid % row_tiles) * ROWS
    tiles = (m + BN - 1) // BN
    mask_ptr += b.to(gl.int64) * mask_batch_stride
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_smem,
                        k_smem,
                        v_smem,
                        q_full,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        out_desc,
                        ent_ptr,
                        mask_ptr,
                        mask_stride,
                        b,
                        h,
                        heads,
                        row,
                        n,
                        m,
                        tiles,
                        scale_log2,
                        D,
                        BN,
                        STAGES,
                        ENTROPY,
                        MASKED,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        q_smem,
                        k_smem,
                        v_smem,
                        q_full,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        out_desc,
                        ent_ptr,
                        mask_ptr,
                        mask_stride,
                        b,
                        h,
                        heads,
                        row,
                        n,
                        m,
                        tiles,
                        scale_log2,
                        D,
                        BN,
                        STAGES,
                        ENTROPY,
                        MASKED,
                    ),
                ),
                (
                    _load,
                    (
                        q_desc,
                        k_desc,
                        v_desc,
                        q_smem,
                        k_smem,
                        v_smem,
                        q_full,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        b,
                        h,
                        row,
                        tiles,
                        BN,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_smem,
                        k_smem,
                        v_smem,
                        q_full,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        out_desc,
                        ent_ptr,
                        mask_ptr,
                        mask_stride,
                        b,
                        h,
                        heads,
                        row,
                        n,
                        m,
                        tiles,
                        scale_log2,
                        D,
                        BN,
                        STAGES,
                        ENTROPY,
                        MASKED,
                    ),
                ),
                (
                    _load,
                    (
                        q_desc,
                        k_desc,
                        v_desc,
                        q_smem,
                        k_smem,
                        v_smem,
                        q_full,
                        k_full,
                        k_empty,
                        v_full,
                        v_empty,
                        b,
                        h,
                        row,
                        tiles,
                        BN,
                        STAGES,
                        CONSUMERS,
                    ),
                ),
            ],
            [1],
            [LOADER_REGISTERS],
        )
