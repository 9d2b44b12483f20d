"""Make the graph of a layer that runs on K of its N tokens: gather, the layer at n = K, restore.

    Before: x1 = layer(x, inputs)
    After:  y = layer(gather(x, idx), inputs gathered where they carry tokens)
            x1 = scatter(x + delta, idx, y)      restore="cached": delta is the layer's older output minus input, on the
                                                 grid of x, or resized to it by tables (see `restore_tokens`)
            x1 = scatter(x, idx, y)              restore="identity"

Pre:  a layer graph with a proof of `prove_token_axis`, tokens in dimension 1 of the stream (B, N, C).
Post: inputs are x, idx (int64 (B, K)), if cached delta (B, N, C), or, resized, delta (B, M, C) and its tables, then the
      layer's other inputs; outputs as before, the first for all N tokens, further ones for the K kept.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.passes._graph import graph_module, output_values, placeholders
from toprovar_compile.passes._symbols import shape_of
from toprovar_compile.passes.prove_token_axis import TokenProof
from toprovar_compile.passes.restore_tokens import add_delta

aten = torch.ops.aten


def prune_tokens(gm: GraphModule, proof: TokenProof, *, cached: bool, resized: bool = False) -> GraphModule:
    """The pruned form of the layer `gm`, a new module; `resized` is read where it is `cached`.

    Inputs that came to the layer after its proof (`absorb_projections`) carry no tokens.
    Raises PassInvariantError without a proof.
    """
    if not proof.holds or proof.axes[0] != 1:
        raise PassInvariantError(f"the layer has no proof of token-equivariance: {proof.reason}", where="prune_tokens")
    graph = Graph()
    inner = placeholders(gm)
    x, idx = graph.placeholder("x"), graph.placeholder("idx")
    base = add_delta(graph, x, inner[0].meta["val"].dtype, resized=resized) if cached else x
    copies = {node: graph.placeholder(node.name) for node in inner[1:]}
    kept = graph.call_function(aten.sym_size.int, (idx, 1))
    copies[inner[0]] = _gather(graph, x, idx, kept, inner[0], 1)
    for node, axis in zip(inner[1:], proof.axes[1:], strict=False):
        if axis is not None:
            copies[node] = _gather(graph, copies[node], idx, kept, node, axis)
    for node in gm.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    first, *rest = output_values(gm)
    rows = _spread(graph, idx, kept, x, inner[0], 1)
    restored = graph.call_function(aten.scatter.src, (base, 1, rows, copies[first]))
    graph.output((restored, *(copies[o] for o in rest)))
    pruned = graph_module(gm, graph)
    pruned.graph.lint()
    return pruned


def _gather(graph: Graph, source: Node, idx: Node, kept: Node, like: Node, axis: int) -> Node:
    rows = _spread(graph, idx, kept, source, like, axis)
    if shape_of(like.meta["val"])[0] == 1:  # one for all samples, of which each has its own set
        batch = graph.call_function(aten.sym_size.int, (idx, 0))
        source = graph.call_function(aten.expand.default, (source, [batch] + [-1] * (like.meta["val"].ndim - 1)))
    return graph.call_function(aten.gather.default, (source, axis, rows))


def _spread(graph: Graph, idx: Node, kept: Node, source: Node, like: Node, axis: int) -> Node:
    """idx (B, K) in the shape of `source`, a value like that of `like`, with K tokens in dimension `axis`."""
    value = like.meta["val"]
    batch = graph.call_function(aten.sym_size.int, (idx, 0))
    view: list[Node | int] = [1] * value.ndim
    view[0], view[axis] = batch, kept
    shape: list[Node | int] = [batch, *(s if isinstance(s, int) else 0 for s in value.shape[1:])]
    shape[axis] = kept
    for d, size in enumerate(value.shape):
        if d not in (0, axis) and not isinstance(size, int):
            shape[d] = graph.call_function(aten.sym_size.int, (source, d))
    return graph.call_function(aten.expand.default, (graph.call_function(aten.view.default, (idx, view)), shape))
