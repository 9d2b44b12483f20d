"""The layers of Infinity, under the names of the official checkpoints.

Linear layers and attention run in the dtype of the weights, everything else in float32; see `models.infinity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.models.in_graph import in_graph
from toprovar_compile.models.infinity_config import InfinityConfig
from toprovar_compile.models.var import FeedForward

Rows = tuple[Tensor, Tensor]
Text = tuple[Tensor, Tensor, Tensor]

_MAX_LOG_SCALE = math.log(100)  # clamp of the learned attention temperature


class SelfAttention(nn.Module):
    """Cosine self-attention over the KV cache and the tokens of this scale, with rotary positions."""

    zero_k_bias: Tensor

    def __init__(self, cfg: InfinityConfig) -> None:
        super().__init__()
        c = cfg.embed_dim
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, cfg.num_heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(c, 3 * c, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("zero_k_bias", torch.zeros(c))
        self.proj = nn.Linear(c, c)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor | None,
        v_cache: Tensor | None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What q (B, H, n, D) reads of the cache (B, H, p, D) and of k and v: (out, keys, values (B, H, p + n, D)).

        `spans`, for training, lists (start, end) of each scale in q: a token then sees its own scale and the earlier.
        """
        k, v = _grown(k_cache, k), _grown(v_cache, v)
        if spans:  # block-causal without a mask: every scale is one plain attention call
            parts = [
                F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=1.0) for a, b in spans
            ]
            return torch.cat(parts, dim=2), k, v
        return F.scaled_dot_product_attention(q, k, v, scale=1.0), k, v


@in_graph
def _grown(cache: Tensor | None, new: Tensor) -> Tensor:
    """Keys or values (B, H, p + n, D) of all scales so far."""
    return new if cache is None else torch.cat((cache, new), dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x (B, H, n, D) by the angles of `pair_tables` (B or 1, 1, n, D).

    Written with the neighbour of each channel, and not with halves of the pairs, so that it becomes one kernel with
    the normalisation before it.
    """
    neighbour = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned: Tensor = x * cos + neighbour * sin
    return turned


class CrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed once an image; with `pool`, of one learned query."""

    mat_q: Any
    zero_k_bias: Tensor

    def __init__(self, width: int, text_width: int, num_heads: int, *, pool: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.mat_q = nn.Parameter(torch.zeros(1, num_heads, self.head_dim)) if pool else nn.Linear(width, width)
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) of text (B, T, Ct)."""
        kv = F.linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)))
        k, v = kv.view(*text.shape[:2], 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return k.contiguous(), v.contiguous()

    def forward(self, q: Tensor, text: Text) -> Tensor:
        """What q (B, H, n, D) reads of keys and values (B, H, T, D) where the mask, bool (B, 1, 1, T), is true."""
        k, v, mask = text
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def pooled(self, text: Tensor, mask: Tensor) -> Tensor:
        """One vector (B, C) of text (B, T, Ct)."""
        k, v = self.keys_values(text)
        q = self.mat_q.to(k.dtype).unsqueeze(2).expand(k.shape[0], -1, -1, -1)
        pooled: Tensor = self.proj(self(q, (k, v, mask)).transpose(1, 2).flatten(2))
        return pooled.squeeze(1)


class Block(nn.Module):
    """One layer: self-attention, cross-attention to the text and feed-forward on the residual stream."""

    def __init__(self, cfg: InfinityConfig) -> None:
        super().__init__()
        c = cfg.embed_dim
        self.eps, self.shared_aln = cfg.norm_eps, cfg.shared_aln
        self.sa = SelfAttention(cfg)
        self.ca = CrossAttention(c, c, cfg.num_heads)
        self.ffn = FeedForward(c, cfg.hidden)
        self.ca_norm = nn.LayerNorm(c, eps=cfg.norm_eps)
        if cfg.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, c) / c**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.ca_gamma = nn.Parameter(torch.ones(c)) if cfg.ca_gamma else None

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        k_cache: Tensor | None,
        v_cache: Tensor | None,
        rows: Rows,
        text: Text,
        *,
        mix: tuple[Tensor, bool] | None = None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (B, n, C); `mod` is the condition (B, C), or with shared AdaLN its modulation (B, 1, 6, C).

        `rows` and `spans`: see `SelfAttention`; `text`: keys, values and mask of `CrossAttention`. `mix` are the
        arguments of `mix_halves`, for a layer that CFG is applied at. Returns the tokens (B, n, C) and the keys and
        values (B, H, p + n, D).
        """
        sa, ca, norm, ffn = self.sa, self.ca, self.ca_norm, self.ffn
        if self.shared_aln:
            m = _modulation(self.ada_gss, mod)
        else:
            m = linear32(self.ada_lin, mod).view(-1, 1, 6, x.shape[-1])
        biases = sa.q_bias, sa.zero_k_bias, sa.v_bias
        q, k, v = _before_self_attention(x, m, self.eps, sa.mat_qkv.weight, *biases, sa.scale_mul_1H11, *rows)
        out, k, v = sa(q, k, v, k_cache, v_cache, spans)
        between = sa.proj.weight, sa.proj.bias, norm.weight, norm.bias, ca.mat_q.weight, ca.mat_q.bias
        x, q = _between_attentions(x, out, m, norm.eps, *between)
        after = ca.proj.weight, ca.proj.bias, ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight, ffn.fc2.bias
        x = _after_cross_attention(x, ca(q, text), m, self.eps, self.ca_gamma, *after)
        return x if mix is None else mix_halves(x, *mix), k, v


@in_graph
def _modulation(own: Tensor, shared: Tensor) -> Tensor:
    """(B, 1, 6, C): gains, scales and shifts of a layer, float32."""
    return own.float() + shared


@in_graph
def _before_self_attention(
    x: Tensor,
    m: Tensor,
    eps: float,
    weight: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, n, D) of x (B, n, C): the first two normalised and rotated, in one dtype."""
    _, _, scale, _, shift, _ = m.unbind(2)
    h = (_norm(x, eps) * (scale + 1) + shift).to(weight.dtype)
    heads, head_dim = log_scale.shape[1], cos.shape[-1]
    qkv = F.linear(h, weight, torch.cat((q_bias, k_bias, v_bias))).view(*x.shape[:2], 3, heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q = F.normalize(q.float(), dim=-1) * log_scale.float().clamp_max(_MAX_LOG_SCALE).exp()
    k = F.normalize(k.float(), dim=-1)
    return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


@in_graph
def _between_attentions(
    x: Tensor,
    out: Tensor,
    m: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The stream x (B, n, C) with what self-attention read, out (B, H, n, D); and the queries of cross-attention."""
    gain = m.unbind(2)[0]
    a = F.linear(out.transpose(1, 2).reshape(x.shape), weight, bias)
    x = (x + a * gain).to(x.dtype)
    h = F.layer_norm(x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), eps)
    q = F.linear(h.to(q_weight.dtype), q_weight, q_bias)
    return x, q.view(*x.shape[:2], out.shape[1], -1).transpose(1, 2)


