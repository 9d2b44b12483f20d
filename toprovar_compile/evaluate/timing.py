"""Times of compiled plans against the dense one, and what it costs that a plan decides by image.

All plans share one model and its compiled code; the dense plan is timed first and last, so that drift of the machine
shows. Besides it a plan that leaves after the first scale is timed: its time, mostly that of decoding, is what no plan
can save.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from toprovar_compile import measure
from toprovar_compile.evaluate.intervals import Interval
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import always
from toprovar_compile.report import counters

_CALLS = 12  # timed for each plan
_WARMUP = {"cpu": 1, "cuda": 2}  # rounds over the calls: compiling, then recording
_EXPECTED = ("compiled", "replayed", "decision", "cuda_graph_captured", "cuda_graph_freed", "plain_graph")
_DRAWS = 1000
_PAIRS = {"cpu": 1, "cuda": 10}  # rounds over the calls in which deciding and not deciding take turns

_FIRST = ("shipped", "tuned", "exit", "unguided", "fastvar", "skipvar", "toprovar", "toprovar adaptive")

Row = dict[str, Any]


class Timer:
    """Times plans of `model` on `labels`, `batch` of them a call, in the precision of its users."""

    def __init__(self, model: Any, labels: Any, batch: int) -> None:
        self.model, self.batch = model, batch
        self.device = next(model.parameters()).device
        self._clock = measure.clock(self.device)
        measure.forget_compiled()  # each number of images a call gets code of its own
        self._fast: measure.Generate = torch.compile(model, backend="toprovar")
        at = [[i % len(labels) for i in range(c * batch, (c + 1) * batch)] for c in range(_CALLS)]
        calls = at[: max(1, len(labels) // batch)]
        self.events: dict[str, int] = {}  # what slowed the latest plan down: fallbacks, misses
        self._jobs = [[labels[i] for i in c] if isinstance(labels, list) else labels[c] for c in calls]

    def seconds(self, plan: Plan) -> float:
        """Seconds an image, the median of a few calls after untimed ones."""
        rounds = _WARMUP[self.device.type]
        # Where graphs are recorded, or calls decide, each call is made before it is timed.
        first = self._jobs * rounds if rounds > 1 or plan.decisions else self._jobs[:1]
        for i, job in enumerate(first):
            self._call(plan, job, i % len(self._jobs))
        before = counters.snapshot()
        took = statistics.median(self._call(plan, job, i) for i, job in enumerate(self._jobs)) / self.batch
        self.events = {
            event: count - before.get(event, 0)
            for event, count in counters.snapshot().items()
            if count > before.get(event, 0) and not event.startswith(_EXPECTED)
        }
        return took

    def deciding(self, plan: Plan, leaf: Plan) -> Row:
        """What it costs to measure and to ask: `plan`, made to come to `leaf`, over `leaf` from the start, by pairs."""
        ways = replace(leaf, decisions=(), alternatives=()), always(plan, leaf.digest())
        for way in ways:
            self.seconds(way)
        pairs = []
        for _ in range(_PAIRS[self.device.type]):
            for i, job in enumerate(self._jobs):
                pairs.append([self._call(way, job, i) for way in ways])
        fixed, asked = torch.tensor(pairs, dtype=torch.float64).T
        picks = torch.randint(len(fixed), (_DRAWS, len(fixed)), generator=torch.Generator().manual_seed(0))
        more, whole = asked - fixed, fixed.median()
        return {
            "seconds": float(whole) / self.batch,
            "seconds_deciding": float(asked.median()) / self.batch,
            "share": asdict(Interval.of(more.median() / whole, more[picks].median(1).values / whole)),
            "pairs": len(pairs),
        }

    def _call(self, plan: Plan, job: Any, seed: int) -> float:
        self.model.plan = plan
        with torch.no_grad(), measure.in_user_precision(self.model, self.device):
            return self._clock(partial(self._fast, job, seed=seed))[1]


def time_rows(
    model: Any,
    labels: Any,
    rows: Sequence[Row],
    plans: Mapping[str, Plan],
    leaves: Mapping[str, Plan],
    batch: int,
    until: float,
    log: Callable[[str], None],
    save: Callable[[Row], None],
) -> None:
    """Time `rows` whose plans are known, by digest, until the clock `time.monotonic` says so.

    The best of every policy come first; `leaves` have what most images make of a plan that decides. A row gets
    `times[batch]`: seconds an image, and how many times faster than dense that is, as a whole and without what no plan
    saves. With more than one image a call plans that decide are left out, as images of one batch go the same way.
    `save` is called, with what is known of the timing as a whole, after every plan.
    """
    own, timer = model.plan, Timer(model, labels, batch)
    depth, last = len(model.blocks), len(model.schedule) - 1
    unpruned = Plan.dense(model.schedule, depth)
    narrow = next(model.parameters()).dtype == torch.bfloat16
    try:
        dense = timer.seconds(unpruned)
        least = timer.seconds(Plan.keep_share(model.schedule, depth, 1.0, last, exit_scale=1))
        about: Row = {
            "batch": batch,
            "precision": "bfloat16" if narrow else measure.precision(timer.device),
            "dense": [dense],
            "one_scale": least,
            "deciding": [],
        }
        log(f"compiled, {batch} a call, dense: {dense * 1e3:.2f} ms an image, {least * 1e3:.2f} of them for one scale")
        for row in in_turn([r for r in rows if r["digest"] in plans]):
            if time.monotonic() > until:
                break
            plan = plans[row["digest"]]
            if batch > 1 and plan.decisions:
                continue
            took = timer.seconds(plan)
            times: Row = {"seconds": took, "speedup": dense / took, "scales_speedup": None}
            if took > least:
                times["scales_speedup"] = (dense - least) / (took - least)
            if timer.events:
                times["events"] = timer.events
            row.setdefault("times", {})[str(batch)] = times
            said = f"{row['policy']}: {row['name']}: {took * 1e3:.2f} ms, {dense / took:.2f} x"
            log(f"compiled, {batch} a call, {said} {timer.events or ''}")
            if row["digest"] in leaves:
                found = timer.deciding(plan, leaves[row["digest"]])
                about["deciding"].append({"policy": row["policy"], "name": row["name"], **found})
                log(f"deciding costs {found['share']['mean']:+.2%} of {found['seconds'] * 1e3:.2f} ms")
            save(about)
        about["dense"].append(timer.seconds(unpruned))
        save(about)
    finally:
        model.plan = own


def in_turn(rows: Sequence[Row]) -> list[Row]:
    """One row of each policy after another, those of best quality for their cost first, published settings before."""
    families: dict[str, list[Row]] = {name: [] for name in _FIRST}
    for row in sorted(rows, key=lambda r: (r["name"] != "published", r["share"] + 2 * (1 - r["ssim"]["mean"]))):
        families.setdefault(row["policy"], []).append(row)
    longest = max(map(len, families.values()))
    return [members[i] for i in range(longest) for members in families.values() if i < len(members)]
