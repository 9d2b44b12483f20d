"""The inner compiler: one FX graph in, one callable out. Every import of a private name of torch is here.

A graph is compiled for given inputs, of which some dimensions are left open as symbols. What the compiler assumed about
them comes back as sympy relations, for the dispatcher to check before each use: nothing that was assumed is dropped.
"""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import inspect
import logging
import os
import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from functorch.compile import aot_module_simplified
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.decorators import skip
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.source import ConstantSource
from torch._guards import CompileContext, CompileId, TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental import _config as _symbols
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_leaves

from toprovar_compile.errors import MissingCompilerError, OptionError

Inner = Literal["inductor", "eager"]
INNERS: tuple[Inner, ...] = ("inductor", "eager")


@dataclass(frozen=True)
class Compiled:
    """Compiled code. `call` takes the inputs and returns the outputs as a sequence.

    `relations` hold whenever it may be called, in the symbols named at compilation; `seconds` is what compiling took,
    from `started` on the clock `time.perf_counter`.
    """

    call: Callable[..., Sequence[Any]]
    relations: tuple[sympy.Basic, ...]
    seconds: float
    started: float = 0.0


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
        _LazyGraphModule.force_recompile(gm)  # else it would look at each call whether it has to
        return Compiled(gm.forward, (), time.perf_counter() - start, start)
    # Called while a compiled graph runs, this thread's dispatcher is in that graph's state (below autograd, autocast
    # off), in which nothing can be traced. A new thread starts in the default state.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="toprovar-compile") as thread:
        call, relations = thread.submit(_compile, gm, inputs, open_dims, hints or {}).result()
    return Compiled(call, relations, time.perf_counter() - start, start)


def _compile(
    gm: GraphModule, inputs: Sequence[Tensor | int], open_dims: Sequence[Mapping[int, str]], hints: Mapping[str, int]
) -> tuple[Callable[..., Sequence[Any]], tuple[sympy.Basic, ...]]:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.virtualized import V

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
        closed: Any = _symbols.patch(backed_size_oblivious=False)  # type: ignore[attr-defined]
        with torch.no_grad(), closed, tracing(TracingContext(mode)), V.set_choices_handler(_choices()):
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


_MAX_PERSISTENT = 4096  # elements of a row of a norm; Inductor's own bound is 1024


@functools.cache
def _choices() -> Any:
    """Inductor's choices, but that a norm over the width of a transformer reads a row once, as one persistent tile.

    Inductor reads rows of more than 1024 elements twice, in a loop.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            return (
                not cooperative_reduction
                and features.get_reduction_hint() == ReductionHint.INNER
                and V.graph.sizevars.statically_known_leq(features.reduction_numel, _MAX_PERSISTENT)
            )

    return Choices()


def functionalise(gm: GraphModule, values: Sequence[Any]) -> GraphModule | None:
    """The functional ATen graph of a part `gm` of the graph that is being compiled; only forward. None outside of that.

    `values` are its inputs' example values: fake tensors and sizes. What is assumed about them goes to their ShapeEnv.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        return None
    graphs: list[GraphModule] = []

    def keep(functional: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(functional)
        return functional.forward

    with mode, torch.no_grad():
        given = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v
            for v in values
        ]
    with tracing(TracingContext(mode)), torch.no_grad():
        aot_module_simplified(gm, given, fw_compiler=keep, inference_compiler=keep)
    return graphs[0]


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
    """Raise MissingCompilerError for a missing C++ compiler, OptionError for a cache that cannot be written."""
    cause: BaseException | None = error
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # PyTorch sets it where the user does not
    while cause is not None:
        if isinstance(cause, OSError) and cache and str(cause.filename).startswith(cache):
            raise OptionError(
                f"generated code cannot be written: {cause.strerror}",
                where=str(cause.filename),
                expected="a directory that can be written",
                todo="set TORCHINDUCTOR_CACHE_DIR to one, or use options={'inner': 'eager'}",
            ) from error
        if type(cause).__name__ in ("InvalidCxxCompiler", "CppCompileError") or "No working C++ compiler" in str(cause):
            raise MissingCompilerError(
                f"code generation failed: {str(cause).strip().splitlines()[0]}",
                where="torch._inductor",
                expected="a working C++ compiler (g++ or clang++)",
                todo="install one (Debian: apt-get install g++), or use options={'inner': 'eager'}",
            ) from error
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)


