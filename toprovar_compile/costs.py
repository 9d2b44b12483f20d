"""What a plan costs, relative to the dense one: by tokens, or by times measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.errors import PlanError
from toprovar_compile.measure import autocast, clock
from toprovar_compile.plan import Plan

LATE = 3
"""Scales, the last ones, whose times are measured one by one."""

_HALF = 0.5
_WARMUP = 3


@dataclass(frozen=True)
class Costs:
    """Seconds of one image: `rest`, and for each late scale a fixed part and one in proportion to its tokens.

    `late` maps a scale to (fixed, by tokens); a scale that is left out costs nothing. `source` says where the numbers
    come from: "tokens", or "measured" and the machine.
    """

    rest: float
    late: Mapping[int, tuple[float, float]]
    source: str

    @classmethod
    def by_tokens(cls, plan: Plan) -> Costs:
        """The cost of a token is the same everywhere: in shares of the dense generation that `plan` belongs to."""
        tokens, total = plan.schedule.tokens, plan.schedule.total
        late = range(len(tokens) - LATE, len(tokens))
        return cls(sum(tokens[: late.start]) / total, {s: (0.0, tokens[s] / total) for s in late}, "tokens")

    @property
    def dense(self) -> float:
        """Seconds of the dense plan."""
        return self.rest + sum(map(sum, self.late.values()))

    def seconds(self, plan: Plan) -> float:
        """The estimate for a plan without decisions that is dense before the late scales.

        Raises PlanError for one that is not: nothing is known of its earlier scales.
        """
        shares = plan.token_share()
        if plan.decisions or any(share != 1 for s, share in enumerate(shares) if s not in self.late):
            raise PlanError(
                "the plan decides by image, or prunes before the late scales",
                where="Costs",
                expected=f"a fixed plan that is dense before scale {min(self.late)}",
            )
        runs = [s for s in self.late if plan.runs(s)]
        return self.rest + sum(self.late[s][0] + self.late[s][1] * shares[s] for s in runs)

    def speedup(self, plan: Plan) -> float:
        """How many times faster than dense."""
        return self.dense / self.seconds(plan)


@torch.no_grad()
def measure_costs(
    model: Any, *, images: int = 5, bucket: int = 16, log: Callable[[str], None] = lambda text: None
) -> Costs:
    """Time compiled plans of `model`, batch 1: dense, left at each late scale, and with half of its tokens there.

    `model.plan` is put back afterwards. Compiling takes minutes; its caches are used where they are warm.
    """
    device = next(model.parameters()).device
    schedule, depth = model.schedule, len(model.blocks)
    last = len(schedule) - 1
    fast: Callable[..., Tensor] = torch.compile(model, backend="toprovar")
    timed, label, own = clock(device), torch.zeros(1, dtype=torch.int64, device=device), model.plan

    def seconds(name: str, keep: float, start: int, exit_scale: int | None) -> float:
        model.plan = Plan.keep_share(schedule, depth, keep, start, bucket=bucket, exit_scale=exit_scale)
        with autocast(device):
            for seed in range(_WARMUP):
                fast(label, seed=seed)
            value = statistics.median(timed(partial(fast, label, seed=seed))[1] for seed in range(images))
        log(f"{name}: {value * 1e3:.1f} ms")
        return value

    try:
        late, whole = {}, seconds("dense", 1.0, last, None)
        for s in range(last, last - LATE, -1):
            beyond = None if s == last else s + 1
            half = seconds(f"half of the tokens of scale {s}", _HALF, s, beyond)
            without = seconds(f"left before scale {s}", 1.0, s, s)
            computed = Plan.keep_share(schedule, depth, _HALF, s, bucket=bucket).token_share()[s]
            by_tokens = max(0.0, (whole - half) / (1 - computed)) if computed < 1 else 0.0
            late[s] = (max(0.0, whole - without - by_tokens), by_tokens)
            whole = without
    finally:
        model.plan = own
    return Costs(whole, late, f"measured, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}")
