"""FlashAttention-Entropy: attention that also returns how spread out each of its rows is.

Formula (natural logarithm), for one head and a = softmax(scale * q k^T + bias):
    out = a v,    entropy_i = -sum_j a_ij ln a_ij, averaged over heads.

Shapes: q (B, H, n, D), k and v (B, H, m, D), any strides; bias None or broadcastable to (B, H, n, m), additive
(floating point) or boolean (True = attend). out (B, H, n, D) has the dtype of q and the memory of a contiguous
(B, n, H, D); entropy (B, n) is float32, and (B, 0) when it is not asked for. k and v are cast to the dtype of q.
A row that attends to nothing (m = 0, or all of it masked) has out 0 and entropy 0. For inference: no gradient.
`fae_cached` keeps k and v token by token in caches (capacity, R, H, D), R >= B, of which it uses the first B rows: so
no stride depends on the capacity, and any run of tokens is one piece of memory.

Numerics: scores, sums and entropy are accumulated in float32 (float64 for float64 inputs). The error of the entropy
is a few float32 roundings of the largest score in the row, below 1e-4 nats for scores up to 100; rounding of the
inputs is not counted. No form stores the n x m matrix.

The kernels keep one more running sum than FlashAttention: with t = score - max and E = sum p t, entropy =
ln(l) - E / l. CUDA has a Triton kernel, and one of its own for compute capability 9.0 (fae_hopper.py), the CPU the
C++ of fae_cpu.py. Where the latter cannot run, entropy = lse - scale * q . (a k): PyTorch's flash attention once more,
with k in place of v.
"""

# Triton infers the types of a kernel's arguments; annotations other than constexpr would change what it compiles.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import CacheOverflowError, MissingTritonError, OptionError
from toprovar_compile.kernels import fae_cpu, plain_attention
from toprovar_compile.kernels._triton import HAS_TRITON, TritonError, tl, triton
from toprovar_compile.report import counters, logger

_MAX_HEAD_DIM = 256
_ROW_BUDGET = 1 << 18  # scores alive at once where the CPU form has to write them: 1 MiB, what an L2 cache holds


def fae_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition of correct, at the cost of the whole matrix: (out, entropy), in float64 if q is, else float32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + _additive(bias, dtype)
    a = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a fully masked row is 0 / 0
    return a @ v, torch.special.entr(a).sum(-1).mean(1)


def _additive(bias: Tensor, dtype: torch.dtype) -> Tensor:
    if bias.dtype != torch.bool:
        return bias.to(dtype)
    return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill_(~bias, -math.inf)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of the kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Keyed by compute capability, then by (bytes per element, padded head dim up to, has a bias). Tuned on sm_90 only; for
# the others, shared memory and registers were checked by compiling for the target. In float32 three products stand for
# one, and head dimensions of 128 and more spill registers in every configuration.
_FP32 = {
    (4, 64, False): Config(64, 16, 4, 2),
    (4, 128, False): Config(32, 32, 8, 2),
    (4, 256, False): Config(16, 16, 4, 2),
    (4, 64, True): Config(64, 16, 4, 2),
    (4, 128, True): Config(32, 32, 8, 2),
    (4, 256, True): Config(16, 16, 4, 2),
}
# The tile of bias lives in registers next to the tile of scores.
_BIASED = {
    (2, 64, True): Config(128, 64, 8, 2),
    (2, 128, True): Config(128, 32, 8, 2),
    (2, 256, True): Config(32, 32, 8, 2),
}
_SM80 = {
    (2, 64, False): Config(128, 64, 8, 3),
    (2, 128, False): Config(128, 32, 8, 3),
    (2, 256, False): Config(32, 32, 8, 2),
}
_SM86 = {
    (2, 64, False): Config(128, 64, 8, 2),
    (2, 128, False): Config(128, 32, 8, 3),
    (2, 256, False): Config(32, 32, 8, 2),
}
_SM90 = {  # only where the kernel of fae_hopper.py does not serve
    (2, 64, False): Config(128, 64, 8, 3),
    (2, 128, False): Config(128, 128, 8, 3),
    (2, 256, False): Config(64, 32, 8, 2),
}
CONFIGS: dict[tuple[int, int], dict[tuple[int, int, bool], Config]] = {
    (8, 0): _SM80 | _BIASED | _FP32,
    (8, 6): _SM86 | _BIASED | _FP32,
    (9, 0): _SM90 | _BIASED | _FP32,
    (10, 0): _SM90 | _BIASED | _FP32,
    (12, 0): _SM86 | _BIASED | _FP32,
}


