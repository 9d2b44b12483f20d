"""Sizes as sympy expressions, read without adding guards, and turned back into graph nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._sympy.functions import FloorDiv

from toprovar_compile.errors import UnsupportedGraphError


def expr_of(size: object) -> sympy.Expr:
    """The sympy expression of a size, an int or a SymInt. Comparing expressions, unlike SymInts, adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape_of(value: Tensor) -> tuple[sympy.Expr, ...]:
    """The shape of a (fake) tensor as expressions."""
    return tuple(expr_of(size) for size in value.shape)


def symbols_of(value: Tensor) -> frozenset[sympy.Symbol]:
    """The symbols in the shape of a (fake) tensor."""
    return frozenset().union(*(e.free_symbols for e in shape_of(value)))


def is_tensor(node: Node) -> bool:
    """Whether the node's value is a tensor, by its meta."""
    return isinstance(node.meta.get("val"), Tensor)


def is_size(node: Node) -> bool:
    """Whether the node's value is a size (an int or a SymInt) and not a tensor."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def is_scalar(node: Node) -> bool:
    """Whether the node's value is one number: a size, or what was computed from sizes."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def scalar_symbols(node: Node) -> frozenset[sympy.Basic]:
    """The symbols that the number of an `is_scalar` node is made from."""
    value = node.meta["val"]
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
    return frozenset(value.node.expr.free_symbols) if symbolic else frozenset()


class SizeBuilder:
    """Builds size expressions as nodes of a graph, from the dimensions of its placeholders.

    `find` adds (or finds) a placeholder and its dimension that has the size of a symbol.
    """

    def __init__(self, graph: Graph, find: Callable[[sympy.Symbol], tuple[Node, int]]) -> None:
        self._graph, self._find = graph, find
        self._made: dict[sympy.Expr, Node | int] = {}

    def __call__(self, expr: sympy.Expr) -> Node | int:
        """The node (or int) whose value is `expr`. Raises UnsupportedGraphError for a form that is not known."""
        if expr not in self._made:
            self._made[expr] = self._build(expr)
        return self._made[expr]

    def _build(self, expr: sympy.Expr) -> Node | int:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            source, dim = self._find(expr)
            return self._call(torch.ops.aten.sym_size.int, source, dim)
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return reduce(lambda a, b: self._call(operator.mul, a, b), [self(expr.base)] * int(expr.exp))
        op = _OPERATORS.get(expr.func)
        if op is None:
            raise UnsupportedGraphError(
                f"the size {expr} cannot be computed inside a layer",
                where="passes.SizeBuilder",
                expected="sums, products and floor divisions of the sizes of its inputs",
            )
        return reduce(lambda a, b: self._call(op, a, b), [self(arg) for arg in expr.args])

    def _call(self, op: Any, *args: Node | int) -> Node:
        node = self._graph.call_function(op, args)
        values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        node.meta["val"] = values[0].shape[values[1]] if op is torch.ops.aten.sym_size.int else op(*values)
        return node


_OPERATORS: Mapping[Any, Any] = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}
