"""The inner compiler: one FX graph in, one callable out. Every import of a private name of torch is here.

A graph is compiled for given inputs, of which some dimensions are left open as symbols. What the compiler assumed about
them comes back as sympy relations, for the dispatcher to check before each use: nothing that was assumed is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from toprovar_compile.errors import MissingCompilerError, OptionError

Inner = Literal["inductor", "eager"]
INNERS: tuple[Inner, ...] = ("inductor", "eager")


@dataclass(frozen=True)
class Compiled:
    """Compiled code. `call` takes the inputs and returns the outputs as a sequence.

    `relations` hold whenever it may be called, in the symbols named at compilation; `seconds` is what compiling took.
    """

    call: Callable[..., Sequence[Any]]
    relations: tuple[sympy.Basic, ...]
    seconds: float


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Tensor | int],
    open_dims: Sequence[Mapping[int, str]],
    inner: Inner,
    hints: Mapping[str, int] | None = None,
) -> Compiled:
    """Compile `gm` for inputs like `inputs`; `open_dims[i]` names the dimensions of input i whose size is left open.

    Equal names are equal sizes; `hints` are the sizes to optimise for, those of `inputs` where it names none. Integer
    inputs are always open, and never assumed to differ from 0 or 1. Tensors with open dimensions other than the first
    must be contiguous. Raises MissingCompilerError when code cannot be built on this machine.
    """
    if inner not in INNERS:
        raise OptionError(f"inner is {inner!r}", where="options", expected="one of " + ", ".join(INNERS))
    start = time.perf_counter()
    if inner == "eager":
        return Compiled(gm.forward, (), time.perf_counter() - start)
    # Called while a compiled graph runs, this thread's dispatcher is in that graph's state (below autograd, autocast
    # off), in which nothing can be traced. A new thread starts in the default state.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="toprovar-compile") as thread:
        call, relations = thread.submit(_compile, gm, inputs, open_dims, hints or {}).result()
    return Compiled(call, relations, time.perf_counter() - start)


def _compile(
    gm: GraphModule, inputs: Sequence[Tensor | int], open_dims: Sequence[Mapping[int, str]], hints: Mapping[str, int]
) -> tuple[Callable[..., Sequence[Any]], tuple[sympy.Basic, ...]]:
    from torch._inductor.compile_fx import compile_fx

    device = next((v.device for v in inputs if isinstance(v, Tensor) and v.is_cuda), None)
    if device is not None:
        torch.cuda.set_device(device)
    shape_env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shape_env)
    symbols: dict[str, torch.SymInt] = {}
    fakes = [
        _fake(value, dims, mode, shape_env, symbols, f"i{i}", hints)
        for i, (value, dims) in enumerate(zip(inputs, open_dims, strict=True))
    ]
    try:
        with torch.no_grad(), tracing(TracingContext(mode)):
            call: Any = compile_fx(gm, fakes)
    except Exception as error:
        _explain_failure(error)
        raise
    names = {s.node.expr: sympy.Symbol(name, integer=True) for name, s in symbols.items()}
    found = [guard.expr for guard in shape_env.guards]
    for name, s in symbols.items():
        lower = shape_env.var_to_range[s.node.expr].lower if s.node.expr in shape_env.var_to_range else None
        if lower is not None and lower.is_finite and lower > 0:
            found.append(sympy.Ge(sympy.Symbol(name, integer=True), lower))
    relations = tuple(dict.fromkeys(e.xreplace(names) for e in found if e is not sympy.true))
    return call, relations


def compile_plain(gm: GraphModule, inputs: Sequence[Any], inner: Inner) -> Callable[..., Any]:
    """Compile a captured graph as `torch.compile` would without this package."""
    if inner == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    try:
        call: Any = compile_fx(gm, list(inputs))
        return call  # type: ignore[no-any-return]
    except Exception as error:
        _explain_failure(error)
        raise


def _fake(
    value: Tensor | int,
    dims: Mapping[int, str],
    mode: FakeTensorMode,
    shape_env: ShapeEnv,
    symbols: dict[str, torch.SymInt],
    name: str,
    hints: Mapping[str, int],
) -> Any:
    if not isinstance(value, Tensor):
        return _symbol(shape_env, symbols, name, value, anything=True)
    if not dims:
        return mode.from_tensor(value, static_shapes=True)
    sizes: list[int | torch.SymInt] = [
        _symbol(shape_env, symbols, dims[d], hints.get(dims[d], n)) if d in dims else n
        for d, n in enumerate(value.shape)
    ]
    with mode:
        if value.is_contiguous():
            return torch.empty(sizes, dtype=value.dtype, device=value.device)
        # An open batch dimension in front leaves the strides as they are.
        return torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=value.device)


def _symbol(
    shape_env: ShapeEnv, symbols: dict[str, torch.SymInt], name: str, hint: int, *, anything: bool = False
) -> torch.SymInt:
    if name not in symbols:
        source = ConstantSource(f"toprovar_{name}")
        expr = shape_env.create_symbol(
            hint, source, DimDynamic.DYNAMIC, None, positive=True, do_not_specialize_zero_one=anything
        )
        made = shape_env.create_symintnode(expr, hint=hint, source=source)
        assert isinstance(made, torch.SymInt)
        symbols[name] = made
    return symbols[name]


def _explain_failure(error: BaseException) -> None:
    """Raise MissingCompilerError when the failure is a missing C++ compiler."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("InvalidCxxCompiler", "CppCompileError") or "No working C++ compiler" in str(cause):
            raise MissingCompilerError(
                f"code generation failed: {str(cause).strip().splitlines()[0]}",
                where="torch._inductor",
                expected="a working C++ compiler (g++ or clang++)",
                todo="install one (Debian: apt-get install g++), or use options={'inner': 'eager'}",
            ) from error
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
