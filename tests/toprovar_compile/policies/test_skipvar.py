"""SkipVAR as a policy: features and strategies against plain statements, the logistic fit, training and choosing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.frequency import frequency_features
from toprovar_compile.policies.skipvar import (
    LogisticModel,
    fit_logistic,
    generated,
    labels_of,
    preview_scale,
    skipvar_plan,
    strategies,
    train_skipvar,
    try_strategies,
)
from toprovar_compile.reference import pruned
from toprovar_compile.schedule import ScaleSchedule

SIX = (1, 2, 3, 4, 5, 6)
LABELS = torch.tensor([2, 7, 9, 4])


@pytest.fixture(scope="module")
def model(make_var: Callable[..., VAR]) -> VAR:
    return make_var(depth=2, patch_nums=SIX)


def _always(outcome: int) -> LogisticModel:
    return LogisticModel((0.0, 0.0), (1.0, 1.0), ((0.0, 0.0),), (0.0,), (outcome,))


def test_the_published_places_of_infinity() -> None:
    schedule = ScaleSchedule.from_patch_nums((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    plan = skipvar_plan(schedule, 2, _always(0), _always(0))
    assert [d.after for d in plan.decisions] == [9, 9] and schedule.grids[plan.decisions[0].preview] == (8, 8)
    assert [p.exit_scale for p in plan.alternatives] == [12, 11, 10, None, None, None]
    assert [sum(not s.cfg for s in p.scales) for p in plan.alternatives] == [0, 0, 0, 1, 2, 3]
    with pytest.raises(OptionError, match="at least 6"):
        strategies(ScaleSchedule.from_patch_nums((1, 2, 3, 4, 5)), 2)


def test_plan_survives_its_file(tmp_path: Any) -> None:
    schedule = ScaleSchedule.from_patch_nums(SIX)
    plan = skipvar_plan(schedule, 2, _always(1), _always(0), fingerprint="abc", provenance={"target": 0.9})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.digest() != plan.alternatives[0].digest()


@pytest.mark.parametrize(("skip", "unguide", "exit_scale", "bare"), [
    (0, 0, None, 0), (2, 3, 4, 0), (3, 0, 3, 0), (0, 1, None, 1), (0, 3, None, 3),
])  # fmt: skip
def test_outcomes(model: VAR, skip: int, unguide: int, exit_scale: int | None, bare: int) -> None:
    plan = skipvar_plan(model.schedule, 2, _always(skip), _always(unguide), fingerprint=model.fingerprint())
    images, trace = generated(model, plan, LABELS, 3)
    assert trace.plan is not None and trace.plan.exit_scale == exit_scale
    assert sum(not s.cfg for s in trace.plan.scales) == bare
    fixed, _ = generated(model, trace.plan, LABELS, 3)
    assert torch.equal(images, fixed)


def test_the_unconditional_branch_is_replaced(model: VAR) -> None:
    """Conditional logits in both places of the guidance formula, computed with the whole batch."""
    plan = strategies(model.schedule, 2)[4]
    images, trace = generated(model, plan, LABELS, 3, {"cfg": 2.0})
    assert trace.kv_length[5, 1] == 91
    advance = model._advance

    def replaced(s: int, logits: Tensor, *rest: Any, **how: Any) -> Any:
        half = logits[: len(LABELS)]
        return advance(s, torch.cat((half, half)) if s >= 4 else logits, *rest, **how)

    model._advance = replaced  # type: ignore[method-assign]
    try:
        wanted = model(LABELS, seed=3, cfg=2.0)
    finally:
        del model._advance
    torch.testing.assert_close(images, wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(images, model(LABELS, seed=3, cfg=2.0), atol=1e-2)


def test_features_of_the_generation(model: VAR) -> None:
    maps: list[Tensor] = []
    advance = model._advance

    def record(s: int, *rest: Any, **how: Any) -> Any:
        out = advance(s, *rest, **how)
        maps.append(out[0])
        return out

    plan = skipvar_plan(model.schedule, 2, _always(0), _always(0))
    model._advance = record  # type: ignore[method-assign]
    try:
        with pruned(model, plan) as trace:
            model(LABELS, seed=3)
    finally:
        del model._advance
    side = model.schedule.grids[preview_scale(model.schedule)]
    old, new = (2 * model.vae.decode(F.interpolate(m, size=side, mode="bilinear")) - 1 for m in (maps[1], maps[2]))
    torch.testing.assert_close(trace.features[0], frequency_features(old, new))


def test_logistic_fit_is_a_minimum() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=rng) * torch.tensor([0.01, 3.0]) + torch.tensor([0.1, 5.0])
    score = (x[:, 0] - 0.1) / 0.01 + (x[:, 1] - 5) / 3
    labels = torch.bucketize(score, torch.tensor([-1.0, 1.0])) * 2
    found = fit_logistic(x, labels)
    assert found.classes == (0, 2, 4)
    decision = found.decision(3, 0, {2: 7, 4: 8})
    chosen = [decision.choose(row) for row in x.tolist()]
    right = sum(c == {0: None, 2: 7, 4: 8}[int(k)] for c, k in zip(chosen, labels, strict=True))
    assert right > 0.93 * 300
    w = torch.tensor(found.weights, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(found.biases, dtype=torch.float64, requires_grad=True)
    z = (x.double() - torch.tensor(found.mean)) / torch.tensor(found.deviation)
    loss = F.cross_entropy(z @ w.T + b, labels // 2, reduction="sum") + w.square().sum() / 2
    loss.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None and b.grad is not None
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-3


def test_labels() -> None:
    similar = torch.tensor([[0.95, 0.91, 0.7, 0.99, 0.99, 0.99], [0.8, 0.95, 0.7, 0.95, 0.7, 0.7], [0.0] * 6])
    skip, unguide = labels_of(similar, 0.9)
    assert skip.tolist() == [2, 2, 0] and unguide.tolist() == [3, 1, 0]


def test_training(model: VAR) -> None:
    def similarity(images: Tensor, wanted: Tensor) -> Tensor:
        return 1 - (images - wanted).abs().mean((1, 2, 3))

    trials = try_strategies(model, LABELS, seed=1, similarity=similarity, batch=2)
    assert trials.similar.shape == (4, 6) and trials.features.shape == (4, 2)
    plan = train_skipvar(trials, 0.9)
    made = plan.provenance
    assert made["images"] == 4 and sum(made["skip_classes"]) == 4 and plan.model == model.fingerprint()
    images, trace = generated(model, plan, LABELS[:1], 1)
    assert images.shape == (1, 3, 12, 12) and trace.plan in (plan, *plan.alternatives)
