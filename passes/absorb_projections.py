"""Let the keys and values of a short text take in the projections around a cross-attention.

    Before: q = h Wq' + bq;  o = softmax(scale q k' + mask) v;  y = o Wp' + bp      k, v (B, H, T, D) are inputs
    After:  p = softmax(scale h K' + bias);  y = p V + bp
            K = k Wq, V = v Wp' (B, H T, C), bias = scale k bq + mask (B, H T)      `absorbed`, once an image

A token then costs 4 C H T operations instead of 4 C (C + H T), and weights are not read: with 32 tokens of text and
heads of 128 a fifth. It pays while T is at most half of D (`worth_it`). As in multi-head latent attention, where W^UK
is absorbed into the weights of the queries (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Pre:  a variant of a layer, after its entropy and tokens are chosen.   Post: a cross-attention's projections are not in
it; it has three inputs more for each (K, bias, V).
Invariant: the value within rounding; K and V are rounded to the dtype of the weights as q and o were.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae, text_probabilities
from toprovar_compile.kernels.text_probabilities import MAX_KEYS
from toprovar_compile.passes._graph import add_inputs, compact, placeholders
from toprovar_compile.passes._symbols import shape_of

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default)
_FEW_ROWS = 4  # rows that are multiplied one by one: the weights are near then, and nothing is copied
_MIN_KEYS = 16  # keys of a head are padded to a power of two of at least this


@dataclass(frozen=True)
class Site:
    """A cross-attention: its nodes, and its inputs of the layer, of which `mask` can be missing.

    `x` (B, n, C) goes into the projection of the queries, `y` (B, n, C) comes out of that of the result, before whose
    bias `bias` nothing is left.
    """

    attention: Node
    x: Node
    y: Node
    bias: Node
    inputs: tuple[Node, Node, Node | None, Node, Node, Node]  # k, v, mask, weight and bias of q, weight of the result
    scale: float
    heads: int


def cross_attentions(gm: GraphModule) -> list[Site]:
    """The attentions of a layer whose keys and values are inputs, with plain projections around them."""
    return [site for node in gm.graph.nodes if node.target is fae and (site := _site(node)) is not None]


def absorb_projections(gm: GraphModule) -> GraphModule:
    """Rewrite `gm`, in place; for each site K, bias and V are new inputs at the end. Raises PassInvariantError."""
    for i, site in enumerate(cross_attentions(gm)):
        keys, bias, values = add_inputs(gm, [f"absorbed_{i}_{name}" for name in ("keys", "bias", "values")])
        with gm.graph.inserting_before(site.y):
            p = gm.graph.call_function(text_probabilities, (site.x, keys, bias, site.scale, site.heads))
            product = gm.graph.call_function(aten.bmm.default, (p, values))
            y = gm.graph.call_function(aten.add.Tensor, (product, site.bias))
        y.meta = dict(site.y.meta)
        site.y.replace_all_uses_with(y)
    compact(gm)
    if cross_attentions(gm):
        raise PassInvariantError("a cross-attention kept its projections", where="absorb_projections")
    return gm


def worth_it(k: Any) -> bool:
    """Whether keys (B, H, T, D) are few enough, and of a kind that the operator has a kernel for."""
    few = k.shape[2] <= min(k.shape[3] // 2, MAX_KEYS)
    return few and (not k.is_cuda or k.dtype in (torch.bfloat16, torch.float16))


def absorbed(inputs: Sequence[Tensor | None], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """K (B, H T', C), bias (B, H T') float32 and V (B, H T', C) of k, v (B, H, T, D), T' being a power of two.

    The inputs are k, v, mask, w_q (H D, C), b_q (H D) and w_out (C, H D). The mask, if there is one, broadcasts to
    (B, 1, 1, T), boolean (True attends) or additive.
    """
    k, v, mask, w_q, b_q, w_out = inputs
    assert k is not None and v is not None and w_q is not None and b_q is not None and w_out is not None
    heads, length, depth = k.shape[1:]
    room = max(_MIN_KEYS, 1 << (length - 1).bit_length()) - length
    keys = _times(k, w_q.view(heads, depth, -1))
    values = _times(v, w_out.view(-1, heads, depth).permute(1, 2, 0))
    bias = (k * (scale * b_q.float()).view(heads, 1, depth)).sum(-1)  # (B, H, T), float32
    if mask is not None:
        mask = mask.squeeze(2)
        bias = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask.float()
    if room:
        pad = (0, 0, 0, room)
        keys, values, bias = F.pad(keys, pad), F.pad(values, pad), F.pad(bias, (0, room), value=-torch.inf)
    return keys.flatten(1, 2), bias.flatten(1), values.flatten(1, 2)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, H, T, D) times the weight (H, D, C) of its head: (B, H, T, C)."""
    b, heads, length, depth = x.shape
    if b <= _FEW_ROWS:
        out = x.new_empty((b, heads, length, weight.shape[-1]))
        for row, made in zip(x, out, strict=True):
            torch.bmm(row, weight, out=made)
        return out
    flat = x.transpose(0, 1).reshape(heads, b * length, depth)
    return torch.bmm(flat, weight).view(heads, b, length, -1).transpose(0, 1)


def _site(node: Node) -> Site | None:
    operands: tuple[Any, ...] = node.args
    q, k, v, mask, scale, entropy = operands
    if entropy or not _is_input(k) or not _is_input(v) or not (mask is None or (_is_input(mask) and _one_row(mask))):
        return None
    into, out = _swap_before(q), _reader(_reader(node, operator.getitem), aten.transpose.int)
    if into is None or out is None or not _swaps(out):
        return None
    first, last = _linear_before(into), _linear_after(out)
    y = _reader(last, aten.view.default)
    if first is None or last is None or y is None:
        return None
    b_q, flat, w_q = first.args
    x = flat.args[0] if _calls(flat, _VIEWS) else None
    if not isinstance(x, Node) or x.meta["val"].ndim != 3:
        return None
    batch, heads = shape_of(k.meta["val"])[:2]
    same = shape_of(x.meta["val"]) == shape_of(y.meta["val"]) and shape_of(x.meta["val"])[0] == batch
    if not same or not heads.is_Integer:
        return None
    b_out, _, w_out = last.args
    return Site(node, x, y, b_out, (k, v, mask, w_q.args[0], b_q, w_out.args[0]), float(scale), int(heads))


def _linear_before(node: Any) -> Any:
    """The product with weights of the layer that `node` is a view of, read by nobody else."""
    while _calls(node, _VIEWS) and len(node.users) == 1:
        node = node.args[0]
    return node if _is_linear(node) and len(node.users) == 1 else None


def _linear_after(node: Any) -> Any:
    """The product with weights of the layer that alone reads `node`, through views."""
    while len(node.users) == 1:
        (reader,) = node.users
        if _is_linear(reader):
            return reader if reader.args[1] is node else None
        if not _calls(reader, _VIEWS):
            return None
        node = reader
    return None


def _is_linear(node: Any) -> bool:
    if not _calls(node, (aten.addmm.default,)) or node.kwargs:
        return False
    bias, _, weight = node.args
    return _is_input(bias) and _calls(weight, (aten.t.default,)) and _is_input(weight.args[0])


def _swap_before(q: Any) -> Any:
    """What q is with heads and tokens swapped."""
    return q.args[0] if _calls(q, (aten.transpose.int,)) and _swaps(q) and len(q.users) == 1 else None


def _swaps(node: Any) -> bool:
    return {d % 4 for d in node.args[1:]} == {1, 2}


def _reader(node: Node | None, target: Any) -> Node | None:
    """The only reader of `node`, if it calls `target`."""
    if node is None or len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader if reader.target is target else None


def _calls(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _one_row(mask: Node) -> bool:
    """Whether a mask (B, 1, 1, T) is one for all heads and tokens."""
    shape = shape_of(mask.meta["val"])
    return len(shape) == 4 and shape[1] == 1 and shape[2] == 1


def inputs_to_absorb(gm: GraphModule) -> list[tuple[tuple[int | None, ...], float]]:
    """Of each site where its inputs are among those of the layer, in the order of `absorbed`, and the scale."""
    order = {node: i for i, node in enumerate(placeholders(gm))}
    return [
        (tuple(None if node is None else order[node] for node in site.inputs), site.scale)
        for site in cross_attentions(gm)
    ]
