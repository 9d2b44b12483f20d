"""`accelerate` on the official Infinity object, FoundationVision/Infinity: equal images and bits, editing, undo.

TOPROVAR_INFINITY_SOURCE is the path of a checkout of that repository.
"""

from __future__ import annotations

import importlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo

import toprovar_compile as tv
from toprovar_compile.bench import infinity_official
from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.models.infinity_schedule import GRIDS, infinity_schedule
from toprovar_compile.plan import Plan

ROOT = os.environ.get("TOPROVAR_INFINITY_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        not ROOT, reason="TOPROVAR_INFINITY_SOURCE is not set to a checkout of FoundationVision/Infinity"
    ),
]

TINY = InfinityConfig(
    depth=3,
    embed_dim=64,
    num_heads=2,
    text_channels=256,
    text_maxlen=40,
    vae=BSQVAEConfig(16, 32, (1, 2), 1),
)
PATCHIFIED = replace(TINY, spatial_patchify=True, vae=BSQVAEConfig(14, 32, (1, 2), 1))
SCHEDULE = infinity_schedule("1:1", "0.06M")
OTHER = infinity_schedule("3:4", "0.06M")
FRAMES = 3  # steps of one token, of all other scales; the decoder

Make = Callable[..., Any]


class _Float32Torch:
    """`torch` for the official blocks, whose cross-attention casts float32 to bfloat16 for flash attention."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Builds a small official model and its tokenizer; flash-attn is stood in for where it is missing."""
    with tv.shims("flash_attn"), infinity_official.imported(ROOT) as build:
        importlib.import_module("infinity.models.basic").torch = _Float32Torch()

        def official(cfg: InfinityConfig = TINY, seed: int = 1) -> infinity_official.Official:
            ours = Infinity.random(cfg, seed=seed)
            with torch.no_grad():
                ours.head.weight.mul_(2)
            return build(ours)

        yield official


def texts(*lengths: int, seed: int = 3) -> tuple[Tensor, list[int], Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(lengths), TINY.text_channels, generator=generator)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return features, list(lengths), ends, max(lengths)


def generate(official: Any, lengths: tuple[int, ...] = (7, 19), *, schedule: Any = SCHEDULE, **options: Any) -> Tensor:
    """As the official scripts call it: images, uint8 (B, H, W, 3)."""
    scales = len(schedule)
    arguments = {
        "cfg_list": [3.0] * scales,
        "tau_list": [0.8] * scales,
        "g_seed": 5,
        "top_k": 900,
        "top_p": 0.97,
        "cfg_insertion_layer": [0],
        "gt_leak": -1,
    } | options
    ret, idx, images = official.model.autoregressive_infer_cfg(
        vae=official.vae,
        scale_schedule=[(1, h, w) for h, w in schedule.grids],
        label_B_or_BLT=texts(*lengths),
        B=len(lengths),
        returns_vemb=1,
        vae_type=official.vae.codebook_dim,
        ret_img=True,
        inference_mode=True,
        **arguments,
    )
    assert ret == [] and idx == []
    out: Tensor = images
    return out


def accelerate(official: Any, plan: Plan | str = "dense", **options: Any) -> tv.prepare.Handle:
    return tv.accelerate(official.model, plan=plan, **{"inner": "eager"} | options)


def close(got: Tensor, want: Tensor) -> None:
    """The same bits: other ones change pixels by more than the rounding to a byte."""
    assert got.dtype == want.dtype == torch.uint8
    assert (got.int() - want.int()).abs().max() <= 1
    assert want.float().std() > 10


