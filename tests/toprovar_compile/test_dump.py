"""What the compiler writes down is there, readable, and can be read back."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import symbolic_trace

from toprovar_compile.dump import Dump
from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan

LABELS = torch.tensor([1, 7])


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dump.open(None).graph("captured", symbolic_trace(torch.nn.Linear(2, 2)))
    assert list(tmp_path.iterdir()) == []


def test_graphs_are_numbered(tmp_path: Path) -> None:
    first, second = Dump.open(tmp_path), Dump.open(tmp_path)
    assert first.folder is not None and second.folder is not None and first.folder != second.folder
    for name in ("captured", "functional"):
        first.graph(name, symbolic_trace(torch.nn.Linear(2, 2)))
    files = sorted(first.folder.iterdir())
    assert [f.name for f in files] == ["000_captured.py", "001_functional.py"]
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"))
    assert list(second.folder.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot write dumps.*expected a directory that can be written"):
        Dump.open(tmp_path / "file")


def test_a_generation(make_var: Callable[..., VAR], tmp_path: Path) -> None:
    model = make_var(depth=2)
    plan = Plan.keep_share(model.schedule, 2, 0.5, 3, bucket=2)
    options = {"plan": plan, "inner": "eager", "dump": str(tmp_path)}
    torch.compile(model, backend="toprovar", options=options)(LABELS, seed=0)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3, "one for each form of the step; the decoder has no step"
    for folder in folders:
        names = [f.name.split("_", 1)[-1] for f in sorted(folder.iterdir())]
        layers = [n for n in names if n.startswith("layer_")]
        assert len(layers) == 1
        assert names == [
            "captured.py",
            "functional.py",
            "prologue.py",
            *layers,
            "epilogue.py",
            "guards.txt",
            "plan.json",
        ]
        for file in folder.glob("*.py"):
            ast.parse(file.read_text(encoding="utf-8"))
        assert Plan.load(folder / "plan.json") == plan
    captured = (folders[2] / "000_captured.py").read_text(encoding="utf-8")
    assert captured.count("torch.ops.toprovar.fae.default(") == 2, "after attention was rewritten"
    assert "fae_cached" in next(folders[2].glob("*layer_*")).read_text(encoding="utf-8")
    guards = (folders[2] / "guards.txt").read_text(encoding="utf-8").splitlines()
    assert guards[:3] == [f"Eq(n, {n}) & plan {plan.digest()}: 1 hits" for n in (9, 16, 36)]
    assert any("prune, cached: 2 runs" in line for line in guards)
