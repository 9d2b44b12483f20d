"""Everything the page shows, as plain data: read from the compiler's own objects when a page is written."""

from __future__ import annotations

import base64
import io
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.dump.reasons import decided_by, describe, why
from toprovar_compile.dump.record import Generation, Recorder, Stage, graph_text, stage_of
from toprovar_compile.inductor import cache_factors, generated_code
from toprovar_compile.passes import (
    PASSES_OF_A_VARIANT,
    PassContext,
    PassReport,
    copy_graph,
    read_entropy,
    run_passes,
    shape_of,
)
from toprovar_compile.passes.prove_token_axis import token_states
from toprovar_compile.report import counters

if TYPE_CHECKING:
    from toprovar_compile.dispatch import LayerClass, Unit
    from toprovar_compile.passes._token_rules import State
    from toprovar_compile.plan import Plan

_SIDE = 512  # pixels of the image on the page, at most
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_PRUNED = (12, 12, 24, 190)
_KERNEL = re.compile(r"^(\w+) = async_compile\.|extern_kernels\.(\w+)\(|torch\.ops\.([\w.]+)\(", re.MULTILINE)


@dataclass(frozen=True)
class VariantFacts:
    """One compiled variant. `kernels` counts what its generated `code` defines and calls."""

    name: str
    hits: int
    seconds: float
    started: float
    guards: list[str]
    code: str
    cache_key: str
    kernels: dict[str, int]
    factors: dict[str, str]


@dataclass(frozen=True)
class UnitFacts:
    """A graph that is compiled: a layer class, a prologue or an epilogue.

    `nodes` are (name, operator, shape, token axis, user line), `stages` (variant, what a pass did for it).
    """

    name: str
    text: str
    variants: list[VariantFacts]
    proof: str = ""
    holds: bool = False
    layers: list[str] = field(default_factory=list)
    nodes: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    stages: list[tuple[str, Stage]] = field(default_factory=list)


def kernels_of(code: str) -> dict[str, int]:
    """Kernels of a generated file: how often each is defined (fused ones) or called (library and operators)."""
    names = (next(g for g in m.groups() if g) for m in _KERNEL.finditer(code))
    return dict(Counter(name for name in names if not name.startswith(("toprovar._", "aten.empty"))))


def variants_of(unit: Unit) -> list[VariantFacts]:
    """The compiled variants of a unit."""
    found = []
    for v in list(unit.variants):
        code, key = generated_code(v.compiled.call) if unit.inner == "inductor" else ("", "")
        guards = [str(r) for r in v.compiled.relations]
        factors = cache_factors(v.compiled.call) if code else {}
        seconds, started = v.compiled.seconds, v.compiled.started
        found.append(VariantFacts(v.name, v.hits, seconds, started, guards, code, key, kernels_of(code), factors))
    return found


def layer_class_facts(cls: LayerClass, layers: list[str]) -> UnitFacts:
    """A class of layers: proof, annotation of every node, variants and the passes that made them."""
    proof = cls.proof
    text = "the tokens are independent but for attention" if proof.holds else f"none, for {proof.reason}"
    return UnitFacts(
        f"layer_{cls.key}", graph_text(cls.graph, f"layer_{cls.key}"), variants_of(cls), text, proof.holds, layers,
        _nodes(cls.graph), _stages(cls),
    )  # fmt: skip


def _stages(cls: LayerClass) -> list[tuple[str, Stage]]:
    """(variant, pass) in order. Passes are run again, on copies: nobody watched when the code was compiled."""
    found: list[tuple[str, Stage]] = []
    for name, final in cls.graphs.items():
        if name == "skip":
            found.append((name, Stage("restore_tokens", graph_text(final))))
            continue
        graph = read_entropy(cls.graph) if name.endswith("with entropy") else copy_graph(cls.graph)
        seen: list[Stage] = []

        def observe(gm: GraphModule, seen: list[Stage] = seen) -> Any:
            before = graph_text(gm)

            def done(report: PassReport) -> None:
                seen.append(stage_of(report, before, graph_text(gm)))

            return done

        run_passes(graph, PASSES_OF_A_VARIANT, PassContext(observe=observe))
        if name.startswith("prune"):
            seen.append(Stage("prune_tokens", graph_text(final), graph_text(graph), 1))
        found += [(name, stage) for stage in seen]
    return found


