import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from toprovar_compile import doctor
from toprovar_compile.cli import app
from toprovar_compile.doctor import Check


def test_a_working_compiler_leaves_no_error() -> None:
    assert doctor.compile_error("g++", 'extern "C" int f() { return 1; }\n', []) is None


def test_a_broken_source_or_compiler_is_said() -> None:
    assert "error" in (doctor.compile_error("g++", "int f( {", []) or "")
    assert doctor.compile_error("no-such-compiler", "", []) == "no-such-compiler was not found"


def test_without_a_compiler_the_demo_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    checks = {c.name: c for c in doctor.examine()}
    assert checks["C++ compiler"].status == "missing"
    assert "apt install g++" in checks["C++ compiler"].todo
    assert "OpenMP" not in checks
    assert not doctor.demo_can_run(list(checks.values()))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "cannot run here" in result.output


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (check,) = (c for c in doctor.examine() if c.name == "compilation cache")
    assert check.status == "missing"
    assert "TORCHINDUCTOR_CACHE_DIR" in check.todo


def test_every_missing_thing_says_what_to_do() -> None:
    assert all(c.todo for c in doctor.examine() if c.status == "missing")


def test_the_findings_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    data = json.loads(result.output)
    assert result.exit_code == (0 if data["demo_can_run"] else 1)
    names = {c["name"] for c in data["checks"]}
    assert {"Python", "torch", "C++ compiler", "CPU", "backend", "model emoji-var", "matplotlib"} <= names


def test_what_is_missing_is_printed_with_its_remedy() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    doctor.show([Check("thing", "missing", "not [here]", "install it", required=True)], console)
    text = console.export_text()
    assert "not [here]" in text
    assert "-> install it" in text
    assert "missing: thing" in text


def test_a_note_or_an_optional_thing_does_not_stop_the_demo() -> None:
    assert doctor.demo_can_run([Check("a", "note", "", required=True), Check("b", "missing", "")])


def test_a_gpu_without_a_cuda_build_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 0, "g++ 12", "")

    monkeypatch.setattr(doctor.subprocess, "run", smi)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    (gpu,) = (c for c in doctor.examine() if c.name == "GPU")
    assert "CPU build" in gpu.todo
