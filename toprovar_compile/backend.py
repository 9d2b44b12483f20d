"""The entry point: `torch.compile(model, backend="toprovar")`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from functorch.compile import aot_module_simplified
from torch import Tensor
from torch.fx import GraphModule, Node

from toprovar_compile.bind_plan import PlanBinder
from toprovar_compile.bisecting import limited
from toprovar_compile.cuda_graph import Scale
from toprovar_compile.dispatch import StepProgram, current_lane, state_of
from toprovar_compile.dump import Dump
from toprovar_compile.errors import UnsupportedGraphError
from toprovar_compile.inductor import compile_plain, functionalise, pure_frame
from toprovar_compile.kernels import fae
from toprovar_compile.options import Options
from toprovar_compile.passes import (
    DYNAMO_PASSES,
    Outline,
    Pass,
    PassContext,
    attention_forms,
    check_inline_layers,
    check_outline_layers,
    check_split_layers,
    copy_graph,
    run_passes,
    split_layers,
)
from toprovar_compile.passes._torch_ir import mutates
from toprovar_compile.report import GraphReport, counters, logger, ran
from toprovar_compile.session import current_session


def toprovar(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one captured graph. A scale's step runs by its plan, any other graph as Inductor compiles it.

    Raises OptionError for a bad option, and at the first step PlanError for a plan that does not fit the model.
    """
    opts = limited(Options.parse(options))
    if mode not in (None, "default"):
        counters.add("ignored", f"mode={mode!r}: it is a mode of Inductor; see docs/options.md")
    dump = Dump.open(opts.dump)
    dump.captured(gm, example_inputs, opts.inner)
    if torch.is_grad_enabled():
        return _plain(gm, example_inputs, opts, "gradients are enabled, and a plan is for generation", dump, loud=True)
    step = copy_graph(gm)
    passes = run_passes(step, DYNAMO_PASSES, PassContext(observe=dump.observe))
    if not any(n.target is fae for n in step.graph.nodes):
        return _plain(gm, example_inputs, opts, "the graph has no attention: it is no step of a scale", dump)
    forms = ", ".join(f"{count} x {name}" for name, count in attention_forms(gm).items())
    report = GraphReport("step", "one scale through all layers", [f"attention: {forms}", *map(str, passes)])
    try:
        return _compile_step(step, example_inputs, opts, report, dump)
    except UnsupportedGraphError as refusal:
        return _plain(gm, example_inputs, opts, str(refusal), dump)


def fixed_inputs(inputs: Sequence[Node]) -> list[int]:
    """Positions of the inputs that stay where they are in memory: weights and buffers, as Dynamo marks them."""
    return [i for i, n in enumerate(inputs) if "_dynamo_static_input_type" in n.meta.get("tensor_dict", {})]


def writes_in_place(gm: GraphModule) -> bool:
    """Whether a captured graph may write into one of its inputs, which must then not be copied before it runs."""
    return any(mutates(n) for n in gm.graph.nodes)


def _compile_step(
    gm: GraphModule, example_inputs: Sequence[Any], opts: Options, report: GraphReport, dump: Dump
) -> Callable[..., Any]:
    """Functionalise, split, bind; the pieces are compiled when they first run."""
    session = current_session()
    hints = {"n": max(session.schedule.tokens)} if session is not None else {}
    binder = PlanBinder(opts)
    fixed = fixed_inputs([n for n in gm.graph.nodes if n.op == "placeholder"])
    frame = pure_frame() if dump.recorder is None else None  # a recorder wants to see every step
    outline = Outline(functionalise)
    outlining = Pass(outline.outline_layers, check_outline_layers)
    for taken_out in run_passes(gm, (outlining,), PassContext(observe=dump.observe)):
        report.passes.append(str(taken_out))
        for reason, count in taken_out.skipped.items():
            counters.add("skipped", f"outline_layers: {reason.value}", count)

    def compile_functional(functional: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        outline.inline_layers(functional)
        check_inline_layers(functional)
        dump.graph("functional", functional)
        split = split_layers(functional)
        check_split_layers(functional, split)
        dump.split(split)
        program = StepProgram(split, opts.inner, hints, report, fixed, frame, binder.plan)
        dump.program(program)

        def run(read: list[Any]) -> list[Any]:
            read.clear()
            args = given.get()
            plan = program.bind([args[i] for i in fixed], len(program.layers))
            dump.begin(plan)
            return program(args, plan, state_of(plan, len(program.layers)))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with outline.traced():
        traced = aot_module_simplified(
            gm, outline.read(example_inputs), fw_compiler=compile_functional, inference_compiler=compile_functional
        )
    given: ContextVar[Sequence[Any]] = ContextVar("toprovar_step_inputs")

    def call(*args: Any) -> Any:
        token = given.set(args)
        try:
            return traced(*outline.read(args))
        finally:
            given.reset(token)

    return call


def _plain(
    gm: GraphModule, example_inputs: Sequence[Any], opts: Options, reason: str, dump: Dump, *, loud: bool = False
) -> Callable[..., Any]:
    """Compile as Inductor does, and say why."""
    (logger.warning if loud else logger.info)("compiled without a plan: %s", reason)
    counters.add("plain_graph", reason)
    report = GraphReport("plain", reason)
    dump.plain(report)
    call = compile_plain(gm, example_inputs, opts.inner)
    captured = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fixed = fixed_inputs(captured)
    moving = [i for i, n in enumerate(captured) if i not in fixed and isinstance(n.meta.get("example_value"), Tensor)]
    graphable = not torch.is_grad_enabled() and not writes_in_place(gm)

    def run(*args: Any) -> Any:
        ran(report)
        lane = current_lane() if graphable and moving and args[moving[0]].is_cuda else None
        if lane is None:
            return call(*args)
        return lane.run(Scale.stateless((call, "plain"), lambda given: list(call(*given)), moving), args)

    return run
