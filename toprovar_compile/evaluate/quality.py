"""Closeness of images to the unpruned ones, computed where there is room for it."""

from __future__ import annotations

import torch
from torch import Tensor

from toprovar_compile.measure import PSNR_CAP
from toprovar_compile.metrics import _torchmetrics_image

_CHUNK = 32  # images compared at a time


def closeness(images: Tensor, wanted: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """SSIM and PSNR in dB (capped at 100), float32 (N,) on the CPU, of images (N, 3, H, W) in 0..1, as `metrics` has
    them. They are computed on `device`. Raises MissingDependencyError without torchmetrics."""
    image = _torchmetrics_image("closeness")
    pairs = zip(torch.split(images, _CHUNK), torch.split(wanted, _CHUNK), strict=True)
    similar, decibels = [], []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for a, b in pairs:
            a, b = a.to(device), b.to(device)
            value = image.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
            similar.append(value.reshape(-1).cpu())
            decibels.append((-10 * (a - b).square().mean((1, 2, 3)).log10()).clamp_max(PSNR_CAP).cpu())
    return torch.cat(similar), torch.cat(decibels)
