"""Taking equal layers out of a step before it is traced changes what compiling costs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo
from torch.fx import GraphModule, Node

from toprovar_compile import backend, dispatch
from toprovar_compile.errors import PassInvariantError
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.models.var import VAR
from toprovar_compile.passes import Outline, SplitStep, graph_key, placeholders
from toprovar_compile.passes._base import PassContext, switched_off
from toprovar_compile.passes._symbols import expr_of, is_scalar
from toprovar_compile.passes.outline_layers import (
    OutlineSkip,
    check_inline_layers,
    check_outline_layers,
    equal_layer,
)
from toprovar_compile.passes.split_layers import module_path
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 3, 4, 6))
TINY = InfinityConfig(depth=3, embed_dim=64, num_heads=2, text_channels=128, vae=BSQVAEConfig(8, 32, (1, 2), 1))
LAYERS = 3


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()
    yield
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()


# what compiling makes, in a form that can be compared


@dataclass
class Seen:
    """Of each step in turn: functional graph, pieces, guards; then how many graphs were captured, and the events."""

    functional: list[list[str]] = field(default_factory=list)
    pieces: list[list[str]] = field(default_factory=list)
    guards: list[list[str]] = field(default_factory=list)
    taken_out: list[int] = field(default_factory=list)
    frames: int = 0
    events: dict[str, int] = field(default_factory=dict)
    result: Any = None


def _facts(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_facts(v) for v in value]
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {[expr_of(s) for s in (*value.shape, *value.stride())]}"
    return str(value)


def lines(gm: GraphModule) -> list[str]:
    """A functional graph without names: a scalar is what it is of the symbols of the inputs."""
    index: dict[Node, str] = {}

    def show(node: Node) -> Any:
        return str(node.meta["val"]) if is_scalar(node) else index[node]

    result = []
    for n in gm.graph.nodes:
        if not is_scalar(n):
            args = torch.fx.map_arg((n.args, n.kwargs), lambda a: f"<{show(a)}>")
            index[n] = f"%{len(index)}"
            name = n.target if n.op == "call_function" else ""
            place = module_path(n) if n.op == "call_function" else ""
            result.append(f"{n.op} {name} {args} -> {_facts(n.meta.get('val'))} in {place}")
    return result


def wiring(split: SplitStep) -> list[str]:
    """The pieces by what they compute, and which values go where."""
    known = {name: f"input {i}" for i, name in enumerate(split.inputs)}
    result = []
    for i, piece in enumerate((split.prologue, *(layer.piece for layer in split.layers), split.epilogue)):
        result.append(f"{graph_key(piece.graph)} of {[known[name] for name in piece.inputs]}")
        known.update({name: f"{i}.{j}" for j, name in enumerate(piece.outputs)})
    outputs = [name and known[name] for name in split.outputs]
    return [*result, f"outputs {outputs}", f"layers {[layer.name for layer in split.layers]}"]


def watch(generate: Callable[[], Any], *, outlined: bool) -> Seen:
    """What compiling makes of `generate` from the start."""
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()
    seen = Seen()
    cut, step = backend.split_layers, backend._compile_step
    take_out = Outline.outline_layers

    def split_layers(gm: GraphModule) -> SplitStep:
        seen.functional.append(lines(gm))
        split = cut(gm)
        seen.pieces.append(wiring(split))
        return split

    def compile_step(gm: GraphModule, *args: Any) -> Any:
        made = step(gm, *args)
        fakes = (n.meta.get("example_value") for n in placeholders(gm))
        env = next(v.fake_mode.shape_env for v in fakes if isinstance(v, Tensor))  # type: ignore[attr-defined]
        seen.guards.append(sorted({str(guard.expr) for guard in env.guards}))
        return made

    def outline_layers(self: Outline, gm: GraphModule, ctx: PassContext) -> Any:
        report = take_out(self, gm, ctx)
        seen.taken_out.append(report.matched)
        return report

    outline_layers.__name__ = take_out.__name__
    token = switched_off.set(frozenset() if outlined else frozenset({"outline_layers"}))
    before = dynamo["stats"]["unique_graphs"]
    try:
        with (
            patch.object(backend, "split_layers", split_layers),
            patch.object(backend, "_compile_step", compile_step),
            patch.object(Outline, "outline_layers", outline_layers),
            torch.no_grad(),
        ):
            seen.result = generate()
    finally:
        switched_off.reset(token)
    seen.frames = dynamo["stats"]["unique_graphs"] - before
    seen.events = counters.snapshot()
    return seen


def compare(generate: Callable[[], Any], taken_out: Sequence[int]) -> Seen:
    """Compile with outlining and without, compare everything, and return what was made with it."""
    new, old = watch(generate, outlined=True), watch(generate, outlined=False)
    assert new.taken_out == list(taken_out) and old.taken_out == []
    assert len(new.functional) == len(taken_out)
    for a, b in zip(new.functional, old.functional, strict=True):
        assert a == b
    assert new.pieces == old.pieces
    assert new.guards == old.guards
    assert new.frames == old.frames
    skipped = {e: n for e, n in new.events.items() if "outline_layers" in e}
    assert {e: n for e, n in new.events.items() if e not in skipped} == old.events
    for a, b in zip(new.result, old.result, strict=True):
        assert torch.equal(a, b)
    return new


def mixed_plan() -> Plan:
    """Every kind of action at the last two scales."""
    rows = [ScalePlan(layers=(DENSE,) * LAYERS)] * 3
    rows += [ScalePlan(layers=(LayerAction("prune", 6), SKIP, DENSE))]
    rows += [ScalePlan(layers=(LayerAction("prune", 9), LayerAction("prune", 20), SKIP))]
    return Plan(SCHEDULE, LAYERS, tuple(rows))


# models


@pytest.mark.slow
@pytest.mark.parametrize(("shared_aln", "pruned"), [(True, True), (False, False)])
def test_var(make_var: Callable[..., VAR], shared_aln: bool, pruned: bool) -> None:
    model = make_var(shared_aln=shared_aln)
    options = {"inner": "eager", "plan": mixed_plan() if pruned else "dense"}

    def generate() -> list[Tensor]:
        fast = torch.compile(model, backend="toprovar", options=options)
        # The second batch size leaves the batch open as well.
        return [fast(torch.tensor([1]), seed=0), fast(torch.tensor([1, 7]), seed=1), fast(torch.tensor([3]), seed=2)]

    seen = compare(generate, [LAYERS] * 4)
    assert not [e for e in seen.events if "outline_layers" in e]


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True])
def test_infinity(pruned: bool) -> None:
    model = Infinity.random(TINY, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    model.schedule = SCHEDULE
    options = {"inner": "eager", "plan": mixed_plan() if pruned else "dense"}
    texts = [torch.randn(n, TINY.text_channels, generator=torch.Generator().manual_seed(n)) for n in (7, 12)]

    def generate() -> list[Tensor]:
        fast = torch.compile(model, backend="toprovar", options=options)
        return [fast(texts[:1], seed=0), fast(texts[1:], seed=1)]

    seen = compare(generate, [LAYERS] * 2)
    assert not [e for e in seen.events if "outline_layers" in e]


# layers by hand


class Block(nn.Module):
    """A layer with a cache: attention, a feed-forward part of `hidden` channels."""

    def __init__(self, hidden: int = 32, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.act = act

    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(x))), k, v


class Step(nn.Module):
    """A step with a cache for each layer, of lengths of their own."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        grown: list[Tensor] = []
        for block, (k, v) in zip(self.blocks, caches, strict=True):
            x, *cache = block(x, k, v)
            grown += cache
        return [x * 2, *grown]


