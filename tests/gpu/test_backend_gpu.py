"""Compiled generation on a CUDA device: CUDA graphs are recorded and replayed; images are those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile import reference
from toprovar_compile.backend import toprovar
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.report import counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PIXEL_TOLERANCE = 1e-3  # mean difference: a sampled token that flips by rounding changes a patch, not the image


LABELS = torch.tensor([1, 2])


@pytest.fixture
def model(tiny_var: VAR) -> VAR:
    return tiny_var.cuda()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def test_pruned_images_are_those_of_the_reference_while_graphs_are_recorded_and_replayed(model: VAR) -> None:
    fast, plan = compiled(model)
    for seed in range(4):  # compiled, recorded, replayed, replayed
        image = fast(LABELS.cuda(), seed=seed)
        with reference.pruned(model, plan):
            expected = model(LABELS.cuda(), seed=seed)
        assert difference(image, expected) < PIXEL_TOLERANCE
    check_counts(model)


def test_in_bfloat16_recorded_and_replayed_images_are_those_of_kernels_one_by_one(model: VAR) -> None:
    """Bit for bit: against eager mode rounding flips tokens of random weights, as it does between eager mode and
    float32."""
    fast, _ = compiled(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        first, *later = [fast(LABELS.cuda(), seed=0) for _ in range(4)]
    assert all(torch.equal(first, image) for image in later)
    check_counts(model)


def compiled(model: VAR) -> tuple[Any, Plan]:
    plan = Plan.keep_share(model.schedule, len(model.blocks), 0.5, 3, bucket=2)
    torch._dynamo.reset()
    counters.reset()
    return torch.compile(model, backend=toprovar, options={"plan": plan}), plan


def check_counts(model: VAR) -> None:
    """After four images: every scale is recorded in the second and replayed in the last two."""
    counts = counters.snapshot()
    assert counts["cuda_graph_captured"] == 2 * len(model.schedule) + 1  # steps, what lies between them, the decoder
    assert counts["replayed"] == 2 * len(model.schedule)
    assert not any(key.startswith(("cuda_graph_miss", "fallback", "not_replayed")) for key in counts)


def test_replayed_images_follow_weights_that_are_changed_in_place(model: VAR) -> None:
    torch._dynamo.reset()
    fast = torch.compile(model, backend=toprovar, options={"plan": "dense"})
    labels = torch.tensor([3], device="cuda")
    before = [fast(labels, seed=0) for _ in range(3)][-1]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(0.5)  # type: ignore[union-attr]
    try:
        after = fast(labels, seed=0)
        assert difference(after, model(labels, seed=0)) < PIXEL_TOLERANCE
        assert difference(after, before) > PIXEL_TOLERANCE
    finally:
        model.load_state_dict(state)
