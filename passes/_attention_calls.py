"""Attention written as one call of a library: PyTorch, flex_attention, flash_attn, xformers.

A matcher gets the node of the call and returns a `Form`, or None when nobody reads the result; it raises `Refusal`
where the call asks for something that `toprovar::fae` does not compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch.fx import GraphModule, Node

from toprovar_compile.passes._attention import Form, Refusal, SkipReason, View, expect, mask_argument, view, with_scale
from toprovar_compile.passes._torch_ir import arguments, fake, number, op_name

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_XFORMERS = ("query", "key", "value", "attn_bias", "p", "scale", "op", "output_dtype")
_FLEX = ("query", "key", "value", "score_mod", "block_mask", "scale", "options", "score_buffers", "mask_buffers")
_BHLD, _BLHD = (0, 1, 2, 3), (0, 2, 1, 3)
_WHOLE_SEQUENCE = 1 << 30  # the block size of the mask that flex_attention makes up when it is given none

# Arguments of the flash attention interfaces: the values that change nothing, and what any other value means.
_FLASH_NEUTRAL: dict[str, tuple[tuple[object, ...], SkipReason]] = {
    "dropout_p": ((0,), SkipReason.DROPOUT),
    "p": ((0,), SkipReason.DROPOUT),
    "causal": ((False,), SkipReason.CAUSAL),
    "is_causal": ((False,), SkipReason.CAUSAL),
    "window_size": ((None, (-1, -1), [-1, -1]), SkipReason.WINDOW),
    "window_size_left": ((None, -1), SkipReason.WINDOW),
    "window_size_right": ((None, -1), SkipReason.WINDOW),
    "window_left": ((None, -1), SkipReason.WINDOW),
    "window_right": ((None, -1), SkipReason.WINDOW),
    "softcap": ((None, 0), SkipReason.SCORE_MOD),
    "alibi_slopes": ((None,), SkipReason.SCORE_MOD),
    "cu_seqlens_q": ((None,), SkipReason.VARLEN),
    "cu_seqlens_k": ((None,), SkipReason.VARLEN),
    "seqused_k": ((None,), SkipReason.VARLEN),
    "block_tables": ((None,), SkipReason.VARLEN),
    "return_attn_probs": ((False,), SkipReason.EXTRA_OUTPUT),
    "return_softmax": ((False,), SkipReason.EXTRA_OUTPUT),
}
_FLASH_TENSORS = {"q", "k", "v", "kv", "qkv", "query", "key", "value"}
_FLASH_IGNORED = {"deterministic", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}


def _match_sdpa(node: Node) -> Form:
    a = arguments(node, *_SDPA)
    expect(a.get("is_causal", False) is False, SkipReason.CAUSAL, node)
    expect(number(a.get("dropout_p", 0.0)) == 0, SkipReason.DROPOUT, node)
    expect(a.get("enable_gqa", False) is False, SkipReason.GQA, node)
    q, k, v = (view(a[x], node) for x in ("query", "key", "value"))
    form = Form(node, (node,), q, k, v, (node,), q.order, biases=mask_argument(a.get("attn_mask"), node))
    return with_scale(form, a.get("scale"))


def _match_flash(node: Node) -> Form | None:
    a = arguments(node)
    for name, value in a.items():
        if name in _FLASH_NEUTRAL:
            neutral, reason = _FLASH_NEUTRAL[name]
            expect(not isinstance(value, Node) and value in neutral, reason, node)
        elif name not in _FLASH_TENSORS | _FLASH_IGNORED:
            expect(value is None or value is False, SkipReason.UNKNOWN_ARGUMENT, node)
    if "qkv" in a:
        q, k, v = (view(a["qkv"], node, _BLHD, (2, i)) for i in range(3))
    elif "kv" in a:
        q, (k, v) = view(a["q"], node, _BLHD), (view(a["kv"], node, _BLHD, (2, i)) for i in range(2))
    else:
        pairs = (("q", "query"), ("k", "key"), ("v", "value"))
        q, k, v = (view(a.get(short, a.get(long)), node, _BLHD) for short, long in pairs)
    form = _first_output(node, q, k, v, _BLHD)
    return form and with_scale(form, a.get("softmax_scale"))


def _match_xformers(node: Node) -> Form:
    a = arguments(node, *_XFORMERS)
    expect(number(a.get("p", 0.0)) == 0, SkipReason.DROPOUT, node)
    expect(a.get("output_dtype") is None, SkipReason.DTYPE, node)
    mask, query = a.get("attn_bias"), fake(a["query"])
    expect(not any(word in type(mask).__name__ for word in ("LowerTriangular", "Causal")), SkipReason.CAUSAL, node)
    expect(query is None or query.dim() != 5, SkipReason.GQA, node)
    order = _BLHD if query is not None and query.dim() == 4 else None
    q, k, v = (view(a[x], node, order) for x in ("query", "key", "value"))
    form = Form(node, (node,), q, k, v, (node,), q.order, biases=mask_argument(mask, node))
    return with_scale(form, a.get("scale"))


def _match_flex(node: Node) -> Form | None:
    a = arguments(node, *_FLEX)
    plain = _returns_input(node, a["score_mod"]) and not a.get("score_buffers") and not a.get("mask_buffers")
    expect(plain, SkipReason.SCORE_MOD, node)
    *_, q_block, kv_block, mask_mod = a["block_mask"]
    whole = number(q_block) == number(kv_block) == _WHOLE_SEQUENCE
    expect(whole and _returns_true(node, mask_mod), SkipReason.MASK, node)
    q, k, v = (view(a[x], node, _BHLD) for x in ("query", "key", "value"))
    form = _first_output(node, q, k, v, _BHLD)
    return form and with_scale(form, a["scale"])


def _first_output(node: Node, q: View, k: View, v: View, order: tuple[int, ...]) -> Form | None:
    """The form of an operator whose value, or item 0 of it, is the attention; None when nobody reads it."""
    if fake(node) is not None:
        return Form(node, (node,), q, k, v, (node,), order)
    items = {u: number(u.args[1]) if u.target is operator.getitem else None for u in node.users}
    for user, item in items.items():
        expect(item == 0 or (item is not None and not user.users), SkipReason.EXTRA_OUTPUT, node)
    outs = tuple(u for u, item in items.items() if item == 0)
    return Form(node, outs, q, k, v, (node, *items), order) if outs else None


def _returns_input(node: Node, attribute: object) -> bool:
    """True when the subgraph that a get_attr node names returns its first input."""
    found = _subgraph(node, attribute)
    return found is not None and found[1] is found[0]


def _returns_true(node: Node, attribute: object) -> bool:
    """True when the subgraph that a get_attr node names returns a constant True."""
    found = _subgraph(node, attribute)
    return found is not None and isinstance(found[1], Node) and op_name(found[1]) in ("new_ones", "ones")


def _subgraph(node: Node, attribute: object) -> tuple[Node, object] | None:
    """(first input, output) of the subgraph that a get_attr node names."""
    owner = node.graph.owning_module
    child = getattr(owner, str(attribute.target), None) if isinstance(attribute, Node) else None
    if not isinstance(child, GraphModule):
        return None
    nodes = list(child.graph.nodes)
    result: object = nodes[-1].args[0]
    return nodes[0], result[0] if isinstance(result, tuple | list) else result


def _refuse(reason: SkipReason) -> Callable[[Node], Form | None]:
    def match(node: Node) -> Form | None:
        raise Refusal(reason, node)

    return match


CALLS: dict[str, Callable[[Node], Form | None]] = {
    "scaled_dot_product_attention": _match_sdpa,
    "higher_order::flex_attention": _match_flex,
    "flash_attn.flash_attn_func": _match_flash,
    "flash_attn.flash_attn_qkvpacked_func": _match_flash,
    "flash_attn.flash_attn_kvpacked_func": _match_flash,
    "flash_attn::_flash_attn_forward": _match_flash,
    "flashattn::_flash_attn_forward": _match_flash,  # its name before flash_attn 2.7
    "flash_attn_interface.flash_attn_func": _match_flash,  # version 3
    "xformers_flash::flash_fwd": _match_flash,
    "xformers.memory_efficient_attention": _match_xformers,
    "flash_attn.flash_attn_varlen_func": _refuse(SkipReason.VARLEN),
    "flash_attn.flash_attn_varlen_qkvpacked_func": _refuse(SkipReason.VARLEN),
    "flash_attn.flash_attn_varlen_kvpacked_func": _refuse(SkipReason.VARLEN),
    "flash_attn::_flash_attn_varlen_forward": _refuse(SkipReason.VARLEN),
    "flash_attn.flash_attn_with_kvcache": _refuse(SkipReason.UNSUPPORTED_FORM),
    "flash_attn_3::fwd": _refuse(SkipReason.UNSUPPORTED_FORM),
    "multi_head_attention_forward": _refuse(SkipReason.UNSUPPORTED_FORM),
    "_efficient_attention_forward": _refuse(SkipReason.UNSUPPORTED_FORM),
    "_flash_attention_forward": _refuse(SkipReason.UNSUPPORTED_FORM),
    "sageattention.sageattn": _refuse(SkipReason.UNSUPPORTED_FORM),
}
