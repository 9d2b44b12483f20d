"""Every form of attention becomes toprovar::fae with equal values; every reason to leave one alone has a case."""

from __future__ import annotations

import math
import operator
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn.attention.flex_attention import flex_attention

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae
from toprovar_compile.models.var import Block, VARConfig
from toprovar_compile.passes._base import PassContext, PassReport
from toprovar_compile.passes._torch_ir import op_name, same_strides
from toprovar_compile.passes.rewrite_attention import SkipReason, check_rewrite_attention, rewrite_attention

B, H, N, M, D = 2, 3, 5, 7, 8
# Sums of at most 8 products in another order, in float32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# One rounding of the probabilities to bfloat16 is left out by the operator.
TOLERANCE_BF16 = {"rtol": 2e-2, "atol": 2e-2}

Attention = Callable[[Tensor, Tensor, Tensor], Any]


# Stand-ins for packages that need a GPU: same names, signatures and meaning.


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


@torch.compiler.allow_in_graph
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sink: Tensor | None = None,  # in no release: stands for an argument of a later one
) -> Tensor:
    return _plain(q, k, v, softmax_scale)


@torch.compiler.allow_in_graph
def flash_attn_qkvpacked_func(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None) -> Tensor:
    return _plain(*qkv.unbind(2), softmax_scale)


@torch.compiler.allow_in_graph
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
) -> Tensor:
    return _plain(q, *kv.unbind(2), softmax_scale)


@torch.compiler.allow_in_graph
def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    return _plain(q, k, v, None)


@torch.compiler.allow_in_graph
def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
) -> Tensor:
    if query.dim() == 3:
        bias = None if attn_bias is None else attn_bias.unsqueeze(1)
        return _plain(*(x.unsqueeze(2) for x in (query, key, value)), scale, bias).squeeze(2)
    return _plain(query, key, value, scale, attn_bias)


class LowerTriangularMask:
    """Named like the one of xformers."""


_FLASH_SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,"
    " int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax)"
    " -> (Tensor, Tensor)"
)
_XFORMERS_SCHEMA = (
    "flash_fwd(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k,"
    " int max_seqlen_q, int max_seqlen_k, float p, float softmax_scale, bool is_causal, int window_left,"
    " int window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor)"
)


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    flash, xformers, ops = (types.ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops"))
    for function in (flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_func):
        function.__module__ = "flash_attn.flash_attn_interface"
        setattr(flash, function.__name__, function)
    memory_efficient_attention.__module__ = "xformers.ops.fmha"
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    xformers.ops = ops  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for module in (flash, xformers, ops):
            patch.setitem(sys.modules, module.__name__, module)
        with torch.library._scoped_library("flash_attn", "FRAGMENT") as a:
            a.define(_FLASH_SCHEMA)
            a.impl("_flash_attn_forward", _flash_attn_forward, "CompositeExplicitAutograd")
            with torch.library._scoped_library("xformers_flash", "FRAGMENT") as b:
                b.define(_XFORMERS_SCHEMA)
                b.impl("flash_fwd", _flash_fwd, "CompositeExplicitAutograd")
                yield


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    return _plain(q, k, v, scale), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def _flash_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _plain(q, k, v, rest[6]), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


# The forms. Each takes q (B, H, N, D) and k, v (B, H, M, D).

BIAS = torch.randn(1, H, N, M, generator=torch.Generator().manual_seed(1))
KEEP = torch.rand(B, 1, N, M, generator=torch.Generator().manual_seed(2)) > 0.3
KEEP[..., 0] = True  # a row with nothing to attend to is nan when it is written out
HEAT = torch.rand(1, H, 1, 1, generator=torch.Generator().manual_seed(3)) + 0.5


def _blhd(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def _folded(*tensors: Tensor) -> list[Tensor]:
    return [x.reshape(-1, *x.shape[2:]) for x in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=BIAS, dropout_p=0.0, scale=0.5)


def sdpa_boolean_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, KEEP)


def sdpa_of_scaled_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q * 0.5, k / 4, v, scale=2.0)


def sdpa_aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v)


def sdpa_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], KEEP[:, 0])


def sdpa_folded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = BIAS.expand(B, H, N, M).reshape(B * H, N, M)
    return F.scaled_dot_product_attention(*_folded(q, k, v), bias).view(B, H, N, D)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, H * D)


