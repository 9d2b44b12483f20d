"""Compiled generation by a plan gives what the eager reference gives, with the eager inner compiler."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as compile_counters
from torch.fx import Graph, GraphModule

from toprovar_compile import dispatch
from toprovar_compile.cuda_graph import Lane
from toprovar_compile.dispatch import StepProgram, StepState, Unit, covers, open_dimensions, state_of
from toprovar_compile.errors import PlanError, ScaleGuardError, UnsupportedGraphError
from toprovar_compile.inductor import Compiled
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.policies.selection import kept_by_entropy
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.reference import pruned
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import Session, generation

# Where entropy is measured, attention is another kernel: sums in another order. Logits reach 2.
TOLERANCE = {"rtol": 0.0, "atol": 2e-6}

ONE, THREE = torch.tensor([4]), torch.tensor([1, 7, 2])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What is compiled in this file is shared by its tests."""


class Pair:
    """A model and its compiled form, warmed up for batches of one and three images."""

    def __init__(self, model: VAR, batches: Sequence[Tensor]) -> None:
        self.model = model
        self.fast = compile_steps(model, {"inner": "eager"})
        model.plan = Plan.dense(model.schedule, len(model.blocks))
        for labels in batches:
            self.fast(labels, seed=0)

    @contextmanager
    def logits(self) -> Iterator[list[Tensor]]:
        """The logits of every scale that runs in the block."""
        seen: list[Tensor] = []
        advance = self.model._advance

        @torch.compiler.disable
        def record(s: int, logits: Tensor, *rest: Any, **how: Any) -> Any:
            seen.append(logits)
            return advance(s, logits, *rest, **how)

        self.model._advance = record  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            del self.model._advance

    def check(self, plan: Plan, labels: Tensor, **sampling: Any) -> list[Tensor]:
        """Compare logits of all scales and images with the reference; no frame is compiled."""
        self.model.plan = plan
        with pruned(self.model, plan), self.logits() as want:
            image = self.model(labels, seed=5, **sampling)
        before = compile_counters["stats"]["unique_graphs"]
        with self.logits() as got:
            fast = self.fast(labels, seed=5, **sampling)
        assert compile_counters["stats"]["unique_graphs"] == before
        assert len(got) == len(want)
        if plan.is_dense:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and torch.equal(fast, image)
        torch.testing.assert_close(got, want, **TOLERANCE)
        torch.testing.assert_close(fast, image, **TOLERANCE)
        return got