class WhileInside:
    """For what is the process's: `begin()` when the first thread enters, `end` of its result when the last leaves."""

    def __init__(self, begin: Callable[[], Any], end: Callable[[Any], None]) -> None:
        self._begin, self._end = begin, end
        self._lock, self._inside, self._before = threading.Lock(), 0, None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._begin()
            self._inside += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._end(self._before)


def _pause_collector() -> bool:
    """Whether it was at work."""
    before = gc.isenabled()
    gc.disable()
    return before


paused_collector = WhileInside(_pause_collector, lambda before: gc.enable() if before else None)
"""Python's cyclic garbage collector does not run. Compiling makes objects by the million, nearly all of which live on:
collections then take a fifth of its time."""


def not_captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in which Dynamo captures nothing but what it calls.

    As torch.compiler.disable(recursive=False), under which Dynamo looks at the function each time it is called.
    """
    return skip(function)


def backend_name(callback: Any) -> str | None:
    """The name of the backend that Dynamo's `callback` compiles by; None where there is none, or it has no name."""
    while callback is not None:
        name = getattr(callback, "compiler_name", None)
        if isinstance(name, str):
            return name
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return None


# what Dynamo checks


@dataclass(frozen=True)
class Frame:
    """What Dynamo compiled: a function's code, and the number of this compilation of it until a reset."""

    code: types.CodeType
    number: CompileId

    def guards(self) -> Guards | None:
        """The guards of this compilation, which has just run."""
        for entry in eval_frame._debug_get_cache_entry_list(self.code):
            if entry.compile_id == self.number:
                return Guards(self.code, entry.code)
        return None


@dataclass(frozen=True)
class Guards:
    """Dynamo's guards of `compiled`, which it made of a function's `code`.

    They are looked up each time: Dynamo drops those of entries whose objects are gone, and entries themselves.
    """

    code: types.CodeType
    compiled: types.CodeType

    def hold(self, method: types.MethodType, args: Sequence[Any]) -> bool:
        """Whether they hold for `method(*args)`, so that what was compiled may be what is run."""
        guards, code = self._guards(), self.code
        if guards is None or method.__func__.__code__ is not code:
            return False
        values = (method.__self__, *args)
        given = code.co_argcount - len(values)
        defaults = method.__func__.__defaults__ or ()
        if code.co_flags & _VARIADIC or code.co_kwonlyargcount or code.co_freevars or not 0 <= given <= len(defaults):
            return False
        values += defaults[len(defaults) - given :]
        return bool(guards.check(dict(zip(code.co_varnames, values, strict=False))))

    def about_model(self) -> str | None:
        """A digest of those that are about the method's object and globals alone, as Dynamo describes them.

        Where it is equal for two compilations, these guards are. Modes are not among them: see `mode_guard`.
        """
        guards = self._guards()
        if guards is None:
            return None
        own = f"L['{self.code.co_varnames[0]}']"
        texts = {re.sub(r"__builtins_dict__\w+", "builtins", text.split("  #")[0]) for text in _described(guards.root)}
        about = sorted(text for text in texts if "L['" not in text.replace(own, ""))
        return hashlib.sha256("\n".join(about).encode()).hexdigest()

    def _guards(self) -> Any:
        for entry in eval_frame._debug_get_cache_entry_list(self.code):
            if entry.code is self.compiled and not isinstance(entry.guard_manager, DeletedGuardManagerWrapper):
                return entry.guard_manager
        return None


def _described(manager: Any) -> Iterator[str]:
    """What Dynamo says of each guard in a tree of them."""
    for guard in manager.get_leaf_guards():
        yield from guard.verbose_code_parts()
    if hasattr(manager, "get_key_value_managers"):  # of a dict
        children = [child for pair in manager.get_key_value_managers().values() for child in pair]
    else:
        children = manager.get_child_managers()
    for child in children:
        if child is not None:
            yield from _described(child)