def run(step: nn.Module, count: int, sizes: Sequence[int] = (5, 7, 9)) -> Callable[[], list[Tensor]]:
    """Steps of several sizes with caches of several lengths, dynamic from the second on."""

    def generate() -> list[Tensor]:
        fast = torch.compile(step, backend="toprovar", options={"inner": "eager"}, fullgraph=True)
        rng = torch.Generator().manual_seed(0)
        results: list[Tensor] = []
        for n in sizes:
            caches = [
                (torch.randn(2, 2, n + 3 * i + 2, 8, generator=rng), torch.randn(2, 2, n + 3 * i + 2, 8, generator=rng))
                for i in range(count)
            ]
            results += fast(torch.randn(2, n, 16, generator=rng), caches)
        return results

    return generate


def blocks(*kinds: dict[str, Any]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(**kind) for kind in kinds]


def skips(seen: Seen) -> dict[str, int]:
    return {e.removeprefix("skipped: outline_layers: "): n for e, n in seen.events.items() if "outline_layers" in e}


def test_layers_of_two_kinds_are_two_classes() -> None:
    step = Step(blocks({}, {"hidden": 64}, {}, {"hidden": 64})).eval()
    seen = compare(run(step, 4), [0, 4])  # at the fixed first lengths all four differ
    assert seen.result[0].shape == (2, 5, 16)


