"""Calibration: what it measures, that it repeats, and that its plan belongs to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds, layer_ratios, low_entropy_share, plan_from_statistics
from toprovar_compile.reference import pruned

# Makes the small random model prune: its maps are nearly of one component, so ratios are high.
LOOSE = Thresholds(beta=1e-4, detail_above=0.9, buckets=(0.25, 0.5), alpha_max=0.6)


def test_statistics_are_means_over_all_rows(tiny_var: VAR) -> None:
    plan = calibrate(tiny_var, prompts=3, seed=5, batch=2)
    stats = Statistics.from_json(plan.provenance["statistics"])
    labels = torch.randint(10, (3,), generator=torch.Generator().manual_seed(5))
    maps = []
    with pruned(tiny_var, Plan.dense(tiny_var.schedule, 3), measure_all=True) as trace:
        for start, part in ((0, labels[:2]), (2, labels[2:])):
            tiny_var(part, seed=5 + start)
            maps.append(dict(trace.entropy))
    for s in range(1, 5):
        by_layer = [torch.cat([m[s, layer] for m in maps]) for layer in range(3)]
        rho = torch.stack([low_entropy_share(m).mean() for m in by_layer]).mean()
        assert stats.rho[s] == pytest.approx(rho.item(), rel=1e-4)
        for layer, entropy in enumerate(by_layer):
            ratio = layer_ratios(entropy.view(-1, *tiny_var.schedule.grids[s])).log().mean().exp()
            assert entropy.shape[0] == 6
            assert stats.entropy[s][layer] == pytest.approx(entropy.mean().item(), rel=1e-4)
            assert stats.ratio[s][layer] == pytest.approx(ratio.item(), rel=1e-3)
            assert list(stats.spread[s][layer]) == sorted(stats.spread[s][layer])
            assert sum(stats.spread[s][layer]) / 16 == pytest.approx(1, abs=0.05)
    assert stats.rho[0] is None and stats.prompts == 3 and stats.seed == 5


def test_calibration_repeats_for_a_seed(tiny_var: VAR) -> None:
    plans = [calibrate(tiny_var, prompts=3, seed=seed, thresholds=LOOSE) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] and plans[0].provenance == plans[1].provenance
    assert plans[0].provenance["statistics"] != plans[2].provenance["statistics"]


def test_plan_runs_and_belongs_to_the_model(tiny_var: VAR, make_var: Callable[..., VAR], tmp_path: Any) -> None:
    calibrate(tiny_var, prompts=2, thresholds=LOOSE).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert not plan.is_dense
    with pruned(tiny_var, plan):
        assert tiny_var(torch.tensor([1]), seed=0).isfinite().all()
    with pytest.raises(PlanError, match="made for model"), pruned(make_var(shared_aln=False), plan):
        pass
    assert plan_from_statistics(plan.provenance["statistics"], LOOSE) == plan


def test_progress_counts_images(tiny_var: VAR) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(tiny_var, prompts=5, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_sampling_reaches_the_model(tiny_var: VAR) -> None:
    plans = [calibrate(tiny_var, prompts=2, sampling=sampling) for sampling in (None, {"top_k": 1})]
    assert plans[0].provenance["statistics"] != plans[1].provenance["statistics"]


@pytest.mark.parametrize("name", ["prompts", "batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_are_validated(tiny_var: VAR, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        calibrate(tiny_var, **{name: value})


def test_training_mode_is_refused(make_var: Callable[..., VAR]) -> None:
    with pytest.raises(OptionError, match=r"model\.eval"):
        calibrate(make_var().train(), prompts=1)
