"""The token grids of Infinity's aspect ratios and sizes, and the rotary position tables that belong to them.

The numbers are those of FoundationVision/Infinity, `infinity/utils/dynamic_resolution.py`: a pixel side is 16 times the
token side of the last scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.schedule import ScaleSchedule

# (h, w) of every scale for h / w >= 1; a wide ratio has them turned round.
_TALL: Mapping[float, str] = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
_ROPE_BASE = 10000.0
_ROPE_SIDE = 128  # positions of the table that `rope2d_normalized_by_hw=1` resizes

SIZES: Mapping[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Scales of each size, named by its pixels: 256x256, 512x512, 768x768 and 1024x1024, or as many in another ratio."""


def _grids(text: str, *, turned: bool) -> tuple[tuple[int, int], ...]:
    pairs = [tuple(map(int, pair.split("x"))) for pair in text.split()]
    return tuple((b, a) if turned else (a, b) for a, b in pairs)


GRIDS: Mapping[float, tuple[tuple[int, int], ...]] = {
    **{ratio: _grids(text, turned=False) for ratio, text in _TALL.items()},
    **{int(1 / ratio * 1000) / 1000: _grids(text, turned=True) for ratio, text in _TALL.items() if ratio != 1.0},
}
"""The (h, w) grids of all 13 scales for each h / w."""


def infinity_schedule(ratio: str | float = "1:1", size: str = "1M") -> ScaleSchedule:
    """The schedule of an image of this aspect ratio and size.

    `ratio` is "width:height", as in "16:9", or a number, height / width; the nearest of the official ratios is taken.
    `size` is a key of `SIZES`. Raises OptionError for anything else.
    """
    if size not in SIZES:
        close = nearest(str(size), SIZES)
        raise OptionError(
            f"there is no size {size!r}",
            where="infinity_schedule",
            expected=f"one of {', '.join(SIZES)}",
            todo=f"did you mean {close!r}?" if close else "choose one of these",
        )
    wanted = _h_div_w(ratio)
    best = min(GRIDS, key=lambda h_div_w: abs(h_div_w - wanted))
    return ScaleSchedule(GRIDS[best][: SIZES[size]])


def _h_div_w(ratio: str | float) -> float:
    try:
        if isinstance(ratio, str):
            width, _, height = ratio.partition(":")
            value = float(height) / float(width)
        else:
            value = float(ratio)
    except (TypeError, ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise OptionError(
            f"{ratio!r} is no aspect ratio",
            where="infinity_schedule",
            expected='"width:height", such as "16:9", or height / width as a number above 0',
        )
    return value


def full_grid(schedule: ScaleSchedule) -> tuple[int, int]:
    """The grid that positions are scaled to: the last one of the ratio's largest size, or the schedule's own last."""
    for grids in GRIDS.values():
        if len(schedule) in SIZES.values() and grids[: len(schedule)] == schedule.grids:
            return grids[-1]
    return schedule.grids[-1]


@lru_cache(maxsize=8)
def rope_tables(
    schedule: ScaleSchedule, head_dim: int, normalised: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Cosines and sines of every scale, each float32 (1, 1, n, head_dim / 2): the first half turns by row, then column.

    `normalised` is the official rope2d_normalized_by_hw: 0 takes rows and columns as positions, 1 resizes a table of
    128 positions, 2 spreads a scale's rows and columns over those of the full grid.
    """
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        frequencies = 1.0 / (_ROPE_BASE ** (torch.arange(0, half, 2).float() / half))
        full = full_grid(schedule)
        tables = []
        for h, w in schedule.grids:
            if normalised == 1:
                cos, sin = _resized(frequencies, full, h, w)
            else:
                rows, columns = (
                    (torch.arange(side) * (whole / side)).round() if normalised == 2 else torch.arange(side).float()
                    for side, whole in zip((h, w), full, strict=True)
                )
                angles = _angles(frequencies, rows, columns)
                cos, sin = angles.cos(), angles.sin()
            tables.append(tuple(t.reshape(1, 1, h * w, half).to(device) for t in (cos, sin)))
        return tuple((cos, sin) for cos, sin in tables)


@lru_cache(maxsize=8)
def pair_tables(
    schedule: ScaleSchedule, head_dim: int, normalised: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], ...]:
    """`rope_tables` for each channel, float32 (1, 1, n, head_dim): the sine is negative for the first of a pair."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(
            (cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2))
            for cos, sin in rope_tables(schedule, head_dim, normalised, device)
        )


def _angles(frequencies: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(h, w, head_dim / 2)"""
    by_row, by_column = torch.outer(rows, frequencies), torch.outer(columns, frequencies)
    h, w = len(rows), len(columns)
    return torch.cat((by_row[:, None].expand(-1, w, -1), by_column[None].expand(h, -1, -1)), dim=-1)


def _resized(frequencies: Tensor, full: tuple[int, int], h: int, w: int) -> tuple[Tensor, Tensor]:
    side = torch.arange(_ROPE_SIDE).float()
    angles = _angles(frequencies, side, side)
    longest = max(full)
    height, width = (_ROPE_SIDE if edge == longest else int(_ROPE_SIDE / longest * edge) for edge in full)
    table = torch.stack((angles.cos(), angles.sin()))[:, :height, :width].permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return resized[0], resized[1]
