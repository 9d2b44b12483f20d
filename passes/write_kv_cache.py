"""Turn the growing key/value cache of a layer into writes into a preallocated buffer.

    Before: k1 = cat([k_cache, k], 2); v1 = cat([v_cache, v], 2); fae(q, k1, v1, None, scale, True); return x1, k1, v1
    After:  fae_cached(q, k, v, k_buffer, v_buffer, start, None, scale, True); return x1

Concatenation copies the whole cache at every scale. The buffers, (capacity, rows, heads, head size) with the rows of
the batch or more, and `start`, the number of tokens in them, are new inputs at the end. At the first scale, without a
cache, `fae(q, k, v)` with k and v returned is the same with start = 0.
A cast of the grown cache to the dtype of q, as autocast puts it before attention, is left to the kernel.

Pre:  a layer graph of `split_layers` whose attention is `toprovar::fae`.
Post: no attention that could write into a buffer reads a concatenation that is returned as well.
Invariant: the first output, inputs that stay and their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.fx import GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes._graph import add_inputs, cat_operands, compact, output_values, placeholders
from toprovar_compile.passes._symbols import shape_of


class SkipReason(Enum):
    """Why an attention keeps its concatenation."""

    NOT_RETURNED = "keys and values are not returned by the step, so no cache grows here"
    OTHER_READER = "the cache is read by more than attention"
    OTHER_TOKENS = "what joins the cache are not keys and values of the queries"
    BIAS = "the attention has a bias over the grown cache"


@dataclass(frozen=True)
class CacheSite:
    """One growing cache of a layer.

    `prior` are the positions of the old cache among the layer's inputs before the pass, None at the first scale;
    `grown` those of the grown cache among the outputs before the pass. Buffers and start stand in this order at the
    end of the new inputs: all k, v pairs, then all starts.
    """

    prior: tuple[int, int] | None
    grown: tuple[int, int]


@dataclass(frozen=True)
class CacheRewrite:
    """What `write_kv_cache` did: its sites, the inputs and outputs that stay (old positions), attentions skipped."""

    sites: tuple[CacheSite, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    skipped: tuple[SkipReason, ...]


def write_kv_cache(gm: GraphModule) -> CacheRewrite:
    """Rewrite every growing cache of the layer graph `gm` in place."""
    inputs, outputs = placeholders(gm), output_values(gm)
    sites, skipped, old = [], [], []
    for node in [n for n in gm.graph.nodes if n.target is fae]:
        match = _match_growth(node, inputs, outputs)
        if isinstance(match, SkipReason):
            skipped.append(match)
            continue
        sites.append(match)
        old.append(node)
    buffers = add_inputs(gm, [f"{kind}_{i}" for i in range(len(sites)) for kind in ("k_buffer", "v_buffer")])
    starts = add_inputs(gm, [f"start_{i}" for i in range(len(sites))])
    drop_out = {i for s in sites for i in s.grown}
    drop_in = {i for s in sites if s.prior for i in s.prior}
    out = next(n for n in gm.graph.nodes if n.op == "output")
    out.args = (tuple(v for i, v in enumerate(outputs) if i not in drop_out),)
    for i, (site, node) in enumerate(zip(sites, old, strict=True)):
        q, k, v, bias, scale, entropy = node.args
        k, v = _uncast(k, node), _uncast(v, node)
        if site.prior is not None:
            k, v = cat_operands(k)[1], cat_operands(v)[1]  # type: ignore[index]
            for prior in site.prior:
                for user in [u for u in inputs[prior].users if _is_length(u)]:
                    user.replace_all_uses_with(starts[i])
        with gm.graph.inserting_before(node):
            args = (q, k, v, buffers[2 * i], buffers[2 * i + 1], starts[i], bias, scale, entropy)
            new = gm.graph.call_function(fae_cached, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    compact(gm, {inputs[i] for i in drop_in})
    return CacheRewrite(
        tuple(sites),
        tuple(i for i in range(len(inputs)) if i not in drop_in),
        tuple(i for i in range(len(outputs)) if i not in drop_out),
        tuple(skipped),
    )


def check_write_kv_cache(gm: GraphModule) -> None:
    """Raise PassInvariantError if an attention that could write into a buffer still reads a grown cache."""
    inputs, outputs = placeholders(gm), output_values(gm)
    for n in gm.graph.nodes:
        if n.target is fae and isinstance(_match_growth(n, inputs, outputs), CacheSite):
            raise PassInvariantError(f"{n.name} reads a grown cache that is returned", where="write_kv_cache")


def _match_growth(node: Node, inputs: list[Node], outputs: list[Node]) -> CacheSite | SkipReason:
    k, v = (_uncast(a, node) for a in node.args[1:3])
    bias = node.args[3]
    tokens = shape_of(node.args[0].meta["val"])[2]  # type: ignore[union-attr]
    if k not in outputs or v not in outputs:
        return SkipReason.NOT_RETURNED
    grown = (outputs.index(k), outputs.index(v))
    priors: list[int | None] = []
    for side in (k, v):
        operands = cat_operands(side)
        if operands is None or operands[0] not in inputs:
            priors.append(None)
            continue
        if any(u is not node and u.op != "output" and not _is_cast_for(u, node) for u in side.users):
            return SkipReason.OTHER_READER
        if any(u is not side and not _is_length(u) for u in operands[0].users) or operands[0] in outputs:
            return SkipReason.OTHER_READER
        if shape_of(operands[1].meta["val"])[2] != tokens:
            return SkipReason.OTHER_TOKENS
        priors.append(inputs.index(operands[0]))
    if bias is not None:
        return SkipReason.BIAS
    if priors[0] is None or priors[1] is None:
        if priors != [None, None]:
            return SkipReason.OTHER_READER
        if shape_of(k.meta["val"])[2] != tokens:
            return SkipReason.OTHER_TOKENS
        return CacheSite(None, grown)
    return CacheSite((priors[0], priors[1]), grown)


def _uncast(value: Any, attention: Node) -> Node:
    """Keys or values of `attention` as they were before a cast to the dtype of q, which the kernel does as well."""
    assert isinstance(value, Node)
    source = value.args[0] if _is_cast_for(value, attention) else value
    assert isinstance(source, Node)
    return source


def _is_cast_for(value: Node, attention: Node) -> bool:
    query = attention.args[0]
    return (
        value.target is torch.ops.aten._to_copy.default
        and set(value.kwargs) == {"dtype"}
        and set(value.users) == {attention}
        and isinstance(query, Node)
        and value.kwargs["dtype"] == query.meta["val"].dtype
    )


def _is_length(node: Node) -> bool:
    """Whether the node is the number of tokens of a cache."""
    return bool(node.target is torch.ops.aten.sym_size.int and node.args[1] == 2)
