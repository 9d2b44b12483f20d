"""toprovar::fae and toprovar::fae_cached on CPU, held to the float64 reference."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from toprovar_compile.errors import CacheOverflowError, MissingTritonError, OptionError, ToproVarWarning
from toprovar_compile.kernels import fae, fae_cached, fae_cpu, fae_reference, fae_varlen, plain_attention

fae_module = importlib.import_module("toprovar_compile.kernels.fae")

# The output is rounded to its dtype once, and the probabilities to it before the product with v.
OUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Scores are accumulated in float32 from exact products, whatever the input dtype; the result is stored in float32.
ENTROPY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
DTYPES = list(OUT_TOLERANCE)
SCALE = 0.3


@pytest.fixture(autouse=True)
def nan_poisoned_memory() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so an element that no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["compiled", "pytorch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to measure entropy on the CPU: the C++ one, and those that need no compiler."""
    if request.param == "pytorch":
        monkeypatch.setattr(fae_cpu, "compiled", lambda: None)
    elif fae_cpu.compiled() is None:
        pytest.skip("needs a C++ compiler")
    return str(request.param)


def inputs(n: int, m: int, d: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with the memory of (B, tokens, H, D) for q and (B, H, tokens, D) for k and v."""
    q = torch.randn(2, n, 3, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 3, m, d).to(dtype) for _ in range(2))
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Compare both forms of the operator with the reference; return what the entropy form gave."""
    out, entropy = fae(q, k, v, bias, scale, True)
    plain, nothing = fae(q, k, v, bias, scale, False)
    want, want_entropy = fae_reference(q.double(), k.double(), v.double(), bias, scale)
    tolerance = OUT_TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(plain.double(), want, atol=2 * tolerance, rtol=2 * tolerance)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=ENTROPY_TOLERANCE[q.dtype], rtol=0)
    assert out.dtype == q.dtype and entropy.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous() and plain.transpose(1, 2).is_contiguous()
    assert nothing.shape == (q.shape[0], 0)
    return out, entropy


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 5), (9, 14), (25, 55), (63, 155), (169, 424), (680, 700)])
def test_odd_sizes(n: int, m: int, dtype: torch.dtype) -> None:
    check(*inputs(n, m, dtype=dtype))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("d", [1, 24, 40, 80, 128, 256])
def test_head_dims(d: int) -> None:
    check(*inputs(25, 55, d), scale=d**-0.5)


@pytest.mark.usefixtures("form")
def test_any_strides() -> None:
    packed = torch.randn(2, 25, 3, 3, 64)
    check(*packed.permute(2, 0, 3, 1, 4).unbind(0))
    last = torch.randn(2, 3, 64, 25).transpose(-1, -2)
    check(last, last, last)
    expanded = torch.randn(1, 1, 25, 64).expand(2, 3, 25, 64)
    check(expanded, expanded, expanded)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 70, 95), (2, 1, 70, 95), (70, 95), (1, 1, 1, 95), (95,), (2, 1, 1, 1)])
def test_bias_and_mask_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = inputs(70, 95, dtype=dtype)
    check(q, k, v, torch.randn(shape).to(dtype))
    check(q, k, v, torch.rand(shape) > 0.5)
    check(q, k, v, torch.zeros(shape).masked_fill_(torch.rand(shape) > 0.5, -math.inf).to(dtype))


@pytest.mark.usefixtures("form")
def test_bias_of_another_dtype() -> None:
    q, k, v = inputs(25, 55, dtype=torch.bfloat16)
    check(q, k, v, torch.randn(25, 55))


@pytest.mark.usefixtures("form")
def test_fully_masked_rows_are_zero() -> None:
    q, k, v = inputs(25, 55)
    keep = torch.ones(25, 55, dtype=torch.bool)
    keep[3] = False
    for bias in (keep, torch.zeros(25, 55).masked_fill_(~keep, -math.inf)):
        out, _ = check(q, k, v, bias)
        assert (out[:, :, 3] == 0).all()
    for nothing in (torch.zeros(55, dtype=torch.bool), torch.full((55,), -math.inf)):
        out, entropy = check(q, k, v, nothing)
        assert (out == 0).all() and (entropy == 0).all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("n", "m"), [(9, 0), (0, 9), (0, 0)])
