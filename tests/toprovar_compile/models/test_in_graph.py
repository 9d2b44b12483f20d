"""Functions captured as one call compile to what they would without that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toprovar_compile.models.in_graph import in_graph

RUNS: list[type] = []


@in_graph
def both(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    RUNS.append(type(a))
    return (a.t() * factor).t(), a @ b


@in_graph
def grown(old: Tensor | None, new: Tensor) -> Tensor:
    RUNS.append(type(new))
    return new if old is None else torch.cat((old, new))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    RUNS.clear()
    yield
    torch.compiler.reset()


def repeated(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros_like(a)
    for _ in range(4):
        scaled, product = both(a, b, 0.5)
        total = total + scaled + product
    return total, grown(None, a)


def test_eager() -> None:
    scaled, product = both(torch.ones(2, 2), torch.ones(2, 2), 3.0)
    assert (scaled.tolist(), product.tolist(), RUNS) == ([[3, 3], [3, 3]], [[2, 2], [2, 2]], [Tensor])


@pytest.mark.parametrize("dynamic", [True, False])
def test_one_node_a_call_and_one_run_for_sizes(dynamic: bool) -> None:
    captured: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        captured.append(gm)
        return gm.forward

    a, b = torch.randn(3, 3), torch.randn(3, 3)
    with torch.no_grad():
        out = torch.compile(repeated, backend=backend, dynamic=dynamic)(a, b)
        during = RUNS.count(FakeTensor)
        torch.testing.assert_close(out, repeated(a, b))
    calls = [n for n in captured[0].graph.nodes if getattr(n.target, "__name__", "") in ("both", "grown")]
    assert (len(calls), during) == (5, 2)
    values = [n.meta["example_value"] for n in calls[:4]]
    assert len({(str(t.shape), str(t.stride()), t.dtype) for value in values for t in value[:1]}) == 1
    assert values[3][0].stride() == values[0][0].stride()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_what_runs(backend: str) -> None:
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(repeated, backend=backend)(a, b), repeated(a, b))
    assert torch.compile(repeated, backend=backend)(a.requires_grad_(), b)[0].requires_grad


def test_results_have_the_sizes_of_a_run() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, torch.no_grad():
        first = both(torch.empty(4, 6).t(), torch.empty(4, 8), 0.5)
        again = both(torch.empty(4, 6).t(), torch.empty(4, 8), 0.5)
        other = both(torch.empty(6, 4), torch.empty(4, 8), 0.5)
        wide = both(torch.empty(6, 4, dtype=torch.float64), torch.empty(4, 8, dtype=torch.float64), 0.5)
    assert len(RUNS) == 3 and mode is again[0].fake_mode
    assert [(t.shape, t.stride(), t.dtype) for t in again] == [(t.shape, t.stride(), t.dtype) for t in first]
    assert again[0].stride() == (1, 6) and other[0].stride() == (4, 1) and wide[0].dtype == torch.float64


def test_a_result_in_the_memory_of_an_argument_stays_there() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 3)
        assert grown(None, x) is x and grown(None, x) is x
        assert grown(x, x).shape == grown(x, x).shape == (4, 3)


def test_a_trace_is_not_held() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, torch.no_grad():
        both(torch.empty(3, 3), torch.empty(3, 3), 0.5)
    gone = weakref.ref(mode)
    del mode
    gc.collect()
    assert gone() is None