_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def pure_frame() -> Frame | None:
    """What Dynamo is compiling, for a backend that it calls; None where running it is more than its graph.

    That is so where it changes what was there before (it appends to a list of the caller, sets an attribute), draws
    random numbers in Python, goes on after a graph break, or computes with numbers that its arguments do not hold.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    try:
        tx: Any = InstructionTranslator.current_tx()
    except AttributeError:
        tx = None
    number = CompileContext.current_compile_id()
    if tx is None or number is None:  # not called by Dynamo
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    new = AttributeMutationNew, ValueMutationNew
    changes = any(effects.is_modified(v) and not isinstance(v.mutation_type, new) for v in _tracked(effects))
    if changes or effects.tensor_hooks or effects.save_for_backward or tx.output.random_calls:
        return None
    if reason is None or reason.graph_break or not _sizes_are_of_arguments(tx):
        return None
    return Frame(tx.f_code, number)


def _tracked(effects: Any) -> Iterator[Any]:
    return (v for v in effects.id_to_variable.values() if v.mutation_type is not None)


def _sizes_are_of_arguments(tx: Any) -> bool:
    """Whether the numbers that a captured graph was given are sizes of tensors that are, or lie in, arguments."""
    names = tx.f_code.co_varnames[: tx.f_code.co_argcount]
    own = names[:1] if names[:1] == ("self",) else ()
    for sources in tx.output.shape_env.var_to_sources.values():
        for source in sources:
            name = source.name if isinstance(source.name, str) else source.name()
            argument = re.match(r"L\['(\w+)'\]", name)
            if (
                argument is None
                or argument[1] in own
                or argument[1] not in names
                or not re.search(r"\.(size|stride)\(\)", name)
            ):
                return False
    return True


def tensor_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether they are like these in what Dynamo guards, and no two of them the same.

    That is type, dispatch keys (so inference mode), dtype, device, whether a gradient is wanted, sizes and strides.
    """
    from torch._C._dynamo import guards

    make: Any = guards.TensorGuards
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def mode_guard() -> Callable[[], bool]:
    """A function: whether the modes that Dynamo guards are those of now.

    They are gradients, autocast, determinism, the default dtype, and the modes that intercept functions and operators.
    """
    from torch._C._dynamo.guards import GlobalStateGuard

    guard, now = GlobalStateGuard(), _stacks()
    return lambda: guard.check() and _stacks() == now


def _stacks() -> tuple[Any, ...]:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    operators = _get_current_dispatch_mode_stack()
    return torch.is_inference_mode_enabled(), *map(id, functions), None, *map(id, operators)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def open_lengths(args: Sequence[Any], caches: Sequence[Tensor | None]) -> AbstractContextManager[None]:
    """For a call with `args`, among them caches (B, H, p, D): where p is 1, Dynamo leaves it open all the same.

    Code for it is then what serves other lengths as well; where there is none such, the length is fixed by a guard, as
    ever. No other size of 1 stays open, for whether it broadcasts must be known.
    """
    lengths = {id(t) for t in caches if t is not None and t.shape[2] == 1}
    if not caches or len(lengths) < len(caches):
        return nullcontext()
    tensors = [t for t in tree_leaves(list(args)) if isinstance(t, Tensor)]
    ones: list[tuple[Tensor, list[int]]] = []
    for t in (*tensors, *(t._base for t in tensors if t._base is not None)):
        ones.append((t, [d for d, size in enumerate(t.shape) if size == 1 and (d != 2 or id(t) not in lengths)]))
        if any(not getattr(t, mark, set()).isdisjoint(ones[-1][1]) for mark in _OPEN_MARKS):
            return nullcontext()
    return _OpenLengths([t for t in tensors if id(t) in lengths], ones)


while_marking = compile_lock
"""Held while sizes are marked for Dynamo. It takes marks to be for what it compiles, if another thread is compiling."""

_OPEN_MARKS = ("_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices")
_ALL_MARKS = (*_OPEN_MARKS, "_dynamo_static_indices", "_has_dynamo_dim_marking")