def test_no_keys_or_no_queries(n: int, m: int, entropy: bool) -> None:
    out, measured = fae(*inputs(n, m), None, SCALE, entropy)
    assert out.shape == (2, 3, n, 64) and (out == 0).all()
    assert measured.shape == (2, n if entropy else 0) and (measured == 0).all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_the_logarithm_of_the_length(dtype: torch.dtype) -> None:
    q, k, v = inputs(63, 169, dtype=dtype)
    _, entropy = check(torch.zeros_like(q), k, v)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(169)), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_rows_have_no_entropy(dtype: torch.dtype) -> None:
    eye = torch.eye(64, dtype=dtype).expand(2, 3, 64, 64)
    out, entropy = check(eye, eye, eye, scale=1000.0)
    assert torch.equal(out, eye) and (entropy == 0).all()


@pytest.mark.usefixtures("form")
def test_huge_logits_lose_a_few_roundings_of_the_score() -> None:
    q, k, v = inputs(63, 169)
    for size in (10.0, 1e3, 1e5):
        out, entropy = fae(q * size, k, v, None, 1.0, True)
        _, want_entropy = fae_reference((q * size).double(), k.double(), v.double(), None, 1.0)
        largest = (q @ k.transpose(-1, -2)).abs().max().item() * size
        torch.testing.assert_close(entropy.double(), want_entropy, atol=4e-7 * largest, rtol=0)
        assert not out.isnan().any() and entropy.min() >= 0


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale: float) -> None:
    check(*inputs(63, 155), scale=scale)


@pytest.mark.usefixtures("form")
def test_masks_made_of_the_lowest_number() -> None:
    q, k, v = inputs(25, 55)
    lowest = torch.zeros(25, 55).masked_fill_(torch.rand(25, 55) > 0.5, torch.finfo(torch.float32).min)
    check(q, k, v, lowest)


def test_nan_is_passed_on() -> None:
    if fae_cpu.compiled() is None:
        pytest.skip("needs a C++ compiler: PyTorch's flash attention gives 0 for such rows")
    q, k, v = inputs(9, 14)
    q[0, :, 3], v[1] = math.nan, math.nan
    out, entropy = fae(q, k, v, None, SCALE, True)
    assert out[0, :, 3].isnan().all() and entropy[0, 3].isnan() and out[1].isnan().all()
    assert not out[0, :, :3].isnan().any() and not entropy[1].isnan().any() and entropy.isnan().sum() == 1


@pytest.mark.usefixtures("form")
def test_key_dtype_is_cast_to_that_of_the_queries() -> None:
    q, k, v = inputs(25, 55, dtype=torch.bfloat16)
    out, entropy = fae(q, k.float(), v, None, SCALE, True)
    want, want_entropy = fae(q, k, v, None, SCALE, True)
    assert torch.equal(out, want) and torch.equal(entropy, want_entropy)


def test_without_entropy_it_is_plain_attention() -> None:
    q, k, v = inputs(63, 155)
    out, _ = fae(q, k, v, None, SCALE, False)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=SCALE))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs(9, 14)
    with pytest.raises(OptionError, match=r"expected q \(B, H, n, D\) and k, v \(B, H, m, D\)"):
        fae(q, k[:, :1], v[:, :1], None, SCALE, True)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    if fae_cpu.compiled() is None:
        pytest.skip("needs a C++ compiler")
    args = (*inputs(424, 155), None, SCALE, True)  # with five threads, heads are split
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(fae(*args))
    torch.set_num_threads(before)
    for out, entropy in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(entropy, results[0][1])


def test_no_compiler_is_a_warning_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    args = (*inputs(25, 55), None, SCALE, True)
    fae_cpu.compiled.cache_clear()
    try:
        with pytest.warns(ToproVarWarning, match="takes two attentions on this CPU: no-such-compiler did not build"):
            out, entropy = fae(*args)
        fae(*args)  # says so once
    finally:
        fae_cpu.compiled.cache_clear()
    monkeypatch.undo()
    want, want_entropy = fae(*args)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-5, rtol=0)


