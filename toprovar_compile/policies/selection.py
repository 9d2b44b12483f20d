"""Which tokens of a scale a layer keeps, as its plan says."""

from __future__ import annotations

from torch import Tensor

from toprovar_compile.plan import Plan
from toprovar_compile.policies.tokens import keep_probability, select_tokens, selection_generator


def kept_tokens(plan: Plan, s: int, layer: int, keep: int, entropy: Tensor) -> Tensor:
    """The `keep` tokens that `layer` computes at scale `s`: int64 (B, keep), ascending.

    `entropy` (B, N) is the layer's latest map in nats, resized to the grid of scale `s`.
    """
    probability, generator = None, None
    if plan.selection == "gumbel":
        generator = selection_generator(plan.seed, s, layer, entropy.device)
        probability = keep_probability(
            entropy,
            phi=(s + 1) / len(plan.schedule),
            layer_score=plan.layer_scores[layer] if plan.layer_scores else 1.0,
            alpha_min=plan.alpha_min,
            alpha_max=plan.alpha_max,
            normalisation=plan.normalisation,
        )
    return select_tokens(
        entropy,
        keep,
        selection=plan.selection,
        direction=plan.direction,
        generator=generator,
        keep_prob=probability,
        grid=plan.schedule.grids[s],
        region_share=plan.region_share,
    )
