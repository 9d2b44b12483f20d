"""Fixtures and markers that every test shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig

# Where cores are busy, each operator of a small model waits longer for a second thread than it computes.
torch.set_num_threads(1)

TINY = VARConfig(
    depth=3,
    embed_dim=64,
    num_heads=2,
    num_classes=10,
    shared_aln=True,
    vae=VQVAEConfig(
        vocab_size=64, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, patch_nums=(1, 2, 3, 4, 6)
    ),
)  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter its own random values, large enough that each layer changes the result.

    Trained-from-scratch initialisation would not do: it starts gains near zero, so that layers hardly matter.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("scale_mul_1H11"):
                p.add_(noise * 0.3)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + noise * 0.1)
            elif p.ndim < 2:
                p.copy_(noise * 0.1)
            elif "emb" in name or "pos_" in name or name.endswith("ada_gss"):
                p.copy_(noise * 0.5)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
        model.get_parameter("head.weight").mul_(4)  # logits with a clear preference, as trained ones have


def make_tiny_var(seed: int = 0, cfg: VARConfig = TINY) -> VAR:
    """A VAR of five scales and three layers (66 tokens, images 12x12) in eval mode."""
    model = VAR(cfg)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_var() -> VAR:
    """A fresh tiny VAR with distinct random weights."""
    return make_tiny_var()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine cannot run."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """No test sees another's compiled code."""
    torch.compiler.reset()
