"""Attention written out: a product, scales, biases and masks, a softmax, and a product with the values.

    scores = q @ k.transpose(-2, -1) * c + bias;  p = softmax(scores, -1);  out = p @ v

The products may be matmul, bmm, baddbmm or einsum; casts, copies and dropout with probability 0 may stand anywhere.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from toprovar_compile.passes._attention import Bias, Factor, Form, Refusal, SkipReason, View, expect, swapped, view
from toprovar_compile.passes._torch_ir import all_same, arguments, fake, mutates, number, op_name, permutation, same

_NEGLIGIBLE = -1e4  # scores filled with this or less have probability 0 beside any other
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach")


def match_softmax(node: Node) -> Form | None:
    """The attention around a softmax; None when the softmax does not stand between two products."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, Node) or not _reaches_product(source, 8) or not _feeds_product(node, 4):
        return None
    value = fake(node)
    if value is None:
        raise Refusal(SkipReason.NO_META, node)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    expect(dim in (-1, value.dim() - 1), SkipReason.SOFTMAX_DIM, node)
    s, m = _match_scores(source), _match_mixing(node)
    chain = (*s.chain, node, *m.chain)
    return Form(m.node, (m.node,), s.q, s.k, m.v, chain, m.out_order, s.scale, s.factors, s.biases, s.product)


def is_cast(node: Node) -> bool:
    """True for conversions between floating types on one device, and for copies."""
    if op_name(node) not in _CASTS:
        return False
    before, after = fake(node.args[0]), fake(node)
    if before is None or after is None:
        return False
    return before.device == after.device and before.is_floating_point() and after.is_floating_point()


@dataclass(frozen=True)
class _Scores:
    """The part up to the softmax."""

    product: Node
    q: View
    k: View
    scale: float
    factors: tuple[Factor, ...]
    biases: tuple[Bias, ...]
    chain: tuple[Node, ...]


@dataclass(frozen=True)
class _Step:
    """One operation on the scores: its value is `source` times `factor` or `tensor`, plus `bias`."""

    source: Node
    factor: float = 1.0
    tensor: Factor | None = None
    bias: Bias | None = None


def _match_scores(node: Node) -> _Scores:
    """From the input of the softmax up to the product of queries and keys."""
    scale = 1.0
    factors: list[Factor] = []
    biases: list[Bias] = []
    chain: list[Node] = []

    def add(bias: Bias) -> None:
        # Walking up, what was seen so far is applied after the bias, so to the bias as well.
        expect(not factors and (bias.fill is None or scale > 0), SkipReason.SCORE_MOD, node)
        biases.append(replace(bias, weight=bias.weight * scale))

    while (product := _PRODUCTS.get(op_name(node))) is None:
        match_step = _STEPS.get(op_name(node))
        step = match_step(node) if match_step and "out" not in node.kwargs else None
        if step is None:
            raise Refusal(SkipReason.SCORE_MOD, node)
        expect(len(node.users) == 1, SkipReason.MULTI_USER, node)
        if step.bias:
            add(step.bias)
        if step.tensor:
            factors.append(step.tensor)
        scale *= step.factor
        chain.append(node)
        node = step.source
    expect(len(node.users) == 1, SkipReason.MULTI_USER, node)
    found = product(node)
    if found.bias:
        add(found.bias)
    chain.append(node)
    return _Scores(node, found.q, found.k, scale * found.scale, tuple(factors), tuple(biases), tuple(reversed(chain)))


def _step_scale(node: Node) -> _Step | None:
    a, b = _operands(node)
    dividing = "div" in op_name(node)
    if node.kwargs.get("rounding_mode") is not None:
        return None
    if isinstance(a, Node) and (c := number(b)):
        return _Step(a, 1 / c if dividing else c)
    if isinstance(b, Node) and (c := number(a)) and not dividing:
        return _Step(b, c)
    if isinstance(a, Node) and isinstance(b, Node) and _is_symbol(b):
        return _Step(a, tensor=(operator.truediv if dividing else operator.mul, b))
    trunk, other = _trunk(node, a, b)
    value = fake(other)
    if trunk is None or value is None or (dividing and trunk is not a):
        return None
    if value.dim() > 0 and not same(value.shape[-1], 1):
        return None  # differs from key to key: it cannot move to the queries
    return _Step(trunk, tensor=(operator.truediv if dividing else operator.mul, other))


