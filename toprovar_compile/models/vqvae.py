"""Multi-scale residual VQ-VAE of visual autoregressive models, in the parameter layout of FoundationVision/VAR.

Parameter names and shapes are those of the official checkpoint `vae_ch160v4096z32.pth`, so it loads with `strict=True`.
Source of the method: Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905), algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 32  # GroupNorm groups of every normalisation in the encoder and the decoder


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a multi-scale VQ-VAE; the defaults are the official 256x256 model.

    `patch_nums` are the side lengths of the square token maps, coarse to fine.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    using_sa: bool = True
    using_mid_sa: bool = True
    using_znorm: bool = False
    share_quant_resi: int = 4
    quant_resi: float = 0.5
    beta: float = 0.25
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class _SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        a = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj_out(a.transpose(1, 2).reshape(b, c, h, w))
        return out


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention when `attn` is set, then a resampling layer."""

    def __init__(self, block: nn.ModuleList, attn: nn.ModuleList, resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = block
        self.attn = attn
        if resample is not None:
            self.add_module(*resample)

    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = _ResBlock(channels, channels)
        self.attn_1 = _SpatialAttention(channels) if attention else nn.Identity()
        self.block_2 = _ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Image (B, 3, H, W) in -1..1 to features (B, z_channels, H/f, W/f), f = 2**(len(ch_mult) - 1)."""

    def __init__(self, cfg: VQVAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.down = nn.ModuleList()
        width = cfg.ch
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(cfg.num_res_blocks):
                block.append(_ResBlock(width, out))
                width = out
                if last and cfg.using_sa:
                    attn.append(_SpatialAttention(width))
            self.down.append(_Level(block, attn, None if last else ("downsample", _Downsample(width))))
        self.mid = _Middle(width, cfg.using_mid_sa)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.run(x)  # type: ignore[operator]
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # type: ignore[operator]
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to an image (B, 3, h*f, w*f), not yet clamped."""

    def __init__(self, cfg: VQVAEConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        width = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, width, 3, padding=1)
        self.mid = _Middle(width, cfg.using_mid_sa)
        levels: list[_Level] = []
        for i in reversed(range(len(widths))):
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(cfg.num_res_blocks + 1):
                block.append(_ResBlock(width, widths[i]))
                width = widths[i]
                if i == len(widths) - 1 and cfg.using_sa:
                    attn.append(_SpatialAttention(width))
            levels.insert(0, _Level(block, attn, ("upsample", _Upsample(width)) if i else None))
        self.up = nn.ModuleList(levels)  # indexed by resolution, 0 is the finest, as in the checkpoint
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            level = self.up[i]
            x = level.run(x)  # type: ignore[operator]
            if i:
                x = level.upsample(x)  # type: ignore[operator]
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Phi(nn.Conv2d):
    """Blend of a token map with its own 3x3 convolution: (1 - ratio) * h + ratio * conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class _PhiTable(nn.Module):
    """K convolutions shared by S scales: scale position t in 0..1 takes the convolution with the nearest tick."""

    def __init__(self, channels: int, count: int, ratio: float) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, ratio) for _ in range(count))
        inset = 1 / 3 / count if count == 4 else 1 / 2 / count
        # As the official code computes them: with ten scales two positions lie midway, and rounding decides.
        self.ticks: list[float] = np.linspace(inset, 1 - inset, count).tolist()

    def at(self, t: float) -> Phi:
        best = min(range(len(self.ticks)), key=lambda i: abs(self.ticks[i] - t))
        phi = self.qresi_ls[best]
        assert isinstance(phi, Phi)
        return phi


def _bicubic(h: Tensor, hw: tuple[int, int]) -> Tensor:
    """Bicubic resize of a square map (B, C, pn, pn) to hw."""
    if not h.is_cuda or hw[0] != hw[1]:
        return F.interpolate(h, size=hw, mode="bicubic")
    # Torch's CUDA kernel runs one thread a pixel, whatever the batch, and its backward is a queue of atomics.
    with torch.autocast("cuda", enabled=False):
        rows = torch.eye(h.shape[-1], device=h.device, dtype=h.dtype).unsqueeze(-1)
        weight = F.interpolate(rows.unsqueeze(0), size=(hw[0], 1), mode="bicubic")[0, :, :, 0]
        return weight.T @ h @ weight


class MultiScaleQuantizer(nn.Module):
    """Residual quantiser over the scales `patch_nums` with one codebook."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, cfg: VQVAEConfig) -> None:
        super().__init__()
        self.patch_nums, self.beta, self.using_znorm = cfg.patch_nums, cfg.beta, cfg.using_znorm
        self.quant_resi = _PhiTable(cfg.z_channels, cfg.share_quant_resi or len(cfg.patch_nums), cfg.quant_resi)
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.z_channels)
        hits = torch.zeros(len(cfg.patch_nums), cfg.vocab_size)
        self.register_buffer("ema_vocab_hit_SV", hits)

    def phi(self, scale: int) -> Phi:
        """The convolution applied to the upsampled map of one scale."""
        return self.quant_resi.at(scale / (len(self.patch_nums) - 1))

    def nearest(self, z: Tensor) -> Tensor:
        """Codebook index of every row of z (M, z_channels): int64 (M,)."""
        book: Tensor = self.embedding.weight
        if self.using_znorm:
            return (F.normalize(z, dim=-1) @ F.normalize(book, dim=-1).T).argmax(1)
        d = book.square().sum(1) - 2 * (z @ book.T)
        return d.argmin(1)

    def forward(self, f: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Quantise features (B, C, h, w): (straight-through features, loss, indices of each scale (B, pn*pn)).

        `kept`, int64 (B,), leaves each sample's features with its first so many scales; the loss is that of all scales.
        """
        b, c, h, w = f.shape
        f = f.float()
        rest, f_hat = f.detach().clone(), torch.zeros_like(f)
        result = f_hat
        loss = f.new_zeros(())
        indices = []
        for s, pn in enumerate(self.patch_nums):
            last = s == len(self.patch_nums) - 1
            z = rest if last else F.interpolate(rest, size=(pn, pn), mode="area")
            idx = self.nearest(z.detach().permute(0, 2, 3, 1).reshape(-1, c)).view(b, pn * pn)
            indices.append(idx)
            step = self.contribution(self.embedding(idx).transpose(1, 2).reshape(b, c, pn, pn), s, (h, w))
            f_hat = f_hat + step
            result = f_hat if kept is None else torch.where((s < kept).view(b, 1, 1, 1), f_hat, result)
            rest = rest - step.detach()
            loss = loss + self.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
        loss = loss / len(self.patch_nums)
        return f + (result - f).detach(), loss, indices

    def contribution(self, h: Tensor, scale: int, hw: tuple[int, int]) -> Tensor:
        """What one scale's embedded token map (B, C, pn, pn) adds to the feature map: (B, C, *hw)."""
        if h.shape[-2:] != hw:
            h = _bicubic(h, hw)
        out: Tensor = self.phi(scale)(h)
        return out

    def next_input(self, scale: int, f_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Add scale's map h (B, C, pn, pn) to f_hat (B, C, H, W): (new f_hat, it area-resized to the next scale)."""
        f_hat = f_hat + self.contribution(h, scale, (f_hat.shape[-2], f_hat.shape[-1]))
        if scale == len(self.patch_nums) - 1:
            return f_hat, f_hat
        pn = self.patch_nums[scale + 1]
        return f_hat, F.interpolate(f_hat, size=(pn, pn), mode="area")

    def teacher_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """Transformer inputs of scales 1.. from ground-truth tokens: (B, L - first, z_channels)."""
        b, c, side = indices[0].shape[0], self.embedding.embedding_dim, self.patch_nums[-1]
        f_hat = self.embedding.weight.new_zeros(b, c, side, side)
        inputs = []
        for s, pn in enumerate(self.patch_nums[:-1]):
            h = self.embedding(indices[s]).transpose(1, 2).reshape(b, c, pn, pn)
            f_hat, nxt = self.next_input(s, f_hat, h)
            inputs.append(nxt.flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1)


class VQVAE(nn.Module):
    """Multi-scale VQ-VAE: images (B, 3, H, W) in -1..1 <-> token maps of every scale.

    Source: arXiv 2404.02905; checkpoint layout of FoundationVision/VAR.
    """

    def __init__(self, cfg: VQVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = MultiScaleQuantizer(cfg)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 3, padding=1)

    def forward(self, img: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction, not clamped (B, 3, H, W), and the quantiser loss, a scalar."""
        f_hat, loss, _ = self.quantize(self.quant_conv(self.encoder(img)))
        return self.decoder(self.post_quant_conv(f_hat)), loss

    def encode(self, img: Tensor) -> list[Tensor]:
        """Token indices of every scale, int64 (B, pn*pn) each."""
        _, _, indices = self.quantize(self.quant_conv(self.encoder(img)))
        return indices  # type: ignore[no-any-return]

    def decode(self, f_hat: Tensor) -> Tensor:
        """Accumulated features (B, z_channels, h, w) to an image (B, 3, H, W) in 0..1."""
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1).add(1).mul(0.5)  # type: ignore[no-any-return]
