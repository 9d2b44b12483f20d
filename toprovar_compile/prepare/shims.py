"""Stand-ins for packages that the official repositories import, where they are not installed.

    with tv.shims() as used:
        from infinity.models.infinity import Infinity
    ...
    print(used)      # what was provided, and which attention ran how often

Without flash_attn, hart_backend and the like the official code cannot even be imported. A stand-in computes the same in
PyTorch. Nothing is replaced that is installed, nothing is provided outside the `with` block, and every stand-in counts
its calls. Models that were imported inside keep their stand-ins.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.report import counters, logger


@dataclass
class Shims:
    """What was provided: `packages` by name, and `calls`, counted by function and what ran in its place."""

    packages: tuple[str, ...] = ()
    calls: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"stand-ins for {', '.join(self.packages)}" if self.packages else "no stand-ins: all is installed"]
        return "\n".join(lines + [f"  {count} x {call}" for call, count in self.calls.most_common()])

    def count(self, function: str, ran: str) -> None:
        """Count one call."""
        self.calls[f"{function}: {ran}"] += 1
        counters.add("shim", f"{function}: {ran}")


@contextmanager
def shims(*packages: str) -> Iterator[Shims]:
    """Provide stand-ins for `packages`, all that are known by default, where they are not installed.

    Known are flash_attn (flash_attn_func, flash_attn_varlen_kvpacked_func), xformers (ops.memory_efficient_attention),
    apex (normalization.FusedLayerNorm, FusedRMSNorm) and hart_backend (fused_kernels.rms_norm). Raises OptionError for
    another name.
    """
    for name in packages:
        if name not in _MAKERS:
            close = nearest(name, _MAKERS)
            raise OptionError(
                f"there is no stand-in for {name!r}",
                where="shims",
                expected=f"names among {', '.join(_MAKERS)}",
                todo=f"did you mean {close!r}?" if close else "install it",
            )
    used = Shims()
    added: list[str] = []
    for name in packages or tuple(_MAKERS):
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        for path, members in _MAKERS[name](used).items():
            _install(path, members)
            added.append(path)
        used.packages += (name,)
    if used.packages:
        logger.warning("PyTorch stand-ins are provided for %s", ", ".join(used.packages))
    try:
        yield used
    finally:
        for path in added:
            sys.modules.pop(path, None)


def _install(path: str, members: dict[str, Any]) -> None:
    module = types.ModuleType(path)
    module.__spec__ = importlib.util.spec_from_loader(path, loader=None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[path] = module
    parent, _, child = path.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """Attention of q (B, n, H, D) to k and v (B, m, H, D): (B, n, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


def _refuse(name: str, **options: Any) -> None:
    """Raise OptionError for an option that changes the result and is not known to the stand-in."""
    for option, value in options.items():
        if value not in (None, False, 0, 0.0, (-1, -1)):
            raise OptionError(
                f"{option}={value!r} is not computed by the stand-in for {name}", where="shims", todo="install it"
            )


def _flash_attn(used: Shims) -> dict[str, dict[str, Any]]:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        **options: Any,
    ) -> Tensor:
        _refuse("flash_attn_func", dropout_p=dropout_p, causal=causal, **options)
        used.count("flash_attn_func", "scaled_dot_product_attention")
        return _attend(q, k, v, softmax_scale)

    def flash_attn_varlen_kvpacked_func(
        q: Tensor,
        kv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        **options: Any,
    ) -> Tensor:
        _refuse("flash_attn_varlen_kvpacked_func", dropout_p=dropout_p, causal=causal, **options)
        used.count("flash_attn_varlen_kvpacked_func", "scaled_dot_product_attention, one call a sequence")
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        parts = []
        for i in range(len(ends_q) - 1):
            rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
            k, v = kv[keys].unbind(1)
            parts.append(_attend(q[rows][None], k[None], v[None], softmax_scale)[0])
        return torch.cat(parts)

    return {
        "flash_attn": {
            "__version__": "0.0.0+toprovar",
            "flash_attn_func": flash_attn_func,
            "flash_attn_varlen_kvpacked_func": flash_attn_varlen_kvpacked_func,
        }
    }


def _xformers(used: Shims) -> dict[str, dict[str, Any]]:
    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        _refuse("memory_efficient_attention", p=p)
        used.count("memory_efficient_attention", "scaled_dot_product_attention")
        return _attend(query, key, value, scale, attn_bias)

    return {"xformers": {}, "xformers.ops": {"memory_efficient_attention": memory_efficient_attention}}


def _apex(used: Shims) -> dict[str, dict[str, Any]]:
    class FusedLayerNorm(torch.nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            used.count("FusedLayerNorm", "layer_norm")
            return super().forward(x)

    class FusedRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            used.count("FusedRMSNorm", "rms_norm")
            return super().forward(x)

    norms = {"FusedLayerNorm": FusedLayerNorm, "FusedRMSNorm": FusedRMSNorm}
    return {"apex": {}, "apex.normalization": norms, "apex.normalization.fused_layer_norm": norms}


def _hart_backend(used: Shims) -> dict[str, dict[str, Any]]:
    def rms_norm(out: Tensor, x: Tensor, weight: Tensor, epsilon: float, use_quant: bool) -> None:
        _refuse("rms_norm", use_quant=use_quant)
        used.count("rms_norm", "PyTorch")
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + epsilon)
        out.copy_(h.to(x.dtype) * weight)

    return {"hart_backend": {}, "hart_backend.fused_kernels": {"rms_norm": rms_norm}}


_MAKERS: dict[str, Callable[[Shims], dict[str, dict[str, Any]]]] = {
    "flash_attn": _flash_attn,
    "xformers": _xformers,
    "apex": _apex,
    "hart_backend": _hart_backend,
}