@pytest.fixture(scope="module")
def pair(make_var: Callable[..., VAR]) -> Iterator[Pair]:
    """Three layers with shared AdaLN, five scales of 1, 4, 9, 16 and 36 tokens."""
    torch.compiler.reset()
    dispatch.reset()
    yield Pair(make_var(), (ONE, THREE))
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.reset()


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[StepState]:
    """The states that generations make from here on."""
    made: list[StepState] = []
    original = StepState.__init__

    def init(self: StepState, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(StepState, "__init__", init)
    return made


def _prune(keep: int) -> LayerAction:
    return LayerAction("prune", keep)


def _plan(model: VAR, late: dict[int, tuple[LayerAction, ...]], **fields: Any) -> Plan:
    """All dense, but for the scales in `late`."""
    depth = len(model.blocks)
    rows = tuple(ScalePlan(layers=late.get(s, (DENSE,) * depth)) for s in range(len(model.schedule)))
    return Plan(model.schedule, depth, rows, **fields)


MIXED = {3: (_prune(6), SKIP, DENSE), 4: (_prune(9), _prune(20), SKIP)}

ACTIONS: dict[str, dict[int, tuple[LayerAction, ...]]] = {
    "dense": {},
    "one layer pruned": {4: (DENSE, _prune(12), DENSE)},
    "all layers pruned": {4: (_prune(12), _prune(12), _prune(12))},
    "one token and all but one": {3: (_prune(1), _prune(15), DENSE), 4: (_prune(35), _prune(1), _prune(1))},
    "pruned at three scales": {2: (_prune(4),) * 3, 3: (_prune(8),) * 3, 4: (_prune(20),) * 3},
    "one layer skipped": {4: (DENSE, SKIP, DENSE)},
    "all layers skipped": {4: (SKIP, SKIP, SKIP)},
    "skipped, then pruned": {2: (SKIP, DENSE, SKIP), 3: (_prune(5), SKIP, SKIP), 4: (DENSE, _prune(7), _prune(9))},
    "mixed": MIXED,
}


@pytest.mark.parametrize("labels", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("name", ACTIONS)
def test_actions(pair: Pair, name: str, labels: Tensor) -> None:
    plan = _plan(pair.model, ACTIONS[name])
    logits = pair.check(plan, labels)
    dense = pair.check(Plan.dense(pair.model.schedule, 3), labels)
    differ = [s for s, (a, b) in enumerate(zip(logits, dense, strict=True)) if (a - b).abs().max() > 1e-3]
    assert differ == list(range(min(ACTIONS[name], default=5), 5))
    assert not {e: n for e, n in counters.snapshot().items() if not e.startswith("compiled")}


@pytest.mark.parametrize("labels", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("restore", ["cached", "identity"])
@pytest.mark.parametrize("direction", ["low_entropy", "high_entropy"])
@pytest.mark.parametrize("selection", ["topk", "gumbel"])
def test_kinds_of_pruning(pair: Pair, labels: Tensor, restore: Any, direction: Any, selection: Any) -> None:
    pair.check(_plan(pair.model, MIXED, restore=restore, direction=direction, selection=selection, seed=3), labels)


def test_kinds_of_pruning_differ(pair: Pair) -> None:
    last = [
        pair.check(_plan(pair.model, MIXED, **fields), ONE)[-1]
        for fields in ({}, {"restore": "identity"}, {"direction": "high_entropy"}, {"selection": "gumbel"})
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(last) for b in last[:i])


@pytest.mark.parametrize(
    "fields",
    [
        {"region_share": 0.5},
        {"selection": "gumbel", "alpha_min": 0.1, "alpha_max": 0.8, "layer_scores": (0.2, 0.9, 0.4)},
        {"selection": "gumbel", "normalisation": "literal", "seed": 8},
    ],
)
def test_fields_of_a_plan_reach_the_selection(pair: Pair, fields: dict[str, Any]) -> None:
    fields_of_default = {"selection": fields.get("selection", "topk")}
    changed = pair.check(_plan(pair.model, MIXED, **fields), THREE)
    assert not torch.equal(changed[-1], pair.check(_plan(pair.model, MIXED, **fields_of_default), THREE)[-1])


@pytest.mark.parametrize(
    "sampling", [{"cfg": 0.0}, {"cfg": 4.0}, {"top_k": 5}, {"top_p": 0.7}, {"more_smooth": True}], ids=str
)
def test_sampling(pair: Pair, sampling: dict[str, Any]) -> None:
    pair.check(_plan(pair.model, MIXED), THREE, **sampling)


@pytest.mark.parametrize("exit_scale", [1, 3, 4])
def test_exit(pair: Pair, exit_scale: int) -> None:
    plan = Plan.keep_share(pair.model.schedule, 3, 0.5, 3, bucket=2, exit_scale=exit_scale)
    assert len(pair.check(plan, THREE)) == exit_scale


def test_skip_before_any_dense_scale(pair: Pair) -> None:
    early = {s: (DENSE, SKIP, DENSE) for s in (0, 1)}
    plan = _plan(pair.model, early, restore="identity")
    pair.check(plan, ONE)
    pair.check(plan, ONE)
    pair.check(Plan.dense(pair.model.schedule, 3), ONE)


@pytest.mark.parametrize("seed", range(6))
def test_random_plans(pair: Pair, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(s: int) -> LayerAction:
        n, kinds = pair.model.schedule.tokens[s], 3 if s > 1 else 2
        kind = int(torch.randint(kinds, (), generator=generator))
        return (DENSE, _prune(1 + int(torch.randint(n - 1, (), generator=generator))), SKIP)[kind]

    late = {s: tuple(draw(s) for _ in range(3)) for s in range(1, 5)}
    pair.check(_plan(pair.model, late, region_share=0.25 * (seed % 2)), (ONE, THREE)[seed % 2])


def test_plans_take_turns(pair: Pair) -> None:
    mixed, dense = _plan(pair.model, MIXED), Plan.dense(pair.model.schedule, 3)
    runs = [pair.check(plan, labels)[-1] for plan in (mixed, dense, mixed) for labels in (ONE, THREE)]
    assert torch.equal(runs[0], runs[4]) and torch.equal(runs[1], runs[5])


def test_own_modulation_of_each_layer(make_var: Callable[..., VAR]) -> None:
    own = Pair(make_var(depth=2, shared_aln=False), (THREE,))
    late = {3: (_prune(6), SKIP), 4: (_prune(9), _prune(20))}
    for restore in ("cached", "identity"):
        own.check(_plan(own.model, late, restore=restore), THREE)


def test_layers_of_one_count_are_chosen_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, list[int], tuple[int, ...]]] = []

    def record(plan: Plan, s: int, layers: Sequence[int], keep: int, entropy: Tensor) -> Tensor:
        chosen.append((s, list(layers), tuple(entropy.shape)))
        return kept_by_entropy(plan, s, layers, keep, entropy)

    monkeypatch.setattr(dispatch, "kept_by_entropy", record)
    late = {3: (_prune(6), _prune(8), _prune(6)), 4: (_prune(9), _prune(9), SKIP)}
    pair.check(_plan(pair.model, late), ONE)
    assert chosen == [(3, [0, 2], (2, 2, 16)), (3, [1], (1, 2, 16)), (4, [0, 1], (2, 2, 36))]


def test_maps_of_several_grids(pair: Pair) -> None:
    late = {2: (SKIP, DENSE, _prune(4)), 3: (DENSE, SKIP, DENSE), 4: (_prune(9), _prune(9), _prune(9))}
    pair.check(_plan(pair.model, late), THREE)


def test_grids_that_repeat_and_that_do_not_divide(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2, patch_nums=(1, 3, 3, 5, 7))
    own = Pair(model, (THREE,))
    late = {2: (_prune(4), SKIP), 3: (_prune(6), SKIP), 4: (SKIP, _prune(20))}
    for restore in ("cached", "identity"):
        own.check(_plan(model, late, restore=restore), THREE)


def test_entropy_and_deltas_are_kept_only_where_they_are_read(pair: Pair, states: list[StepState]) -> None:
    pair.check(_plan(pair.model, {4: (DENSE, _prune(12), DENSE)}), ONE)
    (state,) = states
    assert [layer.entropy is not None for layer in state.layers] == [False, True, False]
    assert [layer.delta is not None for layer in state.layers] == [False, True, False]
    assert [layer.lengths for layer in state.layers] == [[66], [42], [66]]


# memory


def _tokens(lane: Lane) -> list[int]:
    """Tokens that the memory of caches has room for."""
    return sorted(len(memory) for memory in lane._memory.values())


def test_caches_have_room_for_all_scales_but_the_last_and_once_for_that(pair: Pair, states: list[StepState]) -> None:
    dispatch.reset()
    exits = Plan.keep_share(pair.model.schedule, 3, 0.5, 3, bucket=2, exit_scale=4)
    for plan, room in ((exits, 3 * 14 + 16), (_plan(pair.model, MIXED), 3 * 30 + 36), (exits, 3 * 30 + 36)):
        pair.check(plan, ONE)
        assert _tokens(states[-1].lane) == [room] * 2, "for keys and for values, each of three layers"


def _all_scales(model: VAR, step: Callable[..., Any], session: Session) -> tuple[Any, Any]:
    """What the step returns at the last scale, and its arguments there, for random inputs."""
    _, cond, mod, _ = model._begin(ONE, 0)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for s in session.scales():
        x = torch.randn(2, model.schedule.tokens[s], 32, generator=torch.Generator().manual_seed(s))
        args = x, cond, mod, keys, values
        result = step(*args)
        _, keys, values = result
    return result, args


def test_a_generation_that_keeps_its_caches_has_them_after_the_last_scale(pair: Pair) -> None:
    model, step = pair.model, compile_steps(pair.model.step, {"inner": "eager"})
    with torch.no_grad(), generation(model.schedule, model.fingerprint) as session:
        want, _ = _all_scales(model, model.step, session)
        got, _ = _all_scales(model, step, session)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_caches_that_are_not_kept_are_not_taken_back(pair: Pair) -> None:
    model, step = pair.model, compile_steps(pair.model.step, {"inner": "eager"})
    with torch.no_grad(), generation(model.schedule, model.fingerprint, keeps_caches=False) as session:
        want, _ = _all_scales(model, model.step, session)
        got, (x, cond, mod, _, _) = _all_scales(model, step, session)
        torch.testing.assert_close(got[0], want[0], **TOLERANCE)
        with pytest.raises(ScaleGuardError, match=r"blocks.0 was given a cache of 66 tokens .* keeps_caches=True"):
            step(x, cond, mod, *got[1:])


def test_streams_of_layers_are_not_held(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[weakref.ref[Tensor]] = []

    def watch(part: str | int, s: int, action: Any, layer: Any, x: Tensor) -> None:
        if isinstance(part, int):
            assert all(stream() is None for stream in streams[:-1]), "but the one that went into this layer"
            streams.append(weakref.ref(x))
        else:
            streams.clear()

    original = dispatch.StepState.__init__

    def init(self: StepState, *args: Any) -> None:
        original(self, *args)
        self.watch = watch

    monkeypatch.setattr(StepState, "__init__", init)
    pair.check(_plan(pair.model, {4: (_prune(12), DENSE, _prune(12))}), ONE)


# guards


def test_tokens_that_are_not_the_schedules_run_dense(pair: Pair) -> None:
    model, other = pair.model, ScaleSchedule.from_patch_nums((1, 3, 3, 4, 6))
    step = compile_steps(model.step, {"inner": "eager"})
    x, cond, mod, _ = model._begin(ONE, 0)
    four = x.expand(-1, 4, -1).contiguous()
    plan = Plan(other, 3, _plan(model, {s: (_prune(1),) * 3 for s in range(1, 5)}).scales)
    with torch.no_grad(), generation(other, model.fingerprint, plan) as session:
        _, keys, values = model.step(x, cond, mod, [], [])
        want = model.step(four, cond, mod, keys, values)[0]
        session.scale = 0
        _, keys, values = step(x, cond, mod, [], [])
        session.scale = 1
        logits, _, _ = step(four, cond, mod, keys, values)
    assert torch.equal(logits, want)
    assert counters.snapshot()["guard_miss: 4 tokens at scale 1 are not what the schedule says; run dense"] == 1


@pytest.mark.parametrize(
    ("action", "reason"),
    [(_prune(4), "its entropy was not measured"), (SKIP, "nothing was kept to restore tokens with")],
)
def test_what_an_earlier_scale_did_not_leave_makes_a_layer_dense(pair: Pair, action: LayerAction, reason: str) -> None:
    model = pair.model
    step = compile_steps(model.step, {"inner": "eager"})
    x, cond, mod, _ = model._begin(ONE, 0)
    nine = x.expand(-1, 9, -1).contiguous()
    plan = _plan(model, {2: (DENSE, action, DENSE)})
    with torch.no_grad(), generation(model.schedule, model.fingerprint, plan) as session:
        session.scale = 1  # of four tokens: the plan is not followed
        _, keys, values = step(nine, cond, mod, [], [])
        want = model.step(nine, cond, mod, keys, values)[0]
        session.scale = 2
        logits, _, _ = step(nine, cond, mod, keys, values)
    torch.testing.assert_close(logits, want, **TOLERANCE)
    (event,) = (e for e in counters.snapshot() if e.startswith("fallback"))
    assert f"blocks.1 runs dense instead of {action}: {reason}, as an earlier scale did not run by the plan" in event


def test_covers() -> None:
    n, k = sympy.symbols("n k", integer=True)
    relations = (sympy.Ge(n, 2), sympy.Ne(sympy.Mod(n, 8), 0))
    assert covers(relations, {"n": 9}) and covers((), {"n": 1})
    assert not covers(relations, {"n": 16}) and not covers(relations, {"n": 1})
    assert not covers((sympy.Ge(n, k),), {"n": 9}), "what stays open is not covered"


def _square() -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, x)),))
    return GraphModule(nn.Module(), graph)


