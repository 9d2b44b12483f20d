"""Our Infinity against the official code, FoundationVision/Infinity, with equal random weights.

TOPROVAR_INFINITY_SOURCE is the path of a checkout of that repository.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.bench import infinity_official
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig, official_config
from toprovar_compile.models.infinity_loading import official_state
from toprovar_compile.models.infinity_schedule import GRIDS, SIZES, infinity_schedule, rope_tables
from toprovar_compile.schedule import ScaleSchedule

ROOT = os.environ.get("TOPROVAR_INFINITY_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        not ROOT, reason="TOPROVAR_INFINITY_SOURCE is not set to a checkout of FoundationVision/Infinity"
    ),
]

TINY = InfinityConfig(
    depth=4,
    embed_dim=64,
    num_heads=2,
    mlp_ratio=4.0,
    text_channels=256,
    text_maxlen=24,
    text_pad=16,
    vae=BSQVAEConfig(16, 32, (1, 2), 1),
)
PATCHIFIED = replace(TINY, spatial_patchify=True, vae=BSQVAEConfig(14, 32, (1, 2), 1))
LENGTHS = (7, 19)
# Sums in another order, in float32, through all scales.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


class _Float32Torch:
    """`torch` for the official blocks, whose cross-attention casts float32 to bfloat16 for flash attention."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(scope="module")
def official() -> Iterator[Callable[[Infinity], infinity_official.Official]]:
    with infinity_official.imported(ROOT) as build:
        importlib.import_module("infinity.models.basic").torch = _Float32Torch()
        yield build


def make(cfg: InfinityConfig) -> Infinity:
    """Weights large enough that every parameter changes the result."""
    model = Infinity.random(cfg, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for block in model.blocks:
            block.sa.scale_mul_1H11.add_(0.3 * torch.randn(block.sa.scale_mul_1H11.shape, generator=generator))
        model.head.weight.mul_(2)
    return model


def texts(*lengths: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, TINY.text_channels, generator=generator) for n in lengths]


def compact(rows: list[Tensor]) -> tuple[Tensor, list[int], Tensor, int]:
    lengths = [len(r) for r in rows]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.cat(rows), lengths, ends, max(lengths)


def recorded(model: Any, codes: Any, name: str, vae: Any) -> SimpleNamespace:
    """Lists that fill with the logits, bits and sums of codes while the model generates."""
    log = SimpleNamespace(logits=[], bits=[], summed=[])

    def watch(owner: Any, attribute: str, keep: Callable[[Any, Any], None]) -> None:
        original = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            keep(args, out)
            return out

        setattr(owner, attribute, call)

    watch(model, "get_logits", lambda _, out: log.logits.append(out.clone()))
    watch(codes, name, lambda args, _: log.bits.append(args[0]))
    watch(vae, "decode", lambda args, _: log.summed.append(args[0]))
    return log


def check(
    official: Callable[[Infinity], infinity_official.Official],
    cfg: InfinityConfig,
    rows: list[Tensor],
    *,
    schedule: ScaleSchedule | None = None,
    strengths: list[float] | None = None,
    taus: list[float] | None = None,
    layers: tuple[int, ...] = (0,),
    top_k: int = 900,
    top_p: float = 0.97,
    negative: list[Tensor] | None = None,
    forced: list[Tensor] | None = None,
) -> None:
    schedule = schedule or infinity_schedule("1:1", "0.06M")
    scales = len(schedule)
    strengths, taus = strengths or [3.0] * scales, taus or [0.8] * scales
    ours = make(cfg)
    theirs = official(ours)
    got = recorded(ours, ours.vae, "bits_to_codes", ours.vae)
    want = recorded(theirs.model, theirs.vae.quantizer.lfq, "indices_to_codes", theirs.vae)
    images = ours(
        rows,
        seed=5,
        cfg=strengths,
        tau=taus,
        top_k=top_k,
        top_p=top_p,
        cfg_layers=layers,
        negative=negative,
        schedule=schedule,
        forced_bits=forced or (),
    )
    with torch.compiler.set_stance("force_eager"):
        _, _, their_images = theirs.model.autoregressive_infer_cfg(
            vae=theirs.vae,
            scale_schedule=[(1, h, w) for h, w in schedule.grids],
            label_B_or_BLT=compact(rows),
            negative_label_B_or_BLT=None if negative is None else compact(negative),
            B=len(rows),
            g_seed=5,
            cfg_list=strengths,
            tau_list=taus,
            top_k=top_k,
            top_p=top_p,
            returns_vemb=1,
            cfg_insertion_layer=list(layers),
            vae_type=1,
            ret_img=True,
            gt_leak=len(forced or ()),
            gt_ls_Bl=[bits.unsqueeze(1).float() for bits in forced or ()],
            inference_mode=True,
        )
    assert len(got.logits) == len(want.logits) == scales
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a[: len(b)], b, **TOLERANCE)
    for a, b in zip(got.bits, want.bits, strict=True):
        assert torch.equal(a, b.squeeze(1).long())
    torch.testing.assert_close(got.summed[0], want.summed[0], atol=1e-5, rtol=0)
    assert 0.2 < torch.cat([b.flatten().float() for b in got.bits]).mean() < 0.8
    their_images = their_images.flip(3).permute(0, 3, 1, 2)
    assert ((images * 255).to(torch.uint8).int() - their_images.int()).abs().max() <= 1


