"""What this machine can do for toprovar_compile, and what is missing for more."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toprovar_compile.errors import ToproVarError

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "note", "missing"]

MINIMUM_TORCH = (2, 11)
MINIMUM_PYTHON = (3, 11)
_OPTIONAL = {
    "matplotlib": ("plots of benchmarks", "pip install 'toprovar_compile[plots]'"),
    "jinja2": ("HTML reports", "pip install 'toprovar_compile[report]'"),
    "huggingface_hub": ("downloading official checkpoints", "pip install 'toprovar_compile[hub]'"),
}
_PROBE = """
#include <Python.h>
#include <omp.h>
extern "C" int probe() { int n = 0;
#pragma omp parallel for reduction(+ : n)
for (int i = 0; i < 8; ++i) n += i; return n + omp_get_max_threads() + PY_MAJOR_VERSION; }
"""


@dataclass(frozen=True)
class Check:
    """One finding. `required` marks what the demo cannot run without; `todo` says how to get what is missing."""

    name: str
    status: Status
    detail: str
    todo: str = ""
    required: bool = False


def examine() -> list[Check]:
    """Look at this machine; every check is made, whatever the others find (without torch, those that need none)."""
    checks = _python() + _torch() + _compiler() + _cache()
    if checks[1].status == "ok":
        for probe in (_devices, _triton, _attention, _backend, _metrics, _models):
            checks += probe()
    return checks + list(_optional_packages(importlib.metadata.version))


def demo_can_run(checks: list[Check]) -> bool:
    """Whether nothing that the demo needs is missing."""
    return not any(c.required and c.status == "missing" for c in checks)


def show(checks: list[Check], console: Console) -> None:
    """Print the findings as a table, what is missing first said in one line."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        text = check.detail if check.status == "ok" or not check.todo else f"{check.detail}\n-> {check.todo}"
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", check.name, escape(text))
    console.print(table)
    if demo_can_run(checks):
        console.print("[green]The demo can run here.[/]")
    else:
        names = ", ".join(c.name for c in checks if c.required and c.status == "missing")
        console.print(f"[red]The demo cannot run here; missing: {escape(names)}.[/]")


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The findings as JSON data."""
    return {"demo_can_run": demo_can_run(checks), "checks": [asdict(c) for c in checks]}


def _python() -> list[Check]:
    found = sys.version_info[:2]
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if found < MINIMUM_PYTHON:
        return [Check("Python", "missing", text, "install Python 3.11 or newer", required=True)]
    return [Check("Python", "ok", text, required=True)]


def _torch() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "missing", str(error), "pip install 'torch>=2.11'", required=True)]
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if number < MINIMUM_TORCH:
        return [Check("torch", "missing", torch.__version__, "pip install --upgrade 'torch>=2.11'", required=True)]
    return [Check("torch", "ok", torch.__version__, required=True)]


def _devices() -> list[Check]:
    import torch

    from toprovar_compile.measure import cpu_name

    cores = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
    checks = [Check("CPU", "ok", cores + torch.backends.cpu.get_cpu_capability(), required=True)]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(i)
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            name = f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB, sm_{capability[0]}{capability[1]}"
            if capability < (8, 0):
                checks.append(Check(f"GPU {i}", "note", name, "below sm_80 there is no bfloat16: float16 is used"))
            else:
                checks.append(Check(f"GPU {i}", "ok", name))
    elif torch.version.cuda is None and _nvidia_smi():
        todo = "an NVIDIA GPU is here, but this torch is a CPU build: install torch from PyPI"
        checks.append(Check("GPU", "note", "not usable", todo))
    else:
        checks.append(Check("GPU", "note", "none: everything runs on the CPU"))
    return checks


def _nvidia_smi() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _compiler() -> list[Check]:
    compiler = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    checks = []
    if headers.exists():
        checks.append(Check("Python headers", "ok", str(headers.parent), required=True))
    else:
        todo = f"install them (Debian, Ubuntu: sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        checks.append(Check("Python headers", "missing", f"no {headers}", todo, required=True))
    plain = compile_error(compiler, 'extern "C" int probe() { return 1; }\n', [])
    if plain is not None:
        todo = "install one (Debian, Ubuntu: sudo apt install g++) or name one in the environment variable CXX"
        return [Check("C++ compiler", "missing", plain, todo, required=True), *checks]
    checks.insert(0, Check("C++ compiler", "ok", f"{compiler}: {_first_line([compiler, '--version'])}", required=True))
    if headers.exists():
        full = compile_error(compiler, _PROBE, ["-fopenmp", f"-I{headers.parent}"])
        if full is None:
            checks.append(Check("OpenMP", "ok", "compiles and links", required=True))
        else:
            todo = "install the OpenMP library of the compiler (g++ has it; clang: sudo apt install libomp-dev)"
            checks.append(Check("OpenMP", "missing", full, todo, required=True))
    return checks


def compile_error(compiler: str, source: str, flags: list[str]) -> str | None:
    """Compile `source` into a shared library: None when that works, else the first line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        command = [*compiler.split(), "-shared", "-fPIC", *flags, str(path), "-o", str(path.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        except FileNotFoundError:
            return f"{compiler} was not found"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} does not run: {error}"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"{compiler} failed")


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "version unknown"


def _cache() -> list[Check]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        todo = "set TORCHINDUCTOR_CACHE_DIR to a folder that you can write"
        return [Check("compilation cache", "missing", f"{folder}: {error.strerror}", todo, required=True)]
    return [Check("compilation cache", "ok", f"{folder} can be written", required=True)]


def cache_folder() -> Path:
    """Where Inductor keeps compiled code."""
    import getpass

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named:
        return Path(named)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def _triton() -> list[Check]:
    import torch

    gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        if gpu:
            todo = "install a CUDA build of torch from PyPI, which brings its Triton"
            return [Check("Triton", "missing", "not installed", todo, required=True)]
        return [Check("Triton", "note", "not installed: only GPUs need it")]
    return [Check("Triton", "ok", importlib.metadata.version("triton"), required=gpu)]


def _attention() -> list[Check]:
    import torch

    from toprovar_compile.measure import attention_kernel, pick_device

    checks = [Check("attention without entropy", "ok", attention_kernel(pick_device()))]
    try:
        importlib.import_module("toprovar_compile.kernels")
        operator = str(torch.ops.toprovar.fae.default)
    except (ImportError, AttributeError) as error:
        todo = "install toprovar_compile again: its kernels package is incomplete"
        return [*checks, Check("attention with entropy", "missing", str(error), todo, required=True)]
    kernel = "Triton kernel" if torch.cuda.is_available() else "CPU kernel"
    flash = "installed" if importlib.util.find_spec("flash_attn") else "not installed"
    return [
        *checks,
        Check("attention with entropy", "ok", f"{operator}, {kernel}", required=True),
        Check("flash-attn package", "ok", f"{flash}, and not needed"),
    ]


def _backend() -> list[Check]:
    import torch

    if "toprovar" not in torch.compiler.list_backends():
        todo = "install the package with pip (an entry point registers the backend)"
        return [Check("backend", "missing", "torch does not know the backend toprovar", todo, required=True)]
    try:
        importlib.import_module("toprovar_compile.backend")
    except ImportError as error:
        todo = "install what is named, or toprovar_compile again"
        return [Check("backend", "missing", str(error), todo, required=True)]
    return [Check("backend", "ok", 'torch.compile(..., backend="toprovar") works', required=True)]


def _metrics() -> list[Check]:
    if importlib.util.find_spec("torchmetrics") is None:
        todo = "pip install 'toprovar_compile[metrics]'"
        return [Check("torchmetrics", "missing", "the demo compares images with it", todo, required=True)]
    return [Check("torchmetrics", "ok", importlib.metadata.version("torchmetrics"), required=True)]


def _models() -> list[Check]:
    from toprovar_compile import models

    checks = []
    for name in models.names():
        try:
            model = models.load(name)
        except (ToproVarError, OSError) as error:
            todo = "install toprovar_compile again: its weights are incomplete"
            checks.append(Check(f"model {name}", "missing", str(error), todo, required=True))
            continue
        size = sum(p.numel() for p in model.parameters()) / 1e6
        checks.append(Check(f"model {name}", "ok", f"{size:.1f} M parameters, {model.fingerprint()}", required=True))
    if not checks:
        checks.append(Check("models", "missing", "no weights are shipped", "install the released wheel", required=True))
    return checks


def _optional_packages(version: Callable[[str], str]) -> Iterator[Check]:
    for package, (purpose, todo) in _OPTIONAL.items():
        try:
            yield Check(package, "ok", version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "note", f"not installed; for {purpose}", todo)