def _nodes(graph: GraphModule) -> list[tuple[str, str, str, str, str]]:
    states = token_states(graph)
    if not states:  # the number of tokens is fixed in this graph, and nothing was to prove
        return []
    rows = []
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            rows.append((node.name, _operator(node), _shape(node), _axis(node, states), _line(node)))
    return rows


def _operator(node: Node) -> str:
    return "input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(str(s) for s in shape_of(value))}]"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return "number" if value is not None else "buffer or length"


def _axis(node: Node, states: Mapping[str, State]) -> str:
    if node.name not in states:
        return "number" if isinstance(node.meta.get("val"), int | float | torch.SymInt) else "not reached"
    state = states[node.name]
    parts = state if isinstance(state, tuple) else (state,)
    texts = []
    for part in parts:
        if part is None:
            texts.append("no tokens")
            continue
        axis = part.token
        inside = "" if axis.outer == axis.inner == 1 else f" inside {axis.outer * axis.size * axis.inner}"
        texts.append(f"tokens in dimension {axis.dim}{inside}" + ("" if part.own else ", from an input"))
    return "; ".join(texts)


def _line(node: Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("File ")]
    match = re.match(r'File "(.*)", line (\d+)', where[-1]) if where else None
    return f"{os.path.basename(match[1])}:{match[2]}" if match else ""


def gather(recorder: Recorder) -> dict[str, Any]:
    """All facts of a recorder, for the page and the files beside it."""
    units: dict[str, UnitFacts] = {}
    graphs = []
    for record in recorder.graphs:
        program = record.program
        names: dict[str, list[str]] = {}
        if program is not None:
            for b in program.layers:
                names[b.cls.key] = [*names.get(b.cls.key, []), b.name]
            for cls in {b.cls.key: b.cls for b in program.layers}.values():
                if f"layer_{cls.key}" not in units:
                    units[f"layer_{cls.key}"] = layer_class_facts(cls, names[cls.key])
            parts: dict[str, Unit] = {f"prologue_{i}": part.unit for i, part in enumerate(program.prologue)}
            for part, unit in (parts | {"epilogue": program.epilogue}).items():
                name = f"{record.name}_{part}"
                units[name] = UnitFacts(name, graph_text(unit.graph, part), variants_of(unit))
        graphs.append(
            {
                "name": record.name,
                "kind": record.report.kind,
                "reason": record.report.reason,
                "stages": record.stages,
                "layers": [
                    (i, b.name, f"layer_{b.cls.key}", b.cls.proof.holds, b.cls.proof.reason)
                    for i, b in enumerate(program.layers)
                ]
                if program is not None
                else [],
                "guards": dict(program.guard_hits) if program is not None else {},
            }
        )
    events = counters.snapshot()
    return {
        "machine": machine(),
        "graphs": graphs,
        "units": units,
        "plans": [plan_facts(plan, recorder.generation) for plan in recorder.plans.values()],
        "generation": generation_facts(recorder.generation) if recorder.generation is not None else None,
        "generations": recorder.ended,
        "events": dict(sorted(events.items())),
        "misses": {k: n for k, n in events.items() if k.startswith(("guard_miss", "variant_guard_miss", "fallback"))},
    }


