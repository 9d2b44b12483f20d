"""Small readings and edits of FX graphs that several passes need."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule


def placeholders(gm: GraphModule) -> list[Node]:
    """The inputs of the graph, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def output_values(gm: GraphModule) -> list[Node]:
    """The values that the graph returns, in order; constants are left out."""
    out = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    return [a for a in (out if isinstance(out, tuple | list) else (out,)) if isinstance(a, Node)]


def add_inputs(gm: GraphModule, names: Sequence[str]) -> list[Node]:
    """Append inputs to the graph."""
    added = []
    for name in names:
        present = placeholders(gm)
        before = gm.graph.inserting_after(present[-1]) if present else gm.graph.inserting_before()
        with before:
            added.append(gm.graph.placeholder(name))
    return added


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of the graph on the same module, to be rewritten without touching `gm`."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return graph_module(gm, graph)


def graph_module(root: nn.Module, graph: Graph) -> GraphModule:
    """A module of `graph` with what it reads of `root`; its Python code is made when it is called, if ever."""
    return _LazyGraphModule(root, graph)


def cat_operands(node: object) -> tuple[Node, Node] | None:
    """The two operands of a concatenation along dimension 2 (the tokens of (B, H, n, D)), None for anything else."""
    if not isinstance(node, Node) or node.target is not torch.ops.aten.cat.default:
        return None
    tensors = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(tensors, list | tuple) or len(tensors) != 2 or dim not in (2, -2):
        return None
    first, second = tensors
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else None


def compact(gm: GraphModule, inputs: Collection[Node] = ()) -> None:
    """Remove what nothing reads, the given inputs with it, and make the module's code anew."""
    gm.graph.eliminate_dead_code()
    for node in inputs:
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
