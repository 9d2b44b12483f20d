"""fuse_rotation: which attentions take normalising and rotating in, told on fake CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae_cached, fae_rotated
from toprovar_compile.kernels.fae_rotated import rotate_reference
from toprovar_compile.passes._base import PassContext
from toprovar_compile.passes.fuse_rotation import check_fuse_rotation, fuse_rotation

B, H, N, D = 2, 4, 6, 16


def graph(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, form: str = "fits") -> GraphModule:
    """Infinity's self-attention on a cache, in some form."""

    def layer(qkv: Tensor, factor: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        k = rotate_reference(k, factor if form == "keys are scaled" else None, cos, sin, 1e-12)
        q = rotate_reference(q, factor, cos, cos if form == "other angles" else sin, 1e-12).to(v.dtype)
        return fae_cached(q, k, v, k_cache, v_cache, 3, None, 1.0, False)[0]  # type: ignore[no-any-return]

    with FakeTensorMode() as mode:
        angles = torch.empty(1, H if form == "an angle a head" else 1, N, D, device=device)
        cache = torch.empty(20, B, H, D, dtype=dtype, device=device)
        qkv = torch.empty(3, B, H, N, D, dtype=dtype, device=device)
        assert mode is not None
        gm = make_fx(layer)(qkv, torch.empty(1, H, 1, 1, device=device), angles, angles.clone(), cache, cache.clone())
    gm.graph.eliminate_dead_code()
    return gm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_takes_rotation_in(dtype: torch.dtype) -> None:
    gm = graph(dtype=dtype)
    with pytest.raises(PassInvariantError, match="could rotate its operands"):
        check_fuse_rotation(gm)
    assert fuse_rotation(gm, PassContext()).matched == 1
    check_fuse_rotation(gm)
    gm.graph.lint()
    (fused,) = [n for n in gm.graph.nodes if n.target is fae_rotated]
    assert fused.args[6] == 1e-12 and not any(n.target is torch.ops.aten.flip.default for n in gm.graph.nodes)


@pytest.mark.parametrize("form", ["keys are scaled", "other angles", "an angle a head"])
def test_other_forms_stay(form: str) -> None:
    assert fuse_rotation(graph(form=form), PassContext()).matched == 0


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_other_machines_keep_their_kernels(device: str, dtype: torch.dtype) -> None:
    assert fuse_rotation(graph(device, dtype), PassContext()).matched == 0
