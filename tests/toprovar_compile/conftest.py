"""A VAR small enough for eager tests, with weights that make its layers and tokens differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig

PATCH_NUMS = (1, 2, 3, 4, 6)


def _make(depth: int = 3, patch_nums: tuple[int, ...] = PATCH_NUMS, shared_aln: bool = True) -> VAR:
    vae = VQVAEConfig(
        vocab_size=64,
        z_channels=8,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        using_sa=False,
        using_mid_sa=False,
        patch_nums=patch_nums,
    )
    cfg = VARConfig(depth=depth, embed_dim=32, num_heads=2, num_classes=10, shared_aln=shared_aln, vae=vae)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VAR(cfg).eval().requires_grad_(False)
        for p in (model.pos_start, model.pos_1LC):
            p.normal_()
    return model


@pytest.fixture(scope="session")
def make_var() -> Callable[..., VAR]:
    """Builds a small VAR: depth, patch_nums and shared_aln can be chosen."""
    return _make


@pytest.fixture(scope="session")
def tiny_var() -> VAR:
    """The default small VAR; tests must not change it."""
    return _make()
