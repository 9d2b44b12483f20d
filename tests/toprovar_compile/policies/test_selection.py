"""Scores that are not entropy: their definitions, and that plans with them measure none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from toprovar_compile.errors import PlanError
from toprovar_compile.plan import Plan
from toprovar_compile.policies.selection import kept_by_entropy, kept_tokens, local_detail, mean_distance, random_order
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 4, 6))


def _plan(score: str, **fields: object) -> Plan:
    return Plan.keep_share(SCHEDULE, 2, 0.5, 2, bucket=1, score=score, **fields)  # type: ignore[arg-type]


def test_mean_distance_keeps_what_a_plain_ranking_keeps() -> None:
    x = torch.randn(3, 36, 8, generator=torch.Generator().manual_seed(0))
    squares = ((x - x.mean(1, keepdim=True)) ** 2).sum(-1)
    wanted = squares.argsort(dim=1, descending=True)[:, :18].sort(dim=1).values
    assert torch.equal(kept_tokens(_plan("mean_distance"), 2, 0, 18, x, None), wanted)
    torch.testing.assert_close(mean_distance(x) ** 2, squares)


def test_local_detail_is_the_distance_to_a_blurred_map() -> None:
    x = torch.randn(2, 36, 8, generator=torch.Generator().manual_seed(1))
    got = local_detail(x, (6, 6))
    maps = x.view(2, 6, 6, 8)
    window = maps[1, 0:2, 3:6].reshape(-1, 8).mean(0)  # token (0, 4) of the upper edge
    assert got[1, 4].item() == pytest.approx((maps[1, 0, 4] - window).norm().item(), rel=1e-5)
    flat = F.one_hot(torch.zeros(1, 36, dtype=torch.int64), 8).float()
    assert local_detail(flat, (6, 6)).abs().max() < 1e-6


def test_random_order_is_fixed_and_even() -> None:
    first, again = (random_order(2, 2000, 3, 1, 5, "cpu") for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])
    others = [random_order(2, 2000, *key, "cpu") for key in ((4, 1, 5), (3, 2, 5), (3, 1, 6))]
    for other in others:
        common = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]
        assert abs(common) < 0.08
    share = (first / 2**32).flatten()
    assert share.mean().item() == pytest.approx(0.5, abs=0.03) and share.std().item() == pytest.approx(0.289, abs=0.02)


def test_only_entropy_is_measured() -> None:
    for score in ("mean_distance", "frequency", "random"):
        plan = _plan(score)
        assert plan.reads_entropy() == frozenset() and plan.keeps_delta() == {(1, 0), (1, 1)}
        assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="no entropy"):
        kept_tokens(_plan("entropy"), 2, 0, 18, torch.zeros(1, 36, 8), None)


def test_region_share_holds_for_every_score() -> None:
    plan = Plan.from_json(_plan("mean_distance").to_json() | {"region_share": 0.5})
    x = torch.zeros(1, 36, 8)
    x[:, :18] = torch.randn(1, 18, 8, generator=torch.Generator().manual_seed(0)) * 10
    assert (kept_tokens(plan, 2, 0, 18, x, None) >= 18).any()


def test_gumbel_and_direction_belong_to_entropy() -> None:
    for fields in ({"selection": "gumbel"}, {"direction": "high_entropy"}):
        with pytest.raises(PlanError, match="keep-probability and a direction"):
            _plan("random", **fields)


def test_pruning_without_entropy_and_delta_needs_no_dense_scale() -> None:
    Plan.keep_share(SCHEDULE, 2, 0.5, 1, bucket=1, score="random").validate_first()
    early = {"bucket": 1, "score": "random", "restore": "identity"}
    rows = (Plan.keep_share(SCHEDULE, 2, {1: 0.5, 2: 0.5}, 1, **early)).scales  # type: ignore[arg-type]
    Plan(SCHEDULE, 2, rows, restore="identity", score="random").validate_first()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"direction": "high_entropy"},
        {"region_share": 0.4},
        {"selection": "gumbel", "seed": 3, "layer_scores": [0.3, 0.9, 0.5], "region_share": 0.4},
    ],
    ids=str,
)
def test_layers_together_keep_what_each_keeps_alone(fields: dict[str, object]) -> None:
    plan = Plan.from_json(Plan.keep_share(SCHEDULE, 3, 0.5, 2, bucket=1).to_json() | fields)
    maps = torch.randint(9, (3, 2, 36), generator=torch.Generator().manual_seed(0)).float()  # full of equal values
    maps[1, 0, 5] = torch.nan
    together = kept_by_entropy(plan, 2, range(3), 18, maps)
    assert together.shape == (3, 2, 18)
    alone = [kept_tokens(plan, 2, i, 18, torch.zeros(2, 36, 8), maps[i]) for i in range(3)]
    assert torch.equal(together, torch.stack(alone))
