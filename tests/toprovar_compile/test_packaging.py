"""The wheel that is built, and what importing the package needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_BLOCKED = (
    "triton", "typer", "click", "rich", "pydantic", "PIL", "safetensors", "sympy", "numpy", "torchmetrics", "skimage",
    "matplotlib", "jinja2", "huggingface_hub",
)  # fmt: skip

# torch itself may use some of the blocked packages, so it is imported first.
_IMPORT = f"""
import sys
import torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED!r}:
            raise ImportError("blocked: " + name)
for name in list(sys.modules):
    if name.partition(".")[0] in {_BLOCKED!r}:
        del sys.modules[name]
sys.meta_path.insert(0, Block())
import toprovar_compile
from toprovar_compile import Plan, ScaleSchedule, errors
Plan.dense(ScaleSchedule.from_patch_nums((1, 2)), 2)
print("ok", toprovar_compile.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built, without network, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = ("toprovar_compile", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
        return [*archive.namelist(), *text.splitlines()]


def test_passes_and_kernels_are_inside_the_package(wheel: list[str]) -> None:
    for name in ("passes", "kernels"):
        own = {p.relative_to(ROOT).as_posix() for p in (ROOT / name).glob("*.py")}
        assert {f"toprovar_compile/{path}" for path in own} <= set(wheel)


def test_nothing_else_is_installed(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel if "/" in name}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"toprovar_compile"}


def test_all_modules_are_there(wheel: list[str]) -> None:
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "toprovar_compile").rglob("*.py")}
    assert own <= set(wheel)
    assert "toprovar_compile/py.typed" in wheel


def test_weights_travel(wheel: list[str]) -> None:
    folder = "toprovar_compile/models/weights/emoji_var"
    assert f"{folder}/config.json" in wheel
    assert any(name.startswith(folder) and name.endswith(".safetensors") for name in wheel)


def test_entry_points(wheel: list[str]) -> None:
    assert "toprovar = toprovar_compile.backend:toprovar" in wheel
    assert "toprovar = toprovar_compile.cli:app" in wheel


def test_licences_travel(wheel: list[str]) -> None:
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in wheel}


def test_importing_needs_only_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ok"), done.stderr


def test_importing_does_not_load_the_compiler() -> None:
    code = "import sys, toprovar_compile; print('torch._inductor' in sys.modules, 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_constraints_pin_what_the_project_names() -> None:
    import tomllib

    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = whole["project"]
    extras = project["optional-dependencies"]
    named = whole["build-system"]["requires"] + project["dependencies"]
    named += [d for extra in ("metrics", "plots", "report", "tune", "dev") for d in extras[extra]]
    direct = {d.split(">=")[0].lower() for d in named if not d.startswith("toprovar_compile")}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert {line.split("==")[0] for line in lines} == direct


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYTHON": "/bin/false"}, "Python 3.11 or newer is needed"),
        ({"PYTHON": "{no_venv}"}, "apt install python3-venv"),
        ({"PYTHON": sys.executable, "CXX": "no-such-compiler"}, "apt install g++"),
    ],
)
def test_set_up_says_what_is_missing(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    no_venv = tmp_path / "python"
    no_venv.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    no_venv.chmod(0o755)
    given = {key: value.format(no_venv=no_venv) for key, value in settings.items()}
    command = ["bash", str(ROOT / "scripts" / "setup_env.sh"), str(tmp_path / "venv")]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()
