"""What an attention in a graph is, however it is written: the words that the matchers and the rewriting share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch.fx import Node

from toprovar_compile.passes._torch_ir import fake, number


class SkipReason(Enum):
    """Why an attention was left as it is."""

    CAUSAL = "causal masking"
    DROPOUT = "dropout in the attention"
    GQA = "keys and values have other heads than the queries"
    WINDOW = "windowed attention"
    VARLEN = "packed sequences of different lengths"
    MULTI_USER = "the scores or probabilities are read elsewhere too"
    EXTRA_OUTPUT = "an output besides the attention itself is read"
    SCORE_MOD = "scores or probabilities pass through more than scales, biases and masks"
    SOFTMAX_DIM = "the softmax is not over the last dimension"
    LAYOUT = "the dimensions are not those of (batch, heads, tokens, head dim) in any known order"
    RANK = "the operands are not all of rank 3 or all of rank 4"
    BROADCAST = "the operands are not known to share their batch size and number of keys"
    HEAD_DIM = "the values have another width than the keys"
    MASK = "the mask or bias has a form that cannot be added to the scores"
    DTYPE = "the operands differ in precision"
    DYNAMIC_DIM = "the number of heads or their width is not a constant"
    NO_META = "a node has no example value"
    GRAD = "gradients are recorded"
    MUTATION = "memory is written between the first and the last step"
    STRIDES = "a reader needs a memory layout that cannot be restored"
    UNKNOWN_ARGUMENT = "an argument is not one of those known"
    UNSUPPORTED_FORM = "this attention function is not supported"


class Refusal(Exception):
    """An attention that cannot be rewritten; never leaves the pass."""

    def __init__(self, reason: SkipReason, node: Node) -> None:
        super().__init__(reason.value)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class View:
    """`node.select(*select).permute(order)`: an operand as (B, H, n, D) or (B, n, D), nothing emitted yet."""

    node: Node
    order: tuple[int, ...]
    select: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes behind `select` and `order`."""
        value = fake(self.node)
        assert value is not None  # `view` looked
        sizes = list(value.shape)
        if self.select:
            del sizes[self.select[0]]
        return tuple(sizes[d] for d in self.order)


@dataclass(frozen=True)
class Bias:
    """What is added to the scores: `weight * node`; for a boolean node, `weight * fill` where it blocks.

    A boolean node blocks where it is False, or with `keep=False` where it is True.
    """

    node: Node
    weight: float = 1.0
    fill: float | None = None
    keep: bool = True


Factor = tuple[Callable[..., Any], Node]  # (operator.mul or operator.truediv, what q is multiplied or divided by)


@dataclass(frozen=True)
class Form:
    """One attention as found: softmax(scale * q k^T + biases) v, permuted by `out_order`, is the value of `outs`.

    `scale` None is 1 / sqrt(D). `factors` are still to be applied to q. `chain` holds all nodes of the form, `node`
    being the last that computes; `product` is the node of q k^T where the graph has one.
    """

    node: Node
    outs: tuple[Node, ...]
    q: View
    k: View
    v: View
    chain: tuple[Node, ...]
    out_order: tuple[int, ...]
    scale: float | None = None
    factors: tuple[Factor, ...] = ()
    biases: tuple[Bias, ...] = ()
    product: Node | None = None


def expect(condition: bool, reason: SkipReason, node: Node) -> None:
    """Refuse the attention at `node` unless the condition holds."""
    if not condition:
        raise Refusal(reason, node)


def view(
    operand: object, node: Node, order: tuple[int, ...] | None = None, select: tuple[int, int] | None = None
) -> View:
    """The operand in its own order or a given one; refused without an example value or with another rank."""
    value = fake(operand)
    if value is None or not isinstance(operand, Node):
        raise Refusal(SkipReason.NO_META, node)
    rank = value.dim() - (select is not None)
    expect(rank in (3, 4) and (order is None or rank == len(order)), SkipReason.RANK, node)
    return View(operand, order if order is not None else tuple(range(rank)), select)


def swapped(rank: int) -> tuple[int, ...]:
    """The order that exchanges the last two dimensions."""
    return (*range(rank - 2), rank - 1, rank - 2)


def mask_argument(mask: object, node: Node) -> tuple[Bias, ...]:
    """The mask argument of a library function: boolean (True attends) or additive."""
    if mask is None:
        return ()
    if not isinstance(mask, Node):
        raise Refusal(SkipReason.MASK, node)
    value = fake(mask)
    if value is None:
        raise Refusal(SkipReason.NO_META, node)
    return (Bias(mask, fill=-math.inf if value.dtype == torch.bool else None),)


def with_scale(form: Form, scale: object) -> Form:
    """The form with the scale argument of a library function: None, a number, or a symbol that stays in the graph."""
    if scale is None or (value := number(scale)) is not None:
        return replace(form, scale=None if scale is None else value)
    if not isinstance(scale, Node) or fake(scale) is not None:
        raise Refusal(SkipReason.SCORE_MOD, form.node)
    return replace(form, scale=1.0, factors=(*form.factors, (operator.mul, scale)))
