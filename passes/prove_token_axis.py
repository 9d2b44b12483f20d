"""Prove that a layer treats tokens alike, so that running it on some of them is the same graph at a smaller size.

Abstract interpretation over a layer graph: for every value, which dimension carries the token axis. A value's state is
None (it has no token axis) or TokenAxis(dim, outer, inner): that dimension has outer * n * inner elements, and element i
of it belongs to token (i // inner) % n, as in the flattened (B * n, C). Each operator has a rule: token-wise operators
pass the axis on, attention is allowed (its queries are tokens; keys are the tokens present), everything that moves
information between tokens, or that is not known, is refused and named.

Pre:  a layer graph of `split_layers`, after `write_kv_cache`; the first input and the first output are the stream.
Post: the graph is not changed. With a proof, for any set of K tokens: gathering the inputs that carry the axis, running
      the graph and scattering its output equals running it, but that attention sees only the K tokens of this scale.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes._graph import output_values, placeholders
from toprovar_compile.passes._symbols import expr_of, is_size, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class TokenAxis:
    """The dimension `dim` holds outer * n * inner elements: tokens, in the middle."""

    dim: int
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One


State = TokenAxis | None | tuple[TokenAxis | None, ...]


@dataclass(frozen=True)
class TokenProof:
    """The result: `symbol` is the token count and `axes` the token dimension of each input (None: it has none).

    Without a proof `axes` is empty and `reason` says which node stopped it, with the user's line where it is known.
    """

    symbol: sympy.Symbol | None
    axes: tuple[int | None, ...]
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the layer may run on some of its tokens."""
        return bool(self.axes)


class _Refusal(Exception):
    """A rule does not hold; the text says why."""


def prove_token_axis(gm: GraphModule) -> TokenProof:
    """Prove that the layer graph `gm` is token-equivariant, or say what prevents it."""
    stream = placeholders(gm)[0].meta["val"]
    reason = "the number of tokens is a constant in this graph"
    for dim, size in enumerate(shape_of(stream)):
        if dim > 0 and size.is_Symbol:
            try:
                return TokenProof(size, _interpret(gm, size, dim))
            except _Refusal as refusal:
                reason = str(refusal)
    return TokenProof(None, (), reason)


def _interpret(gm: GraphModule, symbol: sympy.Symbol, dim: int) -> tuple[int | None, ...]:
    states: dict[Node, State] = {}
    axes: list[int | None] = []
    for node in gm.graph.nodes:
        try:
            if node.op == "placeholder":
                states[node] = _input(node, symbol)
                axis = states[node]
                axes.append(axis.dim if isinstance(axis, TokenAxis) else None)
            elif node.op == "call_function" and not is_size(node):
                states[node] = _apply(node, states, symbol)
        except _Refusal as refusal:
            raise _Refusal(f"{node.name} ({node.target}): {refusal}{_user_line(node)}") from None
    out = output_values(gm)[0]
    if states[out] != TokenAxis(dim):
        raise _Refusal(f"{out.name}: the layer's output has its tokens elsewhere than its input")
    return tuple(axes)


def _input(node: Node, symbol: sympy.Symbol) -> State:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):  # a cache buffer or a length, described when the layer is compiled
        return None
    dims = [d for d, e in enumerate(shape_of(value)) if symbol in e.free_symbols]
    if not dims:
        return None
    if len(dims) > 1 or shape_of(value)[dims[0]] != symbol:
        raise _Refusal(f"an input has the shape {tuple(value.shape)}; only one dimension of exactly {symbol} can be gathered")
    if dims[0] == 0:
        raise _Refusal("an input has tokens but no batch dimension before them")
    return TokenAxis(dims[0])


