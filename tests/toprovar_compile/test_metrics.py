"""SSIM and PSNR of image pairs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile import metrics
from toprovar_compile.errors import MissingDependencyError, OptionError

needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason='needs the extra "metrics"'
)
BOTH: Any = pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])


def _images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 24, 20, generator=torch.Generator().manual_seed(0))


@needs_torchmetrics
def test_equal_images() -> None:
    a = _images()
    assert metrics.psnr(a, a).tolist() == [math.inf] * 2
    torch.testing.assert_close(metrics.ssim(a, a), torch.ones(2))


@needs_torchmetrics
def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 3, 11, 11)
    b = a.clone()
    b[0] += 0.1
    b[1] += 1.0
    torch.testing.assert_close(metrics.psnr(a, b), torch.tensor([20.0, 0.0]), atol=1e-4, rtol=0)


@needs_torchmetrics
@BOTH
def test_pairs_are_measured_one_by_one(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    a = _images(3)
    b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    together = metric(a, b)
    assert together.shape == (3,) and together.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(metric(a[i : i + 1], b[i : i + 1]), together[i : i + 1])


@needs_torchmetrics
def test_ssim_falls_with_noise() -> None:
    a = _images(1) * 0.5 + 0.25
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    values = [metrics.ssim(a, (a + s * noise).clamp(0, 1)).item() for s in (0.01, 0.05, 0.2)]
    assert 1 > values[0] > values[1] > values[2]


@needs_torchmetrics
@BOTH
def test_half_precision_and_gradients_are_accepted(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    a = _images().half().requires_grad_()
    assert not metric(a, a.detach()).requires_grad


@needs_torchmetrics
@BOTH
@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(3, 24, 20), None, "a has shape"),
        (torch.zeros(2, 1, 24, 20), None, "a has shape"),
        (torch.zeros(0, 3, 24, 20), None, "a has shape"),
        (torch.zeros(2, 3, 24, 20, dtype=torch.uint8), None, "uint8"),
        (torch.zeros(2, 3, 24, 20), torch.zeros(2, 3, 20, 24), "equal shapes"),
        (torch.full((1, 3, 24, 20), 1.5), None, "0..1"),
        (torch.full((1, 3, 24, 20), -0.1), None, "0..1"),
        (torch.full((1, 3, 24, 20), math.nan), None, "nan"),
    ],
)
def test_errors(metric: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor | None, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        metric(a, a if b is None else b)


@needs_torchmetrics
def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(OptionError, match="at least 11"):
        metrics.ssim(torch.zeros(1, 3, 10, 64), torch.zeros(1, 3, 10, 64))


@BOTH
def test_missing_torchmetrics(metric: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"toprovar_compile\[metrics\]"):
        metric(_images(), _images())


@needs_torchmetrics
def test_frechet_distance_by_hand() -> None:
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(x, x + torch.tensor([3.0, 0, 4.0])) == pytest.approx(25, rel=1e-6)
    covariance = torch.cov(x.T)
    assert metrics.frechet_distance(x, 2 * x - x.mean(0)) == pytest.approx(float(covariance.trace()), rel=1e-6)
    with pytest.raises(OptionError, match="features"):
        metrics.frechet_distance(x, x[:, :2])
