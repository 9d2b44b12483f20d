"""Have AOTAutograd trace one of the equal layers of a step instead of all.

    Captured:    x1 = [nodes of blocks.0](x, w0); x2 = [nodes of blocks.1](x1, w1)
    Outlined:    x1 = toprovar::equal_layer([x], [], "0")[0]; x2 = toprovar::equal_layer([x1], [], "1")[0]
    Functional:  the same calls, and apart from them the functional graph of blocks.0
    Inlined:     that graph on (x, w0), then on (x1, w1)

A call takes what the step computes. Inputs that only layers read, nearly all of a step, are taken out as well and not
traced; they are put back with the layers. Tracing a node or an input costs a hundred times what copying it costs, and
passes over the functional graph want it flat. `torch.compiler.nested_compile_region` does not serve: its layers must
have the same symbols, and under a plan that prunes each layer has the lengths of its own caches.

Layers are equal if they are the same operators on inputs of equal sizes up to a renaming of symbols, of which the same
is known. What tracing the one assumed of its sizes is assumed of each, as a guard of its own.

Pre:  `outline_layers`: a graph that Dynamo captured. `inline_layers`: its functional ATen graph, with meta["val"].
Post: after `inline_layers` the functional graph is what it is without outlining, but for names of nodes, and for sizes
      being computed more than once.
Invariant: a layer that cannot be taken out stays, and is counted with the reason.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae
from toprovar_compile.passes._base import PassContext, PassReport
from toprovar_compile.passes._graph import compact, graph_module, output_values, placeholders
from toprovar_compile.passes._symbols import expr_of, shape_of
from toprovar_compile.passes._torch_ir import mutates, op_name
from toprovar_compile.passes.split_layers import clean_path, layer_paths, module_path

Functionalise = Callable[[GraphModule, Sequence[Any]], GraphModule | None]
"""Makes the functional graph of a captured one, for (fake) inputs like the given ones; None where it cannot."""

_MODES = frozenset({"_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})
_BY_MEMORY = frozenset({"as_strided", "storage_offset", "set", "data_ptr"})

_tracing: ContextVar[Mapping[str, Sequence[Tensor]]] = ContextVar("toprovar_outlined_layers")

torch.library.define("toprovar::equal_layer", "(Tensor[] tensors, SymInt[] sizes, str key) -> Tensor[]")


@torch.library.register_fake("toprovar::equal_layer")  # type: ignore[untyped-decorator]
def _(tensors: Sequence[Tensor], sizes: Sequence[int], key: str) -> list[Tensor]:
    return [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in _tracing.get()[key]]


equal_layer = torch.ops.toprovar.equal_layer.default
"""The call of a layer that was taken out, while its step is traced. It has no kernel: nothing runs it."""


class OutlineSkip(Enum):
    """Why a layer is traced on its own."""

    MIXED = "its nodes lie between those of other modules"
    IN_PLACE = "the step may write into a tensor, or changes a mode"
    VALUE = "it takes or passes on a value that is no plain tensor or size"
    ALIAS = "it passes on memory of its inputs"
    ALONE = "no other layer is equal to it"
    TRACE = "its functional graph is not understood"
    GUARD = "its sizes do not fit what the trace of its equals assumed"
    OUTPUT = "the trace of its equals gives other sizes"


@dataclass
class _Window:
    """Neighbouring nodes that are one layer, what they read from outside, and what outside reads of them.

    `symbols` are those of its inputs, in an order that equal layers share.
    """

    path: str
    home: str
    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    symbols: tuple[sympy.Symbol, ...] = ()

    def rename(self, other: _Window) -> dict[sympy.Symbol, sympy.Symbol]:
        """The symbols of an equal window for those of this one."""
        return {a: b for a, b in zip(self.symbols, other.symbols, strict=True) if a != b}


@dataclass(frozen=True)
class _Call:
    """A window that was taken out: the functional graph of its equals, the window that was traced for it."""

    graph: GraphModule
    traced: _Window
    window: _Window


@dataclass
class Outline:
    """The layers taken out of one captured graph, from the capture to the functional graph."""

    functionalise: Functionalise
    _calls: dict[str, _Call] = field(default_factory=dict)
    _inputs: list[Node] = field(default_factory=list)  # of the captured graph
    _unread: set[int] = field(default_factory=set)  # positions of those that were taken out

    def read(self, values: Sequence[Any]) -> list[Any]:
        """Those of `values`, one an input of the captured graph, whose inputs it still has."""
        return [v for i, v in enumerate(values) if i not in self._unread]

    def outline_layers(self, gm: GraphModule, ctx: PassContext) -> PassReport:
        """Put calls in the place of the layers of `gm` that have equals, in place."""
        self._inputs = placeholders(gm)
        skipped: Counter[Enum] = Counter()
        notes: list[str] = []

        def skip(path: str, reason: OutlineSkip) -> None:
            skipped[reason] += 1
            notes.append(f"{path}: {reason.value}")

        classes: dict[str, list[_Window]] = defaultdict(list)
        for window in _windows(gm, skip):
            reason = _refusal(window)
            if reason is None:
                classes[_signature(window)].append(window)
            else:
                skip(window.path, reason)
        for windows in classes.values():
            results = self._trace(windows) if len(windows) > 1 else [OutlineSkip.ALONE]
            for window, found in zip(windows, results, strict=True):
                if isinstance(found, OutlineSkip):
                    skip(window.path, found)
                else:
                    self._calls[str(len(self._calls))] = found
        now: dict[Node, Node] = {}
        for key, call in self._calls.items():  # once all are traced: the graph changes
            _take_out(gm, call.window, key, now)
        for i, n in enumerate(self._inputs if self._calls else ()):
            if not n.users and isinstance(n.meta["example_value"], Tensor):
                gm.graph.erase_node(n)
                self._unread.add(i)
        return PassReport("outline_layers", len(self._calls), skipped, tuple(notes))

    @contextmanager
    def traced(self) -> Iterator[None]:
        """While the graph with the calls is traced."""
        fakes = {k: [n.meta["example_value"] for n in c.window.outputs] for k, c in self._calls.items()}
        token = _tracing.set(fakes)
        try:
            yield
        finally:
            _tracing.reset(token)

    def inline_layers(self, functional: GraphModule) -> None:
        """Put a copy of the functional graph of its layer in the place of every call of `functional`, in place, and
        back what inputs were taken out."""
        if not self._calls:
            return
        inputs = placeholders(functional)
        if len(inputs) != len(self.read(self._inputs)):
            raise PassInvariantError(
                "the functional graph has other inputs than the captured one", where="inline_layers"
            )
        present, first = iter(inputs), next(iter(functional.graph.nodes))
        known: dict[Node, Node] = {}
        for i, n in enumerate(self._inputs):
            if i in self._unread:
                with functional.graph.inserting_before(first):
                    known[n] = functional.graph.placeholder(n.name)
                known[n].meta.update(n.meta, val=n.meta["example_value"])
            else:
                known[n] = next(present)
                first = known[n].next
        for node in [n for n in functional.graph.nodes if n.target is equal_layer]:
            _inline(functional, node, self._calls[node.args[2]], known)
        compact(functional)

    def _trace(self, windows: Sequence[_Window]) -> list[_Call | OutlineSkip]:
        """For each of these equal windows its call, after one trace of the first, or why there is none."""
        first = windows[0]
        env = _shape_env(first)
        known, replaced = len(env.guards), dict(env.replacements)
        graph = self.functionalise(_region(first), [n.meta["example_value"] for n in first.inputs])
        assumed = [guard.expr for guard in env.guards[known:]]
        if graph is None or not _understood(graph, first) or env.replacements != replaced:
            return [OutlineSkip.TRACE] * len(windows)
        if any(not e.free_symbols.issubset(first.symbols) for e in assumed):
            return [OutlineSkip.GUARD] * len(windows)
        results: list[_Call | OutlineSkip] = []
        for window in windows:
            names = first.rename(window)
            if not _same_outputs(graph, window, names):
                results.append(OutlineSkip.OUTPUT)
            elif not all(bool(env.evaluate_expr(e.xreplace(names))) for e in assumed):
                results.append(OutlineSkip.GUARD)
            else:
                results.append(_Call(graph, first, window))
        return results


def check_outline_layers(gm: GraphModule) -> None:
    """Raise PassInvariantError if a call gives more than its items on."""
    for n in gm.graph.nodes:
        if n.target is equal_layer and any(u.target is not operator.getitem for u in n.users):
            raise PassInvariantError(f"{n.name} is read as a whole", where="outline_layers")


def check_inline_layers(functional: GraphModule) -> None:
    """Raise PassInvariantError if a call remains."""
    for n in functional.graph.nodes:
        if n.target is equal_layer:
            raise PassInvariantError(f"{n.name} stands for a layer that was not put back", where="inline_layers")


# finding layers that are equal


def _windows(gm: GraphModule, skip: Callable[[str, OutlineSkip], None]) -> Iterator[_Window]:
    """The layers whose nodes are neighbours, at the depth of modules at which there are any."""
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    writes = any(mutates(n) or op_name(n) in _MODES for n in nodes)
    # Others may become several inputs of the functional graph.
    given = [n.meta.get("example_value") for n in placeholders(gm)]
    odd = any(isinstance(v, Tensor) and not _is_plain(v) for v in given)
    place = {n: i for i, n in enumerate(nodes)}
    depths = list(layer_paths([n for n in nodes if n.target is fae]))
    for paths in depths:
        spans = sorted(_spans(nodes, paths).items(), key=lambda item: item[1])
        mixed = {p for (p, a), (q, b) in itertools.pairwise(spans) if b[0] <= a[1] for p in (p, q)}
        if len(mixed) == len(spans) and paths is not depths[-1]:
            continue
        for path, (start, end) in spans:
            inside = nodes[start : end + 1]
            members = range(start, end + 1)
            if writes or odd or path in mixed:
                skip(path, OutlineSkip.IN_PLACE if writes else OutlineSkip.VALUE if odd else OutlineSkip.MIXED)
                continue
            reads = dict.fromkeys(a for n in inside for a in n.all_input_nodes if place.get(a, -1) not in members)
            used = [n for n in inside if any(place.get(u, -1) not in members for u in n.users)]
            yield _Window(path, _home(inside, path), inside, list(reads), used)
        return


def _spans(nodes: Sequence[Node], paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The first and the last node of each of these modules."""
    spans: dict[str, tuple[int, int]] = {}
    for i, n in enumerate(nodes):
        parts = module_path(n).split(".")
        for path in {".".join(parts[: k + 1]) for k in range(len(parts))}.intersection(paths):
            spans[path] = (spans.get(path, (i, i))[0], i)
    return spans