def _apply(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    if node.target is operator.getitem:
        source, item = node.args
        state = states[source]  # type: ignore[index]
        return state[item] if isinstance(state, tuple) else state  # type: ignore[index]
    inputs = [states.get(a) for a in node.all_input_nodes if not is_size(a)]
    rule = _RULES.get(node.target)
    if rule is None and _is_pointwise(node.target):
        rule = _pointwise
    if all(s is None for s in inputs) and node.target not in (fae, fae_cached):
        return _token_free(node, symbol)
    if rule is None:
        raise _Refusal("no rule says that this operator treats tokens alike")
    return rule(node, states, symbol)


def _token_free(node: Node, symbol: sympy.Symbol) -> State:
    """No input carries tokens; an output that does must be the same for all of them."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    dims = [d for d, e in enumerate(shape_of(value)) if symbol in e.free_symbols]
    if not dims:
        return None
    if node.target not in (aten.expand.default, *_CONSTANTS) or len(dims) > 1 or shape_of(value)[dims[0]] != symbol:
        raise _Refusal("it makes values by token position inside the layer")
    return TokenAxis(dims[0])


# rules


def _tensor(node: Node, i: int = 0) -> Node:
    arg = node.args[i]
    assert isinstance(arg, Node)
    return arg


def _axis(state: State) -> TokenAxis:
    if not isinstance(state, TokenAxis):
        raise _Refusal("a list of values is read as one")
    return state


def _ndim(node: Node) -> int:
    return int(node.meta["val"].ndim)


def _flat(args: Any) -> list[Any]:
    return [x for a in args for x in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _no_token_scalars(node: Node, symbol: sympy.Symbol) -> None:
    for a in _flat([*node.args, *node.kwargs.values()]):
        if isinstance(a, Node) and is_size(a) and symbol in expr_of(a.meta["val"]).free_symbols:
            raise _Refusal("it computes with the number of tokens")


def _pointwise(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    """Broadcasting: every operand's token axis meets the same output dimension, split the same way."""
    _no_token_scalars(node, symbol)
    rank = _ndim(node)
    found: set[TokenAxis] = set()
    for a in node.all_input_nodes:
        state = states.get(a)
        if state is not None:
            axis = _axis(state)
            found.add(TokenAxis(axis.dim + rank - _ndim(a), axis.outer, axis.inner))
    if len(found) != 1:
        raise _Refusal("its operands carry tokens in different dimensions")
    (axis,) = found
    for a in node.all_input_nodes:
        at = axis.dim - (rank - _ndim(a)) if not is_size(a) else -1
        if states.get(a) is None and at >= 0 and shape_of(a.meta["val"])[at] != 1:
            raise _Refusal(f"{a.name} differs along the tokens but is not made from them")
    return axis


def _same(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    return states[_tensor(node)]


def _layer_norm(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    x = _tensor(node)
    axis, normalised = _axis(states[x]), len(node.args[1])  # type: ignore[arg-type]
    if axis.dim >= _ndim(x) - normalised:
        raise _Refusal("it normalises over the tokens")
    _only_first_has_tokens(node, states)
    return (axis, axis, axis)


def _only_first_has_tokens(node: Node, states: dict[Node, State]) -> None:
    if any(states.get(a) is not None for a in node.all_input_nodes[1:]):
        raise _Refusal("a parameter carries tokens")


def _reduce(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    """(x, dims, keepdim) or (x, ord, dims, keepdim) for the vector norm."""
    first = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims = node.args[first] if len(node.args) > first else None
    keep = bool(node.args[first + 1]) if len(node.args) > first + 1 else bool(node.kwargs.get("keepdim", False))
    x = _tensor(node)
    axis, rank = _axis(states[x]), _ndim(x)
    if dims is None or dims == []:
        raise _Refusal("it reduces over all dimensions, tokens among them")
    over = {int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}  # type: ignore[call-overload]
    if axis.dim in over:
        raise _Refusal("it reduces over the tokens")
    return axis if keep else TokenAxis(axis.dim - sum(d < axis.dim for d in over), axis.outer, axis.inner)


def _along(position: int) -> Callable[..., State]:
    """An operator that works along one dimension, args[position] (default 0 or -1 by schema)."""

    def rule(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
        x = _tensor(node)
        default = next((a.default_value for a in node.target._schema.arguments if a.name == "dim"), 0)  # type: ignore[union-attr]
        dim = int(node.args[position] if len(node.args) > position else node.kwargs.get("dim", default))  # type: ignore[call-overload,arg-type]
        axis, dim = _axis(states[x]), dim % _ndim(x)
        if dim == axis.dim:
            raise _Refusal("it works along the tokens")
        value = node.meta["val"]
        if isinstance(value, list | tuple):
            lost = value[0].ndim < _ndim(x)
            return (TokenAxis(axis.dim - (lost and dim < axis.dim), axis.outer, axis.inner),) * len(value)
        lost = value.ndim < _ndim(x)
        return TokenAxis(axis.dim - (lost and dim < axis.dim), axis.outer, axis.inner)

    return rule


def _cat(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    tensors: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % _ndim(node)  # type: ignore[call-overload,arg-type]
    axes = {states[t] for t in tensors}
    if len(axes) != 1 or None in axes:
        raise _Refusal("it joins values with tokens and values without")
    axis = _axis(axes.pop())
    if axis.dim == dim:
        raise _Refusal("it joins along the tokens")
    return axis


def _permute(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    x = _tensor(node)
    axis, rank = _axis(states[x]), _ndim(x)
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (int(d) % rank for d in node.args[1:3]) if node.target is aten.transpose.int else (0, 1)  # type: ignore[arg-type]
        order = list(range(rank))
        if rank > 1:
            order[a], order[b] = b, a
    return TokenAxis(order.index(axis.dim), axis.outer, axis.inner)


def _unsqueeze(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    axis, dim = _axis(states[_tensor(node)]), int(node.args[1]) % _ndim(node)  # type: ignore[arg-type]
    return TokenAxis(axis.dim + (dim <= axis.dim), axis.outer, axis.inner)


def _squeeze(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    x = _tensor(node)
    axis = _axis(states[x])
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    gone = {int(d) % _ndim(x) for d in dims if shape_of(x.meta["val"])[int(d) % _ndim(x)] == 1}  # type: ignore[arg-type]
    return TokenAxis(axis.dim - sum(d < axis.dim for d in gone), axis.outer, axis.inner)


def _view(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    """A reshape keeps the row-major order, so tokens stay `right` elements apart; find the dimension that holds them."""
    x = _tensor(node)
    axis = _axis(states[x])
    before, after = shape_of(x.meta["val"]), shape_of(node.meta["val"])
    right = axis.inner * sympy.prod(before[axis.dim + 1 :])
    for dim, size in enumerate(after):
        inner = sympy.cancel(right / sympy.prod(after[dim + 1 :]))
        outer = sympy.cancel(size / (inner * symbol))
        if _is_count(inner) and _is_count(outer):
            return TokenAxis(dim, outer, inner)
    raise _Refusal(f"it reshapes {before} to {after}, which splits the tokens")


def _is_count(e: sympy.Expr) -> bool:
    """A positive whole number for all values of its symbols: an integer, or a product of symbols and an integer."""
    coefficient, rest = e.as_coeff_Mul()
    return bool(coefficient.is_Integer and coefficient > 0 and (rest == 1 or rest.is_polynomial()) and not e.is_Add)


def _expand(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    x = _tensor(node)
    axis = _axis(states[x])
    return TokenAxis(axis.dim + _ndim(node) - _ndim(x), axis.outer, axis.inner)


def _addmm(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    bias, a, b = node.args[:3]
    if states.get(bias) is not None and _ndim(bias) < 2:  # type: ignore[arg-type]
        raise _Refusal("the bias carries tokens")
    return _matmul(a, b, states)  # type: ignore[arg-type]


def _mm(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    return _matmul(_tensor(node), _tensor(node, 1), states)


def _matmul(a: Node, b: Node, states: dict[Node, State]) -> State:
    """(..., rows, k) @ (..., k, columns): tokens may be rows of the left or columns of the right, not both, never k."""
    left, right, rank = states.get(a), states.get(b), _ndim(a)
    if (isinstance(left, TokenAxis) and left.dim == rank - 1) or (isinstance(right, TokenAxis) and right.dim == rank - 2):
        raise _Refusal("it sums over the tokens")
    if left is not None and right is not None:
        raise _Refusal("it multiplies tokens with tokens")
    return left if left is not None else right


def _attention(node: Node, states: dict[Node, State], symbol: sympy.Symbol) -> State:
    """(B, H, n, D): queries are tokens; keys and values are tokens of this scale, or do not depend on them (text)."""
    q, k, v = (states.get(a) for a in node.args[:3])  # type: ignore[arg-type]
    bias = node.args[6] if node.target is fae_cached else node.args[3]
    if q != TokenAxis(2):
        raise _Refusal("its queries are not tokens")
    if k != v or k not in (None, TokenAxis(2)):
        raise _Refusal("its keys and values are not tokens")
    if bias is not None and (k is not None or states.get(bias) is not None):  # type: ignore[arg-type]
        raise _Refusal("its bias depends on which tokens are present")
    return (TokenAxis(2), TokenAxis(1))


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags


_CONSTANTS = (aten.full.default, aten.zeros.default, aten.ones.default, aten.full_like.default, aten.zeros_like.default)

_RULES: dict[Any, Callable[[Node, dict[Node, State], sympy.Symbol], State]] = {
    fae: _attention,
    fae_cached: _attention,
    aten.native_layer_norm.default: _layer_norm,
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.t.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _along(1),
    aten.slice.Tensor: _along(1),
    aten.unbind.int: _along(1),
    aten.split.Tensor: _along(2),
    aten.split_with_sizes.default: _along(2),
    aten._softmax.default: _along(1),
    aten._log_softmax.default: _along(1),
    aten.cat.default: _cat,
    aten.sum.dim_IntList: _reduce,
    aten.mean.dim: _reduce,
    aten.amax.default: _reduce,
    aten.amin.default: _reduce,
    aten.var.correction: _reduce,
    aten.linalg_vector_norm.default: _reduce,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten._to_copy.default: _same,
    aten.gelu.default: _pointwise,
    aten.silu.default: _pointwise,
}


def _user_line(node: Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    where = next((line for line in reversed(lines) if line.startswith("File ")), "")
    return f" [{where}]" if where else ""
