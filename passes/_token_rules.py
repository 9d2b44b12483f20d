"""What each operator does to the token axis and the batch axis of its values: the rules of `prove_token_axis`.

The batch axis is followed as well, because every sample keeps its own tokens: once these are gathered, one place of two
samples holds different tokens, so that values with tokens must not meet across samples either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes._symbols import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Axis:
    """Where the tokens (or samples: `of`) of a value are.

    The dimension `dim` holds outer * size * inner elements, and element i of it belongs to entry (i // inner) % size,
    as tokens do in the flattened (B * n, C).
    """

    of: str
    size: sympy.Expr
    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One

    def at(self, dim: int) -> Axis:
        """The same in another dimension."""
        return replace(self, dim=dim)

    def alone_at(self, dim: int) -> bool:
        """Whether the dimension `dim` is this axis and nothing else."""
        return self.dim == dim and self.outer == 1 and self.inner == 1


@dataclass(frozen=True)
class Tokens:
    """The state of a value that has tokens.

    `batch` is None where samples cannot be confused: there is one only, or all tokens of a sample are equal. `own`: the
    value is made from the layer's stream.
    """

    token: Axis
    batch: Axis | None
    own: bool

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that operators must leave apart."""
        return (self.token,) if self.batch is None else (self.token, self.batch)


State = Tokens | None | tuple[Tokens | None, ...]
States = Mapping[Node, State]
Rule = Callable[[Node, States], State]


class Refusal(Exception):
    """A rule does not hold; the text says why."""


def is_shared(axis: Axis, shape: Sequence[sympy.Expr]) -> bool:
    """Whether a value has one entry for all samples: it has one for each as soon as tokens are gathered."""
    return bool(shape[axis.dim] == 1 and axis.size != 1)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _tensor(node: Node, i: int = 0) -> Node:
    arg = node.args[i]
    assert isinstance(arg, Node)
    return arg


def _shape(node: Node) -> tuple[sympy.Expr, ...]:
    return shape_of(node.meta["val"])


def _state(node: object, states: States) -> Tokens | None:
    state = states.get(node) if isinstance(node, Node) else None
    if isinstance(state, tuple):
        raise Refusal("a list of values is read as one")
    return state


# operators on one value


def _each(move: Callable[[Node, Axis], Axis]) -> Rule:
    """The rule of an operator on one value, its first argument, from what it does to each axis."""

    def rule(node: Node, states: States) -> State:
        x = _state(node.args[0], states)
        if x is None or any(states.get(a) is not None for a in node.all_input_nodes if a is not node.args[0]):
            raise Refusal("a parameter carries tokens")
        moved = Tokens(move(node, x.token), None if x.batch is None else move(node, x.batch), x.own)
        value = node.meta["val"]
        return (moved,) * len(value) if isinstance(value, list | tuple) else moved

    return rule


def _stay(node: Node, axis: Axis) -> Axis:
    return axis


def _normalise(node: Node, axis: Axis) -> Axis:
    if axis.dim >= len(_shape(_tensor(node))) - len(node.args[1]):  # type: ignore[arg-type]
        raise Refusal(f"it normalises over the {axis.of}")
    return axis


def _reduce(node: Node, axis: Axis) -> Axis:
    """(x, dims, keepdim) or (x, ord, dims, keepdim) for the vector norm."""
    first = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims = node.args[first] if len(node.args) > first else None
    keep = bool(node.args[first + 1]) if len(node.args) > first + 1 else bool(node.kwargs.get("keepdim", False))
    if dims is None or dims == []:
        raise Refusal(f"it reduces over all dimensions, {axis.of} among them")
    rank = len(_shape(_tensor(node)))
    over = {_int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if axis.dim in over:
        raise Refusal(f"it reduces over the {axis.of}")
    return axis if keep else axis.at(axis.dim - sum(d < axis.dim for d in over))


def _along(position: int) -> Callable[[Node, Axis], Axis]:
    """An operator that works along one dimension, args[position] (the schema has its default)."""

    def move(node: Node, axis: Axis) -> Axis:
        rank = len(_shape(_tensor(node)))
        default = next((a.default_value for a in node.target._schema.arguments if a.name == "dim"), 0)  # type: ignore[union-attr]
        dim = _int(node.args[position] if len(node.args) > position else node.kwargs.get("dim", default))
        if dim % rank == axis.dim:
            raise Refusal(f"it works along the {axis.of}")
        value = node.meta["val"]
        lost = (value[0] if isinstance(value, list | tuple) else value).ndim < rank
        return axis.at(axis.dim - (lost and dim % rank < axis.dim))

    return move


def _slice(node: Node, axis: Axis) -> Axis:
    _, _, start, end, step = (*node.args, *(None,) * 4)[:5]
    whole = start in (None, 0) and (end is None or end == torch.iinfo(torch.int64).max) and step in (None, 1)
    return axis if whole and not node.kwargs else _along(1)(node, axis)


def _flip(node: Node, axis: Axis) -> Axis:
    if axis.dim in {_int(d) % len(_shape(node)) for d in node.args[1]}:  # type: ignore[union-attr]
        raise Refusal(f"it works along the {axis.of}")
    return axis


def _permute(node: Node, axis: Axis) -> Axis:
    rank = len(_shape(_tensor(node)))
    if node.target is aten.permute.default:
        order = [_int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (int(d) % rank for d in node.args[1:3]) if node.target is aten.transpose.int else (0, rank - 1)  # type: ignore[arg-type]
        order = list(range(rank))
        order[a], order[b] = b, a
    return axis.at(order.index(axis.dim))


def _unsqueeze(node: Node, axis: Axis) -> Axis:
    return axis.at(axis.dim + (int(node.args[1]) % len(_shape(node)) <= axis.dim))  # type: ignore[arg-type]


def _squeeze(node: Node, axis: Axis) -> Axis:
    before = _shape(_tensor(node))
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    named = {int(d) % len(before) for d in dims}  # type: ignore[arg-type]
    if axis.dim in named:
        raise Refusal(f"it drops the dimension of the {axis.of} where that is 1")
    return axis.at(axis.dim - sum(d < axis.dim and before[d] == 1 for d in named))


def _view(node: Node, axis: Axis) -> Axis:
    """A reshape keeps the row-major order: entries stay `right` elements apart, in the dimension looked for."""
    before, after = _shape(_tensor(node)), _shape(node)
    if is_shared(axis, before):
        raise Refusal("it reshapes values that all samples share")
    right = axis.inner * sympy.prod(before[axis.dim + 1 :])
    for dim, size in enumerate(after):
        inner = sympy.cancel(right / sympy.prod(after[dim + 1 :]))
        outer = sympy.cancel(size / (inner * axis.size))
        if _is_count(inner) and _is_count(outer):
            return Axis(axis.of, axis.size, dim, outer, inner)
    raise Refusal(f"it reshapes {before} to {after}, which splits the {axis.of}")


def _is_count(e: sympy.Expr) -> bool:
    """A positive whole number for all values of its symbols: an integer, or a product of symbols and an integer."""
    coefficient, rest = e.as_coeff_Mul()
    return bool(coefficient.is_Integer and coefficient > 0 and (rest == 1 or rest.is_polynomial()) and not e.is_Add)


def _expand(node: Node, axis: Axis) -> Axis:
    before, sizes = _shape(_tensor(node)), node.args[1]
    moved = axis.at(axis.dim + len(_shape(node)) - len(before))
    if is_shared(axis, before) and _shape(node)[moved.dim] != axis.size and sizes[moved.dim] != -1:  # type: ignore[index]
        raise Refusal("it expands values that all samples share")
    return moved


# operators on several values


def _broadcast(rank: int, operands: Iterable[tuple[str, Sequence[sympy.Expr], Tokens | None]]) -> Tokens:
    """Name, shape and state of each operand: their axes have to meet in the same dimensions, split the same way."""
    operands, found = list(operands), []
    for _, shape, state in operands:
        if state is not None:
            shift = rank - len(shape)
            token = state.token.at(state.token.dim + shift)
            found.append(Tokens(token, state.batch and state.batch.at(state.batch.dim + shift), state.own))
    meet = _meet(found)
    for name, shape, state in operands:
        at = meet.token.dim - (rank - len(shape))
        if state is None and at >= 0 and shape[at] != 1:
            raise Refusal(f"{name} differs along the tokens but is not made from them")
    return meet


def _meet(found: Sequence[Tokens]) -> Tokens:
    if len({s.token for s in found}) != 1:
        raise Refusal("its operands carry tokens in different dimensions")
    batches = {s.batch for s in found if s.batch is not None}
    if len(batches) > 1:
        raise Refusal("its operands carry samples in different dimensions")
    return Tokens(found[0].token, next(iter(batches), None), any(s.own for s in found))


def pointwise(node: Node, states: States) -> State:
    """An operator with broadcasting."""
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    return _broadcast(len(_shape(node)), [(a.name, _shape(a), _state(a, states)) for a in tensors])


def _cat(node: Node, states: States) -> State:
    tensors: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    found = [s for t in tensors if (s := _state(t, states)) is not None]
    if len(found) < len(tensors):
        raise Refusal("it joins values with tokens and values without")
    meet, rank = _meet(found), len(_shape(tensors[0]))
    dim = _int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    if node.target is aten.stack.default:
        dim %= rank + 1
        batch = meet.batch and meet.batch.at(meet.batch.dim + (dim <= meet.batch.dim))
        return Tokens(meet.token.at(meet.token.dim + (dim <= meet.token.dim)), batch, meet.own)
    for axis in meet.axes:
        if axis.dim == dim % rank:
            raise Refusal(f"it joins along the {axis.of}")
    return meet


def _mm(node: Node, states: States) -> State:
    return _matmul(_tensor(node), _tensor(node, 1), states)


def _addmm(node: Node, states: States) -> State:
    bias, a, b = (_tensor(node, i) for i in range(3))
    product = _matmul(a, b, states)
    return _broadcast(2, [(bias.name, _shape(bias), _state(bias, states)), ("", _shape(node), product)])


def _matmul(a: Node, b: Node, states: States) -> Tokens | None:
    """(..., rows, k) @ (..., k, columns): tokens may be rows of the left or columns of the right, not both, never k."""
    rank = len(_shape(a))
    left, right = _state(a, states), _state(b, states)
    for node, state, summed in ((a, left, rank - 1), (b, right, rank - 2)):
        for axis in state.axes if state is not None else ():
            if axis.dim == summed:
                raise Refusal(f"it sums over the {axis.of}")
            if is_shared(axis, _shape(node)):
                raise Refusal("it multiplies values that all samples share")
    if left is not None and right is not None:
        raise Refusal("it multiplies tokens with tokens")
    return left if left is not None else right


def _attention(node: Node, states: States) -> State:
    """(B, H, n, D): queries are tokens; keys and values are tokens of this scale, or do not depend on them (text)."""
    q, k, v = (_state(a, states) for a in node.args[:3])
    bias = node.args[6] if node.target is fae_cached else node.args[3]
    if q is None or not _is_heads(q, _tensor(node)):
        raise Refusal("its queries are not tokens")
    for side, tokens in ((1, k), (2, v)):
        if tokens is not None and not (tokens.own and _is_heads(tokens, _tensor(node, side))):
            raise Refusal("its keys and values are not tokens of the layer")
    if (k is None) != (v is None) or (k is None and node.target is fae_cached):
        raise Refusal("its keys and values are not tokens of the layer")
    if bias is not None and (k is not None or _state(bias, states) is not None):
        raise Refusal("its bias depends on which tokens are present")
    return (q, Tokens(q.token.at(1), q.batch, q.own))


def _is_heads(state: Tokens, node: Node) -> bool:
    """Whether the value is (batch, heads, tokens, head size)."""
    shape, batch = _shape(node), state.batch
    apart = shape[0] == 1 if batch is None else batch.alone_at(0) and not is_shared(batch, shape)
    return state.token.alone_at(2) and apart


RULES: Mapping[Any, Rule] = {
    fae: _attention,
    fae_cached: _attention,
    aten.native_layer_norm.default: _each(_normalise),
    aten._fused_rms_norm.default: _each(_normalise),
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.view.default: _each(_view),
    aten._unsafe_view.default: _each(_view),
    aten.reshape.default: _each(_view),
    aten.expand.default: _each(_expand),
    aten.permute.default: _each(_permute),
    aten.transpose.int: _each(_permute),
    aten.t.default: _each(_permute),
    aten.unsqueeze.default: _each(_unsqueeze),
    aten.squeeze.dim: _each(_squeeze),
    aten.squeeze.dims: _each(_squeeze),
    aten.select.int: _each(_along(1)),
    aten.slice.Tensor: _each(_slice),
    aten.flip.default: _each(_flip),
    aten.unbind.int: _each(_along(1)),
    aten.split.Tensor: _each(_along(2)),
    aten.split_with_sizes.default: _each(_along(2)),
    aten._softmax.default: _each(_along(1)),
    aten._log_softmax.default: _each(_along(1)),
    aten.cat.default: _cat,
    aten.stack.default: _cat,
    aten.sum.dim_IntList: _each(_reduce),
    aten.mean.dim: _each(_reduce),
    aten.amax.default: _each(_reduce),
    aten.amin.default: _each(_reduce),
    aten.var.correction: _each(_reduce),
    aten.var_mean.correction: _each(_reduce),
    aten.linalg_vector_norm.default: _each(_reduce),
    aten.clone.default: _each(_stay),
    aten.alias.default: _each(_stay),
    aten.detach.default: _each(_stay),
    aten.lift_fresh_copy.default: _each(_stay),
    aten._to_copy.default: _each(_stay),
    aten.gelu.default: pointwise,
    aten.silu.default: pointwise,
}