def _home(nodes: Sequence[Node], path: str) -> str:
    """A module's path as `nn_module_stack` spells it."""
    entries = (p for n in nodes for p, _ in (n.meta.get("nn_module_stack") or {}).values())
    return next((p for p in entries if clean_path(p) == path), path)


def _refusal(window: _Window) -> OutlineSkip | None:
    opened: set[Node] = set()
    for n in window.nodes:
        if op_name(n) == "_exit_autocast" and n.args[0] not in opened:
            return OutlineSkip.IN_PLACE
        if op_name(n) in _BY_MEMORY:
            return OutlineSkip.VALUE
        _follow_autocast(n, opened)
    if opened or _autocast_around(window):
        return OutlineSkip.IN_PLACE
    values = [n.meta.get("example_value") for n in window.inputs]
    made = [n.meta.get("example_value") for n in window.outputs]
    if not all(_is_plain(v) or type(v) is int or isinstance(v, torch.SymInt) for v in values):
        return OutlineSkip.VALUE
    if not all(_is_plain(v) for v in made) or not any(_is_plain(v) for v in values):
        return OutlineSkip.VALUE
    memory = {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}
    if any(v.untyped_storage()._cdata in memory for v in made):  # type: ignore[union-attr]
        return OutlineSkip.ALIAS
    return None


