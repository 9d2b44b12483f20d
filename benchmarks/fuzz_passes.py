"""Random layers against the token proof: a layer is pruned rightly or refused by name, never pruned wrongly.

A layer is a random list of moves on a stream (B, n, C): norms, attentions, positions, modulations, MLPs; traps, which
mix tokens or samples; and scrambles, random chains of permutations, reshapes, reductions, sorts and products. Each is
traced with an open number of tokens and handed to `prove_token_axis`. If the proof holds, the pruned layer is compared
with two references in plain PyTorch, for sets of tokens that differ between the samples:

- gather, run the layer on the K tokens alone, scatter (identity and cached restoring);
- run it on all N tokens with attention masked to the kept ones: what one token becomes must not depend on the others
  but through attention.

    python benchmarks/fuzz_passes.py --graphs 10000 --minutes 60 --out fuzz.json

goes on where an earlier call with the same --out stopped. A seed is one layer; `--seed 17` shows what it does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from toprovar_compile.files import write_json
from toprovar_compile.kernels import fae
from toprovar_compile.passes import TokenProof, copy_graph, prove_token_axis, prune_tokens

# Heads and samples are of one number, so that taking one for the other has a shape that fits.
B, N, H, D, TEXT = 3, 10, 3, 4, 5
C = H * D
WIDE = 2 * C
# Sums over the same values in another order; a wrong value is off by its own size.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}

Choose = Callable[[Sequence[Any]], Any]
"""Picks one of several: `random.Random(seed).choice`, or a draw of hypothesis."""


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 7 * len(shape)))


INPUTS: Mapping[str, Tensor] = {
    "w": _normal(C, C) / 3,
    "w_qkv": _normal(3 * C, C) / 3,
    "w_up": _normal(WIDE, C) / 3,
    "w_gate": _normal(WIDE, C).flip(0) / 3,
    "w_down": _normal(C, WIDE) / 4,
    "gain": _normal(C),
    "bias": _normal(C).flip(0),
    "head_scale": _normal(1, H, 1, 1),
    "condition": _normal(B, 1, C),
    "modulation": _normal(B, 1, 6, C),
    "positions": _normal(B, N, C),
    "shared_positions": _normal(1, N, C),
    "rope": _normal(B, N, D),
    "shared_rope": _normal(1, N, D),
    "text_k": _normal(B, H, TEXT, D),
    "text_v": _normal(B, H, TEXT, D).flip(2),
    "text_mask": _normal(B, 1, 1, TEXT),
    "token_mask": _normal(B, 1, 1, N),
    "order": torch.randperm(N, generator=torch.Generator().manual_seed(1)),
    "kernel": _normal(C, C, 3) / 5,
    "depthwise": _normal(C, 1, 3),
}
STREAM = _normal(B, N, C)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The definition of `fae`: (out, entropy)."""
    scores = q @ k.mT * scale
    p = (scores if bias is None else scores + bias).softmax(-1)
    return p @ v, torch.special.entr(p).sum(-1).mean(1)


