"""Which tokens of a scale a layer keeps, as its plan says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import PlanError
from toprovar_compile.plan import Plan
from toprovar_compile.policies.tokens import Grid, keep_probability, select_tokens, selection_generator

_WINDOW = 3  # tokens along each side of the neighbourhood in `local_detail`
_MIX = 0x45D9F3B  # an odd multiplier of 27 bits: 32-bit values times it stay within int64


def kept_tokens(plan: Plan, s: int, layer: int, keep: int, x: Tensor, entropy: Tensor | None) -> Tensor:
    """The `keep` tokens that `layer` computes at scale `s`: int64 (B, keep), ascending.

    `x` (B, N, C) is the layer's input. `entropy` (B, N), which only the score "entropy" reads, is the layer's latest
    map in nats, resized to the grid of scale `s`. Raises PlanError when it is missing.
    """
    grid = plan.schedule.grids[s]
    if plan.score != "entropy":
        cost = -_scores(plan, s, layer, x, grid)
        return select_tokens(
            cost, keep, selection="topk", direction="low_entropy", grid=grid, region_share=plan.region_share
        )
    if entropy is None:
        raise PlanError(
            f"layer {layer} is pruned at scale {s} and has no entropy", where="kept_tokens", expected="a map"
        )
    return kept_by_entropy(plan, s, [layer], keep, entropy[None])[0]


def kept_by_entropy(plan: Plan, s: int, layers: Sequence[int], keep: int, entropy: Tensor) -> Tensor:
    """`kept_tokens` of several layers at once, int64 (L, B, keep), from the maps (L, B, N) of these `layers`."""

    def select(maps: Tensor, generator: torch.Generator | None = None, odds: Tensor | None = None) -> Tensor:
        return select_tokens(
            maps,
            keep,
            selection=plan.selection,
            direction=plan.direction,
            generator=generator,
            keep_prob=odds,
            grid=plan.schedule.grids[s],
            region_share=plan.region_share,
        )

    if plan.selection == "topk":  # the rows of all layers are sorted together
        return select(entropy.flatten(0, 1)).view(*entropy.shape[:2], keep)
    drawn = []
    for layer, maps in zip(layers, entropy, strict=True):
        odds = keep_probability(
            maps,
            phi=(s + 1) / len(plan.schedule),
            layer_score=plan.layer_scores[layer] if plan.layer_scores else 1.0,
            alpha_min=plan.alpha_min,
            alpha_max=plan.alpha_max,
            normalisation=plan.normalisation,
        )
        drawn.append(select(maps, selection_generator(plan.seed, s, layer, maps.device), odds))
    return torch.stack(drawn)


def mean_distance(x: Tensor) -> Tensor:
    """Distance of each token to the mean token of its map: x (B, N, C) -> float32 (B, N).

    FastVAR ranks tokens by its square, which ranks them alike; the mean stands for the low frequencies of the map.
    """
    distance: Tensor = torch.linalg.vector_norm(x - x.mean(1, keepdim=True), dim=-1, dtype=torch.float32)
    return distance


def local_detail(x: Tensor, grid: Grid) -> Tensor:
    """Distance of each token to the mean of the up to 3 x 3 tokens around it: x (B, N, C), float32 (B, N)."""
    maps = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    blurred = F.avg_pool2d(maps, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
    distance: Tensor = torch.linalg.vector_norm(maps - blurred, dim=1, dtype=torch.float32)
    return distance.flatten(1)


def random_order(rows: int, n: int, seed: int, s: int, layer: int, device: torch.device | str) -> Tensor:
    """Random scores, float32 (rows, n), fixed by (seed, s, layer) and equal on every device.

    Made by hashing positions on the device, so that nothing is copied to it and a CUDA graph can hold it.
    """
    digest = hashlib.blake2b(f"{seed},{s},{layer}".encode(), digest_size=4).digest()
    value = torch.arange(rows * n, device=device) + int.from_bytes(digest, "little")
    for _ in range(3):
        value = (((value & 0xFFFFFFFF) ^ ((value & 0xFFFFFFFF) >> 16)) * _MIX) & 0xFFFFFFFF
    return (value ^ (value >> 16)).view(rows, n).float()


def _scores(plan: Plan, s: int, layer: int, x: Tensor, grid: Grid) -> Tensor:
    """The plan's score of each token, large for tokens to keep."""
    if plan.score == "mean_distance":
        return mean_distance(x)
    if plan.score == "frequency":
        return local_detail(x, grid)
    return random_order(x.shape[0], x.shape[1], plan.seed, s, layer, x.device)
