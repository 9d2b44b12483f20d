"""The inner compilers: what they assume comes back as relations, and what they make is right at other sizes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import Graph, GraphModule

from toprovar_compile import dispatch
from toprovar_compile.dispatch import covers
from toprovar_compile.errors import MissingCompilerError, OptionError
from toprovar_compile.inductor import (
    backend_name,
    cache_factors,
    compile_graph,
    compile_plain,
    generated_code,
    paused_collector,
)
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.reference import pruned
from toprovar_compile.report import counters

aten = torch.ops.aten
# Fused code sums in another order; logits reach 2.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _graph(*steps: tuple[Any, tuple[Any, ...]], inputs: int) -> GraphModule:
    """A graph of calls; an int argument below 0 names an input from the end, a str the result of an earlier call."""
    graph = Graph()
    nodes: dict[Any, Any] = {f"in{i}": graph.placeholder(f"in{i}") for i in range(inputs)}
    for i, (target, args) in enumerate(steps):
        nodes[f"v{i}"] = graph.call_function(target, tuple(nodes.get(a, a) for a in args))
    graph.output((nodes[f"v{len(steps) - 1}"],))
    return GraphModule(nn.Module(), graph)


def _scaled() -> GraphModule:
    """in0 * in1 + in1."""
    return _graph((aten.mul.Tensor, ("in0", "in1")), (aten.add.Tensor, ("v0", "in1")), inputs=2)


def test_eager_runs_the_graph() -> None:
    gm = _scaled()
    compiled = compile_graph(gm, [torch.ones(2), torch.ones(2)], [{0: "n"}, {0: "n"}], "eager")
    assert compiled.relations == ()
    assert compiled.call(torch.ones(3), torch.ones(3))[0].tolist() == [2, 2, 2]
    assert compile_plain(gm, [], "eager")(torch.ones(1), torch.ones(1))[0].tolist() == [2]


def test_unknown_inner_compiler() -> None:
    with pytest.raises(OptionError, match=r"inner is 'none'.*expected one of inductor, eager"):
        compile_graph(_scaled(), [], [], "none")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped", [False, True])
def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise InvalidCxxCompiler
        except InvalidCxxCompiler as error:
            if not wrapped:
                raise
            raise RuntimeError("compilation failed") from error

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    with pytest.raises(MissingCompilerError, match=r"code generation failed.*apt-get install g\+\+"):
        compile_graph(_scaled(), [torch.ones(2), torch.ones(2)], [{}, {}], "inductor")
    with pytest.raises(MissingCompilerError):
        compile_plain(_scaled(), [torch.ones(2), torch.ones(2)], "inductor")


def test_other_failures_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    with pytest.raises(ZeroDivisionError):
        compile_graph(_scaled(), [torch.ones(2), torch.ones(2)], [{}, {}], "inductor")


@pytest.mark.slow
def test_open_dimensions() -> None:
    def values(batch: int, n: int) -> list[torch.Tensor]:
        return [torch.randn(batch, n, 8), torch.randn(batch, 1, 8)]

    compiled = compile_graph(_scaled(), values(2, 9), [{0: "batch", 1: "n"}, {0: "batch"}], "inductor", {"n": 36})
    for batch, n in ((2, 9), (2, 36), (5, 4), (3, 2)):
        assert covers(compiled.relations, {"batch": batch, "n": n})
        x, gain = values(batch, n)
        torch.testing.assert_close(compiled.call(x, gain)[0], x * gain + gain, **TOLERANCE)
    assert not covers(compiled.relations, {"batch": 2, "n": 1}), "one token is a special case of broadcasting"
    code, key = generated_code(compiled.call)
    assert "cpp_fused" in code and "async_compile" in code and key.isalnum()
    assert any(name.startswith("example_inputs") for name in cache_factors(compiled.call))
    assert generated_code(_scaled().forward) == ("", "")


@pytest.mark.slow
def test_numbers_are_open(make_var: Callable[..., VAR]) -> None:
    gm = _graph((aten.mul.Tensor, ("in0", "in1")), inputs=2)
    compiled = compile_graph(gm, [torch.ones(4), 5], [{}, {}], "inductor")
    assert compiled.relations == ()
    for number in (0, 1, 5, 1000):
        assert compiled.call(torch.ones(4), number)[0].tolist() == [number] * 4


# a whole model


def _plan(model: VAR) -> Plan:
    rows: Sequence[ScalePlan] = (
        *(ScalePlan(layers=(DENSE, DENSE)),) * 3,
        ScalePlan(layers=(LayerAction("prune", 6), DENSE)),
        ScalePlan(layers=(LayerAction("prune", 9), SKIP)),
    )
    return Plan(model.schedule, 2, tuple(rows))


@pytest.mark.slow
def test_a_generation(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2)
    model.plan = _plan(model)
    dispatch.reset()
    counters.reset()
    labels = torch.tensor([1, 7])
    with pruned(model, model.plan):
        want = model(labels, seed=3)
    fast = torch.compile(model, backend="toprovar")
    with fresh_cache():  # what is in the cache on disk shows no code
        images, codes = run_and_get_code(fast, labels, seed=3)
    torch.testing.assert_close(images, want, **TOLERANCE)
    compiled = {e: n for e, n in counters.snapshot().items() if e.startswith(("compiled", "variant", "fallback"))}
    assert compiled == COMPILED
    attention = [code for code in codes if "fae_cached" in code]
    assert len(attention) == sum(n for e, n in COMPILED.items() if "dense" in e or "prune" in e)
    for code in attention:
        assert "clone" not in code and "copy_" not in code, "the caches are written in place"
    before = counters.snapshot()
    again = fast(labels, seed=4)
    assert counters.snapshot() == before
    with pruned(model, model.plan):
        torch.testing.assert_close(again, model(labels, seed=4), **TOLERANCE)


COMPILED = {
    # The first scale has one token, which is a graph of its own; all later scales share the open one.
    "compiled: dense": 2,
    "compiled: dense with entropy": 1,
    "compiled: prune, cached with entropy": 1,
    "compiled: prune, cached": 1,
    "compiled: skip": 1,
    # From weights, from each of two conditions, and from both: the forms of the step share them.
    "compiled: prologue": 4,
    # One for each captured form of the step.
    "compiled: epilogue": 2,
}


# the process around compiling


def test_the_collector_is_paused_until_the_last_thread_leaves() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with paused_collector:
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with pytest.raises(ValueError, match="inside"), paused_collector:
        thread.start()
        assert entered.wait(60)
        with paused_collector:
            assert not gc.isenabled()
        raise ValueError("inside")
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with paused_collector:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["toprovar", "aot_eager"])
def test_the_collector_is_paused_for_this_backend(backend: str, make_var: Callable[..., VAR]) -> None:
    model, seen = make_var(depth=2), set[tuple[str | None, bool]]()

    @torch.compiler.disable(recursive=False)
    def begin(x: torch.Tensor) -> torch.Tensor:
        seen.add((backend_name(eval_frame.get_eval_frame_callback()), gc.isenabled()))
        return x

    step = model.step
    model.step = lambda x, *rest: step(begin(x), *rest)  # type: ignore[method-assign]
    options = {"inner": "eager"} if backend == "toprovar" else None
    torch.compile(model, backend=backend, options=options)(torch.tensor([1]), seed=0)
    assert seen == {(backend, backend != "toprovar")}
    assert gc.isenabled()
