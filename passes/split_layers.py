"""Cut the functional step graph at the residual stream into a prologue, layers and an epilogue.

    Before: one graph            x -> [blocks.0 ...] -> x1 -> [blocks.1 ...] -> x2 -> head -> logits
    After:  prologue(inputs)     every value that does not depend on the stream, computed once for all layers
            layer(x, inputs)     one graph for all layers that are equal but for their weights; weights are inputs
            epilogue(x_L, ...)   the rest

A layer is what the repeated module that holds one attention computes (`nn_module_stack`), and only if exactly one
tensor leads from each layer to the next.

Pre:  graph is functional ATen, every node has meta["val"], attention is `toprovar::fae`.
Post: running prologue, layers and epilogue in order gives the outputs of the graph. No size is an input of a layer:
      sizes are read off its tensors, so that a layer runs at another token count as it is.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from toprovar_compile.errors import PassInvariantError, UnsupportedGraphError
from toprovar_compile.kernels import fae
from toprovar_compile.passes._graph import graph_module, output_values, placeholders
from toprovar_compile.passes._symbols import (
    SizeBuilder,
    expr_of,
    is_scalar,
    is_size,
    is_tensor,
    scalar_symbols,
    shape_of,
)


@dataclass(frozen=True)
class Piece:
    """A graph cut out of another one: `inputs` and `outputs` are the names of the values there."""

    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: the module path it came from and its piece, whose inputs[0] and outputs[0] are the residual stream."""

    name: str
    piece: Piece


@dataclass(frozen=True)
class SplitStep:
    """A step graph in pieces. `inputs` and `outputs` are those of the whole graph (None: the graph returns None there).

    `values` are the inputs' (fake) values.
    """

    prologue: Piece
    layers: tuple[Layer, ...]
    epilogue: Piece
    inputs: tuple[str, ...]
    values: tuple[object, ...]
    outputs: tuple[str | None, ...]


def split_layers(gm: GraphModule) -> SplitStep:
    """Cut `gm`; it is left as it is. Raises UnsupportedGraphError with the reason when it has no such layers."""
    attention = [n for n in gm.graph.nodes if n.target is fae]
    if not attention:
        raise UnsupportedGraphError("the graph has no attention", where="split_layers")
    refusals = []
    for paths in layer_paths(attention):
        try:
            return _cut(gm, paths)
        except UnsupportedGraphError as refusal:
            refusals.append(f"{paths[0]}: {refusal.what}")
    raise UnsupportedGraphError(
        "no repeated module of the model is a layer on one residual stream",
        where="split_layers",
        expected="at least two modules of one list, each holding attention and passing one tensor on",
        todo="; ".join(refusals) or "no attention lies in a numbered submodule",
    )


def check_split_layers(gm: GraphModule, split: SplitStep) -> None:
    """Raise PassInvariantError unless every attention of `gm` lies in a layer and every output is made by a piece."""
    want = sum(n.target is fae for n in gm.graph.nodes)
    have = sum(n.target is fae for layer in split.layers for n in layer.piece.graph.graph.nodes)
    if want != have:
        raise PassInvariantError(f"{have} of {want} attentions lie in layers", where="split_layers")
    pieces = (split.prologue, *(layer.piece for layer in split.layers), split.epilogue)
    known = set(split.inputs)
    for piece in pieces:
        for name in piece.inputs:
            if name not in known:
                raise PassInvariantError(f"{name} is read before it is made", where="split_layers")
        known.update(piece.outputs)
    for output in split.outputs:
        if output is not None and output not in known:
            raise PassInvariantError(f"the output {output} is made by no piece", where="split_layers")