def test_a_layer_of_another_shape_is_traced_by_itself() -> None:
    step = Step(blocks({}, {"hidden": 48}, {})).eval()
    seen = compare(run(step, 3), [0, 2])
    assert skips(seen)[OutlineSkip.ALONE.value] == 3 + 1


def test_a_layer_of_another_operator_is_traced_by_itself() -> None:
    step = Step(blocks({}, {"act": F.silu}, {})).eval()
    seen = compare(run(step, 3), [0, 2])
    assert skips(seen)[OutlineSkip.ALONE.value] == 3 + 1


class Autocast(Block):
    """A layer that computes its feed-forward part in another precision."""

    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.fc2(F.gelu(self.fc1(x)))
        return x + h.float(), k, v


def test_a_layer_that_changes_its_precision_inside() -> None:
    torch.manual_seed(0)
    compare(run(Step([Autocast(), Autocast()]).eval(), 2), [0, 2])


def test_a_precision_set_around_layers_is_not_taken_out() -> None:
    class Around(Step):
        def forward(self, x: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, [(k.bfloat16(), v.bfloat16()) for k, v in caches])

    seen = compare(run(Around(blocks({}, {})).eval(), 2), [0, 0])
    assert skips(seen) == {OutlineSkip.IN_PLACE.value: 4}


class InPlace(Block):
    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        return x.mul_(0.5), k, v


@torch.compiler.allow_in_graph
def halved(x: Tensor) -> Tensor:
    """What Dynamo does not look into may write."""
    return x.mul_(0.5)


class InPlaceUnseen(Block):
    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        return halved(x), k, v


class ByMemory(Block):
    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        return x + x.as_strided((1, 1, 16), (16, 16, 1)), k, v


class Constant(Block):
    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        return x + torch.tensor([0.5, 0.25] * 8), k, v


class OldCache(Block):
    """A layer that hands its old cache on."""

    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, _ = super().forward(x, old_k, old_v)
        return x, k, old_v.transpose(1, 2)


