"""`accelerate` on the official VAR object, FoundationVision/VAR: equal images, weights that stay shared, undo.

TOPROVAR_VAR_SOURCE is the path of a checkout of that repository.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo

import toprovar_compile as tv
from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import UnsupportedModelError
from toprovar_compile.plan import Plan

ROOT = os.environ.get("TOPROVAR_VAR_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not ROOT, reason="TOPROVAR_VAR_SOURCE is not set to a checkout of FoundationVision/VAR"),
]

PATCH_NUMS = (1, 2, 3, 4)
TOLERANCE = 2e-5  # float32; another order of sums
FRAMES = 3  # steps of one token, of all other scales; the decoder
FRAMES_OF_OTHER_BATCHES = 3  # once, for all of them

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Builds a small official model with weights that all matter; its VQ-VAE is `vae_proxy[0]`."""
    before = set(sys.modules)
    if importlib.util.find_spec("huggingface_hub") is None:  # used there only to publish models
        stub = types.ModuleType("huggingface_hub")
        stub.PyTorchModelHubMixin = object  # type: ignore[attr-defined]
        sys.modules["huggingface_hub"] = stub
    sys.path.insert(0, ROOT)
    try:
        models = importlib.import_module("models")

        def build(seed: int = 0, *, full_size: bool = False, **options: Any) -> Any:
            if full_size:
                vae = models.VQVAE(4096, 32, 160)
                model = models.VAR(vae, depth=16, attn_l2_norm=True)
            else:
                small = {"num_classes": 10, "depth": 2, "embed_dim": 64, "num_heads": 2, "attn_l2_norm": True}
                vae = models.VQVAE(64, 8, 32, v_patch_nums=PATCH_NUMS)
                model = models.VAR(vae, patch_nums=PATCH_NUMS, drop_path_rate=0.1, **small | options)
            randomise(model, seed)
            randomise(vae, seed)
            return model.eval()

        yield build
    finally:
        sys.path.remove(ROOT)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "dist", "utils", "huggingface_hub"):
                del sys.modules[name]


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif "emb" in name or "pos_" in name or name.endswith(("ada_gss", "scale_mul_1H11")):
                p.copy_(0.5 * noise)
            else:
                p.copy_(0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5)
        if hasattr(model, "head"):
            model.head.weight.mul_(4)  # type: ignore[operator, union-attr]


def accelerate(model: Any, plan: Plan | str = "dense", **options: Any) -> tv.prepare.Handle:
    return tv.accelerate(model, plan=plan, **{"inner": "eager"} | options)


def generate(model: Any, batch: int = 2, **sampling: Any) -> Tensor:
    images: Tensor = model.autoregressive_infer_cfg(batch, torch.arange(batch), g_seed=3, **{"cfg": 2.0} | sampling)
    return images


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert got.std() > 0.01


@pytest.mark.parametrize("options", [{"shared_aln": True}, {"attn_l2_norm": False}])
def test_images_are_the_official_ones(make: Make, options: dict[str, Any]) -> None:
    model = make(**options)

    def images() -> list[Tensor]:
        with torch.inference_mode():
            inside = generate(model, 1, top_k=9, top_p=0.9)
        smooth = generate(model, more_smooth=True)
        drawn = model.autoregressive_infer_cfg(2, None, g_seed=1)
        torch.manual_seed(5)
        unseeded = model.autoregressive_infer_cfg(1, 7)
        return [inside.clone(), smooth, drawn, unseeded, model.autoregressive_infer_cfg(B=1, label_B=-1, g_seed=1)]

    want = images()
    with accelerate(model):
        for a, b in zip(images(), want, strict=True):
            close(a, b)
        assert all(block.attn.cached_k is None for block in model.blocks), "official caches are not used"
    close(generate(model, more_smooth=True), want[1])


def test_tokens_are_the_official_ones(make: Make) -> None:
    model = make()
    want: list[Tensor] = []
    hook = model.vae_proxy[0].quantize.embedding.register_forward_pre_hook(lambda _, args: want.append(args[0]))
    generate(model, top_k=20)
    hook.remove()
    with accelerate(model) as handle:
        got: list[Tensor] = []
        embedding = handle.prepared.vae.quantize.embedding
        embedding.register_forward_pre_hook(lambda _, args: got.append(args[0]))
        generate(model, top_k=20)
    assert len(got) == len(want) == len(PATCH_NUMS)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_changed_and_loaded_weights_are_seen(make: Make) -> None:
    model, other = make(0), make(1)
    with accelerate(model) as handle:
        first = generate(model)
        model.blocks[1].attn.proj.weight.data.add_(0.05)  # as merging a LoRA does
        handle.undo()
        want = generate(model)
        assert (want - first).abs().max() > 0.01
    with accelerate(model):
        close(generate(model), want)
        for assign in (False, True):
            model.load_state_dict(other.state_dict(), assign=assign)
            model.vae_proxy[0].load_state_dict(other.vae_proxy[0].state_dict())
            close(generate(model), generate(other))
        model.word_embed.weight = nn.Parameter(model.word_embed.weight * 1.5)
        changed = generate(model)
    close(changed, generate(model))


def test_two_models_and_a_worker_thread(make: Make) -> None:
    models = [make(0), make(1, shared_aln=True)]
    want = [generate(m) for m in models]
    handles = [accelerate(m) for m in models]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i, m=m: found.update({i: generate(m)})) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, images in enumerate(want):
        close(found[i], images)
        close(generate(models[i]), images)
        handles[i].undo()


