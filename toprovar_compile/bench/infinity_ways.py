"""The ways in which the Infinity benchmark generates the same image: our model, the official code, FastVAR's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.bench import infinity_official
from toprovar_compile.bench.timeline import Timeline
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

Generate = Callable[..., Tensor]

TEXT, SCALE, SAMPLING, VAE, REST = "text", "scale", "sampling", "vae", "rest"
"""What the spans of an image are called, in the order in which they come; scale and sampling come once a scale."""


@dataclass(frozen=True)
class Picture:
    """What every way generates: one prompt of random text features, the token grids and the sampling."""

    schedule: ScaleSchedule
    text: Tensor
    cfg: float = 4.0
    tau: float = 0.5
    top_k: int = 900
    top_p: float = 0.97

    def sampling(self) -> dict[str, Any]:
        """The sampling as arguments of `Infinity.forward`."""
        return {"cfg": self.cfg, "tau": self.tau, "top_k": self.top_k, "top_p": self.top_p}


@dataclass
class Running:
    """A way with its weights on the device.

    `compiled()` makes a function of (seed, forced bits or None) anew. `timeline` is marked while it runs; when it is
    not on, `drawn` gets the bits that each scale drew, int64 (1, tokens, bits of a token).
    """

    compiled: Callable[[], Generate]
    timeline: Timeline
    drawn: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """`start` builds the model and frees it at the end; `plan` is what it prunes, for ways of ours that are compiled.

    `compiles` is False where the first image makes nothing that later ones use.
    """

    name: str
    about: str
    start: Callable[[], AbstractContextManager[Running]]
    plan: Plan | None = None
    dense: bool = True
    compiles: bool = True


@contextmanager
def our_model(
    cfg: InfinityConfig,
    picture: Picture,
    device: torch.device,
    dtype: torch.dtype,
    compile_model: Callable[[Infinity], Generate],
) -> Iterator[Running]:
    """Our model with random weights, those of seed 0."""
    model = random_model(cfg, picture.schedule, device, dtype)
    running = Running(lambda: _ours(compile_model(model), picture, device), Timeline(device))
    mark = running.timeline.mark
    _hook(model, "_of_scale", before=lambda: mark(SCALE), disable=True)
    _hook(model, "_advance", before=lambda: mark(SAMPLING), after=lambda _: mark(VAE), disable=True)
    model.on_bits = lambda bits: None if running.timeline.on else running.drawn.append(bits.clone())
    yield running


def random_model(cfg: InfinityConfig, schedule: ScaleSchedule, device: torch.device, dtype: torch.dtype) -> Infinity:
    """Our model with the weights of seed 0, made on the device."""
    model = Infinity.random(cfg, device=device, dtype=dtype, seed=0)
    model.schedule = schedule
    return model


def _ours(run: Generate, picture: Picture, device: torch.device) -> Generate:
    text = [picture.text.to(device)]

    def generate(seed: int, forced: Sequence[Tensor] | None = None) -> Tensor:
        return run(text, seed=seed, forced_bits=forced or (), **picture.sampling())

    return generate


@contextmanager
def official_model(
    cfg: InfinityConfig,
    picture: Picture,
    device: torch.device,
    dtype: torch.dtype,
    checkout: str,
    *,
    compile_blocks: bool = False,
) -> Iterator[Running]:
    """The official code with the weights of `our_model`, called as its scripts do, autocast to `dtype` on CUDA."""
    with infinity_official.imported(checkout) as build:
        official = build(random_model(cfg, picture.schedule, device, dtype))
        text = picture.text.to(device)
        running = Running(lambda: compiled(), Timeline(device))
        mark = running.timeline.mark
        _hook(official.model, "add_lvl_embeding", before=lambda: mark(SCALE))
        _hook(official.model, "get_logits", after=lambda _: mark(SAMPLING))
        _hook(official.vae, "decode", before=lambda: mark(VAE), after=lambda _: mark(REST))
        name = "sample_with_top_k_top_p_also_inplace_modifying_logits_"
        unhooked = getattr(official.sampler, name)
        _hook(official.sampler, name, after=lambda bits: running.drawn.append(bits.view(1, -1, cfg.bits)))

        def generate(seed: int, forced: Sequence[Tensor] | None = None) -> Tensor:
            enabled = device.type == "cuda" and dtype != torch.float32
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
                return official.generate(
                    text, picture.schedule, seed=seed, forced_bits=list(forced or ()), **picture.sampling()
                )

        def compiled() -> Generate:
            if compile_blocks:
                official.compile_blocks()
            return generate

        try:
            yield running
        finally:
            setattr(official.sampler, name, unhooked)  # the module lives on, and would hold the model


def as_forced(drawn: Sequence[Tensor], schedule: ScaleSchedule, *, spatial_patchify: bool) -> list[Tensor]:
    """Drawn bits (1, tokens, bits of a token) of each scale as those of the tokenizer's positions, (1, h, w, d)."""
    out = []
    for bits, (h, w) in zip(drawn, schedule.grids, strict=False):
        grid = bits.view(1, h, w, -1)
        if spatial_patchify:
            grid = F.pixel_shuffle(grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        out.append(grid)
    return out


def _hook(
    owner: Any,
    name: str,
    before: Callable[[], None] = lambda: None,
    after: Callable[[Any], None] = lambda _: None,
    *,
    disable: bool = False,
) -> None:
    """Replace a function of `owner` by one that calls `before()` and `after(result)` around it."""
    original = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        before()
        out = original(*args, **kwargs)
        after(out)
        return out

    compiler: Any = torch.compiler
    setattr(owner, name, compiler.disable(hooked) if disable else hooked)
