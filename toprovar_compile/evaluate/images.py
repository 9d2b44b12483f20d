"""Images under a plan by the eager reference, many at a time, each following the decisions it would make alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import choose_rows, undecided
from toprovar_compile.reference import pruned


@dataclass(frozen=True)
class Generated:
    """`images` (N, 3, H, W) float32 on the CPU, and the plan that each of them followed to its end."""

    images: Tensor
    plans: tuple[Plan, ...]

    @property
    def shares(self) -> Tensor:
        """Share of the tokens of a dense generation that each image computed, float64 (N,)."""
        return torch.tensor([plan.total_share() for plan in self.plans], dtype=torch.float64)


@torch.no_grad()
def generate(
    model: Any,
    plan: Plan,
    labels: Any,
    *,
    seed: int,
    batch: int = 16,
    sampling: Mapping[str, Any] | None = None,
) -> Generated:
    """Generate `labels` (N,), or a list of prompts, `batch` at a time; the batch that starts at index i has seed + i.

    All plans draw the same numbers for the same image as long as they run, whatever others in its batch decide.
    """
    parts = [_batch(model, plan, labels[i : i + batch], seed + i, sampling or {}) for i in range(0, len(labels), batch)]
    return Generated(torch.cat([p.images for p in parts]), tuple(q for p in parts for q in p.plans))


def _batch(model: Any, plan: Plan, labels: Any, seed: int, sampling: Mapping[str, Any]) -> Generated:
    with pruned(model, undecided(plan)) as trace:
        images: Tensor = model(labels, seed=seed, **sampling).float().cpu()
    if not plan.decisions:
        return Generated(images, (plan,) * len(labels))
    chosen = choose_rows(plan, trace.features, len(labels))
    images, plans = images.clone(), [plan] * len(labels)
    for outcome in sorted({o for o in chosen if o is not None}):
        rows = [i for i, o in enumerate(chosen) if o == outcome]
        branch = _batch(model, plan.alternatives[outcome], labels, seed, sampling)
        images[rows] = branch.images[rows]
        for i in rows:
            plans[i] = branch.plans[i]
    return Generated(images, tuple(plans))


def numbers(values: Tensor | Sequence[float], digits: int = 5) -> list[float]:
    """Values for a JSON file, rounded."""
    return [round(float(v), digits) for v in values]
