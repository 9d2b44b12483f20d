"""A VAR of its own for every test here, since these tests change it."""

from __future__ import annotations

import pytest
import torch

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig


@pytest.fixture
def tiny_var() -> VAR:
    """Five scales, three layers, 66 tokens, images 12x12; each parameter has random values that matter."""
    vae = VQVAEConfig(64, 8, 32, (1, 2), num_res_blocks=1, patch_nums=(1, 2, 3, 4, 6))
    model = VAR(VARConfig(3, 64, 2, num_classes=10, shared_aln=True, vae=vae))
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
        model.head.weight.mul_(4)
    return model.eval().requires_grad_(False)
