"""Functions on token maps, shared by the compiled runtime and the eager reference so that both choose the same tokens.

None of them waits for the device, and all trace under `torch.compile`. A map is flat: the tokens of a grid (h, w), row
by row.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.plan import Direction, Normalisation, Selection

Grid = tuple[int, int]

_REGIONS = 4  # regions along each side of a map
_TINY = torch.finfo(torch.float32).tiny


def resize_tokens(x: Tensor, source: Grid, target: Grid) -> Tensor:
    """Area-resize token maps x, (B, h*w) or (B, h*w, C) on grid `source`, to grid `target`; x itself for equal grids.

    The values are those of `F.interpolate(mode="area")`: a target token is the mean of the source tokens it touches.
    Raises OptionError when x does not have the tokens of `source`.
    """
    if x.dim() not in (2, 3) or x.shape[1] != source[0] * source[1]:
        raise OptionError(
            f"x has shape {tuple(x.shape)}",
            where="resize_tokens",
            expected=f"(B, {source[0] * source[1]}) or (B, {source[0] * source[1]}, C) for a grid {source}",
        )
    if source == target:
        return x
    maps = x.reshape(x.shape[0], *source, -1).permute(0, 3, 1, 2)
    # A channels-last view goes in and comes out, so that no layout is copied.
    resized = F.interpolate(maps, size=target, mode="area").permute(0, 2, 3, 1)
    return resized.reshape(x.shape[0], target[0] * target[1], *x.shape[2:])


@cache
def area_tables(source: Grid, target: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """`resize_tokens` to a grid whose sides are no smaller, as tables: rows, int64 (4, N), and shares, float32 (4, N).

    Token i of the target is sum_j shares[j, i] * x[:, rows[j, i]]; the shares are powers of two, so that this is exact.
    The tables of a pair of grids stay where they are: CUDA graphs read them.
    """
    with torch.inference_mode(False):
        (top, high), (left, wide) = (_touched(s, t, device) for s, t in zip(source, target, strict=True))
        rows = top[:, None, :, None] * source[1] + left[None, :, None, :]
        shares = high[:, None, :, None] * wide[None, :, None, :]
        return rows.view(4, target[0] * target[1]), shares.view(4, target[0] * target[1])


def _touched(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The one or two places of a side of `source` that each of `target` touches, and their shares: (2, target) both."""
    place = torch.arange(target, device=device)
    first, last = place * source // target, ((place + 1) * source - 1) // target
    second = (last > first) * 0.5
    return torch.stack((first, last)), torch.stack((1 - second, second))


def keep_probability(
    entropy: Tensor,
    *,
    phi: float,
    layer_score: float,
    alpha_min: float,
    alpha_max: float,
    normalisation: Normalisation = "mean_one",
) -> Tensor:
    """Keep-probability P in 0..1 of every token, float32 (B, N), from its entropy in nats (B, N).

    P = 1 - clip(alpha_min + (alpha_max - alpha_min) * q, 0, 1), q = phi * layer_score * h, with h the entropy divided
    by its mean over the map ("mean_one") or by its sum ("literal"). A map of zeros counts as uniform.
    """
    entropy = entropy.float()
    total = entropy.sum(-1, keepdim=True)
    share = torch.where(total > 0, entropy / total.clamp_min(_TINY), 1.0 / entropy.shape[-1])
    weight = phi * layer_score * (entropy.shape[-1] if normalisation == "mean_one" else 1)
    return 1 - (alpha_min + (alpha_max - alpha_min) * weight * share).clamp(0, 1)


def select_tokens(
    entropy: Tensor,
    keep: int,
    *,
    selection: Selection,
    direction: Direction,
    generator: torch.Generator | None = None,
    keep_prob: Tensor | None = None,
    grid: Grid | None = None,
    region_share: float = 0.0,
) -> Tensor:
    """The tokens that each sample keeps: int64 (B, keep), ascending, from its entropy map (B, N).

    "topk" keeps the tokens of lowest entropy (of highest for direction "high_entropy"); of equal ones the first.
    "gumbel" draws `keep` of them without replacement, with odds `keep_prob` (B, N) and the noise of `generator`; for
    direction "high_entropy" the odds are mirrored within their range. Rows do not influence one another; NaN is worst.
    With `grid` (h, w) and a `region_share`, each of the 4 x 4 regions of the map keeps at least that share of its
    tokens, rounded down, as far as `keep` allows.
    Raises OptionError for a `keep` outside 1..N, and for "gumbel" without `keep_prob`.
    """
    if not 1 <= keep <= entropy.shape[-1]:
        raise OptionError(f"keep is {keep}", where="select_tokens", expected=f"an integer in 1..{entropy.shape[-1]}")
    if selection == "topk":
        cost = entropy if direction == "low_entropy" else -entropy
    else:
        cost = -_perturbed(keep_prob, direction, generator)
    # A stable sort and not topk, which leaves open who of equal tokens is taken; ascending order puts NaN last.
    order = cost.sort(dim=-1, stable=True).indices
    if grid is not None and region_share > 0:
        order = _regions_first(order, grid, region_share)
    return order[:, :keep].sort(dim=-1).values


def selection_generator(plan_seed: int, s: int, layer: int, device: torch.device | str) -> torch.Generator:
    """The random generator of "gumbel" for one scale and layer: its own stream for each (plan_seed, s, layer)."""
    text = f"{plan_seed},{s},{layer}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return generator


def _perturbed(keep_prob: Tensor | None, direction: Direction, generator: torch.Generator | None) -> Tensor:
    """log P plus Gumbel noise, float32 (B, N)."""
    if keep_prob is None:
        raise OptionError(
            'selection "gumbel" has no keep_prob', where="select_tokens", expected="the result of keep_probability"
        )
    p = keep_prob.float()
    if direction == "high_entropy":
        p = p.amax(-1, keepdim=True) + p.amin(-1, keepdim=True) - p
    noise = torch.empty_like(p, memory_format=torch.contiguous_format).exponential_(generator=generator)
    # log P - log E, E exponential; both are kept off zero so that no NaN or infinity arises.
    return p.clamp_min(_TINY).log() - noise.clamp_min(_TINY).log()


def _regions_first(order: Tensor, grid: Grid, share: float) -> Tensor:
    """Tokens (B, N) from best to worst, with the best `share` of each region moved to the front."""
    rows, columns = (torch.arange(side, device=order.device) * _REGIONS // side for side in grid)
    region = (rows[:, None] * _REGIONS + columns).flatten()
    regions = torch.arange(_REGIONS**2, device=order.device)
    quota = ((region == regions[:, None]).sum(-1) * share).floor()
    ranked = region[order].unsqueeze(1) == regions[:, None]  # (B, regions, N): sums along the last dimension are fast
    in_region = (ranked.cumsum(-1, dtype=torch.int32) * ranked).sum(1)
    free = in_region > quota[region][order]
    return order.gather(1, free.to(torch.uint8).sort(dim=-1, stable=True).indices)