def cut_shared(prologue: Piece, shared: Collection[str], conditions: Collection[str] = ()) -> tuple[Piece, Piece]:
    """Cut off what a prologue makes from the inputs `shared` alone: that, and the rest.

    From weights and conditions steps of all scales make the same: casts, modulations, keys and values of a text.
    What is read only together with one and the same of the inputs `conditions` is left to the rest: cut off with that
    condition, it is freed when it was read.
    """
    gm = prologue.graph
    inputs = dict(zip(placeholders(gm), prologue.inputs, strict=True))
    common = [n for n, name in inputs.items() if name in shared]
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    still = set(common)
    for n in nodes:
        if n.all_input_nodes and still.issuperset(n.all_input_nodes):
            still.add(n)
    results = output_values(gm)
    still -= _read_with_one(nodes, still, results, {n: name for n, name in inputs.items() if name in conditions})
    made = [n for n in nodes if n in still and not is_scalar(n)]
    rest = [n for n in nodes if n not in still and not is_scalar(n)]
    # Items of a list are made where the list is, so that tensors alone cross.
    crossing = [n for n in made if is_tensor(n) and (n in results or not still.issuperset(n.users))]
    names = {n.name: name for n, name in inputs.items()} | {n.name: f"shared.{n.name}" for n in crossing}
    first = _extract(gm, made, crossing, _symbol_source(common))
    second = _extract(gm, rest, results, _symbol_source(inputs))
    return (
        Piece(first.graph, tuple(names[n] for n in first.inputs), tuple(names[n] for n in first.outputs)),
        Piece(second.graph, tuple(names[n] for n in second.inputs), prologue.outputs),
    )


def _read_with_one(
    nodes: Sequence[Node], shared: Collection[Node], results: Collection[Node], conditions: Mapping[Node, str]
) -> set[Node]:
    """Those of `shared` that lead only to nodes that need one and the same of the inputs `conditions` besides."""
    needs: dict[Node, frozenset[str]] = {n: frozenset((name,)) for n, name in conditions.items()}
    for n in nodes:
        others = [a for a in n.all_input_nodes if a not in shared]
        needs[n] = frozenset().union(*(needs.get(a, frozenset(("", a.name))) for a in others))
    found: dict[Node, frozenset[str]] = {}
    for n in reversed(nodes):
        plain = is_tensor(n) and all(map(is_tensor, n.all_input_nodes))  # a list and its items stay together
        if n in shared and plain and n not in results:
            readers = [found.get(u, needs[u]) for u in n.users]
            if all(readers) and len(frozenset().union(*readers)) == 1:
                found[n] = readers[0]
    return set(found)


_PROLOGUE, _EPILOGUE = -1, -2  # regions of nodes that lie in no layer
_PARTS = (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int)


# which modules are layers


