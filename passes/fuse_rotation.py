"""Hand queries and keys to attention as they come out of their product, to be normalised and rotated there.

    Before: q = to(rotate(normalize(q0) factor)), k = rotate(normalize(k0));  fae_cached(q, k, v, ...)
    After:  fae_rotated(q0, k0, v, factor, cos, sin, eps, ...)

One kernel then reads the product and writes queries and caches; without it rotated keys are written, read and copied.

Pre:  a variant of a layer, cosine attention with rotary positions of neighbouring channels (Infinity's).
Post: no such attention is left on CUDA in half precision.   Invariant: the value within rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae_cached, fae_rotated
from toprovar_compile.passes._base import PassContext, PassReport

aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16)


class _Rotated(NamedTuple):
    """x (B, H, n, D), of which the unit vectors times `factor` (1, H, 1, 1), if there is one, were turned."""

    x: Node
    factor: Node | None
    cos: Node
    sin: Node
    eps: float


def fuse_rotation(gm: GraphModule, ctx: PassContext) -> PassReport:
    """Rewrite `gm` in place."""
    matched = 0
    for node in [n for n in gm.graph.nodes if n.target is fae_cached]:
        found = _sources(node)
        if found is None:
            continue
        q, k = found
        with gm.graph.inserting_before(node):
            args = (q.x, k.x, node.args[2], q.factor, q.cos, q.sin, q.eps, *node.args[3:])
            fused = gm.graph.call_function(fae_rotated, args)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        gm.graph.erase_node(node)
        matched += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return PassReport("fuse_rotation", matched)


def check_fuse_rotation(gm: GraphModule) -> None:
    """Raise PassInvariantError where such an attention is left."""
    for node in gm.graph.nodes:
        if node.target is fae_cached and _sources(node) is not None:
            raise PassInvariantError(f"{node.name} could rotate its operands", where="fuse_rotation")


def _sources(attention: Node) -> tuple[_Rotated, _Rotated] | None:
    """What the queries and keys of an attention are made from, if that is all alike and on CUDA in half precision."""
    q, k, v = (_rotated(attention.args[0]), _rotated(attention.args[1]), attention.args[2])
    if q is None or k is None or q.factor is None or k.factor is not None or q[2:] != k[2:]:
        return None
    values = [n.meta.get("val") if isinstance(n, Node) else None for n in (q.x, k.x, v)]
    if not all(isinstance(t, Tensor) and t.is_cuda and t.dtype in _DTYPES and t.ndim == 4 for t in values):
        return None
    factor: Any = q.factor.meta.get("val")
    cos: Any = q.cos.meta.get("val")
    plain = all(isinstance(t, Tensor) and t.dtype == torch.float32 and t.ndim == 4 for t in (factor, cos))
    return (
        (q, k) if plain and factor.shape[0] == factor.shape[2] == factor.shape[3] == 1 and cos.shape[1] == 1 else None
    )


def _rotated(node: Any) -> _Rotated | None:
    """The parts of to(x cos + neighbours of x sin), x being a unit vector, times a factor or not."""
    if _calls(node, aten._to_copy.default):
        node = node.args[0]
    if not _calls(node, aten.add.Tensor) or not all(_calls(a, aten.mul.Tensor) for a in node.args):
        return None
    (x, cos), (turned, sin) = (part.args for part in node.args)
    if not _calls(turned, aten.view.default) or not _calls(turned.args[0], aten.flip.default):
        return None
    pairs, dims = turned.args[0].args
    if not _calls(pairs, aten.view.default) or pairs.args[0] is not x or list(dims) not in ([-1], [4]):
        return None
    if pairs.args[1][-1] != 2 or len(pairs.args[1]) != 5:
        return None
    factor = None
    if _calls(x, aten.mul.Tensor):
        x, factor = x.args
    if not _calls(x, aten.div.Tensor) or not all(isinstance(n, Node) for n in (cos, sin)):
        return None
    whole, length = x.args
    length = length.args[0] if _calls(length, aten.expand.default) else length
    if not _calls(length, aten.clamp_min.default) or not _calls(length.args[0], aten.linalg_vector_norm.default):
        return None
    norm, eps = length.args
    of, order, dim, keep = (*norm.args, None, None, None)[:4]
    same = of is whole and order in (2, 2.0) and list(dim or ()) in ([-1], [3]) and keep is True
    if not same or not _calls(whole, aten._to_copy.default) or whole.kwargs != {"dtype": torch.float32}:
        return None
    return _Rotated(whole.args[0], factor, cos, sin, float(eps))


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target