def caches(capacity: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = (torch.full((capacity, 2, 3, 64), math.nan, dtype=dtype) for _ in range(2))
    return k_cache, v_cache


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_scales_equal_one_concatenation(dtype: torch.dtype, entropy: bool) -> None:
    k_cache, v_cache = caches(64, dtype)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    start = 0
    for n in (1, 4, 9, 25):
        q, k, v = inputs(n, n, dtype=dtype)
        keys.append(k)
        values.append(v)
        out, measured = fae_cached(q, k, v, k_cache, v_cache, start, None, SCALE, entropy)
        want, want_entropy = fae_reference(
            q.double(), torch.cat(keys, 2).double(), torch.cat(values, 2).double(), None, SCALE
        )
        torch.testing.assert_close(out.double(), want, atol=2 * OUT_TOLERANCE[dtype], rtol=2 * OUT_TOLERANCE[dtype])
        if entropy:
            torch.testing.assert_close(measured.double(), want_entropy, atol=ENTROPY_TOLERANCE[dtype], rtol=0)
        start += n
    assert k_cache[start:].isnan().all() and not k_cache[:start].isnan().any()
    assert v_cache[start:].isnan().all() and not v_cache[:start].isnan().any()


def test_a_batch_of_fewer_rows_than_its_caches() -> None:
    q, k, v = inputs(9, 9)
    k_cache, v_cache = (torch.zeros(16, 2, 3, 64) for _ in range(2))
    want = [out.clone() for out in fae_cached(q, k, v, k_cache, v_cache, 3, None, SCALE, True)]
    got = fae_cached(q[:1], k[:1], v[:1], k_cache, v_cache, 3, None, SCALE, True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b[:1], atol=1e-5, rtol=0)


def test_cache_overflow_says_what_to_do() -> None:
    q, k, v = inputs(9, 9)
    k_cache, v_cache = caches(16)
    with pytest.raises(CacheOverflowError, match=r"9 tokens at row 8 do not fit a cache of 16 rows .* preallocate"):
        fae_cached(q, k, v, k_cache, v_cache, 8, None, SCALE, True)
    assert k_cache.isnan().all()


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy: bool) -> None:
    torch.use_deterministic_algorithms(False)  # its own checks compare memory that nobody wrote
    q, k, v = inputs(9, 14)
    mask = torch.rand(9, 14) > 0.3
    for bias in (None, mask, mask.float()):
        torch.library.opcheck(fae, (q, k, v, bias, SCALE, entropy))
    k_cache, v_cache = (torch.zeros(32, 2, 3, 64) for _ in range(2))
    torch.library.opcheck(fae_cached, (q, k[:, :, :9], v[:, :, :9], k_cache, v_cache, 5, None, SCALE, entropy))


@pytest.mark.parametrize("device_layout", ["tokens_first", "heads_first"])
@pytest.mark.parametrize("entropy", [False, True])
def test_fake_equals_real(entropy: bool, device_layout: str) -> None:
    q, k, v = inputs(9, 14, dtype=torch.bfloat16)
    if device_layout == "heads_first":
        q = q.contiguous()
    real = fae(q, k, v, None, SCALE, entropy)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = fae(*(mode.from_tensor(x) for x in (q, k, v)), None, SCALE, entropy)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("entropy", [False, True])
def test_fakes_of_the_other_forms(entropy: bool) -> None:
    q, k, v = inputs(9, 9)
    lens = torch.tensor([0, 4, 9], dtype=torch.int32)
    calls = (
        (fae_cached, (q, k, v, *caches(32), 5, None, SCALE, entropy)),
        (fae_varlen, (q, k[0], v[0], lens, SCALE, entropy)),
    )
    for operator, args in calls:
        real = operator(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_sample_without_keys() -> None:
    q, k, v = inputs(9, 14)
    lens = torch.tensor([0, 0, 14], dtype=torch.int32)
    out, entropy = fae_varlen(q, k[0], v[0], lens, SCALE, True)
    assert (out[0] == 0).all() and (entropy[0] == 0).all()
    want, want_entropy = fae(q[1:], k[:1], v[:1], None, SCALE, True)
    torch.testing.assert_close(out[1:], want)
    torch.testing.assert_close(entropy[1:], want_entropy)


@pytest.mark.parametrize("entropy", [False, True])
def test_samples_with_keys_of_their_own_number(entropy: bool) -> None:
    q, k, v = inputs(9, 14)
    packed_k, packed_v = (x.transpose(0, 1).reshape(3, 28, 64) for x in (k, v))
    lens = torch.tensor([0, 5, 5 + 17], dtype=torch.int32)
    out, measured = fae_varlen(q, packed_k, packed_v, lens, SCALE, entropy)
    for i, (start, end) in enumerate(((0, 5), (5, 22))):
        keys, values = packed_k[None, :, start:end], packed_v[None, :, start:end]
        want, want_entropy = fae_reference(q[i : i + 1], keys, values, None, SCALE)
        torch.testing.assert_close(out[i : i + 1], want, atol=1e-5, rtol=0)
        if entropy:
            torch.testing.assert_close(measured[i : i + 1], want_entropy, atol=1e-5, rtol=0)
    torch.library.opcheck(fae_varlen, (q, packed_k, packed_v, lens, SCALE, entropy))
    with pytest.raises(OptionError, match="pack the keys"):
        fae_varlen(q, k, v, lens, SCALE, entropy)


def _step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: int) -> tuple[Tensor, Tensor]:
    out, entropy = fae_cached(q * 2, k, v, k_cache, v_cache, start, None, SCALE, True)
    return out.transpose(1, 2).flatten(2) + 1, entropy