@dataclass
class Given:
    """The inputs of a layer by name, and attention. `kept` (B, N), if given, are the only tokens that are attended."""

    inputs: Mapping[str, Tensor]
    fused: bool = False
    kept: Tensor | None = None
    used: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Tensor:
        if name not in self.used:
            self.used.append(name)
        return self.inputs[name]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float = 0.5, *, own: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(out, entropy); `own`: keys are the tokens of the layer."""
        if self.fused:
            out, entropy = fae(q, k, v, bias, scale, True)
            return out, entropy
        if own and self.kept is not None:
            absent = torch.zeros(self.kept.shape).masked_fill_(~self.kept, -torch.inf)[:, None, None]
            bias = absent if bias is None else bias + absent
        return _plain_attention(q, k, v, bias, scale)


def _heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], C)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1) * rope.unsqueeze(1) + x


# moves that treat tokens alike


def _norm(g: Given, x: Tensor, kind: str) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, (C,), g.gain, g.bias)
    if kind == "layer, bare":
        return F.layer_norm(x, (C,))
    if kind == "rms":
        return F.rms_norm(x, (C,), g.gain)
    if kind == "l2":
        return F.normalize(x, dim=-1)
    if kind == "by hand":
        return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-6).rsqrt()
    return x * (x.pow(2).mean(2, True) + 1e-6).rsqrt() * g.gain


def _mlp(g: Given, x: Tensor, kind: str) -> Tensor:
    up = F.linear(x, g.w_up)
    if kind == "gelu":
        return x + F.linear(F.gelu(up, approximate="tanh"), g.w_down)
    if kind == "swiglu":
        return x + F.linear(F.silu(up) * F.linear(x, g.w_gate), g.w_down)
    if kind == "relu squared":
        return x + F.linear(up.relu().square(), g.w_down)
    return x + torch.addmm(g.bias, F.mish(up).view(-1, WIDE), g.w_down.t()).view(x.shape)


def _self_attention(g: Given, x: Tensor, rope: str, normed: bool, joined: bool) -> Tensor:
    if joined:
        q, k, v = F.linear(x, g.w_qkv).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = _heads(F.linear(x, g.w)), _heads(x * g.gain), _heads(x)
    if normed:
        q, k = F.normalize(q, dim=-1) * g.head_scale.clamp_max(1.0).exp(), F.normalize(k, dim=-1)
    if rope:
        table = g.rope if rope == "rope" else g.shared_rope
        q, k = _rotate(q, table), _rotate(k, table)
    return x + _flat(g.attend(q, k, v)[0])


def _cross_attention(g: Given, x: Tensor, masked: bool) -> Tensor:
    return x + _flat(g.attend(_heads(x), g.text_k, g.text_v, g.text_mask if masked else None, own=False)[0])


def _modulate(g: Given, x: Tensor, kind: str) -> Tensor:
    if kind == "condition":
        return x * (g.condition + 1) + g.condition
    if kind == "six":
        gain, scale, shift, *_ = g.modulation.unbind(2)
        return x + gain * (x * (scale + 1) + shift)
    return torch.cat((x, g.condition.expand(-1, x.shape[1], -1)), -1)[..., D : D + C]


def _positions(g: Given, x: Tensor, kind: str) -> Tensor:
    if kind == "own":
        return x + g.positions
    if kind == "shared":
        return x + g.shared_positions * 2
    return x + g.shared_positions.expand(x.shape[0], -1, -1).reshape(-1, C).view(x.shape)


def _channels(g: Given, x: Tensor, kind: str) -> Tensor:
    if kind == "flip":
        return x + x.flip(-1)
    if kind == "softmax":
        return x + x.softmax(-1)
    if kind == "halves":
        return torch.cat(x.chunk(2, -1)[::-1], -1)
    if kind == "interleave":
        return torch.stack((x[:, :, 1::2], x[..., ::2]), -1).flatten(2)
    if kind == "grouped":
        parts = x.view(*x.shape[:2], H, D).permute(2, 0, 1, 3).reshape(H, -1, D)
        return (parts @ g.w.view(H, C, D)[:, :D]).view(H, *x.shape[:2], D).permute(1, 2, 0, 3).reshape(x.shape)
    return torch.where(g.gain > 0, x, x.clamp(-1, 1)) * x[..., 3:4]


def _entropy(g: Given, x: Tensor, kind: str) -> Tensor:
    entropy = g.attend(_heads(x), _heads(x), _heads(x), None, 0.3)[1].unsqueeze(-1)
    return x * entropy if kind == "scales" else x + entropy.sigmoid()


# traps


def _shift(x: Tensor) -> Tensor:
    return torch.cat((x[:, 1:], x[:, :1]), 1)


def _causal(g: Given, x: Tensor) -> Tensor:
    n = x.shape[1]
    mask = torch.full((n, n), -torch.inf).triu(1)
    return x + _flat(g.attend(_heads(x), _heads(x), _heads(x), mask)[0])


def _own_attention(g: Given, x: Tensor) -> Tensor:
    return x + (x @ x.mT * 0.1).softmax(-1) @ x


def _pooled_keys(g: Given, x: Tensor) -> Tensor:
    keys = _heads(x.unflatten(1, (-1, 2)).mean(2))
    return x + _flat(g.attend(_heads(x), keys, keys, own=False)[0])


def _scattered(g: Given, x: Tensor, add: bool) -> Tensor:
    to = g.order.view(1, -1, 1).expand_as(x)
    return x + (torch.zeros_like(x).scatter_add(1, to, x) if add else torch.zeros_like(x).scatter(1, to, x))


def _batch_heads(g: Given, x: Tensor) -> Tensor:
    q = _heads(x).transpose(0, 1)
    return x + _flat(g.attend(q, q, q)[0].transpose(0, 1))


def _grid(x: Tensor) -> Tensor:
    return x.mT.unflatten(2, (2, -1))


TRAPS: Mapping[str, tuple[Callable[[Given, Tensor], Tensor], tuple[str, ...]]] = {
    "token mean": (lambda g, x: x - x.mean(1, keepdim=True), ("mean",)),
    "token mean of the square": (lambda g, x: x / (x.square().mean((1, 2), keepdim=True) + 1), ("mean",)),
    "token maximum": (lambda g, x: x - x.amax(1, keepdim=True), ("amax",)),
    "token sum spread": (lambda g, x: x + x.sum(1).unsqueeze(1).expand_as(x), ("sum",)),
    "token variance": (lambda g, x: x / (x.var(1, keepdim=True) + 1), ("var",)),
    "token median": (lambda g, x: x - x.median(1, keepdim=True).values, ("median",)),
    "token softmax": (lambda g, x: x + x.softmax(1), ("softmax",)),
    "logsumexp": (lambda g, x: x - x.logsumexp(1, keepdim=True), ("amax", "logsumexp")),
    "cumulative sum": (lambda g, x: x + x.cumsum(1), ("cumsum",)),
    "cumulative maximum": (lambda g, x: x + x.cummax(1).values, ("cummax",)),
    "cumulative product": (lambda g, x: x + x.sigmoid().cumprod(1), ("cumprod",)),
    "sort": (lambda g, x: x + x.sort(1).values, ("sort",)),
    "ranks": (lambda g, x: x + x.argsort(1), ("sort",)),
    "best tokens": (lambda g, x: x + x.topk(3, 1).values.sum(1, keepdim=True), ("topk",)),
    "flip": (lambda g, x: x + x.flip(1), ("flip",)),
    "roll": (lambda g, x: x + x.roll(1, 1), ("roll",)),
    "roll of the batch": (lambda g, x: x + x.roll(1, 0), ("roll",)),
    "token shift": (lambda g, x: x + _shift(x), ("slice",)),
    "differences": (lambda g, x: x + F.pad(x.diff(dim=1), (0, 0, 1, 0)), ("slice",)),
    "first token": (lambda g, x: x + x[:, :1], ("slice",)),
    "last token": (lambda g, x: x + x[:, -1].unsqueeze(1), ("select",)),
    "gather by order": (lambda g, x: x + x.index_select(1, g.order), ("order", "index_select")),
    "indexed": (lambda g, x: x + x[:, g.order], ("order", "index")),
    "scatter": (lambda g, x: _scattered(g, x, False), ("order", "scatter", "full", "view")),
    "scatter and add": (lambda g, x: _scattered(g, x, True), ("order", "scatter", "full", "view")),
    "convolution": (lambda g, x: x + F.conv1d(x.mT, g.kernel, padding=1).mT, ("convolution",)),
    "depthwise convolution": (
        lambda g, x: x + F.conv1d(x.mT, g.depthwise, padding=1, groups=C).mT, ("convolution",),
    ),
    "convolution of a grid": (
        lambda g, x: x + F.conv2d(_grid(x), g.depthwise[..., None], padding=(1, 0), groups=C).flatten(2).mT, ("view",),
    ),
    "pooling": (lambda g, x: x + F.avg_pool1d(x.mT, 3, 1, 1).mT, ("avg_pool", "unsqueeze")),
    "resized": (
        lambda g, x: x + F.interpolate(F.avg_pool1d(x.mT, 2), scale_factor=2.0).mT,
        ("avg_pool", "arange", "upsample", "unsqueeze"),
    ),
    "batch norm": (lambda g, x: F.batch_norm(x.mT, None, None, training=True).mT, ("batch_norm",)),
    "group norm": (lambda g, x: F.group_norm(x.mT, 2).mT, ("group_norm", "view")),
    "norm over tokens": (lambda g, x: F.layer_norm(x.mT, x.mT.shape[2:]).mT, ("layer_norm",)),
    "hand-made attention": (_own_attention, ("bmm",)),
    "covariance": (lambda g, x: x @ (x.mT @ x * 0.05), ("bmm",)),
    "einsum over tokens": (lambda g, x: x + torch.einsum("bnc,bmc->bnm", x, x).sum(2, keepdim=True) * 0.1, ("bmm",)),
    "spectrum": (lambda g, x: x + torch.fft.rfft(x, dim=1).abs().mean(1, keepdim=True), ("fft",)),
    "pooled keys": (_pooled_keys, ("view",)),
    "causal mask": (_causal, ("full", "arange", "fae")),
    "mask over tokens": (
        lambda g, x: x + _flat(g.attend(_heads(x), _heads(x), _heads(x), g.token_mask)[0]), ("fae",),
    ),
    "samples as heads": (_batch_heads, ("fae",)),
    "mean of the batch": (lambda g, x: x - x.mean(0, keepdim=True), ("mean",)),
    "another sample": (lambda g, x: x + torch.cat((x[1:], x[:1]), 0), ("slice",)),
    "heads joined wrongly": (lambda g, x: x + _heads(x).reshape(x.shape), ("view",)),
    "channels first": (lambda g, x: x + x.mT.reshape(x.shape), ("view",)),
    "token count": (lambda g, x: x * (x.shape[1] / 7), ("mul",)),
    "positions made inside": (lambda g, x: x + torch.arange(x.shape[1]).view(1, -1, 1), ("arange",)),
    "random numbers": (lambda g, x: x + torch.rand_like(x), ("rand",)),
    "dropout": (lambda g, x: F.dropout(x, 0.3, training=True), ("dropout", "rand", "bernoulli", "empty_like")),
    "sum of all": (lambda g, x: x + x.sum() * 0.1, ("sum",)),
    "two neighbours": (lambda g, x: x + x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2), ("view",)),
}  # fmt: skip


# scrambles: each dimension is known by its factors, "b", "n" and numbers, so that a chain fits any number of tokens

_Dims = list[tuple[str | int, ...]]
_SCRAMBLES = (
    "swap", "swap", "merge", "merge", "split", "split", "split wrongly", "softmax", "flip", "centre", "greatest",
    "cumsum", "sort", "roll", "first", "halves", "pointwise", "normalise", "weights", "square", "stack",
)  # fmt: skip


def _size(x: Tensor, factors: tuple[str | int, ...]) -> Any:
    size: Any = 1
    for f in factors:
        size = size * (x.shape[0] if f == "b" else x.shape[1] if f == "n" else f)
    return size


def _shape(x: Tensor, dims: _Dims) -> list[Any]:
    return [_size(x, factors) for factors in dims]


def _scramble(g: Given, x: Tensor, steps: tuple[tuple[str, int, int], ...], close: str) -> Tensor:
    """`close`: how the result becomes a stream again, by its factors ("rightly") or by a reshape that may mix."""
    v, dims = x, [("b",), ("n",), (H, D)]
    for kind, a, b in steps:
        v, dims = _scramble_once(g, x, v, dims, kind, a % len(dims), b)
    if close == "rightly":
        v = v.reshape(_shape(x, [(f,) for factors in dims for f in factors]))
        order = [f for factors in dims for f in factors]
        first = [order.index("b"), order.index("n")]
        v = v.permute(*first, *(i for i in range(len(order)) if i not in first))
    return x + v.reshape(x.shape)


def _scramble_once(g: Given, x: Tensor, v: Tensor, dims: _Dims, kind: str, d: int, b: int) -> tuple[Tensor, _Dims]:
    dims = list(dims)
    other = b % len(dims)
    static = all(f not in ("b", "n") for f in dims[d])
    if kind == "swap":
        dims[d], dims[other] = dims[other], dims[d]
        return v.transpose(d, other), dims
    if kind == "merge" and d + 1 < len(dims):
        dims[d : d + 2] = [dims[d] + dims[d + 1]]
        return v.reshape(_shape(x, dims)), dims
    if kind.startswith("split") and len(dims[d]) > 1:
        at = 1 + b % (len(dims[d]) - 1)
        parts = [dims[d][:at], dims[d][at:]]
        dims[d : d + 1] = parts[::-1] if kind == "split wrongly" else parts
        return v.reshape(_shape(x, dims)), dims
    if kind == "stack" and len(dims) < 5:
        return torch.stack((v, v * 2), d).sum(d), dims
    if kind == "halves" and static:
        size = _size(x, dims[d])
        return torch.cat((v.narrow(d, 1, size - 1), v.narrow(d, 0, 1)), d), dims
    if kind == "weights" and dims[-1] == (H, D):
        return v @ g.w, dims
    if kind == "square" and len(dims) >= 3:
        return (v @ v.transpose(-1, -2) * 0.05) @ v, dims
    return _ALONG.get(kind, lambda v, d: v.sigmoid())(v, d), dims


_ALONG: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda v, d: v.softmax(d),
    "flip": lambda v, d: v.flip(d),
    "centre": lambda v, d: v - v.mean(d, keepdim=True),
    "greatest": lambda v, d: v - v.amax(d, keepdim=True),
    "cumsum": lambda v, d: v.cumsum(d) * 0.2,
    "sort": lambda v, d: v.sort(d).values,
    "roll": lambda v, d: v.roll(1, d),
    "first": lambda v, d: v + v.select(d, 0).unsqueeze(d),
    "normalise": lambda v, d: F.normalize(v, dim=d),
}

MOVES: Mapping[str, tuple[Callable[..., Tensor], tuple[tuple[Any, ...], ...]]] = {
    "norm": (_norm, (("layer", "layer, bare", "rms", "l2", "by hand", "rms by hand"),)),
    "mlp": (_mlp, (("gelu", "swiglu", "relu squared", "flat"),)),
    "self-attention": (_self_attention, (("", "rope", "shared"), (False, True), (False, True))),
    "cross-attention": (_cross_attention, ((False, True),)),
    "modulation": (_modulate, (("condition", "six", "spread"),)),
    "positions": (_positions, (("own", "shared", "spread"),)),
    "channels": (_channels, (("flip", "softmax", "halves", "interleave", "grouped", "where"),)),
    "entropy": (_entropy, (("scales", "adds"),)),
}


# layers

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """A random layer: the moves in order, each a name with its parameters."""

    moves: tuple[Step, ...]

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The operators one of which the first trap is refused at; () without any; None where it is not foretold."""
        if any(name == "scramble" for name, *_ in self.moves):
            return None
        return next((TRAPS[kind][1] for name, *rest in self.moves if name == "trap" for kind in rest), ())

    def __call__(self, g: Given, x: Tensor) -> Tensor:
        for name, *rest in self.moves:
            if name == "trap":
                x = TRAPS[rest[0]][0](g, x)
            elif name == "scramble":
                x = _scramble(g, x, *rest)
            else:
                x = MOVES[name][0](g, x, *rest)
        return x


