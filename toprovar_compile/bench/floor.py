"""The arithmetic floor of Infinity: what a scale costs if nothing but its matrix products and weights took time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toprovar_compile.models.bsq import BSQVAEConfig
    from toprovar_compile.models.infinity import InfinityConfig
    from toprovar_compile.plan import Plan
    from toprovar_compile.schedule import ScaleSchedule


@dataclass(frozen=True)
class Rates:
    """What a device can do: arithmetic in 10^12 operations a second, memory in 10^12 bytes a second."""

    tflops: float = 600.0
    tbytes: float = 3.0


@dataclass(frozen=True)
class ScaleFloor:
    """Of one scale through all layers and the head: operations, bytes of weights and cache, floor of its time."""

    linear_flops: float
    attention_flops: float
    bytes: float
    ms: float


def scale_floors(
    cfg: InfinityConfig,
    schedule: ScaleSchedule,
    plan: Plan | None,
    rates: Rates,
    *,
    rows: int = 2,
    text_tokens: int = 0,
    width: int = 2,
) -> list[ScaleFloor]:
    """The floor of each scale that `plan` runs (None: all, dense), for `rows` rows and weights of `width` bytes each.

    Counted are the products of linear layers and attention, on the tokens that each layer computes; weights and the
    key/value cache are read once a scale. Keys and values of the text, and modulations, are made once an image and not
    counted. The floor is the longer of arithmetic and memory.
    """
    c, hidden, bits = cfg.embed_dim, cfg.hidden, cfg.bits
    weights = 3 * c * c + 3 * c * c + 2 * c * hidden  # qkv and projection; those of cross-attention; feed-forward
    cached = [0] * cfg.depth
    floors = []
    for s, n in enumerate(schedule.tokens):
        if plan is not None and not plan.runs(s):
            break
        linear = 2 * rows * n * c * 2 * bits + (2 * n * bits * c if s else 0)
        attention = 0
        read = width * (2 * c * bits + bits * c)
        for layer in range(cfg.depth):
            k = n if plan is None else plan.action(s, layer).tokens(n)
            if k == 0:
                continue
            cached[layer] += k
            linear += 2 * rows * k * weights
            attention += 4 * rows * k * c * (cached[layer] + text_tokens)
            read += width * (weights + 2 * rows * c * cached[layer])
        ms = max((linear + attention) / (rates.tflops * 1e9), read / (rates.tbytes * 1e9))
        floors.append(ScaleFloor(linear, attention, read, ms))
    return floors


def decoder_flops(cfg: BSQVAEConfig, grid: tuple[int, int]) -> float:
    """Operations of the convolutions that decode one image of `grid` positions."""
    from torch.utils.flop_counter import FlopCounterMode

    from toprovar_compile.models.bsq import BSQVAE

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        BSQVAE(cfg).decode(torch.empty(1, cfg.codebook_dim, *grid))
    return float(counter.get_total_flops())
