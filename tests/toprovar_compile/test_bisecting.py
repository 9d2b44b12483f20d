"""`bisect_passes` finds the stage that makes a check fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from toprovar_compile import bisect_passes, bisecting, dispatch
from toprovar_compile.bisecting import STAGES, limited
from toprovar_compile.models.var import VAR
from toprovar_compile.options import Options
from toprovar_compile.passes._base import switched_off
from toprovar_compile.plan import Plan
from toprovar_compile.report import counters


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dispatch.reset()
    yield
    torch._dynamo.reset()
    dispatch.reset()


def _fails_from(stage: str) -> Callable[[Any], bool]:
    return lambda _: stage in switched_off.get()


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_can_be_found(stage: str) -> None:
    found = bisect_passes(lambda: None, _fails_from(stage))
    assert found.stage == stage
    assert str(found).splitlines()[-1] == f"the check fails from {stage} on"
    assert dict(found.tried)[stage] is False


def test_nothing_to_find() -> None:
    assert bisect_passes(lambda: None, lambda _: True).stage is None
    assert bisect_passes(lambda: None, lambda _: False).stage == "eager"
    assert bisect_passes(lambda: 1 / 0, lambda _: True).stage == "eager", "an exception is a failure"


def test_options_without_stages() -> None:
    options = Options.parse({"plan": "auto", "tau": 0.5})
    assert limited(options) is options
    token = switched_off.set(frozenset({bisecting.PRUNING, bisecting.INDUCTOR}))
    try:
        off = limited(options)
    finally:
        switched_off.reset(token)
    assert (off.plan, off.tau, off.inner) == ("dense", None, "eager")


@pytest.mark.slow
def test_stages_are_really_left_out(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2, patch_nums=(2, 3))
    plan = Plan.keep_share(model.schedule, 2, 0.5, 1, bucket=2)

    def run() -> set[str]:
        before = counters.snapshot()
        torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})(torch.tensor([1]), seed=0)
        return {event for event, count in counters.snapshot().items() if count != before.get(event)}

    found = bisect_passes(run, lambda events: not any("prune" in event for event in events))
    assert found.stage == "prune_tokens"
    assert switched_off.get() == frozenset()
