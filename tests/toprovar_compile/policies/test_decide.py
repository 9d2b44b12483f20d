"""Plans that decide for each image, in the reference and compiled: equal choices, no recompilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters as compile_counters

from toprovar_compile import dispatch
from toprovar_compile.decision import Decision
from toprovar_compile.errors import PlanError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import always, choose_rows, entropy_features, undecided
from toprovar_compile.policies.toprovar import layer_ratios, layer_scores, low_entropy_share
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.reference import Trace, pruned
from toprovar_compile.report import counters

TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}  # float32, other order of operations
ONE = torch.tensor([4])
UP, DOWN = ((0.0,) * 4, (0.0,) * 4), (0.0, 0.0)


def _share(model: VAR, keep: float, start: int, **fields: Any) -> Plan:
    return Plan.keep_share(model.schedule, 3, keep, start, bucket=1, **fields)


def _by_rho(model: VAR, bound: float, beta: float = 0.1) -> Plan:
    """After scale 2: half of the tokens where rho is above `bound`; after scale 3: unguided where R_0 is above 0."""
    early = _share(model, 0.5, 3)
    late = _share(model, 0.4, 4, unguided_from=4)
    return dataclasses.replace(
        Plan.dense(model.schedule, 3),
        decisions=(
            Decision(2, "entropy", ((0.0,) * 4, (1.0, 0.0, 0.0, 0.0)), (bound, 0.0), (None, 0), beta),
            Decision(3, "entropy", ((0.0, 1.0, 0.0, 0.0),), (0.0,), (1,), beta),
        ),
        alternatives=(early, late),
    )


@pytest.fixture(scope="module")
def model(make_var: Callable[..., VAR]) -> VAR:
    return make_var()


@pytest.fixture(scope="module")
def fast(model: VAR) -> Iterator[Any]:
    """The compiled model, warmed up for one image, with guidance (two rows) and without."""
    torch.compiler.reset()
    dispatch.reset()
    compiled = compile_steps(model, {"inner": "eager"})
    for plan in (Plan.dense(model.schedule, 3), _share(model, 1.0, 5, unguided_from=3)):
        model.plan = plan
        compiled(ONE, seed=0)
    yield compiled
    model.plan = None
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    counters.reset()


def _both(model: VAR, fast: Any, plan: Plan, labels: Tensor, **sampling: Any) -> tuple[Tensor, Trace]:
    """The image of the reference, after comparing it with the compiled one, for which nothing was captured anew."""
    model.plan = plan
    with pruned(model, plan) as trace:
        want = model(labels, seed=5, **sampling)
    before = compile_counters["stats"]["unique_graphs"]
    got = fast(labels, seed=5, **sampling)
    assert compile_counters["stats"]["unique_graphs"] == before
    assert not {e: n for e, n in counters.snapshot().items() if not e.startswith(("compiled", "decision", "variant"))}
    torch.testing.assert_close(got, want, **TOLERANCE)
    return want, trace


@pytest.mark.parametrize("start", [2, 3, 4])
def test_without_guidance(model: VAR, fast: Any, start: int) -> None:
    plan = _share(model, 1.0, 5, unguided_from=start)
    image, trace = _both(model, fast, plan, ONE, cfg=3.0)
    assert plan.token_share() == [1.0] * start + [0.5] * (5 - start) and not plan.is_dense
    assert trace.kv_length[4, 0] == 66
    with pruned(model, Plan.dense(model.schedule, 3)):
        assert not torch.allclose(image, model(ONE, seed=5, cfg=3.0), atol=1e-3)


@pytest.mark.parametrize("score", ["entropy", "mean_distance", "frequency", "random"])
def test_scores_with_and_without_guidance(model: VAR, fast: Any, score: Any) -> None:
    """Maps, deltas and caches of the conditional half go on when guidance ends between two pruned scales."""
    _, trace = _both(model, fast, _share(model, 0.5, 3, score=score, unguided_from=4), ONE)
    assert trace.kept[3, 0].shape == (2, 8) and trace.kept[4, 0].shape == (1, 18)
    assert bool(trace.entropy) == (score == "entropy")


@pytest.mark.parametrize(("bound", "chosen"), [(0.0, 0), (1.0, 1)])
def test_entropy_decides(model: VAR, fast: Any, bound: float, chosen: int) -> None:
    plan = _by_rho(model, bound)
    image, trace = _both(model, fast, plan, ONE)
    assert trace.plan == plan.alternatives[chosen]
    _, forced = _both(model, fast, always(plan, plan.alternatives[1 - chosen].digest()), ONE)
    assert forced.plan == plan.alternatives[1 - chosen] and len(forced.features) == (2 if chosen == 0 else 1)
    with pruned(model, plan.alternatives[chosen]):
        assert torch.equal(image, model(ONE, seed=5))


def test_images_take_turns_without_recompiling(model: VAR, fast: Any) -> None:
    for bound in (0.0, 1.0):
        _both(model, fast, _by_rho(model, bound), ONE)
    counters.reset()
    for bound in (1.0, 0.0, 1.0):
        _both(model, fast, _by_rho(model, bound), ONE)
    assert not [e for e in counters.snapshot() if e.startswith("compiled")]


def test_frequencies_decide(model: VAR, fast: Any) -> None:
    exits = _share(model, 1.0, 5, exit_scale=3)
    decision = Decision(2, "frequency", ((0.0, 0.0), (0.0, 1.0)), (1.0, 0.0), (None, 0), preview=4)
    plan = dataclasses.replace(Plan.dense(model.schedule, 3), decisions=(decision,), alternatives=(exits,))
    _, trace = _both(model, fast, plan, ONE)  # a share of high frequencies never passes 1
    assert trace.plan == plan and 0 < trace.features[0][0, 1] < 1
    always = dataclasses.replace(plan, decisions=(dataclasses.replace(decision, biases=(0.0, 0.0)),))
    _, trace = _both(model, fast, always, ONE)
    assert trace.plan == exits


def test_decisions_in_alternatives(model: VAR, fast: Any) -> None:
    inner = _by_rho(model, 1.0)
    inner = dataclasses.replace(inner, decisions=inner.decisions[1:])
    first = Decision(1, "entropy", ((0.0,) * 4,), (0.0,), (0,))
    plan = dataclasses.replace(Plan.dense(model.schedule, 3), decisions=(first,), alternatives=(inner,))
    assert Plan.from_json(plan.to_json()) == plan
    _, trace = _both(model, fast, plan, ONE)
    assert trace.plan == inner.alternatives[1]


def test_entropy_features_are_rho_and_scores() -> None:
    maps = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    got = entropy_features(((m, (4, 4)) for m in maps.unbind(0)), 0.3)
    torch.testing.assert_close(got[:, 0], low_entropy_share(maps).mean(0))
    torch.testing.assert_close(got[:, 1:], layer_scores(layer_ratios(maps.view(3, 2, 4, 4)), 0.3).T)


def test_rows_choose_alone(model: VAR) -> None:
    """What each image of a batch would choose is what it chooses in a batch of its own."""
    labels = torch.tensor([0, 3, 5, 8])
    with pruned(model, undecided(_by_rho(model, 0.0))) as trace:
        model(labels, seed=1, top_k=1)
    assert trace.plan is not None and len(trace.features) == 2
    rho = trace.features[0][:, 0].view(2, 4).mean(0)
    plan = _by_rho(model, rho.median().item() + 1e-4)
    outcomes = choose_rows(plan, trace.features, 4)
    assert set(outcomes) == {0, 1}
    for label, outcome in zip(labels, outcomes, strict=True):
        with pruned(model, plan) as alone:
            model(label.view(1), seed=1, top_k=1)
        assert outcome is not None and alone.plan == plan.alternatives[outcome]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"after": 9}, "names 9"),
        ({"outcomes": (None, 2)}, "names 2"),
        ({"weights": ((0.0,), (0.0,))}, "weighs 1 features"),
        ({"after": 3}, "differs from the plan before"),
        ({"features": "frequency", "weights": ((0.0,) * 2,) * 2, "after": 0}, "after scale 0"),
    ],
)
def test_decisions_must_fit(model: VAR, changes: dict[str, Any], match: str) -> None:
    plan = _by_rho(model, 0.5)
    with pytest.raises(PlanError, match=match):
        dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], **changes),))


def test_decisions_read_dense_scales(model: VAR) -> None:
    pruned_early = _share(model, 0.5, 2)
    decision = Decision(2, "entropy", ((0.0,) * 4,), (0.0,), (None,))
    with pytest.raises(PlanError, match="is pruned"):
        dataclasses.replace(pruned_early, decisions=(decision,))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": "size"}, "entropy or frequency"),
        ({"biases": (0.0,)}, "as many of each"),
        ({"weights": ((0.0,), (0.0, 1.0))}, "of one length"),
        ({"after": -1}, "a scale of the plan"),
        ({"outcomes": (None, "a")}, "an alternative's index"),
        ({"beta": float("nan")}, "finite"),
    ],
)
def test_decisions_are_validated(changes: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {
        "after": 1,
        "features": "entropy",
        "weights": ((0.0,),) * 2,
        "biases": (0.0, 0.0),
        "outcomes": (None, 0),
    }
    with pytest.raises(PlanError, match=match):
        Decision(**(good | changes))
    with pytest.raises(PlanError, match="did you mean 'after'"):
        Decision.from_json(good | {"afer": 1}, "decisions[0]")


def test_guidance_does_not_come_back(model: VAR) -> None:
    scales = _share(model, 1.0, 5, unguided_from=3).scales
    for rows, match in (
        ((*scales[:4], Plan.dense(model.schedule, 3).scales[4]), "to the end"),
        (scales[3:4] * 5, "there"),
    ):
        with pytest.raises(PlanError, match=match):
            Plan(model.schedule, 3, rows)
