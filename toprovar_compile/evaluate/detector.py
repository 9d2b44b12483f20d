"""The detector of EmojiEval: finds the objects of composed emoji scenes, with their boxes and colours.

A small anchor-free CNN that looks at 256x256 and answers on a 32x32 map: for each cell how likely the centre of each
object is there, the distances to the box's sides, and the colour. Trained by examples/train_emoji/train_detector.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import CheckpointError, OptionError

SIDE = 256
STRIDE = 8
FOLDER = Path(__file__).parents[1] / "models" / "weights" / "emoji_eval"
_CANDIDATES = 48  # peaks looked at in one picture
_OVERLAP = 0.5  # boxes that overlap more are one object
_CHUNK = 64  # pictures looked at together


@dataclass(frozen=True)
class Found:
    """One object: its noun, the name of its colour or None for none of the known ones, score, box x0, y0, x1, y1."""

    noun: str
    colour: str | None
    score: float
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Detector(nn.Module):
    """Images (B, 3, 256, 256) in -1..1 to maps (B, nouns + 4 + 1 + colours, 32, 32).

    The maps: a logit for each noun, logarithms of the distances left, up, right, down in cells, a logit for no known
    colour and one for each colour.
    """

    def __init__(self, nouns: Sequence[str], colours: Sequence[str], width: int = 16) -> None:
        super().__init__()
        self.nouns, self.colours, self.width = tuple(nouns), tuple(colours), width
        w = width
        self.to4 = nn.Sequential(_Conv(3, w, stride=2), _Conv(w, 2 * w, stride=2), _Residual(2 * w))
        self.to8 = nn.Sequential(_Conv(2 * w, 4 * w, stride=2), _Residual(4 * w), _Residual(4 * w))
        self.to16 = nn.Sequential(_Conv(4 * w, 6 * w, stride=2), _Residual(6 * w))
        self.to32 = nn.Sequential(_Conv(6 * w, 8 * w, stride=2), _Residual(8 * w))
        self.from32 = _Conv(8 * w, 6 * w, size=1)
        self.from16 = _Conv(6 * w, 4 * w, size=1)
        self.neck = nn.Sequential(_Residual(4 * w), _Conv(4 * w, 8 * w))
        self.head = nn.Conv2d(8 * w, len(self.nouns) + 4 + 1 + len(self.colours), 1)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.head.bias[: len(self.nouns)], -4.6)  # type: ignore[index]  # a peak is rare

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps of images in -1..1 at strides 8, 16 and 32."""
        c8 = self.to8(self.to4(x))
        c16 = self.to16(c8)
        return c8, c16, self.to32(c16)

    def forward(self, x: Tensor) -> Tensor:
        c8, c16, c32 = self.features(x)
        c16 = c16 + _double(self.from32(c32))
        c8 = c8 + _double(self.from16(c16))
        maps: Tensor = self.head(self.neck(c8))
        return maps

    @torch.no_grad()
    def find(self, images: Tensor, threshold: float = 0.3) -> list[list[Found]]:
        """The objects in each of the images (B, 3, H, W) in 0..1, best first. Other sizes are scaled to 256x256."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise OptionError(
                f"the images have shape {tuple(images.shape)} and dtype {images.dtype}",
                where="Detector.find",
                expected="floats (B, 3, H, W) in 0..1",
            )
        out: list[list[Found]] = []
        for x in torch.split(images, _CHUNK):
            out += self.read(self(self._ready(x)).float().cpu(), threshold)
        return out

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """How different pairs of images (B, 3, H, W) in 0..1 look to the detector: (B,) on the CPU, 0 for equal ones.

        As LPIPS does: squared differences of feature vectors of length 1, averaged over places, then over three maps.
        """
        parts = []
        for some, others in zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True):
            total = torch.zeros(len(some))
            for x, y in zip(self.features(self._ready(some)), self.features(self._ready(others)), strict=True):
                difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
                total += difference.square().sum(1).mean((1, 2)).float().cpu() / 3
            parts.append(total)
        return torch.cat(parts)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """One vector an image (B, 3, H, W) in 0..1: its last feature map averaged over places, float32 (B, C), CPU."""
        parts = (self.features(self._ready(x))[-1] for x in torch.split(images, _CHUNK))
        return torch.cat([part.float().mean((2, 3)).cpu() for part in parts])

    def _ready(self, images: Tensor) -> Tensor:
        """Images in 0..1 as the network takes them."""
        place = next(self.parameters())
        x = images.to(device=place.device, dtype=place.dtype)
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return x * 2 - 1

    def read(self, maps: Tensor, threshold: float = 0.3) -> list[list[Found]]:
        """The objects that maps of `forward` show."""
        n = len(self.nouns)
        score = maps[:, :n].sigmoid()
        score = torch.where(score == F.max_pool2d(score, 3, 1, 1), score, 0.0)
        best, index = score.flatten(1).topk(min(_CANDIDATES, score[0].numel()), dim=1)
        side = maps.shape[-1]
        out = []
        for picture, scores, places in zip(maps, best.tolist(), index.tolist(), strict=True):
            found: list[Found] = []
            for value, place in zip(scores, places, strict=True):
                if value < threshold:
                    break
                noun, y, x = place // side**2, place // side % side, place % side
                left, up, right, down = picture[n : n + 4, y, x].clamp(-4, 4).exp().mul(STRIDE).tolist()
                cx, cy = (x + 0.5) * STRIDE, (y + 0.5) * STRIDE
                box = (cx - left, cy - up, cx + right, cy + down)
                colour = int(picture[n + 4 :, y, x].argmax())
                if all(overlap(box, f.box) < _OVERLAP for f in found):
                    found.append(Found(self.nouns[noun], (None, *self.colours)[colour], value, box))
            out.append(found)
        return out


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (both - w * h)


def load_detector(folder: Path = FOLDER, device: torch.device | str = "cpu") -> Detector:
    """A trained detector, float32 in eval mode, by default the shipped one. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "detector.json").read_text())
        state = load_file(folder / "detector.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the detector cannot be read: {error}",
            where=str(folder),
            expected="detector.json and detector.safetensors",
            todo="train it: examples/train_emoji/train_detector.py",
        ) from error
    net = Detector(config["nouns"], config["colours"], config["width"])
    try:
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except RuntimeError as error:
        raise CheckpointError("the weights do not fit detector.json", where=str(folder)) from error
    return net.to(device).eval().requires_grad_(False)


class _Conv(nn.Sequential):
    """Convolution, batch normalisation, SiLU."""

    def __init__(self, inner: int, outer: int, *, stride: int = 1, size: int = 3) -> None:
        conv = nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outer), nn.SiLU())


class _Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_Conv(width, width), _Conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
