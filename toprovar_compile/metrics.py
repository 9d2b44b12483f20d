"""How close two sets of images are, image by image or as a whole. Needs the "metrics" extra."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.errors import MissingDependencyError, OptionError

SSIM_WINDOW = 11


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB: float images (B, 3, H, W) in 0..1 -> (B,) float32 on the CPU.

    Equal images give infinity. Raises OptionError for other shapes, dtypes or values, MissingDependencyError without
    torchmetrics.
    """
    a, b = _pair("psnr", a, b)
    image = _torchmetrics_image("psnr")
    values: Tensor = torch.stack(
        [image.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    )
    return values


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, at most 1: float images (B, 3, H, W) in 0..1 -> (B,) float32 on the CPU.

    A Gaussian window of 11 pixels, so sides are at least 11. Raises as `psnr` does.
    """
    a, b = _pair("ssim", a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise OptionError(
            f"the images are {a.shape[2]}x{a.shape[3]}", where="ssim", expected=f"sides of at least {SSIM_WINDOW}"
        )
    image = _torchmetrics_image("ssim")
    values: Tensor = image.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return values.reshape(-1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of feature vectors, float (N, F) and (M, F).

    Heusel et al., arXiv 1706.08500, equation 6; with features of a network that knows the images it stands for FID.
    Raises OptionError for other shapes or fewer than two vectors, MissingDependencyError without torchmetrics.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise OptionError(
                f"{name} has shape {tuple(x.shape)}", where="frechet_distance", expected="features (N, F), N at least 2"
            )
    _torchmetrics_image("frechet_distance")
    fid = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=_Given(a.shape[1]))
    fid.update(a.detach().double().cpu(), real=True)
    fid.update(b.detach().double().cpu(), real=False)
    return float(fid.compute())


class _Given(nn.Module):
    """Stands where torchmetrics has its Inception network: the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def _pair(where: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 4 or x.shape[0] == 0 or x.shape[1] != 3 or not x.is_floating_point():
            raise OptionError(
                f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}",
                where=where,
                expected="float images (B, 3, H, W)",
            )
    if a.shape != b.shape:
        raise OptionError(f"a has shape {tuple(a.shape)}, b has {tuple(b.shape)}", where=where, expected="equal shapes")
    out = []
    for name, x in (("a", a), ("b", b)):
        x = x.detach().float().cpu()
        low, high = x.min().item(), x.max().item()
        # Written so that NaN fails as well.
        if not (low >= 0.0 and high <= 1.0):
            raise OptionError(
                f"{name} has values in {low:.3g}..{high:.3g}",
                where=where,
                expected="values in 0..1",
                todo="clamp or rescale the images",
            )
        out.append(x)
    return out[0], out[1]


def _torchmetrics_image(where: str) -> Any:
    try:
        return importlib.import_module("torchmetrics.functional.image")
    except ImportError as error:
        raise MissingDependencyError(
            "torchmetrics is not installed",
            where=where,
            expected='the extra "metrics"',
            todo="pip install 'toprovar_compile[metrics]'",
        ) from error