def _autocast_around(window: _Window) -> bool:
    """Whether the step has entered autocast before the layer and leaves it later."""
    opened: set[Node] = set()
    for n in itertools.takewhile(lambda n: n is not window.nodes[0], window.nodes[0].graph.nodes):
        _follow_autocast(n, opened)
    return bool(opened)


def _follow_autocast(node: Node, opened: set[Node]) -> None:
    """Keep `opened` the nodes that entered the autocast regions which are open after `node`."""
    name = op_name(node)
    if name == "_enter_autocast":
        opened.add(node)
    elif name == "_exit_autocast":
        opened.discard(node.args[0])


def _is_plain(value: object) -> bool:
    """Whether it is a fake tensor without a symbol that stands for data."""
    if not isinstance(value, Tensor) or not hasattr(value, "fake_mode"):
        return False
    if value.layout != torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
        return False
    env = value.fake_mode.shape_env
    return env is not None and not any(env.is_unbacked_symint(s) for e in _sizes(value) for s in e.free_symbols)


def _sizes(value: Any) -> list[sympy.Expr]:
    """The expressions that say where the elements of a tensor are, or the one of a size."""
    if not isinstance(value, Tensor):
        return [expr_of(value)]
    return [*shape_of(value), *(expr_of(s) for s in value.stride()), expr_of(value.storage_offset())]


