"""Multi-scale binary-spherical tokenizer of Infinity, in the parameter layout of FoundationVision/Infinity.

Parameter names and shapes are those of the official checkpoints, such as `infinity_vae_d32reg.pth`, so they load with
`strict=True`. A position of a token grid is d bits; their codes lie on the unit sphere.
Source of the method: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling" (arXiv 2412.04431), section 3.2;
Zhao et al., "Image and Video Tokenization with Binary Spherical Quantization" (arXiv 2406.07548).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import CheckpointError, OptionError
from toprovar_compile.models.loading import _fill, _read

_CONSTANTS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # the same powers of two under both names of the quantiser
_CH_MULT: Mapping[int, tuple[int, ...]] = {8: (1, 2, 4, 4), 16: (1, 2, 4, 4, 4)}
Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class BSQVAEConfig:
    """Shape of the tokenizer: `codebook_dim` bits a position, `ch * ch_mult[i]` channels at resolution i, finest first.

    The first convolution reads blocks of `shuffle` x `shuffle` pixels and the last writes them, so a position covers
    shuffle * 2 ** (len(ch_mult) - 1) pixels a side; `groups` are those of every GroupNorm. The defaults are those of
    the official d=32 model.
    """

    codebook_dim: int = 32
    ch: int = 128
    ch_mult: tuple[int, ...] = _CH_MULT[16]
    num_res_blocks: int = 2
    shuffle: int = 1
    groups: int = 32

    @property
    def patch_size(self) -> int:
        """Pixels a side of one position."""
        return self.shuffle << (len(self.ch_mult) - 1)

    @classmethod
    def official(cls, codebook_dim: int, patch_size: int = 16) -> BSQVAEConfig:
        """A published tokenizer: patch size 16, or 8 for the one of the 8B model, whose tokens are 2x2 positions."""
        if patch_size not in _CH_MULT:
            raise OptionError(f"there is no tokenizer of patch size {patch_size}", expected="16 or 8")
        return cls(codebook_dim, ch_mult=_CH_MULT[patch_size])


class _Conv(nn.Module):
    """A convolution under the name the checkpoints have it by."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class _NormSilu(nn.Module):
    """GroupNorm and SiLU; nowhere does one stand without the other."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


class _ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _NormSilu(inputs, groups), _Conv(inputs, outputs)
        self.norm2, self.conv2 = _NormSilu(outputs, groups), _Conv(outputs, outputs)
        self.nin_shortcut = _Conv(inputs, outputs, 1, padding=0) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Level(nn.Module):
    """One resolution: residual blocks, then a resampling layer, which the coarsest or finest level lacks."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))
        if resample is not None:
            self.add_module(*resample)
        self._resample = resample[0] if resample is not None else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self._resample is not None:
            x = getattr(self, self._resample)(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (_ResBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.block_1(x))
        return out


class Encoder(nn.Module):
    """Image (B, 3, H, W) in -1..1 to features (B, codebook_dim, H / patch, W / patch)."""

    def __init__(self, cfg: BSQVAEConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        blocks, groups = cfg.num_res_blocks, cfg.groups
        self.shuffle = cfg.shuffle
        self.conv_in = _Conv(3 * cfg.shuffle**2, cfg.ch)
        self.down = nn.ModuleList()
        width = cfg.ch
        for out in widths[:-1]:
            self.down.append(_Level(width, out, blocks, groups, ("downsample", _Downsample(out))))
            width = out
        self.down.append(_Level(width, widths[-1], blocks, groups, None))
        self.mid = _Middle(widths[-1], groups)
        self.norm_out, self.conv_out = _NormSilu(widths[-1], groups), _Conv(widths[-1], cfg.codebook_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x if self.shuffle == 1 else F.pixel_unshuffle(x, self.shuffle))
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(self.norm_out(self.mid(x)))
        return out


class Decoder(nn.Module):
    """Sum of codes (B, codebook_dim, h, w) to an image (B, 3, h * patch, w * patch), about -1..1, not clamped."""

    def __init__(self, cfg: BSQVAEConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.shuffle = cfg.shuffle
        self.conv_in = _Conv(cfg.codebook_dim, widths[-1])
        self.mid = _Middle(widths[-1], cfg.groups)
        levels: list[_Level] = []
        width = widths[-1]
        for i in reversed(range(len(widths))):
            resample = ("upsample", _Upsample(widths[i])) if i else None
            levels.insert(0, _Level(width, widths[i], cfg.num_res_blocks + 1, cfg.groups, resample))
            width = widths[i]
        self.up = nn.ModuleList(levels)  # indexed by resolution, 0 is the finest, as in the checkpoint
        self.norm_out, self.conv_out = _NormSilu(width, cfg.groups), _Conv(width, 3 * cfg.shuffle**2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
        out: Tensor = self.conv_out(self.norm_out(x))
        return out if self.shuffle == 1 else F.pixel_shuffle(out, self.shuffle)


class BSQVAE(nn.Module):
    """Images <-> the bits of every scale. Grids (h, w) are those of the tokenizer's positions, coarse to fine.

    Only the networks run in the dtype of the weights; quantisation and sums of codes are float32. `decode` compiles as
    one graph.
    Source: arXiv 2412.04431; checkpoint layout of FoundationVision/Infinity.
    """

    def __init__(self, cfg: BSQVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder: nn.Module = Encoder(cfg)
        self.decoder = Decoder(cfg)

    @property
    def codebook_dim(self) -> int:
        """Bits of a position."""
        return self.cfg.codebook_dim

    @property
    def patch_size(self) -> int:
        """Pixels a side of a position."""
        return self.cfg.patch_size

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Codes of bits (B, h, w, d), integer or bool: float32 (B, d, h, w), 1 / sqrt(d) in size, negative for 0."""
        scale = 1 / math.sqrt(self.codebook_dim)
        return F.normalize(bits * scale * 2 - scale, dim=-1).permute(0, 3, 1, 2)

    def next_input(self, s: int, summed: Tensor | None, codes: Tensor, grids: Grids) -> tuple[Tensor, Tensor | None]:
        """Add the codes (B, d, *grids[s]) of scale s: (new sum (B, d, *grids[-1]), it resized to grids[s + 1]).

        `summed` is None before the first scale, and so is the resized sum after the last one. Both are new tensors.
        """
        last = s == len(grids) - 1
        step = codes if last else _resize(codes, grids[-1], "trilinear")
        summed = step if summed is None else summed + step
        return summed, None if last else _resize(summed, grids[s + 1], "trilinear")

    def decode(self, summed: Tensor) -> Tensor:
        """Sum of codes (B, d, h, w) to images (B, 3, h * patch, w * patch) in 0..1, in the dtype of the weights."""
        z = summed.to(self.decoder.conv_in.conv.weight.dtype)
        if z.is_cuda:  # convolutions in bfloat16 are fastest so, and all that follows keeps the layout
            z = z.contiguous(memory_format=torch.channels_last)
        image: Tensor = self.decoder(z)
        return image.clamp(-1, 1).add(1).mul(0.5)

    def encode(self, image: Tensor, grids: Grids) -> list[Tensor]:
        """Bits of every scale, int64 (B, h, w, d) each, of an image (B, 3, H, W) in -1..1.

        Raises OptionError when the last grid is not that of the image, and for a tokenizer without its encoder.
        """
        if not isinstance(self.encoder, Encoder):
            raise OptionError(
                "this tokenizer came without its encoder", where="BSQVAE.encode", expected="a tokenizer to encode with"
            )
        features = self.encoder(image.to(self.encoder.conv_in.conv.weight.dtype))
        if tuple(grids[-1]) != tuple(features.shape[2:]):
            raise OptionError(
                f"the last grid is {tuple(grids[-1])}",
                where="BSQVAE.encode",
                expected=f"{tuple(features.shape[2:])} for an image of {tuple(image.shape[2:])} pixels",
            )
        return self.quantize(features, grids)[1]

    def quantize(self, features: Tensor, grids: Grids) -> tuple[Tensor, list[Tensor]]:
        """Quantise features (B, d, h, w) scale by scale: (sum of codes float32 (B, d, h, w), bits as in `encode`).

        Each scale takes the signs of what the ones before it left over. Gradients pass straight through the signs.
        """
        rest = features.float()
        size = (rest.shape[2], rest.shape[3])
        total: Tensor | None = None
        bits = []
        for grid in grids:
            z = rest if tuple(grid) == size else _resize(rest, grid, "area")
            z = F.normalize(z, dim=1)
            sign = torch.where(z > 0, 1.0, -1.0) / math.sqrt(self.codebook_dim)
            codes = z + (sign - z).detach()
            bits.append((codes > 0).long().permute(0, 2, 3, 1))
            step = codes if tuple(grid) == size else _resize(codes, size, "trilinear")
            rest = rest - step.detach()
            total = step if total is None else total + step
        assert total is not None
        return total, bits


def _resize(x: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """Resize x (B, d, h, w) to `grid` as a video of one frame, which rounds as the official code does."""
    return F.interpolate(x.unsqueeze(2), size=(1, *grid), mode=mode).squeeze(2)


def sample_bits(logits: Tensor, top_k: int, top_p: float, rng: torch.Generator | None) -> Tensor:
    """Draw each bit: int64 (B, n, d) of logits float32 (B, n, 2 * d), two neighbouring ones a bit, left as they are.

    Of two classes top-k and top-p can only drop the less likely one: top_k = 1 does unless both are equal (0 and more
    than 1 do not filter), top_p when its probability is at most 1 - top_p (0 does not filter). What is left is drawn
    as the larger of p / q with q ~ Exp(1), which is what torch.multinomial draws for one sample, on the CPU and on
    CUDA, so the generator yields the same bits as sorting, filtering and torch.multinomial. Nothing is read on the
    host: a CUDA graph can hold it, if `rng` is registered with it. Logits that are not finite give arbitrary bits.
    """
    pairs = logits.reshape(-1, 2)
    zero, one = pairs.unbind(1)
    p = pairs.softmax(1)
    draw = p / torch.empty_like(p).exponential_(generator=rng)
    bit = draw[:, 1] > draw[:, 0]
    if top_p > 0:
        bit = torch.where(p.amin(1) <= 1 - top_p, one >= zero, bit)
    if top_k == 1:
        bit = torch.where(one != zero, one > zero, bit)
    return bit.long().view(*logits.shape[:-1], -1)


def load_bsq(path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BSQVAE:
    """The tokenizer of an official checkpoint such as infinity_vae_d32reg.pth, in eval mode; its shape is read off it.

    Raises CheckpointError that names the keys when they are missing, unexpected or of another shape than the model's.
    """
    file: dict[str, Any] = _read(Path(path))
    nested = file.get("vae", file)
    state = {k: v for k, v in dict(nested).items() if k not in _CONSTANTS}
    if bad := [k for k, v in state.items() if not isinstance(v, Tensor)]:
        raise CheckpointError(f"{bad[0]} is not a tensor", where=str(path), expected="a checkpoint of BSQ-VAE weights")
    with torch.device("meta"):
        model = BSQVAE(_config_of(state, str(path)))
    _fill(model, state, str(path))
    return model.to(device=device, dtype=dtype)


def _config_of(state: Mapping[str, Tensor], where: str) -> BSQVAEConfig:
    first, last = state.get("encoder.conv_in.conv.weight"), state.get("encoder.conv_out.conv.weight")
    widths: dict[int, int] = {}
    blocks = 0
    for name, tensor in state.items():
        if found := re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.conv\.weight", name):
            widths[int(found[1])] = tensor.shape[0]
            blocks = max(blocks, int(found[2]) + 1)
    if first is None or last is None or sorted(widths) != list(range(len(widths))) or not widths:
        raise CheckpointError(
            "it has no encoder of a BSQ-VAE",
            where=where,
            expected="keys such as encoder.conv_in.conv.weight and encoder.down.0.block.0.conv1.conv.weight",
        )
    ch = first.shape[0]
    return BSQVAEConfig(last.shape[0], ch, tuple(widths[i] // ch for i in range(len(widths))), blocks)