def pick_config(capability: tuple[int, int], itemsize: int, block_d: int, biased: bool, n: int) -> Config:
    """The pinned configuration for a device; never measured at run time, so safe inside CUDA-graph capture.

    Capabilities between two entries use the lower one. Few queries take short row tiles.
    """
    known = max((c for c in CONFIGS if c <= capability), default=(8, 0))
    fits = {d: c for (size, d, b), c in CONFIGS[known].items() if (size, b) == (itemsize, biased) and block_d <= d}
    cfg = fits[min(fits)]
    if n > cfg.block_m // 2:
        return cfg
    return Config(max(16, triton.next_power_of_2(n)), min(cfg.block_n, 64), 4, cfg.num_stages)


@triton.jit
def _fae_rows(s, scale_log2, row_max, row_sum, row_ent, MASKED: tl.constexpr):
    """Fold a tile of scores [BM, BN] into the running statistics [BM], log-2 domain: (p, rescale, max, sum, E)."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    t = s * scale_log2 - new_max[:, None]
    if MASKED:
        t = tl.where(t < -1.0e4, -1.0e4, t)  # p is 0 either way, and 0 * -inf would be nan
    p = tl.math.exp2(t)
    shift = row_max - new_max
    alpha = tl.math.exp2(shift)
    row_ent = alpha * (row_ent + shift * row_sum) + tl.sum(p * t, 1)
    return p, alpha, new_max, alpha * row_sum + tl.sum(p, 1), row_ent


@triton.jit
def _fae_bias(s, unit, bias_ptrs, ok, BIAS: tl.constexpr):
    """Scores [BM, BN] before scaling, with the additive (1, in units of `unit`) or boolean (2) bias where `ok`."""
    if BIAS == 1:
        s += tl.load(bias_ptrs, mask=ok, other=0.0).to(tl.float32) * unit
    if BIAS == 2:
        s = tl.where(tl.load(bias_ptrs, mask=ok, other=0) != 0, s, float("-inf"))
    return s


# Token counts are not specialised: one compiled kernel serves every scale.
@triton.jit(do_not_specialize=["num_heads", "n", "m"])
def _fae_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lens_ptr,
    out_ptr,
    ent_ptr,
    qsb,
    qsh,
    qsn,
    qsd,
    ksb,
    ksh,
    ksm,
    ksd,
    vsb,
    vsh,
    vsm,
    vsd,
    bsb,
    bsh,
    bsn,
    bsm,
    num_heads,
    n,
    m,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,  # 0 none, 1 additive, 2 boolean
    PACKED: tl.constexpr,  # keys of all samples in one row of tokens, sample b from lens[b] to lens[b + 1]
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    bh = pid // tiles
    b = (bh // num_heads).to(tl.int64)
    h = (bh % num_heads).to(tl.int64)
    rows32 = (pid % tiles) * BM + tl.arange(0, BM)
    row_ok = rows32 < n
    rows = rows32.to(tl.int64)
    cols = tl.arange(0, BN).to(tl.int64)
    dims = tl.arange(0, BD).to(tl.int64)
    dim_ok = dims < D
    if PACKED:
        first = tl.load(lens_ptr + b).to(tl.int64)
        m = (tl.load(lens_ptr + b + 1) - first).to(tl.int32)
        k_ptr += first * ksm
        v_ptr += first * vsm

    q_ptrs = q_ptr + b * qsb + h * qsh + rows[:, None] * qsn + dims[None, :] * qsd
    q = tl.load(q_ptrs, mask=row_ok[:, None] & dim_ok[None, :], other=0.0)  # [BM, BD]
    k_ptrs = k_ptr + b * ksb + h * ksh + cols[None, :] * ksm + dims[:, None] * ksd  # [BD, BN]
    v_ptrs = v_ptr + b * vsb + h * vsh + cols[:, None] * vsm + dims[None, :] * vsd  # [BN, BD]
    bias_row = bias_ptr + b * bsb + h * bsh + rows * bsn  # [BM]

    row_max = tl.full([BM], -1.0e30, tl.float32)  # finite: -inf - -inf would be nan on a fully masked row
    row_sum = tl.zeros([BM], tl.float32)
    row_ent = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)

    scale_log2 = scale * 1.4426950408889634
    unit = 1.0 / scale
    wide = tl.cast(BN, tl.int64)
    full = (m // BN) * BN
    for _ in range(0, full, BN):
        if BD == D:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=dim_ok[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=dim_ok[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)  # [BM, BN]
        s = _fae_bias(s, unit, bias_row[:, None] + cols[None, :] * bsm, row_ok[:, None], BIAS)
        p, alpha, row_max, row_sum, row_ent = _fae_rows(s, scale_log2, row_max, row_sum, row_ent, BIAS != 0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        k_ptrs += wide * ksm
        v_ptrs += wide * vsm
        bias_row += wide * bsm

    if full < m:
        col_ok = cols < m - full
        k = tl.load(k_ptrs, mask=dim_ok[:, None] & col_ok[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=dim_ok[None, :] & col_ok[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)
        s = _fae_bias(s, unit, bias_row[:, None] + cols[None, :] * bsm, row_ok[:, None] & col_ok[None, :], BIAS)
        s = tl.where(col_ok[None, :], s, float("-inf"))
        p, alpha, row_max, row_sum, row_ent = _fae_rows(s, scale_log2, row_max, row_sum, row_ent, True)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    some = row_sum != 0  # also true of nan
    norm = tl.where(some, row_sum, 1.0)
    entropy = tl.where(some, (tl.math.log2(norm) - row_ent / norm) * 0.6931471805599453, 0.0)
    tl.store(ent_ptr + (b * n + rows) * num_heads + h, entropy, mask=row_ok)  # heads last: averaged next
    out_ptrs = out_ptr + ((b * n + rows[:, None]) * num_heads + h) * D + dims[None, :]
    out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=row_ok[:, None] & dim_ok[None, :])


def _launch_fae(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, lens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel: (out, entropy). With `lens` k and v are (1, H, total, D), as `fae_varlen` has them."""
    b, h, n, d = q.shape
    m = k.shape[2]
    if lens is not None:
        k, v = k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)
    q, scale = plain_attention.positive_scale(q, scale)
    out = _empty_out(q)
    entropy = torch.empty((b, n, h), dtype=torch.float32, device=q.device)
    bias = bias if bias is None else bias.expand(b, h, n, m)
    if lens is None and _on_hopper(q, k, v, bias, out, scale, entropy):
        return out, entropy.mean(-1)
    kind, mask = 0, q.new_empty(()).expand(b, h, n, m)  # not read
    if bias is not None:
        kind, mask = (2, bias.view(torch.uint8)) if bias.dtype == torch.bool else (1, bias)
    block_d = max(16, triton.next_power_of_2(d))
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)  # CPU: Triton's interpreter
    cfg = pick_config(capability, q.element_size(), block_d, kind != 0, n)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _fae_kernel[(triton.cdiv(n, cfg.block_m) * b * h,)](
            q,
            k,
            v,
            mask,
            entropy if lens is None else lens,
            out,
            entropy,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *mask.stride(),
            h,
            n,
            m,
            scale,
            D=d,
            BM=cfg.block_m,
            BN=cfg.block_n,
            BD=block_d,
            BIAS=kind,
            PACKED=lens is not None,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=cfg.num_warps,
            num_stages=cfg.num_stages,
        )
    return out, entropy.mean(-1)


