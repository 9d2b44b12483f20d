"""Run a step graph in pieces: for every scale and layer the compiled variant that the plan asks for.

A variant is compiled code of a layer class for one kind of action. It is chosen by guards, which are sympy relations on
sizes; sizes that no variant covers are compiled for once, and what the plan asks for but cannot be proven runs dense
and is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule

from toprovar_compile.cuda_graph import START, Lane, Scale, lanes
from toprovar_compile.errors import PlanError, ScaleGuardError, UnsupportedGraphError
from toprovar_compile.inductor import Compiled, Frame, Inner, compile_graph
from toprovar_compile.passes import (
    PASSES_OF_A_VARIANT,
    Layer,
    Piece,
    SplitStep,
    TokenProof,
    absorb_projections,
    absorbed,
    check_write_kv_cache,
    copy_graph,
    cut_shared,
    graph_key,
    inputs_to_absorb,
    output_values,
    placeholders,
    prove_token_axis,
    prune_tokens,
    read_entropy,
    restore_tokens,
    run_passes,
    shape_of,
    symbols_of,
    worth_it,
    write_kv_cache,
)
from toprovar_compile.passes._base import PassContext
from toprovar_compile.passes.write_kv_cache import SkipReason
from toprovar_compile.plan import DENSE, LayerAction, Plan
from toprovar_compile.policies.decide import ENTROPY_SOURCE
from toprovar_compile.policies.selection import kept_by_entropy, kept_tokens
from toprovar_compile.policies.tokens import area_tables, resize_tokens
from toprovar_compile.replay import StepReplays, resumable
from toprovar_compile.report import GraphReport, counters, logger, ran
from toprovar_compile.session import Session, current_session, on_generation

Grid = tuple[int, int]

_KINDS_OF_DELTA = {0: "", 1: ", cached on its grid", 3: ", cached"}  # by the inputs it takes


# compiled pieces


@dataclass
class Variant:
    """Compiled code and what it covers. `hits` counts its runs."""

    name: str
    compiled: Compiled
    hits: int = 0


class Unit:
    """A graph and its compiled variants: the outlined piece that equal layers of all scales and plans share."""

    def __init__(self, graph: GraphModule, inner: Inner, hints: Mapping[str, int]) -> None:
        self.graph, self.inner, self.hints = graph, inner, dict(hints)
        self.variants: list[Variant] = []
        self._chosen: dict[tuple[Any, ...], Variant] = {}
        self._lock = threading.Lock()

    def run(self, name: str, graph: GraphModule, open_dims: Sequence[Mapping[int, str]], args: Sequence[Any]) -> Any:
        """Run the variant `name` of `graph`, compiled if none covers the sizes of `args`."""
        sizes = tuple(args[i].shape[d] for i, dims in enumerate(open_dims) for d in dims)
        key = (name, sizes)
        variant = self._chosen.get(key)
        if variant is None:
            with self._lock:
                variant = self._chosen.get(key) or self._find(name, graph, open_dims, args)
                self._chosen[key] = variant
        variant.hits += 1
        return variant.compiled.call(*args)

    def _find(
        self, name: str, graph: GraphModule, open_dims: Sequence[Mapping[int, str]], args: Sequence[Any]
    ) -> Variant:
        values = {d: args[i].shape[at] for i, dims in enumerate(open_dims) for at, d in dims.items()}
        for variant in self.variants:
            if variant.name == name and covers(variant.compiled.relations, values):
                return variant
        if any(v.name == name for v in self.variants):
            counters.add("variant_guard_miss", f"{name} at {values}")
        # A size of 0 or 1 is a special case of broadcasting: fixed.
        fixed = {d: value for d, value in values.items() if value < 2}
        open_dims = [{at: d for at, d in dims.items() if d not in fixed} for dims in open_dims]
        compiled = compile_graph(graph, args, open_dims, self.inner, self.hints)
        if self.inner != "eager":  # which assumes nothing
            equal = (sympy.Eq(sympy.Symbol(d, integer=True), value) for d, value in fixed.items())
            compiled = replace(compiled, relations=(*compiled.relations, *equal))
        counters.add("compiled", name)
        logger.info("compiled %s in %.1f s", name, compiled.seconds)
        variant = Variant(name, compiled)
        self.variants.append(variant)
        return variant

    def lines(self) -> list[str]:
        """One readable line for each variant."""
        return [
            f"{v.name}: {v.hits} runs, compiled in {v.compiled.seconds:.1f} s, "
            f"guards {' & '.join(str(r) for r in v.compiled.relations) or 'none'}"
            for v in self.variants
        ]


def covers(relations: Sequence[sympy.Basic], values: Mapping[str, int]) -> bool:
    """Whether all relations are true for these sizes; one that stays open counts as false."""
    table = {sympy.Symbol(name, integer=True): value for name, value in values.items()}
    return all(r.xreplace(table) == sympy.true for r in relations)


def open_dimensions(graph: GraphModule, names: Mapping[sympy.Expr, str]) -> list[dict[int, str]]:
    """For each input of `graph` its dimensions of symbolic size, by name."""
    found: list[dict[int, str]] = []
    for node in placeholders(graph):
        value = node.meta.get("val")
        dims: dict[int, str] = {}
        if isinstance(value, Tensor):
            for d, size in enumerate(shape_of(value)):
                if size.is_Symbol:
                    dims[d] = names.get(size, str(size))
                elif size.free_symbols:
                    raise UnsupportedGraphError(
                        f"an input has the size {size}",
                        where="open_dimensions",
                        expected="plain symbols as sizes of inputs",
                    )
        elif "buffer" in node.name:  # (capacity, rows, heads, head size)
            dims = {0: "capacity", 1: "rows"}
        found.append(dims)
    return found


class LayerClass(Unit):
    """Layers that are equal but for their weights: graph, token proof, and variants for what plans ask of them."""

    def __init__(self, key: str, graph: GraphModule, inner: Inner, hints: Mapping[str, int]) -> None:
        super().__init__(graph, inner, hints)
        self.key = key
        self.proof: TokenProof = prove_token_axis(graph)
        batch, tokens = shape_of(placeholders(graph)[0].meta["val"])[:2]
        drops = shape_of(output_values(graph)[0].meta["val"])[0] != batch
        self.unskippable = "its output has other rows than its input" if drops else ""
        self.open_dims = open_dimensions(graph, {batch: "batch", tokens: "n"})
        self._graphs: dict[str, tuple[GraphModule, list[dict[int, str]]]] = {}
        # Compiled code alone takes projections in: without it, results are those of eager mode bit for bit.
        self.absorbable = inputs_to_absorb(self._prepared(False)) if inner != "eager" else []

    @property
    def graphs(self) -> dict[str, GraphModule]:
        """The graphs of the variants so far, by name."""
        return {name: graph for name, (graph, _) in list(self._graphs.items())}

    def dense(self, measured: bool, args: Sequence[Any], taken_in: Sequence[Tensor]) -> Any:
        """All tokens: (x', entropy (B, n) if measured). `args` are the inputs of the graph; `taken_in` is what
        `absorb_projections` puts after them, or empty."""
        name = "dense" + " with entropy" * measured + " and text absorbed" * bool(taken_in)
        return self.run(name, *self._variant(name, measured, None, len(taken_in)), [*args, *taken_in])

    def pruned(
        self,
        measured: bool,
        delta: Sequence[Tensor],
        x: Tensor,
        idx: Tensor,
        rest: Sequence[Any],
        taken_in: Sequence[Tensor],
    ) -> Any:
        """The tokens idx alone: (x', entropy (B, K) if measured). The arguments are those of `prune_tokens`; `delta` is
        empty without one, and comes with its tables if it is to be resized; `taken_in` as in `dense`."""
        name = "prune" + _KINDS_OF_DELTA[len(delta)] + " with entropy" * measured
        name += " and text absorbed" * bool(taken_in)
        graph = self._variant(name, measured, len(delta), len(taken_in))
        return self.run(name, *graph, [x, idx, *delta, *rest, *taken_in])

    def skipped(self, x: Tensor, delta: Sequence[Tensor]) -> Tensor:
        """No token: x and the delta, which comes with its tables if it is to be resized."""
        if len(delta) == 1:
            return x + delta[0]
        if "skip" not in self._graphs:
            self._graphs["skip"] = restore_tokens(self.graph), [self.open_dims[0], *self._delta_dims(len(delta))]
        (out,) = self.run("skip", *self._graphs["skip"], [x, *delta])
        return out  # type: ignore[no-any-return]

    def _variant(
        self, name: str, measured: bool, delta: int | None, taken_in: int
    ) -> tuple[GraphModule, list[dict[int, str]]]:
        """The graph and its open dimensions; `delta` is None for all tokens, else how many inputs the delta takes, and
        `taken_in` how many come from absorbed projections."""
        if name not in self._graphs:
            graph = self._prepared(measured)
            if taken_in:
                absorb_projections(graph)
            first, *dims = self.open_dims
            dims = dims + [self._of_batch("keys")] * taken_in
            lead = [first]
            if delta is not None:
                graph = prune_tokens(graph, self.proof, cached=delta > 0, resized=delta > 1)
                lead += [self._of_batch("k"), *self._delta_dims(delta)]
            self._graphs[name] = (graph, [*lead, *dims])
        return self._graphs[name]

    def _prepared(self, measured: bool) -> GraphModule:
        graph = read_entropy(self.graph) if measured else copy_graph(self.graph)
        run_passes(graph, PASSES_OF_A_VARIANT, PassContext())
        return graph

    def _delta_dims(self, count: int) -> list[dict[int, str]]:
        """Open dimensions of a delta, or of a smaller one and its tables."""
        return [self._of_batch("old"), {1: "n"}, {1: "n"}] if count > 1 else [self.open_dims[0]] * count

    def _of_batch(self, tokens: str) -> dict[int, str]:
        return {d: name for d, name in self.open_dims[0].items() if d == 0} | {1: tokens}


_classes: dict[tuple[str, Inner], LayerClass] = {}
_classes_lock = threading.Lock()


def layer_class(key: str, graph: GraphModule, inner: Inner, hints: Mapping[str, int]) -> LayerClass:
    """The class of this key, shared by all models, graphs and plans of the process."""
    with _classes_lock:
        if (key, inner) not in _classes:
            _classes[key, inner] = LayerClass(key, graph, inner, hints)
        return _classes[key, inner]


def reset() -> None:
    """Forget all compiled layers and free the buffers that wait for use."""
    with _classes_lock:
        _classes.clear()
    lanes.clear()


# state of a generation


WATCH = "watch"
"""Key in `Session.store` of a `Watch`; it is set before the first step, and no step is then a CUDA graph."""

Watch = Callable[[str | int, int, "LayerAction | None", "LayerState | None", Tensor], None]
"""Called after each part of a step: ("prologue", "epilogue" or the layer, scale, its action and state, the stream)."""


@dataclass
class LayerState:
    """What one layer keeps between scales: buffers (k, v) of each cache, (tokens, rows, heads, head size), and the
    tokens in them, its latest entropy map and its delta for restoring, each with its grid. `kept` are the tokens of its
    latest scale, None for all."""

    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    entropy: tuple[Tensor, Grid] | None = None
    delta: tuple[Tensor, Grid] | None = None
    kept: Tensor | None = None

    def narrow(self, rows: int) -> None:
        """Keep the first `rows` rows of all but the buffers, of which no others are read: guidance was switched off."""
        self.entropy, self.delta = (p and (p[0][:rows], p[1]) for p in (self.entropy, self.delta))


class StepState:
    """State of the compiled steps of one generation, kept in its session; without a session, of one step."""

    def __init__(self, session: Session | None, plan: Plan | None, count: int, lane: Lane | None = None) -> None:
        self.session = session
        self.follow(plan)
        self.root = self.digest  # of the plan that alternatives belong to
        self._layers = [LayerState() for _ in range(count)]
        self._restored: _Saved | None = None
        self._behind: Hashable = START
        self.prologues: dict[Hashable, _Prologue] = {}
        self.versions: dict[int, int] = {}
        self.room = _Room.of(session, plan)
        key = (count, session.schedule if session else None)
        self.watch: Watch | None = session.store.get(WATCH) if session is not None else None
        self.lane = lane if lane is not None else lanes.take(key) if session is not None else Lane()
        self.replays = StepReplays(self)
        if session is not None:
            session.on_close.append(lambda: lanes.give(key, self.lane))
            session.store[ENTROPY_SOURCE] = lambda: [layer.entropy for layer in self.layers]

    @property
    def layers(self) -> list[LayerState]:
        """The state of each layer."""
        if self._restored is not None:  # made when it is looked at: between replayed scales nobody does
            saved, self._restored = self._restored, None
            self._layers = [replace(s, buffers=list(s.buffers), lengths=list(s.lengths)) for s in saved.layers]
        return self._layers

    def begin(self) -> None:
        """Let the generation launch its parts as graphs of this lane."""
        assert self.session is not None
        self.session.graphs, self.session.replays = self.lane.call, self.replays
        for part in self.session.early:
            self.lane.ran(*part)
        self.session.early.clear()

    def follow(self, plan: Plan | None) -> None:
        """Go on with `plan`: the one of the generation, or an alternative of it that the image chose."""
        self.plan = plan
        self.reads = plan.reads_entropy() if plan else frozenset()
        self.deltas = plan.keeps_delta() if plan else frozenset()
        self.digest = plan.digest() if plan else None

    def save(self) -> _Saved:
        """A copy of what steps change, tensors shared."""
        layers = [replace(layer, buffers=list(layer.buffers), lengths=list(layer.lengths)) for layer in self.layers]
        return _Saved(layers, tuple(self.prologues.values()))

    def restore(self, saved: _Saved) -> None:
        """Set what `save` returned; it stays as it is."""
        self._restored = self._behind = saved

    def leave_graphs(self) -> None:
        """A scale runs, and is no graph yet."""
        self._behind = None

    def behind(self) -> Hashable:
        """What the next scale's graph belongs to, see `Scale.behind`."""
        return self._behind

    def rewritten(self, weights: Sequence[Any]) -> bool:
        """Whether one of these was written to since the generation first looked at it."""
        now = list(map(_version, weights))
        return list(map(self.versions.setdefault, map(id, weights), now)) != now


@dataclass(frozen=True)
class _Room:
    """Tokens that a cache has room for: `own` that it keeps, and after them those of the `last` scale.

    Nobody reads the keys and values of the last scale after their layer. So they lie where the layer before keeps its
    own, which has done its work by then: caches of equal layers lie one before the other, the first layer's at the end.
    """

    own: int = 0
    last: int = 0

    @classmethod
    def of(cls, session: Session | None, plan: Plan | None) -> _Room:
        """None are known without a session: a step then makes room for its own tokens."""
        if session is None:
            return cls()
        tokens = session.schedule.tokens
        if session.keeps_caches:
            return cls(session.prefix + sum(tokens))
        last = min(plan.last_scale if plan is not None else len(tokens), len(tokens) - 1)
        return cls(session.prefix + sum(tokens[:last]), tokens[last])


@dataclass(frozen=True, eq=False)
class _Saved:
    """State of the layers. Graphs that were captured later read `prologues`: their memory must not be given away."""

    layers: list[LayerState]
    prologues: tuple[_Prologue, ...]


@dataclass(frozen=True)
class _Prologue:
    """Values that hold for a generation, and the inputs they were made from. Holding these keeps their addresses."""

    inputs: tuple[Any, ...]
    versions: tuple[int, ...]
    outputs: list[Any]

    def made_from(self, inputs: Sequence[Any]) -> bool:
        """Whether these inputs are the same tensors, unchanged."""
        return all(
            _version(a) == version and version >= 0 and (_same_place(a, b) if isinstance(a, Tensor) else a == b)
            for a, b, version in zip(inputs, self.inputs, self.versions, strict=True)
        )


# one captured graph


@dataclass(frozen=True)
class _Bound:
    """A layer of the step with the names of its values there."""

    name: str
    cls: LayerClass
    stream: str
    out: str
    inputs: tuple[str, ...]
    priors: tuple[tuple[str, str] | None, ...]
    grown: tuple[tuple[str, str], ...]
    like: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    absorbable: tuple[tuple[tuple[str | None, ...], float], ...]


def _runs(layers: Sequence[_Bound]) -> list[tuple[int, int]]:
    """For each layer the layers (first, behind the last) around it that have caches of one form one after the other."""
    starts = [0]
    for i, (before, layer) in enumerate(pairwise(layers), 1):
        if layer.like != before.like or before.cls.unskippable:  # which drops rows
            starts.append(i)
    return [pair for pair in pairwise((*starts, len(layers))) for _ in range(*pair)]


class _Part:
    """A part of a prologue and its compiled code. Parts of equal keys make the same of the same inputs."""

    def __init__(self, piece: Piece, inner: Inner, hints: Mapping[str, int], tokens: sympy.Expr) -> None:
        self.piece, self.key = piece, graph_key(piece.graph)
        per_scale = any(tokens in dims for dims in _symbols(piece.graph))
        # What does not depend on the tokens runs once an image: not worth compiling.
        self.unit = Unit(piece.graph, inner if per_scale else "eager", hints)
        self.dims = open_dimensions(piece.graph, {})


def _by_condition(prologue: Piece, weights: Collection[str]) -> list[Piece]:
    """A prologue in parts: from weights alone, from weights and one other input each, and the rest.

    The first is kept for the generation, so casts of weights that only a condition is multiplied with are not in it.
    """
    conditions = [name for name in prologue.inputs if name not in weights]
    first, rest = cut_shared(prologue, weights, conditions)
    parts, known = [first], {*weights, *first.outputs}
    for name in conditions:
        part, rest = cut_shared(rest, known | {name})
        parts.append(part)
    return [part for part in (*parts, rest) if part.outputs]


class StepProgram:
    """A step graph, split, its layers bound to classes; called with the inputs of the graph it returns its outputs."""

    def __init__(
        self,
        split: SplitStep,
        inner: Inner,
        hints: Mapping[str, int],
        report: GraphReport,
        fixed: Collection[int] = (),
        frame: Frame | None = None,
        bind: Callable[[Sequence[Any], int], Plan | None] = lambda weights, layers: None,
    ) -> None:
        """`fixed` are the positions of inputs that stay where they are in memory: weights and buffers.

        `frame` is what the graph was captured from, if running that does nothing but what the graph says. `bind` gives
        the generation in progress its plan, from the fixed inputs and the number of layers.
        """
        self.fixed, self.frame, self.bind = tuple(fixed), frame, bind
        self.split, self.report = split, report
        self.layers = [self._bind(layer, inner, hints) for layer in split.layers]
        self.runs = _runs(self.layers)
        tokens = shape_of(placeholders(split.layers[0].piece.graph)[0].meta["val"])[1]
        weights = {split.inputs[i] for i in fixed}
        self.prologue = [_Part(piece, inner, hints, tokens) for piece in _by_condition(split.prologue, weights)]
        self.epilogue = Unit(split.epilogue.graph, inner, hints)
        self.epilogue_dims = open_dimensions(split.epilogue.graph, {})
        self.guard_hits: dict[str, int] = {}
        caches = {name for b in self.layers for prior in b.priors if prior for name in prior}
        later = {*split.epilogue.inputs, *(name for b in self.layers for name in b.inputs), *split.outputs}
        self.streams = {b.out for b in self.layers} & later  # each is as large as all tokens of a scale
        # Writes into caches happen below autograd, where versions are not counted.
        self.reads_cache = not caches.isdisjoint(split.prologue.inputs)
        sizes = {name for name, value in zip(split.inputs, split.values, strict=True) if not isinstance(value, Tensor)}
        self.moving = [
            i for i, name in enumerate(split.inputs) if i not in fixed and name not in caches and name not in sizes
        ]
        kept = {name for b in self.layers for names, _ in b.absorbable for name in names} | {*split.prologue.inputs}
        self.hoisted = [i for i in fixed if split.inputs[i] in kept]
        self.condition = [i for i in self.moving if split.inputs[i] in kept]
        report.layers = [
            (b.name, b.cls.key, "tokens proven independent" if p.holds else f"not pruned: {p.reason}")
            for b in self.layers
            for p in [b.cls.proof]
        ]
        report.variants = lambda: [f"{name} {line}" for name, unit in self.units().items() for line in unit.lines()]
        report.units = self.units
        report.guards = lambda: [f"{text}: {n} hits" for text, n in self.guard_hits.items()]

    def _bind(self, layer: Layer, inner: Inner, hints: Mapping[str, int]) -> _Bound:
        graph = layer.piece.graph
        likes = [n.meta.get("val") for n in output_values(graph)]
        rewrite = write_kv_cache(graph)
        check_write_kv_cache(graph)
        for reason in rewrite.skipped:
            if reason is not SkipReason.NOT_RETURNED:  # text, say: no cache, nothing was skipped
                counters.add("skipped", f"write_kv_cache: {reason.value}")
        names, outs = layer.piece.inputs, layer.piece.outputs
        kept = tuple(outs[i] for i in rewrite.outputs)
        if len(kept) != 1:
            raise UnsupportedGraphError(
                f"{layer.name} returns {', '.join(kept[1:])} beside the stream and its cache", where="dispatch"
            )
        cls, inputs = layer_class(graph_key(graph), graph, inner, hints), tuple(names[i] for i in rewrite.inputs)
        return _Bound(
            layer.name,
            cls,
            names[0],
            outs[0],
            inputs[1:],
            tuple((names[s.prior[0]], names[s.prior[1]]) if s.prior else None for s in rewrite.sites),
            tuple((outs[s.grown[0]], outs[s.grown[1]]) for s in rewrite.sites),
            tuple(_like(likes[i]) for s in rewrite.sites for i in s.grown),
            tuple((tuple(None if i is None else inputs[i] for i in at), scale) for at, scale in cls.absorbable),
        )

    def units(self) -> dict[str, Unit]:
        """What is compiled, by name."""
        units: dict[str, Unit] = {f"layer {b.cls.key}": b.cls for b in self.layers}
        return (
            units | {f"prologue {i}": part.unit for i, part in enumerate(self.prologue)} | {"epilogue": self.epilogue}
        )

    def __call__(self, args: Sequence[Any], plan: Plan | None, state: StepState) -> list[Any]:
        """Run one scale. `plan` None runs every layer dense."""
        self.begin(plan, state)
        x = args[self.moving[0]] if self.moving else None
        if x is None or state.session is None or state.watch is not None or not self._graphable(plan, state, x):
            return self._run(args, plan, state)
        state.begin()
        if state.rewritten([args[i] for i in self.hoisted]):
            # Graphs of later scales read what earlier ones made of the weights.
            counters.add("cuda_graph_miss", "weights were changed between scales")
            return self._run(args, plan, state)
        scale = Scale(
            (self, (state.digest, state.session.scale)),
            lambda given: self._run(given, plan, state),
            state.save,
            state.restore,
            self.moving,
            self.condition,
            group=state.root,
            behind=state.behind,
        )
        outputs = state.lane.run(scale, args)
        state.replays.launched(self, state.lane.latest)
        return outputs

    def begin(self, plan: Plan | None, state: StepState) -> None:
        """A scale is about to run, by `plan`."""
        ran(self.report)
        self.report.plan = plan
        if state.session is not None:
            state.session.ran = state.session.scale
            if plan is not state.plan:
                state.follow(plan)

    @staticmethod
    def _graphable(plan: Plan | None, state: StepState, x: Tensor) -> bool:
        if not state.lane.recordable(x):
            return False
        if plan is not None and plan.selection == "gumbel":
            counters.add("fallback", "no CUDA graphs: selection='gumbel' seeds a generator at each scale")
            return False
        return True

    def _run(self, args: Sequence[Any], plan: Plan | None, state: StepState) -> list[Any]:
        state.leave_graphs()
        env: dict[str, Any] = dict(zip(self.split.inputs, args, strict=True))
        self._run_prologue(env, state)
        first = self.layers[0]
        x = env[first.stream].contiguous()
        s, actions = self._actions(plan, state, x)
        if state.watch is not None:
            state.watch("prologue", s, None, None, x)
        kept = self._choose(plan, s, actions, state.layers, x.shape[0])
        for i, bound in enumerate(self.layers):
            x = self._run_layer(bound, i, s, actions[i], kept.get(i), plan, state, env, x)
            if bound.out in self.streams:
                env[bound.out] = x
            if state.watch is not None:
                state.watch(i, s, actions[i], state.layers[i], x)
        inputs = [env[name] for name in self.split.epilogue.inputs]
        outs = self.epilogue.run("epilogue", self.epilogue.graph, self.epilogue_dims, inputs)
        if state.watch is not None:
            state.watch("epilogue", s, None, None, x)
        env.update(zip(self.split.epilogue.outputs, outs, strict=True))
        return [env[name] if name is not None else None for name in self.split.outputs]

    def _run_prologue(self, env: dict[str, Any], state: StepState) -> None:
        """What does not depend on the stream: kept for the generation as long as its inputs are the same.

        Steps of other scales are other graphs, of which many parts are equal and make the same of the same inputs.
        """
        for part in self.prologue:
            inputs = tuple(env[name] for name in part.piece.inputs)
            known = None if self.reads_cache else state.prologues.get(part.key)
            if known is None or not known.made_from(inputs):
                outs = list(part.unit.run("prologue", part.piece.graph, part.dims, inputs))
                known = state.prologues[part.key] = _Prologue(inputs, tuple(_version(a) for a in inputs), outs)
            env.update(zip(part.piece.outputs, known.outputs, strict=True))

    def _actions(self, plan: Plan | None, state: StepState, x: Tensor) -> tuple[int, list[LayerAction]]:
        """The scale in progress and the action of each layer, by the guards of the step."""
        dense = [DENSE] * len(self.layers)
        if plan is None or state.session is None or state.session.scale < 0:  # a prefix is no scale
            return -1, dense
        s, n = state.session.scale, sympy.Symbol("n", integer=True)
        if not 0 <= s < len(plan.schedule) or plan.schedule.tokens[s] != x.shape[1]:
            counters.add("guard_miss", f"{x.shape[1]} tokens at scale {s} are not what the schedule says; run dense")
            return -1, dense
        guard = f"{sympy.Eq(n, plan.schedule.tokens[s], evaluate=False)} & plan {state.digest}"
        self.guard_hits[guard] = self.guard_hits.get(guard, 0) + 1
        actions = [plan.action(s, i) for i in range(len(self.layers))]
        for i, (action, bound) in enumerate(zip(actions, self.layers, strict=True)):
            refused = bound.cls.proof.reason if action.kind == "prune" else bound.cls.unskippable
            refused = refused or _unknown(plan, action, state.layers[i])
            if action.kind != "dense" and refused:
                counters.add("fallback", f"{bound.name} runs dense instead of {action}: {refused}")
                actions[i] = DENSE
        return s, actions

    @staticmethod
    def _choose(
        plan: Plan | None, s: int, actions: Sequence[LayerAction], layers: Sequence[LayerState], rows: int
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """For layers pruned by entropy: the tokens they keep (B, K) and their maps (B, N) on the grid of scale `s`.

        All maps are known before the scale starts: layers with equal forms of them are resized and sorted together.
        """
        groups: dict[Any, list[int]] = {}
        for i, action in enumerate(actions):
            if plan is not None and plan.score == "entropy" and action.kind == "prune":
                layers[i].narrow(rows)
                entropy = layers[i].entropy
                assert entropy is not None
                groups.setdefault((action.keep, entropy[1], entropy[0].shape), []).append(i)
        chosen: dict[int, tuple[Tensor, Tensor]] = {}
        for (keep, grid, shape), members in groups.items():
            assert plan is not None
            maps = torch.cat([layers[i].entropy[0] for i in members])  # type: ignore[index]
            maps = resize_tokens(maps, grid, plan.schedule.grids[s]).view(len(members), shape[0], -1)
            idx = kept_by_entropy(plan, s, members, keep, maps)
            chosen.update(zip(members, zip(idx, maps, strict=True), strict=True))
        return chosen

    def _run_layer(
        self,
        bound: _Bound,
        i: int,
        s: int,
        action: LayerAction,
        kept: tuple[Tensor, Tensor] | None,
        plan: Plan | None,
        state: StepState,
        env: dict[str, Any],
        x: Tensor,
    ) -> Tensor:
        layer = state.layers[i]
        layer.narrow(x.shape[0])
        layer.kept = None
        self._open_buffers(bound, i, layer, state, env, x)
        measured = (s, i) in state.reads
        delta: list[Tensor] = []
        if action.kind != "dense" and plan is not None and plan.restore == "cached":
            delta = self._delta(layer, plan.schedule.grids[s])
        if action.kind == "skip":
            out = bound.cls.skipped(x, delta) if delta else x
        else:
            rest = [env[name] for name in bound.inputs]
            rest += [b for pair in layer.buffers for b in pair] + layer.lengths
            taken_in = self._take_in(bound, i, state, env)
            count, known = x.shape[1], None
            if action.kind == "prune":
                assert plan is not None and action.keep is not None
                count = action.keep
                if kept is None:
                    idx = kept_tokens(plan, s, i, count, x, None)
                else:
                    idx, known = (t[: x.shape[0]] for t in kept)
                layer.kept = idx
                out, *more = bound.cls.pruned(measured, delta, x, idx, rest, taken_in)
            else:
                out, *more = bound.cls.dense(measured, [x, *rest], taken_in)
            layer.lengths = [p + count for p in layer.lengths]
            if measured:
                assert plan is not None
                # The resized map was made for this layer at this scale: nobody else holds it.
                layer.entropy = more[0] if known is None else known.scatter_(1, idx, more[0]), plan.schedule.grids[s]
            if (s, i) in state.deltas and out.shape == x.shape:
                assert plan is not None
                layer.delta = out - x, plan.schedule.grids[s]
        for (k_name, v_name), (k, v), length in zip(bound.grown, layer.buffers, layer.lengths, strict=True):
            env[k_name], env[v_name] = (_as_cache(buffer, x.shape[0], length) for buffer in (k, v))
        return out

    @staticmethod
    def _take_in(bound: _Bound, i: int, state: StepState, env: dict[str, Any]) -> list[Tensor]:
        """What the keys and values of layer `i` make of its projections, once a generation; empty where none pays."""
        found: list[Tensor] = []
        for j, (names, scale) in enumerate(bound.absorbable):
            inputs = tuple(None if name is None else env[name] for name in names)
            if not worth_it(inputs[0]):
                return []
            known = state.prologues.get(("absorbed", i, j))
            if known is None or not known.made_from(inputs):
                outs = [t.contiguous() for t in absorbed(inputs, scale)]
                known = _Prologue(inputs, tuple(_version(a) for a in inputs), outs)
                state.prologues["absorbed", i, j] = known
            found += known.outputs
        return found

    @staticmethod
    def _delta(layer: LayerState, grid: Grid) -> list[Tensor]:
        """The delta of a layer on `grid`, or, kept on a smaller one, with the tables that resize it to that."""
        assert layer.delta is not None
        delta, source = layer.delta
        if source == grid or source[0] > grid[0] or source[1] > grid[1]:
            return [resize_tokens(delta, source, grid)]
        return [delta, *area_tables(source, grid, delta.device)]

    def _open_buffers(
        self, bound: _Bound, i: int, layer: LayerState, state: StepState, env: dict[str, Any], x: Tensor
    ) -> None:
        """Buffers for this layer; a cache that is not the one returned before is copied in."""
        for j, prior in enumerate(bound.priors):
            old = [env[name] for name in prior] if prior else [None, None]
            length = old[0].shape[2] if old[0] is not None else 0
            if state.room.last and length > state.room.own:
                raise ScaleGuardError(
                    f"{bound.name} was given a cache of {length} tokens after the last scale",
                    where="generation(..., keeps_caches=False)",
                    expected=f"at most {state.room.own} tokens, as what the last scale adds is not kept",
                    todo="open the generation with keeps_caches=True",
                )
            if j == len(layer.buffers):
                pair = [self._buffer(i, j, side, max(length + x.shape[1], 1), state, x) for side in range(2)]
                layer.buffers.append((pair[0], pair[1]))
                layer.lengths.append(0)
            for buffer, cache in zip(layer.buffers[j], old, strict=True):
                if cache is None:
                    continue
                ours = _as_cache(buffer, x.shape[0], length)
                same = cache.data_ptr() == ours.data_ptr() and cache.stride() == ours.stride()
                if not (same and length == layer.lengths[j]):
                    ours.copy_(cache)
                    counters.add("cache_copied", "the step was given a key/value cache that it had not returned")
            layer.lengths[j] = length

    def _buffer(self, i: int, j: int, side: int, least: int, state: StepState, x: Tensor) -> Tensor:
        """The buffer for keys or values of the cache `j` of layer `i`, of at least so many tokens."""
        heads, dtype = self.layers[i].like[2 * j + side]
        row = (x.shape[0], *heads)
        (first, end), room = self.runs[i], state.room
        if least > room.own + room.last:  # more than the schedule says
            return state.lane.buffer((i, j, side), (least, *row), dtype, x.device, least, 0)
        name, whole = (first, end, j, side), (end - first) * room.own + room.last
        return state.lane.buffer(name, (room.own + room.last, *row), dtype, x.device, whole, (end - 1 - i) * room.own)


def _as_cache(buffer: Tensor, rows: int, length: int) -> Tensor:
    """The first tokens of a buffer (tokens, rows, heads, head size) as a cache (rows, heads, tokens, head size).

    PyTorch is not told that it is a view: Dynamo would follow it back to the buffer, which takes as long as ten inputs.
    """
    (_, _, heads, width), (token, row, head, one) = buffer.shape, buffer.stride()
    alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    storage = buffer.untyped_storage()
    return alias.set_(storage, buffer.storage_offset(), (rows, heads, length, width), (row, head, token, one))


def _unknown(plan: Plan, action: LayerAction, layer: LayerState) -> str:
    """What an action needs of an earlier scale that did not run by the plan; empty if it is there."""
    if action.kind == "prune" and plan.score == "entropy" and layer.entropy is None:
        return "its entropy was not measured, as an earlier scale did not run by the plan"
    if action.kind != "dense" and plan.restore == "cached" and layer.delta is None:
        return "nothing was kept to restore tokens with, as an earlier scale did not run by the plan"
    return ""


def _like(value: Any) -> tuple[tuple[int, int], torch.dtype]:
    """Heads and head size, and the dtype, of a cache (B, H, p, D)."""
    return (int(value.shape[1]), int(value.shape[3])), value.dtype


def _symbols(graph: GraphModule) -> list[frozenset[sympy.Symbol]]:
    return [symbols_of(n.meta["val"]) for n in placeholders(graph) if isinstance(n.meta.get("val"), Tensor)]


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _version(value: Any) -> int:
    """A number that changes when a tensor is written to; -1 where that is not known."""
    if isinstance(value, Tensor):
        return -1 if value.is_inference() else value._version
    return 0


def state_of(plan: Plan | None, count: int) -> StepState:
    """The state of the steps of the generation in progress, made by its first step."""
    session = current_session()
    if session is None:
        return StepState(None, None, count)
    if plan is not None and plan.num_layers != count:
        raise PlanError(
            f"the plan has {plan.num_layers} layers, the captured step has {count}",
            where="plan.num_layers",
            expected=str(count),
            todo="make the plan for this model",
        )
    state = session.store.get("steps")
    if state is None or len(state.layers) != count:
        state = session.store["steps"] = StepState(session, plan, count)
    return state


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _resume(session: Session) -> None:
    """Begin a generation with what is known from an earlier one of its kind, before its first step."""
    found = None if session.compiler is None else lanes.resume(lambda key, lane: resumable(session, key[1], lane))
    if found is not None:
        (count, _), lane = found
        state = session.store["steps"] = StepState(session, None, count, lane)
        state.begin()


on_generation.append(_resume)


def current_lane() -> Lane | None:
    """The lane of the generation in progress, None before its first step and outside a generation."""
    session = current_session()
    state = session.store.get("steps") if session is not None else None
    return state.lane if state is not None else None
