"""Make the graph of a layer that is skipped: its tokens and what it added to them at an older scale.

    Before: x1 = layer(x, inputs)
    After:  x1 = x + resized                     resized = sum_j delta[:, rows[j]] * shares[j]

The resize is gathers and a sum, which Inductor fuses into the addition: nothing but the result is written.

Pre:  a layer graph, tokens in dimension 1 of the stream (B, N, C).
Post: inputs are x, delta (B, M, C), rows and shares, (4, N) both, of `policies.tokens.area_tables`.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch.fx import Graph, GraphModule, Node

from toprovar_compile.passes._graph import graph_module, placeholders

aten = torch.ops.aten
_TOUCHED = 4  # tokens of a smaller grid that one of a larger grid can touch


def restore_tokens(gm: GraphModule) -> GraphModule:
    """The skipped form of the layer `gm`, a new module."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((add_delta(graph, x, placeholders(gm)[0].meta["val"].dtype, resized=True),))
    return graph_module(gm, graph)


def add_delta(graph: Graph, x: Node, dtype: torch.dtype, *, resized: bool) -> Node:
    """x + delta, both of `dtype`; the input delta, and its tables if it is to be resized, are added to `graph`."""
    delta = graph.placeholder("delta")
    if resized:
        delta = _resized(graph, delta, graph.placeholder("rows"), graph.placeholder("shares"), dtype)
    return graph.call_function(aten.add.Tensor, (x, delta))


def _resized(graph: Graph, delta: Node, rows: Node, shares: Node, dtype: torch.dtype) -> Node:
    parts = []
    for j in range(_TOUCHED):
        row, share = (graph.call_function(aten.select.int, (table, 0, j)) for table in (rows, shares))
        part = graph.call_function(aten.index_select.default, (delta, 1, row))
        weight = graph.call_function(aten.unsqueeze.default, (share, 1))
        parts.append(graph.call_function(aten.mul.Tensor, (part, weight)))
    # Shares are float32, so the sum is; interpolation too rounds to the dtype of the map once, after it.
    total = reduce(lambda a, b: graph.call_function(aten.add.Tensor, (a, b)), parts)
    return graph.call_function(torch.ops.prims.convert_element_type.default, (total, dtype))
