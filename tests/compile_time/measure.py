"""What compiling costs, counted: graphs, variants, nodes, kernels and recompiles of each model of the table.

A model generates an image of each batch size, which compiles, then two more of each batch size, prompt length and
aspect ratio. The shipped model does so with one batch size, and only layers go through Inductor: the rest would take
minutes.

Counts, not seconds, so that they are the same on every machine. `Row.margin` is how far a count may go either way: 0
where this repository alone decides it, more where PyTorch's own lowering takes part.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from toprovar_compile import backend, dispatch, models
from toprovar_compile.inductor import compile_graph
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.models.infinity_schedule import infinity_schedule
from toprovar_compile.plan import Plan
from toprovar_compile.prepare import hart
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import generation

TABLE = Path(__file__).with_name("expected.json")
TINY = InfinityConfig(
    depth=2, embed_dim=64, num_heads=2, text_channels=128, text_maxlen=48, text_pad=16,
    vae=BSQVAEConfig(8, 32, (1, 2), 1),
)  # fmt: skip
PROMPTS = (5, 30, 48)  # tokens of the text
RATIOS = ("1:1", "4:3", "9:16", "3:1")
# Lowering of one operator may change with PyTorch; a pass that no longer matches changes more.
MARGIN_OF_KERNELS = 2


@dataclass(frozen=True)
class Row:
    """One count: of a model (`name`), what (`metric`), how many, and how far it may be off either way."""

    name: str
    metric: str
    value: int
    margin: int = 0


Generate = Callable[[int, int, str, int], object]
"""(batch, prompt length, aspect ratio, seed) -> images."""


def emoji_var() -> Iterator[Row]:
    """The shipped model by its own plan."""
    model = models.load("emoji-var")
    fast: Any = compile_steps(model, {"inner": "eager"})

    def generate(batch: int, _: int, __: str, seed: int) -> Tensor:
        images: Tensor = fast(torch.arange(1, batch + 1), seed=seed)
        return images

    calls: dict[str, tuple[Any, ...]] = {}
    yield from _rows("emoji-var", generate, calls, batches=(1,))
    yield from _kernels("emoji-var", calls)


def infinity() -> Iterator[Row]:
    """A small Infinity: text in a buffer, several of its lengths, grids of several ratios, each with its plan."""
    model = Infinity.random(TINY, dtype=torch.float32, seed=1)
    schedules = {ratio: infinity_schedule(ratio, "0.06M") for ratio in RATIOS}
    plans = {ratio: Plan.keep_share(s, TINY.depth, 0.5, 5, bucket=2) for ratio, s in schedules.items()}
    fast: Any = compile_steps(model, {"inner": "eager"})

    def generate(batch: int, prompt: int, ratio: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randn(prompt - i, TINY.text_channels, generator=generator) for i in range(batch)]
        model.plan = plans[ratio]
        images: Tensor = fast(texts, seed=seed, schedule=schedules[ratio])
        return images

    yield from _rows("infinity, small", generate, {}, batches=(1, 2), prompts=PROMPTS, ratios=RATIOS)


class HartLike(nn.Module):
    """The step of an official HART over stand-ins of its modules: text tokens first, rotary positions, Llama's blocks.

    Rows are the prompts, then as many without one; inputs of the scales are random numbers.
    """

    prefix, width, heads, sides = 7, 32, 2, (2, 3, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(hart.Layer(self._block()) for _ in range(3))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin, self.head_nm.ln_wo_grad = nn.Linear(self.width, 2 * self.width), nn.Identity()
        self.head = nn.Linear(self.width, 16)
        self.schedule = ScaleSchedule.from_patch_nums(self.sides)

    step = hart.PreparedHART.step

    def _block(self) -> nn.Module:
        block, attn, c = nn.Module(), nn.Module(), self.width
        attn.qkv_proj, attn.proj = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c)
        attn.q_bias, attn.v_bias = nn.Parameter(torch.zeros(c)), nn.Parameter(torch.zeros(c))
        attn.register_buffer("zero_k_bias", torch.zeros(c))
        sizes = {"num_heads": self.heads, "head_dim": c // self.heads, "scale": (c // self.heads) ** -0.5}
        for name, value in (sizes | {"attn_l2_norm": False}).items():
            setattr(attn, name, value)
        block.attn, block.ffn, block.ln_wo_grad = attn, _Gated(c), nn.Module()
        block.ln_wo_grad.weight, block.ln_wo_grad.variance_epsilon = nn.Parameter(torch.ones(c)), 1e-6
        block.disable_aln, block.shared_aln = True, True
        block.scale_shift_table = nn.Parameter(torch.randn(6, c) / c**0.5)
        return block

    @torch.compiler.disable(recursive=False)
    def forward(self, batch: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        condition = torch.randn(2 * batch, 1, self.width, generator=rng)
        text = torch.randn(2 * batch, 1, self.width, generator=rng)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        with generation(self.schedule, lambda: "hart-like", None, self.prefix) as session:
            for s in itertools.chain([-1], session.scales()):
                tokens = self.schedule.tokens[s] if s >= 0 else self.prefix
                x = torch.randn(2 * batch, tokens, self.width, generator=rng)
                angles = torch.randn(2 * batch, 1, tokens, self.width // self.heads, generator=rng)
                logits, _, keys, values = self.step(x, condition, text, angles.cos(), angles.sin(), keys, values)
        return logits


class _Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def hart_like() -> Iterator[Row]:
    """A small HART: a text step that fills the caches before the first scale."""
    torch.manual_seed(0)
    model = HartLike().eval().requires_grad_(False)
    plan = Plan.keep_share(model.schedule, len(model.layers), 0.5, 2, bucket=2)
    fast: Any = compile_steps(model, {"inner": "eager", "plan": plan})
    calls: dict[str, tuple[Any, ...]] = {}
    yield from _rows("hart-like", lambda batch, _, __, seed: fast(batch, seed), calls, batches=(1, 2))
    yield from _kernels("hart-like", calls)


def _rows(
    name: str,
    generate: Generate,
    calls: dict[str, tuple[Any, ...]],
    *,
    batches: Sequence[int],
    prompts: Sequence[int] = (0,),
    ratios: Sequence[str] = ("1:1",),
) -> Iterator[Row]:
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()
    dynamo.clear()
    sizes: dict[str, int] = {}
    with torch.no_grad(), _counting(sizes, calls):
        generate(batches[0], prompts[0], ratios[0], 0)
        first = _frames()
        yield Row(name, "Dynamo frames", first)
        yield Row(name, "unique layer classes", len(dispatch._classes))
        yield Row(name, "variants of layers by the plan", _variants())
        for metric, nodes in sizes.items():
            yield Row(name, metric, nodes)
        for batch in batches[1:]:
            generate(batch, prompts[0], ratios[0], 0)
            yield Row(name, "Dynamo frames of a second batch", _frames() - first)
        frames, decoders, variants = _frames(), _plain_graphs(), _variants()
        for batch, prompt, ratio, seed in itertools.product(batches, prompts, ratios, (1, 2)):
            generate(batch, prompt, ratio, seed)
        plain = _plain_graphs() - decoders
        yield Row(name, "recompiled steps later", _frames() - frames - plain)
        yield Row(name, "recompiled decoders later", plain)
        yield Row(name, "recompiled variants later", _variants() - variants)
        yield Row(name, "graph breaks", sum(dynamo["graph_break"].values()))
        events = [e for e in counters.snapshot() if not e.startswith(("compiled", "plain_graph"))]
        yield Row(name, "kinds of fallbacks and misses", len(events))
    torch.compiler.reset()
    dispatch.reset()


def _frames() -> int:
    return int(dynamo["stats"]["unique_graphs"])


def _plain_graphs() -> int:
    return sum(count for event, count in counters.snapshot().items() if event.startswith("plain_graph"))


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
    return [*emoji_var(), *infinity(), *hart_like()]


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
