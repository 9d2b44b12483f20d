"""Frequency features, against plain statements of them."""

from __future__ import annotations

import math

import pytest
import torch

from toprovar_compile.policies.frequency import edges, frequency_features, high_frequency_share


def test_edges_are_sobel_gradients() -> None:
    image = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    grey = image[0].mean(0)
    got = edges(image)
    assert got.shape == (1, 1, 7, 9)
    y, x = 3, 4
    window = grey[y - 1 : y + 2, x - 1 : x + 2]
    gx = (window[:, 0] - window[:, 2]) @ torch.tensor([1.0, 2.0, 1.0])
    gy = (window[0] - window[2]) @ torch.tensor([1.0, 2.0, 1.0])
    assert got[0, 0, y, x].item() == pytest.approx(math.hypot(gx, gy), rel=1e-5)


@pytest.mark.parametrize(("cycles", "wanted"), [(2, 0.0), (12, 1.0)])
def test_share_of_one_wave(cycles: int, wanted: float) -> None:
    wave = torch.cos(torch.arange(32) * 2 * math.pi * cycles / 32).expand(1, 3, 32, 32)
    assert high_frequency_share(wave).item() == pytest.approx(wanted, abs=1e-4)


def test_share_by_shifted_spectrum() -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    amplitude = torch.fft.fftshift(torch.fft.fft2(images.mean(1)), dim=(1, 2)).abs()
    y, x = torch.meshgrid(torch.arange(16) - 8, torch.arange(24) - 12, indexing="ij")
    outside = (y**2 + x**2).sqrt() > int(0.4 * 16 / 2)
    wanted = (amplitude * outside).sum((1, 2)) / amplitude.sum((1, 2))
    torch.testing.assert_close(high_frequency_share(images), wanted)


def test_features() -> None:
    before, after = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    got = frequency_features(before, after)
    assert got.shape == (3, 2)
    torch.testing.assert_close(got[:, 0], (edges(after) - edges(before)).abs().flatten(1).mean(1))
    assert frequency_features(after, after)[:, 0].abs().max() == 0