@triton.jit(do_not_specialize=["num_heads", "n", "start"])
def _append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    ksb,
    ksh,
    ksn,
    vsb,
    vsh,
    vsn,
    kcb,
    kch,
    kcn,
    vcb,
    vch,
    vcn,
    num_heads,
    n,
    start,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows `start` to `start` + n of both caches; the last dimension of all is contiguous."""
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles // num_heads).to(tl.int64)
    h = (pid // tiles % num_heads).to(tl.int64)
    rows = ((pid % tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    dims = tl.arange(0, BD)[None, :]
    ok = (rows < n) & (dims < D)
    to = rows + start
    k = tl.load(k_ptr + b * ksb + h * ksh + rows * ksn + dims, mask=ok)
    v = tl.load(v_ptr + b * vsb + h * vsh + rows * vsn + dims, mask=ok)
    tl.store(k_cache_ptr + b * kcb + h * kch + to * kcn + dims, k, mask=ok)
    tl.store(v_cache_ptr + b * vcb + h * vch + to * vcn + dims, v, mask=ok)


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: int) -> None:
    """Write k and v (B, H, n, D) into rows `start` to `start` + n of the caches."""
    b, h, n, d = k.shape
    in_rows = all(x.stride(3) == 1 for x in (k, v, k_cache, v_cache))
    if not (k.is_cuda and HAS_TRITON and in_rows) or k.numel() == 0:
        k_cache.narrow(2, start, n).copy_(k)
        v_cache.narrow(2, start, n).copy_(v)
        return
    strides = [s for x in (k, v, k_cache, v_cache) for s in x.stride()[:3]]
    block_d = triton.next_power_of_2(d)
    rows = max(1, 4096 // block_d)
    with torch.cuda.device(k.device):
        _append_kernel[(triton.cdiv(n, rows) * b * h,)](
            k, v, k_cache, v_cache, *strides, h, n, start, D=d, ROWS=rows, BD=block_d, num_warps=4
        )


@cache
def _hopper_kernel() -> ModuleType | None:
    """The kernel for compute capability 9.0, None where Triton lacks what it is written in."""
    try:
        return import_module("toprovar_compile.kernels.fae_hopper")
    except (ImportError, AttributeError) as error:
        _give_up_hopper(error)
        return None


_hopper_works = True


def _give_up_hopper(error: Exception) -> None:
    global _hopper_works
    _hopper_works = False
    reason = f"attention takes the slower portable kernel: this Triton does not build fae_hopper.py ({error!r:.200})"
    counters.add("fallback", reason)
    logger.warning(reason)


def _on_hopper(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, scale: float, entropy: Tensor | None
) -> bool:
    """Run the kernel for compute capability 9.0 if it serves this device and these inputs; whether it did.

    `bias` is expanded to (B, H, n, m).
    """
    if not _hopper_works or not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    hopper = _hopper_kernel()
    if hopper is None or not hopper.fits(q, k, v, bias, scale):
        return False
    try:
        hopper.launch(q, k, v, bias, out, scale, entropy)
    except TritonError as error:  # Gluon is young, and changes between versions
        _give_up_hopper(error)
        return False
    return True


def _without_entropy(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Our kernel, its entropy left out: a candidate of `plain_attention`."""
    out = _empty_out(q)
    bias = bias if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    if not _on_hopper(q, k, v, bias, out, scale, None):
        raise NotImplementedError("for compute capability 9.0, half precision, no bias but a mask of keys")
    return out


