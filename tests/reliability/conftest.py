"""A small VAR whose plan prunes, skips and measures, compiled without an inner compiler and warmed up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile import dispatch
from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.reference import pruned
from toprovar_compile.report import counters

LABELS = torch.tensor([1, 7])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What is compiled here is shared by the tests of a file."""
    counters.reset()


@pytest.fixture(scope="session")
def model() -> VAR:
    """Tests must not change it."""
    vae = VQVAEConfig(vocab_size=64, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, patch_nums=(1, 2, 3, 4, 6))
    cfg = VARConfig(depth=2, embed_dim=32, num_heads=2, num_classes=10, shared_aln=True, vae=vae)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = VAR(cfg).eval().requires_grad_(False)
        for p in (made.pos_start, made.pos_1LC):
            p.normal_()
    rows = [ScalePlan(layers=(DENSE,) * 2)] * 3
    rows += [ScalePlan(layers=(LayerAction("prune", 6), SKIP)), ScalePlan(layers=(LayerAction("prune", 9), DENSE))]
    made.plan = Plan(made.schedule, 2, tuple(rows))
    return made


@pytest.fixture(scope="module")
def fast(model: VAR) -> Iterator[Callable[..., Tensor]]:
    """The compiled model after one generation."""
    torch.compiler.reset()
    dispatch.reset()
    compiled: Any = compile_steps(model, {"inner": "eager"})
    compiled(LABELS, seed=0)
    yield compiled
    torch.compiler.reset()


@pytest.fixture(scope="session")
def images(model: VAR) -> Tensor:
    """What the eager reference makes of labels 1 and 7 with seed 3."""
    assert model.plan is not None
    with pruned(model, model.plan):
        return model(LABELS, seed=3)