def test_inductor_writes_the_caches_in_place() -> None:
    compiled = torch.compile(_step, fullgraph=True, dynamic=True)
    eager, ours = caches(37), caches(37)
    start = 0
    code: list[str] = []
    for n in (4, 9, 16):
        q, k, v = inputs(n, n)
        got, sources = run_and_get_code(compiled, q, k, v, *ours, start)
        code += sources
        torch.testing.assert_close(got, _step(q, k, v, *eager, start))
        start += n
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert len(set(code)) == 1  # start = 0 and every n share one compiled graph
    assert code[0].count("= torch.ops.toprovar.fae_cached.default(") == 1
    assert code[0].count("= empty_strided_cpu(") == 1  # q * 2, and no second cache
    assert "auto_functionalized" not in code[0] and "copy_" not in code[0]


def test_missing_triton_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fae_module, "HAS_TRITON", False)
    with pytest.raises(MissingTritonError, match="needs Triton, which is not installed"):
        fae_module._fae_cuda(*inputs(9, 14), None, SCALE, True)
    monkeypatch.setattr(plain_attention, "attend", plain_attention.by_pytorch)
    out, _ = fae_module._fae_cuda(*inputs(9, 14), None, SCALE, False)
    assert not out.isnan().any()


_BLOCKED = """
import sys
sys.modules["triton"] = None
import torch
from toprovar_compile.kernels import fae, fae_reference
from toprovar_compile.kernels._triton import HAS_TRITON
from toprovar_compile.errors import MissingTritonError
from toprovar_compile.kernels.fae import _launch_fae
assert not HAS_TRITON
q, k, v = torch.randn(3, 1, 2, 9, 32).unbind(0)
torch.testing.assert_close(fae(q, k, v, None, 0.2, True)[1], fae_reference(q, k, v, None, 0.2)[1])
torch.compile(fae, fullgraph=True, backend="aot_eager")(q, k, v, None, 0.2, True)
try:
    _launch_fae(q, k, v, None, 0.2)
except MissingTritonError as error:
    print(error)
"""


def test_imports_and_runs_in_a_fresh_process_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", _BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "_fae_kernel cannot run: Triton is not installed" in done.stdout


_FIRST_CALL = """
import torch
from toprovar_compile.kernels import fae, fae_reference
step = torch.compile(lambda q, k, v: fae(q * 2, k, v, None, 0.2, True), fullgraph=True)
q, k, v = torch.randn(3, 1, 2, 9, 32).unbind(0)
with torch.no_grad():
    got = step(q, k, v)
torch.testing.assert_close(got, fae_reference(q * 2, k, v, None, 0.2), check_stride=False)
print("checked")
"""


def test_the_first_call_of_a_process_can_be_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["checked"]


def test_configurations_cover_every_supported_kind() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        for itemsize in (2, 4):
            for block_d in (16, 32, 64, 128, 256):
                for biased in (False, True):
                    for n in (1, 4, 100, 4096):
                        cfg = fae_module.pick_config(capability, itemsize, block_d, biased, n)
                        assert cfg.block_m >= 16 and cfg.block_n >= 16


def test_triton_kernel_in_the_interpreter(interpret: Callable[[Path], str]) -> None:
    assert interpret(Path(__file__).with_name("interpret_fae.py")).split()[-1] == "checked"
