"""An Infinity that carries its own text encoder, so that it is called with prompts: the shipped emoji-infinity."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.errors import OptionError
from toprovar_compile.models.infinity import Infinity, InfinityConfig, InfinitySampling
from toprovar_compile.models.infinity_text import encode_prompts
from toprovar_compile.models.word_text import WordEncoder, WordTextConfig, WordTokenizer
from toprovar_compile.schedule import ScaleSchedule


class EmojiInfinity(Infinity):
    """Infinity over square token maps with a word encoder (attribute `text_encoder`).

    `model(["two red apples above a blue key"], seed=0)` gives images (1, 3, H, W) in 0..1. `on_scale`, if set, is
    called after each scale of a generation with the number of scales done and that of all. `example_prompts` are what
    calibration and tuning draw from.
    """

    on_scale: Callable[[int, int], None] | None = None
    example_prompts: Sequence[str] = ()

    def __init__(self, cfg: InfinityConfig, text: WordTextConfig, patch_nums: Sequence[int]) -> None:
        if (text.width, text.max_words) != (cfg.text_channels, cfg.text_maxlen):
            raise OptionError(
                f"the text encoder has {text.max_words} words of width {text.width}",
                where="EmojiInfinity",
                expected=f"{cfg.text_maxlen} of width {cfg.text_channels}, as the transformer",
            )
        super().__init__(cfg)
        self.text_cfg = text
        self.text_encoder = WordEncoder(text)
        self.tokenizer = WordTokenizer(text)
        self.schedule = ScaleSchedule.from_patch_nums(tuple(patch_nums))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> EmojiInfinity:
        """A model of the shape that `to_json` gave, its weights not filled in; "encoder": false leaves that out."""
        cfg = InfinityConfig.from_json(json.dumps(raw["model"]))
        model = cls(cfg, WordTextConfig.from_json(raw["text"]), raw["patch_nums"])
        if not raw.get("encoder", True):
            model.vae.encoder = nn.Identity()
        if "sampling" in raw:
            model.sampling = InfinitySampling(**raw["sampling"])
        return model

    def to_json(self) -> dict[str, Any]:
        """The shape and the default sampling as plain data."""
        return {
            "model": json.loads(self.cfg.to_json()),
            "text": asdict(self.text_cfg),
            "patch_nums": [h for h, _ in self.schedule.grids],
            "sampling": asdict(self.sampling),
        }

    def sample_prompts(self, count: int, seed: int) -> list[str]:
        """Random example prompts, different ones as far as there are as many."""
        if not self.example_prompts:
            raise OptionError("the model has no example prompts", where="EmojiInfinity", expected="prompts.json")
        order = torch.randperm(len(self.example_prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.example_prompts[order[i % len(order)]] for i in range(count)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of prompts, one float32 (words, C) each, as `Infinity.forward` takes them."""
        return encode_prompts(prompts, self.text_encoder, self.tokenizer)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(self, text: Any, *args: Any, negative: Any = None, **options: Any) -> Tensor:
        """Generate images (batch, 3, H, W) in 0..1 for prompts; see `Infinity.forward` for the options.

        `text` is one prompt, a list of prompts or their features; `negative` likewise.
        """
        if isinstance(text, str):
            text = [text]
        if _is_words(text):
            text = self.encode(text)
        if isinstance(negative, str):
            negative = [negative]
        if _is_words(negative):
            negative = self.encode(negative)
        images: Tensor = super().forward(text, *args, negative=negative, **options)
        return images

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(self, s: int, schedule: ScaleSchedule, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = super()._advance(s, schedule, *args, **kwargs)
        if self.on_scale is not None:
            self.on_scale(s + 1, len(schedule))
        return out


def _is_words(text: Any) -> bool:
    return text is not None and not isinstance(text, Tensor) and len(text) > 0 and isinstance(text[0], str)


def init_weights(model: EmojiInfinity) -> None:
    """Initialise for training from scratch; the tokenizer is left alone."""
    c, depth = model.cfg.embed_dim, model.cfg.depth
    std = (1 / c / 3) ** 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("vae.", "text_encoder.")) or "norm" in name or name.endswith("scale_mul_1H11"):
                continue
            nn.init.zeros_(p) if p.ndim < 2 else nn.init.trunc_normal_(p, std=std)
        model.cfg_uncond.normal_()
        model.head.weight.mul_(0.02)
        model.head_nm.ada_lin[1].weight.mul_(0.5)  # type: ignore[operator]
        if model.cfg.shared_aln:
            linear = model.shared_ada_lin[1]  # type: ignore[index]
            linear.weight.normal_(std=0.02)  # type: ignore[operator]
            linear.weight[: 2 * c] *= 0.2  # type: ignore[index, operator]
        for block in model.blocks:
            for branch in (block.sa.proj, block.ca.proj, block.ffn.fc2):  # type: ignore[union-attr]
                branch.weight.div_((3 * depth) ** 0.5)  # type: ignore[operator, union-attr]
            if model.cfg.shared_aln:
                block.ada_gss.normal_(std=0.5 * c**-0.5)  # type: ignore[operator]
                block.ada_gss[:, :, :2] = 0.5  # type: ignore[operator]
    model.text_encoder.init_weights()