plain_attention.register("fae", _without_entropy)


def _empty_out(q: Tensor) -> Tensor:
    b, h, n, d = q.shape
    return q.new_empty((b, n, h, d)).transpose(1, 2)


def _no_entropy(q: Tensor) -> Tensor:
    return torch.empty((q.shape[0], 0), dtype=torch.float32, device=q.device)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that the kernels would read out of bounds."""
    if q.dim() != 4 or k.shape != v.shape or k.shape != (*q.shape[:2], *k.shape[2:3], q.shape[3]):
        raise OptionError(
            f"attention inputs do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            where="toprovar::fae",
            expected="q (B, H, n, D) and k, v (B, H, m, D)",
            todo="repeat shared key heads and transpose to (B, H, tokens, D) before the call",
        )


def _nothing_to_attend(q: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    measured = torch.zeros((q.shape[0], q.shape[2]), dtype=torch.float32, device=q.device)
    return _empty_out(q).zero_(), measured if entropy else _no_entropy(q)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
        bias = bias if bias.dtype == torch.bool else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _token_major(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check_kernel(q: Tensor) -> None:
    """Refuse what no CUDA kernel of this machine measures the entropy of."""
    if not HAS_TRITON:
        raise MissingTritonError(
            "attention entropy on CUDA needs Triton, which is not installed",
            where="toprovar::fae",
            expected="the triton package, which the CUDA wheels of torch bring with them",
            todo="install torch from its CUDA index, or `pip install triton`",
        )
    if q.shape[3] > _MAX_HEAD_DIM or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise OptionError(
            f"no CUDA kernel measures entropy for head dimension {q.shape[3]} in {q.dtype}",
            where="toprovar::fae",
            expected=f"a head dimension up to {_MAX_HEAD_DIM} in float32, float16 or bfloat16",
            todo="convert the inputs, or call with entropy=False",
        )


def _fae_cuda(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        return _nothing_to_attend(q, entropy)
    if not entropy:
        return plain_attention.attend(q, k, v, bias, scale), _no_entropy(q)
    _check_kernel(q)
    return _launch_fae(q, k, v, bias, scale)


def _fae_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    _check(q, k, v)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.numel() == 0 or k.numel() == 0:  # PyTorch's CPU kernel divides by the number of keys
        return _nothing_to_attend(q, entropy)
    if not entropy:
        found = fae_cpu.attend(q, k, v, bias, scale) if fae_cpu.beats_plain(q) else None
        out = found[0] if found else _token_major(_plain_attention(q, k, v, bias, scale))
        return out, _no_entropy(q)
    if found := fae_cpu.attend(q, k, v, bias, scale):
        return found
    if bias is not None and bias.dtype != torch.bool:
        return _by_rows(q, k, v, bias, scale)
    return _by_identity(q, k, v, bias, scale)


def _by_identity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, then attention to the keys, whose product with q is the mean score of the row."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = None if mask is None else _additive(mask, dtype).expand(*q.shape[:3], k.shape[2])
    out = _plain_attention(q, k, v, mask, scale)
    # In half precision the mean key would be rounded to 3 digits, so this half runs in float32.
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(dtype), k.to(dtype)))  # what it takes
    mean_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, k, 0.0, False, attn_mask=bias, scale=scale
    )
    per_head = lse.sub(torch.linalg.vecdot(q, mean_key), alpha=scale)
    return _token_major(out), per_head.clamp_(0.0, math.log(k.shape[2])).mean(1).float()


def _by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with an additive bias, a few query rows of scores at a time: the mean score contains the bias."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, n, _ = q.shape
    m = k.shape[2]
    bias = bias.expand(b, h, n, m)
    out = _empty_out(q)
    entropy = torch.empty((b, n), dtype=torch.float32)
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)
    step = max(1, _ROW_BUDGET // (b * h * m))
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        t = (q[:, :, rows].to(dtype) @ keys).mul_(scale).add_(bias[:, :, rows])
        t.sub_(t.amax(-1, keepdim=True).clamp_min_(-1e30)).clamp_min_(-1e4)  # finite on a fully masked row
        p = t.exp()
        total = p.sum(-1)
        norm = torch.where(total > 0, total, 1.0)
        entropy[:, rows] = (norm.log() - torch.linalg.vecdot(p, t) / norm).mean(1)
        out[:, :, rows] = (p @ values).div_(norm.unsqueeze(-1))
    return out, entropy


def _fae_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Samples whose keys differ in number: k and v (H, total, D), sample b from cu_seqlens[b] to cu_seqlens[b + 1]."""
    b, h, _, d = q.shape
    if k.shape != v.shape or k.shape != (h, *k.shape[1:2], d) or cu_seqlens.shape != (b + 1,):
        raise OptionError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, cu_seqlens {tuple(cu_seqlens.shape)}",
            where="toprovar::fae_varlen",
            expected="q (B, H, n, D), k and v (H, total, D), cu_seqlens (B + 1,)",
            todo="pack the keys of all samples one after the other",
        )
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.numel() == 0 or k.numel() == 0:
        return _nothing_to_attend(q, entropy)
    if q.is_cuda:  # lengths stay on the device, so that a CUDA graph follows them
        _check_kernel(q)
        out, measured = _launch_fae(q, k[None], v[None], None, scale, cu_seqlens)
        return out, measured if entropy else _no_entropy(q)
    out = _empty_out(q)
    measured = torch.empty((b, q.shape[2] if entropy else 0), dtype=torch.float32)
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        out[i : i + 1], measured[i : i + 1] = _fae_cpu(
            q[i : i + 1], k[None, :, start:end], v[None, :, start:end], None, scale, entropy
        )
    return out, measured


