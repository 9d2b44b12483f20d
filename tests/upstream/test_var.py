"""Our VAR and VQ-VAE against the official code, FoundationVision/VAR, with equal random weights.

TOPROVAR_UPSTREAM_VAR is the path of a checkout of that repository.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig

ROOT = os.environ.get("TOPROVAR_UPSTREAM_VAR", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not ROOT, reason="TOPROVAR_UPSTREAM_VAR is not set to a checkout of FoundationVision/VAR"),
]

PATCH_NUMS = (1, 2, 3, 4)
TEN = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4)  # as many scales as the published models: phi depends on their number
# Ours may call another attention kernel and fuse differently, in float32.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def official() -> Iterator[SimpleNamespace]:
    """The official classes; their top-level modules `models`, `dist` and `utils` do not stay importable."""
    before = set(sys.modules)
    if importlib.util.find_spec("huggingface_hub") is None:  # used there only to publish models
        stub = types.ModuleType("huggingface_hub")
        stub.PyTorchModelHubMixin = object  # type: ignore[attr-defined]
        sys.modules["huggingface_hub"] = stub
    sys.path.insert(0, ROOT)
    try:
        models = importlib.import_module("models")
        yield SimpleNamespace(VAR=models.VAR, VQVAE=models.VQVAE)
    finally:
        sys.path.remove(ROOT)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("models", "dist", "utils", "huggingface_hub"):
                del sys.modules[name]


def randomise(model: nn.Module) -> None:
    """Weights large enough that every parameter changes the result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif "emb" in name or "pos_" in name or name.endswith(("ada_gss", "scale_mul_1H11")):
                p.copy_(0.5 * noise)
            elif p.ndim < 2:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
        model.get_parameter("head.weight").mul_(4)


def small(shared_aln: bool, l2_norm: bool = True, patch_nums: tuple[int, ...] = PATCH_NUMS) -> VARConfig:
    vae = VQVAEConfig(vocab_size=64, z_channels=8, ch=32, patch_nums=patch_nums)
    return VARConfig(2, 64, 2, num_classes=10, shared_aln=shared_aln, attn_l2_norm=l2_norm, cond_drop_rate=0.0, vae=vae)


def pair(official: SimpleNamespace, cfg: VARConfig) -> tuple[VAR, Any, Any]:
    """Our model and the official transformer and VQ-VAE with the same weights."""
    ours = VAR(cfg).eval().requires_grad_(False)
    randomise(ours)
    v = cfg.vae
    vae = official.VQVAE(v.vocab_size, v.z_channels, v.ch, v_patch_nums=v.patch_nums)
    theirs = official.VAR(
        vae,
        num_classes=cfg.num_classes,
        depth=cfg.depth,
        embed_dim=cfg.embed_dim,
        num_heads=cfg.num_heads,
        shared_aln=cfg.shared_aln,
        cond_drop_rate=cfg.cond_drop_rate,
        attn_l2_norm=cfg.attn_l2_norm,
        patch_nums=v.patch_nums,
    )
    state = ours.state_dict()
    vae.load_state_dict({k.removeprefix("vae."): t for k, t in state.items() if k.startswith("vae.")})
    constants = {k: t for k, t in theirs.state_dict().items() if k in ("lvl_1L", "attn_bias_for_masking")}
    theirs.load_state_dict({k: t for k, t in state.items() if not k.startswith("vae.")} | constants)
    return ours, theirs.eval(), vae.eval()