class ByData(Block):
    """A layer with a size inside that depends on data."""

    def forward(self, x: Tensor, old_k: Tensor, old_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = super().forward(x, old_k, old_v)
        return x + (x > 0).nonzero().float().sum(), k, v


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByData, OutlineSkip.ALONE),  # what Dynamo asserts of such a size has a text of its own
        (InPlace, OutlineSkip.IN_PLACE),
        (InPlaceUnseen, OutlineSkip.IN_PLACE),
        (ByMemory, OutlineSkip.VALUE),
        (Constant, OutlineSkip.TRACE),
        (OldCache, OutlineSkip.ALIAS),
    ],
)
def test_what_is_not_understood_is_traced_as_before(kind: type[Block], reason: OutlineSkip) -> None:
    torch.manual_seed(0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        seen = compare(run(Step([kind(), kind()]).eval(), 2, (5, 7)), [0, 0])
    assert skips(seen).get(reason.value, 0) >= 2, skips(seen)


class Crossing(Step):
    """Each layer but the first reads what the one before it had inside."""

    def forward(self, x: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        grown: list[Tensor] = []
        inner = x
        for block, (k, v) in zip(self.blocks, caches, strict=True):
            x, inner, *cache = block(x, inner, k, v)
            grown += cache
        return [x, *grown]


class Reading(Block):
    def forward(self, x: Tensor, inner: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        h = self.norm(x + inner)
        return (super().forward(h, *cache)[0], h, *super().forward(h, *cache)[1:])


def test_layers_that_read_each_others_insides() -> None:
    torch.manual_seed(0)
    seen = compare(run(Crossing([Reading() for _ in range(4)]).eval(), 4), [0, 2])
    # The first reads one tensor where others read two, and of the last one less is read: no chain of layers.
    assert skips(seen)[OutlineSkip.ALONE.value] == 4 + 2
    assert any(e.startswith("plain_graph") for e in seen.events)


class Halves(nn.Module):
    """Layers that take turns within: first halves of all, then the second halves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks({}, {}))

    def forward(self, x: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        made = [block(x, k, v) for block, (k, v) in zip(self.blocks, caches, strict=True)]
        first: Any = self.blocks[0]
        return [first.norm(made[0][0]) + made[1][0]]


def test_layers_whose_nodes_are_mixed() -> None:
    seen = compare(run(Halves().eval(), 2), [0, 0])
    assert skips(seen) == {OutlineSkip.MIXED.value: 4}


# what the trace of one layer assumes


def _lengths(values: Sequence[Any]) -> list[Any]:
    """Sizes of the caches among the inputs of a layer."""
    return [v.shape[2] for v in values if isinstance(v, Tensor) and v.ndim == 4]


def test_what_was_assumed_of_one_layer_is_a_guard_of_each() -> None:
    functionalise = backend.functionalise

    def assume(gm: GraphModule, values: Sequence[Any]) -> GraphModule | None:
        assert all(bool(size < 20) for size in _lengths(values))
        return functionalise(gm, values)

    with patch.object(backend, "functionalise", assume):
        seen = watch(run(Step(blocks({}, {}, {})).eval(), 3), outlined=True)
    assert seen.taken_out == [0, 3]  # lengths 9, 12, 15
    assert sum("< 20" in guard or "<= 19" in guard for guard in seen.guards[1]) == 6


def test_a_layer_that_does_not_fit_what_was_assumed_is_traced_by_itself() -> None:
    functionalise = backend.functionalise

    def assume(gm: GraphModule, values: Sequence[Any]) -> GraphModule | None:
        assert all(bool(size < 13) for size in _lengths(values))
        return functionalise(gm, values)

    generate = run(Step(blocks({}, {}, {})).eval(), 3, (5, 7))
    with patch.object(backend, "functionalise", assume):
        seen = watch(generate, outlined=True)
    assert seen.taken_out == [0, 2]  # lengths 9, 12, 15
    assert skips(seen)[OutlineSkip.GUARD.value] == 1
    for a, b in zip(seen.result, watch(generate, outlined=False).result, strict=True):
        assert torch.equal(a, b)


def test_a_trace_with_other_sizes_is_not_used() -> None:
    functionalise = backend.functionalise

    def other(gm: GraphModule, values: Sequence[Any]) -> GraphModule:
        graph = functionalise(gm, values)
        assert graph is not None
        for n in next(n for n in graph.graph.nodes if n.op == "output").args[0]:
            n.meta["val"] = n.meta["val"].double()
        return graph

    generate = run(Step(blocks({}, {})).eval(), 2, (5, 7))
    with patch.object(backend, "functionalise", other):
        seen = watch(generate, outlined=True)
    assert seen.taken_out == [0, 0] and skips(seen)[OutlineSkip.OUTPUT.value] == 2


def test_without_a_trace_nothing_is_taken_out() -> None:
    assert backend.functionalise(GraphModule(nn.Module(), torch.fx.Graph()), []) is None  # nothing is being compiled
    with patch.object(backend, "functionalise", lambda gm, values: None):
        seen = watch(run(Step(blocks({}, {})).eval(), 2, (5, 7)), outlined=True)
    assert seen.taken_out == [0, 0] and skips(seen)[OutlineSkip.TRACE.value] == 2


# checks


def test_checks_find_what_is_wrong() -> None:
    graph = torch.fx.Graph()
    call = graph.call_function(equal_layer, ([graph.placeholder("x")], [], "0"))
    graph.output((graph.call_function(len, (call,)),))
    gm = GraphModule(nn.Module(), graph)
    with pytest.raises(PassInvariantError, match="read as a whole"):
        check_outline_layers(gm)
    with pytest.raises(PassInvariantError, match="was not put back"):
        check_inline_layers(gm)
