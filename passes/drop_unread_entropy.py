"""Turn entropy off in attention whose entropy nobody reads.

    Before: a = fae(q, k, v, None, scale, True); out = a[0]
    After:  a = fae(q, k, v, None, scale, False); out = a[0]

Without entropy the operator is plain attention, the fastest one of the machine.

Pre:  attention is `toprovar::fae` or `toprovar::fae_cached`.   Post: entropy is on exactly where item 1 is read.
Invariant: every value that is read stays the same within rounding.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes._base import PassContext, PassReport
from toprovar_compile.passes._graph import graph_module


def drop_unread_entropy(gm: GraphModule, ctx: PassContext) -> PassReport:
    """Rewrite `gm` in place."""
    matched = 0
    for node in gm.graph.nodes:
        if node.target in (fae, fae_cached) and node.args[-1] and not _reads_entropy(node):
            node.args = (*node.args[:-1], False)
            matched += 1
    gm.recompile()
    return PassReport("drop_unread_entropy", matched)


def check_drop_unread_entropy(gm: GraphModule) -> None:
    """Raise PassInvariantError where entropy is on and unread, or off and read."""
    for node in gm.graph.nodes:
        if node.target in (fae, fae_cached) and bool(node.args[-1]) != _reads_entropy(node):
            raise PassInvariantError(f"{node.name} has entropy={node.args[-1]}", where="drop_unread_entropy")


def read_entropy(gm: GraphModule) -> GraphModule:
    """A copy of the layer graph `gm` that returns, after its first output, the entropy (B, n) of its self-attention.

    That is the attention on the layer's own cache, or the only one. Raises PassInvariantError when there is none.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    first = graph.graph_copy(gm.graph, copies)
    found = [n for n in gm.graph.nodes if n.target is fae_cached] or [n for n in gm.graph.nodes if n.target is fae]
    if len(found) != 1 or first is None:
        raise PassInvariantError(f"the layer has {len(found)} self-attentions", where="read_entropy")
    outputs = list(first) if isinstance(first, tuple | list) else [first]
    outputs.insert(1, graph.call_function(operator.getitem, (copies[found[0]], 1)))
    graph.output(tuple(outputs))
    return graph_module(gm, graph)


def _reads_entropy(node: Node) -> bool:
    return any(u.target is operator.getitem and u.args[1] == 1 and len(u.users) > 0 for u in node.users)