def written_out_functions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.div(torch.matmul(q, k.mT), 3)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def written_out_methods(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.mul(0.3).matmul(k.permute(0, 1, 3, 2))
    return F.softmax(scores, -1, dtype=torch.float32).type_as(q).contiguous().matmul(v)


def written_out_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores *= 0.3
    scores += BIAS
    return scores.softmax(3) @ v


def dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = F.dropout((q @ k.mT).softmax(-1), 0.5, training=False)
    return F.dropout(p, 0.0) @ v


def bias_then_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + BIAS) * 0.3).softmax(-1) @ v


def bias_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (BIAS + 0.3 * (q @ k.mT)).softmax(-1) @ v


def bias_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT - BIAS - 3.0).softmax(-1) @ v


def two_biases_and_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT + BIAS) * 0.5 + BIAS[:, :1]
    return scores.masked_fill(~KEEP, float("-inf")).softmax(-1) @ v


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~KEEP, float("-inf")).softmax(-1) @ v


def masked_fill_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocked = ~KEEP | (torch.arange(N) == 2)[:, None]  # all of row 2: uniform, not 0
    return (q @ k.mT).masked_fill(blocked, torch.finfo(q.dtype).min).softmax(-1) @ v


def where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(KEEP, q @ k.mT, float("-inf")).softmax(-1) @ v


def where_not(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(~KEEP, -1e9, q @ k.mT).softmax(-1) @ v


def temperature_per_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / HEAT * HEAT.exp() + BIAS).softmax(-1) @ v


def bmm_of_folded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _folded(q, k, v)
    p = torch.bmm(q, k.transpose(1, 2)).mul(0.3).softmax(-1)
    return p.bmm(v).view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


def bmm_kept_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _folded(q, k, v)
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _folded(q, k, v)
    nothing = torch.zeros(B * H, N, M)
    return torch.bmm(torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.3).softmax(-1), v).view(B, H, N, D)


def baddbmm_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _folded(q, k, v)
    bias = BIAS.expand(B, H, N, M).reshape(B * H, N, M)
    return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=2, alpha=0.3).softmax(-1), v).view(B, H, N, D)


def channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:, 0], k[:, 0].mT.contiguous(), v[:, 0].mT.contiguous()
    p = F.softmax(torch.bmm(q, k) * D**-0.5, dim=2)
    return torch.bmm(v, p.permute(0, 2, 1))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, v)


def einsum_blhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _blhd(q, k, v)
    p = torch.softmax(torch.einsum("bkhd, bqhd -> bhqk", k, q) / 3 + BIAS, -1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("...qd,...kd->...qk", q, k).softmax(-1)
    return torch.einsum("...qk,...kd->...qd", [p, v])


def output_viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) @ v).view(B * H, N, D) + 1


def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v)


def flex_scaled(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return flex_attention(q, k, v, scale=0.3)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(*_blhd(q, k, v), softmax_scale=0.3, window_size=(-1, -1), deterministic=True)


def flash_of_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v).reshape(B, N, H * D)


def flash_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_qkvpacked_func(torch.stack(_blhd(k, v, k), 2), 0.0, 0.3)


def flash_packed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _blhd(q, k, v)
    return flash_attn_kvpacked_func(q, torch.stack((k, v), 2))


