"""Plans of every policy for one model, as they are compared with one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toprovar_compile.plan import Plan, Score
from toprovar_compile.policies.adaptive import adaptive_plan
from toprovar_compile.policies.fastvar import FastVarPolicy, fastvar_plan
from toprovar_compile.policies.skipvar import Trials, train_skipvar
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds, ToProVarPolicy, plan_from_statistics
from toprovar_compile.schedule import ScaleSchedule

BUCKET = 16
"""Kept counts are multiples of this for every policy: equal kernels, full tiles."""

SKIPVAR_TARGETS = (0.84, 0.88, 0.92, 0.94, 0.96)
SCORES = ("entropy", "mean_distance", "frequency", "random", "high entropy")
"""Orders in which tokens are kept that are compared on equal shapes; "high entropy" is the opposite of the first."""


@dataclass(frozen=True)
class Candidate:
    """A plan under a name. `shape` is equal for plans that differ only in the order in which tokens are kept, `place`
    (group, number in it) orders the plans of a comparison."""

    policy: str
    name: str
    plan: Plan
    shape: str = ""
    place: tuple[int, int] = (0, 0)


def fixed(schedule: ScaleSchedule, depth: int) -> Iterator[Candidate]:
    """Scales left out or run without guidance, the same for all images."""
    last = len(schedule) - 1
    for s in range(last, last - 3, -1):
        plan = Plan.keep_share(schedule, depth, 1.0, last, exit_scale=s)
        yield Candidate("exit", f"exit={s}", plan)
    for s in range(last, last - 3, -1):
        plan = Plan.keep_share(schedule, depth, 1.0, last, unguided_from=s)
        yield Candidate("unguided", f"unguided={s}", plan)
    for s in (last - 1, last - 2):
        plan = Plan.keep_share(schedule, depth, 1.0, last, unguided_from=s, exit_scale=last)
        yield Candidate("unguided", f"unguided={s},exit={last}", plan)


def skipvar(trials: Trials, targets: Sequence[float] = SKIPVAR_TARGETS) -> Iterator[Candidate]:
    """SkipVAR, trained for several similarities."""
    for target in targets:
        yield Candidate("skipvar", f"target={target}", train_skipvar(trials, target))


def fastvar(schedule: ScaleSchedule, depth: int) -> Iterator[Candidate]:
    """FastVAR at its published settings, and with more or less of both that it does."""
    published = FastVarPolicy.like_published(schedule, depth, bucket=BUCKET)
    yield Candidate("fastvar", "published", fastvar_plan(published, depth))
    count = len(schedule)
    for left_out in (0, 1, 2):
        stop = count - left_out
        for ratios in ((0.2, 0.25), (0.4, 0.5), (0.6, 0.75)):
            if (left_out, ratios) == (2, (0.4, 0.5)):
                continue
            policy = FastVarPolicy(
                schedule,
                {stop - 2: ratios[0], stop - 1: ratios[1]},
                published.layers,
                stop if left_out else None,
                BUCKET,
            )
            name = f"ratios={ratios[0]}/{ratios[1]},left_out={left_out}"
            yield Candidate("fastvar", name, fastvar_plan(policy, depth))


def toprovar(stats: Statistics) -> Iterator[Candidate]:
    """ToProVAR under several thresholds, calibrated and adaptive."""
    last = len(stats.schedule) - 1
    for start in (last - 1, last - 2):
        for alpha_min in (0.2, 0.5):
            for leave in (last, None):
                t = Thresholds(depth=start, alpha_min=alpha_min, global_below=0.3, detail_above=0.3, exit_scale=leave)
                name = f"depth={start},alpha_min={alpha_min},exit={leave}"
                yield Candidate("toprovar", name, plan_from_statistics(stats, t))
    middle = stats.rho[last - 2]
    if middle is not None:
        for leave in (last, None):
            t = Thresholds(
                tau=round(middle, 3),
                alpha_min=0.5,
                global_below=0.3,
                detail_above=0.3,
                representative_scale=min(6, last - 3),
                exit_scale=leave,
            )
            name = f"tau={t.tau},alpha_min=0.5,exit={leave}"
            yield Candidate("toprovar adaptive", name, adaptive_plan(stats, t))


def shapes(schedule: ScaleSchedule, depth: int) -> Iterator[Candidate]:
    """The same kept counts, with tokens in the order of every score."""
    last = len(schedule) - 1
    for start, leave in ((last - 1, last), (last - 1, None), (last - 2, last), (last - 2, last - 1)):
        for keep in (0.25, 0.5, 0.75):
            shape = f"keep={keep},from={start}" + ("" if leave is None else f",exit={leave}")
            for name in SCORES:
                opposite = name == "high entropy"
                score: Score = "entropy" if opposite else name  # type: ignore[assignment]
                plan = Plan.keep_share(
                    schedule,
                    depth,
                    keep,
                    start,
                    bucket=BUCKET,
                    exit_scale=leave,
                    score=score,
                    direction="high_entropy" if opposite else "low_entropy",
                )
                yield Candidate(f"score: {name}", shape, plan, shape)


def ablation(stats: Statistics) -> Iterator[Candidate]:
    """The parts of the method one by one, all starting at the last scale but one and leaving before the last.

    Scale alone leaves the layers of the scale out; with layers only the Detail ones; with tokens every layer keeps its
    share; and all three. Then the choices within them: restoring, selection, and what is pruned, in steps of 20 %.
    """
    schedule, depth = stats.schedule, stats.num_layers
    last = len(schedule) - 1
    start = last - 1
    whole = {"depth": start, "alpha_min": 0.5, "exit_scale": last}
    bounded = Thresholds(**whole, global_below=0.3, detail_above=0.3)  # type: ignore[arg-type]
    policy = ToProVarPolicy(stats, bounded)
    detail = [i for i in range(depth) if policy.layer_class(i) == "detail"]

    def kept(share: float, **changes: Any) -> Plan:
        return Plan.keep_share(schedule, depth, share, start, bucket=BUCKET, exit_scale=last, **changes)

    yield Candidate("ablation", "fixed exit", Plan.keep_share(schedule, depth, 1.0, last, exit_scale=start))
    yield Candidate("ablation", "scale", kept(0.0))
    yield Candidate("ablation", "scale + layer", kept(0.0, layers=detail))
    every = Thresholds(**whole, global_below=0.0, detail_above=0.0)  # type: ignore[arg-type]
    yield Candidate("ablation", "scale + token", plan_from_statistics(stats, every))
    yield Candidate("ablation", "scale + layer + token", plan_from_statistics(stats, bounded))
    for share in (0.25, 0.5, 0.75):
        yield Candidate("ablation", f"keep={share},cached", kept(share))
        yield Candidate("ablation", f"keep={share},identity", kept(share, restore="identity"))
        yield Candidate("ablation", f"keep={share},gumbel", kept(share, selection="gumbel"))
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        for order in ("low_entropy", "high_entropy"):
            yield Candidate("ablation", f"keep={share},{order} tokens", kept(share, direction=order))