class _OpenLengths:
    """Marks dimensions for Dynamo; what was before is restored, as guards see marks."""

    _lock, _inside, _before = threading.Lock(), 0, False

    def __init__(self, caches: list[Tensor], ones: list[tuple[Tensor, list[int]]]) -> None:
        self._caches, self._ones = caches, ones
        self._marks: list[tuple[Tensor, str, Any]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        tensors = {id(t): t for t in (*self._caches, *(t for t, _ in self._ones))}
        self._marks = [(t, mark, copy.copy(vars(t).get(mark))) for t in tensors.values() for mark in _ALL_MARKS]
        # Older versions of torch hold the setting for a process: the first thread inside knows what it was.
        with while_marking, self._lock:
            for t, dims in self._ones:
                torch._dynamo.mark_static(t, dims)
            for t in self._caches:
                torch._dynamo.maybe_mark_dynamic(t, 2)
            if _OpenLengths._inside == 0:
                _OpenLengths._before = _symbols.backed_size_oblivious
            _OpenLengths._inside += 1
            _symbols.backed_size_oblivious = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *error: object) -> None:
        with self._lock:
            _OpenLengths._inside -= 1
            _symbols.backed_size_oblivious = _OpenLengths._before
        for t, mark, value in self._marks:
            vars(t).pop(mark, None)
            if value is not None:
                setattr(t, mark, value)


# what the compiler tells about itself


def generated_code(call: Callable[..., Any]) -> tuple[str, str]:
    """(text of the file that Inductor generated, its key in the cache) for the `call` of a `Compiled`, or empty.

    Found by walking through the wrappers around it, so that nothing is recorded while compiling.
    """
    found = _output_code(call, set(), _DEEPEST)
    return (found.source_code, getattr(found, "_fx_graph_cache_key", None) or "") if found is not None else ("", "")


def cache_factors(call: Callable[..., Any]) -> dict[str, str]:
    """What Inductor's cache key of compiled code is made of: the name of each factor and its hash."""
    found = _output_code(call, set(), _DEEPEST)
    lines = getattr(found, "_fx_graph_cache_debug_lines", None) or ()
    parts = (line.partition("] ") for line in lines)
    return {rest.partition(":")[0]: head.lstrip("[") for head, _, rest in parts}


_DEEPEST = 16  # wrappers of AOT and Inductor around compiled code; it is found at about half of that


def _output_code(value: Any, seen: set[int], depth: int) -> Any:
    if depth == 0 or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(getattr(value, "source_code", None), str):
        return value
    inner: list[Any] = []
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        inner = [c.cell_contents for c in cells if c != types.CellType()] + list(vars(value).values())
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args]
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif type(value).__module__.startswith("torch._") and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    for part in inner:
        if callable(part) or isinstance(part, list | tuple):
            found = _output_code(part, seen, depth - 1)
            if found is not None:
                return found
    return None


def is_traced() -> bool:
    """Whether structured logs are written (TORCH_TRACE, for tlparse)."""
    from torch._logging._internal import trace_log

    return any(getattr(handler, "root_dir", None) for handler in trace_log.handlers)


def trace_artifact(name: str, text: Callable[[], str], encoding: Literal["string", "json"] = "string") -> None:
    """Hand a text to the structured log; `text` is not called when none is written."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"toprovar_{name}", "encoding": encoding},
        payload_fn=text,
        expect_trace_id=False,
    )


@dataclass
class DynamoNews:
    """What Dynamo did: frames that it compiled, (function, file, line, seconds, why again), and graph breaks."""

    frames: list[tuple[str, str, int, float, str]]
    breaks: list[str]


@contextmanager
def watch_dynamo() -> Iterator[DynamoNews]:
    """Collect what Dynamo does in the `with` block; it is complete when the block ends."""
    from torch._dynamo import symbolic_convert
    from torch._dynamo.utils import get_compilation_metrics

    news = DynamoNews([], [])
    handler = _Collect(news.breaks)
    log = symbolic_convert.graph_break_log
    before, level, propagate = list(get_compilation_metrics()), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = propagate and level == logging.DEBUG  # shown elsewhere only if the user asked for it
    try:
        yield news
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        old = {id(m) for m in before}
        news.frames += [
            (
                m.co_name or "?",
                m.co_filename or "?",
                m.co_firstlineno or 0,
                m.entire_frame_compile_time_s or 0.0,
                m.recompile_reason or "",
            )
            for m in get_compilation_metrics()
            if id(m) not in old
        ]


class _Collect(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())