def _step_bias(node: Node) -> _Step | None:
    a, b = _operands(node)
    if node.kwargs.get("alpha", 1) != 1:
        return None
    subtracting = "sub" in op_name(node)
    # Softmax does not change when all scores of a row move together.
    if isinstance(a, Node) and (number(b) is not None or _is_symbol(b)):
        return _Step(a)
    if isinstance(b, Node) and number(a) is not None and not subtracting:
        return _Step(b)
    trunk, other = _trunk(node, a, b)
    if trunk is None or (subtracting and trunk is not a):
        return None
    return _Step(trunk, bias=Bias(other, -1.0 if subtracting else 1.0))


def _step_masked_fill(node: Node) -> _Step | None:
    a = arguments(node, "input", "mask", "value")
    source, mask, value = a.get("input"), a.get("mask"), _fill(a.get("value"))
    if not isinstance(source, Node) or not isinstance(mask, Node) or value is None or not _same_shape(source, node):
        return None
    return _Step(source, bias=Bias(mask, fill=value, keep=False))


def _step_where(node: Node) -> _Step | None:
    mask, yes, no = (*node.args, None, None, None)[:3]
    if node.op == "call_method" or not isinstance(mask, Node):
        return None
    for source, other, keep in ((yes, no, True), (no, yes, False)):
        value = _fill(other)
        if isinstance(source, Node) and value is not None and _same_shape(source, node):
            return _Step(source, bias=Bias(mask, fill=value, keep=keep))
    return None


def _step_cast(node: Node) -> _Step | None:
    source = node.args[0]
    return _Step(source) if isinstance(source, Node) and is_cast(node) else None


_STEPS: dict[str, Callable[[Node], _Step | None]] = {
    **dict.fromkeys(("mul", "imul", "mul_", "multiply", "truediv", "div", "itruediv", "div_"), _step_scale),
    **dict.fromkeys(("add", "iadd", "add_", "sub", "isub", "sub_"), _step_bias),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _step_masked_fill),
    **dict.fromkeys(_CASTS, _step_cast),
    "where": _step_where,
}


def _fill(value: object) -> float | None:
    """A number that stands for `blocked`."""
    return float(value) if isinstance(value, int | float) and value <= _NEGLIGIBLE else None


def _operands(node: Node) -> tuple[object, object]:
    """The two operands of a binary operation, whatever its spelling calls them."""
    both = (*node.args, *(node.kwargs[k] for k in ("input", "other", "mat2") if k in node.kwargs))
    return (both[0], both[1]) if len(both) > 1 else (None, None)


def _trunk(node: Node, a: object, b: object) -> tuple[Node | None, Any]:
    """(the scores, the other operand) of an operation on two nodes, (None, None) when neither came from a product."""
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None, None
    fits = [x for x in (a, b) if _same_shape(x, node) and _reaches_product(x, 8)]
    if not fits or (mutates(node) and fits[0] is not a):  # in place: the first operand is written to
        return None, None
    return fits[0], b if fits[0] is a else a


def _same_shape(a: Node, b: Node) -> bool:
    x, y = fake(a), fake(b)
    return x is not None and y is not None and all_same(x.shape, y.shape)


def _is_symbol(value: object) -> bool:
    example = value.meta.get("example_value") if isinstance(value, Node) else None
    return isinstance(example, torch.SymInt | torch.SymFloat)


@dataclass(frozen=True)
class _Mixing:
    """The part behind the softmax: `node` is the product of probabilities and values."""

    node: Node
    v: View
    out_order: tuple[int, ...]
    chain: tuple[Node, ...]


def _match_mixing(node: Node) -> _Mixing:
    """From the softmax down to the product of probabilities and values."""
    chain: list[Node] = []
    transposed = False
    while True:
        expect(len(node.users) == 1, SkipReason.MULTI_USER, node)
        user = next(iter(node.users))
        chain.append(user)
        if op_name(user) in _PRODUCTS:
            v, out_order = _values(user, node, transposed)
            return _Mixing(user, v, out_order, tuple(chain))
        if (turned := permutation(user)) is not None:
            expect(turned[1] == swapped(len(turned[1])), SkipReason.LAYOUT, user)
            transposed = not transposed
        elif "dropout" in op_name(user):
            a = arguments(user, "input", "p", "training")
            expect(a.get("training", True) is False or number(a.get("p", 0.5)) == 0, SkipReason.DROPOUT, user)
        else:
            expect(is_cast(user), SkipReason.SCORE_MOD, user)
        node = user


def _values(node: Node, probabilities: Node, transposed: bool) -> tuple[View, tuple[int, ...]]:
    """The values of a product with the probabilities, and the order that takes (..., n, D) to its output."""
    if op_name(node) == "einsum":
        expect(not transposed, SkipReason.LAYOUT, node)
        return _einsum_values(node, probabilities)
    a, b = _operands(node)
    usual = a is probabilities and not transposed
    turned = b is probabilities and transposed  # v^T p^T = (p v)^T
    expect(op_name(node) != "baddbmm" and usual != turned, SkipReason.LAYOUT, node)
    values, p = view(b if usual else a, node), view(probabilities, node)
    expect(len(values.order) == len(p.order), SkipReason.RANK, node)
    order = values.order if usual else swapped(len(values.order))
    return replace(values, order=order), order