def test_a_unit_compiles_once_for_the_sizes_that_its_guards_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compile_graph(gm: GraphModule, args: Sequence[Any], dims: Any, inner: str, hints: Any) -> Compiled:
        made.append(args[0].shape[0])
        n = sympy.Symbol("n", integer=True)
        return Compiled(gm.forward, (sympy.Ge(n, 4) if args[0].shape[0] >= 4 else sympy.Lt(n, 4),), 0.0)

    monkeypatch.setattr(dispatch, "compile_graph", compile_graph)
    gm = _square()
    unit = Unit(gm, "eager", {})
    for n in (4, 9, 4, 2, 3, 9):
        assert torch.equal(unit.run("square", gm, [{0: "n"}], [torch.full((n,), 3.0)])[0], torch.full((n,), 9.0))
    assert made == [4, 2]
    assert [v.hits for v in unit.variants] == [4, 2]
    assert counters.snapshot() == {"compiled: square": 2, "variant_guard_miss: square at {'n': 2}": 1}
    assert unit.lines() == [
        "square: 4 runs, compiled in 0.0 s, guards n >= 4",
        "square: 2 runs, compiled in 0.0 s, guards n < 4",
    ]


def test_sizes_of_one_are_compiled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def compile_graph(gm: GraphModule, args: Sequence[Any], dims: Any, inner: str, hints: Any) -> Compiled:
        opened.append(dims)
        return Compiled(gm.forward, (), 0.0)

    monkeypatch.setattr(dispatch, "compile_graph", compile_graph)
    gm = _square()
    unit = Unit(gm, "inductor", {})
    for n in (1, 4, 1, 9):
        unit.run("square", gm, [{0: "batch", 1: "n"}], [torch.ones(3, n)])
    assert opened == [[{0: "batch"}], [{0: "batch", 1: "n"}]]
    assert [v.hits for v in unit.variants] == [2, 2], "what was compiled for one is for nothing else"