def module_path(node: Node) -> str:
    """The path of the module that made the node, "blocks.0.attn", or ""."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


@lru_cache(maxsize=65536)
def clean_path(path: str) -> str:
    """A path of `nn_module_stack` as `get_submodule` takes it."""
    return re.sub(r"\['?([^\]']+)'?\]", r".\1", path.removeprefix("L['self']")).replace("_modules.", "").strip(".")


def layer_paths(attention: Sequence[Node]) -> Iterable[tuple[str, ...]]:
    """Candidate sets of layer paths, the deepest numbered modules first."""
    chains = []
    for node in attention:
        parts = module_path(node).split(".")
        chains.append([".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()][::-1])
    for depth in range(max((len(c) for c in chains), default=0)):
        paths = tuple(dict.fromkeys(c[min(depth, len(c) - 1)] for c in chains if c))
        if len(paths) > 1:
            yield paths


# cutting


def _cut(gm: GraphModule, paths: tuple[str, ...]) -> SplitStep:
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and not is_scalar(n)]
    home = _homes(nodes, paths)
    streams = _streams(nodes, home, len(paths))
    exits = streams[1:]
    moving = _downstream(nodes, set(streams))
    after = _downstream(nodes, set(exits))
    region: dict[Node, int] = {}
    for n in nodes:
        if n in moving:
            layer = home[n]
            region[n] = layer if layer is not None else (_EPILOGUE if n in after else _PROLOGUE)
        else:
            region[n] = _PROLOGUE
    _sink_views(nodes, region)
    members = {r: [n for n in nodes if region[n] == r] for r in (*range(len(paths)), _PROLOGUE, _EPILOGUE)}
    outputs = [a if isinstance(a, Node) else None for a in _output_args(gm)]
    for i, path in enumerate(paths):
        for n in members[i]:
            for a in n.all_input_nodes:
                if region.get(a, _PROLOGUE) not in (i, _PROLOGUE) and a is not streams[i]:
                    raise UnsupportedGraphError(f"{path} reads {a.name}, made by {module_path(a) or 'the step'}")
    find = _symbol_source(placeholders(gm))
    layers = []
    for i, path in enumerate(paths):
        extra = [o for o in dict.fromkeys(outputs) if o is not None and region.get(o) == i and o is not exits[i]]
        piece = _extract(gm, members[i], [exits[i], *extra], find, first=streams[i])
        layers.append(Layer(path, piece))
    before = members[_PROLOGUE]
    made = [n for n in before if n in outputs or any(region.get(u, _PROLOGUE) != _PROLOGUE for u in n.users)]
    tail = [o for o in dict.fromkeys(outputs) if o is not None and region.get(o) == _EPILOGUE]
    return SplitStep(
        _extract(gm, before, made, find),
        tuple(layers),
        _extract(gm, members[_EPILOGUE], tail, find, first=exits[-1]),
        tuple(n.name for n in placeholders(gm)),
        tuple(n.meta["val"] for n in placeholders(gm)),
        tuple(o.name if o is not None else None for o in outputs),
    )


def _homes(nodes: Sequence[Node], paths: Sequence[str]) -> dict[Node, int | None]:
    """The layer that each node belongs to by its module; None outside of layers."""
    home: dict[Node, int | None] = {}
    unnamed = []  # made by the capture itself, not by a module
    number = {path: i for i, path in enumerate(paths)}
    for n in nodes:
        path = module_path(n)
        parts = path.split(".")
        home[n] = min((number[p] for k in range(len(parts)) if (p := ".".join(parts[: k + 1])) in number), default=None)
        sources = {home[a] for a in n.all_input_nodes if home.get(a) is not None}
        if not path and len(sources) == 1:
            home[n] = sources.pop()
            unnamed.append(n)
    for n in reversed(unnamed):  # a layer has what lies between its nodes
        if all(home.get(u) != home[n] for u in n.users):
            home[n] = None
    return home


def _streams(nodes: Sequence[Node], home: dict[Node, int | None], count: int) -> list[Node]:
    """The residual stream before each layer and after the last."""
    exits = []
    places: dict[int, list[int]] = {}
    for at, n in enumerate(nodes):
        if (layer := home[n]) is not None:
            places.setdefault(layer, []).append(at)
    for i in range(count):
        inside = [nodes[at] for at in places[i]]
        between = nodes[places[i][0] : places[i][-1] + 1]
        mixed = _downstream(between, {n for n in inside if n.target is fae})
        crossing = [n for n in inside if n in mixed and is_tensor(n) and any(_leaves(u, i, home) for u in n.users)]
        if len(crossing) != 1:
            names = ", ".join(n.name for n in crossing) or "nothing"
            raise UnsupportedGraphError(f"layer {i} passes {names} on, not one tensor")
        exits.append(crossing[0])
    first = {n for n in nodes if home[n] == 0}
    outside = dict.fromkeys(a for n in first for a in n.all_input_nodes if a not in first and is_tensor(a))
    stream = exits[0].meta["val"]
    entries = [
        a for a in outside if shape_of(a.meta["val"]) == shape_of(stream) and a.meta["val"].dtype == stream.dtype
    ]
    if len(entries) != 1:
        raise UnsupportedGraphError(f"the first layer has {len(entries)} inputs like its output, not one")
    return [entries[0], *exits]


def _leaves(user: Node, layer: int, home: dict[Node, int | None]) -> bool:
    return user.op != "output" and user in home and home[user] != layer


def _downstream(nodes: Iterable[Node], seeds: set[Node]) -> set[Node]:
    """Nodes that depend on a seed."""
    found: set[Node] = set()
    for n in nodes:
        if any(a in seeds or a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def is_view(node: Node) -> bool:
    """Whether the node's value shares memory with its input, by the operator's schema."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _sink_views(nodes: Sequence[Node], region: dict[Node, int]) -> None:
    """Views cost nothing: those that one region alone reads are made there, so that what crosses is what they view.

    Parts cut out by computed positions stay: the part of this scale can be gathered by token, the whole cannot.
    """
    for n in reversed(nodes):
        readers = {region.get(u, _PROLOGUE) for u in n.users}
        by_position = n.target in _PARTS and any(is_scalar(a) for a in n.all_input_nodes)
        if region[n] == _PROLOGUE and (is_view(n) or not is_tensor(n)) and not by_position and len(readers) == 1:
            region[n] = readers.pop()
    for n in nodes:
        if region[n] == _PROLOGUE and not is_tensor(n):  # a list of tensors does not cross, its items do
            region.update(dict.fromkeys(n.users, _PROLOGUE))


