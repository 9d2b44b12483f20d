"""Put a GELU into the matrix product before it, where a GPU's library has one kernel for both.

    Before: y = addmm(bias, x, w); z = view(y, ...); out = gelu(z, approximate="tanh")
    After:  y = _addmm_activation(bias, x, w, use_gelu=True); out = view(y, ...)

On CUDA that is cuBLASLt's epilogue, as far as it has one for the shapes; a GELU of its own reads and writes the widest
tensor of a transformer layer once more. On the CPU the operator is another function (the exact GELU).

Pre:  a functional graph.   Post: no such pair is left on CUDA in half precision.
Invariant: the value within rounding; the product is no longer rounded before the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.passes._base import PassContext, PassReport

aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16)


def fuse_gelu(gm: GraphModule, ctx: PassContext) -> PassReport:
    """Rewrite `gm` in place."""
    matched = 0
    for node in [n for n in gm.graph.nodes if n.target is aten.gelu.default]:
        product = _product_before(node)
        if product is None:
            continue
        source = node.args[0]
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        product.target = aten._addmm_activation.default
        product.kwargs = {"use_gelu": True}
        matched += 1
    gm.recompile()
    return PassReport("fuse_gelu", matched)


def check_fuse_gelu(gm: GraphModule) -> None:
    """Raise PassInvariantError where a pair is left."""
    for node in gm.graph.nodes:
        if node.target is aten.gelu.default and _product_before(node):
            raise PassInvariantError(f"{node.name} could run inside the product before it", where="fuse_gelu")


def _product_before(gelu: Node) -> Node | None:
    """The product whose only use, through a view, is this activation."""
    if gelu.kwargs.get("approximate", "none") != "tanh":
        return None
    reader = gelu
    for _ in range(2):
        value = reader.args[0]
        if not isinstance(value, Node) or set(value.users) != {reader}:
            return None
        if value.target is aten.addmm.default and not value.kwargs:
            return value if _on_cuda(value) else None
        if value.target is not aten.view.default:
            return None
        reader = value
    return None


def _on_cuda(product: Node) -> bool:
    operands = [a.meta.get("val") if isinstance(a, Node) else None for a in product.args]
    return all(
        isinstance(v, Tensor) and v.is_cuda and v.dtype in _DTYPES and v.ndim == d
        for v, d in zip(operands, (1, 2, 2), strict=True)
    )
