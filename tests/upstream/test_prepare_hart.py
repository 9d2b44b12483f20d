"""`accelerate` on the official HART object, mit-han-lab/hart: equal images, masked last stage, plans, undo.

TOPROVAR_HART_SOURCE is the path of a checkout of that repository. Its code needs the package transformers, and a GPU:
`.cuda()` is made to do nothing here. Its kernels are stood in for by `tv.shims`.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo

import toprovar_compile as tv
from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.plan import Plan

ROOT = os.environ.get("TOPROVAR_HART_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not ROOT, reason="TOPROVAR_HART_SOURCE is not set to a checkout of mit-han-lab/hart"),
]

PATCH_NUMS = (1, 2, 3, 4, 6)
CONTEXT, WIDTH = 5, 12
TOLERANCE = 2e-5  # float32; another order of sums
FRAMES = 4  # steps of the text, of the first scale, of all others; the decoder
LLAMA = {"attn_type": "llama", "mlp_type": "llama"}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Builds a small official model with weights that all matter."""
    pytest.importorskip("transformers", reason="HART's code needs transformers")
    before, patch = set(sys.modules), pytest.MonkeyPatch()
    patch.syspath_prepend(ROOT)
    patch.setattr(Tensor, "cuda", lambda self, *args, **kwargs: self)
    patch.setattr(nn.Module, "cuda", lambda self, *args, **kwargs: self)
    try:
        with tv.shims("hart_backend"):
            official = importlib.import_module("hart.modules.models.transformer.hart_transformer_t2i")
        autoencoder = importlib.import_module("hart.modules.models.autoencoder.hart_autoencoder")
        configuration = importlib.import_module("hart.modules.models.autoencoder.configuration")
        config = importlib.import_module("hart.modules.models.transformer.configuration").HARTForT2IConfig

        def build(seed: int = 0, **options: Any) -> Any:
            vae = autoencoder.HARTAutoEncoder(
                configuration.HARTAutoEncoderConfig(
                    vocab_size=640, z_channels=8, ch=32, v_patch_nums=PATCH_NUMS, quantizer_type="var_hybrid"
                )
            )
            loader = SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(vae=vae))
            patch.setattr(official, "HARTAutoEncoderWithDisc", loader)
            with redirect_stdout(StringIO()):
                model = official.HARTForT2I(
                    config(
                        vae_path="none",
                        context_token=CONTEXT,
                        context_dim=WIDTH,
                        depth=2,
                        embed_dim=64,
                        num_heads=2,
                        patch_nums=PATCH_NUMS,
                        diff_width=32,
                        diff_depth=2,
                        num_sampling_steps="4",
                        **options,
                    )
                )
            randomise(model, seed)
            randomise(vae, seed)
            return model.eval()

        yield build
    finally:
        patch.undo()
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "hart":
                del sys.modules[name]


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5)
        if hasattr(model, "head"):
            model.head.weight.mul_(4)  # type: ignore[operator, union-attr]


def accelerate(model: Any, plan: Plan | str = "dense", **options: Any) -> tv.prepare.Handle:
    return tv.accelerate(model, plan=plan, **{"inner": "eager"} | options)


def generate(model: Any, batch: int = 2, **options: Any) -> Tensor:
    """Prompts of different lengths. The diffusion head and the order of masks draw from the global generators."""
    torch.manual_seed(5)
    np.random.seed(5)
    text = torch.randn(3, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(1))[:batch]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])[:batch].bool()
    images: Tensor = model.autoregressive_infer_cfg(
        B=batch, label_B=text, cfg=3.0, g_seed=1, context_position_ids=mask.cumsum(1) - 1, context_mask=mask, **options
    )
    return images


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert got.std() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"use_timestep_embed": True},
        {"attn_l2_norm": True, "use_context_norm": True, "sep_aln_pooling_mode": "avg"},
        {"disable_aln": True},
        {"disable_aln": True, "shared_aln": True},
    ],
)
def test_images_are_the_official_ones(make: Make, options: dict[str, Any]) -> None:
    model = make(**LLAMA | options)

    def images() -> list[Tensor]:
        with torch.inference_mode():
            inside = generate(model).clone()
        return [
            inside,
            generate(model, 1, more_smooth=True, top_p=0.9),
            generate(model, num_maskgit_iters=2),
            generate(model, 3, final_stage=1),
        ]

    want = images()
    with accelerate(model):
        for a, b in zip(images(), want, strict=True):
            close(a, b)
    assert torch.equal(generate(model), want[0])