def machine() -> dict[str, str]:
    """What the results depend on beside graph and plan."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    from toprovar_compile import __version__

    return {
        "toprovar_compile": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "device": device,
        "command": " ".join(os.path.basename(a) if i == 0 else a for i, a in enumerate(sys.argv)),
    }


def plan_facts(plan: Plan, generation: Generation | None) -> dict[str, Any]:
    """The plan as cells with reasons; where the generation that was watched ran otherwise, what it ran.

    `maps` of a cell are the scales whose maps of that layer show what was decided, if that generation followed the
    plan.
    """
    ran = {}
    watched = generation is not None and generation.plan is not None and generation.plan.digest() == plan.digest()
    if generation is not None and watched:
        ran = {(p.scale, p.what): p.action for p in generation.parts if isinstance(p.what, int)}
    scales = []
    for s, scale in enumerate(plan.scales):
        cells: list[dict[str, Any]] = []
        for layer in range(plan.num_layers):
            if not scale.run:
                cell = {"kind": "norun", "text": "", "ran": ""}
            else:
                action = scale.layers[layer]
                did = ran.get((s, layer), str(action))
                text = {"dense": "", "skip": "0", "prune": str(action.keep)}[action.kind]
                cell = {"kind": action.kind, "text": text, "ran": did if did != str(action) else ""}
            by = decided_by(plan, s, layer)
            maps = [s] if watched and by is None else [by, s] if watched else []
            cells.append(cell | {"why": why(plan, s, layer), "maps": maps})
        h, w = plan.schedule.grids[s]
        scales.append(
            {
                "s": s,
                "grid": f"{h} x {w}",
                "tokens": h * w,
                "run": scale.run,
                "cfg": scale.cfg,
                "share": plan.token_share()[s],
                "cells": cells,
            }
        )
    return {"digest": plan.digest(), "layers": plan.num_layers, "scales": scales, "about": describe(plan), "plan": plan}


def generation_facts(generation: Generation) -> dict[str, Any]:
    """Times of every scale and part in ms, the image, and the maps over it.

    `measured` is a scale's share of the time of all scales; `predicted` the share that the tokens it computes have.
    """
    zero, total = generation.started, max(generation.ended - generation.started, 1e-9)
    scales: dict[int, list[Any]] = {}
    for part in generation.parts:
        scales.setdefault(part.scale, []).append(part)
    rows, maps = [], []
    plan = generation.plan
    tokens = [n * share for n, share in zip(plan.schedule.tokens, plan.token_share(), strict=True)] if plan else []
    spent = sum(parts[-1].end - parts[0].start for s, parts in scales.items() if s >= 0)
    for s, parts in scales.items():
        layers = [p for p in parts if isinstance(p.what, int)]
        rows.append(
            {
                "s": s,
                "start": 100 * (parts[0].start - zero) / total,
                "width": 100 * (parts[-1].end - parts[0].start) / total,
                "ms": 1e3 * (parts[-1].end - parts[0].start),
                "layers": [(p.what, p.action, 1e3 * (p.end - p.start)) for p in layers],
                "measured": (parts[-1].end - parts[0].start) / max(spent, 1e-9) if s >= 0 else None,
                "predicted": tokens[s] / max(sum(tokens), 1e-9) if tokens and s >= 0 else None,
                "slowest": max((1e3 * (p.end - p.start) for p in layers), default=0.0),
            }
        )
        grid = plan.schedule.grids[s] if plan is not None and s >= 0 else None
        shown = [p for p in layers if grid is not None and (p.kept is not None or p.entropy is not None)]
        if shown and grid is not None:
            maps.append({"s": s, "grid": f"{grid[0]} x {grid[1]}", "maps": [_map(p, grid) for p in shown]})
    return {
        "number": generation.number,
        "ms": 1e3 * total,
        "scales": rows,
        "maps": maps,
        "image": _uri(_picture(generation.image)) if generation.image is not None else "",
        "ratio": generation.image.shape[2] / generation.image.shape[1] if generation.image is not None else 1,
        "plan": plan.digest() if plan is not None else "dense",
    }


def _map(part: Any, grid: tuple[int, int]) -> dict[str, Any]:
    n = grid[0] * grid[1]
    entropy, kept = "", ""
    low = high = 0.0
    if part.entropy is not None and part.entropy.numel() == n:
        values = part.entropy.numpy().astype(np.float64)
        low, high = float(values.min()), float(values.max())
        entropy = _uri(Image.fromarray(_coloured((values - low) / max(high - low, 1e-9)).reshape(*grid, 3)))
    if part.kept is not None:
        mask = np.tile(np.array(_PRUNED, dtype=np.uint8), (n, 1))
        mask[part.kept.numpy()] = 0
        kept = _uri(Image.fromarray(mask.reshape(*grid, 4)))
    count = len(part.kept) if part.kept is not None else n
    return {
        "layer": part.what, "entropy": entropy, "kept": kept, "count": count, "tokens": n, "low": low, "high": high
    }  # fmt: skip


def _coloured(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Colours from dark blue (0) to yellow (1)."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, at, _COLOURS[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def _picture(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