def test_guidance_at_the_logits(official: Any) -> None:
    check(official, TINY, texts(*LENGTHS))


def test_guidance_at_a_layer_in_another_ratio(official: Any) -> None:
    check(official, TINY, texts(*LENGTHS), layers=(-2,), schedule=infinity_schedule("3:4", "0.06M"))


def test_guidance_of_its_own_at_every_scale(official: Any) -> None:
    check(
        official,
        TINY,
        texts(*LENGTHS),
        layers=(-3, 0),
        strengths=[1.0, 4.0, 1.0, 2.0, 3.0, 1.5, 2.5],
        taus=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    )


def test_guidance_at_the_last_layer_off_at_some_scales(official: Any) -> None:
    check(official, TINY, texts(9), layers=(-1,), strengths=[1.0, 4.0, 1.0, 2.0, 3.0, 1.0, 2.5], top_p=0.0)


def test_without_guidance_and_with_little_choice(official: Any) -> None:
    check(official, TINY, texts(*LENGTHS), strengths=[1.0] * 7, top_k=1, top_p=0.0)


def test_negative_prompt(official: Any) -> None:
    check(official, TINY, texts(*LENGTHS), negative=texts(12, 3, seed=4))


def test_spatial_patchify_and_forced_scales(official: Any) -> None:
    schedule = infinity_schedule("2:1", "0.06M")
    generator = torch.Generator().manual_seed(6)
    forced = [torch.randint(2, (2, 2 * h, 2 * w, 14), generator=generator) for h, w in schedule.grids[:3]]
    check(official, PATCHIFIED, texts(*LENGTHS), schedule=schedule, forced=forced)


@pytest.mark.parametrize("normalised", [0, 1])
def test_other_modulations_and_positions(official: Any, normalised: int) -> None:
    check(official, replace(TINY, shared_aln=False, rope_normalised=normalised), texts(5))


def test_schedules_are_the_official_ones(official: Any) -> None:
    table = importlib.import_module("infinity.utils.dynamic_resolution").dynamic_resolution_h_w
    assert set(GRIDS) == set(table)
    for h_div_w, sizes in table.items():
        assert set(SIZES) == set(sizes)
        for size, entry in sizes.items():
            assert infinity_schedule(h_div_w, size).grids == tuple((h, w) for _, h, w in entry["scales"])


@pytest.mark.parametrize("normalised", [0, 1, 2])
def test_positions_of_every_schedule_are_the_official_ones(official: Any, normalised: int) -> None:
    basic = importlib.import_module("infinity.models.basic")
    table = importlib.import_module("infinity.utils.dynamic_resolution").dynamic_resolution_h_w
    grid = basic.precompute_rope2d_freqs_grid(32, table, normalised, pad_to_multiplier=128)
    for h_div_w, sizes in table.items():
        for size, entry in sizes.items():
            want = grid[str(tuple((1, h, w) for _, h, w in entry["scales"]))]
            start = 0
            tables = rope_tables(infinity_schedule(h_div_w, size), 32, normalised, torch.device("cpu"))
            for cos, sin in tables:
                end = start + cos.shape[2]
                torch.testing.assert_close(torch.stack((cos, sin))[:, 0, 0], want[:, 0, 0, 0, start:end])
                start = end


@pytest.mark.parametrize("size", ["layer12", "layer16", "layer24", "layer32", "layer40", "layer48", "2b", "8b"])
def test_published_sizes_have_the_official_entries(official: Any, size: str) -> None:
    cfg = replace(official_config(size), depth=2)  # the layers are alike
    with torch.device("meta"):
        ours = {k: t.shape for k, t in Infinity(cfg).state_dict().items() if not k.startswith("vae.")}
    module = importlib.import_module("infinity.models.infinity")
    build = getattr(module, f"infinity_{size}", module.Infinity)  # there is no function for 8B
    full = official_config(size)
    shape = {"embed_dim": full.embed_dim, "num_heads": full.num_heads} if build is module.Infinity else {}
    with infinity_official._without_init():
        theirs = build(
            vae_local=infinity_official.build_vae(cfg.vae),
            text_channels=2048,
            text_maxlen=512,
            shared_aln=True,
            depth=2,
            block_chunks=2,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=2,
            apply_spatial_patchify=int(cfg.spatial_patchify),
            **shape,
        )
    assert {k: t.shape for k, t in official_state(theirs.state_dict(), "official").items()} == ours
