"""Replay a scale of a step without going through Dynamo and AOTAutograd, which look at every weight of the model.

A step is replayed so only if its CUDA graph was launched through them before, in this or an earlier generation, for
arguments of this very form, and if in this generation Dynamo's guards of the same compiled code held for a scale: it
ran the code, or its guards were asked, here, once a generation (`inductor.Guards.hold`). Why the images are then the
ones that running the step would give:

- Where the guards on model and globals of several compilations are the same, as Dynamo describes them
  (`inductor.Guards.about_model`), those of one are asked for all.
- Dynamo's guards are about the arguments, the modes of torch, and the model with the globals that its code reads. Those
  on arguments held when the graph was launched for arguments of equal form (types, dtypes, devices, sizes, strides,
  which of them are the same, all plain values); form is compared anew. Those on modes and on the model held earlier in
  this generation, or hold now; modes are compared anew, and so is what the model consists of: at every scale each of
  its weights must be the same tensor in the same module. Their addresses are those of the recording, once an image.
  Numbers that relate the two kinds are refused: sizes that a program computes with are those of arguments alone
  (`inductor.pure_frame`).
- Code whose guards hold is code that Dynamo may run, if it was compiled for the backend that it compiles for now. That
  is so if the generation runs under the callback of Dynamo that the code was run under before: one belongs to one call
  of `torch.compile`, and a stance that forbids compiled code has another or none.
- What Dynamo's code does beside running the graph must be nothing: no change of an object that was there before, no
  graph break, no random number, and every output of the graph is found in the result as it is, and every input among
  the arguments and the weights. So the result is the same arrangement of the same outputs.
- Weights that are written to are read by the graph as they are; those of which an earlier scale made something for the
  whole image (casts, say) must have been left alone since the generation began.
- The plan of a generation whose first scale is replayed is bound as the step itself would bind it, to the same weights.

What code between two scales of an image changes at a module other than its tensors and submodules (flags, numbers), in
globals that the step reads, or at the address under a weight (`weight.data = ...`), is seen at the next image.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprovar_compile.cuda_graph import Captured, Lane, Launch, Moving
from toprovar_compile.inductor import Guards, mode_guard, tensor_guard
from toprovar_compile.report import counters

if TYPE_CHECKING:
    from toprovar_compile.dispatch import StepProgram, StepState
    from toprovar_compile.session import Session

_TENSORS = {Tensor}
_PLAIN = (type(None), bool, int, float, str)
_FIRST = "first program"  # key in `Lane.notes` of what the latest generation on the lane began with
_version = attrgetter("_version")


class StepReplays:
    """What the steps of one generation need to be replayed; what is learnt is kept in the generation's lane."""

    def __init__(self, state: StepState) -> None:
        self._owner = weakref.ref(state)  # which holds this: what a generation had is freed at its end
        self._checked: dict[StepProgram, _Checked] = {}
        self._latest: tuple[StepProgram, Launch] | None = None

    @property
    def _state(self) -> StepState:
        state = self._owner()
        assert state is not None
        return state

    def launched(self, program: StepProgram, launch: Launch | None) -> None:
        """A program ran, as this graph if it was one."""
        self._latest = None if launch is None else (program, launch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def replay(self, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What `run(*args)` returns, by launching the graph of this scale; None where `run` has to run."""
        state = self._state
        session = state.session
        assert session is not None
        if not session.bound and not self._bind(state.lane.notes.get(_FIRST), run):
            return None
        plan = session.plan
        if plan is not state.plan:
            state.follow(plan)
        form = _Form.of(args)
        known = None if form is None else _known(state).get((state.digest, session.scale, form.key, state.behind()))
        if form is None or known is None or not form.values:
            return None
        values, captured = form.values, known.captured()
        if (
            captured is None
            or not known.is_like(*values)
            or not known.reads_caches(values, captured)
            or not self._stands(known.program, run)
            or not state.lane.recordable(values[0])
        ):
            return None
        outputs = state.lane.replay(known.launch, captured, known.moving, values)
        # Dynamo's guards are asked while the device works. Where they do not hold, running the scale writes all of what
        # the graph wrote, and nobody has seen that.
        if outputs is None or not self._guarded(known.program, args):
            return None
        known.program.step.begin(plan, state)
        state.restore(captured.state)
        counters.add("replayed")
        return _arrange(known.result, outputs)

    def _bind(self, first: _Program | None, run: Callable[..., Any]) -> bool:
        """Bind the plan of a generation that begins with this program; False where it may begin with another."""
        if first is None or first.run != run or not first.weights.in_modules():
            return False
        first.step.bind(first.fixed, len(first.step.layers))
        return True

    def _stands(self, program: _Program, run: Callable[..., Any]) -> bool:
        """Whether this program is what runs `run` in these modes, on weights that are where they were."""
        checked = self._checked.get(program.step)
        if checked is not None:
            return checked.program is program and program.run == run and checked.still()
        others = [c.program for c in self._checked.values()]
        state, weights = self._state, program.weights
        assert state.session is not None
        return (
            program.run == run
            and state.session.compiler is not None
            and program.compiler() is state.session.compiler
            and program.same_modes()
            and weights.in_modules()
            and (any(other.weights is weights for other in others) or weights.in_place())
            and not state.rewritten(program.hoisted)
        )

    def _guarded(self, program: _Program, args: Sequence[Any]) -> bool:
        """Whether Dynamo's guards on the model hold, or held earlier in this generation."""
        if program.step not in self._checked:
            others = [c.program for c in self._checked.values()]
            if not (any(program.guarded_like(other) for other in others) or program.guards.hold(program.run, args)):
                return False
            self._checked[program.step] = _Checked.now(program)
        return True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def learn(self, run: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
        """`run(*args)` ran and returned `result`: note what its graph, if it was one, needs to be replayed."""
        state = self._state
        latest, self._latest, state.lane.latest = self._latest, None, None
        if latest is None:
            return
        step, launch = latest
        program = _program(state, step, run, launch.args)
        if program is None:
            return
        if not self._checked:
            state.lane.notes[_FIRST] = program
        self._checked[step] = _Checked.now(program)
        form = _Form.of(args)
        assert state.session is not None
        if form is None:
            return
        key = (state.digest, state.session.scale, form.key, launch.key[-1])
        old = _known(state).get(key)
        if old is None or old.captured() is not launch.captured or old.program is not program:
            found = _Known.of(program, launch, form, result)
            if found is not None:
                _known(state)[key] = found


def resumable(session: Session, schedule: Any, lane: Lane) -> bool:
    """Whether a generation may begin on this idle lane of `schedule` before its first step has run."""
    first: _Program | None = lane.notes.get(_FIRST)
    return (
        first is not None
        and schedule == session.schedule
        and first.compiler() is session.compiler
        and lane.recordable(first.fixed[0])
    )


@dataclass(frozen=True)
class _Form:
    """Arguments as tensors, each once, and a key of how they are arranged, plain values and some of the sizes."""

    key: Hashable
    values: list[Tensor]

    @classmethod
    def of(cls, args: Sequence[Any]) -> _Form | None:
        """None where an argument is no tensor, plain value, or list, tuple or dict of them."""
        tensors: list[Tensor] = []
        try:
            spec = _flatten(args, tensors)
        except _Foreign:
            return None
        ids = list(map(id, tensors))
        if len(set(ids)) == len(ids):
            return cls((spec, ()), tensors)
        unique = dict(zip(ids, tensors, strict=True))
        order = {at: n for n, at in enumerate(unique)}
        return cls((spec, tuple(map(order.__getitem__, ids))), list(unique.values()))


class _Foreign(Exception):
    pass


def _flatten(value: Any, into: list[Tensor]) -> Hashable:
    """The arrangement of `value`, whose tensors are appended to `into`. Raises _Foreign for what it does not know."""
    kind = type(value)
    if kind is Tensor:
        into.append(value)
        return tuple(value.shape)
    if kind is list or kind is tuple:
        if value and set(map(type, value)) == _TENSORS:
            into.extend(value)
            return kind, len(value), tuple(value[0].shape)
        return kind, tuple([_flatten(v, into) for v in value])
    if kind is dict:
        return kind, tuple([(_flatten(k, into), _flatten(v, into)) for k, v in value.items()])
    if kind in _PLAIN:
        return kind, value, str(value) if kind is float else ""  # 0.0 equals -0.0
    raise _Foreign


@dataclass(frozen=True)
class _Weights:
    """Weights of a model with their addresses, and where they are in it.

    `tables` are the dicts of modules in which they, and the modules on the way to them, were found, and `found` all
    that was in these.
    """

    tensors: list[Tensor]
    pointers: list[int]
    tables: list[dict[str, Any]]
    found: list[Any]

    @classmethod
    def of(cls, model: nn.Module, tensors: list[Tensor]) -> _Weights | None:
        """None where a tensor is in no module."""
        wanted, tables = set(map(id, tensors)), list[dict[str, Any]]()
        _find(model, wanted, tables)
        found = _held_by(tables)
        if not wanted <= set(map(id, found)):
            return None
        return cls(tensors, list(map(Tensor.data_ptr, tensors)), tables, found)

    def in_modules(self) -> bool:
        """Whether they are still what the modules hold."""
        found = _held_by(self.tables)
        return len(found) == len(self.found) and all(map(is_, found, self.found))

    def in_place(self) -> bool:
        """Whether they are still where they were in memory."""
        return list(map(Tensor.data_ptr, self.tensors)) == self.pointers


def _held_by(tables: list[dict[str, Any]]) -> list[Any]:
    """All values of dicts with strings as keys, in order: the fastest way to them."""
    return gc.get_referents(*tables)


def _find(module: nn.Module, wanted: set[int], into: list[dict[str, Any]]) -> bool:
    """Append the tables of `module` on the way to wanted tensors; whether there are any."""
    before = len(into)
    for table in (module._parameters, module._buffers):
        if not wanted.isdisjoint(map(id, table.values())):
            into.append(table)
    for child in module._modules.values():
        if child is not None:
            _find(child, wanted, into)
    if len(into) > before and module._modules:
        into.append(module._modules)
    return len(into) > before


@dataclass(frozen=True)
class _Program:
    """A step program as it was run: for which method, under which callback of Dynamo, and on which weights.

    `fixed` are these in the order of its graph, `hoisted` those of which something is made for the whole image.
    `about_model` is what `Guards.about_model` says, `same_modes` whether modes are those that it was run in.
    """

    step: StepProgram
    guards: Guards
    run: MethodType
    compiler: Callable[[], Any]
    weights: _Weights
    fixed: list[Tensor]
    hoisted: list[Tensor]
    about_model: str | None
    same_modes: Callable[[], bool]

    def guarded_like(self, other: _Program) -> bool:
        """Whether Dynamo's guards on model and globals hold where those of `other` do."""
        return self.about_model is not None and self.about_model == other.about_model and self.run == other.run


@dataclass(frozen=True)
class _Checked:
    """Dynamo's guards of a program held in this generation, and versions of hoisted weights then."""

    program: _Program
    versions: list[int]

    @classmethod
    def now(cls, program: _Program) -> _Checked:
        """They have just held."""
        return cls(program, list(map(_version, program.hoisted)))

    def still(self) -> bool:
        """Whether all of this is so now."""
        program = self.program
        versions = list(map(_version, program.hoisted))
        return versions == self.versions and program.same_modes() and program.weights.in_modules()


@dataclass(frozen=True)
class _Known:
    """A scale that can be replayed: its graph and arguments in terms of `_Form.values`, its result in outputs.

    `is_like` compares tensors with the arguments; `caches` are those that the graph reads where they are: their
    positions, and those in `Captured.held`. `launch` is the key of the graph in its lane.
    """

    program: _Program
    captured: weakref.ref[Captured]
    launch: Any
    is_like: Callable[..., bool]
    moving: tuple[Moving, ...]
    caches: tuple[tuple[int, int], ...]
    result: Any

    @classmethod
    def of(cls, program: _Program, launch: Launch, form: _Form, result: Any) -> _Known | None:
        """None, and counted, where Dynamo's code gave the graph other tensors, or returns others."""
        captured, position = launch.captured, {id(value): i for i, value in enumerate(form.values)}
        fixed = set(program.step.fixed)
        moving, caches = [], []
        places = {m.position: m for m in captured.moving}
        held = {i: j for j, i in enumerate(captured.still)}
        for i, arg in enumerate(launch.args):
            if i in fixed or not isinstance(arg, Tensor):
                continue
            at = position.get(id(arg))
            if at is None:
                _refused("a step computes before its graph")
                return None
            if i in places:
                moving.append(places[i]._replace(position=at))
            else:
                caches.append((at, held[i]))
        outputs = {id(out): i for i, out in enumerate(launch.outputs) if isinstance(out, Tensor)}
        used: set[int] = set()
        try:
            arrangement = _arrangement(result, outputs, used)
        except _Foreign:
            _refused("a step returns other things than its graph")
            return None
        if used != set(outputs.values()):
            _refused("a step keeps outputs of its graph")
            return None
        return cls(
            program,
            weakref.ref(captured),
            launch.key,
            tensor_guard(form.values),
            tuple(moving),
            tuple(caches),
            arrangement,
        )

    def reads_caches(self, values: Sequence[Tensor], captured: Captured) -> bool:
        """Whether the caches among `values` are where the graph reads them."""
        held = captured.held
        return all([values[i] is held[j] or values[i].data_ptr() == held[j].data_ptr() for i, j in self.caches])


def _refused(reason: str) -> None:
    counters.add("not_replayed", reason)


def _known(state: StepState) -> dict[Hashable, _Known]:
    known: dict[Hashable, _Known] = state.lane.notes.setdefault("replays", {})
    return known


def _program(state: StepState, step: StepProgram, run: Callable[..., Any], args: Sequence[Any]) -> _Program | None:
    """What `run` has just run, if the weights are found in its model and its code is that of the program."""
    model, frame = getattr(run, "__self__", None), step.frame
    if (
        frame is None
        or not isinstance(run, MethodType)
        or not isinstance(model, nn.Module)
        or run.__code__ is not frame.code
    ):
        _refused("a step is not one method of a module, or does more than its graph")
        return None
    fixed = [args[i] for i in step.fixed]
    hoisted = [args[i] for i in step.hoisted]
    weights = _weights(state, model, fixed)
    if weights is None or any(t.is_inference() for t in hoisted):
        _refused("weights are not all in the modules of the step")
        return None
    assert state.session is not None
    compiler = state.session.compiler
    old: _Program | None = state.lane.notes.get(("program", step))
    if (
        old is not None
        and old.weights is weights
        and old.run == run
        and old.compiler() is compiler
        and old.same_modes()
        and all(map(is_, fixed, old.fixed))
    ):
        return old
    reference = (lambda: None) if compiler is None else weakref.ref(compiler)
    guards = frame.guards()
    if guards is None:
        _refused("Dynamo has dropped what ran")
        return None
    found = _Program(step, guards, run, reference, weights, fixed, hoisted, guards.about_model(), mode_guard())
    state.lane.notes["program", step] = found
    return found


def _weights(state: StepState, model: nn.Module, fixed: list[Tensor]) -> _Weights | None:
    """These weights, which are the same ones for programs that read the same; None where one is in no module."""
    old: _Weights | None = state.lane.notes.get("weights")
    same = old is not None and set(map(id, fixed)) == set(map(id, old.tensors))
    if old is not None and same and old.in_modules() and old.in_place():
        return old
    found = state.lane.notes["weights"] = _Weights.of(model, fixed)
    return found


def _arrangement(value: Any, outputs: dict[int, int], used: set[int]) -> Any:
    """`value` with numbers of outputs in the place of tensors. Raises _Foreign for what is no output."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind, [_arrangement(v, outputs, used) for v in value]
    if value is None:
        return None
    if id(value) not in outputs:
        raise _Foreign
    used.add(outputs[id(value)])
    return outputs[id(value)]


def _arrange(arrangement: Any, outputs: Sequence[Any]) -> Any:
    """The inverse of `_arrangement`."""
    if isinstance(arrangement, int):
        return outputs[arrangement]
    if arrangement is None:
        return None
    kind, parts = arrangement
    return kind([_arrange(part, outputs) for part in parts])
