"""One CUDA graph per (step program, scale): the launches of a whole scale replayed at once.

The memory that a graph reads and writes has to stay where it is, so graphs belong to a lane: the buffers and graphs of
one generation at a time. A scale runs as it is the first time (that compiles and warms up), is captured the second
time, and replayed from then on while its inputs are where they were; else it runs as it is, and that is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from toprovar_compile.report import counters, logger

_MAX_IDLE_LANES = 2
_MAX_GROUPS = 4  # plans whose graphs a lane keeps


START = "start"


@dataclass(frozen=True)
class Scale:
    """What runs one scale, or another part of a generation.

    `run(args)` may change Python state, which `save` and `restore` read and set.
    `key` is (program, scale). Of the arguments, those in `moving` are copied to a fixed place before each run, all
    others must stay where they are. `condition` are the moving ones whose unchanged value lets `run` reuse what it
    computed at an earlier scale. Graphs of a `group` (a plan) are freed together. `generator`, if given, is what `run`
    draws from; it is handed to `run` as a second argument, because a graph draws from a generator of its own, which
    follows that one. Outputs that are `lent` are handed out as the graph writes them, until it is launched again.

    A graph reads what earlier scales of the generation left where it was when the graph was made. So it belongs to what
    ran before: `behind()` is the state that a graph left (as `restore` was given it), START before the first scale, and
    None where that was no graph, whose memory is free for others.

    Graphs of one `pool` use the same memory for what they compute on the way, whatever the order they were recorded in.
    So steps share one: what a scale leaves was there when the graphs behind it were recorded, and others do not run in
    between. What runs between steps shares none with them, and nothing (None) where its outputs are lent.
    """

    key: tuple[Hashable, Hashable]
    run: Callable[..., list[Any]]
    save: Callable[[], Any]
    restore: Callable[[Any], None]
    moving: Collection[int]
    condition: Collection[int] = ()
    generator: torch.Generator | None = None
    group: Hashable = None
    lent: bool = False
    behind: Callable[[], Hashable] = lambda: START
    pool: Hashable = "steps"

    @classmethod
    def stateless(
        cls,
        key: tuple[Hashable, Hashable],
        run: Callable[..., list[Any]],
        moving: Collection[int],
        generator: torch.Generator | None = None,
        *,
        lent: bool = False,
    ) -> Scale:
        """What changes no Python state."""
        pool = None if lent else "between"
        return cls(key, run, lambda: None, lambda _: None, moving, (), generator, lent=lent, pool=pool)

    def __call__(self, args: Sequence[Any], generator: torch.Generator | None = None) -> list[Any]:
        if self.generator is None:
            return self.run(args)
        return self.run(args, generator or self.generator)


class Moving(NamedTuple):
    """An argument that is copied to its place before a run: its position, the place and its id, and, for a condition,
    the name under which its program reads it."""

    position: int
    place: Tensor
    at: int
    condition: Hashable


@dataclass(frozen=True)
class Captured:
    """A graph and what it reads and writes.

    `still` are the positions of arguments that must be where they were, `held` these at capture and `places` where
    they were. `copied` are the positions of the outputs that the next replay would overwrite under the caller, `lent`
    those that are handed out all the same. `state` is what `Scale.restore` takes; `reused` says that the graph lacks
    what an earlier scale computed from the condition. `group` is that of its scale.
    """

    graph: torch.cuda.CUDAGraph
    moving: tuple[Moving, ...]
    still: tuple[int, ...]
    held: tuple[Any, ...]
    places: tuple[Any, ...]
    pointers: tuple[int, ...]
    outputs: tuple[Any, ...]
    copied: tuple[int, ...]
    lent: tuple[int, ...]
    state: Any
    reused: bool
    group: Hashable


@dataclass(frozen=True)
class Launch:
    """The latest run of a graph: its key in the lane, the graph, all arguments, and the outputs as handed out."""

    key: Any
    captured: Captured
    args: list[Any]
    outputs: list[Any]


@dataclass
class Lane:
    """Memory of one generation at a time: key/value buffers by name, and the graphs that read and write them.

    `notes` are for whoever runs steps on the lane, by name. `latest` is the graph that the latest run launched, if any.
    """

    buffers: dict[Hashable, Tensor] = field(default_factory=dict)
    notes: dict[Hashable, Any] = field(default_factory=dict)
    latest: Launch | None = None
    _memory: dict[Hashable, Tensor] = field(default_factory=dict)  # the largest of each name and form
    _graphs: dict[Hashable, Captured | None] = field(default_factory=dict)
    _seen: set[Hashable] = field(default_factory=set)
    _inputs: dict[Hashable, Tensor] = field(default_factory=dict)
    _sources: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # by id of the place
    _held: dict[int, Tensor] = field(default_factory=dict)  # the place of a source, by its id
    _copies: dict[int, int] = field(default_factory=dict)  # how often each place was written
    _read: dict[Hashable, int] = field(default_factory=dict)  # and what of that each input has seen
    _checked: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)  # where a program's tensors were found
    _groups: dict[Hashable, set[Hashable]] = field(default_factory=dict)
    _owned: set[int] = field(default_factory=set)
    _lent: dict[int, Tensor] = field(default_factory=dict)  # outputs by id, of graphs that are not freed
    # Outputs by the id of what ran in this generation instead, which is held so that no other tensor is given the id.
    _replaced: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _generator: torch.Generator | None = None
    _pools: dict[Hashable, Any] = field(default_factory=dict)

    def buffer(
        self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, room: int, start: int
    ) -> Tensor:
        """A buffer of this form, with whatever is in it: the memory `name`, of `room` rows, from the row `start` on.

        Buffers of one memory may overlap. A smaller memory of a name is the front of a larger one that is there.
        """
        key = (name, shape, dtype, device, room, start)
        if key not in self.buffers:
            with torch.inference_mode(False):  # a lane outlives the mode that it was made in
                form = (name, shape[1:], dtype, device)
                if form not in self._memory or len(self._memory[form]) < room:
                    self._memory[form] = torch.empty((room, *shape[1:]), dtype=dtype, device=device)
                memory = self._memory[form]
                row = memory[0].nbytes
                # With a storage of its own: Dynamo would look at where in a storage it begins.
                part = memory.untyped_storage()[start * row : (start + shape[0]) * row]
                self.buffers[key] = torch.empty(0, dtype=dtype, device=device).set_(part, 0, shape, memory.stride())
            self._owned.add(self.buffers[key].data_ptr())
        return self.buffers[key]

    @staticmethod
    def recordable(x: Tensor) -> bool:
        """Whether what runs on x can be recorded or replayed now: x is on a CUDA device, and nobody is recording."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        """A new generation starts: nothing is known to be unchanged."""
        self.latest = None
        self._sources.clear()
        self._held.clear()
        self._read.clear()
        self._checked.clear()
        self._replaced.clear()

    def run(self, scale: Scale, args: Sequence[Any]) -> list[Any]:
        """`scale.run(args)`, captured or replayed where that is possible."""
        seen, behind = _key(scale, args), scale.behind()
        key = (*seen, behind)
        self.latest = None
        self._groups[scale.group] = self._groups.pop(scale.group, set())  # the latest is last
        known = self._graphs.get(key)
        if known is not None:
            reason = self._moved(scale, known, args)
            if reason is None:
                self._replay(known.graph, scale.generator)
                scale.restore(known.state)
                return self._launched(key, known, args)
            counters.add("cuda_graph_miss", reason)
        elif behind is None and seen in self._seen:
            counters.add("cuda_graph_postponed", "what an earlier scale left was not left by a graph")
        elif seen in self._seen and key not in self._graphs:
            known = self._capture(key, scale, args)
            if known is not None:
                return self._launched(key, known, args)
        self._seen.add(seen)
        return scale(args)

    def _launched(self, key: Hashable, known: Captured, args: Sequence[Any]) -> list[Any]:
        outputs = self._hand_out(known)
        self.latest = Launch(key, known, list(args), outputs)
        return outputs

    def replay(self, key: Any, known: Captured, moving: Sequence[Moving], values: Sequence[Any]) -> list[Any] | None:
        """The outputs of the graph `known` of a step, whose other inputs the caller knows to be where they were.

        `moving` are those of the graph, with their positions in `values`. None, and nothing was done, where the graph
        was freed or the condition changed between scales.
        """
        if self._graphs.get(key) is not known:
            return None
        if known.reused:  # what is settled is in place
            if not self._settled(moving, values):
                return None
            moving = [m for m in moving if m.condition is None]
        self._groups[known.group] = self._groups.pop(known.group)  # the latest is last
        self._refill(moving, values)
        self._replay(known.graph, None)
        return self._hand_out(known)

    def call(
        self,
        key: Hashable,
        run: Callable[..., Sequence[Tensor]],
        args: Sequence[Tensor],
        fixed: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> list[Any]:
        """`run(*args)`, or `run(*args, generator)`, which reads `fixed` besides, as a graph that lends its outputs."""
        if not self.recordable((*args, *fixed)[0]):
            return list(run(*args) if generator is None else run(*args, generator))
        return self.run(_call(key, run, args, fixed, generator), [*args, *fixed])

    def ran(
        self,
        key: Hashable,
        run: Callable[..., Sequence[Tensor]],
        args: Sequence[Tensor],
        fixed: Sequence[Tensor],
        generator: torch.Generator | None,
        results: Sequence[Tensor],
    ) -> None:
        """`call` would have run this, with these results, had the lane been known: the next one may become a graph.

        The second time it becomes one here, so that steps are recorded to read its outputs where later ones will be.
        """
        scale, values = _call(key, run, args, fixed, generator), [*args, *fixed]
        seen = _key(scale, values)
        graph = (*seen, scale.behind())
        if seen in self._seen and graph not in self._graphs and generator is None and self.recordable(values[0]):
            self._groups.setdefault(scale.group, set())
            known = self._capture(graph, scale, values)
            for made, place in zip(results, known.outputs if known is not None else (), strict=False):
                if _form(made) == _form(place):  # else it was made under autocast, which is off in here
                    self._replaced[id(made)] = made, place
        self._seen.add(seen)

    def _capture(self, key: Hashable, scale: Scale, args: Sequence[Any]) -> Captured | None:
        """A graph of the scale, launched once; None, and everything as it was, where the device refuses."""
        fixed, fresh, moving = self._put(scale, args)
        before = scale.save()
        # A weight that autocast has cast before would be read where it is then, and is freed with the user's region.
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            graph, outputs = self._record(scale, fixed)
        except RuntimeError as error:
            self._graphs[key] = None
            scale.restore(before)
            reason = str(error).strip().splitlines()[0]
            counters.add("fallback", f"CUDA graph capture failed, the scale is launched kernel by kernel: {reason}")
            logger.warning("CUDA graph capture failed: %s", reason)
            return None
        finally:
            torch.set_autocast_cache_enabled(caching)
        self._replay(graph, scale.generator)
        own = tuple(i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.data_ptr() not in self._owned)
        if scale.lent:
            self._lent.update({id(outputs[i]): outputs[i] for i in own})
        moves = {m.position for m in moving}
        still = tuple(i for i in range(len(fixed)) if i not in moves)
        held = tuple(fixed[i] for i in still)
        known = self._graphs[key] = Captured(
            graph,
            moving,
            still,
            held,
            tuple(map(_place, held)),
            _pointers(held),
            tuple(outputs),
            () if scale.lent else own,
            own if scale.lent else (),
            scale.save(),
            not fresh,
            scale.group,
        )
        scale.restore(known.state)
        self._groups[scale.group].add(key)
        counters.add("cuda_graph_captured")
        self._free_groups()
        return known

    def _record(self, scale: Scale, fixed: Sequence[Any]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
        """A graph of `scale(fixed)`, not launched yet, and its outputs. Raises RuntimeError."""
        graph, own = torch.cuda.CUDAGraph(), None
        if scale.generator is not None:
            own = self._generator = self._generator or torch.Generator(device=scale.generator.device)
            graph.register_generator_state(own)
        with torch.cuda.graph(graph, pool=self.pool(scale), capture_error_mode="thread_local"):
            return graph, scale(fixed, own)

    def pool(self, scale: Scale) -> Any:
        """The memory pool that the graph of `scale` shares with others; a new one where it shares none."""
        if scale.pool is None:
            return torch.cuda.graph_pool_handle()
        if scale.pool not in self._pools:
            self._pools[scale.pool] = torch.cuda.graph_pool_handle()
        return self._pools[scale.pool]

    def _free_groups(self) -> None:
        """Free the graphs of the plans that were not used for longest; they are captured anew when they come back."""
        named = [group for group in self._groups if group is not None]
        for group in named[:-_MAX_GROUPS]:
            for key in self._groups.pop(group):
                del self._graphs[key]
            counters.add("cuda_graph_freed", "more plans in turn than a lane keeps graphs of")

    def _replay(self, graph: torch.cuda.CUDAGraph, generator: torch.Generator | None) -> None:
        if generator is None:
            graph.replay()
            return
        assert self._generator is not None
        self._generator.set_state(generator.get_state())
        graph.replay()
        generator.set_state(self._generator.get_state())

    def _moved(self, scale: Scale, known: Captured, args: Sequence[Any]) -> str | None:
        """Put the moving arguments in place; why the graph cannot be replayed with them, None if it can.

        Each tensor is looked at once in a generation: the same object later in it is taken to be where it was.
        """
        program = scale.key[0]
        checked = self._checked.get(program) == known.pointers
        given = [args[i] for i in known.still]
        # Dynamo guards the sizes and strides of what it holds itself.
        same = all(map(is_, given, known.held)) and (checked or _pointers(given) == known.pointers)
        for a, b, place in () if same else zip(given, known.held, known.places, strict=True):
            if not (checked and a is b) and _place(a) != place:
                kind = (
                    "a weight or a cache is not where it was" if isinstance(a, Tensor) else "a size is not what it was"
                )
                return f"{kind} at capture"
        self._checked[program] = known.pointers
        fresh = self._refill(known.moving, args)
        return "the condition changed between scales" if fresh and known.reused else None

    def _put(self, scale: Scale, args: Sequence[Any]) -> tuple[list[Any], bool, tuple[Moving, ...]]:
        """The arguments at their fixed places, whether the condition was put there anew, and what was put."""
        moving, taken = [], set()
        for i in scale.moving:
            a = args[i]
            name = (scale.key[0], i, tuple(a.shape), a.stride(), a.dtype)
            place = self._inputs.get(name)
            if place is None:
                # What a graph of this lane has written is read there. Programs that are first given the same tensor
                # share a place, and it is copied once for all of them.
                place = self._lent.get(id(a))
                if place is None and id(a) in self._replaced:
                    place = self._replaced[id(a)][1]
                if place is None:
                    place = self._held.get(id(a))
                    if place is not None and not _unchanged(a, self._sources.get(id(place))):
                        place = None
                if place is None or id(place) in taken:
                    with torch.inference_mode(False):
                        place = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
                self._inputs[name] = place
            taken.add(id(place))
            moving.append(Moving(i, place, id(place), name if i in scale.condition else None))
        fixed = list(args)
        for i, place, _, _ in moving:
            fixed[i] = place
        return fixed, self._refill(moving, args), tuple(moving)

    def _refill(self, moving: Sequence[Moving], args: Sequence[Any]) -> bool:
        """Copy what changed to its place; whether that is so for a condition, since its program was last given it."""
        fresh, sources = False, self._sources
        for i, place, at, condition in moving:
            a, source = args[i], sources.get(at)
            if not (source is not None and a is source[0] and source[1] >= 0 and a._version == source[1]):
                self._copy(a, place, source)
            if condition is not None:
                count = self._copies[at]
                fresh = fresh or self._read.get(condition) != count
                self._read[condition] = count
        return fresh

    def _copy(self, a: Tensor, place: Tensor, source: tuple[Tensor, int] | None) -> None:
        if _unchanged(a, source):
            return
        at = id(place)
        if a is not place:
            place.copy_(a)
        # Holding the source keeps its address from being taken by another tensor.
        self._sources[at] = (a, -1 if a.is_inference() else a._version)
        self._held[id(a)] = place
        self._copies[at] = self._copies.get(at, 0) + 1

    def _settled(self, moving: Sequence[Moving], args: Sequence[Any]) -> bool:
        """Whether the condition is in place, and its program was given it before."""
        sources, read, copies = self._sources, self._read, self._copies
        for i, _, at, condition in moving:
            if condition is None:
                continue
            a, source = args[i], sources.get(at)
            same = source is not None and a is source[0] and source[1] >= 0 and a._version == source[1]
            if not (same or _unchanged(a, source)) or read.get(condition) != copies[at]:
                return False
        return True

    def _hand_out(self, known: Captured) -> list[Any]:
        """The outputs, copied where the next replay would overwrite them under the caller."""
        outputs = list(known.outputs)
        for i in known.copied:
            outputs[i] = outputs[i].clone()
        if known.lent:
            increment_version([outputs[i] for i in known.lent])
        return outputs


def _key(scale: Scale, args: Sequence[Any]) -> tuple[Hashable, Hashable]:
    return scale.key, tuple([(args[i].shape, args[i].stride(), args[i].dtype) for i in scale.moving])


def _call(
    key: Hashable,
    run: Callable[..., Sequence[Tensor]],
    args: Sequence[Tensor],
    fixed: Sequence[Tensor],
    generator: torch.Generator | None,
) -> Scale:
    def whole(given: Sequence[Any], *rest: Any) -> list[Any]:
        return list(run(*given[: len(args)], *rest))

    # `run` computes in the precision that the caller's autocast region asks for.
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # Another model of the same schedule has weights of its own; a graph holds its tensors, so no id is given out again.
    program = ("call", key, generator is not None, autocast, tuple(map(id, fixed)))
    return Scale.stateless((program, None), whole, range(len(args)), generator, lent=True)


def _place(value: Any) -> Any:
    """Where a tensor is in memory; any other value itself."""
    return (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else value


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device


def _pointers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple([v.data_ptr() for v in values if isinstance(v, Tensor)])


def _unchanged(value: Tensor, source: tuple[Tensor, int] | None) -> bool:
    if source is None or value.is_inference():
        return False
    old, version = source
    return value.data_ptr() == old.data_ptr() and value.stride() == old.stride() and value._version == version


class Lanes:
    """Lanes that wait for the next generation, by what they were used for; a few are kept, the rest freed."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, Lane]] = []
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> Lane:
        """An idle lane of this key, or a new one."""
        with self._lock:
            at = next((i for i, (known, _) in enumerate(self._idle) if known == key), None)
            lane = Lane() if at is None else self._idle.pop(at)[1]
        lane.begin()
        return lane

    def resume(self, fits: Callable[[Any, Lane], bool]) -> tuple[Any, Lane] | None:
        """The idle lane given back last of those that fit, with its key."""
        with self._lock:
            at = next((i for i in reversed(range(len(self._idle))) if fits(*self._idle[i])), None)
            if at is None:
                return None
            key, lane = self._idle.pop(at)
        lane.begin()
        return key, lane

    def give(self, key: Hashable, lane: Lane) -> None:
        """Take a lane back; the one that waits longest is freed when there are too many."""
        with self._lock:
            self._idle.append((key, lane))
            del self._idle[:-_MAX_IDLE_LANES]

    def clear(self) -> None:
        """Free all idle lanes."""
        with self._lock:
            self._idle.clear()


lanes = Lanes()