@dataclass(frozen=True)
class _Product:
    """q k^T * scale + bias."""

    q: View
    k: View
    scale: float = 1.0
    bias: Bias | None = None


def _product_matmul(node: Node) -> _Product:
    a, b = _operands(node)
    q, k = view(a, node), view(b, node)
    expect(len(q.order) == len(k.order), SkipReason.RANK, node)
    return _Product(q, replace(k, order=swapped(len(k.order))))


def _product_baddbmm(node: Node) -> _Product:
    a = arguments(node, "input", "batch1", "batch2")
    beta, alpha = number(a.get("beta", 1)), number(a.get("alpha", 1))
    if beta is None or alpha is None:
        raise Refusal(SkipReason.SCORE_MOD, node)
    q, k = view(a["batch1"], node), view(a["batch2"], node)
    return _Product(q, replace(k, order=swapped(3)), alpha, Bias(a["input"], beta) if beta else None)


def _product_einsum(node: Node) -> _Product:
    left, right, a, b, out = _einsum(node)
    *batch, query, key = out
    if query in b and key in a:
        left, right, a, b = right, left, b, a
    shared = (set(a) & set(b)) - set(out)
    fits = len(shared) == 1 and set(batch) < set(a) & set(b) and query not in b and key not in a
    expect(fits and query in a and key in b, SkipReason.LAYOUT, node)
    q = view(left, node, _positions(a, *batch, query, *shared))
    return _Product(q, view(right, node, _positions(b, *batch, key, *shared)))


_PRODUCTS: dict[str, Callable[[Node], _Product]] = {
    "matmul": _product_matmul,
    "bmm": _product_matmul,
    "baddbmm": _product_baddbmm,
    "einsum": _product_einsum,
}


def _einsum_values(node: Node, probabilities: Node) -> tuple[View, tuple[int, ...]]:
    left, right, a, b, out = _einsum(node)
    if right is probabilities and left is not probabilities:
        left, right, a, b = right, left, b, a
    *batch, query, key = a
    width = set(b) - set(a)
    fits = left is probabilities and len(width) == 1
    expect(fits and set(b) == {*batch, key, *width} and set(out) == {*batch, query, *width}, SkipReason.LAYOUT, node)
    return view(right, node, _positions(b, *batch, key, *width)), _positions((*batch, query, *width), *out)


def _einsum(node: Node) -> tuple[object, object, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The two operands of an einsum and the labels of both and of the output, `...` written out."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    text = str(equation).replace(" ", "")
    expect("->" in text and len(operands) == 2 and text.count(",") == 1, SkipReason.LAYOUT, node)
    values = [x for x in map(fake, operands) if x is not None]
    expect(len(values) == 2, SkipReason.NO_META, node)
    sides, out = text.split("->")
    parts = sides.split(",")
    hidden = {x.dim() - len(p.replace("...", "")) for x, p in zip(values, parts, strict=True)}
    expect("..." not in text or len(hidden) == 1, SkipReason.LAYOUT, node)
    free = "".join(c for c in string.ascii_letters if c not in text)
    a, b, c = (tuple(p.replace("...", free[: max(hidden)])) for p in (*parts, out))
    expect(all(len(set(w)) == len(w) for w in (a, b, c)), SkipReason.LAYOUT, node)
    expect(len(a) == len(b) == len(c) and len(a) in (3, 4), SkipReason.RANK, node)
    return operands[0], operands[1], a, b, c


def _positions(labels: Iterable[str], *wanted: str) -> tuple[int, ...]:
    labels = list(labels)
    return tuple(labels.index(w) for w in wanted)


def _reaches_product(node: Node, depth: int) -> bool:
    """True when a value of the node's shape came out of a product at most `depth` operations earlier."""
    if op_name(node) in _PRODUCTS:
        return True
    if depth == 0:
        return False
    reshaping = op_name(node) in ("view", "reshape")
    return any((reshaping or _same_shape(x, node)) and _reaches_product(x, depth - 1) for x in node.all_input_nodes)


def _feeds_product(node: Node, depth: int) -> bool:
    """True when the value, its shape at most permuted, goes into a product at most `depth` operations later."""
    if any(op_name(u) in _PRODUCTS for u in node.users):
        return True
    onward = (u for u in node.users if _same_shape(u, node) or permutation(u) is not None)
    return depth > 0 and any(_feeds_product(u, depth - 1) for u in onward)
