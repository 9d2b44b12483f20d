"""mit-han-lab/hart: the official `HARTForT2I` object, its scales run by a step over the modules of its own blocks.

The text (context) tokens are a first step that fills the caches and belongs to no scale; scale s of the schedule is the
official stage s + 1. The last scale is a masked one with a diffusion head, which is the official module.
Source of the method: Tang et al., "HART: Efficient Visual Generation with Hybrid Autoregressive Transformer"
(arXiv 2410.10812).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.models.var import draw_tokens, filter_logits, sample_gumbel
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import decide
from toprovar_compile.prepare.family import Family, lacks
from toprovar_compile.prepare.sharing import check_device, check_ready, compare_blocks, fingerprint, leave_inference
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import generation

_WHERE = "prepare, mit-han-lab/hart"
_ENTRY = "autoregressive_infer_cfg"
_TOP_K = (600, 300)  # before and from stage 7 on: fixed there, whatever the argument says
_LATE = 7


class Layer(nn.Module):
    """One official block (`block`), computed by its own submodules but for the attention between them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        attn: Any = block.attn
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, float(attn.scale)
        self.l2_norm = bool(attn.attn_l2_norm)
        self.modulated = not block.disable_aln
        self.table = bool(block.disable_aln and block.shared_aln)

    def forward(
        self, x: Tensor, condition: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (R, n, C); condition (R, 1, C) pooled text; caches (R, H, p, D); cos and sin (R, 1, n, D).

        Returns the tokens and the keys and values (R, H, p + n, D).
        """
        block: Any = self.block
        gains = self._modulation(condition)
        if gains is None:
            a, k, v = self._attend(norm(block.ln_wo_grad, x), k_cache, v_cache, cos, sin)
            x = x + a
            return x + block.ffn(norm(block.ln_wo_grad, x)), k, v
        gain1, gain2, scale1, scale2, shift1, shift2 = gains
        h = norm(block.ln_wo_grad, x) * (scale1 + 1)
        a, k, v = self._attend((h + shift1).to(h.dtype), k_cache, v_cache, cos, sin)
        x = x + (a * gain1).to(a.dtype)
        h = norm(block.ln_wo_grad, x) * (scale2 + 1)
        return x + block.ffn((h + shift2).to(h.dtype)) * gain2, k, v

    def _modulation(self, condition: Tensor) -> tuple[Tensor, ...] | None:
        block: Any = self.block
        if self.modulated:
            m: Tensor = block.ada_lin(condition)
            return m.view(-1, 1, 6, m.shape[-1] // 6).unbind(2)
        if self.table:
            table: Tensor = block.scale_shift_table[None] + condition
            return table.chunk(6, dim=1)
        return None

    def _attend(
        self, x: Tensor, k_cache: Tensor | None, v_cache: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.block.attn
        b, n, c = x.shape
        qkv = F.linear(x, attn.qkv_proj.weight, torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias)))
        q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * attn.scale_mul_1H11.clamp_max(math.log(100)).exp()
            k = F.normalize(k, dim=-1)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        q, k = q.to(v.dtype), k.to(v.dtype)
        if k_cache is not None and v_cache is not None:
            k, v = torch.cat((k_cache, k), dim=2), torch.cat((v_cache, v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return attn.proj(out.transpose(1, 2).reshape(b, n, c)), k, v


def rotate_half(x: Tensor) -> Tensor:
    """The two halves of the last dimension, exchanged, the then first one negated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """What an official norm computes: a LayerNorm, or a root-mean-square norm whose kernel is not needed here."""
    if isinstance(module, nn.LayerNorm | nn.Identity):
        return module(x)  # type: ignore[no-any-return]
    weight: Any = module.weight
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + module.variance_epsilon)  # type: ignore[operator]
    return h.to(x.dtype) * weight.to(x.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Image:
    """What the scales of one generation share: condition (R, 1, C) of the layers, `text` (R, T, C) of the head, level
    embeddings (1, L, C), and the largest text position of each row, (R, 1, 1)."""

    condition: Tensor
    text: Tensor
    levels: Tensor
    offset: Tensor
    rng: torch.Generator | None
    cfg: float
    top_p: float
    more_smooth: bool


class PreparedHART(nn.Module):
    """Generation with an official HART: `forward` has the arguments and the result of its entry point.

    `official` is the model itself, a submodule of this one under no other name; `plan` is the pruning plan made for
    its weights.
    """

    plan: Plan | None = None

    def __init__(self, official: nn.Module) -> None:
        super().__init__()
        self._official = (official,)  # a tuple, as the layers below already hold the modules that run
        model: Any = official
        _check_supported(model)
        self.layers = nn.ModuleList(Layer(block) for block in model.blocks)
        self.head_nm, self.head = model.head_nm, model.head
        self.schedule = ScaleSchedule.from_patch_nums([int(n) for n in model.patch_nums[1:]])
        _check_layer(self.layers[0], model)

    def fingerprint(self) -> str:
        """Identity of configuration and transformer weights, the same in every dtype and on every device."""
        model: Any = self._official[0]
        config = [model.C, model.num_heads, model.depth, model.context_token, list(map(int, model.patch_nums))]
        return fingerprint(f"hart {json.dumps(config)}", model.named_parameters())

    def step(
        self,
        x: Tensor,
        condition: Tensor,
        text: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Sequence[Tensor],
        v_cache: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """One scale through all layers: the frame that is compiled.

        x (R, n, C) input tokens; condition (R, 1, C) for the layers and text (R, 1, C) for the head; cos and sin
        (R, 1, n, D); one cache (R, H, p, D) a layer, or none. Returns logits (R, n, V), the last layer's tokens and
        the new caches.
        """
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            cache = (k_cache[i], v_cache[i]) if k_cache else (None, None)
            x, k, v = layer(x, condition, *cache, cos, sin)
            keys.append(k)
            values.append(v)
        head: Any = self.head_nm
        m = head.ada_lin(text)
        scale, shift = m.view(-1, 1, 2, m.shape[-1] // 2).unbind(2)
        h = norm(head.ln_wo_grad, x.float()) * (scale + 1) + shift
        return self.head(h.float()).float(), x, keys, values

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(
        self,
        B: int,
        label_B: Tensor,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        context_position_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        final_stage: int = 0,
        num_maskgit_iters: int = 1,
    ) -> Tensor:
        """Images (B, 3, H, W) in 0..1 of text features label_B (B, T, Ct), as the official function.

        `top_k` has no effect, there as here. Raises OptionError for arguments that do not fit the model.
        """
        model: Any = self._official[0]
        again = num_maskgit_iters > 1  # the last scale then reads the caches that it returns
        with generation(self.schedule, self.fingerprint, self.plan, model.context_token, again) as session:
            image, f_hat, x, cos, sin = self._begin(
                B, label_B, g_seed, cfg, top_p, more_smooth, context_position_ids, context_mask
            )
            logits, _, keys, values = session.step(self.step, x, image.condition, image.text, cos, sin, [], [])
            f_hat, x = self._advance(0, logits[:, -1:], f_hat, image)
            last = len(self.schedule) - 1
            for s in session.scales():
                if x.shape[0] > B and not session.guided():
                    image, x, keys, values = self._conditional_half(B, image, x, keys, values)
                if s < last:
                    cos, sin = self._rope(x, s, image, None)
                    logits, _, keys, values = session.step(
                        self.step, x, image.condition, image.text, cos, sin, keys, values
                    )
                    f_hat, x = self._advance(s + 1, logits, f_hat, image)
                    decide(session, f_hat, self._decode)
                    continue
                tokens = x.new_zeros(B, x.shape[1], model.Cvae, dtype=torch.float32)
                for chosen in self._masks(B, num_maskgit_iters, x.shape[1], x.device):
                    part, cos, sin = self._masked(x, s, image, chosen)
                    logits, hidden, keys, values = session.step(
                        self.step, part, image.condition, image.text, cos, sin, keys, values
                    )
                    tokens = self._fill(tokens, chosen, logits, hidden, image, final_stage)
                side = model.patch_nums[-1]
                f_hat = (f_hat + tokens.transpose(1, 2).reshape(B, model.Cvae, side, side)).to(f_hat.dtype)
            images: Tensor = session.finished(self._decode(f_hat))
            return images

    # what surrounds a step

    def _decode(self, f_hat: Tensor) -> Tensor:
        model: Any = self._official[0]
        return model.vae_proxy[0].fhat_to_img(f_hat).add(1).mul(0.5)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self,
        batch: int,
        text: Tensor,
        seed: int | None,
        cfg: float,
        top_p: float,
        more_smooth: bool,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[_Image, Tensor, Tensor, Tensor, Tensor]:
        """The image's constants, an empty f_hat, and input, cosines and sines of the text step.

        Rows are the prompts, then as many without a prompt.
        """
        model: Any = self._official[0]
        tensors = [*model.named_parameters(), *model.named_buffers(), *model.vae_proxy[0].named_parameters()]
        device = check_ready(model, _WHERE, tensors)
        leave_inference(tensors)
        if [layer.block for layer in self.layers] != list(model.blocks) or self.head is not model.head:
            raise UnsupportedModelError(
                "blocks or the head of the model were exchanged",
                where=_WHERE,
                expected="the modules that were there at first",
                todo="undo the acceleration before changing modules",
            )
        if positions is None or mask is None:
            raise OptionError(
                "context_position_ids and context_mask are needed",
                where=_ENTRY,
                expected="those of hart.utils.encode_prompts",
            )
        for name, value in (("label_B", text), ("context_position_ids", positions), ("context_mask", mask)):
            check_device(name, value, device, _ENTRY)
            if value.shape[:2] != (batch, model.context_token):
                raise OptionError(
                    f"{name} has shape {tuple(value.shape)}",
                    where=_ENTRY,
                    expected=f"({batch}, {model.context_token}, ...): B rows of the model's context tokens",
                )
        rng = None if seed is None else model.rng.manual_seed(seed)
        features = norm(model.context_norm, torch.cat((text, torch.zeros_like(text))))
        cond = model.context_embed(features)
        positions = torch.cat((positions, torch.zeros_like(positions)))
        mask = torch.cat((mask, torch.zeros_like(mask)))
        mask[batch:, 0] = 1
        levels = model.lvl_embed(model.lvl_1L)
        x = cond + levels[:, : model.context_token]
        block = model.blocks[0]
        condition = _pooled(cond, mask, "avg" if block.disable_aln else block.sep_aln_pooling_mode)
        image = _Image(
            condition.unsqueeze(1),
            cond.amax(1, keepdim=True) if cond.shape[1] > 1 else cond,
            levels,
            positions[:, -1].view(-1, 1, 1),
            rng,
            cfg,
            top_p,
            more_smooth,
        )
        side = int(model.patch_nums[-1])
        f_hat = cond.new_zeros(batch, model.Cvae, side, side)
        return image, f_hat, x, *_tables(block.attn.context_rotary_emb, positions, x, block)

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _conditional_half(
        batch: int, image: _Image, x: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[_Image, Tensor, list[Tensor], list[Tensor]]:
        """The first `batch` rows of everything, which a scale without guidance runs on."""
        half = {name: getattr(image, name)[:batch] for name in ("condition", "text", "offset")}
        return replace(image, **half), x[:batch], [k[:batch] for k in keys], [v[:batch] for v in values]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rope(self, x: Tensor, s: int, image: _Image, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R, 1, n, D) of scale s, or of its tokens `chosen` (B, n)."""
        model: Any = self._official[0]
        side, largest = int(model.patch_nums[s + 1]), int(model.patch_nums[-1])
        axis = torch.arange(side, device=x.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2) / side * largest
        positions = grid.unsqueeze(0).repeat(x.shape[0], 1, 1)
        if chosen is not None:
            rows = chosen.repeat(x.shape[0] // chosen.shape[0], 1).unsqueeze(-1).expand(-1, -1, 2)
            positions = positions.gather(1, rows)
        block = model.blocks[0]
        return _tables(block.attn.rotary_emb, positions + image.offset, x, block)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(self, stage: int, logits: Tensor, f_hat: Tensor, image: _Image) -> tuple[Tensor, Tensor]:
        """Sample an official stage from logits (R, n, V): the new f_hat and the input (R, n', C) of the next stage."""
        model: Any = self._official[0]
        batch, side = f_hat.shape[0], int(model.patch_nums[stage])
        ratio = stage / model.num_stages_minus_1
        h, _ = self._sample(logits, stage, ratio, image, batch)
        h = h.transpose(1, 2).reshape(batch, model.Cvae, side, side)
        count = len(model.patch_nums)
        f_hat, nxt = model.vae_quant_proxy[0].get_next_autoregressive_input(
            stage, count, f_hat.clone(), h, patch_nums=model.patch_nums
        )
        start = model.context_token + sum(int(n) ** 2 for n in model.patch_nums[1 : stage + 1])
        x = model.word_embed(nxt.reshape(batch, model.Cvae, -1).transpose(1, 2))
        x = x + image.levels[:, start : start + x.shape[1]]
        return f_hat, x.repeat(logits.shape[0] // batch, 1, 1)

    def _sample(self, logits: Tensor, stage: int, ratio: float, image: _Image, batch: int) -> tuple[Tensor, Tensor]:
        """Embedded draws (B, n, Cvae), smoothed if that was asked for, and those of the tokens themselves."""
        model: Any = self._official[0]
        embedding = model.vae_quant_proxy[0].embedding
        t = image.cfg * ratio
        guided = logits.shape[0] > batch
        mixed = (1 + t) * logits[:batch] - t * logits[batch:] if guided else logits
        mixed = filter_logits(mixed, _TOP_K[stage >= _LATE], image.top_p)
        discrete = embedding(draw_tokens(mixed, image.rng))
        if not image.more_smooth:
            return discrete, discrete
        tau = max(0.27 * (1 - ratio * 0.95), 0.005)
        return sample_gumbel(mixed * (1 + ratio), tau, image.rng) @ embedding.weight.unsqueeze(0), discrete

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _masks(self, batch: int, iterations: int, count: int, device: torch.device) -> list[Tensor]:
        """For each iteration of the masked stage the tokens it predicts, sorted: int64 (B, n)."""
        orders = []
        for _ in range(batch):  # the official draws: from numpy, which g_seed does not seed
            shuffled = np.arange(count)
            np.random.shuffle(shuffled)
            orders.append(shuffled)
        order = torch.from_numpy(np.stack(orders))
        mask, chosen = torch.ones(batch, count, dtype=torch.bool), []
        for i in range(iterations):
            keep = np.floor(count * np.cos(math.pi / 2.0 * (i + 1) / iterations))
            length = int(max(1, min(int(mask[0].sum()) - 1, keep)))
            following = torch.zeros_like(mask).scatter_(1, order[:, :length], True)
            predicted = mask if i == iterations - 1 else mask ^ following
            mask = following
            chosen.append(predicted.nonzero()[:, 1].view(batch, -1).to(device))
        return chosen

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _masked(self, x: Tensor, s: int, image: _Image, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens `chosen` of x, and their cosines and sines."""
        if chosen.shape[1] == x.shape[1]:  # one iteration: all tokens in order
            return x, *self._rope(x, s, image, None)
        rows = chosen.repeat(x.shape[0] // chosen.shape[0], 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.gather(1, rows), *self._rope(x, s, image, chosen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fill(
        self, tokens: Tensor, chosen: Tensor, logits: Tensor, hidden: Tensor, image: _Image, final_stage: int
    ) -> Tensor:
        """Tokens (B, L, Cvae) with those of the last stage that were predicted: discrete ones plus a residual."""
        model: Any = self._official[0]
        batch, stage = tokens.shape[0], len(model.patch_nums) - 1
        ratio = (stage - 1) / model.num_stages_minus_1  # the official code keeps the one of the stage before
        h, discrete = self._sample(logits, stage, ratio, image, batch)
        if final_stage == 0:
            halves = hidden.shape[0] // batch
            z = norm(model.decoder_norm, hidden + model.word_embed(discrete).repeat(halves, 1, 1))
            rows, count, _ = z.shape
            t = image.cfg * ratio if halves == 2 else 1.0  # 1 is the official value for no guidance
            residual = model.diffloss.sample(z=z.reshape(rows * count, -1), temperature=1.0, cfg=t)
            h = h + residual.reshape(rows, count, -1)[:batch]
        at = chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return tokens.scatter(1, at, h.to(tokens.dtype))


def _pooled(text: Tensor, mask: Tensor, mode: str) -> Tensor:
    """The condition (R, C) of text tokens (R, T, C)."""
    if mode == "max":
        return text.amax(1)
    weights = mask.unsqueeze(-1)
    return (text * weights.to(text.dtype) / weights.sum(1).clamp(min=1).unsqueeze(1)).sum(1)


def _tables(rotary: Any, positions: Tensor, x: Tensor, block: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines (R, 1, n, D) in the dtype that linear layers compute in."""
    weight = block.attn.qkv_proj.weight
    like = F.linear(x[:1, :1].to(weight.dtype), weight[:1])
    cos, sin = rotary(like, positions)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _check_supported(model: Any) -> None:
    """Raise UnsupportedModelError for options of the official class that are not taken over."""
    block = model.blocks[0]
    problem = None
    if getattr(block, "use_cross_attn", False):
        problem = "use_cross_attn=True: its cross-attention is unfinished in the official code"
    elif model.context_token == 0:
        problem = "context_token=0: a class-conditional model"
    elif not hasattr(block.attn, "qkv_proj"):
        problem = "attn_type='gpt2', which the official code cannot generate with"
    elif any(getattr(m, "use_quant", False) for m in model.modules()):
        problem = "norms that quantise to int8"
    elif len(model.patch_nums) < 2:
        problem = "fewer than two scales"
    if problem:
        raise UnsupportedModelError(f"the model has {problem}", where=_WHERE, expected="the text-to-image model")


def _check_layer(layer: nn.Module, model: Any) -> None:
    """Raise UnsupportedModelError unless the first official block computes what our layer does."""
    block = model.blocks[0]
    weight = block.attn.proj.weight
    rng = torch.Generator().manual_seed(0)
    t, c = model.context_token, model.C
    x, text = (torch.randn(2, t, c, generator=rng).to(weight) for _ in range(2))
    positions = torch.arange(t, device=weight.device).expand(2, -1)
    mask = torch.ones_like(positions)
    condition = _pooled(text, mask, "avg" if block.disable_aln else block.sep_aln_pooling_mode).unsqueeze(1)

    def theirs() -> Tensor:
        return block(  # type: ignore[no-any-return]
            x=x, cond_BD=text, attn_bias=None, si=0, context_position_ids=positions, context_mask=mask
        )

    def ours() -> Tensor:
        tables = _tables(block.attn.context_rotary_emb, positions, x, block)
        return layer(x, condition, None, None, *tables)[0]  # type: ignore[no-any-return]

    compare_blocks(theirs, ours, x, _WHERE)


def _missing(model: nn.Module) -> list[str]:
    return lacks(
        model,
        ("word_embed", "context_embed", "head_nm", "head", "diffloss", "blocks.0.attn.proj", "blocks.0.ln_wo_grad"),
        ("patch_nums", "context_token", "vae_proxy", "vae_quant_proxy", "rng", "decoder_norm"),
    )


def _entry(prepared: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    return compiled


FAMILY = Family(
    name="HART (mit-han-lab/hart)",
    entry=_ENTRY,
    arguments=(
        "B",
        "label_B",
        "g_seed",
        "cfg",
        "top_k",
        "top_p",
        "more_smooth",
        "context_position_ids",
        "context_mask",
        "final_stage",
        "num_maskgit_iters",
    ),
    missing=_missing,
    prepare=PreparedHART,
    make_entry=_entry,
)
