"""VAR: class-conditional next-scale image generation, in the parameter layout of FoundationVision/VAR.

Parameter names and shapes are those of the official checkpoints (`var_d16.pth` .. `var_d30.pth` and
`vae_ch160v4096z32.pth`). `VAR.forward` is one whole generation; Dynamo skips its Python loop over scales and
captures `VAR.step`, one scale through all layers, and `VQVAE.decode`.
Source of the method: Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import OptionError
from toprovar_compile.models.vqvae import VQVAE, VQVAEConfig
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import decide
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import generation

_MAX_LOG_SCALE = math.log(100)  # clamp of the learned attention temperature under QK-l2-norm


@dataclass(frozen=True)
class VARConfig:
    """Shape of a VAR transformer and its VQ-VAE; `official(depth)` gives the published ones."""

    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    cond_drop_rate: float = 0.1
    vae: VQVAEConfig = field(default_factory=VQVAEConfig)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        """Side lengths of the square token maps, coarse to fine."""
        return self.vae.patch_nums

    @classmethod
    def official(cls, depth: int, *, shared_aln: bool = False) -> VARConfig:
        """The published 256x256 models, depth 16, 20, 24 or 30 (the 512x512 one, d36-s, has another schedule)."""
        return cls(depth=depth, embed_dim=64 * depth, num_heads=depth, shared_aln=shared_aln)

    def to_json(self) -> str:
        """Canonical JSON text of the configuration."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> VARConfig:
        """Inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        vae: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("vae").items()}
        return replace(cls(**raw), vae=VQVAEConfig(**vae))


@dataclass(frozen=True)
class Sampling:
    """How a model samples when its caller does not say; see `VAR.forward`."""

    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0


class SelfAttention(nn.Module):
    """Multi-head self-attention over the KV cache and the tokens of this scale."""

    zero_k_bias: Tensor

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        c = cfg.embed_dim
        self.num_heads, self.head_dim, self.l2_norm = cfg.num_heads, c // cfg.num_heads, cfg.attn_l2_norm
        if cfg.attn_l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, cfg.num_heads, 1, 1), math.log(4.0)))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(c, 3 * c, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("zero_k_bias", torch.zeros(c))
        self.proj = nn.Linear(c, c)

    def forward(
        self, x: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, scales: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend x (B, n, C) to the cache (B, H, p, D) and itself: (out (B, n, C), keys, values (B, H, p + n, D)).

        `scales`, for training, lists (start, end) of each scale in x: a token then sees its own scale and the earlier.
        """
        b, n, c = x.shape
        qkv_bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, qkv_bias).view(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(_MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves both in float32: twice the memory for the cache
        if k_cache is not None and v_cache is not None:
            k, v = torch.cat((k_cache, k), dim=2), torch.cat((v_cache, v), dim=2)
        if scales:  # block-causal without a mask: every scale is one plain attention call
            parts = [
                F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=self.scale)
                for a, b in scales
            ]
            out = torch.cat(parts, dim=2)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(b, n, c)), k, v


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """One transformer layer: AdaLN-modulated self-attention and feed-forward on the residual stream."""

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        c = cfg.embed_dim
        self.attn = SelfAttention(cfg)
        self.ffn = FeedForward(c, round(c * cfg.mlp_ratio))
        self.ln_wo_grad = nn.LayerNorm(c, eps=cfg.norm_eps, elementwise_affine=False)
        self.shared_aln = cfg.shared_aln
        if cfg.shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, c) / c**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        k_cache: Tensor | None,
        v_cache: Tensor | None,
        scales: Sequence[tuple[int, int]] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (B, n, C); `mod` is the condition (B, C), or with shared AdaLN its modulation (B, 1, 6, C).

        Returns the tokens (B, n, C) and the keys and values (B, H, p + n, D).
        """
        m = self.ada_gss + mod if self.shared_aln else self.ada_lin(mod).view(-1, 1, 6, x.shape[-1])
        gain1, gain2, scale1, scale2, shift1, shift2 = m.unbind(2)
        a, k, v = self.attn(self.ln_wo_grad(x) * (scale1 + 1) + shift1, k_cache, v_cache, scales)
        x = x + a * gain1
        x = x + self.ffn(self.ln_wo_grad(x) * (scale2 + 1) + shift2) * gain2
        return x, k, v


class HeadNorm(nn.Module):
    """AdaLN before the classifier head."""

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(cfg.embed_dim, eps=cfg.norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cfg.embed_dim, 2 * cfg.embed_dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond).view(-1, 1, 2, x.shape[-1]).unbind(2)
        return self.ln_wo_grad(x) * (scale + 1) + shift  # type: ignore[no-any-return]


class _SharedAdaLN(nn.Linear):
    def forward(self, cond: Tensor) -> Tensor:
        return super().forward(cond).view(-1, 1, 6, self.out_features // 6)


class VAR(nn.Module):
    """Visual autoregressive transformer with its VQ-VAE (attribute `vae`).

    `forward(labels)` generates images. Compile it with `torch.compile(model, backend="toprovar")`.
    `sampling` holds the defaults of `forward`; `class_names` maps labels to names, None when they are not known;
    `plan` is the pruning plan made for these weights, which compiled generation takes by default.
    """

    lvl_1L: Tensor
    class_names: list[str] | None = None
    plan: Plan | None = None

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.sampling = Sampling()
        self.schedule = ScaleSchedule.from_patch_nums(cfg.patch_nums)
        c, total = cfg.embed_dim, self.schedule.total
        self.vae = VQVAE(cfg.vae)
        self.word_embed = nn.Linear(cfg.vae.z_channels, c)
        self.class_emb = nn.Embedding(cfg.num_classes + 1, c)
        self.pos_start = nn.Parameter(torch.zeros(1, self.schedule.tokens[0], c))
        self.pos_1LC = nn.Parameter(torch.zeros(1, total, c))
        self.lvl_embed = nn.Embedding(len(cfg.patch_nums), c)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), _SharedAdaLN(c, 6 * c)) if cfg.shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.head_nm = HeadNorm(cfg)
        self.head = nn.Linear(c, cfg.vae.vocab_size)
        self.register_buffer("lvl_1L", torch.zeros(1, total, dtype=torch.int64), persistent=False)
        self.reset_constants()

    def reset_constants(self) -> None:
        """Fill the buffers that follow from the configuration, as a model built on the meta device needs it."""
        levels = torch.arange(len(self.schedule), device=self.lvl_1L.device)
        counts = torch.tensor(self.schedule.tokens, device=self.lvl_1L.device)
        self.lvl_1L.copy_(levels.repeat_interleave(counts, output_size=self.schedule.total).view(1, -1))

    def init_weights(self, std_scale: float = 1.0) -> None:
        """Initialise for training from scratch, with the official recipe's standard deviations."""
        c, depth = self.cfg.embed_dim, self.cfg.depth
        std = math.sqrt(1 / c / 3) * std_scale
        for name, p in self.named_parameters():
            if name.startswith("vae."):
                continue
            if name.endswith(("bias", "q_bias", "v_bias")):
                nn.init.zeros_(p)
            elif p.ndim >= 2 and not name.endswith(("ada_gss", "scale_mul_1H11")):
                nn.init.trunc_normal_(p, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_nm.ada_lin[1].weight.mul_(0.5)  # type: ignore[operator]
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attn.proj.weight.div_(math.sqrt(2 * depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
                if block.shared_aln:
                    block.ada_gss[:, :, 2:].mul_(0.5)
                    block.ada_gss[:, :, :2].mul_(1e-5)
                else:
                    linear = block.ada_lin[1]
                    assert isinstance(linear, nn.Linear)
                    linear.weight[2 * c :].mul_(0.5)
                    linear.weight[: 2 * c].mul_(1e-5)

    def fingerprint(self) -> str:
        """Identity of configuration and transformer weights, the same in every dtype and on every device.

        sha256 (16 hex digits) of the configuration and of eight bfloat16-rounded values of each parameter.
        """
        digest = hashlib.sha256(self.cfg.to_json().encode())
        named = [(name, p.detach().reshape(-1)) for name, p in self.named_parameters() if not name.startswith("vae.")]
        picks = []
        for _, flat in named:  # in float32 the last position of a large parameter would lie beyond its end
            at = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64, device=flat.device).long()
            picks.append(flat[at].bfloat16().float())
        for (name, _), values in zip(named, torch.stack(picks).tolist(), strict=True):
            digest.update(name.encode() + str(values).encode())
        return digest.hexdigest()[:16]

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Token logits, float32 (B, n, V), from the residual stream (B, n, C) and the condition (B, C)."""
        return self.head(self.head_nm(x, cond)).float()  # type: ignore[no-any-return]

    def step(
        self, x: Tensor, cond: Tensor, mod: Tensor, k_cache: Sequence[Tensor], v_cache: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One scale through all layers: the frame that is compiled.

        x (B, n, C) input tokens; cond (B, C); mod, its modulation or cond itself (see `Block`); k_cache, v_cache one
        (B, H, p, D) tensor a layer, or empty at the first scale. Returns logits (B, n, V) and the new caches.
        """
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, mod, k_cache[i] if k_cache else None, v_cache[i] if v_cache else None)
            keys.append(k)
            values.append(v)
        return self.get_logits(x, cond), keys, values

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(
        self,
        labels: Tensor,
        *,
        seed: int | None = None,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        more_smooth: bool = False,
    ) -> Tensor:
        """Generate images (batch, 3, H, W) in 0..1 for class labels, int64 (batch,).

        `num_classes` as a label is the unconditional class. `seed` fixes every draw. `cfg` is the guidance strength t
        of the last scale; scale s uses t * s / (S - 1): logits = (1 + t) * cond - t * uncond. `top_k` = 0 and
        `top_p` = 0 turn the filters off. Where they are None, `self.sampling` decides. `more_smooth` samples by Gumbel
        softmax (for show, not for metrics).
        Raises OptionError for labels of a wrong dtype, shape or range.
        """
        with generation(self.schedule, self.fingerprint, self.plan, keeps_caches=False) as session:
            default = self.sampling
            sampling = Sampling(
                cfg=default.cfg if cfg is None else cfg,
                top_k=default.top_k if top_k is None else top_k,
                top_p=default.top_p if top_p is None else top_p,
            )
            x, cond, mod, rng = self._begin(labels, seed)
            side = self.cfg.patch_nums[-1]
            f_hat = x.new_zeros(labels.shape[0], self.cfg.vae.z_channels, side, side)
            keys: list[Tensor] = []
            values: list[Tensor] = []
            batch, weights = labels.shape[0], self._between_scales()
            for s in session.scales():
                if x.shape[0] > batch and not session.guided():
                    x, cond, mod, keys, values = self._conditional_half(batch, x, cond, mod, keys, values)
                logits, keys, values = session.step(self.step, x, cond, mod, keys, values, caches=(*keys, *values))
                advance = partial(self._advance, s, sampling=sampling, more_smooth=more_smooth)
                f_hat, x = session.launch((s, sampling, more_smooth), advance, (logits, f_hat), weights, rng)
                decide(session, f_hat, self.vae.decode)
            images: Tensor = session.finished(self.vae.decode(f_hat))
            return images

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, torch.Generator | None]:
        """First input map, condition, modulation and generator, the batch doubled for CFG: cond first, then uncond."""
        if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
            raise OptionError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}",
                where="VAR.forward",
                expected="int64 of shape (batch,)",
                todo="pass torch.tensor([...])",
            )
        if labels.numel() == 0 or int(labels.min()) < 0 or int(labels.max()) > self.cfg.num_classes:
            raise OptionError(
                f"labels {labels.tolist()} are out of range",
                where="VAR.forward",
                expected=f"at least one label, each 0..{self.cfg.num_classes} (the last is unconditional)",
                todo="pass class indices of this model",
            )
        rng = None
        if seed is not None:
            rng = torch.Generator(device=labels.device)
            rng.manual_seed(seed)
        cond = self.class_emb(torch.cat((labels, torch.full_like(labels, self.cfg.num_classes))))
        first = self.schedule.tokens[0]
        x = cond.unsqueeze(1) + self.pos_start + self._positions(0, first)
        return x, cond, self.shared_ada_lin(cond), rng

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _conditional_half(
        batch: int, x: Tensor, cond: Tensor, mod: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """The first `batch` rows of everything, which a scale without guidance runs on."""
        return x[:batch], cond[:batch], mod[:batch], [k[:batch] for k in keys], [v[:batch] for v in values]

    def _positions(self, start: int, end: int) -> Tensor:
        """Level plus position embedding of the tokens start..end of the whole sequence: (1, end - start, C)."""
        return self.lvl_embed(self.lvl_1L[:, start:end]) + self.pos_1LC[:, start:end]  # type: ignore[no-any-return]

    def _between_scales(self) -> list[Tensor]:
        """The weights that `_advance` reads."""
        embeddings = (*self.word_embed.parameters(), *self.lvl_embed.parameters(), self.pos_1LC, self.lvl_1L)
        return [*self.vae.quantize.parameters(), *self.vae.quantize.buffers(), *embeddings]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(
        self,
        s: int,
        logits: Tensor,
        f_hat: Tensor,
        rng: torch.Generator | None = None,
        *,
        sampling: Sampling,
        more_smooth: bool,
    ) -> tuple[Tensor, Tensor]:
        """Sample scale s from logits (2B, n, V); return the new f_hat and the input (2B, n', C) of the next scale.

        Logits (B, n, V) are those of the conditional half alone and are not guided; the next input is then (B, n', C).
        """
        batch, last = f_hat.shape[0], len(self.cfg.patch_nums) - 1
        ratio = s / last if last else 1.0
        t = sampling.cfg * ratio
        halves = logits.shape[0] // batch
        mixed = logits if halves == 1 else (1 + t) * logits[:batch] - t * logits[batch:]
        embedding = self.vae.quantize.embedding
        mixed = filter_logits(mixed, sampling.top_k, sampling.top_p)
        tokens = draw_tokens(mixed, rng)  # also with more_smooth: later draws are then those of the official code
        if more_smooth:
            tau = max(0.27 * (1 - ratio * 0.95), 0.005)
            h = sample_gumbel(mixed.mul(1 + ratio), tau, rng).to(embedding.weight.dtype) @ embedding.weight.unsqueeze(0)
        else:
            h = embedding(tokens)
        side = self.cfg.patch_nums[s]
        h = h.transpose(1, 2).reshape(batch, self.cfg.vae.z_channels, side, side)
        f_hat, nxt = self.vae.quantize.next_input(s, f_hat, h)
        if s == last:
            return f_hat, nxt
        start = self.schedule.prior[s + 1]
        x = self.word_embed(nxt.flatten(2).transpose(1, 2))
        x = x + self._positions(start, start + self.schedule.tokens[s + 1])
        return f_hat, x.repeat(halves, 1, 1)

    def teacher_forced(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Training pass: logits (B, L, V) of all scales from labels (B,) and `VQVAE.quantize.teacher_inputs` output.

        Inputs of the first scales only give the logits of those scales. In training mode a share `cond_drop_rate` of
        the labels is replaced by the unconditional class. Attention is block-causal: a token sees its own scale and
        the coarser ones.
        """
        x, cond, mod, scales = self.teacher_begin(labels, inputs)
        for block in self.blocks:
            x, _, _ = block(x, mod, None, None, scales)
        return self.get_logits(x, cond)

    def teacher_begin(self, labels: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
        """What `teacher_forced` runs its blocks on: tokens (B, L, C), condition, modulation and the spans of scales."""
        if self.training:
            drop = torch.rand(labels.shape, device=labels.device) < self.cfg.cond_drop_rate
            labels = torch.where(drop, self.cfg.num_classes, labels)
        cond = self.class_emb(labels)
        first = cond.unsqueeze(1) + self.pos_start
        total = first.shape[1] + inputs.shape[1]
        x = torch.cat((first, self.word_embed(inputs)), dim=1) + self._positions(0, total)
        scales = [(p, p + n) for n, p in zip(self.schedule.tokens, self.schedule.prior, strict=True) if p < total]
        return x, cond, self.shared_ada_lin(cond), scales


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, n, V) with -inf for what top-k and then top-p rule out; 0 turns either off.

    Top-p keeps the smallest set of most likely tokens whose mass exceeds top_p.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    return logits


def draw_tokens(logits: Tensor, rng: torch.Generator | None) -> Tensor:
    """One token index a position: int64 (B, n) from logits (B, n, V).

    The draws are those of FoundationVision/VAR for the same generator state.
    """
    probs = logits.softmax(-1).view(-1, logits.shape[-1])
    # torch.multinomial does this for one sample, but waits for the device to check its input.
    return (probs / torch.empty_like(probs).exponential_(generator=rng)).argmax(-1).view(logits.shape[:-1])


def sample_gumbel(logits: Tensor, tau: float, rng: torch.Generator | None) -> Tensor:
    """Soft one-hot rows (B, n, V): softmax((logits + Gumbel noise) / tau)."""
    noise = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_(generator=rng).log()
    return ((logits + noise) / tau).softmax(-1)
