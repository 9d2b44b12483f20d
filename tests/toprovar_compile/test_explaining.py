"""The report of `explain`, of a call and of a script, and the difference of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from toprovar_compile import cli, diff, dispatch, explain
from toprovar_compile.errors import OptionError
from toprovar_compile.explaining import Report, explain_script
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.report import GraphReport, counters, ran


@pytest.fixture(autouse=True)
def _fresh() -> None:
    counters.reset()
    torch._dynamo.reset()
    dispatch.reset()


def test_explain_sees_what_runs_during_the_call() -> None:
    before, during = GraphReport("plain", "before"), GraphReport("step", "during")
    ran(before)
    counters.add("old")

    def call(a: int, *, b: int) -> int:
        for _ in range(2):
            ran(during)
        counters.add("old")
        counters.add("new", "why", 3)
        return a + b

    report = explain(call, 1, b=2)
    assert report.result == 3
    assert report.graphs == (during,)
    assert report.events == {"old": 1, "new: why": 3}


def test_nested_explain() -> None:
    graph = GraphReport("plain", "inner")
    outer = explain(lambda: explain(ran, graph))
    assert outer.graphs == outer.result.graphs == (graph,)


def test_explain_passes_exceptions_on() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        explain(fail)
    assert explain(lambda: None).graphs == ()


def test_text() -> None:
    step = GraphReport(
        "step",
        "one scale",
        ["rewrite_attention: 3 rewritten"],
        [("blocks.0", "ab", "proven"), ("blocks.1", "ab", "proven"), ("blocks.2", "cd", "not pruned: mean")],
        lambda: ["dense: 2 runs"],
        lambda: ["Eq(n, 4): 1 hits"],
    )
    assert str(Report((step,), {"z": 1, "a: b": 2})).splitlines() == [
        "graph 0: step (one scale)",
        "  pass rewrite_attention: 3 rewritten",
        "  layer class ab: 2 layers, blocks.0 to blocks.1; proven",
        "  layer class cd: 1 layers, blocks.2 to blocks.2; not pruned: mean",
        "  guard Eq(n, 4): 1 hits",
        "  variant dense: 2 runs",
        "events:",
        "  2 x a: b",
        "  1 x z",
    ]
    assert str(Report((), {})) == "events: none"


def test_a_generation_and_the_difference_to_the_next(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2)
    plan = Plan.keep_share(model.schedule, 2, 0.5, 3, layers=[1], bucket=2)
    fast = torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})
    labels = torch.tensor([1])
    first = explain(fast, labels, seed=0)
    text = str(first)
    assert first.plan == plan and first.breaks == ()
    assert [f[0] for f in first.frames].count("step") == 2
    assert "recompiled step" in text and "size mismatch" in text
    assert "layer 0 is never pruned. Why: the plan was made by keep_share" in text
    assert "1 x scaled_dot_product_attention" not in text and "attention: 2 x scaled_dot_product_attention" in text
    second = explain(fast, labels, seed=0)
    assert second.frames == () and "+events: none" in diff(first, second)
    third = explain(fast, labels, seed=0)
    assert diff(second, third) == ""


def test_difference_of_plans() -> None:
    from toprovar_compile.schedule import ScaleSchedule

    schedule = ScaleSchedule.from_patch_nums((1, 2, 4))
    pruned = Plan.keep_share(schedule, 2, 0.5, 2, bucket=2)
    lines = diff(pruned, Plan.dense(schedule, 2)).splitlines()
    assert "-scale 2, layer 1: prune 8" in lines and "+scale 2, layer 1: dense" in lines
    assert diff(pruned, replace(pruned, provenance=pruned.provenance)) == ""


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        print("here", end="")
        return x * 2


def test_graph_breaks_name_the_line_and_what_to_do() -> None:
    with torch.no_grad():
        report = explain(torch.compile(Broken(), backend="toprovar", options={"inner": "eager"}), torch.ones(3))
    ((where, reason),) = report.breaks
    assert "test_explaining.py" in where and reason
    assert f"graph break at {where}" in str(report)
    assert "no graph was taken for a step" in str(report) and "a graph break splits a step" in str(report)


def test_a_script_with_arguments(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 4\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom beside import value\nfrom toprovar_compile.report import counters\n"
        "counters.add('script', f'{__name__} {sys.argv[1:]} {value}')\nsys.exit(0)\n"
    )
    report = explain_script(script, ["-n", "1"])
    assert report.events == {"script: __main__ ['-n', '1'] 4": 1}
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit):
        explain_script(script)
    with pytest.raises(OptionError, match="no such script"):
        explain_script(tmp_path / "missing.py")


def test_the_command_hands_arguments_to_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom toprovar_compile.report import counters\ncounters.add('got', ' '.join(sys.argv[1:]))\n"
    )
    result = CliRunner().invoke(cli.app, ["explain", str(script), "--", "--plan", "mine"])
    assert result.exit_code == 0 and "1 x got: --plan mine" in result.output
    assert CliRunner().invoke(cli.app, ["explain", "emoji-var", "more"]).exit_code == cli.EXIT_ERROR