def _fae_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = open_cache(k_cache, v_cache, start, k)
    append(k, v, k_cache, v_cache, start)
    return attend_to_cache(q, k_cache, v_cache, start + k.shape[2], bias, scale, entropy)


def open_cache(k_cache: Tensor, v_cache: Tensor, start: int, k: Tensor) -> list[Tensor]:
    """Caches (capacity, R, H, D) as (B, H, capacity, D) for the rows of k (B, H, n, D), which are to follow `start`.

    Raises CacheOverflowError where there is no room for them.
    """
    n, capacity = k.shape[2], k_cache.shape[0]
    if start < 0 or start + n > capacity:
        raise CacheOverflowError(
            f"{n} tokens at row {start} do not fit a cache of {capacity} rows",
            where="toprovar::fae_cached",
            expected=f"0 <= start <= {capacity - n}",
            todo="preallocate the caches for every scale of the schedule",
        )
    return [cache.narrow(1, 0, k.shape[0]).permute(1, 2, 0, 3) for cache in (k_cache, v_cache)]


def attend_to_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, end: int, bias: Tensor | None, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """`fae` of q with the first `end` rows of opened caches."""
    attend = _fae_cuda if q.is_cuda else _fae_cpu
    return attend(q, k_cache.narrow(2, 0, end), v_cache.narrow(2, 0, end), bias, scale, entropy)


