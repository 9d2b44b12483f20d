"""A dump of a small VAR, and a browser to look at it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toprovar_compile import dispatch
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.report import counters

LABELS = torch.tensor([1, 7])


@pytest.fixture(scope="package")
def made(
    make_var: Callable[..., VAR], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Plan, Tensor, Tensor]]:
    """The folder of three generations, their plan, and images with and without a dump."""
    torch._dynamo.reset()
    dispatch.reset()
    counters.reset()
    directory = tmp_path_factory.mktemp("dump")
    model = make_var(depth=2)
    plan = Plan.keep_share(model.schedule, 2, 0.5, 3, layers=[1], bucket=2)
    dumped = torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager", "dump": str(directory)})
    for _ in range(3):
        image = dumped(LABELS, seed=0)
    plain = torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})(LABELS, seed=0)
    (folder,) = directory.iterdir()
    yield folder, plan, image, plain
    torch._dynamo.reset()
    dispatch.reset()


@pytest.fixture(scope="package")
def folder(made: tuple[Path, Plan, Tensor, Tensor]) -> Path:
    """The folder of the dump."""
    return made[0]
