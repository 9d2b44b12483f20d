"""Frequency features of an image in progress, as SkipVAR (arXiv 2506.08908) decides by them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CUT = 0.4  # radius of the low frequencies, in halves of the shorter side


def edges(images: Tensor) -> Tensor:
    """Gradient magnitude by Sobel filters of the grey image: (B, C, H, W) -> float32 (B, 1, H, W)."""
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1))
    across, down = grey[..., :-2] - grey[..., 2:], grey[..., :-2, :] - grey[..., 2:, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return torch.hypot(gx, gy)


def high_frequency_share(images: Tensor, cut: float = _CUT) -> Tensor:
    """Share (0..1) of the spectrum's amplitude outside a centred disc: (B, C, H, W) -> float32 (B,).

    The disc has the radius `cut` * min(H, W) / 2, rounded down to whole frequencies.
    """
    height, width = images.shape[-2:]
    amplitude = torch.fft.fft2(images.float().mean(1)).abs()
    fy, fx = (torch.fft.fftfreq(side, 1 / side, device=images.device) for side in (height, width))
    outside = (fy[:, None].square() + fx.square()).sqrt() > int(cut * min(height, width) / 2)
    share: Tensor = (amplitude * outside).sum((1, 2)) / (amplitude.sum((1, 2)) + 1e-6)
    return share


def frequency_features(before: Tensor, after: Tensor) -> Tensor:
    """Two features of each image, float32 (B, 2), from its previews in -1..1 before and after a scale (B, 3, H, W).

    They are the mean absolute change of its edges, and the high-frequency share of the later preview.
    """
    change = (edges(after) - edges(before)).abs().mean((1, 2, 3))
    return torch.stack((change, high_frequency_share(after)), dim=1)