def fake_result(q: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """What the operators return, as the compiler traces them."""
    return _empty_out(q), q.new_empty((q.shape[0], q.shape[2] if entropy else 0), dtype=torch.float32)


# Any strides do, so the compiler need not copy inputs into the layout it saw while tracing.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

torch.library.define(
    "toprovar::fae",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool entropy) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl("toprovar::fae", "CPU", _fae_cpu)
torch.library.impl("toprovar::fae", "CUDA", _fae_cuda)


def _fae_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    return fake_result(q, entropy)


torch.library.register_fake("toprovar::fae", _fae_fake)
torch.library.define(
    "toprovar::fae_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, bool entropy) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl("toprovar::fae_varlen", "CPU", _fae_varlen)
torch.library.impl("toprovar::fae_varlen", "CUDA", _fae_varlen)


def _fae_varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    return fake_result(q, entropy)


torch.library.register_fake("toprovar::fae_varlen", _fae_varlen_fake)
torch.library.define(
    "toprovar::fae_cached",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start, Tensor? bias, float scale,"
    " bool entropy) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl("toprovar::fae_cached", "CPU", _fae_cached)
torch.library.impl("toprovar::fae_cached", "CUDA", _fae_cached)


def _fae_cached_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    return fake_result(q, entropy)


torch.library.register_fake("toprovar::fae_cached", _fae_cached_fake)

fae = torch.ops.toprovar.fae.default
fae_cached = torch.ops.toprovar.fae_cached.default
fae_varlen = torch.ops.toprovar.fae_varlen.default
