"""absorb_projections: which cross-attentions take their projections in, and that the layer stays the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from toprovar_compile.kernels import fae
from toprovar_compile.passes.absorb_projections import absorb_projections, absorbed, cross_attentions, inputs_to_absorb

B, N, H, T, D, C = 2, 5, 3, 12, 32, 24


def operands() -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[1, ..., 7:] = False
    shapes = {"x": (B, N, C), "k": (B, H, T, D), "v": (B, H, T, D)}
    weights = {"w_q": (H * D, C), "b_q": (H * D,), "w_out": (C, H * D), "b_out": (C,)}
    return {name: torch.randn(shape) for name, shape in (shapes | weights).items()} | {"mask": mask}


def layer(form: str = "") -> GraphModule:
    """x plus a cross-attention of norm(x), in some form."""

    def run(
        x: Tensor, k: Tensor, v: Tensor, mask: Tensor, w_q: Tensor, b_q: Tensor, w_out: Tensor, b_out: Tensor
    ) -> Any:
        q = F.linear(x.tanh(), w_q, b_q).view(B, N, H, D).transpose(1, 2)
        keys = k * 2 if form == "keys are computed" else k
        if form == "one mask a token":
            mask = mask.expand(B, 1, N, T)
        o, entropy = fae(q, keys, v, mask, 0.2, form == "entropy is read")
        o = o.transpose(1, 2).reshape(B, N, H * D)
        y = F.linear(o.relu() if form == "something between" else o, w_out, b_out)
        y = x + y
        return (y, entropy) if form == "entropy is read" else (y, q) if form == "queries are read" else (y,)

    gm = make_fx(run)(*inputs())
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def inputs() -> list[Tensor]:
    given = operands()
    return [given[name] for name in ("x", "k", "v", "mask", "w_q", "b_q", "w_out", "b_out")]


def test_a_layer_without_its_projections_is_the_same_function() -> None:
    gm, given = layer(), inputs()
    want = gm(*given)[0]
    ((places, scale),) = inputs_to_absorb(gm)
    taken_in = absorbed([None if i is None else given[i] for i in places], scale)
    assert all(t.shape[1] == H * 16 for t in taken_in)  # padded to a power of two
    absorb_projections(gm)
    assert not any(n.target in (fae, torch.ops.aten.addmm.default) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(*given, *taken_in)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["entropy is read", "queries are read", "keys are computed", "one mask a token", "something between"]
)
def test_other_forms_stay(form: str) -> None:
    assert cross_attentions(layer(form)) == []


def test_an_additive_mask_and_none() -> None:
    given = operands()
    boolean = given.pop("mask")
    k, v, w_q, b_q, w_out = (given[name] for name in ("k", "v", "w_q", "b_q", "w_out"))
    added = torch.zeros(boolean.shape).masked_fill(~boolean, -torch.inf)
    for a, b in zip(
        absorbed((k, v, boolean, w_q, b_q, w_out), 0.2), absorbed((k, v, added, w_q, b_q, w_out), 0.2), strict=True
    ):
        assert torch.equal(a, b)
    _, bias, _ = absorbed((k, v, None, w_q, b_q, w_out), 0.2)
    assert bias.view(B, H, 16)[..., :T].isfinite().all() and (bias.view(B, H, 16)[..., T:] == -torch.inf).all()


def test_many_rows_are_as_each_by_itself() -> None:
    _, k, v, mask, w_q, b_q, w_out, _ = inputs()
    k, v, mask = (t.repeat(3, *[1] * (t.ndim - 1)) for t in (k, v, mask))
    together = absorbed((k, v, mask, w_q, b_q, w_out), 0.2)
    for i in range(3 * B):
        row = slice(i, i + 1)
        alone = absorbed((k[row], v[row], mask[row], w_q, b_q, w_out), 0.2)
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[row], want)
