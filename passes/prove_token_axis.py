"""Prove that a layer treats tokens alike, so that running it on some of them is the same graph at a smaller size.

Abstract interpretation over a layer graph: for every value, which dimension carries the token axis and which the batch
axis (`Tokens`; None: it has no tokens). Each operator has a rule: token-wise operators pass the axes on, attention is
allowed (its queries are tokens; keys are the tokens present), everything that moves information between tokens or
between the tokens of two samples, that computes with the number of tokens, or that is not known, is refused and named.

Pre:  a layer graph of `split_layers`, after `write_kv_cache`; the first input and the first output are the stream.
Post: the graph is not changed. With a proof, for any sets of K tokens, one for each sample: gathering the inputs that
      carry the axis, running the graph and scattering its output equals running it, but that attention sees only the K
      tokens of this scale. One set of entries for all samples, (1, n, ...), counts as one for each.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes._graph import output_values, placeholders
from toprovar_compile.passes._symbols import is_scalar, scalar_symbols, shape_of
from toprovar_compile.passes._token_rules import RULES, Axis, Refusal, State, Tokens, is_shared, pointwise

aten = torch.ops.aten

# Operators whose output may have tokens though no input has, and where their arguments that are not sizes begin.
_SPREADING: Mapping[Any, int] = {
    aten.expand.default: 2,
    aten.full.default: 1,
    aten.zeros.default: 1,
    aten.ones.default: 1,
}
_SIZED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)


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


@dataclass(frozen=True)
class _Stream:
    """The sizes of the stream (batch, n, C)."""

    batch: sympy.Expr
    n: sympy.Symbol


def prove_token_axis(gm: GraphModule) -> TokenProof:
    """Prove that the layer graph `gm` is token-equivariant, or say what prevents it."""
    shape = shape_of(placeholders(gm)[0].meta["val"])
    if len(shape) != 3 or not shape[1].is_Symbol:
        found = f"the stream is {shape} in this graph, its dimension 1 not an open number of tokens"
        return TokenProof(None, (), found)
    try:
        return TokenProof(shape[1], _interpret(gm, _Stream(shape[0], shape[1]), {}))
    except Refusal as refusal:
        return TokenProof(None, (), str(refusal))


def token_states(gm: GraphModule) -> dict[str, State]:
    """For whoever looks at a proof: the state of each node by name, up to the node that stopped it."""
    states: dict[Node, State] = {}
    shape = shape_of(placeholders(gm)[0].meta["val"])
    if len(shape) == 3 and shape[1].is_Symbol:
        with suppress(Refusal):
            _interpret(gm, _Stream(shape[0], shape[1]), states)
    return {node.name: state for node, state in states.items()}


def _interpret(gm: GraphModule, stream: _Stream, states: dict[Node, State]) -> tuple[int | None, ...]:
    """The token dimension of each input; `states` is filled on the way."""
    axes: list[int | None] = []
    for node in gm.graph.nodes:
        try:
            if node.op == "placeholder":
                state = _input(node, stream, own=not axes)
                axes.append(state.token.dim if state is not None else None)
                states[node] = state
            elif node.op == "call_function" and not is_scalar(node):
                states[node] = _apply(node, states, stream)
        except Refusal as refusal:
            raise Refusal(f"{node.name} ({node.target}): {refusal}{_user_line(node)}") from None
    first, out = placeholders(gm)[0], output_values(gm)[0]
    made, shape = states.get(out), shape_of(out.meta["val"])
    if not isinstance(made, Tokens) or made.axes != states[first].axes or shape != shape_of(first.meta["val"]):  # type: ignore[union-attr]
        raise Refusal(f"{out.name}: the layer's output has its tokens elsewhere than its input")
    return tuple(axes)


def _input(node: Node, stream: _Stream, *, own: bool) -> Tokens | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):  # a cache buffer or a length, described when the layer is compiled
        return None
    shape = shape_of(value)
    dims = [d for d, e in enumerate(shape) if stream.n in e.free_symbols]
    if not dims:
        return None
    if len(dims) > 1 or shape[dims[0]] != stream.n:
        raise Refusal(f"an input has the shape {shape}; only one dimension of exactly {stream.n} can be gathered")
    if dims[0] == 0 or shape[0] not in (1, stream.batch):
        raise Refusal(f"an input has the shape {shape}; tokens are gathered for each sample, in dimension 0")
    batch = None if stream.batch == 1 else Axis("samples", stream.batch, 0)
    return Tokens(Axis("tokens", stream.n, dims[0]), batch, own)


def _apply(node: Node, states: dict[Node, State], stream: _Stream) -> State:
    if node.target is operator.getitem:
        source, item = node.args
        state = states.get(source)  # type: ignore[arg-type]
        return state[item] if isinstance(state, tuple) else state  # type: ignore[index]
    rule = RULES.get(node.target)
    if rule is None and _is_pointwise(node.target):
        rule = pointwise
    if all(states.get(a) is None for a in node.all_input_nodes) and node.target not in (fae, fae_cached):
        return _token_free(node, stream)
    if rule is None:
        raise Refusal("no rule says that this operator treats tokens alike")
    state = rule(node, states)
    _no_token_scalars(node, 0 if node.target not in _SIZED else 2, stream)
    values = node.meta["val"] if isinstance(state, tuple) else [node.meta["val"]]
    for value, made in zip(values, state if isinstance(state, tuple) else [state], strict=True):
        _check_shape(value, made, stream)
    return state


def _token_free(node: Node, stream: _Stream) -> State:
    """No input has tokens; an output that does must be the same for all of them."""
    value = node.meta["val"]
    values = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    dims = [d for v in values for d, e in enumerate(shape_of(v)) if stream.n in e.free_symbols]
    known = node.target in _SPREADING and len(dims) == 1 and shape_of(value)[dims[0]] == stream.n
    if dims and not known:
        raise Refusal("it makes values by token position inside the layer")
    _no_token_scalars(node, _SPREADING[node.target] if dims else 0, stream)
    return Tokens(Axis("tokens", stream.n, dims[0]), None, False) if dims else None


def _no_token_scalars(node: Node, skip: int, stream: _Stream) -> None:
    """Refuse a number made from the number of tokens, but for sizes, which the first `skip` arguments may be."""
    for a in _flat([*node.args[skip:], *node.kwargs.values()]):
        if isinstance(a, Node) and is_scalar(a) and stream.n in scalar_symbols(a):
            raise Refusal("it computes with the number of tokens")


def _flat(args: Any) -> list[Any]:
    return [x for a in args for x in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _check_shape(value: Tensor, state: State, stream: _Stream) -> None:
    """The shape is what the state says, and has tokens nowhere else."""
    assert isinstance(state, Tokens)
    shape = shape_of(value)
    for axis in state.axes:
        want = sympy.expand(axis.outer * axis.size * axis.inner)
        if not is_shared(axis, shape) and sympy.expand(shape[axis.dim]) != want:
            raise Refusal(f"its shape {shape} has not {want} in dimension {axis.dim}, where {axis.of} are")
    if any(stream.n in e.free_symbols for d, e in enumerate(shape) if d != state.token.dim):
        raise Refusal(f"its shape {shape} has the number of tokens in more than one dimension")


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags


def _user_line(node: Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    where = next((line for line in reversed(lines) if line.startswith("File ")), "")
    return f" [{where}]" if where else ""
