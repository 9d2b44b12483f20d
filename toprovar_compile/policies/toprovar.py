"""The ToProVAR policy: scale depth, layer classes and token tendency from attention entropy (arXiv 2602.22948)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.kernels import top_singular_values
from toprovar_compile.plan import Direction, Normalisation, Plan, Restore, Score, Selection
from toprovar_compile.policies import make_plan
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.tokens import keep_probability

Crossing = Literal["rising", "falling"]
LayerClass = Literal["global", "ambiguous", "detail"]

MAX_RATIO = 1e6
"""Ratio given to a map whose second singular value is (nearly) zero, or that has only one."""

_REPRESENTATIVE = 6  # the paper's choice, for models of 10 to 13 scales
_TILE = 16  # kept counts are multiples of this, so that matrix tiles are full


@dataclass(frozen=True)
class Thresholds:
    """Settings that turn statistics into a plan.

    `tau`, `crossing`: see `scale_depth`; a `depth` starts pruning at that scale whatever they say. `beta`: see
    `layer_scores`; None fits it so that a layer of the model's median ratio scores 0.5. `representative_scale`: where
    the ratios are taken; None is 6, or the last scale of a shorter schedule. Layers of score at most `global_below` and
    between the two bounds run dense, those of at least `detail_above` are pruned.
    `alpha_min`, `alpha_max`, `normalisation`: see `tokens.keep_probability`. The kept share is rounded up to one of
    `buckets`, and is at least `min_share`, in every region of the map. `exit_scale`: leave before this scale.
    `restore`, `selection`, `direction`, `seed`: as in `Plan`. Raises OptionError for a value out of range.
    """

    tau: float = 0.4
    crossing: Crossing = "rising"
    depth: int | None = None
    beta: float | None = None
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    normalisation: Normalisation = "mean_one"
    representative_scale: int | None = None
    global_below: float = 0.3
    detail_above: float = 0.4
    buckets: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    min_share: float = 0.1
    exit_scale: int | None = None
    restore: Restore = "cached"
    selection: Selection = "topk"
    direction: Direction = "low_entropy"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "alpha_min", "alpha_max", "global_below", "detail_above", "min_share"):
            _check(name, getattr(self, name), lambda v: _number(v) and 0 <= v <= 1, "a number in 0..1")
        _check("beta", self.beta, lambda v: v is None or (_number(v) and 0 < v < math.inf), "a finite number above 0")
        if self.global_below > self.detail_above:
            raise OptionError(
                f"global_below {self.global_below} is above detail_above {self.detail_above}",
                where="Thresholds.global_below",
                expected="global_below <= detail_above",
            )
        for name, kind in _CHOICES.items():
            valid = get_args(kind)
            _check(name, getattr(self, name), valid.__contains__, "one of " + ", ".join(valid))
        for name in _SCALES:
            _check(
                name, getattr(self, name), lambda v: v is None or (_integer(v) and v >= 1), "None or an integer >= 1"
            )
        _check("seed", self.seed, _integer, "an integer")
        is_list = isinstance(self.buckets, list | tuple)
        object.__setattr__(self, "buckets", tuple(self.buckets) if is_list else ())
        ascending = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        shares = all(_number(b) and 0 < b <= 1 for b in self.buckets)
        _check("buckets", self.buckets, lambda v: v and shares and ascending, "ascending shares in 0..1, at least one")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Thresholds:
        """Thresholds from a mapping; what is left out keeps its default. Raises OptionError for unknown keys."""
        valid = [f.name for f in fields(cls)]
        for key in values:
            if key not in valid:
                close = nearest(str(key), valid)
                raise OptionError(
                    f"unknown threshold {key!r}",
                    where="thresholds",
                    expected="one of " + ", ".join(valid),
                    todo=f"did you mean {close!r}?" if close else "remove it",
                )
        return cls(**values)


_SCALES = ("depth", "representative_scale", "exit_scale")
_CHOICES: dict[str, Any] = {
    "crossing": Crossing,
    "normalisation": Normalisation,
    "restore": Restore,
    "selection": Selection,
    "direction": Direction,
}


def scale_depth(rho: Sequence[float | None], tau: float, crossing: Crossing) -> int | None:
    """The scale D at which pruning starts, None when no scale crosses `tau`.

    "rising": the first scale with rho >= tau. "falling": the first with rho <= tau from which on rho never increases.
    Scales whose rho is None are passed over.
    """
    known = [(s, value) for s, value in enumerate(rho) if value is not None]
    for i, (s, value) in enumerate(known):
        if crossing == "rising" and value >= tau:
            return s
        rest = [v for _, v in known[i:]]
        if crossing == "falling" and value <= tau and rest == sorted(rest, reverse=True):
            return s
    return None


def low_entropy_share(entropy: Tensor) -> Tensor:
    """rho of each map: the share (0..1) of its tokens below the map's mean; entropy (..., N) -> (...)."""
    below: Tensor = entropy < entropy.mean(-1, keepdim=True)
    return below.float().mean(-1)


def layer_ratios(maps: Tensor) -> Tensor:
    """First by second singular value of each map: (..., h, w) -> (...), within 1..MAX_RATIO."""
    values = top_singular_values(maps.reshape(-1, *maps.shape[-2:]).float()).view(*maps.shape[:-2], 2)
    first, second = values[..., 0], values[..., 1]
    ratios: Tensor = first / second.clamp_min(torch.finfo(first.dtype).tiny)
    ratios = ratios.where(second > 0, MAX_RATIO).clamp(1, MAX_RATIO)
    return ratios


def layer_scores(ratios: Tensor, beta: float) -> Tensor:
    """R = exp(-beta * (ratio - 1)) of each layer: near 0 for Global ones, near 1 for Detail ones."""
    return torch.exp((ratios - 1) * -beta)


