"""fuse_gelu: which products take their activation in, told on fake CUDA tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.passes._base import PassContext
from toprovar_compile.passes.fuse_gelu import check_fuse_gelu, fuse_gelu

aten = torch.ops.aten


def graph(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, form: str = "fits") -> GraphModule:
    """gelu of a linear layer on (2, 5, 8) with 16 outputs, in some form."""

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        y = aten.view.default(aten.addmm.default(bias, aten.view.default(x, [10, 8]), w), [2, 5, 16])
        out = aten.gelu.default(y, approximate="none" if form == "exact" else "tanh")
        return out + y if form == "read twice" else out

    with FakeTensorMode() as mode:
        bias = torch.empty(1 if form == "broadcast bias" else 16, dtype=dtype, device=device)
        if form == "broadcast bias":
            bias = bias.expand(10, 16)
        inputs = torch.empty(2, 5, 8, dtype=dtype, device=device), torch.empty(8, 16, dtype=dtype, device=device), bias
        assert mode is not None
        return make_fx(layer)(*inputs)


def count(gm: GraphModule) -> tuple[int, int]:
    targets = [n.target for n in gm.graph.nodes]
    return targets.count(aten._addmm_activation.default), targets.count(aten.gelu.default)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_takes_its_activation_in(dtype: torch.dtype) -> None:
    gm = graph(dtype=dtype)
    with pytest.raises(PassInvariantError, match="could run inside the product"):
        check_fuse_gelu(gm)
    assert fuse_gelu(gm, PassContext()).matched == 1
    check_fuse_gelu(gm)
    gm.graph.lint()
    assert count(gm) == (1, 0)


@pytest.mark.parametrize("form", ["exact", "read twice", "broadcast bias"])
def test_other_forms_stay(form: str) -> None:
    gm = graph(form=form)
    assert fuse_gelu(gm, PassContext()).matched == 0
    assert count(gm) == (0, 1)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_only_where_a_library_has_the_kernel(device: str, dtype: torch.dtype) -> None:
    assert fuse_gelu(graph(device, dtype), PassContext()).matched == 0


def test_the_fused_graph_computes_the_same() -> None:
    gm = graph()
    fuse_gelu(gm, PassContext())
    x, w, bias = torch.randn(2, 5, 8), torch.randn(8, 16), torch.randn(16)
    want = F.gelu(F.linear(x, w.t(), bias))  # exact, as the operator is on the CPU
    torch.testing.assert_close(gm(x, w, bias), want)