def test_weights_frames_and_threads(make: Make) -> None:
    model, other = make(0, **LLAMA), make(1, **LLAMA)
    want = [generate(model), generate(other)]

    def frames() -> int:
        before = dynamo["stats"]["unique_graphs"]
        generate(model)
        return dynamo["stats"]["unique_graphs"] - before

    with accelerate(model), accelerate(other):
        assert frames() == FRAMES
        assert frames() == 0
        close(generate(model), want[0])
        close(generate(other), want[1])
        assert frames() == 0
        model.load_state_dict(other.state_dict())
        model.vae_proxy[0].load_state_dict(other.vae_proxy[0].state_dict())
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(generate(model)))
        thread.start()
        thread.join()
        close(found[0], want[1])
        model.blocks[1].attn.proj.weight.data.add_(0.05)  # as merging a LoRA does
        changed = generate(model)
    close(changed, generate(model))
    assert (changed - want[1]).abs().max() > 0.01


def test_a_dump_shows_the_image(make: Make, tmp_path: Path) -> None:
    model = make(**LLAMA)
    with accelerate(model, dump=str(tmp_path)):
        generate(model)
    (folder,) = tmp_path.iterdir()
    assert 'aria-label="the generated image"' in (folder / "index.html").read_text(encoding="utf-8")


def test_a_plan_changes_only_what_it_prunes(make: Make) -> None:
    model = make(**LLAMA)
    want = generate(model)
    prepared = tv.prepare(model)
    plan = Plan.keep_share(prepared.schedule, 2, 0.5, 3, bucket=1, fingerprint=prepared.fingerprint())
    assert plan.schedule.grids == ((2, 2), (3, 3), (4, 4), (6, 6))
    with accelerate(model, plan):
        report = tv.explain(generate, model)
    assert any("prune" in line for graph in report.graphs for line in graph.variants())
    assert not [event for event in report.events if event.startswith(("guard_miss", "fallback"))]
    assert 0.001 < (report.result - want).abs().mean() < 0.2
    unguided = Plan.keep_share(plan.schedule, 2, 0.5, 3, bucket=1, fingerprint=plan.model, unguided_from=2)
    early = Plan.keep_share(plan.schedule, 2, 1.0, 3, fingerprint=plan.model, exit_scale=3)
    for other in (unguided, early):
        with accelerate(model, other):
            assert not torch.equal(generate(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(make: Make, dtype: torch.dtype) -> None:
    model = make(**LLAMA)
    with torch.autocast("cpu", dtype=dtype):
        want = generate(model)
        with accelerate(model):
            got = generate(model)
    assert got.dtype == want.dtype
    assert (got.float() - want.float()).abs().mean() < 0.05


@pytest.mark.slow
def test_compiled_by_inductor_after_the_official_norms_cast_their_weights(make: Make) -> None:
    model = make(**LLAMA, use_timestep_embed=True)  # its stream is bfloat16 then
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = generate(model)
        assert any(p.is_inference() for p in model.parameters())
        with accelerate(model, inner="inductor"):
            got = generate(model)
    assert (got.float() - want.float()).abs().mean() < 0.05


def test_what_is_not_taken_over_is_refused(make: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="attn_type='gpt2'"):
        tv.prepare(make(attn_type="gpt2"))
    model, other = make(**LLAMA), make(**LLAMA)
    with accelerate(other):
        other.blocks[1] = model.blocks[1]
        with pytest.raises(UnsupportedModelError, match="were exchanged"):
            generate(other)
    with accelerate(model), pytest.raises(OptionError, match="context_mask are needed"):
        model.autoregressive_infer_cfg(1, torch.zeros(1, CONTEXT, WIDTH))
    with accelerate(model), pytest.raises(OptionError, match="label_B has shape"):
        ids = torch.zeros(1, 3, dtype=torch.int64)
        model.autoregressive_infer_cfg(1, torch.zeros(1, 3, WIDTH), context_position_ids=ids, context_mask=ids)
