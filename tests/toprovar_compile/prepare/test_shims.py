"""Stand-ins for packages that are not installed."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import toprovar_compile as tv
from toprovar_compile.errors import OptionError

PACKAGES = ("flash_attn", "xformers", "apex", "hart_backend")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(p) for p in PACKAGES), reason=f"one of {', '.join(PACKAGES)} is installed"
)


def test_nothing_is_provided_outside() -> None:
    with tv.shims() as used:
        assert used.packages == PACKAGES
        assert {"flash_attn", "xformers.ops", "apex.normalization", "hart_backend.fused_kernels"} <= set(sys.modules)
    assert not any(name.split(".")[0] in PACKAGES for name in sys.modules)
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")


def test_what_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = types.ModuleType("xformers")
    monkeypatch.setitem(sys.modules, "xformers", mine)
    with tv.shims("xformers", "apex") as used:
        assert used.packages == ("apex",) and sys.modules["xformers"] is mine
    assert sys.modules["xformers"] is mine


def test_packed_sequences_attend_to_their_own_text_and_are_counted() -> None:
    q, kv = torch.randn(2 * 3, 2, 8), torch.randn(4 + 6, 2, 2, 8)
    with tv.shims("flash_attn") as used:
        from flash_attn import flash_attn_varlen_kvpacked_func

        ends = [torch.tensor(e, dtype=torch.int32) for e in ([0, 3, 6], [0, 4, 10])]
        got = flash_attn_varlen_kvpacked_func(q, kv, *ends, 3, 6, dropout_p=0, softmax_scale=0.5)
    mask = torch.zeros(6, 10, dtype=torch.bool)
    mask[:3, :4] = mask[3:, 4:] = True
    k, v = kv.unbind(1)
    want = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask, scale=0.5)
    torch.testing.assert_close(got, want.transpose(0, 1))
    assert "1 x flash_attn_varlen_kvpacked_func: scaled_dot_product_attention" in str(used)


def test_dense_attention_and_norms() -> None:
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    x, weight, out = torch.randn(2, 3, 8), torch.rand(8), torch.empty(2, 3, 8)
    with tv.shims() as used:
        from apex.normalization import FusedRMSNorm
        from flash_attn import flash_attn_func
        from hart_backend import fused_kernels
        from xformers.ops import memory_efficient_attention

        torch.testing.assert_close(flash_attn_func(q, k, v), memory_efficient_attention(q, k, v))
        fused_kernels.rms_norm(out, x, weight, 1e-6, False)
        torch.testing.assert_close(FusedRMSNorm(8)(x), F.rms_norm(x, (8,)))
    torch.testing.assert_close(out, F.rms_norm(x, (8,), weight, 1e-6))
    assert sum(used.calls.values()) == 4


def test_options_that_are_not_computed_are_refused() -> None:
    with tv.shims("flash_attn"):
        from flash_attn import flash_attn_func
    with pytest.raises(OptionError, match="causal=True is not computed"):
        flash_attn_func(*(torch.randn(1, 2, 1, 8) for _ in range(3)), causal=True)
    with pytest.raises(OptionError, match="did you mean 'flash_attn'"), tv.shims("flash-attn"):
        pass
