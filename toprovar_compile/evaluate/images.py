"""Images under a plan by the eager reference, many at a time, each following the decisions it would make alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from toprovar_compile.models import infinity, var
from toprovar_compile.plan import Plan
from toprovar_compile.policies.decide import choose_rows, undecided
from toprovar_compile.reference import pruned


@dataclass(frozen=True)
class Generated:
    """`images` (N, 3, H, W) float32 on the CPU, and the plan that each of them followed to its end.

    `tokens` has what was drawn at each scale of the schedule, int32 on the CPU: indices (N, n), or bits (N, n, bits) of
    an Infinity; -1 where an image did not come to the scale.
    """

    images: Tensor
    plans: tuple[Plan, ...]
    tokens: tuple[Tensor, ...]

    @property
    def shares(self) -> Tensor:
        """Share of the tokens of a dense generation that each image computed, float64 (N,)."""
        return torch.tensor([plan.total_share() for plan in self.plans], dtype=torch.float64)

    def flips(self, other: Generated) -> list[float | None]:
        """Share of tokens (bits) at each scale that `other` drew differently, of images that both drew; None: none."""
        rates: list[float | None] = []
        for a, b in zip(self.tokens, other.tokens, strict=True):
            both = (a >= 0) & (b >= 0)
            rates.append(float((a != b)[both].float().mean()) if bool(both.any()) else None)
        return rates


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
    tokens = tuple(torch.cat(scale) for scale in zip(*(p.tokens for p in parts), strict=True))
    return Generated(torch.cat([p.images for p in parts]), tuple(q for p in parts for q in p.plans), tokens)


def _batch(model: Any, plan: Plan, labels: Any, seed: int, sampling: Mapping[str, Any]) -> Generated:
    with pruned(model, undecided(plan)) as trace, _drawing() as drawn:
        images: Tensor = model(labels, seed=seed, **sampling).float().cpu()
    drawn += [
        torch.full((len(labels), count, *drawn[0].shape[2:]), -1, dtype=torch.int32)
        for count in model.schedule.tokens[len(drawn) :]
    ]
    if not plan.decisions:
        return Generated(images, (plan,) * len(labels), tuple(drawn))
    chosen = choose_rows(plan, trace.features, len(labels))
    images, plans = images.clone(), [plan] * len(labels)
    for outcome in sorted({o for o in chosen if o is not None}):
        rows = [i for i, o in enumerate(chosen) if o == outcome]
        branch = _batch(model, plan.alternatives[outcome], labels, seed, sampling)
        images[rows] = branch.images[rows]
        for mine, theirs in zip(drawn, branch.tokens, strict=True):
            mine[rows] = theirs[rows]
        for i in rows:
            plans[i] = branch.plans[i]
    return Generated(images, tuple(plans), tuple(drawn))


@contextmanager
def _drawing() -> Iterator[list[Tensor]]:
    """What models of this package draw within the block, one tensor a scale. Not for several threads at once."""
    drawn: list[Tensor] = []

    def keeping(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*args: Any) -> Tensor:
            result = draw(*args)
            drawn.append(result.to(torch.int32).cpu())
            return result

        return kept

    with (
        patch.object(var, "draw_tokens", keeping(var.draw_tokens)),
        patch.object(infinity, "sample_bits", keeping(infinity.sample_bits)),  # type: ignore[attr-defined]
    ):
        yield drawn


def numbers(values: Tensor | Sequence[float], digits: int = 5) -> list[float]:
    """Values for a JSON file, rounded."""
    return [round(float(v), digits) for v in values]