def _flash_op(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    plain = {"causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
    plain |= {"alibi_slopes": None, "return_softmax": False}
    return torch.ops.flash_attn._flash_attn_forward(*_blhd(q, k, v), 0.0, 0.3, **(plain | kwargs))


def flash_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _ = _flash_op(q, k, v)
    return out


class _FlashFunction(torch.autograd.Function):
    """Calls the operator as flash_attn's own functions do; Dynamo looks inside."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = _flash_op(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out[..., :D]


def flash_function(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return _FlashFunction.apply(q, k, v)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return memory_efficient_attention(*_blhd(q, k, v), attn_bias=BIAS.expand(B, H, N, M), scale=0.3)


def xformers_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return memory_efficient_attention(q[:, 0], k[:, 0], v[:, 0], BIAS[0, :B])


def _xformers_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Any:
    rest = (None, N, M, 0.0, 0.3, False, -1, -1, False, None)
    return torch.ops.xformers_flash.flash_fwd(*_blhd(q, k, v), cu_seqlens, cu_seqlens, *rest)


def xformers_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _xformers_op(q, k, v)[0]


FORMS: list[Attention] = [
    sdpa,
    sdpa_by_name,
    sdpa_boolean_mask,
    sdpa_of_scaled_operands,
    sdpa_aten,
    sdpa_one_head,
    sdpa_folded_heads,
    written_out,
    written_out_functions,
    written_out_methods,
    written_out_in_place,
    dropout_of_nothing,
    bias_then_scale,
    bias_first,
    bias_subtracted,
    two_biases_and_a_mask,
    masked_fill,
    masked_fill_finite,
    where,
    where_not,
    temperature_per_head,
    bmm_of_folded_heads,
    bmm_kept_folded,
    baddbmm,
    baddbmm_with_bias,
    channels_first,
    einsum,
    einsum_blhd,
    einsum_ellipsis,
    output_viewed,
    flex,
    flex_scaled,
    flash,
    flash_of_transposed,
    flash_packed,
    flash_packed_keys,
    flash_operator,
    flash_function,
    xformers,
    xformers_one_head,
    xformers_operator,
]


@dataclass
class Rewritten:
    report: PassReport
    gm: GraphModule
    inputs: list[Any]
    value: Any


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D, generator=g) for n in (N, M, M))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def compiled(fn: Callable[..., Any], *args: Any) -> Rewritten:
    """Capture with Dynamo, run the pass and its check, run the graph eagerly."""
    seen: list[Rewritten] = []

    def backend(gm: GraphModule, example: list[Any]) -> Callable[..., Any]:
        report = rewrite_attention(gm, PassContext())
        gm.graph.lint()
        check_rewrite_attention(gm)
        seen.append(Rewritten(report, gm, [], None))

        def run(*values: Any) -> Any:
            seen[-1].inputs = list(values)
            return gm.forward(*values)

        return run

    torch._dynamo.reset()
    value = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (found,) = seen
    found.value = value
    return found


def operators(gm: GraphModule) -> Counter[str]:
    return Counter(op_name(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method"))


class _ExampleValues(Interpreter):
    """Runs a graph and holds every tensor to the example value of its node."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        example = n.meta.get("example_value")
        if isinstance(value, Tensor) and isinstance(example, Tensor) and "batch_dim" not in str(n.target):
            assert same_strides(value, example) and value.dtype == example.dtype, n.format_node()
        return value


@pytest.mark.parametrize("fn", FORMS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_form_becomes_the_operator(fn: Attention) -> None:
    got = compiled(fn, *inputs())
    assert (got.report.matched, got.report.skipped) == (1, Counter())
    count = operators(got.gm)
    assert count["toprovar::fae"] == 1
    assert not count.keys() & {"softmax", "matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
    want = fn(*inputs())
    torch.testing.assert_close(got.value, want, **TOLERANCE)
    assert same_strides(got.value, want)
    _expect_complete_meta(got)
    before = str(got.gm.graph)
    again = rewrite_attention(got.gm, PassContext())
    assert (again.matched, again.skipped, str(got.gm.graph)) == (0, Counter(), before)


def _expect_complete_meta(got: Rewritten) -> None:
    _ExampleValues(got.gm).run(*got.inputs)
    made = [n for n in got.gm.graph.nodes if n.target is fae or any(a.target is fae for a in n.all_input_nodes)]
    assert all(n.meta["stack_trace"] and "example_value" in n.meta for n in made)


@torch.no_grad()
def test_numbers_fold_into_the_scale() -> None:
    scale = {f: _fae(compiled(f, *inputs()).gm).args[4] for f in (sdpa, sdpa_of_scaled_operands, written_out_methods)}
    assert scale == {sdpa: 1 / math.sqrt(D), sdpa_of_scaled_operands: 0.25, written_out_methods: pytest.approx(0.3)}


@torch.no_grad()
def test_no_copies() -> None:
    for fn in (written_out, flash_of_transposed, bmm_of_folded_heads):
        count = operators(compiled(fn, *inputs()).gm)
        assert not count.keys() & {"contiguous", "clone", "mul", "truediv"}, fn
    assert operators(compiled(flash_of_transposed, *inputs()).gm)["transpose"] == 1  # only that of the output
    assert operators(compiled(output_viewed, *inputs()).gm)["contiguous"] == 1  # view() needs the old layout


@torch.no_grad()
def test_boolean_masks_stay_boolean() -> None:
    for fn in (sdpa_boolean_mask, masked_fill, where):
        bias = _fae(compiled(fn, *inputs()).gm).args[3]
        assert isinstance(bias, Node) and bias.meta["example_value"].dtype == torch.bool


@torch.no_grad()
def test_upcasts_to_float32_inside_half_precision() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.float() @ k.float().mT * 0.3
        return scores.softmax(-1).to(v.dtype) @ v

    got = compiled(fn, *inputs(torch.bfloat16))
    q = _fae(got.gm).args[0]
    assert got.report.matched == 1 and isinstance(q, Node) and q.op == "placeholder"
    torch.testing.assert_close(got.value, fn(*inputs(torch.bfloat16)), **TOLERANCE_BF16)


@torch.no_grad()
@pytest.mark.parametrize("fn", [sdpa, written_out], ids=lambda f: f.__name__)
def test_autocast_is_written_out(fn: Attention) -> None:
    def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(q, k, v)

    got, want = compiled(under_autocast, *inputs()), under_autocast(*inputs())
    assert got.report.matched == 1 and got.value.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got.value, want, **TOLERANCE_BF16)


# Reasons to leave an attention alone.


def probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    p = (q @ k.mT).softmax(-1)
    v[:, :, 0] = 1
    return p @ v


def written_after_scaling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    half = q * 0.5
    q.mul_(2)
    return F.scaled_dot_product_attention(half, k, v) + q


def added_into_the_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = BIAS.expand(B, H, N, M).clone()
    bias += q @ k.mT
    return bias.softmax(-1) @ v


def mixed_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).bfloat16() @ v.bfloat16()


def normalised_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).softmax(-1)
    return F.normalize(p, dim=-1) @ v


_MHA = nn.MultiheadAttention(D, 2, batch_first=True).eval()

SKIPPED: list[tuple[SkipReason, str, Attention]] = [
    (SkipReason.CAUSAL, "sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    (SkipReason.CAUSAL, "flash", lambda q, k, v: flash_attn_func(*_blhd(q, k, v), causal=True)),
    (SkipReason.DROPOUT, "sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1)),
    (SkipReason.DROPOUT, "chain", lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v),
    (SkipReason.DROPOUT, "flash", lambda q, k, v: flash_attn_func(*_blhd(q, k, v), 0.1)),
    (SkipReason.DROPOUT, "xformers", lambda q, k, v: memory_efficient_attention(*_blhd(q, k, v), p=0.1)),
    (
        SkipReason.GQA,
        "sdpa",
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    ),
    (SkipReason.GQA, "flash", lambda q, k, v: flash_attn_func(*_blhd(q, k[:, :1], v[:, :1]))),
    (SkipReason.WINDOW, "flash", lambda q, k, v: flash_attn_func(*_blhd(q, k, v), window_size=(2, 2))),
    (SkipReason.WINDOW, "operator", lambda q, k, v: _flash_op(q, k, v, window_size_left=2)[0]),
    (SkipReason.VARLEN, "flash", lambda q, k, v: flash_attn_varlen_func(*_blhd(q, k, v), torch.zeros(2))),
    (SkipReason.VARLEN, "xformers", lambda q, k, v: _xformers_op(q, k, v, torch.zeros(2, dtype=torch.int32))[0]),
    (SkipReason.MULTI_USER, "probabilities", probabilities_returned),
    (SkipReason.MULTI_USER, "scores", scores_returned),
    (SkipReason.EXTRA_OUTPUT, "operator", lambda q, k, v: sum(x.sum() for x in _flash_op(q, k, v))),
    (SkipReason.EXTRA_OUTPUT, "flex", lambda q, k, v: flex_attention(q, k, v, return_lse=True)),
    (SkipReason.SCORE_MOD, "softcap", lambda q, k, v: (torch.tanh(q @ k.mT) * 5).softmax(-1) @ v),
    (SkipReason.SCORE_MOD, "per_key", lambda q, k, v: (q @ k.mT * BIAS).softmax(-1) @ v),
    (SkipReason.SCORE_MOD, "flex", lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + i)),
    (SkipReason.SCORE_MOD, "into_bias", added_into_the_bias),
    (SkipReason.SCORE_MOD, "probabilities", normalised_by_hand),
    (SkipReason.SOFTMAX_DIM, "chain", lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
    (SkipReason.LAYOUT, "matmul", lambda q, k, v: v.mT @ (k @ q.mT).softmax(-1)),
    (SkipReason.LAYOUT, "einsum", lambda q, k, v: torch.einsum("bhqd,bhkd->bqhk", q, k).softmax(-1) @ v[:, :1]),
    (SkipReason.RANK, "matmul", lambda q, k, v: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0]),
    (SkipReason.BROADCAST, "matmul", lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v),
    (SkipReason.HEAD_DIM, "sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :4])),
    (SkipReason.MASK, "integers", lambda q, k, v: (q @ k.mT + KEEP.long()).softmax(-1) @ v),
    (SkipReason.DTYPE, "chain", mixed_precision),
    (SkipReason.MUTATION, "values", written_between),
    (
        SkipReason.UNKNOWN_ARGUMENT,
        "flash",
        lambda q, k, v: flash_attn_func(*_blhd(q, k, v), sink=torch.zeros(H)),
    ),
    (SkipReason.UNSUPPORTED_FORM, "mha", lambda q, k, v: _MHA(q[:, 0], k[:, 0], v[:, 0], need_weights=False)[0]),
]


@pytest.mark.parametrize(("reason", "name", "fn"), SKIPPED, ids=[f"{r.name}-{n}" for r, n, _ in SKIPPED])
@torch.no_grad()
def test_skipped_for_a_reason(reason: SkipReason, name: str, fn: Attention) -> None:
    torch.manual_seed(0)
    got = compiled(fn, *inputs())
    assert (got.report.matched, got.report.skipped) == (0, Counter({reason: 1}))
    assert reason.value in got.report.notes[0] and "test_rewrite_attention.py:" in got.report.notes[0]
    torch.manual_seed(0)
    torch.testing.assert_close(got.value, fn(*inputs()), rtol=0, atol=0)


def test_skipped_where_gradients_are_recorded() -> None:
    q, k, v = inputs()
    got = compiled(sdpa, q.requires_grad_(), k, v)
    assert got.report.skipped == Counter({SkipReason.GRAD: 1})


@torch.no_grad()
def test_skipped_where_the_head_dim_is_symbolic() -> None:
    q, k, v = inputs()
    for x in (q, k, v):
        torch._dynamo.mark_dynamic(x, 3)
    assert compiled(sdpa, q, k, v).report.skipped == Counter({SkipReason.DYNAMIC_DIM: 1})


@torch.no_grad()
def test_scaling_is_not_passed_by_a_write() -> None:
    got = compiled(written_after_scaling, *inputs())
    assert got.report.matched == 1 and _fae(got.gm).args[4] == 1 / math.sqrt(D)
    torch.testing.assert_close(got.value, written_after_scaling(*inputs()), **TOLERANCE)


@torch.no_grad()
def test_other_softmaxes_are_not_attention() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        gate = F.softmax(x @ w, -1)
        return gate.cumsum(-1) + F.linear(x, w).softmax(-1) * 2

    got = compiled(fn, torch.randn(2, 4, 4), torch.randn(4, 4))
    assert (got.report.matched, got.report.skipped) == (0, Counter())


# Graphs made by hand.


def by_hand(build: Callable[[Graph, Node, Node, Node], Node]) -> GraphModule:
    """A graph of q, k, v with example values on every node."""
    graph, mode = Graph(), FakeTensorMode()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    graph.output((build(graph, q, k, v),))
    gm = GraphModule({}, graph)
    values = dict(zip((q, k, v), (mode.from_tensor(x) for x in inputs()), strict=True))
    with mode:
        for node in graph.nodes:
            if node in values:
                node.meta["example_value"] = values[node]
            elif node.op != "output":
                args = torch.fx.node.map_arg(node.args, lambda n: n.meta["example_value"])
                kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: n.meta["example_value"])
                target = node.target if callable(node.target) else getattr(type(args[0]), str(node.target))
                node.meta["example_value"] = target(*args, **kwargs)
    return gm


def chain_by_hand() -> GraphModule:
    def build(graph: Graph, q: Node, k: Node, v: Node) -> Node:
        turned = graph.call_method("transpose", (k, -2, -1))
        scores = graph.call_function(operator.mul, (graph.call_function(operator.matmul, (q, turned)), 0.5))
        p = graph.call_function(torch.softmax, (scores,), {"dim": -1})
        out = graph.call_function(torch.matmul, (p, v))
        return graph.call_method("reshape", (graph.call_method("transpose", (out, 1, 2)), B, N, H * D))

    return by_hand(build)


def test_counts_of_a_graph_made_by_hand() -> None:
    gm = chain_by_hand()
    assert operators(gm) == Counter({"transpose": 2, "matmul": 2, "mul": 1, "softmax": 1, "reshape": 1})
    report = rewrite_attention(gm, PassContext())
    assert (report.name, report.matched) == ("rewrite_attention", 1)
    assert operators(gm) == Counter({"toprovar::fae": 1, "getitem": 1, "transpose": 1, "reshape": 1})
    assert _fae(gm).args[3:] == (None, 0.5, True)


def test_skipped_without_example_values() -> None:
    gm = chain_by_hand()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta.clear()
    assert rewrite_attention(gm, PassContext()).skipped == Counter({SkipReason.NO_META: 1})


def test_skipped_where_the_layout_cannot_be_restored() -> None:
    gm = by_hand(lambda graph, q, k, v: graph.call_function(F.scaled_dot_product_attention, (q, k, v)))
    attention = next(n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention")
    value = attention.meta["example_value"]
    with value.fake_mode:
        attention.meta["example_value"] = value.new_empty(D, N, H, B).permute(3, 2, 1, 0)
    before = str(gm.graph)
    assert rewrite_attention(gm, PassContext()).skipped == Counter({SkipReason.STRIDES: 1})
    assert str(gm.graph) == before


def test_skipped_for_a_causal_mask_object() -> None:
    def build(graph: Graph, q: Node, k: Node, v: Node) -> Node:
        return graph.call_function(memory_efficient_attention, (q, q, q))

    for mask, reason in ((LowerTriangularMask(), SkipReason.CAUSAL), (object(), SkipReason.MASK)):
        gm = by_hand(build)
        attention = next(n for n in gm.graph.nodes if n.target is memory_efficient_attention)
        attention.args = (*attention.args, mask)
        assert rewrite_attention(gm, PassContext()).skipped == Counter({reason: 1})


def test_every_reason_has_a_case() -> None:
    elsewhere = {SkipReason.GRAD, SkipReason.DYNAMIC_DIM, SkipReason.NO_META, SkipReason.STRIDES}
    assert {reason for reason, _, _ in SKIPPED} | elsewhere == set(SkipReason)


def _set(index: int, value: object) -> Callable[[GraphModule, Node], None]:
    def corrupt(gm: GraphModule, node: Node) -> None:
        node.args = (*node.args[:index], value, *node.args[index + 1 :])  # type: ignore[arg-type]

    return corrupt


def _swap_q_and_k(gm: GraphModule, node: Node) -> None:
    q, k, *rest = node.args
    node.args = (k, q, *rest)


def _bias_of_q(gm: GraphModule, node: Node) -> None:
    node.args = (*node.args[:3], node.args[0], *node.args[4:])


def _no_meta(gm: GraphModule, node: Node) -> None:
    del node.meta["example_value"]


def _other_user(gm: GraphModule, node: Node) -> None:
    with gm.graph.inserting_after(node):
        gm.graph.call_function(len, (node,))


def _left_over(gm: GraphModule, node: Node) -> None:
    q, k, v = (n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(node):
        attention = gm.graph.call_function(F.scaled_dot_product_attention, (q, k, v))
    attention.meta["example_value"] = q.meta["example_value"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_set(4, 1), "scale 1 "),
        (_set(5, None), "entropy None"),
        (_swap_q_and_k, "operands of shapes"),
        (_bias_of_q, "a bias that does not fit"),
        (_no_meta, "example value"),
        (_other_user, "a user other than getitem"),
        (_left_over, "scaled_dot_product_attention is left"),
    ],
)
def test_check_refuses_a_corrupted_graph(corrupt: Callable[[GraphModule, Node], None], message: str) -> None:
    gm = chain_by_hand()
    rewrite_attention(gm, PassContext())
    check_rewrite_attention(gm)
    corrupt(gm, _fae(gm))
    with pytest.raises(PassInvariantError, match=message) as error:
        check_rewrite_attention(gm)
    assert "rewrite_attention: node " in error.value.where


# Through Dynamo, with symbolic lengths.


class _Cached(nn.Module):
    """Attention over a growing cache, as a step of VAR does it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.qkv, self.form = nn.Linear(H * D, 3 * H * D), form

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = torch.cat((k_cache, k), 2), torch.cat((v_cache, v), 2)
        if self.form == "sdpa":
            out = F.scaled_dot_product_attention(F.normalize(q, dim=-1), k, v, scale=1.0)
        elif self.form == "chain":
            out = (q * D**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            q3, k3, v3 = (y.reshape(b * H, -1, D) for y in (q, k, v))
            out = torch.bmm(torch.bmm(q3, k3.mT).softmax(-1), v3).view(b, H, n, D)
        return x + out.transpose(1, 2).reshape(b, n, c), k, v


@pytest.mark.parametrize("form", ["sdpa", "chain", "bmm"])
@torch.no_grad()
def test_symbolic_lengths_compile_once(form: str) -> None:
    guards: list[int] = []

    def backend(gm: GraphModule, example: list[Any]) -> Callable[..., Any]:
        env = next(x.node.shape_env for x in example if isinstance(x, torch.SymInt))
        guards.append(len(env.guards))
        assert rewrite_attention(gm, PassContext()).matched == 1
        check_rewrite_attention(gm)
        assert "contiguous" not in operators(gm)
        guards.append(len(env.guards))
        return gm.forward

    torch._dynamo.reset()
    model = _Cached(form)
    step = torch.compile(model, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        k, v = torch.randn(B, H, 4, D), torch.randn(B, H, 4, D)
        for n in (9, 16, 25):
            x = torch.randn(B, n, H * D)
            for tensor, dim in ((x, 1), (k, 2), (v, 2)):
                torch._dynamo.mark_dynamic(tensor, dim)
            want = model(x, k, v)
            got = step(x, k, v)
            torch.testing.assert_close(got, want, **TOLERANCE)
            k, v = (y.clone() for y in want[1:])
    first, second = guards
    assert first == second


@pytest.mark.parametrize("fn", [written_out, bmm_of_folded_heads, flex, flash], ids=lambda f: f.__name__)
@torch.no_grad()
def test_functional_graph_has_the_operator_and_no_copy(fn: Attention) -> None:
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example: list[Any]) -> GraphModule:
        graphs.append(gm)
        return gm

    def backend(gm: GraphModule, example: list[Any]) -> Any:
        rewrite_attention(gm, PassContext())
        return aot_module_simplified(gm, example, fw_compiler=keep)

    torch._dynamo.reset()
    value = torch.compile(fn, backend=backend, fullgraph=True)(*inputs())
    torch.testing.assert_close(value, fn(*inputs()), **TOLERANCE)
    (graph,) = graphs
    count = operators(graph)
    copies = {flex: 1, flash: 3}.get(fn, 0)  # flex: contiguous output; flash: the three contiguous inputs of the test
    assert (count["toprovar::fae"], count["clone"]) == (1, copies)
    assert count.keys() <= {"toprovar::fae", "getitem", "permute", "transpose", "view", "_unsafe_view", "clone"}


@torch.no_grad()
def test_block_of_var() -> None:
    torch.manual_seed(0)
    cfg = VARConfig(depth=1, embed_dim=32, num_heads=2)
    block = Block(cfg).eval()
    x, cond = torch.randn(2, 9, 32), torch.randn(2, 32)
    cache = torch.randn(2, 2, 5, 16)
    got, want = compiled(block, x, cond, cache, cache), block(x, cond, cache, cache)
    assert (got.report.matched, got.report.skipped) == (1, Counter())
    torch.testing.assert_close(got.value, want, **TOLERANCE)


def _fae(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.nodes if n.target is fae)