@in_graph
def _after_cross_attention(
    x: Tensor,
    out: Tensor,
    m: Tensor,
    eps: float,
    ca_gain: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """The stream x (B, n, C) with what cross-attention read, out (B, H, n, D), and what feed-forward makes of it."""
    _, gain, _, scale, _, shift = m.unbind(2)
    a = F.linear(out.transpose(1, 2).flatten(2), weight, bias)
    x = (x + (a if ca_gain is None else a * ca_gain.float())).to(x.dtype)
    h = (_norm(x, eps) * (scale + 1) + shift).to(weight1.dtype)
    h = F.linear(F.gelu(F.linear(h, weight1, bias1), approximate="tanh"), weight2, bias2)
    return (x + h * gain).to(x.dtype)


def mix_halves(x: Tensor, matrix: Tensor, drop: bool) -> Tensor:
    """CFG between layers: the halves of x (2B, n, C) mixed by `Guidance.matrix`, with `drop` the first (B, n, C)."""
    cond, uncond = x.chunk(2)
    first = matrix[0, 0] * cond + matrix[0, 1] * uncond
    return first if drop else torch.cat((first, matrix[1, 0] * cond + matrix[1, 1] * uncond))


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def linear32(layers: nn.Module, x: Tensor) -> Tensor:
    """SiLU and the last linear layer of `layers`, in float32 whatever its weights are."""
    linear: Any = layers[-1]  # type: ignore[index]
    return F.linear(F.silu(x.float()), linear.weight.float(), linear.bias.float())


class HeadNorm(nn.Module):
    """AdaLN before the classifier head, float32."""

    def __init__(self, cfg: InfinityConfig) -> None:
        super().__init__()
        self.eps = cfg.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cfg.embed_dim, 2 * cfg.embed_dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = linear32(self.ada_lin, cond).view(-1, 1, 2, x.shape[-1]).unbind(2)
        return _norm(x, self.eps) * (scale + 1) + shift


class TextNorm(nn.Module):
    """Root-mean-square norm of the text features, float32 inside; the result has the dtype of the weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(
            self.weight.dtype
        )


class TextPool(nn.Module):
    """Attentive pooling of the text into the condition."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.ca = CrossAttention(width, text_width, text_width // (128 if width <= 4096 else 64), pool=True)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        return self.ca.pooled(text, mask)