def recorded(model: Any, embedding: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Lists that fill with the logits and the tokens of every scale while the model generates."""
    logits: list[Tensor] = []
    tokens: list[Tensor] = []
    original = model.get_logits

    def get_logits(*args: Any) -> Tensor:
        out: Tensor = original(*args)
        logits.append(out.clone())
        return out

    model.get_logits = get_logits
    embedding.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    return logits, tokens


def check_generation(official: SimpleNamespace, config: VARConfig, labels: Tensor, **sampling: Any) -> None:
    ours, theirs, vae = pair(official, config)
    our_logits, our_tokens = recorded(ours, ours.vae.quantize.embedding)
    their_logits, their_tokens = recorded(theirs, vae.quantize.embedding)
    got = ours(labels, seed=3, **sampling)
    want = theirs.autoregressive_infer_cfg(len(labels), labels, g_seed=3, **sampling)
    assert len(our_logits) == len(their_logits) == len(config.patch_nums)
    torch.testing.assert_close(our_logits, their_logits, atol=2e-4, rtol=1e-4)
    assert len(our_tokens) == len(their_tokens)
    for a, b in zip(our_tokens, their_tokens, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert got.std() > 0.01


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_generation_is_the_official_one(official: SimpleNamespace, shared_aln: bool, l2_norm: bool) -> None:
    check_generation(official, small(shared_aln, l2_norm), torch.tensor([1, 7, 10]), cfg=1.5, top_k=0, top_p=0.0)


def test_ten_scales_use_the_official_convolutions(official: SimpleNamespace) -> None:
    check_generation(official, small(True, patch_nums=TEN), torch.tensor([8]), cfg=1.5, top_k=0, top_p=0.0)


@pytest.mark.parametrize(
    "sampling",
    [
        {"cfg": 4.0, "top_k": 9, "top_p": 0.9},
        {"cfg": 0.0, "top_k": 5, "top_p": 0.0},
        {"cfg": 2.0, "top_k": 20, "top_p": 0.8, "more_smooth": True},
    ],
)
def test_filters_and_smoothing_draw_as_the_official_ones(official: SimpleNamespace, sampling: dict[str, Any]) -> None:
    check_generation(official, small(False), torch.tensor([2, 3]), **sampling)


def test_teacher_forcing_is_the_official_one(official: SimpleNamespace) -> None:
    cfg = small(True)
    ours, theirs, vae = pair(official, cfg)
    tokens = [torch.randint(64, (2, pn * pn)) for pn in PATCH_NUMS]
    inputs = ours.vae.quantize.teacher_inputs(tokens)
    torch.testing.assert_close(inputs, vae.quantize.idxBl_to_var_input(tokens), atol=TOLERANCE, rtol=0)
    labels = torch.tensor([4, 5])
    with torch.no_grad():
        want = theirs(labels, inputs)
    torch.testing.assert_close(ours.teacher_forced(labels, inputs), want, atol=2e-4, rtol=1e-4)


def test_vqvae_encodes_decodes_and_loses_as_the_official_one(
    official: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)  # asked for by its loss, for statistics
    ours, _, vae = pair(official, small(False))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = vae.img_to_idxBl(images)
    for a, b in zip(ours.vae.encode(images), tokens, strict=True):
        assert torch.equal(a, b)
    f_hat = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    want = vae.fhat_to_img(f_hat.clone()).add(1).mul(0.5)
    torch.testing.assert_close(ours.vae.decode(f_hat), want, atol=TOLERANCE, rtol=0)
    out, loss = ours.vae(images)
    with torch.no_grad():
        want_out, _, want_loss = vae(images)
    torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, want_loss)


@pytest.mark.parametrize("size", [16, 20, 24, 30])
def test_published_sizes_have_the_official_entries(official: SimpleNamespace, size: int) -> None:
    cfg = replace(VARConfig.official(size), depth=2)  # the layers are alike
    with torch.device("meta"):
        ours = VAR(cfg).state_dict()
    vae = official.VQVAE(vocab_size=4096, z_channels=32, ch=160)
    theirs = official.VAR(vae, depth=2, embed_dim=64 * size, num_heads=size, attn_l2_norm=True)
    want = {f"vae.{k}": t.shape for k, t in vae.state_dict().items()}
    want |= {k: t.shape for k, t in theirs.state_dict().items() if k not in ("lvl_1L", "attn_bias_for_masking")}
    assert {k: t.shape for k, t in ours.items()} == want


@pytest.mark.slow
def test_d16_generates_as_the_official_one(official: SimpleNamespace) -> None:
    check_generation(official, VARConfig.official(16), torch.tensor([207]), cfg=1.5, top_k=900, top_p=0.95)
