"""Turn every form of attention into the one operator `toprovar::fae`, which also returns its entropy.

Why for VAR: which tokens, layers and scales are pruned is decided by the entropy of attention rows, and every later
pass looks for this operator only. It runs on the Dynamo graph, where attention still looks as it was written.

    Before: out = scaled_dot_product_attention(q, k, v, attn_mask = bias, scale = 0.125)
    After:  fae = torch.ops.toprovar.fae.default(q, k, v, bias, 0.125, True);  out = fae[0]

    Before: kt = k.transpose(-2, -1);  s = q @ kt;  s = s * 0.125;  p = s.softmax(-1);  out = p @ v
    After:  fae = torch.ops.toprovar.fae.default(q, k, v, None, 0.125, True);  out = fae[0]

Pre:  Dynamo graph; tensors have meta["example_value"].   Post: no attention remains but those counted as skipped.
Invariant: values stay the same within rounding, and so do shapes, dtypes and, for whoever can tell, strides; only rows
that attend to nothing become 0 where a softmax written out gave nan. No guard is added, no operand is copied.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae
from toprovar_compile.passes._attention import Bias, Form, Refusal, SkipReason, View, expect
from toprovar_compile.passes._attention_calls import CALLS
from toprovar_compile.passes._attention_chains import is_cast, match_softmax
from toprovar_compile.passes._base import PassContext, PassReport
from toprovar_compile.passes._torch_ir import (
    Emitter,
    all_same,
    differ,
    evaluate,
    fake,
    mutates,
    number,
    op_name,
    permutation,
    same,
    same_strides,
    user_line,
)

__all__ = ["SkipReason", "attention_forms", "check_rewrite_attention", "rewrite_attention"]

FORMS: dict[str, Callable[[Node], Form | None]] = CALLS | {"softmax": match_softmax}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOWEST = -1e20  # a finite fill stays above what the kernels take for -inf: a fully filled row is uniform, not 0
_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "transpose", "permute")


def rewrite_attention(gm: GraphModule, ctx: PassContext) -> PassReport:
    """Rewrite `gm` in place."""
    matched, skipped, notes = 0, Counter[Enum](), []
    writes = [n for n in gm.graph.nodes if mutates(n)]
    gone: set[Node] = set()
    for node in list(gm.graph.nodes):
        if node in gone or op_name(node) not in FORMS:
            continue
        try:
            site = _match(node, writes)
            if site is not None:
                gone |= _rewrite(site)
                writes = [n for n in writes if n not in gone]
                matched += 1
        except Refusal as refusal:
            skipped[refusal.reason] += 1
            notes.append(f"{node.name} {user_line(node)}: {refusal.reason.value} (at {refusal.node.name})")
    if matched:
        gm.recompile()
    return PassReport("rewrite_attention", matched, skipped, tuple(notes))


def attention_forms(gm: GraphModule) -> Counter[str]:
    """How often each form of attention stands in a captured graph, by the name of its call."""
    return Counter(op_name(n) for n in gm.graph.nodes if op_name(n) in FORMS)


def check_rewrite_attention(gm: GraphModule) -> None:
    """Raise PassInvariantError where an operator is malformed or an attention remains that could be rewritten."""
    writes = [n for n in gm.graph.nodes if mutates(n)]
    for node in list(gm.graph.nodes):
        if node.target is fae:
            problem, expected = _defect(node)
        elif op_name(node) in FORMS and _rewritable(node, writes):
            problem, expected = f"{op_name(node)} is left", "every form of attention as toprovar::fae"
        else:
            continue
        if problem:
            line = user_line(node)
            where = f"rewrite_attention: node {node.name}" + (f", user code {line}" if line else "")
            raise PassInvariantError(
                problem, where=where, expected=expected, todo="look at the dump of the pass that ran last"
            )


def _rewritable(node: Node, writes: list[Node]) -> bool:
    try:
        site = _match(node, writes)
        if site is not None:
            _emit(site)[0].undo()
        return site is not None
    except Refusal:
        return False


def _defect(node: Node) -> tuple[str, str]:
    """(what is wrong with a fae node, what was expected), or empty strings."""
    if len(node.args) != 6 or node.kwargs:
        return f"{len(node.args)} positional arguments", "6: q, k, v, bias, scale, entropy"
    q, k, v = (fake(x) for x in node.args[:3])
    if q is None or k is None or v is None:
        return "an operand has no example value", 'meta["example_value"] on every node'
    keys_fit = k.dim() == 4 == q.dim() and all_same((*q.shape[:2], q.shape[3]), (*k.shape[:2], k.shape[3]))
    values_fit = k.dim() == v.dim() and not any(differ(x, y) for x, y in zip(k.shape, v.shape, strict=True))
    if not keys_fit or not values_fit:
        return f"operands of shapes {[tuple(x.shape) for x in (q, k, v)]}", "(B, H, n, D) and twice (B, H, m, D)"
    if not q.dtype == k.dtype == v.dtype:
        return f"operands of dtypes {q.dtype}, {k.dtype}, {v.dtype}", "one dtype"
    if not isinstance(node.args[4], float) or not isinstance(node.args[5], bool):
        return f"scale {node.args[4]!r} and entropy {node.args[5]!r}", "a float and a bool"
    bias = fake(node.args[3])
    if node.args[3] is not None and (bias is None or not _broadcasts(bias, (*q.shape[:3], k.shape[2]))):
        return "a bias that does not fit the scores", "one that broadcasts to (B, H, n, m)"
    values = node.meta.get("example_value")
    if not isinstance(values, tuple) or not all_same(values[0].shape, q.shape):
        return "an example value that is not that of the operator", "(out, entropy) of the shape of q"
    if any(u.target is not operator.getitem for u in node.users):
        return "a user other than getitem", "out and entropy taken by getitem"
    return "", ""


@dataclass(frozen=True)
class _Site:
    """A form that can be rewritten: operands traced to where they come from, sizes and precisions checked.

    `unused` are nodes that may have no reader left. `heads` is the size of the dimension that the user folded into
    the batch, and 0 where nothing was folded.
    """

    form: Form
    q: View
    k: View
    v: View
    scale: float
    dtype: torch.dtype
    unused: tuple[Node, ...]
    folded: bool
    heads: object


def _match(node: Node, writes: list[Node]) -> _Site | None:
    """The site that a node names; None when it is no attention, Refusal when it must stay."""
    form = FORMS[op_name(node)](node)
    if form is None:
        return None
    value = fake(form.outs[0])
    if value is None:
        raise Refusal(SkipReason.NO_META, node)
    expect(not value.requires_grad, SkipReason.GRAD, node)
    expect(not _written(form.chain[0], form.node, writes, form.chain), SkipReason.MUTATION, node)
    q, k, v = (_trace(x, form, value.dtype, writes) for x in (form.q, form.k, form.v))
    sources = (q.view, k.view, v.view)
    _check_sizes(form, *(x.shape for x in sources))
    _check_dtypes(form, value.dtype, sources)
    scale = form.scale
    if scale is None:
        width = q.view.shape[-1]
        expect(isinstance(width, int), SkipReason.DYNAMIC_DIM, node)
        scale = 1 / math.sqrt(width)
    folded = len(q.view.order) > value.dim()
    unused = (*form.chain, *q.passed, *k.passed, *v.passed)
    heads = q.view.shape[1] if folded else 0
    return _Site(form, *sources, scale * q.factor * k.factor, value.dtype, unused, folded, heads)


def _check_sizes(form: Form, q: tuple[object, ...], k: tuple[object, ...], v: tuple[object, ...]) -> None:
    expect(len(q) == len(k) == len(v), SkipReason.LAYOUT, form.node)
    if len(q) == 4:
        expect(same(q[1], k[1]) and same(q[1], v[1]), SkipReason.GQA, form.node)
    # A library function demands as many values as keys; nothing else need have told the compiler that they are.
    paired = same(k[-2], v[-2]) if form.product else not differ(k[-2], v[-2])
    expect(same(q[0], k[0]) and same(q[0], v[0]) and paired, SkipReason.BROADCAST, form.node)
    expect(same(q[-1], k[-1]) and same(q[-1], v[-1]), SkipReason.HEAD_DIM, form.node)


def _check_dtypes(form: Form, dtype: torch.dtype, operands: tuple[View, ...]) -> None:
    """Operands of another precision than the output are cast, where that is exact or autocast did it as well."""
    scores = fake(form.product) if form.product else None
    autocast = scores is None or scores.dtype == dtype
    expect(dtype in _DTYPES, SkipReason.DTYPE, form.node)
    for operand in operands:
        value = fake(operand.node)
        assert value is not None
        exact = torch.promote_types(value.dtype, dtype) == dtype
        expect(value.dtype in _DTYPES and (exact or autocast), SkipReason.DTYPE, form.node)


@dataclass(frozen=True)
class _Traced:
    """An operand is `factor * view`, `passed` being the nodes between."""

    view: View
    factor: float = 1.0
    passed: tuple[Node, ...] = ()


def _trace(start: View, form: Form, dtype: torch.dtype, writes: list[Node]) -> _Traced:
    """Follow an operand up through transposes, exact casts from `dtype`, foldings of heads and number factors.

    Transposes are passed only where that saves one.
    """
    here = best = _Traced(start)
    while here.view.select is None and (step := _upward(here.view, dtype)) is not None:
        node = here.view.node
        moved = permutation(node) is not None
        if not moved and _written(node, form.node, writes, form.chain):
            break
        here = _Traced(step[0], here.factor * step[1], (*here.passed, node))
        if not moved or _is_identity(here.view):
            best = here
    return best if _is_identity(best.view) else here


def _upward(operand: View, dtype: torch.dtype) -> tuple[View, float] | None:
    """One node up: (the same operand as a view of that node's input, the factor between)."""
    node, order = operand.node, operand.order
    value = fake(node)
    if (turned := permutation(node)) is not None:
        return View(turned[0], tuple(turned[1][d] for d in order)), 1.0
    source = node.args[0] if node.args else None
    before = fake(source)
    if not isinstance(source, Node) or value is None or before is None:
        return None
    name = op_name(node)
    if name in ("mul", "truediv", "div") and before.dtype == value.dtype and len(node.args) == 2 and not node.kwargs:
        c = number(node.args[1])
        return (View(source, order), c if name == "mul" else 1 / c) if c else None
    if is_cast(node) and before.dtype == dtype and torch.promote_types(dtype, value.dtype) == value.dtype != dtype:
        return View(source, order), 1.0
    if name in ("view", "reshape", "flatten") and len(order) == 3 and before.dim() == 4 and order[0] == 0:
        b, h, *rest = before.shape
        if all_same(value.shape, (b * h, *rest)):
            return View(source, (0, 1, *(d + 1 for d in order[1:]))), 1.0
    return None


def _is_identity(operand: View) -> bool:
    return operand.order == tuple(range(len(operand.order)))


def _written(first: Node, last: Node, writes: Iterable[Node], own: tuple[Node, ...]) -> bool:
    """True when something other than the form's own nodes may write to memory between two nodes."""
    return any(first < w < last and w not in own for w in writes)


def _rewrite(site: _Site) -> set[Node]:
    """Put the operator in place of the form; returns the nodes that are gone."""
    emit, replacements = _emit(site)
    for entry in replacements:
        entry.old.replace_all_uses_with(entry.new)
        for node, value in entry.values.items():
            node.meta["example_value"] = value
    emit.clean()
    gone = set()
    for node in sorted({*site.unused, *(entry.old for entry in replacements)}, reverse=True):
        if not node.users:
            node.graph.erase_node(node)
            gone.add(node)
    return gone


def _emit(site: _Site) -> tuple[Emitter, list[_Replacement]]:
    """Insert the operator in front of the form's last node, nothing being replaced yet; no trace after a Refusal."""
    form, emit = site.form, Emitter(site.form.node)
    try:
        q, k, v = (_operand(emit, x, site.dtype) for x in (site.q, site.k, site.v))
        for function, factor in form.factors:
            q = _cast(emit, emit.call(function, q, _lift(emit, factor, site)), site.dtype)
        call = emit.call(fae, q, k, v, _bias(emit, site, q, k), site.scale, True)
        out = emit.call(operator.getitem, call, 0)
        return emit, [entry for old in form.outs for entry in _replacements(emit, site, old, out)]
    except Refusal:
        emit.undo()
        raise


def _operand(emit: Emitter, operand: View, dtype: torch.dtype) -> Node:
    node = operand.node
    if operand.select:
        node = emit.method("select", node, *operand.select)
    node = _cast(emit, emit.permute(node, operand.order), dtype)
    return emit.method("unsqueeze", node, 1) if len(operand.order) == 3 else node


def _cast(emit: Emitter, node: Node, dtype: torch.dtype) -> Node:
    value = fake(node)
    return node if value is not None and value.dtype == dtype else emit.method("to", node, dtype)


def _lift(emit: Emitter, node: Node, site: _Site) -> Node:
    """A factor or bias that fits the user's scores, made to fit (B, H, n, m)."""
    value, rank = fake(node), len(site.form.q.order)
    if value is None or value.dim() < 3 or rank == 4:
        return node
    if not site.folded:
        return emit.method("unsqueeze", node, 1)
    if same(value.shape[0], 1):
        return node
    expect(isinstance(site.heads, int), SkipReason.DYNAMIC_DIM, site.form.node)
    return emit.method("unflatten", node, 0, (-1, site.heads))


def _bias(emit: Emitter, site: _Site, q: Node, k: Node) -> Node | None:
    """Everything that is added to the scores as one additive or boolean node."""
    queries, keys = fake(q), fake(k)
    assert queries is not None and keys is not None
    shape = (*queries.shape[:3], keys.shape[2])
    biases = [replace(b, node=_lift(emit, b.node, site)) for b in site.form.biases]
    for bias in biases:
        value = fake(bias.node)
        expect(value is not None and _broadcasts(value, shape), SkipReason.MASK, site.form.node)
        assert value is not None
        fits = value.dtype.is_floating_point if bias.fill is None else value.dtype == torch.bool
        expect(fits, SkipReason.MASK, site.form.node)
    if len(biases) == 1 and biases[0].fill == -math.inf:
        return biases[0].node if biases[0].keep else emit.method("logical_not", biases[0].node)
    total: Node | None = None
    for bias in biases:
        term = _additive(emit, bias, site.dtype)
        total = term if total is None else emit.call(operator.add, total, term)
    return total


def _additive(emit: Emitter, bias: Bias, dtype: torch.dtype) -> Node:
    if bias.fill is None:
        return bias.node if bias.weight == 1 else emit.call(operator.mul, bias.node, bias.weight)
    blocked = emit.method("logical_not", bias.node) if bias.keep else bias.node
    fill = bias.fill if bias.fill == -math.inf else max(bias.fill * bias.weight, _LOWEST, torch.finfo(dtype).min)
    return emit.call(torch.where, blocked, fill, 0.0)


def _broadcasts(value: Tensor, shape: tuple[object, ...]) -> bool:
    """False when the value is known not to expand to the shape."""
    sizes = tuple(value.shape)
    return len(sizes) <= len(shape) and all(
        same(a, 1) or not differ(a, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False)
    )


@dataclass(frozen=True)
class _Replacement:
    """`new` takes the place of `old`; `values` are the example values that change with the memory layout."""

    old: Node
    new: Node
    values: dict[Node, Tensor]


def _replacements(emit: Emitter, site: _Site, old: Node, out: Node) -> list[_Replacement]:
    """What takes the place of the form's output, and of the user's unfolding of the heads where there is one."""
    order = site.form.out_order
    if len(order) == 4:
        return [_settle(emit, old, emit.permute(out, order))]
    if not site.folded:
        return [_settle(emit, old, emit.permute(emit.method("squeeze", out, 1), order))]
    four = fake(out)
    assert four is not None
    unfolding = [
        u
        for u in old.users
        if op_name(u) in ("view", "reshape", "unflatten")
        and (x := fake(u)) is not None
        and all_same(x.shape, four.shape)
        and order == (0, 1, 2)
    ]
    done = [_settle(emit, u, out) for u in unfolding]
    if len(unfolding) < len(old.users):
        done.append(_settle(emit, old, emit.permute(emit.method("flatten", out, 0, 1), order)))
    return done


def _settle(emit: Emitter, old: Node, new: Node) -> _Replacement:
    """Replace a node by one of equal value, copied into the old memory layout where a reader could tell."""
    was, now = fake(old), fake(new)
    assert was is not None and now is not None
    if same_strides(was, now):
        return _Replacement(old, new, {})
    values = _absorbed(old, now)
    if values is not None:
        return _Replacement(old, new, values)
    made, rank = len(emit.made), was.dim()
    for a, b in ((0, 0), (-3, -2), (-2, -1)):
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
        copy = emit.permute(emit.method("contiguous", emit.permute(new, tuple(order))), tuple(order))
        value = fake(copy)
        if value is not None and same_strides(was, value):
            return _Replacement(old, copy, {})
        emit.undo(made)
    raise Refusal(SkipReason.STRIDES, old)


def _absorbed(old: Node, value: Tensor) -> dict[Node, Tensor] | None:
    """Example values behind a node whose memory layout becomes that of `value`, up to where layouts are as before.

    None where a reader is not a view, or cannot view the new layout.
    """
    changed: dict[Node, Tensor] = {old: value}
    queue = [old]
    for node in queue:
        for user in node.users:
            was = fake(user)
            if was is None or (op_name(user) not in _VIEWS and permutation(user) is None):
                return None
            try:
                now = evaluate(user, changed)
            except (RuntimeError, ValueError):  # view() of strides that do not allow it
                return None
            if not same_strides(was, now):
                changed[user] = now
                queue.append(user)
    del changed[old]
    return changed
