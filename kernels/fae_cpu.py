"""FlashAttention-Entropy for the CPU: C++ compiled for this machine the first time it is needed, then kept on disk.

The algorithm of the Triton kernel (streaming softmax and E = sum p t, base 2, float32): PyTorch's own flash attention
has no such sum, and getting the entropy from its log-sum-exp costs a second attention. One parallel loop over heads;
besides its inputs each thread stores a copy of one head of k and v, in the order they are read in.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from toprovar_compile.errors import ToproVarWarning
from toprovar_compile.files import cache_folder

MAX_HEAD_DIM = 256
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC")
_Function = Callable[..., None]

_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <omp.h>

namespace {

// Vectors as wide as registers, and as many accumulators (ROWS x COLS) as there are registers for.
#if defined(__AVX512F__)
constexpr int64_t W = 16, COLS = 4;
#elif defined(__AVX__)
constexpr int64_t W = 8, COLS = 2;
#elif defined(__aarch64__)
constexpr int64_t W = 4, COLS = 4;
#else
constexpr int64_t W = 4, COLS = 2;
#endif
typedef float vec __attribute__((vector_size(4 * W)));
typedef float unaligned_vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t int_vec __attribute__((vector_size(4 * W)));

constexpr int64_t BM = 48, BN = 128, ROWS = 6, MAX_D = 256;
constexpr int64_t PANEL = COLS * W;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float NOTHING = -1e30f;  // maximum of no scores; scores below it are masked

inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<unaligned_vec*>(p) = x; }

// 2^t for -127 <= t < 128, 2e-9 relative before rounding; 2^-127 comes out as 0, NaN as some number.
inline vec exp2_of(vec t) {
  const vec shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer nearest to t stands in the low bits
  const vec f = t - (shifted - 12582912.0f);
  vec p = f * 1.53458051e-4f + 1.33999307e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return (vec)((int_vec)p + ((int_vec)shifted << 23));
}

inline float sum(vec x) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}

// c (ROWS x C vectors) = a (ROWS x depth) b (depth x C vectors), or added to c.
template <int C, bool ADD>
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  vec acc[ROWS][C];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) acc[r][j] = ADD ? load(c + r * ldc + j * W) : vec{};
  for (int64_t i = 0; i < depth; ++i) {
    vec row[C];
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) row[j] = load(b + i * ldb + j * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float x = a[r * lda + i];
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) acc[r][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * W, acc[r][j]);
}

// o (rows x width) += p (rows x depth) v (depth x width), width a multiple of W.
void accumulate(const float* p, const float* v, int64_t rows, int64_t depth, int64_t width, float* o) {
  int64_t c = 0;
  for (; c + PANEL <= width; c += PANEL)
    for (int64_t r = 0; r < rows; r += ROWS)
      product<COLS, true>(p + r * BN, BN, v + c, width, depth, o + r * width + c, width);
  for (; c < width; c += W)
    for (int64_t r = 0; r < rows; r += ROWS)
      product<1, true>(p + r * BN, BN, v + c, width, depth, o + r * width + c, width);
}

// One head: strides are of its tokens, the last dimension has stride 1 (that of a bias is bs[1]).
struct Head {
  const float *q, *k, *v;
  const void* bias;
  float *out, *entropy;
  int64_t qs, ks, vs, bs[2], os;
};

struct Sizes {
  int64_t m, d, width, kind;
  float scale;
};

// Keys as panels of PANEL keys, d rows each, and values padded to `width`: the order they are read in.
void pack(const Head& head, const Sizes& size, float* keys, float* values) {
  for (int64_t start = 0; start < size.m; start += BN, keys += BN * size.d) {
    const int64_t cols = std::min(BN, size.m - start);
    for (int64_t j = 0; j < BN; ++j) {
      const float* from = head.k + (start + j) * head.ks;
      float* to = keys + j / PANEL * PANEL * size.d + j % PANEL;
      for (int64_t i = 0; i < size.d; ++i) to[i * PANEL] = j < cols ? from[i] : 0.0f;
    }
  }
  for (int64_t j = 0; j < size.m; ++j, values += size.width) {
    std::copy(head.v + j * head.vs, head.v + j * head.vs + size.d, values);
    std::fill(values + size.d, values + size.width, 0.0f);
  }
}

// Up to BM rows of one head from `first` on.
void attend(const Head& head, const Sizes& size, const float* keys, const float* values, int64_t first, int64_t rows) {
  const int64_t d = size.d, width = size.width, padded = (rows + ROWS - 1) / ROWS * ROWS;
  alignas(64) float q[BM * MAX_D], s[BM * BN], o[BM * MAX_D], top[BM], total[BM], energy[BM];
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t i = 0; i < d; ++i)
      q[r * d + i] = r < rows ? head.q[(first + r) * head.qs + i] * (size.scale * LOG2E) : 0.0f;
  std::fill(o, o + padded * width, 0.0f);
  std::fill(top, top + BM, NOTHING);
  std::fill(total, total + BM, 0.0f);
  std::fill(energy, energy + BM, 0.0f);
  for (int64_t start = 0; start < size.m; start += BN) {
    const int64_t cols = std::min(BN, size.m - start);
    for (int64_t c = 0; c < BN; c += PANEL)
      for (int64_t r = 0; r < padded; r += ROWS)
        product<COLS, false>(q + r * d, d, keys + (start + c) * d, PANEL, d, s + r * BN + c, BN);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = s + r * BN;
      const int64_t at = (first + r) * head.bs[0] + start * head.bs[1];
      if (size.kind == 1)
        for (int64_t j = 0; j < cols; ++j) row[j] += static_cast<const float*>(head.bias)[at + j * head.bs[1]] * LOG2E;
      if (size.kind == 2)
        for (int64_t j = 0; j < cols; ++j)
          if (!static_cast<const uint8_t*>(head.bias)[at + j * head.bs[1]]) row[j] = 2 * NOTHING;
      std::fill(row + cols, row + BN, 2 * NOTHING);
      vec highest = load(row);
      for (int64_t j = W; j < BN; j += W) {
        const vec y = load(row + j);
        highest = highest > y ? highest : y;
      }
      float peak = top[r];
      for (int i = 0; i < W; ++i) peak = std::max(peak, highest[i]);
      vec l = {}, e = {};
      for (int64_t j = 0; j < BN; j += W) {
        vec t = load(row + j) - peak;
        t = t < -127.0f ? vec{} - 127.0f : t;
        const vec p = exp2_of(t);
        store(row + j, p);
        l += p;
        e += p * t;
      }
      if (peak > top[r]) {
        const float shift = top[r] - peak, decay = std::exp2(shift);
        energy[r] = decay * (energy[r] + shift * total[r]);
        total[r] *= decay;
        for (int64_t i = 0; i < width; i += W) store(o + r * width + i, load(o + r * width + i) * decay);
        top[r] = peak;
      }
      total[r] += sum(l);
      energy[r] += sum(e);
    }
    accumulate(s, values + start * width, padded, cols, width, o);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool number = energy[r] == energy[r], masked = number && top[r] == NOTHING;
    const float inverse = masked ? 0.0f : number ? 1.0f / total[r] : NAN;
    for (int64_t i = 0; i < d; ++i) head.out[(first + r) * head.os + i] = o[r * width + i] * inverse;
    head.entropy[first + r] = masked ? 0.0f : (std::log2(total[r]) - energy[r] * inverse) * LN2;
  }
}

}  // namespace

// q (batch, heads, n, d), k and v (batch, heads, m, d): strides of all but the last dimension, which has 1. bias, four
// strides: kind 0 none, 1 float added, 2 byte (not 0: attend). out (batch, n, heads, d), entropy (batch, heads, n).
// scratch holds threads * (m rounded up to 128) * (d + d rounded up to 16) floats.
extern "C" void toprovar_fae(const float* q, const float* k, const float* v, const void* bias, float* out,
                             float* entropy, float* scratch, const int64_t* qs, const int64_t* ks, const int64_t* vs,
                             const int64_t* bs, int64_t kind, int64_t batch, int64_t heads, int64_t n, int64_t m,
                             int64_t d, float scale, int64_t threads) {
  const Sizes size = {m, d, (d + W - 1) / W * W, kind, scale};
  const int64_t tiles = (n + BM - 1) / BM, key_floats = (m + BN - 1) / BN * BN * d;
  // Whoever takes a part of a head packs that head for itself, so that nobody waits: a few parts for each thread.
  const int64_t parts = std::max<int64_t>(1, std::min(tiles / 4, 4 * threads / (batch * heads)));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t x = 0; x < batch * heads * parts; ++x) {
    const int64_t bh = x / parts, b = bh / heads, h = bh % heads, part = x % parts;
    const int64_t bias_offset = b * bs[0] + h * bs[1];
    const Head head = {q + b * qs[0] + h * qs[1],
                       k + b * ks[0] + h * ks[1],
                       v + b * vs[0] + h * vs[1],
                       kind == 2 ? static_cast<const void*>(static_cast<const uint8_t*>(bias) + bias_offset)
                                 : static_cast<const float*>(bias) + bias_offset,
                       out + (b * n * heads + h) * d,
                       entropy + bh * n,
                       qs[2],
                       ks[2],
                       vs[2],
                       {bs[2], bs[3]},
                       heads * d};
    float* const keys = scratch + omp_get_thread_num() * (key_floats / d) * (d + size.width);
    float* const values = keys + key_floats;
    pack(head, size, keys, values);
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile)
      attend(head, size, keys, values, tile * BM, std::min(BM, n - tile * BM));
  }
}
"""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor] | None:
    """(out, entropy) as toprovar::fae returns them for CPU tensors with n, m > 0, or None where this form cannot run.

    That is where there is no C++ compiler (warned about once), for float64 and for head dimensions above 256.
    """
    b, h, n, d = q.shape
    m = k.shape[2]
    if q.dtype == torch.float64 or d > MAX_HEAD_DIM:
        return None
    function = compiled()
    if function is None:
        return None
    queries, keys, values = (_rows(x.float()) for x in (q, k, v))
    kind, mask, strides = 0, queries, queries.stride()
    if bias is not None:
        kind, mask = (2, bias.view(torch.uint8)) if bias.dtype == torch.bool else (1, bias.float())
        strides = mask.expand(b, h, n, m).stride()
    out = torch.empty((b, n, h, d), dtype=torch.float32)
    entropy = torch.empty((b, h, n), dtype=torch.float32)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * -(-m // 128) * 128 * (d + -(-d // 16) * 16), dtype=torch.float32)
    function(
        *(x.data_ptr() for x in (queries, keys, values, mask, out, entropy, scratch)),
        *(_longs(x) for x in (queries.stride(), keys.stride(), values.stride(), strides)),
        *(kind, b, h, n, m, d, scale, threads),
    )
    return out.to(q.dtype).transpose(1, 2), entropy.mean(1)


def beats_plain(q: Tensor) -> bool:
    """Whether `attend` is faster than PyTorch's attention even where entropy is not read.

    Measured on AVX-512 in float32 (toprovar bench fae): 14 to 35 % faster from 128 queries on, at head size 64. A
    fixed rule, so that the same machine always computes the same numbers.
    """
    fits = q.dtype == torch.float32 and q.shape[2] >= 128 and q.shape[3] <= 128
    return fits and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def compiled() -> _Function | None:
    """The C++ function, built if it is not on disk yet; None, with a warning, where it cannot be built."""
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
        key = hashlib.sha256("\0".join((_SOURCE, *_FLAGS, compiler, version, _processor())).encode()).hexdigest()[:16]
        function = _load(compiler, cache_folder() / f"fae_{key}.so").toprovar_fae
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        warnings.warn(
            f"attention entropy takes two attentions on this CPU: {compiler} did not build the faster form ({detail})",
            ToproVarWarning,
            stacklevel=2,
        )
        return None
    function.restype = None
    longs = ctypes.POINTER(ctypes.c_int64)
    function.argtypes = [ctypes.c_void_p] * 7 + [longs] * 4 + [ctypes.c_int64] * 6 + [ctypes.c_float, ctypes.c_int64]
    return function


def _load(compiler: str, library: Path) -> ctypes.CDLL:
    """The library as it is on disk, or built: then kept there if the folder can be written."""
    if _is_whole(library):
        return ctypes.CDLL(str(library))
    with _working_folder(library.parent) as folder:
        source, result = Path(folder) / "fae.cpp", Path(folder) / "fae.so"
        source.write_text(_SOURCE)
        command = [*compiler.split(), *_FLAGS, str(source), "-o", str(result)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        with result.open("ab") as file:  # the loader does not look behind the end
            file.write(hashlib.sha256(result.read_bytes()).digest())
        try:
            os.replace(result, library)
        except OSError:
            return ctypes.CDLL(str(result))
    return ctypes.CDLL(str(library))


def _working_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder to build in: other processes may be building or loading the same file."""
    try:
        return tempfile.TemporaryDirectory(dir=parent)
    except OSError:
        return tempfile.TemporaryDirectory()


def _is_whole(library: Path) -> bool:
    """Whether the file ends with its own digest: loading half of a library ends the process."""
    try:
        data = library.read_bytes()
    except FileNotFoundError:
        return False
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def _processor() -> str:
    """What -march=native depends on, so that a home folder shared by machines keeps one build for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name"))))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _longs(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
