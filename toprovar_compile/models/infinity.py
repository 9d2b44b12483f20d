"""Infinity: text-conditional next-scale image generation by bits, in the parameter layout of FoundationVision/Infinity.

Parameter names and shapes are those of the official checkpoints, but that their `block_chunks` are one flat list
`blocks` here (`infinity_loading` maps them). `Infinity.forward` is one whole generation; Dynamo skips its Python loop
over scales and captures `Infinity.step`, one scale through all layers, and the decoder.
Source of the method: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling" (arXiv 2412.04431).

Precision. The residual stream, norms, modulations, the normalisation and rotation of queries and keys, and the head are
float32, as in the official code. Linear layers and attention run in the dtype of the weights, and so keys and values
are kept in it (the official code keeps keys in float32 and casts them for attention). Use `model.to(torch.bfloat16)`,
not autocast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import OptionError
from toprovar_compile.inductor import while_marking
from toprovar_compile.models.bsq import BSQVAE, sample_bits
from toprovar_compile.models.infinity_config import INFINITY_2B, INFINITY_8B, InfinityConfig, official_config
from toprovar_compile.models.infinity_layers import Block, HeadNorm, TextNorm, TextPool, linear32
from toprovar_compile.models.infinity_schedule import infinity_schedule, pair_tables
from toprovar_compile.models.infinity_text import TextBatch, pack_text
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import decide
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import check_equal_sizes, current_session, generation

__all__ = [
    "INFINITY_2B",
    "INFINITY_8B",
    "Guidance",
    "Infinity",
    "InfinityConfig",
    "InfinitySampling",
    "Options",
    "Start",
    "official_config",
]

_LEVELS = 15  # rows of the official level embedding


@dataclass(frozen=True)
class InfinitySampling:
    """How a model samples when its caller does not say; see `Infinity.forward`.

    The defaults are those of the official script for 2B; with spatial patchify a model starts with those for 8B.
    """

    cfg: float | Sequence[float] = 4.0
    tau: float | Sequence[float] = 0.5
    top_k: int = 900
    top_p: float = 0.97
    cfg_layers: int | Sequence[int] = 0


@dataclass(frozen=True)
class Start:
    """What holds for one generation. R rows are the prompts and, unless no scale is guided, the unconditional ones.

    x (R, 1, C) first input; cond (R, C) and its modulation mod (see `Block`), float32; text_k, text_v one
    (R, H, T, D) a layer; text_mask bool (R, 1, 1, T).
    """

    x: Tensor
    cond: Tensor
    mod: Tensor
    text_k: list[Tensor]
    text_v: list[Tensor]
    text_mask: Tensor

    def mark(self, *, static_rows: bool) -> Start:
        """Tell Dynamo that prompts differ in length, and with `static_rows` to compile for each batch size."""
        with while_marking:
            for t in (*self.text_k, *self.text_v):
                torch._dynamo.maybe_mark_dynamic(t, 2)
            torch._dynamo.maybe_mark_dynamic(self.text_mask, 3)
            if static_rows:
                for t in (self.x, self.cond, self.mod, self.text_mask, *self.text_k, *self.text_v):
                    torch._dynamo.mark_static(t, 0)
        return self

    def rows(self, count: int) -> Start:
        """The same for the first `count` rows alone."""
        text_k, text_v = ([t[:count] for t in ts] for ts in (self.text_k, self.text_v))
        return Start(self.x[:count], self.cond[:count], self.mod[:count], text_k, text_v, self.text_mask[:count])


@dataclass(frozen=True)
class Guidance:
    """Where the conditional and the unconditional half meet, and how strongly at each scale.

    `layers` says of each block whether it mixes the halves at its output; it is empty where none does. Unless the
    logits are mixed as well, the last of them drops the second half, which nobody reads from there on.
    """

    cfg: tuple[float, ...]
    layers: tuple[bool, ...]
    logits: bool

    @property
    def on(self) -> bool:
        """Whether there is an unconditional half."""
        return any(c != 1 for c in self.cfg)

    @property
    def drop(self) -> bool:
        """Whether the last layer that mixes drops the unconditional half."""
        return bool(self.layers) and not self.logits

    def off(self) -> Guidance:
        """No guidance at as many scales."""
        return Guidance((1.0,) * len(self.cfg), (), False)

    def matrix(self, s: int, device: torch.device) -> Tensor | None:
        """(2, 2) float32: what each half becomes of the two; None where no layer mixes them."""
        if not (self.on and self.layers):
            return None
        t = self.cfg[s]
        return _constant(((t, 1 - t), (t, 1 - t) if t != 1 else (0.0, 1.0)), device)


class Infinity(nn.Module):
    """Bitwise visual autoregressive transformer with its tokenizer (attribute `vae`).

    `forward(text)` generates images from T5 features. Compile it with `torch.compile(model, backend="toprovar")`.
    `schedule` is the default of `forward`, `sampling` holds its other defaults; `stream_dtype` is the precision of the
    residual stream; `plan` is the pruning plan made for these weights, which compiled generation takes by default.
    `on_bits`, if set, is called with the bits that each scale draws, int64 (batch, tokens, bits of a token), which hold
    until the next image.
    """

    plan: Plan | None = None
    on_bits: Callable[[Tensor], None] | None = None

    def __init__(self, cfg: InfinityConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.sampling = InfinitySampling(cfg=3.0, tau=1.0) if cfg.spatial_patchify else InfinitySampling()
        self.schedule = infinity_schedule()
        self.stream_dtype = torch.float32
        c, ct = cfg.embed_dim, cfg.text_channels
        self.vae = BSQVAE(cfg.vae)
        self.cfg_uncond = nn.Parameter(torch.zeros(cfg.text_maxlen, ct))
        self.text_norm = TextNorm(ct, cfg.norm_eps)
        self.text_proj_for_sos = TextPool(ct, c)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(ct, c), nn.GELU(approximate="tanh"), nn.Linear(c, c))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, c))
        self.lvl_embed = nn.Embedding(_LEVELS, c)
        self.word_embed = nn.Linear(cfg.bits, c)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c)) if cfg.shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.head_nm = HeadNorm(cfg)
        self.head = nn.Linear(c, 2 * cfg.bits)

    @classmethod
    def random(
        cls,
        cfg: InfinityConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Infinity:
        """A model in eval mode with random weights, made on the device: for timing, and for tests.

        Each layer changes the stream by about its own size, so that activations look like those of a trained model.
        """
        with torch.device("meta"):
            model = cls(cfg)
        model = model.to(dtype).to_empty(device=device)
        rng = torch.Generator(device)
        rng.manual_seed(seed)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("zero_k_bias"):
                    buffer.zero_()
            for name, p in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    p.fill_(1.0)
                elif name.endswith("scale_mul_1H11"):
                    p.fill_(math.log(4.0))
                elif name.endswith(("ada_gss", "cfg_uncond", "lvl_embed.weight", "pos_start")):
                    p.normal_(0, 0.5, generator=rng)
                elif p.ndim < 2:
                    p.zero_()
                else:
                    p.normal_(0, p[0].numel() ** -0.5, generator=rng)
        return model.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Identity of configuration and transformer weights, the same in every dtype and on every device.

        sha256 (16 hex digits) of the configuration and of eight bfloat16-rounded values of each parameter.
        """
        digest = hashlib.sha256(self.cfg.to_json().encode())
        picks = []
        for name, p in self.named_parameters():
            if not name.startswith("vae."):
                flat = p.detach().reshape(-1)
                picks.append(flat[:: max(1, flat.numel() // 8)][:8].bfloat16())
                digest.update(name.encode())
        digest.update(str(torch.cat(picks).float().tolist()).encode())
        return digest.hexdigest()[:16]

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """Bit logits, float32 (B, n, 2 * bits), from the residual stream (B, n, C) and the condition (B, C)."""
        return F.linear(self.head_nm(x, cond), self.head.weight.float(), self.head.bias.float())

    def step(
        self,
        x: Tensor,
        cond: Tensor,
        mod: Tensor,
        text_k: Sequence[Tensor],
        text_v: Sequence[Tensor],
        text_mask: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        k_cache: Sequence[Tensor],
        v_cache: Sequence[Tensor],
        matrix: Tensor | None = None,
        mixing: Sequence[bool] = (),
        drop: bool = False,
        even: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One scale through all layers: the frame that is compiled.

        x (R, n, C) input tokens; cond, mod, text_k, text_v and text_mask as in `Start`; rope_cos and rope_sin
        (1, 1, n, D) of this scale, as `pair_tables` gives them; k_cache, v_cache one (R, H, p, D) tensor a layer, or
        empty at the first scale.
        Layers whose entry of `mixing` is true (none, if it is empty) mix the halves by `matrix`; with `drop` the last
        of them drops the second half, after which logits and caches have half as many rows.
        `even` says that all caches have one length, which the compiler then has one symbol for instead of many.
        Returns logits (R, n, 2 * bits) and the new caches.
        """
        check_equal_sizes([t.shape[2] for t in (*text_k, *text_v)] + [text_mask.shape[3]])
        for caches in [(*k_cache, *v_cache)] if even else zip(k_cache, v_cache, strict=True):
            check_equal_sizes([t.shape[2] for t in caches if t is not None])
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            mixes = bool(mixing) and mixing[i]
            last = drop and mixes and not any(mixing[i + 1 :])
            x, k, v = block(
                x,
                mod,
                k_cache[i] if k_cache else None,
                v_cache[i] if v_cache else None,
                (rope_cos, rope_sin),
                (text_k[i], text_v[i], text_mask),
                **({"mix": (matrix, last)} if mixes else {}),
            )
            keys.append(k)
            values.append(v)
            if last:
                mod, cond, text_mask = (t.chunk(2)[0] for t in (mod, cond, text_mask))
                text_k, text_v = ([t.chunk(2)[0] for t in text] for text in (text_k, text_v))
        return self.get_logits(x, cond), keys, values

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(
        self,
        text: Sequence[Tensor] | Tensor,
        lengths: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        cfg: float | Sequence[float] | None = None,
        tau: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_layers: int | Sequence[int] | None = None,
        negative: Sequence[Tensor] | Tensor | None = None,
        negative_lengths: Sequence[int] | None = None,
        ratio: str | float | None = None,
        size: str | None = None,
        schedule: ScaleSchedule | None = None,
        forced_bits: Sequence[Tensor] = (),
    ) -> Tensor:
        """Generate images (batch, 3, H, W) in 0..1 for prompts, given as T5 features (see `encode_prompts`).

        `text`: one (length, C) tensor a prompt, or all padded, (batch, T, C), with their `lengths`. `seed` fixes every
        draw. `cfg` is the guidance strength t, one or one for each scale: t * cond + (1 - t) * uncond. It is applied
        where `cfg_layers` says: 0 is at the logits, -k at the output of the k-th layer from the end. `tau` divides the
        logits, one or one for each scale; `top_k` and `top_p` filter them, 0 being off. `negative`, text like `text`
        or one for all, takes the place of the learned unconditional text. The grids are those of `ratio`
        ("width:height", or height / width) and `size` ("0.06M", "0.25M", "0.60M", "1M"), or `schedule` itself.
        `forced_bits`, one int64 or bool (batch, h, w, bits of a tokenizer position) a scale, replace what the first
        scales draw. Where an argument is None, `self.sampling` and `self.schedule` decide.
        Raises OptionError for arguments that do not fit.
        """
        with torch.no_grad():
            grids = self._schedule(ratio, size, schedule)
            options = self._options(grids, cfg, tau, top_k, top_p, cfg_layers)
            with generation(grids, self.fingerprint, self.plan, keeps_caches=False) as session:
                start, rng = self._begin(text, lengths, negative, negative_lengths, options, seed)
                x, summed = start.x, None
                keys: list[Tensor] = []
                values: list[Tensor] = []
                for s in session.scales():
                    if options.guidance.on and not session.guided():
                        start, options, x, keys, values = self._conditional_half(start, options, x, keys, values)
                    cos, sin, matrix = self._of_scale(s, grids, options, x)
                    logits, keys, values = session.step(
                        self.step,
                        x,
                        start.cond,
                        start.mod,
                        start.text_k,
                        start.text_v,
                        start.text_mask,
                        cos,
                        sin,
                        keys,
                        values,
                        matrix,
                        options.guidance.layers,
                        options.guidance.drop,
                        session.even(keys),
                        caches=(*keys, *values),
                    )
                    forced = forced_bits[s] if s < len(forced_bits) else None
                    summed, x = self._advance(s, grids, logits, summed, rng, options, forced)
                    decide(session, summed, self.vae.decode)
                assert summed is not None
                images: Tensor = session.finished(self.vae.decode(summed))
                return images

    # what surrounds a step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _schedule(self, ratio: str | float | None, size: str | None, schedule: ScaleSchedule | None) -> ScaleSchedule:
        if schedule is not None or (ratio is None and size is None):
            if ratio is not None or size is not None:
                raise OptionError("a schedule is given with a ratio or a size", where="Infinity.forward")
            return schedule or self.schedule
        return infinity_schedule(1.0 if ratio is None else ratio, size or "1M")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _options(
        self,
        schedule: ScaleSchedule,
        cfg: float | Sequence[float] | None,
        tau: float | Sequence[float] | None,
        top_k: int | None,
        top_p: float | None,
        cfg_layers: int | Sequence[int] | None,
    ) -> Options:
        default, scales = self.sampling, len(schedule)
        layers = default.cfg_layers if cfg_layers is None else cfg_layers
        found = [layers] if isinstance(layers, int) else list(layers)
        depth = len(self.blocks)
        if not found or any(not -depth < layer <= 0 for layer in found):
            raise OptionError(
                f"cfg_layers is {layers!r}",
                where="Infinity.forward",
                expected=f"0 for the logits, or -1..-{depth - 1} for layers from the end",
            )
        guidance = Guidance(
            _per_scale("cfg", default.cfg if cfg is None else cfg, scales),
            tuple(i - depth in found for i in range(depth)) if any(found) else (),
            0 in found,
        )
        taus = _per_scale("tau", default.tau if tau is None else tau, scales)
        if min(taus) <= 0:
            raise OptionError(f"tau is {tau!r}", where="Infinity.forward", expected="numbers above 0")
        return Options(
            guidance if guidance.on else guidance.off(),
            taus,
            default.top_k if top_k is None else top_k,
            default.top_p if top_p is None else top_p,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self,
        text: Sequence[Tensor] | Tensor,
        lengths: Sequence[int] | None,
        negative: Sequence[Tensor] | Tensor | None,
        negative_lengths: Sequence[int] | None,
        options: Options,
        seed: int | None,
    ) -> tuple[Start, torch.Generator | None]:
        """Everything that holds for the generation; the unconditional rows come after the conditional ones."""
        batch = pack_text(
            text,
            lengths,
            negative,
            negative_lengths,
            self.cfg_uncond,
            guided=options.guidance.on,
            multiple=self.cfg.text_pad,
        )
        rng = None
        if seed is not None:
            rng = torch.Generator(device=self.cfg_uncond.device)
            rng.manual_seed(seed)
        # Half of an open number of rows is a size that layers are not compiled for.
        static_rows = bool(options.guidance.layers)
        return self.begin(batch, static_rows=static_rows).mark(static_rows=static_rows), rng

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, batch: TextBatch, *, static_rows: bool = False) -> Start:
        """First input, condition, modulation, and the text's keys and values of every layer.

        Within a generation they hold until the next one with `static_rows` like this.
        """
        session, args = current_session(), (batch.features, batch.mask[:, None, None])
        if session is None:
            x, cond, *rest = self._of_text(*args)
        else:
            key = "text", self.stream_dtype, static_rows
            x, cond, *rest = session.launch(key, self._of_text, args, self._text_weights())
        mod = rest.pop(0) if self.cfg.shared_aln else cond
        return Start(x, cond, mod, rest[::2], rest[1::2], args[1])

    def _of_text(self, features: Tensor, mask: Tensor) -> list[Tensor]:
        """First input, condition and, if layers share it, its modulation; then keys and values of each layer."""
        features = self.text_norm(features)
        cond = self.text_proj_for_sos(features, mask).float()
        x = cond.unsqueeze(1) + self.pos_start.float() + self._level(0)
        text = self.text_proj_for_ca(features)
        pairs = [t for block in self.blocks for t in block.ca.keys_values(text)]  # type: ignore[operator, union-attr]
        return [x.to(self.stream_dtype), cond, *([self._modulation(cond)] if self.cfg.shared_aln else []), *pairs]

    def _modulation(self, cond: Tensor) -> Tensor:
        return linear32(self.shared_ada_lin, cond).view(-1, 1, 6, self.cfg.embed_dim)

    def _text_weights(self) -> list[Tensor]:
        """The weights that `_of_text` reads."""
        modules = (self.text_norm, self.text_proj_for_sos, self.text_proj_for_ca, self.shared_ada_lin)
        weights = [w for m in modules for w in (*m.parameters(), *m.buffers())]
        for block in self.blocks:
            ca: Any = block.ca
            weights += (ca.mat_kv.weight, ca.v_bias, ca.zero_k_bias)
        return [*weights, self.pos_start, self.lvl_embed.weight]

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _conditional_half(
        start: Start, options: Options, x: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Start, Options, Tensor, list[Tensor], list[Tensor]]:
        """What scales run on from here, on which the plan leaves guidance out."""
        batch = x.shape[0] // 2
        half = start.rows(batch).mark(static_rows=False)
        unguided = replace(options, guidance=options.guidance.off())
        return half, unguided, x[:batch], [k[:batch] for k in keys], [v[:batch] for v in values]

    def _level(self, s: int) -> Tensor:
        return self.lvl_embed.weight[s].float()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _of_scale(
        self, s: int, schedule: ScaleSchedule, options: Options, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines, sines and the guidance matrix of scale s, whose input is x."""
        head_dim = self.cfg.embed_dim // self.cfg.num_heads
        cos, sin = pair_tables(schedule, head_dim, self.cfg.rope_normalised, x.device)[s]
        matrix = options.guidance.matrix(s, x.device)
        return cos, sin, matrix

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(
        self,
        s: int,
        schedule: ScaleSchedule,
        logits: Tensor,
        summed: Tensor | None,
        rng: torch.Generator | None,
        options: Options,
        forced: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sample scale s from logits (R, n, 2 * bits); return the new sum of codes and the next input (R, n', C)."""
        session, guidance, numbers = current_session(), options.guidance, options.numbers(logits.device)
        assert session is not None
        args = [numbers, logits] if summed is None else [numbers, logits, summed]
        if forced is not None:
            args.append(self._checked(forced, s, schedule, logits, guidance))
        mixed = guidance.logits and guidance.cfg[s] != 1
        how = _Draw(
            s,
            schedule,
            options.top_k,
            options.top_p,
            self.stream_dtype,
            halves=guidance.logits,
            mixed=mixed,
            doubled=guidance.on,
            first=summed is None,
            forced=forced is not None,
            told=self.on_bits is not None,
        )
        weights = (*self.word_embed.parameters(), self.lvl_embed.weight)
        summed, *rest = session.launch(("bits", how), partial(self._draw, how), args, weights, rng)
        if self.on_bits is not None:
            self.on_bits(rest.pop())
        return summed, rest[0] if rest else summed

    def _checked(self, forced: Tensor, s: int, schedule: ScaleSchedule, logits: Tensor, guidance: Guidance) -> Tensor:
        """Bits that take the place of drawn ones, as int64 on the device of the logits."""
        (h, w), fold = schedule.grids[s], 2 if self.cfg.spatial_patchify else 1
        batch = logits.shape[0] // 2 if guidance.logits else logits.shape[0]
        wanted = (batch, h * fold, w * fold, self.vae.codebook_dim)
        if tuple(forced.shape) != wanted:
            raise OptionError(
                f"forced_bits[{s}] has shape {tuple(forced.shape)}", where="Infinity.forward", expected=str(wanted)
            )
        return forced.to(device=logits.device, dtype=torch.int64)

    def _draw(self, how: _Draw, numbers: Tensor, logits: Tensor, *rest: Any) -> list[Tensor]:
        """The new sum of codes, the next input unless this is the last scale, and the bits if somebody is told them.

        `numbers` are those of `Options`; `rest` are the sum of codes so far, forced bits and the generator, where they
        are given.
        """
        left, s = list(rest), how.scale
        summed = None if how.first else left.pop(0)
        forced = left.pop(0) if how.forced else None
        scale, t, other = numbers[s].unbind()
        batch = logits.shape[0] // 2 if how.halves else logits.shape[0]
        logits = logits * scale
        if how.mixed:
            logits = t * logits[:batch] + other * logits[batch:]
        drawn = sample_bits(logits[:batch].contiguous(), how.top_k, how.top_p, left[0] if left else None)
        h, w = how.schedule.grids[s]
        fold = 2 if self.cfg.spatial_patchify else 1
        bits = drawn.view(batch, h, w, -1)
        if fold > 1:
            bits = F.pixel_shuffle(bits.permute(0, 3, 1, 2), fold).permute(0, 2, 3, 1)
        codes = self.vae.bits_to_codes(bits if forced is None else forced)
        grids = tuple((a * fold, b * fold) for a, b in how.schedule.grids)
        summed, nxt = self.vae.next_input(s, summed, codes, grids)
        out = [summed]
        if nxt is not None:
            nxt = F.pixel_unshuffle(nxt, fold) if fold > 1 else nxt
            tokens = nxt.flatten(2).transpose(1, 2).to(self.word_embed.weight.dtype)
            x = (self.word_embed(tokens).float() + self._level(s + 1)).to(how.dtype)
            out.append(x.repeat(2, 1, 1) if how.doubled else x)
        return [*out, drawn] if how.told else out


@dataclass(frozen=True)
class _Draw:
    """How a scale is sampled; what is launched for one is the same for an equal one.

    `halves`: the logits are those of both halves, which are `mixed` or not; `doubled`: the next input has both;
    `told`: somebody wants to know the bits.
    """

    scale: int
    schedule: ScaleSchedule
    top_k: int
    top_p: float
    dtype: torch.dtype
    halves: bool
    mixed: bool
    doubled: bool
    first: bool
    forced: bool
    told: bool


@dataclass(frozen=True)
class Options:
    """What a generation was asked for: guidance and temperature of each scale, and the filters."""

    guidance: Guidance
    tau: tuple[float, ...]
    top_k: int
    top_p: float

    def numbers(self, device: torch.device) -> Tensor:
        """(scales, 3) float32: 1 / tau, t and 1 - t of each scale."""
        return _constant(tuple((1 / tau, t, 1 - t) for tau, t in zip(self.tau, self.guidance.cfg, strict=True)), device)


@lru_cache(maxsize=64)
def _constant(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """Copying numbers to a device waits for it, so they are kept."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(rows, device=device)


def _per_scale(name: str, value: float | Sequence[float], scales: int) -> tuple[float, ...]:
    values = (float(value),) * scales if isinstance(value, int | float) else tuple(float(v) for v in value)
    if len(values) < scales:
        raise OptionError(
            f"{name} has {len(values)} values", where="Infinity.forward", expected=f"one, or one for each of {scales}"
        )
    return values[:scales]
