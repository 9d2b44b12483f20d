"""toprovar::fae and toprovar::fae_cached on a CUDA device, held to the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from toprovar_compile.errors import CacheOverflowError
from toprovar_compile.kernels import fae, fae_cached, fae_reference, fae_varlen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# The output is rounded to its dtype once, and the probabilities to it before the product with v.
OUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Scores are accumulated in float32 from exact products, whatever the input dtype.
ENTROPY_TOLERANCE = 1e-4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3


@pytest.fixture(autouse=True)
def nan_poisoned_memory() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so an element that no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: int, m: int, d: int, dtype: torch.dtype, b: int = 2, h: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with the memory of (B, tokens, H, D) for q and (B, H, tokens, D) for k and v."""
    q = torch.randn(b, n, h, d, device="cuda").to(dtype).transpose(1, 2)
    k, v = (torch.randn(b, h, m, d, device="cuda").to(dtype) for _ in range(2))
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Compare both forms of the operator with the reference; return what the entropy form gave."""
    out, entropy = fae(q, k, v, bias, scale, True)
    plain, nothing = fae(q, k, v, bias, scale, False)
    want, want_entropy = fae_reference(q.double(), k.double(), v.double(), bias, scale)
    tolerance = OUT_TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(plain.double(), want, atol=2 * tolerance, rtol=2 * tolerance)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=ENTROPY_TOLERANCE, rtol=0)
    assert out.dtype == q.dtype and entropy.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous() and plain.transpose(1, 2).is_contiguous()
    assert nothing.shape == (q.shape[0], 0)
    return out, entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 5), (9, 14), (25, 55), (63, 155), (169, 424), (680, 2240)])
def test_odd_sizes(n: int, m: int, dtype: torch.dtype) -> None:
    check(*inputs(n, m, 64, dtype))


@pytest.mark.parametrize(
    ("d", "dtype"),  # each pair is a build of the kernel, of a second or so
    [(d, torch.bfloat16) for d in (32, 40, 80, 96, 128, 256)]
    + [(128, torch.float16), (80, torch.float32), (256, torch.float32)],
)
def test_head_dims(d: int, dtype: torch.dtype) -> None:
    check(*inputs(169, 320, d, dtype), scale=d**-0.5)


@pytest.mark.parametrize("n", [40, 2100])  # one and two consumers a program on compute capability 9.0
@pytest.mark.parametrize("m", [77, 700])
def test_mask_of_padded_keys(n: int, m: int) -> None:
    q, k, v = inputs(n, m, 128, torch.bfloat16, h=5)
    lengths = torch.tensor([m - 30, 9], device="cuda")
    keep = torch.arange(m, device="cuda") < lengths[:, None]
    check(q, k, v, keep[:, None, None], scale=128**-0.5)
    nothing = keep & torch.tensor([[True], [False]], device="cuda")
    out, entropy = check(q, k, v, nothing[:, None, None], scale=128**-0.5)
    assert (out[1] == 0).all() and (entropy[1] == 0).all()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 2.0])
def test_any_scale(scale: float) -> None:
    check(*inputs(150, 300, 64, torch.bfloat16), scale=scale)


def test_samples_with_keys_of_their_own_number() -> None:
    q, k, v = inputs(150, 90, 64, torch.bfloat16)
    packed_k, packed_v = (x.transpose(0, 1).reshape(3, 180, 64) for x in (k, v))
    lens = torch.tensor([0, 13, 13 + 100], dtype=torch.int32, device="cuda")
    out, entropy = fae_varlen(q, packed_k, packed_v, lens, SCALE, True)
    for i, (start, end) in enumerate(((0, 13), (13, 113))):
        keys, values = (x[None, :, start:end].double() for x in (packed_k, packed_v))
        want, want_entropy = fae_reference(q[i : i + 1].double(), keys, values, None, SCALE)
        torch.testing.assert_close(out[i : i + 1].double(), want, atol=1.6e-2, rtol=1.6e-2)
        torch.testing.assert_close(entropy[i : i + 1].double(), want_entropy, atol=ENTROPY_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_masks(dtype: torch.dtype) -> None:
    n, m = 100, 155
    q, k, v = inputs(n, m, 64, dtype)
    keep = torch.rand(2, 1, n, m, device="cuda") > 0.5
    keep[:, :, 3] = False
    out, _ = check(q, k, v, keep)
    assert (out[:, :, 3] == 0).all()
    check(q, k, v, torch.randn(3, n, m, device="cuda").to(dtype))
    check(
        q, k, v, torch.zeros(m, device="cuda", dtype=dtype).masked_fill_(torch.arange(m, device="cuda") > 70, -math.inf)
    )
    nothing = torch.zeros(1, 1, 1, m, dtype=torch.bool, device="cuda")
    out, entropy = fae(q, k, v, nothing, SCALE, True)
    assert (out == 0).all() and (entropy == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_distributions(dtype: torch.dtype) -> None:
    q, k, v = inputs(63, 169, 64, dtype)
    _, entropy = fae(torch.zeros_like(q), k, v, None, 1.0, True)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(169)), atol=1e-5, rtol=0)
    eye = torch.eye(64, device="cuda", dtype=dtype).expand(2, 3, 64, 64)
    out, entropy = fae(eye, eye, eye, None, 1000.0, True)
    torch.testing.assert_close(out, eye.clone(), atol=0, rtol=0, check_stride=False)
    assert (entropy == 0).all()
    big = (8.0 * q).to(dtype)
    _, entropy = fae(big, k, v, None, 4.0, True)  # scores up to about 1000
    _, want = fae_reference(big.double(), k.double(), v.double(), None, 4.0)
    torch.testing.assert_close(entropy.double(), want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("m", [14, 155])
def test_nan_is_passed_on(m: int) -> None:
    q, k, v = inputs(9, m, 64, torch.bfloat16)
    q[0, :, 3], v[1] = math.nan, math.nan
    out, entropy = fae(q, k, v, None, SCALE, True)
    assert out[0, :, 3].isnan().all() and entropy[0, 3].isnan() and out[1].isnan().all()
    assert not out[0, :, :3].isnan().any() and entropy.isnan().sum() == 1


def test_no_keys() -> None:
    q, k, v = inputs(9, 0, 64, torch.bfloat16)
    out, entropy = fae(q, k, v, None, SCALE, True)
    assert (out == 0).all() and (entropy == 0).all()


def test_key_dtype_is_cast_to_that_of_the_queries() -> None:
    q, k, v = inputs(25, 55, 64, torch.bfloat16)
    out, entropy = fae(q, k.float(), v, None, SCALE, True)
    want, want_entropy = fae(q, k, v, None, SCALE, True)
    assert torch.equal(out, want) and torch.equal(entropy, want_entropy)


def test_two_runs_are_bitwise_equal() -> None:
    args = (*inputs(680, 2240, 64, torch.bfloat16), None, SCALE, True)
    for a, b in zip(fae(*args), fae(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["batch", "row"])
def test_offsets_beyond_int32(layout: str) -> None:
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    torch.use_deterministic_algorithms(False)  # do not fill 4 GiB with NaN
    q, k0, v = inputs(25, 33, 64, torch.bfloat16, h=1)
    room = torch.empty(2**31 + 4096 * 64, device="cuda", dtype=torch.bfloat16)
    strides = (2**31, 0, 64, 1) if layout == "batch" else (64, 0, 2**26, 1)
    k = room.as_strided(k0.shape, strides)
    k.copy_(k0)
    want, want_entropy = fae(q, k0, v, None, SCALE, True)
    out, entropy = fae(q, k, v, None, SCALE, True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(entropy, want_entropy)


def caches(capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = (torch.full((capacity, 2, 3, 64), math.nan, device="cuda", dtype=dtype) for _ in range(2))
    return k_cache, v_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_scales_equal_one_concatenation(dtype: torch.dtype) -> None:
    k_cache, v_cache = caches(64, dtype)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    start = 0
    for n in (1, 4, 9, 25):
        q, k, v = inputs(n, n, 64, dtype)
        keys.append(k)
        values.append(v)
        out, entropy = fae_cached(q, k, v, k_cache, v_cache, start, None, SCALE, True)
        want, want_entropy = fae_reference(
            q.double(), torch.cat(keys, 2).double(), torch.cat(values, 2).double(), None, SCALE
        )
        torch.testing.assert_close(out.double(), want, atol=OUT_TOLERANCE[dtype], rtol=OUT_TOLERANCE[dtype])
        torch.testing.assert_close(entropy.double(), want_entropy, atol=ENTROPY_TOLERANCE, rtol=0)
        start += n
    assert k_cache[start:].isnan().all() and not k_cache[:start].isnan().any()
    with pytest.raises(CacheOverflowError, match="do not fit"):
        fae_cached(q, k, v, k_cache, v_cache, start + 1, None, SCALE, True)


def test_capture_and_replay() -> None:
    q, k, v = inputs(25, 25, 64, torch.bfloat16)
    k_cache, v_cache = caches(64, torch.bfloat16)
    k_cache[:14], v_cache[:14] = 0.5, 0.25
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fae_cached(q, k, v, k_cache, v_cache, 14, None, SCALE, True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, entropy = fae_cached(q, k, v, k_cache, v_cache, 14, None, SCALE, True)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    want, want_entropy = fae_cached(q, k, v, k_cache.clone(), v_cache.clone(), 14, None, SCALE, True)
    assert torch.equal(out, want) and torch.equal(entropy, want_entropy)


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy: bool) -> None:
    torch.use_deterministic_algorithms(False)  # its own checks compare memory that nobody wrote
    q, k, v = inputs(9, 9, 64, torch.float32)
    k_cache, v_cache = (torch.zeros(16, 2, 3, 64, device="cuda") for _ in range(2))
    torch.library.opcheck(fae, (q, k, v, None, SCALE, entropy))
    torch.library.opcheck(fae_cached, (q, k, v, k_cache, v_cache, 3, None, SCALE, entropy))


def test_fullgraph_compile() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        out, entropy = fae_cached(q * 2, k, v, k_cache, v_cache, 3, None, SCALE, True)
        return out.transpose(1, 2).flatten(2) + 1, entropy

    q, k, v = inputs(9, 9, 64, torch.bfloat16)
    start = tuple(torch.zeros(16, 2, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    want = step(q, k, v, *start[:2])
    got = torch.compile(step, fullgraph=True)(q, k, v, *start[2:])
    torch.testing.assert_close(got, want)
    assert torch.equal(start[0], start[2]) and torch.equal(start[1], start[3])
