"""Layers that treat tokens alike are proven, and pruning them is right; layers that do not are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from toprovar_compile.kernels import fae
from toprovar_compile.passes import TokenProof, prove_token_axis, prune_tokens, split_layers, write_kv_cache

B, N, C, H, D, TEXT = 3, 10, 16, 2, 8, 5
# Reductions and products run over the same values in another order of memory.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

Trace = Callable[..., GraphModule]
Layer = Callable[..., Any]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X = _normal(B, N, C)
W, W_WIDE, GAIN, BIAS = _normal(C, C), _normal(3 * C, C), _normal(C), _normal(C)
COND, MODULATION = _normal(B, 1, C), _normal(B, 1, 6, C)
POSITIONS, SHARED_POSITIONS = _normal(B, N, C), _normal(1, N, C)
ROPE, SHARED_ROPE = _normal(B, N, D), _normal(1, N, D)
TEXT_K, TEXT_V = _normal(B, H, TEXT, D), _normal(B, H, TEXT, D)


def _heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], C)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    a, b = _heads(x).chunk(2, -1)
    return _flat(torch.cat((-b, a), -1) * rope.unsqueeze(1))


def _block(x: Tensor, modulation: Tensor, w: Tensor, w_wide: Tensor) -> Tensor:
    gain, scale, shift, *_ = modulation.unbind(2)
    h = F.layer_norm(x, (C,)) * (scale + 1) + shift
    q, k, v = F.linear(h, w_wide).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + F.linear(_flat(fae(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, None, 1.0, True)[0]), w) * gain
    return x + F.gelu(F.linear(x, w), approximate="tanh")


def _grouped_linear(x: Tensor, w: Tensor) -> Tensor:
    parts = x.view(*x.shape[:2], H, D).permute(2, 0, 1, 3).reshape(H, -1, D)
    return (parts @ w.view(H, C, D)[:, :D]).view(H, *x.shape[:2], D).permute(1, 2, 0, 3).reshape(x.shape)


PROVEN: dict[str, tuple[Layer, tuple[Tensor, ...]]] = {
    "identity": (lambda x: x, ()),
    "layer norm": (lambda x, g, b: F.layer_norm(x, (C,), g, b), (GAIN, BIAS)),
    "rms norm": (lambda x, g: F.rms_norm(x, (C,), g), (GAIN,)),
    "l2 norm of channels": (lambda x: F.normalize(x, dim=-1), ()),
    "handwritten norm": (lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-6).rsqrt(), ()),
    "variance and mean": (lambda x: x * torch.var_mean(x, -1, keepdim=True)[0], ()),
    "greatest channel": (lambda x: x - x.amax(2, keepdim=True) + x.amin(dim=-1).unsqueeze(-1), ()),
    "linear": (lambda x, w, b: F.linear(x, w, b), (W, BIAS)),
    "mlp": (lambda x, w: F.linear(F.gelu(F.linear(x, w), approximate="tanh"), w), (W,)),
    "flattened tokens": (lambda x, w: (x.view(-1, C) @ w).view(x.shape), (W,)),
    "residual inside addmm": (lambda x, w: torch.addmm(x.view(-1, C), x.view(-1, C), w).view(x.shape), (W,)),
    "weights on the left": (lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2), (W,)),
    "linear for each head": (_grouped_linear, (W,)),
    "split into heads and back": (lambda x: _flat(_heads(x) * 2), ()),
    "softmax over channels": (lambda x: x.softmax(-1) + x.log_softmax(2), ()),
    "halves of the channels": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), ()),
    "unequal parts of the channels": (lambda x: torch.cat(x.split((4, 12), 2), 2), ()),
    "every second channel": (lambda x: torch.stack((x[:, :, 1::2], x[..., ::2]), -1).flatten(2), ()),
    "one channel": (lambda x: x * x[..., 3:4] + x.select(2, 0).unsqueeze(-1), ()),
    "flip of channels": (lambda x: x + x.flip(-1), ()),
    "unbind over channels": (lambda x: torch.stack(x.view(*x.shape[:2], 4, 4).unbind(2), 3).flatten(2), ()),
    "casts": (lambda x: x.bfloat16().float().contiguous(), ()),
    "masks by channel": (lambda x, g: x.masked_fill(g > 0, 0.0) + torch.where(x > 0, x, g).clamp(-1, 1), (GAIN,)),
    "dropout in eval mode": (lambda x: F.dropout(x, 0.5, training=False) * 0.5, ()),
    "constants": (lambda x: x * torch.tensor([1.0, 2.0] * D), ()),
    "table by channel": (lambda x: x + torch.arange(C), ()),
    "condition": (lambda x, c: x * (c + 1) + c, (COND,)),
    "condition spread over tokens": (lambda x, c: torch.cat((x, c.expand(-1, x.shape[1], -1)), -1)[..., 4:20], (COND,)),
    "modulation": (lambda x, m: x * m.unbind(2)[0] + m[:, :, 5], (MODULATION,)),
    "zeros for all tokens": (lambda x: x + torch.zeros(x.shape[1], C), ()),
    "positions": (lambda x, p: x + p, (POSITIONS,)),
    "positions that samples share": (lambda x, p: x + p * 2, (SHARED_POSITIONS,)),
    "shared positions spread": (lambda x, p: x + p.expand(x.shape[0], -1, -1).reshape(x.shape), (SHARED_POSITIONS,)),
    "rope": (_rotate, (ROPE,)),
    "rope that samples share": (_rotate, (SHARED_ROPE,)),
    "text": (lambda x, k, v: _flat(fae(_heads(x), k, v, None, 0.5, True)[0]), (TEXT_K, TEXT_V)),
    "masked text": (lambda x, k, m: _flat(fae(_heads(x), k, k, m, 0.5, True)[0]), (TEXT_K, _normal(B, 1, 1, TEXT))),
    "entropy": (lambda x: x * fae(_heads(x), _heads(x), _heads(x), None, 0.5, True)[1].unsqueeze(-1), ()),
    "self-attention": (lambda x: _flat(fae(_heads(x), _heads(x) * 2, _heads(x), None, 0.5, True)[0]), ()),
    "a whole block": (_block, (MODULATION, W, W_WIDE)),
}  # fmt: skip

GRID = _normal(2, 5)
TWO_ROPES, ROPES_LIKE_SAMPLES = _normal(2, 1, N, C), _normal(B, 1, N, C)


def _conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x.transpose(1, 2).unsqueeze(-1), w.view(C, C, 1, 1)).squeeze(-1).transpose(1, 2)


def _misaligned_bias(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(x.transpose(0, 1).reshape(-1, C), x.view(-1, C), w).view(x.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return fae(q, k, v, bias, 0.5, True)[0]


def _heads_first(x: Tensor) -> Tensor:
    q = _heads(x).transpose(0, 1)
    return _flat(_attend(q, q, q).transpose(0, 1))


def _halves_of_the_batch(x: Tensor) -> Tensor:
    return torch.cat((x[1:], x[:1]), 0)


NUMBER, POSITION = "computes with the number of tokens", "makes values by token position"
REDUCES, ALONG, SPLITS = "reduces over the tokens", "works along the tokens", "which splits the tokens"
ALONG_SAMPLES = "works along the samples"

# name: (layer, inputs, the operator named, what is said about it)
REFUSED: dict[str, tuple[Layer, tuple[Tensor, ...], str, str]] = {
    "mean": (lambda x: x - x.mean(1, keepdim=True), (), "aten.mean.dim", REDUCES),
    "sum": (lambda x: x + x.sum(1, keepdim=True), (), "aten.sum.dim_IntList", REDUCES),
    "sum of all": (lambda x: x + x.sum(), (), "aten.sum.default", "no rule"),
    "variance": (lambda x: x / x.var(1, keepdim=True), (), "aten.var.correction", REDUCES),
    "norm of all": (lambda x: x / torch.linalg.vector_norm(x), (), "aten.linalg_vector_norm", "all dimensions"),
    "greatest": (lambda x: x / x.amax((1, 2), keepdim=True), (), "aten.amax", REDUCES),
    "softmax": (lambda x: x.softmax(1), (), "aten._softmax", ALONG),
    "norm over tokens": (lambda x: F.layer_norm(x.mT, x.mT.shape[2:]).mT, (), "layer_norm", "normalises over"),
    "cumsum": (lambda x: x.cumsum(1), (), "aten.cumsum", "no rule"),
    "sort": (lambda x: x.sort(1).values, (), "aten.sort", "no rule"),
    "flip": (lambda x: x.flip(1), (), "aten.flip", "works along the tokens"),
    "roll": (lambda x: x.roll(1, 1), (), "aten.roll", "no rule"),
    "convolution": (_conv, (W,), "aten.convolution", "no rule"),
    "batch norm": (lambda x, g: F.batch_norm(x.mT, g, g.abs()).mT, (GAIN,), "batch_norm", "no rule"),
    "index_select": (lambda x, i: x.index_select(1, i), (torch.arange(N).flip(0),), "arg1_1", "shape"),
    "random numbers": (lambda x: x + torch.rand_like(x), (), "aten.rand", "no rule"),
    "one token": (lambda x: x + x[:, :1], (), "aten.slice", ALONG),
    "the last token": (lambda x: x + x.select(1, -1).unsqueeze(1), (), "aten.select", ALONG),
    "joined and cut": (lambda x: torch.cat((x, x), 1)[:, : x.shape[1]], (), "aten.cat", "joins along the tokens"),
    "tokens times tokens": (lambda x: (x @ x.mT) @ x, (), "aten.bmm", "multiplies tokens with tokens"),
    "sum by matmul": (lambda x: x * (x.mT @ x).mean(-1).unsqueeze(1), (), "aten.bmm", "sums over the tokens"),
    "heads joined wrongly": (lambda x: _heads(x).reshape(x.shape), (), "view", SPLITS),
    "channels before tokens": (lambda x: x.reshape(-1, C, x.shape[1]).mT, (), "view", SPLITS),
    "pairs of tokens": (lambda x: x.view(x.shape[0], -1, 2, C).sum(2).repeat(1, 2, 1), (), "view", SPLITS),
    "permuted mix": (lambda x: x + x.transpose(0, 1).reshape(x.shape), (), "view", "splits the"),
    "rows of addmm": (_misaligned_bias, (W,), "aten.addmm", "carry tokens in different dimensions"),
    "tokens against channels": (lambda x, p: (x.unsqueeze(2) + p.unsqueeze(1)).sum(2), (POSITIONS,), "", "different"),
    "positions made inside": (lambda x: x + torch.arange(x.shape[1]).view(1, -1, 1), (), "aten.arange", POSITION),
    "positions cut inside": (lambda x, p: x + p[: x.shape[1]], (_normal(32, C),), "aten.slice", POSITION),
    "number of tokens": (lambda x: x * x.shape[1], (), "aten.mul", NUMBER),
    "divided by it": (lambda x: x / x.shape[1], (), "aten.div", NUMBER),
    "its root": (lambda x: x * x.shape[1] ** -0.5, (), "", NUMBER),
    "a table from it": (lambda x: x + torch.linspace(0, x.shape[1], C), (), "aten.linspace", NUMBER),
    "a constant from it": (lambda x: x * torch.full((C,), x.shape[1]), (), "aten.full", NUMBER),
    "a factor of it": (lambda x: torch.add(x, x, alpha=x.shape[1]), (), "aten.add", NUMBER),
    "channel by number": (lambda x: x + x.select(2, x.shape[1]).unsqueeze(2), (), "aten.select", NUMBER),
    "channels up to it": (lambda x: x + x[..., : x.shape[1]].mean(2, True), (), "aten.slice", NUMBER),
    "counted by expanding": (
        lambda x: x.unsqueeze(3).expand(-1, -1, -1, x.shape[1]).sum(3), (), "aten.expand", "more than one dimension",
    ),
    "token axis dropped": (lambda x: x.squeeze(1) * 2, (), "aten.squeeze", "drops the dimension of the tokens"),
    "mask over tokens": (
        lambda x, m: _flat(_attend(_heads(x), _heads(x), _heads(x), m)), (_normal(B, 1, 1, N),), "fae", "its bias",
    ),
    "bias over heads": (
        lambda x, m: _flat(_attend(_heads(x), _heads(x), _heads(x), m)), (_normal(1, H, 1, 1),), "fae", "its bias",
    ),
    "tokens as heads": (
        lambda x: _attend(*(x.view(x.shape[0], -1, H, D),) * 3).reshape(x.shape), (), "fae", "queries are not tokens",
    ),
    "text asks tokens": (
        lambda x, t: x + _attend(t, _heads(x), _heads(x)).mean((1, 2)).repeat(1, H).unsqueeze(1),
        (TEXT_K,), "fae", "queries are not tokens",
    ),
    "tokens as keys of text values": (
        lambda x, t: _flat(_attend(_heads(x), _heads(x), t.expand(-1, -1, x.shape[1], -1))),
        (_normal(B, H, 1, D),), "fae", "keys and values are not tokens of the layer",
    ),
    "text of as many tokens": (
        lambda x, k: _flat(_attend(_heads(x), k, k)), (_normal(B, H, N, D),), "fae", "are not tokens of the layer",
    ),
    "mean of the batch": (lambda x: x - x.mean(0, keepdim=True), (), "aten.mean.dim", "reduces over the samples"),
    "another sample": (_halves_of_the_batch, (), "aten.slice", ALONG_SAMPLES),
    "samples joined": (lambda x: torch.cat((x, x), 0).view(2, *x.shape)[0], (), "aten.cat", "joins along the samples"),
    "batch as head": (_heads_first, (), "fae", "queries are not tokens"),
    "two ropes in dimension 0": (lambda x, r: x * r[0] + r[1], (TWO_ROPES,), "arg1_1", "gathered for each sample"),
    "ropes like samples": (lambda x, r: x * r[0] + r[1], (ROPES_LIKE_SAMPLES,), "aten.select", ALONG_SAMPLES),
    "shared positions by head": (lambda x, p: x * p.view(-1, C), (SHARED_POSITIONS,), "view", "all samples share"),
    "shared positions as batch": (
        lambda x, p: _flat(_heads(x) * p.squeeze(0)), (SHARED_ROPE,), "aten.squeeze", "drops the dimension",
    ),
    "positions without batch": (lambda x, p: x + p, (_normal(N, C),), "arg1_1", "gathered for each sample"),
    "tokens in two dimensions": (lambda x, p: x + p.mean(2, True), (_normal(B, N, N),), "arg1_1", "only one dimension"),
    "output elsewhere": (lambda x: x.view(-1, C), (), "view", "output has its tokens elsewhere"),
}  # fmt: skip


def _gather(value: Tensor, axis: int, idx: Tensor) -> Tensor:
    """value[b] at the tokens idx[b], for each sample."""
    value = value.expand(idx.shape[0], *value.shape[1:])
    return torch.stack([v.index_select(axis - 1, i) for v, i in zip(value, idx, strict=True)])


def _some_tokens(keep: int) -> Tensor:
    generator = torch.Generator().manual_seed(keep)
    return torch.stack([torch.randperm(N, generator=generator)[:keep].sort().values for _ in range(B)])


def _check_pruned(gm: GraphModule, proof: TokenProof, layer: Layer, inputs: tuple[Tensor, ...]) -> None:
    for keep in (1, 4):
        idx = _some_tokens(keep)
        given = [v if axis is None else _gather(v, axis, idx) for v, axis in zip((X, *inputs), proof.axes, strict=True)]
        rows = idx.unsqueeze(-1).expand(-1, -1, C)
        want = X.scatter(1, rows, layer(*given))
        torch.testing.assert_close(prune_tokens(gm, proof, cached=False)(X, idx, *inputs)[0], want, **TOLERANCE)


@pytest.mark.parametrize("open_batch", [False, True])
@pytest.mark.parametrize("name", PROVEN)
def test_proven(trace: Trace, name: str, open_batch: bool) -> None:
    layer, inputs = PROVEN[name]
    gm = trace(layer, (X, *inputs), (N, B) if open_batch else (N,))
    before = str(gm.graph)
    proof = prove_token_axis(gm)
    assert proof.holds, proof.reason
    assert str(gm.graph) == before
    assert len(proof.axes) == 1 + len(inputs) and proof.axes[0] == 1
    _check_pruned(gm, proof, layer, inputs)
    if "fae" not in str(gm.graph) or "text" in name:
        for keep in (1, 4):
            idx = _some_tokens(keep)
            pruned = prune_tokens(gm, proof, cached=False)(X, idx, *inputs)[0]
            torch.testing.assert_close(_gather(pruned, 1, idx), _gather(gm(X, *inputs)[0], 1, idx), **TOLERANCE)


@pytest.mark.parametrize("open_batch", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(trace: Trace, name: str, open_batch: bool) -> None:
    layer, inputs, operator, reason = REFUSED[name]
    if open_batch and inputs and inputs[0] is ROPES_LIKE_SAMPLES:
        reason = operator = ""  # its two ropes tell that dimension 0 is not the batch
    proof = prove_token_axis(trace(layer, (X, *inputs), (N, B) if open_batch else (N,)))
    assert not proof.holds and proof.axes == ()
    assert operator in proof.reason and reason in proof.reason, proof.reason


@pytest.mark.parametrize("name", ["condition", "rope that samples share", "text", "a whole block"])
def test_one_sample(trace: Trace, name: str) -> None:
    layer, inputs = PROVEN[name]
    one = [v[:1] if v.shape[0] == B else v for v in (X, *inputs)]
    gm = trace(layer, one, (N,))
    proof = prove_token_axis(gm)
    assert proof.holds, proof.reason
    idx = _some_tokens(4)[:1]
    given = [v if axis is None else _gather(v, axis, idx) for v, axis in zip(one, proof.axes, strict=True)]
    got = prune_tokens(gm, proof, cached=False)(one[0], idx, *one[1:])[0]
    torch.testing.assert_close(_gather(got, 1, idx), layer(*given), **TOLERANCE)


def test_mixing_one_sample_with_itself_is_harmless(trace: Trace) -> None:
    gm = trace(lambda x: x - x.mean(0, keepdim=True) / 2, (X[:1],), (N,))
    assert prove_token_axis(gm).holds


def test_tokens_on_a_grid_of_open_sides(trace: Trace) -> None:
    def layer(x: Tensor, grid: Tensor) -> Tensor:
        return x.view(x.shape[0], *grid.shape, C).mean(2).repeat_interleave(grid.shape[1], 1)

    proof = prove_token_axis(trace(layer, (X, GRID), (N, *GRID.shape)))
    assert not proof.holds


def test_a_constant_number_of_tokens(trace: Trace) -> None:
    proof = prove_token_axis(trace(lambda x: x * 2, (X,), ()))
    assert not proof.holds and "not an open number of tokens" in proof.reason


def test_reason_names_the_users_line(steps: list[GraphModule]) -> None:
    layer = split_layers(steps[2]).layers[0].piece.graph
    node = next(n for n in layer.graph.nodes if n.target is torch.ops.aten.native_layer_norm.default)
    node.target = torch.ops.aten.native_group_norm.default
    reason = prove_token_axis(layer).reason
    assert node.name in reason and "aten.native_group_norm" in reason and "File" in reason


def test_layers_of_a_var(steps: list[GraphModule]) -> None:
    proofs = []
    for step in steps:
        for layer in split_layers(step).layers:
            write_kv_cache(layer.piece.graph)
            proofs.append(prove_token_axis(layer.piece.graph))
    assert [p.holds for p in proofs] == [False, False, True, True, True, True]
    assert "not an open number of tokens" in proofs[0].reason
    for proof in proofs[2:]:
        assert proof.axes[0] == 1 and set(proof.axes[1:]) == {None}
