"""What compiling costs, counted: graphs, variants, nodes, kernels and recompiles of each model of the table.

A model generates an image of each batch size, which compiles, then another of each batch size and prompt length. The
shipped model does so with one batch size, and its layers alone go through Inductor: the rest would take minutes.

Counts, not seconds, so that they are the same on every machine. `Row.margin` is how far a count may go either way: 0
where this repository alone decides it, more where PyTorch's own lowering takes part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters as dynamo
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from toprovar_compile import backend, dispatch, models
from toprovar_compile.inductor import compile_graph
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.plan import Plan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule

TABLE = Path(__file__).with_name("expected.json")
TINY = InfinityConfig(
    depth=2, embed_dim=64, num_heads=2, text_channels=128, text_maxlen=48, text_pad=16,
    vae=BSQVAEConfig(8, 32, (1, 2), 1),
)  # fmt: skip
PROMPTS = (5, 30, 48)  # tokens of the text
# Lowering of one operator may change with PyTorch; a pass that no longer matches changes more.
MARGIN_OF_KERNELS = 2


@dataclass(frozen=True)
class Row:
    """One count: of a model (`name`), what (`metric`), how many, and how far it may be off either way."""

    name: str
    metric: str
    value: int
    margin: int = 0


Generate = Callable[[int, int, int], object]
"""(batch, prompt length, seed) -> images."""


def emoji_var() -> Iterator[Row]:
    """The shipped model by its own plan."""
    model = models.load("emoji-var")
    fast: Any = compile_steps(model, {"inner": "eager"})

    def generate(batch: int, _: int, seed: int) -> Tensor:
        images: Tensor = fast(torch.arange(1, batch + 1), seed=seed)
        return images

    calls: dict[str, tuple[Any, ...]] = {}
    yield from _rows("emoji-var", generate, (1,), (0,), calls)
    yield from _kernels("emoji-var", calls)


def infinity() -> Iterator[Row]:
    """A small Infinity: text in a buffer, several of its lengths."""
    model = Infinity.random(TINY, dtype=torch.float32, seed=1)
    model.schedule = ScaleSchedule.from_patch_nums((1, 2, 3, 4, 6))
    plan = Plan.keep_share(model.schedule, TINY.depth, 0.5, 3, bucket=2)
    options = {"inner": "eager", "plan": plan}
    fast: Any = compile_steps(model, options)

    def generate(batch: int, prompt: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randn(prompt - i, TINY.text_channels, generator=generator) for i in range(batch)]
        images: Tensor = fast(texts, seed=seed)
        return images

    yield from _rows("infinity, small", generate, (1, 2), PROMPTS, {})


def _rows(
    name: str, generate: Generate, batches: Sequence[int], prompts: Sequence[int], calls: dict[str, tuple[Any, ...]]
) -> Iterator[Row]:
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()
    dynamo.clear()
    sizes: dict[str, int] = {}
    with torch.no_grad(), _counting(sizes, calls):
        generate(batches[0], prompts[0], 0)
        first = _frames()
        yield Row(name, "Dynamo frames", first)
        yield Row(name, "unique layer classes", len(dispatch._classes))
        yield Row(name, "variants of layers by the plan", _variants())
        for metric, nodes in sizes.items():
            yield Row(name, metric, nodes)
        for batch in batches[1:]:
            generate(batch, prompts[0], 0)
            yield Row(name, "Dynamo frames of a second batch", _frames() - first)
        frames, variants = _frames(), _variants()
        for batch in batches:
            for prompt in prompts:
                generate(batch, prompt, 1)
        yield Row(name, "recompiled frames later", _frames() - frames)
        yield Row(name, "recompiled variants later", _variants() - variants)
        yield Row(name, "graph breaks", sum(dynamo["graph_break"].values()))
        events = [e for e in counters.snapshot() if not e.startswith(("compiled", "plain_graph"))]
        yield Row(name, "kinds of fallbacks and misses", len(events))
    torch.compiler.reset()
    dispatch.reset()


def _frames() -> int:
    return int(dynamo["stats"]["unique_graphs"])


def _variants() -> int:
    return sum(len(cls.variants) for cls in dispatch._classes.values())


@contextmanager
def _counting(sizes: dict[str, int], calls: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Add up nodes before and after each pass, over all graphs it runs on, and keep the last call of each variant."""

    def note(name: str, before: int, after: int) -> None:
        for side, nodes in (("before", before), ("after", after)):
            metric = f"nodes {side} {name}"
            sizes[metric] = sizes.get(metric, 0) + nodes

    def run_passes(gm: GraphModule, passes: Any, ctx: Any) -> Any:
        reports = []
        for entry in passes:
            before = len(gm.graph.nodes)
            reports += original(gm, (entry,), ctx)
            note(entry.run.__name__, before, len(gm.graph.nodes))
        return reports

    def in_place(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(gm: GraphModule) -> Any:
            before = len(gm.graph.nodes)
            result = run(gm)
            note(run.__name__, before, len(gm.graph.nodes))
            return result

        return counted

    def making(run: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
        def counted(gm: GraphModule, *args: Any, **how: Any) -> GraphModule:
            result = run(gm, *args, **how)
            note(run.__name__, len(gm.graph.nodes), len(result.graph.nodes))
            return result

        return counted

    def split_layers(gm: GraphModule) -> Any:
        split = cut(gm)
        pieces = [split.prologue, split.epilogue, *(layer.piece for layer in split.layers)]
        note("split_layers", len(gm.graph.nodes), sum(len(piece.graph.graph.nodes) for piece in pieces))
        return split

    def run(unit: dispatch.Unit, name: str, graph: GraphModule, open_dims: Any, args: Sequence[Any]) -> Any:
        calls[name] = (graph, open_dims, args)
        return run_unit(unit, name, graph, open_dims, args)

    original, cut, run_unit = backend.run_passes, backend.split_layers, dispatch.Unit.run
    with (
        patch.object(dispatch.Unit, "run", run),
        patch.object(backend, "run_passes", run_passes),
        patch.object(dispatch, "run_passes", run_passes),
        patch.object(backend, "split_layers", split_layers),
        patch.object(dispatch, "write_kv_cache", in_place(dispatch.write_kv_cache)),
        patch.object(dispatch, "prune_tokens", making(dispatch.prune_tokens)),
    ):
        yield


def _kernels(name: str, calls: Mapping[str, tuple[Any, ...]]) -> Iterator[Row]:
    """Kernels of a layer as Inductor makes them for all tokens and for some of them, each as it was called last."""
    dense = "dense" if "dense" in calls else "dense with entropy"
    for kind, variant in (("dense", dense), ("pruned", next(n for n in calls if n.startswith("prune")))):
        graph, open_dims, args = calls[variant]
        _, (code, *_) = run_and_get_code(compile_graph, graph, args, open_dims, "inductor")
        kernels = [line.partition(" ")[0] for line in code.splitlines() if line.startswith("cpp_fused")]
        yield Row(name, f"Inductor kernels, {kind} layer", len(kernels), MARGIN_OF_KERNELS)
        yield Row(name, f"external kernels, {kind} layer", code.count("extern_kernels."), MARGIN_OF_KERNELS)
        yield Row(name, f"kernels that clone, {kind} layer", sum("clone" in k for k in kernels), 1)


def measure() -> list[Row]:
    """All rows of the table."""
    return [*emoji_var(), *infinity()]


def load() -> list[Row]:
    """The rows as they are checked in."""
    return [Row(**row) for row in json.loads(TABLE.read_text())]


def save(rows: Sequence[Row]) -> None:
    """Write the table, a row a line."""
    TABLE.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def differences(found: Sequence[Row], expected: Sequence[Row]) -> list[str]:
    """Readable lines on every count that is off by more than its margin, new or gone."""
    new = {(row.name, row.metric): row for row in found}
    old = {(row.name, row.metric): row for row in expected}
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        label = f"{key[0]}: {key[1]}"
        if before is None and after is not None:
            lines.append(f"{label}: {after.value}, not in the table")
        elif after is None and before is not None:
            lines.append(f"{label}: in the table as {before.value}, no longer counted")
        elif before is not None and after is not None and abs(after.value - before.value) > before.margin:
            margin = f" ± {before.margin}" if before.margin else ""
            lines.append(
                f"{label}: expected {before.value}{margin}, got {after.value} ({after.value - before.value:+d})"
            )
    return lines