def test_undo_copies_and_pickles(make: Make) -> None:
    model = make()
    want = generate(model)
    official = model.autoregressive_infer_cfg
    handle = accelerate(model)
    assert model.autoregressive_infer_cfg != official and "active" in repr(handle)
    with pytest.raises(UnsupportedModelError, match="accelerated already"):
        accelerate(model)
    with pytest.raises(UnsupportedModelError, match="cannot be pickled"):
        pickle.dumps(vars(model)["autoregressive_infer_cfg"])
    copied = copy.deepcopy(model)
    copied.head.weight.data.mul_(-1)
    assert "autoregressive_infer_cfg" not in repr(vars(copied)) or copied.autoregressive_infer_cfg.__self__ is copied
    assert not torch.equal(generate(copied), want)
    handle.undo()
    handle.undo()
    assert model.autoregressive_infer_cfg == official and "undone" in repr(handle)
    assert torch.equal(generate(model), want)


def test_teacher_forcing_is_left_alone(make: Make) -> None:
    model = make()
    tokens = [torch.randint(64, (2, n * n)) for n in PATCH_NUMS]
    inputs = model.vae_proxy[0].quantize.idxBl_to_var_input(tokens)

    def logits() -> Tensor:
        torch.manual_seed(0)  # labels are dropped at random, in evaluation too
        with torch.no_grad():
            out: Tensor = model(torch.tensor([1, 2]), inputs)
        return out

    want = logits()
    with accelerate(model):
        generate(model)
        assert torch.equal(logits(), want)


def test_a_plan_changes_only_what_it_prunes(make: Make) -> None:
    model = make()
    want = generate(model)
    with accelerate(model) as handle:
        prepared = handle.prepared
    plan = Plan.keep_share(prepared.schedule, 2, 0.5, 3, bucket=1, fingerprint=prepared.fingerprint())
    with accelerate(model, plan) as handle:
        report = tv.explain(generate, model)
        assert any("prune" in line for graph in report.graphs for line in graph.variants())
        assert 0.001 < (report.result - want).abs().mean() < 0.2
    with accelerate(model, "auto") as handle:
        handle.prepared.plan = plan
        assert torch.equal(generate(model), report.result)
        calibrated = calibrate(handle.prepared, prompts=2, batch=2)
    with accelerate(model, calibrated):
        generate(model)


def test_frames_are_constant(make: Make) -> None:
    model = make()

    def frames(batch: int) -> int:
        before = dynamo["stats"]["unique_graphs"]
        generate(model, batch)
        return dynamo["stats"]["unique_graphs"] - before

    with accelerate(model):
        assert frames(2) == FRAMES
        assert frames(2) == 0
        model.head.weight.data.mul_(1.1)
        assert frames(2) == 0
        assert frames(3) == FRAMES_OF_OTHER_BATCHES
        assert frames(4) == frames(5) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(make: Make, dtype: torch.dtype) -> None:
    model = make()
    with torch.autocast("cpu", dtype=dtype):
        want = generate(model, cfg=1.0, top_k=1)
        with accelerate(model):
            got = generate(model, cfg=1.0, top_k=1)
    assert got.dtype == want.dtype
    assert (got.float() - want.float()).abs().mean() < 0.05  # a token may flip where two logits are equal as rounded


@pytest.mark.slow
def test_full_size_d16(make: Make) -> None:
    model = make(full_size=True)
    sampling = {"cfg": 4.0, "top_k": 900, "top_p": 0.95}
    want = generate(model, 1, **sampling)
    with accelerate(model):
        close(generate(model, 1, **sampling), want)


@pytest.mark.slow
def test_compiled_by_inductor(make: Make) -> None:
    model = make()
    want = generate(model)
    with accelerate(model, inner="inductor"):
        close(generate(model), want)


def test_what_is_no_official_model_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"does not know: extra\.weight"):
        accelerate(model)
    del model.extra
    block = type(model.blocks[0])
    forward = block.forward
    with monkeypatch.context() as patched:
        patched.setattr(block, "forward", lambda self, **kwargs: forward(self, **kwargs) * 1.1)
        with pytest.raises(UnsupportedModelError, match="computes something else"):
            accelerate(model)
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "autoregressive_infer_cfg", lambda self, B, label_B, control: None)
        with pytest.raises(UnsupportedModelError, match="a method autoregressive_infer_cfg"):
            accelerate(model)


def test_states_that_would_go_wrong_are_refused(make: Make) -> None:
    model = make()
    with accelerate(model):
        model.train()
        with pytest.raises(UnsupportedModelError, match="training mode"):
            generate(model)
        model.eval()
        with pytest.raises(UnsupportedModelError, match="labels is on meta"):
            model.autoregressive_infer_cfg(1, torch.zeros(1, dtype=torch.int64, device="meta"))
        hook = model.blocks[0].attn.proj.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match="forward hooks"):
            generate(model)
        hook.remove()
        original = model.blocks[0].attn.proj
        model.blocks[0].attn.proj = nn.Sequential(original)  # as an adapter layer wraps it
        with pytest.raises(UnsupportedModelError, match="merge adapter weights"):
            generate(model)
        model.blocks[0].attn.proj = original
        generate(model)
