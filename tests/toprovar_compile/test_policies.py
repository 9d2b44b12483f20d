"""Token selection, the ToProVAR rules, and plans made from statistics."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.plan import DENSE, Plan
from toprovar_compile.policies import make_plan
from toprovar_compile.policies.statistics import SPREAD_POINTS, Statistics
from toprovar_compile.policies.tokens import keep_probability, resize_tokens, select_tokens, selection_generator
from toprovar_compile.policies.toprovar import (
    MAX_RATIO,
    Thresholds,
    ToProVarPolicy,
    layer_ratios,
    layer_scores,
    low_entropy_share,
    plan_from_statistics,
    scale_depth,
)
from toprovar_compile.schedule import ScaleSchedule

TOPK: dict[str, Any] = {"selection": "topk", "direction": "low_entropy"}
GRIDS = [(1, 1), (3, 5), (4, 4), (9, 7), (13, 2)]
SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 4, 8, 16))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def _stats(**changes: Any) -> Statistics:
    """Three layers: ratio 1.5, 5 and 60; entropies spread evenly over 0.5..1.5 of their mean."""
    points = tuple(0.5 + (i + 0.5) / SPREAD_POINTS for i in range(SPREAD_POINTS))
    stats = Statistics(
        model="abc",
        schedule=SCHEDULE,
        num_layers=3,
        prompts=2,
        seed=0,
        rho=(None, 0.3, 0.35, 0.45, 0.5),
        entropy=((1.0, 2.0, 3.0),) * 5,
        ratio=((1.5, 5.0, 60.0),) * 5,
        spread=((points,) * 3,) * 5,
    )
    return dataclasses.replace(stats, **changes)


def _fixed(**changes: Any) -> Thresholds:
    """Thresholds that do not move with the defaults."""
    return Thresholds(
        **{
            "beta": 0.1,
            "global_below": 0.35,
            "detail_above": 0.65,
            "alpha_min": 0.0,
            "alpha_max": 1.0,
            "buckets": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
            "min_share": 0.1,
            **changes,
        }
    )


# resize_tokens


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations([(1, 1), (3, 5), (4, 4), (9, 7), (13, 2)], 2))
)
def test_resize_is_area_interpolation(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.randn(2, source[0] * source[1], 6)
    wanted = F.interpolate(x.transpose(1, 2).reshape(2, 6, *source), size=target, mode="area")
    torch.testing.assert_close(resize_tokens(x, source, target), wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(resize_tokens(x[:, :, 0], source, target), wanted[:, 0].flatten(1))


def test_resize_to_the_same_grid_returns_its_argument() -> None:
    x = torch.randn(2, 12, 4)
    assert resize_tokens(x, (3, 4), (3, 4)) is x


def test_resize_keeps_dtype_and_layout() -> None:
    y = resize_tokens(torch.randn(2, 9, 4, dtype=torch.float16), (3, 3), (5, 5))
    assert y.dtype == torch.float16 and y.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 8), (2, 9, 4, 1), (9,)])
def test_resize_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="resize_tokens"):
        resize_tokens(torch.zeros(shape), (3, 3), (2, 2))


# keep_probability


def _prob(entropy: Tensor, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"phi": 1.0, "layer_score": 1.0, "alpha_min": 0.0, "alpha_max": 1.0}
    return keep_probability(entropy, **(settings | changes))


def test_keep_probability_by_hand() -> None:
    entropy = torch.tensor([[1.0, 2.0, 3.0, 2.0]])
    torch.testing.assert_close(
        _prob(entropy, phi=0.5, layer_score=0.8, alpha_min=0.1, alpha_max=0.6),
        1 - (0.1 + 0.5 * 0.4 * entropy / 2),
    )


def test_keep_probability_is_clipped_and_falls_with_entropy() -> None:
    p = _prob(torch.tensor([[0.0, 1.0, 1.0, 8.0]]))
    assert p[0, 0] == 1 and p[0, 3] == 0
    assert (p[0, :-1] >= p[0, 1:]).all()


def test_literal_normalisation_is_nearly_constant() -> None:
    p = _prob(torch.rand(3, 1024) + 0.5, alpha_min=0.3, normalisation="literal")
    torch.testing.assert_close(p, torch.full_like(p, 0.7), atol=0.01, rtol=0)


@pytest.mark.parametrize("entropy", [torch.zeros(2, 1), torch.zeros(2, 9), torch.rand(2, 9).half()])
def test_keep_probability_has_no_nan(entropy: Tensor) -> None:
    p = _prob(entropy)
    assert p.dtype == torch.float32
    assert ((p >= 0) & (p <= 1)).all()


# select_tokens


def test_topk_keeps_lowest_or_highest_in_ascending_order() -> None:
    entropy = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert select_tokens(entropy, 2, **TOPK).tolist() == [[1, 3], [0, 1]]
    assert select_tokens(entropy, 2, selection="topk", direction="high_entropy").tolist() == [[0, 2], [2, 3]]


@pytest.mark.parametrize("keep", [1, 35, 36])
@pytest.mark.parametrize("selection", ["topk", "gumbel"])
@pytest.mark.parametrize("direction", ["low_entropy", "high_entropy"])
def test_selection_is_a_set_of_tokens(keep: int, selection: Any, direction: Any) -> None:
    entropy = torch.rand(3, 36)
    idx = select_tokens(
        entropy,
        keep,
        selection=selection,
        direction=direction,
        generator=selection_generator(0, 4, 2, "cpu"),
        keep_prob=_prob(entropy),
    )
    assert idx.shape == (3, keep) and idx.dtype == torch.int64
    assert (idx[:, 1:] > idx[:, :-1]).all()
    assert idx.min() >= 0 and idx.max() < 36


def test_ties_go_to_the_first_tokens() -> None:
    assert select_tokens(torch.ones(2, 2000), 5, **TOPK).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_nan_is_kept_last() -> None:
    entropy = torch.tensor([[math.nan, 1.0, 2.0, math.nan]])
    for direction in ("low_entropy", "high_entropy"):
        assert select_tokens(entropy, 2, selection="topk", direction=direction).tolist() == [[1, 2]]  # type: ignore[arg-type]


def test_topk_does_not_depend_on_the_batch() -> None:
    entropy = torch.rand(4, 100)
    order = torch.tensor([2, 0, 3, 1])
    together = select_tokens(entropy, 30, **TOPK)
    assert torch.equal(select_tokens(entropy[order], 30, **TOPK), together[order])
    assert torch.equal(select_tokens(entropy[1:2], 30, **TOPK), together[1:2])


def test_gumbel_repeats_for_a_seed_and_differs_between_layers() -> None:
    entropy = torch.rand(2, 400)

    def draw(seed: int, s: int, layer: int) -> Tensor:
        generator = selection_generator(seed, s, layer, "cpu")
        return select_tokens(
            entropy,
            100,
            selection="gumbel",
            direction="low_entropy",
            generator=generator,
            keep_prob=_prob(entropy),
        )

    first = draw(0, 3, 1)
    assert torch.equal(first, draw(0, 3, 1))
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2), (0, 1, 3)):
        assert not torch.equal(first, draw(*other))


@pytest.mark.parametrize(("direction", "favoured"), [("low_entropy", 0), ("high_entropy", 1)])
def test_gumbel_frequencies_follow_the_probabilities(direction: Any, favoured: int) -> None:
    entropy = torch.zeros(20_000, 2)
    odds = torch.tensor([0.75, 0.25]).expand(20_000, 2)
    idx = select_tokens(
        entropy,
        1,
        selection="gumbel",
        direction=direction,
        generator=selection_generator(0, 0, 0, "cpu"),
        keep_prob=odds,
    )
    # Five standard deviations of a share of 20,000 draws.
    assert abs((idx == favoured).float().mean().item() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 20_000)


def test_gumbel_takes_impossible_tokens_only_when_it_must() -> None:
    odds = torch.zeros(50, 10)
    odds[:, ::2] = 0.3
    settings: dict[str, Any] = {"selection": "gumbel", "direction": "low_entropy", "keep_prob": odds}
    assert (select_tokens(odds, 5, **settings) % 2 == 0).all()
    assert select_tokens(odds, 10, **settings).tolist() == [list(range(10))] * 50


def test_every_region_keeps_its_share() -> None:
    entropy = torch.arange(16.0 * 16).expand(2, -1)
    assert select_tokens(entropy, 64, **TOPK).max() == 63
    idx = select_tokens(entropy, 64, **TOPK, grid=(16, 16), region_share=0.125)
    counts = torch.zeros(16, 16)
    counts.view(-1)[idx[0]] = 1
    by_region = counts.view(4, 4, 4, 4).sum((1, 3))
    assert (by_region >= 2).all() and by_region.sum() == 64
    assert (by_region[0] > 2).all(), "the free places go to the best tokens"


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7)])
def test_regions_of_small_and_odd_grids(grid: tuple[int, int]) -> None:
    entropy = torch.rand(2, grid[0] * grid[1])
    idx = select_tokens(entropy, 1, **TOPK, grid=grid, region_share=0.9)
    assert idx.shape == (2, 1)


@pytest.mark.parametrize("keep", [0, -1, 10])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(OptionError, match="keep"):
        select_tokens(torch.rand(1, 9), keep, **TOPK)


def test_gumbel_needs_probabilities() -> None:
    with pytest.raises(OptionError, match="keep_prob"):
        select_tokens(torch.rand(1, 9), 3, selection="gumbel", direction="low_entropy")


def test_functions_trace_without_breaks() -> None:
    def scored(entropy: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        entropy = resize_tokens(entropy, (6, 6), (9, 9))
        idx = select_tokens(entropy, 20, **TOPK, grid=(9, 9), region_share=0.1)
        return _prob(entropy).gather(1, idx), resize_tokens(delta, (6, 6), (9, 9))

    args = (torch.rand(2, 36), torch.randn(2, 36, 4))
    compiled = torch.compile(scored, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(*args), scored(*args), strict=True):
        torch.testing.assert_close(got, wanted)


# the rules


@pytest.mark.parametrize(
    ("rho", "crossing", "depth"),
    [
        ((None, 0.3, 0.5, 0.6), "rising", 2),
        ((None, 0.4, 0.5, 0.6), "rising", 1),
        ((None, 0.3, 0.3, 0.3), "rising", None),
        ((None, 0.6, 0.4, 0.3), "falling", 2),
        ((None, 0.3, 0.6, 0.2), "falling", 3),
        ((None, 0.6, 0.5, 0.5), "falling", None),
        ((0.0, 0.3, 0.2, 0.2), "falling", 1),
        ((), "rising", None),
    ],
)
def test_scale_depth(rho: tuple[float | None, ...], crossing: Any, depth: int | None) -> None:
    assert scale_depth(rho, 0.4, crossing) == depth


def test_low_entropy_share() -> None:
    maps = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 8.0], [2.0, 2.0, 2.0, 2.0]])
    assert low_entropy_share(maps).tolist() == [0.25, 0.75, 0.0]


def test_layer_ratios_by_hand() -> None:
    maps = torch.stack([torch.diag(torch.tensor([6.0, 2.0, 1.0])), torch.ones(3, 3), torch.zeros(3, 3)])
    torch.testing.assert_close(layer_ratios(maps)[0], torch.tensor(3.0))
    assert layer_ratios(maps)[1] > 1e5
    assert layer_ratios(maps)[2] == MAX_RATIO


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 7), (2, 4, 1)])
def test_maps_with_one_singular_value_are_global(shape: tuple[int, ...]) -> None:
    ratios = layer_ratios(torch.rand(shape))
    assert ratios.tolist() == [MAX_RATIO] * 2
    assert layer_scores(ratios, 0.1).tolist() == [0.0] * 2


def test_layer_scores() -> None:
    scores = layer_scores(torch.tensor([1.0, 2.0, 11.0, MAX_RATIO]), 0.1)
    torch.testing.assert_close(scores, torch.tensor([1.0, math.exp(-0.1), math.exp(-1), 0.0]))


# plans


def test_plan_from_statistics() -> None:
    plan = plan_from_statistics(_stats(), _fixed())
    assert plan.provenance["depth"] == 3
    assert plan.provenance["representative_scale"] == 4
    assert plan.provenance["layer_classes"] == ["detail", "detail", "global"]
    # phi = 1 at the last scale. Layer 0, R = exp(-0.05): the mean of max(0, 1 - R h) is 0.145, the next bucket 0.25.
    # Layer 1, R = exp(-0.4): the mean is 0.33, the next bucket 0.375.
    assert [str(a) for a in plan.scales[4].layers] == ["prune 64", "prune 96", "dense"]
    assert all(a == DENSE for s in range(3) for a in plan.scales[s].layers)
    assert plan.model == "abc"
    assert plan.layer_scores == pytest.approx([math.exp(-0.05), math.exp(-0.4), math.exp(-5.9)], abs=1e-6)


def test_plan_is_rebuilt_from_a_file(tmp_path: Any) -> None:
    plan = plan_from_statistics(_stats(), _fixed())
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert plan_from_statistics(loaded.provenance["statistics"], _fixed()) == plan
    thresholds = Thresholds.from_mapping(loaded.provenance["thresholds"])
    assert plan_from_statistics(loaded.provenance["statistics"], thresholds) == plan
    other = plan_from_statistics(loaded.provenance["statistics"], _fixed(alpha_max=0.5, restore="identity"))
    assert other.restore == "identity"
    assert other.total_share() > plan.total_share()


def test_beta_is_fitted_to_the_median_layer() -> None:
    plan = plan_from_statistics(_stats(), _fixed(beta=None))
    assert plan.layer_scores[1] == pytest.approx(0.5)
    assert plan.provenance["beta"] == pytest.approx(math.log(2) / 4)
    flat = plan_from_statistics(_stats(ratio=((1.0,) * 3,) * 5), _fixed(beta=None))
    assert flat.layer_scores == (1.0,) * 3


def test_no_crossing_means_dense() -> None:
    assert plan_from_statistics(_stats(), _fixed(tau=0.9)).is_dense


def test_scales_too_small_to_prune_are_passed_over() -> None:
    plan = plan_from_statistics(_stats(rho=(0.5, 0.5, 0.5, 0.5, 0.3)), _fixed())
    assert plan.provenance["depth"] == 3  # the first with more than 16 tokens
    falling = plan_from_statistics(_stats(rho=(None, 0.1, 0.1, 0.5, 0.3)), _fixed(crossing="falling"))
    assert falling.provenance["depth"] == 4


def test_depth_can_be_given() -> None:
    assert plan_from_statistics(_stats(), _fixed(depth=4, tau=1.0)).provenance["depth"] == 4
    with pytest.raises(OptionError, match="depth"):
        plan_from_statistics(_stats(), _fixed(depth=5))


def test_scale_zero_is_never_pruned() -> None:
    stats = _stats(schedule=ScaleSchedule.from_patch_nums((8, 8, 8, 8, 16)), rho=(0.5,) * 5)
    plan = plan_from_statistics(stats, _fixed())
    assert plan.provenance["depth"] == 1


def test_ambiguous_layers_stay_dense() -> None:
    plan = plan_from_statistics(_stats(), _fixed(detail_above=0.9))
    assert plan.provenance["layer_classes"] == ["detail", "ambiguous", "global"]
    assert plan.scales[4].layers[1] == DENSE


def test_literal_normalisation_keeps_nearly_everything_or_what_alpha_min_says() -> None:
    assert plan_from_statistics(_stats(), _fixed(normalisation="literal")).is_dense
    plan = plan_from_statistics(_stats(), _fixed(normalisation="literal", alpha_min=0.5, buckets=(0.5, 0.75)))
    assert plan.scales[4].layers[:2] == plan.scales[4].layers[:1] * 2
    assert plan.token_share()[4] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_keep_count_is_at_least_the_minimum_share() -> None:
    thresholds = _fixed(alpha_min=1.0, min_share=0.3, buckets=(0.1, 0.2, 0.3, 0.5))
    plan = plan_from_statistics(_stats(), thresholds)
    assert plan.scales[4].layers[0].keep == 80  # 0.3 of 256 tokens, in whole tiles of 16
    assert plan.region_share == 0.3


def test_exit_scale() -> None:
    plan = plan_from_statistics(_stats(), _fixed(exit_scale=4))
    assert plan.exit_scale == 4
    with pytest.raises(OptionError, match="exit_scale"):
        plan_from_statistics(_stats(), _fixed(exit_scale=5))


def test_representative_scale_must_exist() -> None:
    with pytest.raises(OptionError, match="representative_scale"):
        plan_from_statistics(_stats(), _fixed(representative_scale=5))


def test_policy_scores_tokens_by_keep_probability() -> None:
    policy = ToProVarPolicy(_stats(), _fixed(alpha_max=0.7))
    entropy = torch.rand(2, 256)
    wanted = _prob(entropy, phi=1.0, layer_score=policy.scores[1], alpha_max=0.7)
    torch.testing.assert_close(policy.score(4, 1, entropy), wanted)


def test_make_plan_takes_any_policy() -> None:
    class SkipLast:
        def keep_count(self, s: int, layer: int) -> int:
            return (SCHEDULE.tokens[s], 5, 0)[layer] if s == 3 else SCHEDULE.tokens[s]

        def restore(self) -> Any:
            return "identity"

        def exits(self, s: int) -> bool:
            return s == 4

        def guided(self, s: int) -> bool:
            return s < 3

        def scores_by(self) -> Any:
            return "random"

    plan = make_plan(SkipLast(), SCHEDULE, 3, provenance={})
    assert [str(a) for a in plan.scales[3].layers] == ["dense", "prune 5", "skip"]
    assert plan.exit_scale == 4 and plan.restore == "identity" and plan.score == "random"
    assert [s.cfg for s in plan.scales] == [True, True, True, False, True]


# thresholds and statistics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", 1.5),
        ("tau", "0.4"),
        ("tau", math.nan),
        ("beta", 0.0),
        ("beta", math.inf),
        ("alpha_min", -0.1),
        ("alpha_max", True),
        ("crossing", "down"),
        ("crossing", ["rising"]),
        ("normalisation", "sum"),
        ("representative_scale", 0),
        ("exit_scale", 1.5),
        ("depth", 0),
        ("seed", "1"),
        ("buckets", ()),
        ("buckets", 0.5),
        ("buckets", (0.5, 0.25)),
        ("buckets", (0.0, 0.5)),
        ("buckets", ("a",)),
        ("global_below", 0.7),
        ("selection", "best"),
    ],
)
def test_thresholds_are_validated(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        Thresholds(**{name: value})


def test_unknown_threshold_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="alpha_max"):
        Thresholds.from_mapping({"alpha_maxx": 0.4})


def test_statistics_survive_json() -> None:
    stats = _stats()
    assert Statistics.from_json(json.loads(json.dumps(stats.to_json()))) == stats


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rho": [0.5]}, "statistics.rho"),
        ({"rho": [0.5, "x", 0.5, 0.5, 0.5]}, r"rho\[1\]"),
        ({"ratio": [[1.0, math.inf, 1.0]] * 5}, r"ratio\[0\]\[1\]"),
        ({"entropy": None}, "statistics.entropy"),
        ({"spread": [[[1.0] * 3] * 3] * 5}, "spread"),
        ({"num_layers": "3"}, "num_layers"),
        ({"prompts": True}, "prompts"),
        ({"schedule": [[2, 2], [1, 1]]}, "statistics.schedule"),
        ({"rhos": []}, "did you mean 'rho'"),
    ],
)
def test_damaged_statistics_name_the_field(change: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        plan_from_statistics(_stats().to_json() | change)


def test_missing_and_wrong_kind_of_statistics() -> None:
    data = _stats().to_json()
    del data["spread"]
    with pytest.raises(PlanError, match="'spread' is missing"):
        plan_from_statistics(data)
    with pytest.raises(PlanError, match="got list"):
        Statistics.from_json([])