def make_layer(choose: Choose) -> Layer:
    """A layer of one to four moves."""
    moves = [_make_move(choose) for _ in range(choose(range(1, 4)))]
    special = choose(("none", "trap", "trap", "scramble", "scramble", "scramble"))
    if special == "trap":
        moves.insert(choose(range(len(moves) + 1)), ("trap", choose(tuple(TRAPS))))
    elif special == "scramble":
        length = choose(range(1, 6))
        steps = tuple((choose(_SCRAMBLES), choose(range(5)), choose(range(5))) for _ in range(length))
        moves.insert(choose(range(len(moves) + 1)), ("scramble", steps, choose(("rightly", "rightly", "by reshape"))))
    return Layer(tuple(moves))


def _make_move(choose: Choose) -> Step:
    name = choose(tuple(MOVES))
    return (name, *(choose(options) for options in MOVES[name][1]))


# one check


@dataclass(frozen=True)
class Verdict:
    """What became of a layer: "pruned", "refused", "conservative" (refused, though tokens are alike), "untraced"; or
    "unsound" and "misnamed", which are errors. `detail` says where."""

    kind: str
    detail: str = ""

    @property
    def wrong(self) -> bool:
        """Whether this must never happen."""
        return self.kind in ("unsound", "misnamed")


def trace(layer: Layer, names: Sequence[str], open_batch: bool) -> GraphModule:
    """The graph of the layer with an open number of tokens, and of samples if `open_batch`.

    What AOT captures of it as well, in a third of the time: nothing here writes in place.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    open_sizes = (N, B) if open_batch else (N,)
    fakes = []
    for i, value in enumerate((STREAM, *(INPUTS[name] for name in names))):
        dims = [
            DimDynamic.DUCK if d in _open_dims(i, value, open_sizes) else DimDynamic.STATIC for d in range(value.ndim)
        ]
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        fakes.append(mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"input_{i}")))

    def run(x: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        return (layer(Given(dict(zip(names, inputs, strict=True)), fused=True), x),)

    with torch.no_grad(), mode:
        gm = make_fx(run)(*fakes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _open_dims(i: int, value: Tensor, open_sizes: Sequence[int]) -> set[int]:
    """Heads are of the number of samples and stay fixed."""
    return {d for d, size in enumerate(value.shape) if size in open_sizes and (size != B or d == 0)}


def _gather(value: Tensor, axis: int | None, idx: Tensor) -> Tensor:
    if axis is None:
        return value
    value = value.expand(idx.shape[0], *value.shape[1:])
    return torch.stack([v.index_select(axis - 1, i) for v, i in zip(value, idx, strict=True)])


def _some_tokens(keep: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:keep].sort().values for _ in range(B)])


def _alike(layer: Layer, names: Sequence[str], idx: Tensor, got: Tensor | None) -> str:
    """What the kept tokens (B, K, C) ought to be, by the layer on all of them with attention masked to the kept ones.

    Compared with `got`, or where that is None with the layer on the kept tokens alone; "" if equal.
    """
    given = {name: INPUTS[name] for name in names}
    kept = torch.zeros(B, N, dtype=torch.bool).scatter_(1, idx, True)
    whole = _gather(layer(Given(given, kept=kept), STREAM), 1, idx)
    if got is None:
        few = {name: _gather(v, v.shape.index(N) if N in v.shape[1:] else None, idx) for name, v in given.items()}
        got = layer(Given(few), _gather(STREAM, 1, idx))
    return _difference(got, whole)


def _difference(got: Tensor, want: Tensor) -> str:
    try:
        torch.testing.assert_close(got, want, **TOLERANCE, equal_nan=True)
    except AssertionError as error:
        return str(error).replace("\n", " ")
    return ""


def check(layer: Layer, seed: int = 0, open_batch: bool = False) -> Verdict:
    """Trace, prove and, if proven, prune the layer; compare with the references."""
    probe = Given(INPUTS)
    with torch.random.fork_rng():
        layer(probe, STREAM)
    names = [name for name in INPUTS if name in probe.used]
    try:
        gm = trace(layer, names, open_batch)
    except Exception as error:
        return Verdict("untraced", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    proof = prove_token_axis(copy_graph(gm))
    if not proof.holds:
        return _judge_refusal(layer, names, gm, proof, seed)
    if layer.stops:
        return Verdict("unsound", "a trap was proven")
    inputs = [INPUTS[name] for name in names]
    for keep in (1, 4, 7):
        idx = _some_tokens(keep, seed + keep)
        few = dict(
            zip(names, (_gather(v, axis, idx) for v, axis in zip(inputs, proof.axes[1:], strict=True)), strict=True)
        )
        rows = idx.unsqueeze(-1).expand(-1, -1, C)
        alone = layer(Given(few), _gather(STREAM, 1, idx))
        delta = STREAM.flip(0)
        got = prune_tokens(gm, proof, cached=False)(STREAM, idx, *inputs)[0]
        restored = prune_tokens(gm, proof, cached=True)(STREAM, idx, delta, *inputs)[0]
        found = {
            "gather, run, scatter": _difference(got, STREAM.scatter(1, rows, alone)),
            "cached restoring": _difference(restored, (STREAM + delta).scatter(1, rows, alone)),
            "all tokens, attention masked": _alike(layer, names, idx, _gather(got, 1, idx)),
        }
        for reference, difference in found.items():
            if difference:
                return Verdict("unsound", f"K = {keep}, {reference}: {difference}")
    return Verdict("pruned")


def _judge_refusal(layer: Layer, names: Sequence[str], gm: GraphModule, proof: TokenProof, seed: int) -> Verdict:
    node, stops = proof.reason.split(" ")[0].rstrip(":"), layer.stops
    if stops != () and proof.reason.startswith("the stream is "):
        return Verdict("refused", "the capture fixed the number of tokens")
    if node not in {n.name for n in gm.graph.nodes}:
        return Verdict("misnamed", f"no node {node!r}: {proof.reason}")
    if stops == ():
        return Verdict("misnamed", f"nothing mixes tokens here: {proof.reason}")
    if stops is not None:
        said = proof.reason.split(" [")[0]
        inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"][1:]
        said += " " + dict(zip(inputs, names, strict=True)).get(node, "")
        if not any(stop in said for stop in stops):
            return Verdict("misnamed", f"expected one of {stops}: {proof.reason}")
        return Verdict("refused", stops[0])
    if all(not _alike(layer, names, _some_tokens(keep, seed + keep), None) for keep in (1, 4, 7)):
        return Verdict("conservative", proof.reason.split(" [")[0].partition("(")[2])
    return Verdict("refused", "scramble")


def check_seed(seed: int) -> tuple[Layer, Verdict]:
    """The layer of a seed and what became of it."""
    rng = random.Random(seed)
    layer = make_layer(rng.choice)
    return layer, check(layer, seed, open_batch=rng.random() < 0.5)


def main() -> int:
    """Run seeds until `--graphs` or `--minutes` is reached; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=10_000, help="how many in all, with those of earlier calls")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="this one alone, in detail")
    parser.add_argument("--out", type=Path, help="JSON file with the counts; a call with the same file goes on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seed is not None:
        layer, verdict = check_seed(args.seed)
        print(*layer.moves, verdict, sep="\n")
        return int(verdict.wrong)
    state: dict[str, Any] = {"next_seed": 0, "seconds": 0.0, "counts": {}, "details": {}, "wrong": []}
    if args.out and args.out.exists():
        state = json.loads(args.out.read_text())
    counts, details = Counter(state["counts"]), Counter(state["details"])
    start, before = time.monotonic(), state["seconds"]
    while state["next_seed"] < args.graphs and time.monotonic() - start < args.minutes * 60:
        layer, verdict = check_seed(state["next_seed"])
        counts[verdict.kind] += 1
        if verdict.kind != "pruned":
            details[f"{verdict.kind}: {verdict.detail}"] += 1
        if verdict.wrong:
            state["wrong"].append({"seed": state["next_seed"], "layer": repr(layer), "what": verdict.detail})
            print(f"seed {state['next_seed']}: {verdict.kind}: {verdict.detail}", flush=True)
        state["next_seed"] += 1
        if args.out and state["next_seed"] % 100 == 0:
            write_json(args.out, state | _summary(counts, details, before + time.monotonic() - start))
    state |= _summary(counts, details, before + time.monotonic() - start)
    if args.out:
        write_json(args.out, state)
    print(f"{state['next_seed']} layers in {state['seconds']} s: {state['counts']}")
    return int(bool(state["wrong"]))


def _summary(counts: Counter[str], details: Counter[str], seconds: float) -> dict[str, Any]:
    return {"seconds": round(seconds, 1), "counts": dict(counts), "details": dict(details.most_common(60))}


if __name__ == "__main__":
    sys.exit(main())
