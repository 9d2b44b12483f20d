"""A step cut at its residual stream computes what it did; a graph without such layers is refused with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from toprovar_compile.errors import PassInvariantError, UnsupportedGraphError
from toprovar_compile.kernels import fae
from toprovar_compile.passes import (
    Piece,
    SplitStep,
    check_split_layers,
    cut_shared,
    graph_key,
    placeholders,
    shape_of,
    split_layers,
    write_kv_cache,
)

aten = torch.ops.aten
Trace = Callable[..., GraphModule]
Values = Sequence[Any]


def run(split: SplitStep, inputs: Values) -> list[Any]:
    """The pieces in order."""
    known: dict[str, Any] = dict(zip(split.inputs, inputs, strict=True))
    for piece in (split.prologue, *(layer.piece for layer in split.layers), split.epilogue):
        outs = piece.graph(*(known[name] for name in piece.inputs))
        known.update(zip(piece.outputs, outs, strict=True))
    return [None if name is None else known[name] for name in split.outputs]


def count(gm: GraphModule, target: object) -> int:
    """Nodes that call `target`."""
    return sum(n.target is target for n in gm.graph.nodes)


def _example_inputs(step: GraphModule, tokens: int, prior: int) -> list[Any]:
    """Inputs of a step graph of a VAR: what is open is the number of tokens, or of those in the cache."""
    generator = torch.Generator().manual_seed(0)
    values = [n.meta["val"] for n in placeholders(step)]
    open_tokens = {str(v.shape[1]) for v in values if isinstance(v, Tensor) and v.ndim == 3}

    def size(n: Any) -> int:
        return n if isinstance(n, int) else (tokens if str(n) in open_tokens else prior)

    return [
        torch.randn([size(n) for n in v.shape], generator=generator) if isinstance(v, Tensor) else size(v)
        for v in values
    ]


class Build:
    """A functional step graph written by hand: nodes with example values and the module they come from."""

    def __init__(self) -> None:
        self.mode, self.graph = FakeTensorMode(), Graph()
        with self.mode:
            self.x = self.input("x", torch.empty(2, 3, 4))

    def input(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, path: str, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        given = torch.fx.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*given)
        if path:
            node.meta["nn_module_stack"] = {path: (f"L['self'].{path}", torch.nn.Module)}
        return node

    def attention(self, path: str, x: Node) -> Node:
        """softmax(x x^T) x in the module `path`."""
        heads = self.call(path, aten.unsqueeze.default, x, 1)
        both = self.call(path, fae, heads, heads, heads, None, 0.5, True)
        return self.call(path, aten.squeeze.dims, self.call(path, operator.getitem, both, 0), [1])

    def block(self, path: str, x: Node) -> Node:
        """x + attention(x)."""
        return self.call(path, aten.add.Tensor, x, self.attention(path + ".attn", x))

    def done(self, x: Node, root: torch.nn.Module | None = None) -> GraphModule:
        """The graph that returns head(x)."""
        self.graph.output((self.call("head", aten.mul.Tensor, x, 3.0),))
        return GraphModule(root or torch.nn.Module(), self.graph)


def _two_blocks() -> GraphModule:
    b = Build()
    x = b.block("blocks.1", b.block("blocks.0", b.call("", aten.mul.Tensor, b.x, 2.0)))
    return b.done(x)


# by hand


def test_pieces_of_a_small_graph() -> None:
    gm = _two_blocks()
    before = str(gm.graph)
    split = split_layers(gm)
    check_split_layers(gm, split)
    assert str(gm.graph) == before
    assert [layer.name for layer in split.layers] == ["blocks.0", "blocks.1"]
    assert [count(layer.piece.graph, fae) for layer in split.layers] == [1, 1]
    assert [count(p.graph, aten.mul.Tensor) for p in (split.prologue, split.epilogue)] == [1, 1]
    assert count(split.prologue.graph, aten.add.Tensor) == count(split.epilogue.graph, aten.add.Tensor) == 0
    assert len({graph_key(layer.piece.graph) for layer in split.layers}) == 1
    x = torch.randn(2, 3, 4)
    assert torch.equal(run(split, [x])[0], gm(x)[0])


def test_splitting_again_gives_the_same() -> None:
    gm = _two_blocks()
    first, second = split_layers(gm), split_layers(gm)
    assert [graph_key(a.piece.graph) for a in first.layers] == [graph_key(a.piece.graph) for a in second.layers]


def test_nodes_of_no_module_belong_where_they_are_used() -> None:
    b = Build()
    x = b.x
    for path in ("blocks.0", "blocks.1"):
        x = b.block(path, b.call("", aten.mul.Tensor, b.call(path, aten.add.Tensor, x, 1.0), 2.0))
    gm = b.done(x)
    split = split_layers(gm)
    assert [count(layer.piece.graph, aten.mul.Tensor) for layer in split.layers] == [1, 1]
    x = torch.randn(2, 3, 4)
    assert torch.equal(run(split, [x])[0], gm(x)[0])


def test_constants_come_along_and_are_part_of_the_key() -> None:
    b = Build()
    x, gains = b.x, [torch.arange(4.0), torch.ones(4)]
    for i, path in enumerate(("blocks.0", "blocks.1")):
        gain = b.graph.get_attr(f"gain_{i}")
        with b.mode:
            gain.meta["val"] = torch.empty(4)
        x = b.block(path, b.call(path, aten.mul.Tensor, x, gain))
    root = torch.nn.Module()
    for i, gain in enumerate(gains):
        root.register_buffer(f"gain_{i}", gain)
    gm = b.done(x, root)
    split = split_layers(gm)
    check_split_layers(gm, split)
    keys = [graph_key(layer.piece.graph) for layer in split.layers]
    assert keys[0] != keys[1]
    x = torch.randn(2, 3, 4)
    assert torch.equal(run(split, [x])[0], gm(x)[0])


def test_views_of_an_input_are_made_in_the_layer_that_reads_them() -> None:
    b = Build()
    with b.mode:
        conditions = [b.input(f"c{i}", torch.empty(2, 4)) for i in range(2)]
    x = b.x
    for path, c in zip(("blocks.0", "blocks.1"), conditions, strict=True):
        x = b.block(path, b.call(path, aten.add.Tensor, x, b.call(path, aten.unsqueeze.default, c, 1)))
    split = split_layers(b.done(x))
    assert [count(layer.piece.graph, aten.unsqueeze.default) for layer in split.layers] == [2, 2]
    assert [layer.piece.inputs[1] for layer in split.layers] == ["c0", "c1"]


def _no_attention() -> GraphModule:
    b = Build()
    return b.done(b.call("blocks.0", aten.mul.Tensor, b.x, 2.0))


def _unnumbered() -> GraphModule:
    b = Build()
    return b.done(b.block("second", b.block("first", b.x)))


def _one_layer() -> GraphModule:
    b = Build()
    return b.done(b.block("blocks.0", b.x))


def _two_streams() -> GraphModule:
    b = Build()
    first = b.attention("blocks.0", b.x)
    other = b.call("blocks.0", aten.mul.Tensor, first, 2.0)
    return b.done(b.call("blocks.1", aten.add.Tensor, b.attention("blocks.1", first), other))


def _long_skip() -> GraphModule:
    b = Build()
    first = b.block("blocks.0", b.x)
    x = b.block("blocks.2", b.block("blocks.1", first))
    return b.done(b.call("blocks.2", aten.add.Tensor, x, first))


def _two_entries() -> GraphModule:
    b = Build()
    with b.mode:
        other = b.input("other", torch.empty(2, 3, 4))
    x = b.block("blocks.0", b.call("blocks.0", aten.add.Tensor, b.x, other))
    return b.done(b.block("blocks.1", x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_no_attention, "the graph has no attention"),
        (_unnumbered, "no attention lies in a numbered submodule"),
        (_one_layer, "no attention lies in a numbered submodule"),
        (_two_streams, "layer 0 passes .* on, not one tensor"),
        (_long_skip, "blocks.2 reads add_tensor, made by blocks.0"),
        (_two_entries, "the first layer has 2 inputs like its output, not one"),
    ],
)
def test_refusals(make: Callable[[], GraphModule], reason: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=reason):
        split_layers(make())


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda s: replace(s, layers=s.layers[:1]), "1 of 2 attentions lie in layers"),
        (lambda s: replace(s, layers=s.layers[::-1]), "is read before it is made"),
        (lambda s: replace(s, outputs=("nobody",)), "the output nobody is made by no piece"),
        (lambda s: replace(s, prologue=replace(s.prologue, outputs=())), "is read before it is made"),
    ],
)
def test_checker_raises(corrupt: Callable[[SplitStep], SplitStep], message: str) -> None:
    gm = _two_blocks()
    with pytest.raises(PassInvariantError, match=message):
        check_split_layers(gm, corrupt(split_layers(gm)))


# through Dynamo and AOT


@pytest.mark.parametrize(("index", "prior"), [(0, 0), (1, 1), (2, 5)])
def test_a_var(steps: list[GraphModule], index: int, prior: int) -> None:
    gm = steps[index]
    split = split_layers(gm)
    check_split_layers(gm, split)
    assert [layer.name for layer in split.layers] == ["blocks.0", "blocks.1"]
    assert [count(layer.piece.graph, fae) for layer in split.layers] == [1, 1]
    assert count(gm, fae) == 2
    assert [len(layer.piece.outputs) for layer in split.layers] == [3, 3], "the stream, keys and values"
    assert not any(n.op == "placeholder" and not isinstance(n.meta["val"], Tensor) for n in _all_nodes(split))
    inputs = _example_inputs(gm, tokens=7, prior=prior)
    for got, want in zip(run(split, inputs), gm(*inputs), strict=True):
        assert torch.equal(got, want)


def _all_nodes(split: SplitStep) -> list[Node]:
    return [n for layer in split.layers for n in layer.piece.graph.graph.nodes]


def test_layers_of_a_var_are_one_class(steps: list[GraphModule]) -> None:
    keys = []
    for step in steps:
        split = split_layers(step)
        for layer in split.layers:
            write_kv_cache(layer.piece.graph)
        keys.append({graph_key(layer.piece.graph) for layer in split.layers})
    assert [len(k) for k in keys] == [1, 1, 1]
    assert keys[0] != keys[1] == keys[2], "with the cache in a buffer later scales have one graph"


def test_the_modulation_is_computed_before_the_layers(steps: list[GraphModule]) -> None:
    split = split_layers(steps[2])
    for target, times in ((aten.add.Tensor, 7), (aten.silu.default, 1)):
        assert count(split.prologue.graph, target) == times
    assert [count(layer.piece.graph, aten.silu.default) for layer in split.layers] == [0, 0]
    tokens = shape_of(placeholders(split.layers[0].piece.graph)[0].meta["val"])[1]
    assert not any(tokens in shape_of(n.meta["val"]) for n in placeholders(split.prologue.graph))


@pytest.mark.parametrize("fixed", [range(0), range(0, 99, 2), range(1, 99, 2), range(99)])
def test_what_some_inputs_alone_make_is_cut_off_the_prologue(steps: list[GraphModule], fixed: range) -> None:
    gm = steps[2]
    prologue = split_layers(gm).prologue
    names = {name for i, name in enumerate(prologue.inputs) if i in fixed}
    weights, rest = cut_shared(prologue, names)
    assert set(weights.inputs) <= names and rest.outputs == prologue.outputs
    assert bool(weights.outputs) == bool(names)
    env = dict(zip([n.name for n in placeholders(gm)], _example_inputs(gm, tokens=7, prior=5), strict=True))
    want = prologue.graph(*(env[name] for name in prologue.inputs))
    env.update(zip(weights.outputs, weights.graph(*(env[name] for name in weights.inputs)), strict=True))
    for got, value in zip(rest.graph(*(env[name] for name in rest.inputs)), want, strict=True):
        assert torch.equal(got, value)


def test_what_is_read_only_with_one_condition_is_made_with_it() -> None:
    b = Build()
    with b.mode:
        names = ("w0", "w1", "w2", "w3", "c", "d")
        *weights, c, d = (b.input(name, torch.empty(4)) for name in names)
    casts = [b.call("", aten.neg.default, b.call("", aten.exp.default, w)) for w in weights]
    results = [
        casts[0],
        b.call("", aten.mul.Tensor, casts[1], c),
        b.call("", aten.add.Tensor, b.call("", aten.mul.Tensor, casts[2], c), b.call("", aten.mul.Tensor, casts[2], d)),
        b.call("", aten.mul.Tensor, casts[3], b.call("", aten.mul.Tensor, c, d)),
    ]
    b.graph.output(tuple(results))
    prologue = Piece(GraphModule(torch.nn.Module(), b.graph), ("x", *names), tuple(n.name for n in results))
    kept, rest = cut_shared(prologue, names[:4], ("c", "d"))
    assert kept.inputs == ("w0", "w2", "w3"), "w1 is read with c alone"
    with_c, rest = cut_shared(rest, {*names[:4], *kept.outputs, "c"})
    with_d, rest = cut_shared(rest, {*names[:4], *kept.outputs, "d"})
    assert [sorted(set(p.inputs) & set(names)) for p in (with_c, with_d)] == [["c", "w1"], ["d"]]
    values = torch.randn(7, 4)
    env = dict(zip(("x", *names), values, strict=True))
    for piece in (kept, with_c, with_d, rest):
        env.update(zip(piece.outputs, piece.graph(*(env[name] for name in piece.inputs)), strict=True))
    for name, want in zip(prologue.outputs, prologue.graph(*values), strict=True):
        assert torch.equal(env[name], want)


def test_lists_and_their_items_are_made_together() -> None:
    b = Build()
    with b.mode:
        w, c = b.input("w", torch.empty(4)), b.input("c", torch.empty(2))
    halves = b.call("", aten.split.Tensor, w, 2)
    first, second = (b.call("", operator.getitem, halves, i) for i in range(2))
    results = [b.call("", aten.mul.Tensor, first, c), second]
    b.graph.output(tuple(results))
    prologue = Piece(GraphModule(torch.nn.Module(), b.graph), ("x", "w", "c"), tuple(n.name for n in results))
    kept, rest = cut_shared(prologue, ("w",), ("c",))
    assert kept.inputs == ("w",) and rest.inputs == (kept.outputs[0], "c", kept.outputs[1])


# keys


def _key(trace: Trace, layer: Callable[..., Any], *inputs: Tensor, open_sizes: Sequence[int] = ()) -> str:
    return graph_key(trace(layer, inputs, open_sizes))


def test_key(trace: Trace) -> None:
    x = torch.randn(2, 5, 8)
    key = _key(trace, lambda x: x * 2.0, x)
    assert _key(trace, lambda y: 2.0 * y, x.clone()) == key
    others = [
        _key(trace, lambda x: x * 2.5, x),
        _key(trace, lambda x: x + 2.0, x),
        _key(trace, lambda x: x * 2.0, x.double()),
        _key(trace, lambda x: x * 2.0, x[:, :4]),
        _key(trace, lambda x: x * 2.0, x.transpose(0, 1).contiguous().transpose(0, 1)),
        _key(trace, lambda x: x * 2.0, x, open_sizes=(5,)),
    ]
    assert len({key, *others}) == 7


def test_key_of_open_sizes(trace: Trace) -> None:
    a, b = torch.randn(2, 5, 8), torch.randn(3, 5, 8)
    assert _key(trace, torch.sin, a, open_sizes=(5,)) == _key(trace, torch.sin, a[:, :4].contiguous(), open_sizes=(4,))
    assert _key(trace, torch.sin, a, open_sizes=(5,)) != _key(trace, torch.sin, b, open_sizes=(3, 5))
