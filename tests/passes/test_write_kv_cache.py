"""A growing cache becomes writes into a buffer with the same results; any other attention stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes import check_write_kv_cache, placeholders, split_layers, write_kv_cache
from toprovar_compile.passes.write_kv_cache import CacheSite, SkipReason

B, H, N, P, D, CAPACITY = 2, 3, 5, 7, 8, 16
aten = torch.ops.aten
# Without the concatenation the attention reads the same values in another layout of memory.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

Trace = Callable[..., GraphModule]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X = _normal(B, H, N, D)
K_OLD, V_OLD = _normal(B, H, P, D), _normal(B, H, P, D) * 2


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return fae(q, k, v, bias, 0.5, True)[0]


def _later(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat((k, x * 2), 2), torch.cat((v, x * 3), 2)
    return x + _attend(x, k, v), k, v


def _first(x: Tensor) -> tuple[Tensor, ...]:
    k, v = x * 2, x * 3
    return x + _attend(x, k, v), k, v


def _count(gm: GraphModule, target: Any) -> int:
    return sum(n.target is target for n in gm.graph.nodes)


def _buffers(fill: float = torch.nan) -> tuple[Tensor, Tensor]:
    """As (B, H, capacity, D); the graph takes their memory, which is token by token."""
    k, v = (torch.full((CAPACITY, B, H, D), fill).permute(1, 2, 0, 3) for _ in range(2))
    return k, v


def _memory(*buffers: Tensor) -> list[Tensor]:
    return [buffer.permute(2, 0, 1, 3) for buffer in buffers]


def test_later_scales(trace: Trace) -> None:
    gm = trace(_later, (X, K_OLD, V_OLD), (N, P))
    want, k_want, v_want = gm(X, K_OLD, V_OLD)
    done = write_kv_cache(gm)
    check_write_kv_cache(gm)
    assert done.sites == (CacheSite(prior=(1, 2), grown=(1, 2)),)
    assert (done.inputs, done.outputs, done.skipped) == ((0,), (0,), ())
    assert [_count(gm, t) for t in (fae, fae_cached, aten.cat.default)] == [0, 1, 0]
    assert [n.name for n in placeholders(gm)[1:]] == ["k_buffer_0", "v_buffer_0", "start_0"]
    k_buffer, v_buffer = _buffers()
    k_buffer[:, :, :P], v_buffer[:, :, :P] = K_OLD, V_OLD
    (got,) = gm(X, *_memory(k_buffer, v_buffer), P)
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert torch.equal(k_buffer[:, :, : P + N], k_want) and torch.equal(v_buffer[:, :, : P + N], v_want)
    assert k_buffer[:, :, P + N :].isnan().all()


def test_keys_kept_in_a_wider_dtype_than_attention_reads(trace: Trace) -> None:
    def layer(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k = torch.cat((k, x.float() * 2), 2)
        v = torch.cat((v, x * 3), 2)
        return x + _attend(x, k.bfloat16(), v), k, v

    gm = trace(layer, (X.bfloat16(), K_OLD, V_OLD.bfloat16()), (N, P))
    want, k_want, v_want = gm(X.bfloat16(), K_OLD, V_OLD.bfloat16())
    done = write_kv_cache(gm)
    check_write_kv_cache(gm)
    assert done.sites == (CacheSite(prior=(1, 2), grown=(1, 2)),)
    k_buffer, v_buffer = _buffers()[0], _buffers()[1].bfloat16()
    k_buffer[:, :, :P], v_buffer[:, :, :P] = K_OLD, V_OLD
    (got,) = gm(X.bfloat16(), *_memory(k_buffer, v_buffer), P)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert torch.equal(k_buffer[:, :, : P + N], k_want) and torch.equal(v_buffer[:, :, : P + N], v_want)


def test_first_scale(trace: Trace) -> None:
    gm = trace(_first, (X,), (N,))
    want, k_want, v_want = gm(X)
    done = write_kv_cache(gm)
    check_write_kv_cache(gm)
    assert done.sites == (CacheSite(prior=None, grown=(1, 2)),)
    assert [_count(gm, t) for t in (fae, fae_cached)] == [0, 1]
    k_buffer, v_buffer = _buffers()
    (got,) = gm(X, *_memory(k_buffer, v_buffer), 0)
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert torch.equal(k_buffer[:, :, :N], k_want) and torch.equal(v_buffer[:, :, :N], v_want)


def test_second_run_finds_nothing(trace: Trace) -> None:
    gm = trace(_later, (X, K_OLD, V_OLD), (N, P))
    write_kv_cache(gm)
    before = str(gm.graph)
    done = write_kv_cache(gm)
    assert (done.sites, done.skipped) == ((), ())
    assert str(gm.graph) == before


def test_the_length_of_the_cache_becomes_the_start(trace: Trace) -> None:
    def layer(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, k_new, v_new = _later(x, k, v)
        return out * k.shape[2] + v.shape[2], k_new, v_new

    gm = trace(layer, (X, K_OLD, V_OLD), (N, P))
    want = gm(X, K_OLD, V_OLD)[0]
    assert len(write_kv_cache(gm).sites) == 1
    k_buffer, v_buffer = _buffers()
    k_buffer[:, :, :P], v_buffer[:, :, :P] = K_OLD, V_OLD
    torch.testing.assert_close(gm(X, *_memory(k_buffer, v_buffer), P)[0], want, **TOLERANCE)


def test_text_beside_the_cache(trace: Trace) -> None:
    text = _normal(B, H, 4, D)

    def layer(x: Tensor, k: Tensor, v: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        out, k_new, v_new = _later(x, k, v)
        return out + _attend(out, text, text), k_new, v_new

    gm = trace(layer, (X, K_OLD, V_OLD, text), (N, P))
    done = write_kv_cache(gm)
    check_write_kv_cache(gm)
    assert done.inputs == (0, 3) and done.skipped == (SkipReason.NOT_RETURNED,)
    assert [_count(gm, t) for t in (fae, fae_cached)] == [1, 1]


def _not_returned(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (_later(x, k, v)[0],)


def _grown_read_elsewhere(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, k, v = _later(x, k, v)
    return out + k.mean(2, keepdim=True), k, v


def _old_read_elsewhere(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, k_new, v_new = _later(x, k, v)
    return out + k.mean(2, keepdim=True), k_new, v_new


def _old_returned(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (*_later(x, k, v), k)


def _values_not_cached(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat((k, x), 2), torch.cat((x, v), 2)
    return _attend(x, k, v), k, v


def _text_joins(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat((k, x[:, :, :2]), 2), torch.cat((v, x[:, :, :2]), 2)
    return _attend(x, k, v), k, v


def _first_of_text(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = k * 2, v * 2
    return _attend(x, k, v), k, v


def _biased(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat((k, x), 2), torch.cat((v, x), 2)
    return _attend(x, k, v, x.new_zeros(1)), k, v


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (_not_returned, SkipReason.NOT_RETURNED),
        (_grown_read_elsewhere, SkipReason.OTHER_READER),
        (_old_read_elsewhere, SkipReason.OTHER_READER),
        (_old_returned, SkipReason.OTHER_READER),
        (_values_not_cached, SkipReason.OTHER_READER),
        (_text_joins, SkipReason.OTHER_TOKENS),
        (_first_of_text, SkipReason.OTHER_TOKENS),
        (_biased, SkipReason.BIAS),
    ],
)
def test_skipped(trace: Trace, layer: Callable[..., Any], reason: SkipReason) -> None:
    gm = trace(layer, (X, K_OLD, V_OLD), (N, P))
    want = gm(X, K_OLD, V_OLD)
    done = write_kv_cache(gm)
    assert (done.sites, done.skipped) == ((), (reason,))
    assert _count(gm, fae_cached) == 0
    for got, value in zip(gm(X, K_OLD, V_OLD), want, strict=True):
        assert torch.equal(got, value)


def test_checker_raises_on_a_grown_cache_that_is_left(trace: Trace) -> None:
    gm = trace(_later, (X, K_OLD, V_OLD), (N, P))
    node = next(n for n in gm.graph.nodes if n.target is fae)
    with pytest.raises(PassInvariantError, match=f"{node.name} reads a grown cache that is returned"):
        check_write_kv_cache(gm)


def test_layers_of_a_var(steps: list[GraphModule]) -> None:
    for step, cats in zip(steps, (0, 2, 2), strict=True):
        split = split_layers(step)
        for layer in split.layers:
            gm = layer.piece.graph
            before = _count(gm, aten.cat.default)
            done = write_kv_cache(gm)
            check_write_kv_cache(gm)
            assert len(done.sites) == 1 and done.skipped == ()
            assert [_count(gm, t) for t in (fae, fae_cached, aten.cat.default)] == [0, 1, 0]
            assert before == cats
            assert [n.name for n in placeholders(gm)[-3:]] == ["k_buffer_0", "v_buffer_0", "start_0"]
