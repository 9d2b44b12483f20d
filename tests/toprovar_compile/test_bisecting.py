"""`bisect_passes` finds the stage that makes a check fail."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from toprovar_compile import backend, bisect_passes, bisecting, dispatch, minify
from toprovar_compile.bisecting import STAGES, differs, limited
from toprovar_compile.dump.repro import repro_text
from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.options import Options
from toprovar_compile.passes._base import switched_off
from toprovar_compile.plan import Plan
from toprovar_compile.report import counters


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dispatch.reset()
    yield
    torch._dynamo.reset()
    dispatch.reset()


def _fails_from(stage: str) -> Callable[[Any], bool]:
    return lambda _: stage in switched_off.get()


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_can_be_found(stage: str) -> None:
    found = bisect_passes(lambda: None, _fails_from(stage))
    assert found.stage == stage
    assert str(found).splitlines()[-1] == f"the check fails from {stage} on"
    assert dict(found.tried)[stage] is False


def test_nothing_to_find() -> None:
    assert bisect_passes(lambda: None, lambda _: True).stage is None
    assert bisect_passes(lambda: None, lambda _: False).stage == "eager"
    assert bisect_passes(lambda: 1 / 0, lambda _: True).stage == "eager", "an exception is a failure"


def test_options_without_stages() -> None:
    options = Options.parse({"plan": "auto", "tau": 0.5})
    assert limited(options) is options
    token = switched_off.set(frozenset({bisecting.PRUNING, bisecting.INDUCTOR}))
    try:
        off = limited(options)
    finally:
        switched_off.reset(token)
    assert (off.plan, off.tau, off.inner) == ("dense", None, "eager")


@pytest.mark.slow
def test_stages_are_really_left_out(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2, patch_nums=(2, 3))
    plan = Plan.keep_share(model.schedule, 2, 0.5, 1, bucket=2)

    def run() -> set[str]:
        before = counters.snapshot()
        torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})(torch.tensor([1]), seed=0)
        return {event for event, count in counters.snapshot().items() if count != before.get(event)}

    found = bisect_passes(run, lambda events: not any("prune" in event for event in events))
    assert found.stage == "prune_tokens"
    assert switched_off.get() == frozenset()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.sin(self.first(x).relu() * y) + y
        return self.last(z).softmax(-1), z.cumsum(0)


INPUTS = [torch.arange(8.0).view(2, 4) / 5, torch.linspace(-1, 1, 8).view(2, 4)]


def _targets(module: nn.Module) -> list[str]:
    assert isinstance(module, GraphModule)
    return [node.name for node in module.graph.nodes if node.op not in ("placeholder", "output")]


def test_a_graph_is_cut_down_to_the_part_that_fails() -> None:
    small = minify(Chain(), INPUTS, lambda part, _: any(name.startswith("sin") for name in _targets(part)))
    assert _targets(small.graph) == ["sin"]
    torch.testing.assert_close(small.graph(*small.inputs)[0], torch.sin(small.inputs[0]))


def test_what_does_not_fail_is_not_cut() -> None:
    with pytest.raises(OptionError, match="the graph does not fail"):
        minify(Chain(), INPUTS, lambda *_: False)


def _miscompile_sin(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inner compiler that takes sin for cos."""

    def compile_wrongly(gm: GraphModule, inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
        wrong = GraphModule(gm, gm.graph)
        for node in wrong.graph.nodes:
            if node.op == "call_function" and "sin" in str(node.target):
                node.target = torch.ops.aten.cos.default
        wrong.recompile()
        return wrong.forward

    monkeypatch.setattr(backend, "compile_plain", compile_wrongly)


def test_compiled_and_eager_numbers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain().requires_grad_(False)
    assert not differs(chain, INPUTS, inner="eager")
    _miscompile_sin(monkeypatch)
    assert differs(chain, INPUTS)
    assert _targets(minify(chain, INPUTS).graph) == ["sin"]


def test_the_script_of_a_graph_minifies_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = symbolic_trace(lambda x: (torch.sin(x.relu() + 1).exp(),))
    (tmp_path / "repro.py").write_text(repro_text(graph, [torch.ones(2, 3)], "eager"))
    _miscompile_sin(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["repro.py", "--minify"])
    with torch.no_grad():
        runpy.run_path("repro.py")
        text = (tmp_path / "minified.py").read_text()
        assert "torch.sin(" in text and ".relu(" not in text and ".exp(" not in text
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["minified.py"])
        runpy.run_path("minified.py")
    assert "output 0: (2, 3), largest difference" in capsys.readouterr().out