@dataclass(frozen=True)
class ToProVarPolicy:
    """The policy of one model under given thresholds."""

    stats: Statistics
    thresholds: Thresholds

    def __post_init__(self) -> None:
        last = len(self.stats.schedule) - 1
        for name in _SCALES:
            scale = getattr(self.thresholds, name)
            _check(name, scale, lambda v: v is None or v <= last, f"a scale of the model, 1..{last}")

    @cached_property
    def depth(self) -> int | None:
        """The first scale that is pruned. The crossing passes over scales that are too small to prune, and scale 0."""
        if self.thresholds.depth is not None:
            return self.thresholds.depth
        tokens = self.stats.schedule.tokens
        rho = [r if s and n > _TILE else None for s, (r, n) in enumerate(zip(self.stats.rho, tokens, strict=True))]
        return scale_depth(rho, self.thresholds.tau, self.thresholds.crossing)

    @cached_property
    def representative_scale(self) -> int:
        """The scale at which layers are classified."""
        if self.thresholds.representative_scale is not None:
            return self.thresholds.representative_scale
        return min(_REPRESENTATIVE, len(self.stats.schedule) - 1)

    @cached_property
    def beta(self) -> float:
        """The thresholds' beta, or the one that gives the median layer the score 0.5."""
        if self.thresholds.beta is not None:
            return self.thresholds.beta
        median = statistics.median(self.stats.ratio[self.representative_scale])
        return math.log(2) / max(median - 1, 1e-6)

    @cached_property
    def scores(self) -> tuple[float, ...]:
        """R of every layer."""
        ratios = torch.tensor(self.stats.ratio[self.representative_scale], dtype=torch.float64)
        return tuple(round(r, 6) for r in layer_scores(ratios, self.beta).tolist())

    def layer_class(self, layer: int) -> LayerClass:
        """Whether the layer is Global, Detail (the only one that is pruned) or ambiguous."""
        score = self.scores[layer]
        if score <= self.thresholds.global_below:
            return "global"
        return "detail" if score >= self.thresholds.detail_above else "ambiguous"

    def score(self, s: int, layer: int, entropy: Tensor) -> Tensor:
        """Keep-probability of every token, as `tokens.keep_probability`."""
        t = self.thresholds
        phi = (s + 1) / len(self.stats.schedule)
        return keep_probability(
            entropy,
            phi=phi,
            layer_score=self.scores[layer],
            alpha_min=t.alpha_min,
            alpha_max=t.alpha_max,
            normalisation=t.normalisation,
        )

    def keep_count(self, s: int, layer: int) -> int:
        """Sum of the keep-probabilities over the map, rounded up to a bucket."""
        n = self.stats.schedule.tokens[s]
        if self.depth is None or s < self.depth or self.layer_class(layer) != "detail":
            return n
        share = self.keep_share(s, layer)
        # The small term undoes float noise: a share of 0.3 of 160 tokens is three tiles, not four.
        bucket = next((b for b in self.thresholds.buckets if b >= share - 1e-9), 1.0)
        return min(math.ceil(bucket * n / _TILE - 1e-9) * _TILE, n)

    def keep_share(self, s: int, layer: int) -> float:
        """Mean keep-probability (0..1) over the map that calibration measured, at least `min_share`."""
        n, t = self.stats.schedule.tokens[s], self.thresholds
        weight = (s + 1) / len(self.stats.schedule) * self.scores[layer] / (1 if t.normalisation == "mean_one" else n)
        points = self.stats.spread[s][layer]
        pruned = (min(max(t.alpha_min + (t.alpha_max - t.alpha_min) * weight * h, 0.0), 1.0) for h in points)
        return max(1 - sum(pruned) / len(points), t.min_share)

    def restore(self) -> Restore:
        """As the thresholds say."""
        return self.thresholds.restore

    def exits(self, s: int) -> bool:
        """Whether `s` is the scale that the thresholds name."""
        return s == self.thresholds.exit_scale

    def scores_by(self) -> Score:
        """Attention entropy."""
        return "entropy"

    def guided(self, s: int) -> bool:
        """Always: the method leaves guidance alone."""
        return True


def plan_from_statistics(stats: Statistics | Mapping[str, Any], thresholds: Thresholds | None = None) -> Plan:
    """The plan that the thresholds (default: `Thresholds()`) make of a calibration's statistics.

    `stats` may be what a plan holds as provenance["statistics"]. Where no scale crosses tau the plan is dense.
    The plan's provenance holds the decisions, the thresholds and the statistics.
    Raises PlanError for statistics that are damaged, OptionError for thresholds outside the model.
    """
    stats = stats if isinstance(stats, Statistics) else Statistics.from_json(stats)
    thresholds = thresholds or Thresholds()
    policy = ToProVarPolicy(stats, thresholds)
    return make_plan(
        policy,
        stats.schedule,
        stats.num_layers,
        model=stats.model,
        selection=thresholds.selection,
        seed=thresholds.seed,
        direction=thresholds.direction,
        alpha_min=thresholds.alpha_min,
        alpha_max=thresholds.alpha_max,
        normalisation=thresholds.normalisation,
        layer_scores=policy.scores,
        region_share=thresholds.min_share,
        provenance={
            "made_by": "toprovar",
            "thresholds": {**asdict(thresholds), "buckets": list(thresholds.buckets)},
            "depth": policy.depth,
            "representative_scale": policy.representative_scale,
            "beta": policy.beta,
            "layer_classes": [policy.layer_class(i) for i in range(stats.num_layers)],
            "statistics": stats.to_json(),
        },
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, valid: Callable[[Any], object], expected: str) -> None:
    if not valid(value):
        raise OptionError(f"{name} is {value!r}", where=f"Thresholds.{name}", expected=expected)
