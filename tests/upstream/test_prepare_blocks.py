"""`accelerate_blocks` on a model that no adapter knows, as docs/new_model.md does it: FlexVAR (jiaosiyu1999/FlexVAR).

TOPROVAR_FLEXVAR_SOURCE is the path of a checkout of that repository.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import toprovar_compile as tv
from toprovar_compile.errors import UnsupportedModelError
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

ROOT = os.environ.get("TOPROVAR_FLEXVAR_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not ROOT, reason="TOPROVAR_FLEXVAR_SOURCE is not set to a checkout of jiaosiyu1999/FlexVAR"),
]

SIDES = [1, 2, 3, 4, 6]


@pytest.fixture(scope="module")
def official() -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    if importlib.util.find_spec("huggingface_hub") is None:  # used there only to publish models
        stub = types.ModuleType("huggingface_hub")
        stub.PyTorchModelHubMixin = object  # type: ignore[attr-defined]
        sys.modules["huggingface_hub"] = stub
    sys.path.insert(0, ROOT)
    try:
        module = importlib.import_module("models.flexvar")
        vae = importlib.import_module("models.vq_llama").VQ_models["VQ-16"](codebook_size=640, codebook_embed_dim=32)
        vae.Cvae, vae.vocab_size = 32, 640
        model = module.FlexVAR(
            vae_local=vae.eval(),
            num_classes=10,
            depth=3,
            embed_dim=64,
            num_heads=2,
            attn_l2_norm=True,
            drop_path_rate=0.1,  # the first block has no drop-path: an Identity in its place
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5)
            model.head.weight.mul_(4)
        yield SimpleNamespace(model=model.eval(), vae=vae)
    finally:
        sys.path.remove(ROOT)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "dist", "utils", "huggingface_hub"):
                del sys.modules[name]


def generate(official: Any, sides: list[int] = SIDES, batch: int = 2) -> Tensor:
    images: Tensor = official.model.autoregressive_infer_cfg(
        official.vae, batch, torch.arange(batch), sides, g_seed=1, cfg=2.0, top_k=100, top_p=0.9
    )
    return images


def test_images_are_the_official_ones_whatever_the_schedule(official: Any) -> None:
    want = [generate(official), generate(official, [1, 2, 4, 7], 1)]
    with tv.accelerate_blocks(
        official.model,
        schedule=lambda infer_patch_nums, **_: infer_patch_nums,
        plan="dense",
        inner="eager",
    ):
        got = [generate(official), generate(official, [1, 2, 4, 7], 1)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert torch.equal(generate(official), want[0])


def test_a_plan_prunes(official: Any) -> None:
    want = generate(official)
    plan = Plan.keep_share(ScaleSchedule.from_patch_nums(SIDES), 3, 0.5, 4, bucket=1)
    with tv.accelerate_blocks(official.model, SIDES, plan, inner="eager"):
        report = tv.explain(generate, official)
    assert any("prune" in line for graph in report.graphs for line in graph.variants())
    assert 0.001 < (report.result - want).abs().mean() < 0.5


def test_no_adapter_takes_it_for_another_model(official: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no known family"):
        tv.prepare(official.model)