def test_open_dimensions_of_a_product() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    gm = _square()
    x = next(iter(gm.graph.nodes))
    value = mode.from_tensor(torch.empty(5, 7))
    with mode:
        x.meta["val"] = value
        assert open_dimensions(gm, {}) == [{d: str(value.shape[d]) for d in (0, 1)}]
        x.meta["val"] = torch.empty(value.shape[0] * 2, 7)
    with pytest.raises(UnsupportedGraphError, match="an input has the size 2"):
        open_dimensions(gm, {})


# state


def test_a_plan_of_another_depth(make_var: Callable[..., VAR]) -> None:
    model = make_var()
    plan = Plan.dense(model.schedule, 4)
    with (
        generation(model.schedule, model.fingerprint),
        pytest.raises(PlanError, match="the plan has 4 layers, the captured step has 3"),
    ):
        state_of(plan, 3)


def test_state_lives_as_long_as_its_session(make_var: Callable[..., VAR]) -> None:
    model = make_var()
    with generation(model.schedule, model.fingerprint):
        state = state_of(None, 3)
        assert state_of(None, 3) is state
    with generation(model.schedule, model.fingerprint):
        assert state_of(None, 3) is not state
    assert state_of(None, 3) is not state_of(None, 3), "without a session, of one step"


def test_casts_of_weights_that_a_condition_alone_reads_are_not_kept(
    make_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_var(shared_aln=False)
    modulation = {block.ada_lin[1].weight.shape for block in model.blocks}  # type: ignore[index, union-attr]
    kept: list[torch.Size] = []
    run = StepProgram._run_prologue

    def watched(self: StepProgram, env: dict[str, Any], state: StepState) -> None:
        run(self, env, state)
        kept.extend(out.shape for part in state.prologues.values() for out in part.outputs)

    monkeypatch.setattr(StepProgram, "_run_prologue", watched)
    fast = compile_steps(model, {"plan": "dense", "inner": "eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = fast(torch.tensor([1]), seed=0)
        torch.testing.assert_close(images, model(torch.tensor([1]), seed=0), atol=0.1, rtol=0)
    assert model.blocks[0].attn.mat_qkv.weight.shape in kept  # type: ignore[union-attr]
    assert modulation.isdisjoint(kept) and modulation.isdisjoint(shape[::-1] for shape in kept)


def test_nothing_of_a_generation_waits_for_the_garbage_collector(
    make_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.tensor([1, 2])
    states: list[weakref.ref[StepState]] = []
    begin = StepState.__init__

    def watched(self: StepState, *args: Any) -> None:
        begin(self, *args)
        states.append(weakref.ref(self))

    monkeypatch.setattr(StepState, "__init__", watched)
    model = make_var()
    plan = Plan.keep_share(model.schedule, 3, 0.5, 3, bucket=1)
    fast = compile_steps(model, {"plan": plan, "inner": "eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):  # casts of all weights are part of the state
        fast(labels, seed=0)  # compiling leaves references of its own
        gc.disable()
        try:
            fast(labels, seed=0)
            assert len(states) == 2
            assert states[-1]() is None
        finally:
            gc.enable()


def test_saved_state_comes_back() -> None:
    state = StepState(None, None, 2)
    state.layers[0].lengths = [3]
    saved = state.save()
    state.layers[0].lengths[0] = 9
    state.layers[1].lengths.append(4)
    state.restore(saved)
    assert [layer.lengths for layer in state.layers] == [[3], []]
