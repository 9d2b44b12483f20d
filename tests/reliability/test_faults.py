"""Faults around the compiler: each ends in a right image or a typed error, and the next call works.

Damaged plan and measurement files, a missing Triton, a missing C++ compiler at one operator and an exception in
mid-generation have their tests beside the modules concerned; many images in a row are in test_many_images.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_cache

from toprovar_compile import dispatch, files
from toprovar_compile.cuda_graph import Lane, Scale, lanes
from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.kernels import fae, fae_cpu, fae_reference
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.report import counters
from toprovar_compile.session import current_session

LABELS = torch.tensor([1, 7])
# Where entropy is measured, attention is another kernel: sums in another order.
TOLERANCE = {"rtol": 0.0, "atol": 5e-6}
Q, K, V = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


def works(fast: Callable[..., Tensor], images: Tensor) -> None:
    """The next generation is right and nothing of an earlier one is left."""
    assert current_session() is None
    torch.testing.assert_close(fast(LABELS, seed=3), images, **TOLERANCE)
    assert current_session() is None


# the C++ kernel and its cache


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that the C++ kernel is kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fae_cpu.compiled.cache_clear()
    yield tmp_path / "toprovar_compile"
    fae_cpu.compiled.cache_clear()


def attention_is_right() -> None:
    fae_cpu.compiled.cache_clear()
    for got, want in zip(fae(Q, K, V, None, 0.25, True), fae_reference(Q, K, V, None, 0.25), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process: its exit status, minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@needs_compiler
@pytest.mark.parametrize("damage", ["half of it", "foreign", "empty"])
def test_a_damaged_kernel_in_the_cache_is_built_anew(kernel_cache: Path, damage: str) -> None:
    attention_is_right()
    (library,) = kernel_cache.glob("fae_*.so")
    whole = library.read_bytes()
    library.unlink()  # it is loaded in this process
    library.write_bytes({"half of it": whole[: len(whole) // 2], "foreign": b"MZ" + bytes(5000), "empty": b""}[damage])
    assert in_a_child(attention_is_right) == 0
    assert fae_cpu._is_whole(library)


@needs_compiler
def test_killed_while_the_kernel_is_written(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", die)
    assert in_a_child(attention_is_right) == -signal.SIGKILL
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache.parent))
    assert list(kernel_cache.glob("fae_*.so")) == []
    attention_is_right()
    assert len(list(kernel_cache.glob("fae_*.so"))) == 1


@needs_compiler
@pytest.mark.parametrize("call", ["TemporaryDirectory", "replace"])
def test_a_kernel_cache_that_cannot_be_written(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    if call == "replace":
        monkeypatch.setattr(fae_cpu.os, "replace", _read_only)
    else:
        folder = fae_cpu.tempfile.TemporaryDirectory
        monkeypatch.setattr(fae_cpu.tempfile, "TemporaryDirectory", lambda dir=None: _read_only() if dir else folder())
    attention_is_right()
    assert fae_cpu.compiled() is not None
    assert list(kernel_cache.glob("fae_*.so")) == [] or call != "replace"


def _read_only(*_: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@needs_compiler
def test_two_processes_build_the_kernel_at_once(kernel_cache: Path) -> None:
    code = (
        "import sys, torch; from toprovar_compile.kernels import fae, fae_cpu\n"
        "torch.set_num_threads(1); sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "q = torch.arange(288.0).view(1, 2, 9, 16).sin()\n"
        "out, entropy = fae(q, q, q, None, 0.25, True)\n"
        "assert fae_cpu.compiled() is not None; print(out.double().sum().item(), entropy.double().sum().item())"
    )
    pipe = subprocess.PIPE
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(list(kernel_cache.glob("fae_*.so"))) == 1
    assert [path for path in kernel_cache.iterdir() if path.is_dir()] == []


@needs_compiler
def test_threads_build_the_kernel_at_once(kernel_cache: Path) -> None:
    start, found = threading.Barrier(3), []

    def work() -> None:
        start.wait()
        found.append(fae_cpu.compiled())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and None not in found
    attention_is_right()


# files


def test_killed_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_json(tmp_path / "result.json", {"old": 1})
    monkeypatch.setattr(os, "replace", die)
    assert in_a_child(lambda: files.write_json(path, {"new": 2}) and None) == -signal.SIGKILL
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1}
    files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_json(tmp_path / "result.json", {"old": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OptionError, match="No space left on device"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", ["{", '{"version": 99}'])
def test_a_damaged_plan_file_is_a_typed_error(
    fast: Callable[..., Tensor], images: Tensor, model: VAR, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    compiled = torch.compile(model, backend="toprovar", options={"inner": "eager", "plan": str(path)})
    with pytest.raises(BackendCompilerFailed, match=r"PlanError: .*plan\.json"):
        compiled(LABELS, seed=3)
    works(fast, images)


def test_a_plan_file_of_another_depth_is_a_typed_error(
    fast: Callable[..., Tensor], images: Tensor, model: VAR, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    Plan.keep_share(model.schedule, 7, 0.5, 4).save(path)
    compiled = torch.compile(model, backend="toprovar", options={"inner": "eager", "plan": str(path)})
    with pytest.raises(PlanError, match="num_layers 7, the model has 2"):
        compiled(LABELS, seed=3)
    works(fast, images)


# the inner compiler and its cache


_COMPILES = (
    "import torch; from torch import nn; from torch.fx import Graph, GraphModule\n"
    "from toprovar_compile.inductor import compile_graph\n"
    "g = Graph(); x = g.placeholder('x'); g.output((g.call_function(torch.ops.aten.exp.default, (x,)),))\n"
    "run = compile_graph(GraphModule(nn.Module(), g), [torch.ones(8)], [{0: 'n'}], 'inductor').call\n"
    "assert torch.allclose(run(torch.ones(9))[0], torch.ones(9).exp())"
)
_DIES = "import os, signal; os.rename = os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
"""A process that is killed when it puts the first file in its place."""


def compiling(cache: Path, first: str = "") -> subprocess.Popen[str]:
    """A fresh process, as the cache in memory would hide the one on disk, that compiles a graph after code `first`."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", first + _COMPILES], env=env, stdout=pipe, stderr=pipe, text=True)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and errors of a process."""
    errors = process.communicate(timeout=200)[1]
    return process.returncode, errors


@needs_compiler
@pytest.mark.slow
def test_killed_compiled_twice_at_once_and_damaged(tmp_path: Path) -> None:
    """One cache of the inner compiler through all of it: each step finds what the one before has left."""
    assert end_of(compiling(tmp_path, _DIES))[0] == -signal.SIGKILL
    both = [compiling(tmp_path), compiling(tmp_path)]
    for status, errors in map(end_of, both):
        assert status == 0, errors[-2000:]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".so" for path in written)
    for path in written:
        path.write_bytes(b"not what was written")
    status, errors = end_of(compiling(tmp_path))
    assert status == 0 or "toprovar_compile.errors" in errors, errors[-2000:]


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_an_inductor_cache_that_cannot_be_written_is_a_typed_error() -> None:
    status, errors = end_of(compiling(Path("/proc")))
    assert status == 1
    assert "OptionError: generated code cannot be written" in errors and "set TORCHINDUCTOR_CACHE_DIR" in errors


@pytest.mark.slow
def test_without_a_compiler_a_generation_is_a_typed_error() -> None:
    code = (
        "import torch; from toprovar_compile.errors import MissingCompilerError\n"
        "from toprovar_compile.models.var import VAR, VARConfig\n"
        "from toprovar_compile.models.vqvae import VQVAEConfig\n"
        "vae = VQVAEConfig(64, 8, 32, (1, 2), num_res_blocks=1, patch_nums=(1, 2, 3))\n"
        "model = VAR(VARConfig(2, 32, 2, num_classes=10, shared_aln=True, vae=vae)).eval().requires_grad_(False)\n"
        "try: torch.compile(model, backend='toprovar')(torch.tensor([1]), seed=0)\n"
        "except Exception as error:\n"
        "    while error is not None and not isinstance(error, MissingCompilerError):\n"
        "        error = error.__cause__ or getattr(error, 'inner_exception', None)\n"
        "    print(error)\n"
        "torch.compiler.reset()\n"
        "images = torch.compile(model, backend='toprovar', options={'inner': 'eager'})(torch.tensor([1]), seed=0)\n"
        "print(tuple(images.shape), bool(images.isfinite().all()))"
    )
    with fresh_cache():
        env = {**os.environ, "CXX": "no-such-compiler", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=env, check=False, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "expected a working C++ compiler" in done.stdout and done.stdout.endswith(" True\n"), done.stdout


# a generation that is stopped


def interrupted_at(model: VAR, name: str, scale: int, fault: Callable[[], None]) -> Any:
    """Lets `fault` happen in `model.<name>` at this call of it."""
    original, calls = getattr(model, name), []

    @torch.compiler.disable
    def run(*args: Any, **how: Any) -> Any:
        calls.append(0)
        if len(calls) == scale:
            fault()
        return original(*args, **how)

    return run


def _control_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("scale", [1, 4])
def test_keyboard_interrupt_in_mid_generation(
    fast: Callable[..., Tensor], model: VAR, images: Tensor, scale: int
) -> None:
    model._advance = interrupted_at(model, "_advance", scale, _control_c)  # type: ignore[method-assign]
    idle = len(lanes._idle)
    try:
        with pytest.raises(KeyboardInterrupt):
            fast(LABELS, seed=3)
    finally:
        del model._advance
    assert len(lanes._idle) == idle
    works(fast, images)


def test_keyboard_interrupt_while_a_layer_runs(
    fast: Callable[..., Tensor], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = dispatch.Unit.run, []

    def stop_at_the_ninth(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(dispatch.Unit, "run", stop_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        fast(LABELS, seed=3)
    monkeypatch.undo()
    works(fast, images)


def test_stopped_while_a_variant_is_compiled(model: VAR, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    dispatch.reset()
    original = dispatch.compile_graph
    left = [5]

    def compile_some(*args: Any, **how: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt("while a variant is compiled")
        return original(*args, **how)

    monkeypatch.setattr(dispatch, "compile_graph", compile_some)
    compiled: Any = compile_steps(model, {"inner": "eager"})
    with pytest.raises(KeyboardInterrupt, match="while a variant is compiled"):
        compiled(LABELS, seed=3)
    works(compiled, images)


def test_an_exception_in_the_users_step(model: VAR, fast: Callable[..., Tensor], images: Tensor) -> None:
    step, calls = model.step, []

    def failing(x: Tensor, *rest: Any) -> Any:
        calls.append(x.shape[1])
        if x.shape[1] == 9:
            raise ValueError("the user's own")
        return step(x, *rest)

    model.step = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(Exception, match="the user's own"):
            compile_steps(model, {"inner": "eager"})(LABELS, seed=3)
        assert current_session() is None
    finally:
        del model.step
    works(fast, images)


def test_a_generation_in_a_forked_process(fast: Callable[..., Tensor], images: Tensor) -> None:
    works(fast, images)
    assert in_a_child(lambda: works(fast, images)) == 0
    works(fast, images)


def test_threads_of_which_one_fails(fast: Callable[..., Tensor], images: Tensor) -> None:
    start, found, failed = threading.Barrier(2), [], []

    def good() -> None:
        start.wait()
        found.extend(fast(LABELS, seed=3) for _ in range(3))

    def bad() -> None:
        start.wait()
        for _ in range(3):
            try:
                fast(torch.tensor([1, 10_000]), seed=3)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=good), threading.Thread(target=bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(failed) == 3
    for got in found:
        torch.testing.assert_close(got, images, **TOLERANCE)
    works(fast, images)


def test_threads_that_compile_at_once(model: VAR, images: Tensor) -> None:
    torch.compiler.reset()
    dispatch.reset()
    compiled: Any = compile_steps(model, {"inner": "eager"})
    start, found = threading.Barrier(2), []

    def work() -> None:
        start.wait()
        found.append(compiled(LABELS, seed=3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for got in found:
        torch.testing.assert_close(got, images, **TOLERANCE)
    works(compiled, images)


# graphs of a device


def test_out_of_memory_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphs:
        """Stands in for the device, which runs out of memory."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graphs)
    monkeypatch.setattr(torch.cuda, "graph", Graphs)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    lane, weight, state, runs = Lane(), torch.tensor(3.0), [0], []

    def run(args: Any) -> list[Tensor]:
        runs.append(state[0])
        state[0] += 1
        if len(runs) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [args[0] * args[1]]

    scale = Scale(("step", 0), run, lambda: list(state), lambda saved: state.__setitem__(slice(None), saved), [0])
    for i in range(4):
        assert lane.run(scale, [torch.tensor(float(i)), weight])[0].item() == 3.0 * i
    assert runs == [0, 1, 1, 2, 3], "the state is that of before, and capturing is not tried again"
    (event,) = (e for e in counters.snapshot() if e.startswith("fallback"))
    assert "CUDA graph capture failed" in event and "out of memory" in event