def _output_args(gm: GraphModule) -> Sequence[object]:
    out = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    return out if isinstance(out, tuple | list) else (out,)


def _symbol_source(inputs: Iterable[Node]) -> Callable[[sympy.Symbol], tuple[Node, int]]:
    table: dict[sympy.Symbol, tuple[Node, int]] = {}
    for n in inputs:
        if is_tensor(n):
            for dim, e in enumerate(shape_of(n.meta["val"])):
                if e.is_Symbol:
                    table.setdefault(e, (n, dim))

    def find(symbol: sympy.Symbol) -> tuple[Node, int]:
        if symbol not in table:
            raise UnsupportedGraphError(f"no input has a dimension of size {symbol}", where="split_layers")
        return table[symbol]

    return find


def _extract(
    gm: GraphModule,
    members: Sequence[Node],
    outputs: Sequence[Node],
    find: Callable[[sympy.Symbol], tuple[Node, int]],
    first: Node | None = None,
) -> Piece:
    """Copy `members` of `gm` into a graph of their own; what they read becomes inputs, `first` the first of them."""
    inside = set(members)
    sizes = [a for n in members for a in n.all_input_nodes if is_scalar(a)]
    reads = [a for n in members for a in n.all_input_nodes if a not in inside and not is_scalar(a)]
    reads = [a for a in reads if a.op != "get_attr"]
    inputs = dict.fromkeys(([first] if first is not None else []) + reads + [o for o in outputs if o not in inside])
    known = {e for n in inputs if is_tensor(n) for e in shape_of(n.meta["val"]) if e.is_Symbol}
    for symbol in sorted({s for a in sizes for s in scalar_symbols(a)} - known, key=str):
        inputs.setdefault(find(symbol)[0])
    graph = Graph()
    copies: dict[Node, Node] = {}
    sources: dict[sympy.Symbol, tuple[Node, int]] = {}
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in_{i}")
        copies[node].meta["val"] = node.meta["val"]
        if is_tensor(node):
            for dim, e in enumerate(shape_of(node.meta["val"])):
                if e.is_Symbol:
                    sources.setdefault(e, (copies[node], dim))
    build = SizeBuilder(graph, sources.__getitem__)

    def copy(node: Node) -> Node:
        if is_size(node):
            return build(expr_of(node.meta["val"]))  # type: ignore[return-value]
        if node not in copies and (node.op == "get_attr" or is_scalar(node)):
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for n in members:
        copies[n] = graph.node_copy(n, copy)
    graph.output(tuple(copies[o] for o in outputs))
    return Piece(graph_module(gm, graph), tuple(n.name for n in inputs), tuple(o.name for o in outputs))


def graph_key(gm: GraphModule) -> str:
    """A hash of what a graph computes: operators, constants, input shapes and strides, symbols by order of appearance.

    Graphs of equal key compute the same function of their inputs, shape for shape; weights are inputs.
    """
    index = {n: i for i, n in enumerate(gm.graph.nodes)}
    symbols: dict[sympy.Symbol, str] = {}

    def size(value: object) -> str:
        e = expr_of(value)
        for s in sorted(e.free_symbols, key=str):
            symbols.setdefault(s, f"d{len(symbols)}")
        return str(e.xreplace({s: sympy.Symbol(name) for s, name in symbols.items()}))

    lines = []
    for n in gm.graph.nodes:
        args = torch.fx.map_arg((n.args, n.kwargs), lambda a: f"%{index[a]}")
        line = f"{n.op} {n.target if n.op == 'call_function' else ''} {args}"
        if n.op == "get_attr":
            line = f"constant {_content(getattr(gm, n.target))}"
        if n.op == "placeholder":
            v = n.meta.get("val")
            line = f"input {n.target}"
            if isinstance(v, Tensor):
                line = f"input {v.dtype} {v.device} {[size(d) for d in v.shape]} {[size(d) for d in v.stride()]}"
        lines.append(line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _content(constant: object) -> str:
    if not isinstance(constant, Tensor):
        return repr(constant)
    return f"{constant.dtype} {constant.device} {constant.tolist()}"
