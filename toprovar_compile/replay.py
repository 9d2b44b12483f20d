"""Replay a scale of a step without going through Dynamo and AOTAutograd, which look at every weight of the model.

A step is replayed so only if its CUDA graph was launched through them before, in this or an earlier generation, for
arguments of this very form, and if in this generation they have already run the same compiled code for another scale.
Why the images are then the ones that they would give:

- Dynamo's guards are about the arguments, the modes of torch, and the model with the globals that its code reads. Those
  on arguments held when the graph was launched for arguments of equal form (types, dtypes, devices, sizes, strides,
  which of them are the same, all plain values); form is compared anew. Those on modes and on the model held earlier in
  this generation; modes are compared anew, and so is what the model consists of: at every scale each of its weights
  must be the same tensor in the same module. Their addresses are those of the recording, once an image. Numbers that
  relate the two kinds are refused: sizes that a program computes with are those of arguments alone
  (`inductor.pure_frame`).
- What Dynamo's code does beside running the graph must be nothing: no change of an object that was there before, no
  graph break, no random number, and every output of the graph is found in the result as it is, and every input among
  the arguments and the weights. So the result is the same arrangement of the same outputs.
- Weights that are written to are read by the graph as they are; those of which an earlier scale made something for the
  whole image (casts, say) must have been left alone since the generation began.

What code between two scales of an image changes at a module other than its tensors and submodules (flags, numbers), in
globals that the step reads, or at the address under a weight (`weight.data = ...`), is seen at the next image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toprovar_compile.cuda_graph import Captured, Launch, Moving
from toprovar_compile.inductor import mode_guard, tensor_guard
from toprovar_compile.report import counters

if TYPE_CHECKING:
    from toprovar_compile.dispatch import StepProgram, StepState

_TENSORS = {Tensor}
_PLAIN = (type(None), bool, int, float, str)
_END = object()
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
        assert state.session is not None
        plan = state.session.plan
        if plan is not state.plan:
            state.follow(plan)
        form = _Form.of(args)
        known = None if form is None else _known(state).get((state.digest, state.session.scale, form.key))
        checked = None if known is None else self._checked.get(known.program)
        if form is None or known is None or checked is None or not form.values:
            return None
        values, captured = form.values, known.captured()
        if (
            captured is None
            or checked.run != run
            or checked.weights is not known.weights
            or not known.is_like(*values)
            or not all([_same_place(values[i], captured.held[j]) for i, j in known.caches])
            or not checked.still()
            or not state.lane.recordable(values[0])
        ):
            return None
        outputs = state.lane.replay(known.launch, captured, known.moving, values)
        if outputs is None:
            return None
        known.program.begin(plan, state)
        state.restore(captured.state)
        counters.add("replayed")
        return _arrange(known.result, outputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def learn(self, run: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
        """`run(*args)` ran and returned `result`: note what its graph, if it was one, needs to be replayed."""
        state = self._state
        latest, self._latest, state.lane.latest = self._latest, None, None
        if latest is None:
            return
        program, launch = latest
        weights = _weights(state, program, run, launch.args)
        if weights is None:
            return
        versions = list(map(_version, weights.hoisted))
        self._checked[program] = _Checked(run, weights, versions, mode_guard())
        form = _Form.of(args)
        assert state.session is not None
        if form is None:
            return
        key = (state.digest, state.session.scale, form.key)
        old = _known(state).get(key)
        if old is None or old.captured() is not launch.captured or old.weights is not weights:
            found = _Known.of(program, weights, launch, form, result)
            if found is not None:
                _known(state)[key] = found


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
        unique = dict(zip(ids, tensors, strict=True))
        same: tuple[int, ...] = ()
        if len(unique) < len(ids):
            order = {at: n for n, at in enumerate(unique)}
            same = tuple(map(order.__getitem__, ids))
        return cls((spec, same), list(unique.values()))


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
    """The weights of a program with their addresses, those that are hoisted, and where they are in its model.

    `tables` are the dicts of modules in which they, and the modules on the way to them, were found, and `found` all
    that was in these.
    """

    tensors: list[Tensor]
    pointers: list[int]
    hoisted: list[Tensor]
    tables: list[dict[str, Any]]
    found: list[Any]

    @classmethod
    def of(cls, model: nn.Module, tensors: list[Tensor], pointers: list[int], hoisted: list[Tensor]) -> _Weights | None:
        """None where a tensor is in no module, or counts no versions."""
        if any(t.is_inference() for t in hoisted):
            return None
        wanted, tables = set(map(id, tensors)), list[dict[str, Any]]()
        _find(model, wanted, tables)
        found = [value for table in tables for value in table.values()]
        return cls(tensors, pointers, hoisted, tables, [*found, _END]) if wanted <= set(map(id, found)) else None

    def in_modules(self) -> bool:
        """Whether they are still what the modules hold."""
        return all(map(is_, chain(chain.from_iterable(map(dict.values, self.tables)), (_END,)), self.found))


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
class _Checked:
    """Dynamo ran a program in this generation: for which method, on which weights, in which versions and modes."""

    run: Callable[..., Any]
    weights: _Weights
    versions: list[int]
    same_modes: Callable[[], bool]

    def still(self) -> bool:
        """Whether all of this is so now."""
        weights = self.weights
        return self.same_modes() and weights.in_modules() and list(map(_version, weights.hoisted)) == self.versions


@dataclass(frozen=True)
class _Known:
    """A scale that can be replayed: its graph and arguments in terms of `_Form.values`, its result in outputs.

    `is_like` compares tensors with the arguments; `caches` are those that the graph reads where they are: their
    positions, and those in `Captured.held`. `launch` is the key of the graph in its lane.
    """

    program: StepProgram
    weights: _Weights
    captured: weakref.ref[Captured]
    launch: Any
    is_like: Callable[..., bool]
    moving: tuple[Moving, ...]
    caches: tuple[tuple[int, int], ...]
    result: Any

    @classmethod
    def of(cls, program: StepProgram, weights: _Weights, launch: Launch, form: _Form, result: Any) -> _Known | None:
        """None, and counted, where Dynamo's code gave the graph other tensors, or returns others."""
        captured, position = launch.captured, {id(value): i for i, value in enumerate(form.values)}
        fixed = set(program.fixed)
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
            weights,
            weakref.ref(captured),
            launch.key,
            tensor_guard(form.values),
            tuple(moving),
            tuple(caches),
            arrangement,
        )


def _refused(reason: str) -> None:
    counters.add("not_replayed", reason)


def _known(state: StepState) -> dict[Hashable, _Known]:
    known: dict[Hashable, _Known] = state.lane.notes.setdefault("replays", {})
    return known


def _weights(state: StepState, program: StepProgram, run: Callable[..., Any], args: Sequence[Any]) -> _Weights | None:
    """The weights that `run` gave its graph, if they are found in its model and its code is that of the program."""
    code = getattr(run, "__code__", None)
    model = getattr(run, "__self__", None)
    if program.frame is None or code is not program.frame or not isinstance(model, nn.Module):
        _refused("a step is not one method of a module, or does more than its graph")
        return None
    tensors = [args[i] for i in program.fixed]
    key = ("weights", program)
    pointers = [t.data_ptr() for t in tensors]
    old: _Weights | None = state.lane.notes.get(key)
    if old is not None and all(map(is_, tensors, old.tensors)) and pointers == old.pointers and old.in_modules():
        return old
    found = _Weights.of(model, tensors, pointers, [args[i] for i in program.hoisted])
    if found is None:
        _refused("weights are not all in the modules of the step")
        return None
    state.lane.notes[key] = found
    return found


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a is b or a.data_ptr() == b.data_ptr()


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
