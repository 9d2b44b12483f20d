"""What plans cost: by tokens, and by times of which the truth is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toprovar_compile import costs as costs_module
from toprovar_compile.costs import Costs, measure_costs
from toprovar_compile.errors import PlanError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 4, 8, 16))


def test_by_tokens_is_the_share() -> None:
    costs = Costs.by_tokens(Plan.dense(SCHEDULE, 4))
    for plan in (
        Plan.keep_share(SCHEDULE, 4, 0.5, 3),
        Plan.keep_share(SCHEDULE, 4, {3: 0.5, 4: 0.25}, 3, layers=[1, 2], unguided_from=4),
        Plan.keep_share(SCHEDULE, 4, 0.5, 3, exit_scale=4),
    ):
        assert costs.seconds(plan) == pytest.approx(plan.total_share())
        assert costs.speedup(plan) == pytest.approx(1 / plan.total_share())


def test_unknown_scales_are_refused() -> None:
    with pytest.raises(PlanError, match="before scale 2"):
        Costs.by_tokens(Plan.dense(SCHEDULE, 4)).seconds(Plan.keep_share(SCHEDULE, 4, 0.5, 1, bucket=1))


def test_measured_costs_find_the_parts(tiny_var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes by the plan in force: each scale has a fixed part and one for its tokens."""
    truth = {2: (0.1, 0.3), 3: (0.2, 0.5), 4: (0.0, 2.0)}

    def clock(device: torch.device) -> Any:
        def timed(call: Any) -> tuple[None, float]:
            plan = tiny_var.plan
            assert plan is not None
            shares = plan.token_share()
            return None, 1.0 + sum(f + t * shares[s] for s, (f, t) in truth.items() if plan.runs(s))

        return timed

    monkeypatch.setattr(costs_module, "clock", clock)
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda *args, **kwargs: None)
    found = measure_costs(tiny_var, bucket=1)
    assert tiny_var.plan is None and found.rest == pytest.approx(1.0)
    for s, (fixed, tokens) in truth.items():
        assert found.late[s] == pytest.approx((fixed, tokens), abs=1e-6)
    assert found.dense == pytest.approx(4.1)
