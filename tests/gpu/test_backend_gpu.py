"""Compiled generation on a CUDA device: CUDA graphs are recorded and replayed; images are those of the reference."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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

# Mean difference of pixels: a sampled token that flips by rounding changes a patch, not the image.
PIXEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@pytest.fixture
def model(tiny_var: VAR) -> VAR:
    return tiny_var.cuda()


def autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype=dtype)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_images_are_those_of_the_reference_while_graphs_are_recorded_and_replayed(
    model: VAR, dtype: torch.dtype
) -> None:
    plan = Plan.keep_share(model.schedule, len(model.blocks), 0.5, 3, bucket=2)
    torch._dynamo.reset()
    counters.reset()
    fast = torch.compile(model, backend=toprovar, options={"plan": plan})
    labels = torch.tensor([1, 2], device="cuda")
    for seed in range(4):  # compiled, recorded, replayed, replayed
        with autocast(dtype):
            image = fast(labels, seed=seed)
            with reference.pruned(model, plan):
                expected = model(labels, seed=seed)
        assert difference(image, expected) < PIXEL_TOLERANCE[dtype]
    counts = counters.snapshot()
    assert counts["cuda_graph_captured"] == 2 * len(model.schedule) + 1  # steps, what lies between them, the decoder
    # In each of the last two images all scales but those that run a form of the step first.
    assert counts["replayed"] == 2 * (len(model.schedule) - 3)
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
        assert difference(after, model(labels, seed=0)) < PIXEL_TOLERANCE[torch.float32]
        assert difference(after, before) > PIXEL_TOLERANCE[torch.float32]
    finally:
        model.load_state_dict(state)