def _shape_env(window: _Window) -> ShapeEnv:
    values = (n.meta["example_value"] for n in window.inputs)
    return next(v.fake_mode.shape_env for v in values if isinstance(v, Tensor))  # type: ignore[no-any-return, attr-defined]


def _signature(window: _Window) -> str:
    """What the layer computes of what, and what is known of its sizes. Sets the symbols of the window."""
    values = [n.meta["example_value"] for n in window.inputs]
    sizes = [e for v in values for e in _sizes(v)]
    plain = [e for e in sizes if e.is_Symbol]
    rest = [s for e in sizes for s in sorted(e.free_symbols, key=str)]
    window.symbols = tuple(dict.fromkeys([*plain, *rest]))
    names = {s: sympy.Symbol(f"d{i}", integer=True) for i, s in enumerate(window.symbols)}
    env = _shape_env(window)
    lines = [str(env.var_to_range.get(s)) for s in window.symbols]
    facts = [g.expr for g in env.guards if g.expr.free_symbols and g.expr.free_symbols.issubset(names)]
    lines += sorted(str(e.xreplace(names)) for e in facts)
    for v in values:
        kind = f"{v.dtype} {v.device} {v.dim()}" if isinstance(v, Tensor) else "size"
        lines.append(f"{kind} {[e.xreplace(names) for e in _sizes(v)]}")
    index = {n: f"%{i}" for i, n in enumerate([*window.inputs, *window.nodes])}
    for n in window.nodes:
        args = torch.fx.map_arg((n.args, n.kwargs), index.__getitem__)
        target = n.target if isinstance(n.target, str) else f"{n.target} {id(n.target)}"
        lines.append(f"{n.op} {target} {args} {module_path(n).removeprefix(window.path)}")
    lines.append(" ".join(index[n] for n in window.outputs))
    return "\n".join(lines)


# taking out and putting back