@pytest.mark.parametrize("cfg", [TINY, PATCHIFIED], ids=["2b", "8b"])
def test_images_are_the_official_ones(make: Make, cfg: InfinityConfig) -> None:
    official = make(cfg)
    side = 2 if cfg.spatial_patchify else 1
    generator = torch.Generator().manual_seed(0)
    bits = [
        torch.randint(2, (1, 1, side * h, side * w, cfg.vae.codebook_dim), generator=generator)
        for h, w in SCHEDULE.grids[:3]
    ]
    calls: list[Callable[[], Tensor]] = [
        lambda: generate(official),
        lambda: generate(official, (9,), cfg_insertion_layer=[-2]),
        lambda: generate(official, (9,), schedule=OTHER, negative_label_B_or_BLT=texts(12, seed=4)),
        lambda: generate(official, (30,), gt_leak=3, gt_ls_Bl=bits),
    ]

    def in_inference_mode() -> Tensor:
        with torch.inference_mode():
            return generate(official, (3, 4, 5)).clone()

    calls.append(in_inference_mode)
    with torch.compiler.set_stance("force_eager"):
        want = [call() for call in calls]
    with accelerate(official):
        for call, images in zip(calls, want, strict=True):
            close(call(), images)
        assert all(block.sa.cached_k is None for block in official.model.unregistered_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.06M", "0.25M", "1M"])
def test_every_ratio_and_size(make: Make, size: str) -> None:
    official = make()
    schedules = [infinity_schedule(ratio, size) for ratio in (GRIDS if size == "0.06M" else (1.0,))]
    with torch.compiler.set_stance("force_eager"):
        want = [generate(official, (8,), schedule=schedule) for schedule in schedules]
    with accelerate(official):
        for schedule, images in zip(schedules, want, strict=True):
            close(generate(official, (8,), schedule=schedule), images)


def test_temperatures_of_flash_checkpoints(make: Make) -> None:
    """They are (1, 1, H, 1) in the place of (1, H, 1, 1)."""
    official = make()
    with torch.compiler.set_stance("force_eager"):
        want = generate(official, (8,))
    for block in official.model.unregistered_blocks:
        block.sa.scale_mul_1H11 = nn.Parameter(block.sa.scale_mul_1H11.view(1, 1, -1, 1), requires_grad=False)
    with accelerate(official):
        close(generate(official, (8,)), want)


def test_teacher_forcing_is_left_alone(make: Make) -> None:
    official = make()
    count = SCHEDULE.total - 1
    inputs = torch.randn(2, count, TINY.bits, generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        random.seed(0)  # prompts are dropped at random, in evaluation too
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            out: Tensor = official.model(texts(7, 19), inputs, [(1, h, w) for h, w in SCHEDULE.grids])
        return out

    want = logits()
    with accelerate(official):
        generate(official)
        assert torch.equal(logits(), want)


def test_weights_frames_and_threads(make: Make) -> None:
    official, other = make(seed=1), make(seed=2)
    with torch.compiler.set_stance("force_eager"):
        want = [generate(official, (8,)), generate(other, (8,))]

    def frames(**options: Any) -> int:
        before = dynamo["stats"]["unique_graphs"]
        generate(official, **{"lengths": (8,)} | options)
        return dynamo["stats"]["unique_graphs"] - before

    with accelerate(official), accelerate(other):
        assert frames() == FRAMES
        assert frames() == 0
        assert frames(lengths=(21,)) == 0  # another prompt length
        assert frames(lengths=(39,)) == 0  # and one that is padded further
        assert frames(cfg_list=[5.0] * 7) == 0
        close(generate(official, (8,)), want[0])
        close(generate(other, (8,)), want[1])
        official.model.load_state_dict(other.model.state_dict())
        official.vae.load_state_dict(other.vae.state_dict())
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(generate(official, (8,))))
        thread.start()
        thread.join()
        close(found[0], want[1])
        blocks = official.model.unregistered_blocks
        blocks[1].sa.proj.weight.data.add_(0.05)  # as merging a LoRA does
        changed = generate(official, (8,))
    with torch.compiler.set_stance("force_eager"):
        close(changed, generate(official, (8,)))
    assert not torch.equal(changed, want[1])


def test_a_plan_changes_only_what_it_prunes(make: Make) -> None:
    official = make()
    with accelerate(official) as handle:
        want = generate(official)
        prepared = handle.prepared
        plan = Plan.keep_share(SCHEDULE, 3, 0.5, 6, bucket=1, fingerprint=prepared.fingerprint())
    with accelerate(official, plan):
        report = tv.explain(generate, official)
    assert any("prune" in line for graph in report.graphs for line in graph.variants())
    changed = (report.result.int() - want.int()).abs().float().mean()
    assert 0.1 < changed < 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(make: Make, dtype: torch.dtype) -> None:
    official = make()
    with torch.autocast("cpu", dtype=dtype):
        with torch.compiler.set_stance("force_eager"):
            want = generate(official, (8,), top_k=1)
        with accelerate(official):
            got = generate(official, (8,), top_k=1)
            for block in official.model.unregistered_blocks:
                block.to(dtype)  # as the official scripts do with --bf16 1
            generate(official, (8,), top_k=1)
    assert (got.int() - want.int()).abs().float().mean() < 20  # bits flip where two logits are close in bfloat16


def test_what_would_be_wrong_is_refused(make: Make) -> None:
    official = make()
    blocks = official.model.unregistered_blocks
    fused = blocks[0].fused_norm_func
    blocks[0].fused_norm_func = None
    with pytest.raises(UnsupportedModelError, match="drop `scale_ind`"):
        tv.prepare(official.model)
    blocks[0].fused_norm_func = fused
    prepared = tv.prepare(official.model)
    with pytest.raises(UnsupportedModelError, match="no tokenizer yet"):
        prepared([torch.zeros(3, 256)])
    with accelerate(official), pytest.raises(OptionError, match="trunk_scale"):
        generate(official, trunk_scale=3)
    with accelerate(official), pytest.raises(UnsupportedModelError, match="bits a position"):
        generate(replace(official, vae=make(PATCHIFIED).vae))