def _region(window: _Window) -> GraphModule:
    """The layer as a graph of its own."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for i, n in enumerate(window.inputs):
        copies[n] = graph.placeholder(f"in_{i}")
    for n in window.nodes:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(tuple(copies[n] for n in window.outputs))
    return graph_module(torch.nn.Module(), graph)


def _take_out(gm: GraphModule, window: _Window, key: str, now: dict[Node, Node]) -> None:
    """Put a call in the place of the nodes of a window. `now` is what stands for the outputs of those taken out."""
    tensors, sizes = _passed(window)
    tensors = [now.get(n, n) for n in tensors]
    inside = set(window.nodes)
    with gm.graph.inserting_after(window.nodes[-1]):
        call = gm.graph.call_function(equal_layer, (tensors, sizes, key))
    after = call
    for i, n in enumerate(window.outputs):
        with gm.graph.inserting_after(after):
            after = gm.graph.call_function(operator.getitem, (call, i))
        after.meta = dict(n.meta)
        now[n] = after
        n.replace_all_uses_with(after, lambda user: user not in inside)
    for n in reversed(window.nodes):
        gm.graph.erase_node(n)


def _passed(window: _Window) -> tuple[list[Node], list[Node]]:
    """What a call takes, tensors and sizes; at least one tensor, for an operator without one is not traced."""
    tensors = [n for n in window.inputs if isinstance(n.meta["example_value"], Tensor)]
    made = [n for n in window.inputs if n.op != "placeholder"]
    return [n for n in made if n in tensors] or tensors[:1], [n for n in made if n not in tensors]


def _understood(graph: GraphModule, window: _Window) -> bool:
    """Whether a functional graph is one that `_inline` can copy: operators on tensors and sizes."""
    out = next(n for n in reversed(graph.graph.nodes) if n.op == "output").args[0]
    if len(placeholders(graph)) != len(window.inputs) or len(out) != len(window.outputs):
        return False
    if len(output_values(graph)) != len(window.outputs):
        return False
    inner = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    values = [v for n in inner for v in _leaves(n.meta.get("val"))]
    return all(n.op == "call_function" for n in inner) and all(_can_rename(v, window.symbols) for v in values)


def _leaves(value: Any) -> list[Any]:
    return [v for part in value for v in _leaves(part)] if isinstance(value, list | tuple) else [value]


def _can_rename(value: object, symbols: Sequence[sympy.Symbol]) -> bool:
    """Whether it is a tensor or a size that is made from these symbols alone."""
    if not isinstance(value, Tensor | int | torch.SymInt):
        return value is None
    return all(e.free_symbols.issubset(symbols) for e in _sizes(value))


def _same_outputs(graph: GraphModule, window: _Window, names: Mapping[sympy.Symbol, sympy.Symbol]) -> bool:
    """Whether the functional graph of an equal layer gives what the capture says that the window gives."""

    def form(value: Any, names: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[Any, ...]:
        return value.dtype, value.device, [e.xreplace(names) for e in _sizes(value)[: 2 * value.dim()]]

    made, want = output_values(graph), window.outputs
    return all(form(a.meta["val"], names) == form(b.meta["example_value"], {}) for a, b in zip(made, want, strict=True))


def _inline(gm: GraphModule, call: Node, outlined: _Call, inputs: Mapping[Node, Node]) -> None:
    """Put a copy of a functional graph in the place of a call, with the symbols and the modules of its own layer.

    `inputs` are those of `gm` for those of the captured graph.
    """
    window, first = outlined.window, outlined.traced
    given: dict[Node, Any] = dict(inputs)
    for nodes, passed in zip(_passed(window), call.args, strict=False):
        given.update(zip(nodes, passed, strict=True))  # type: ignore[arg-type]
    copies = {inner: given[n] for inner, n in zip(placeholders(outlined.graph), window.inputs, strict=True)}
    rename = _Renaming(_shape_env(window), first.rename(window))
    with gm.graph.inserting_before(call):
        for node in outlined.graph.graph.nodes:
            if node.op == "call_function":
                copies[node] = made = gm.graph.node_copy(node, copies.__getitem__)
                made.meta["val"] = rename(node.meta.get("val"))
                made.meta.pop("tensor_meta", None)
                if "nn_module_stack" in node.meta:
                    made.meta["nn_module_stack"] = _moved(node.meta["nn_module_stack"], first.home, window.home)
    results = output_values(outlined.graph)
    for user in list(call.users):
        user.replace_all_uses_with(copies[results[user.args[1]]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _moved(stack: Mapping[str, tuple[str, Any]], old: str, new: str) -> dict[str, tuple[str, Any]]:
    """A module stack with the paths in module `old` as those in `new`."""

    def move(text: str) -> str:
        inside = text == old or text.startswith((old + ".", old + "["))
        return new + text.removeprefix(old) if inside else text

    return {f"{new}/{key}": (move(path), kind) for key, (path, kind) in stack.items()}


class _Renaming:
    """Gives example values the symbols of another layer; those without a symbol that changes stay as they are."""

    def __init__(self, env: ShapeEnv, names: Mapping[sympy.Symbol, sympy.Symbol]) -> None:
        self._env, self._names = env, names
        self._made: dict[sympy.Expr, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            made = [self(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if value is None or all(e.free_symbols.isdisjoint(self._names) for e in _sizes(value)):
            return value
        if not isinstance(value, Tensor):
            return self._size(value)
        shape, stride = ([self._size(s) for s in sizes] for sizes in (value.shape, value.stride()))
        with value.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    def _size(self, value: Any) -> Any:
        expr = expr_of(value).xreplace(self._names)
        if expr not in self._made:
            self._made[expr] = self._env.create_symintnode(expr, hint=None)
        return self._made[expr]
