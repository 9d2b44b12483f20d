"""One CUDA graph per (step program, scale): the launches of a whole scale replayed at once.

The memory that a graph reads and writes has to stay where it is, so graphs belong to a lane: the buffers and graphs of
one generation at a time. A scale runs as it is the first time (that compiles and warms up), is captured the second
time, and replayed from then on while its inputs are where they were; else it runs as it is, and that is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.report import counters, logger

_MAX_IDLE_LANES = 2
_MAX_GROUPS = 4  # plans whose graphs a lane keeps


@dataclass(frozen=True)
class Scale:
    """What runs one scale, or another part of a generation.

    `run(args)` may change Python state, which `save` and `restore` read and set.
    `key` is (program, scale). Of the arguments, those in `moving` are copied to a fixed place before each run, all
    others must stay where they are. `condition` are the moving ones whose unchanged value lets `run` reuse what it
    computed at an earlier scale. Graphs of a `group` (a plan) are freed together. `generator`, if given, is what `run`
    draws from; it is handed to `run` as a second argument, because a graph draws from a generator of its own, which
    follows that one.
    """

    key: tuple[Hashable, Hashable]
    run: Callable[..., list[Any]]
    save: Callable[[], Any]
    restore: Callable[[Any], None]
    moving: Collection[int]
    condition: Collection[int] = ()
    generator: torch.Generator | None = None
    group: Hashable = None

    @classmethod
    def stateless(
        cls,
        key: tuple[Hashable, Hashable],
        run: Callable[..., list[Any]],
        moving: Collection[int],
        generator: torch.Generator | None = None,
    ) -> Scale:
        """What changes no Python state."""
        return cls(key, run, lambda: None, lambda _: None, moving, (), generator)

    def __call__(self, args: Sequence[Any], generator: torch.Generator | None = None) -> list[Any]:
        if self.generator is None:
            return self.run(args)
        return self.run(args, generator or self.generator)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    places: list[Any]
    outputs: list[Any]
    state: Any
    reused: bool


@dataclass
class Lane:
    """Memory of one generation at a time: key/value buffers by name, and the graphs that read and write them."""

    buffers: dict[Hashable, Tensor] = field(default_factory=dict)
    _graphs: dict[Hashable, _Captured | None] = field(default_factory=dict)
    _seen: set[Hashable] = field(default_factory=set)
    _inputs: dict[Hashable, Tensor] = field(default_factory=dict)
    _sources: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # by id of the place
    _held: dict[int, Tensor] = field(default_factory=dict)  # the place of a source, by its id
    _copies: dict[int, int] = field(default_factory=dict)  # how often each place was written
    _read: dict[Hashable, int] = field(default_factory=dict)  # and what of that each input has seen
    _checked: set[Hashable] = field(default_factory=set)
    _groups: dict[Hashable, set[Hashable]] = field(default_factory=dict)
    _owned: set[int] = field(default_factory=set)
    _generator: torch.Generator | None = None
    _pool: Any = None

    def buffer(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer of this name and form, with whatever is in it."""
        key = (name, shape, dtype, device)
        if key not in self.buffers:
            with torch.inference_mode(False):  # a lane outlives the mode that it was made in
                self.buffers[key] = torch.empty(shape, dtype=dtype, device=device)
            self._owned.add(self.buffers[key].data_ptr())
        return self.buffers[key]

    def begin(self) -> None:
        """A new generation starts: nothing is known to be unchanged."""
        self._sources.clear()
        self._held.clear()
        self._read.clear()
        self._checked.clear()

    def run(self, scale: Scale, args: Sequence[Any]) -> list[Any]:
        """`scale.run(args)`, captured or replayed where that is possible."""
        key = (scale.key, tuple((tuple(args[i].shape), args[i].dtype) for i in scale.moving))
        self._groups[scale.group] = self._groups.pop(scale.group, set())  # the latest is last
        known = self._graphs.get(key)
        if known is not None:
            reason = self._moved(scale, known, args)
            if reason is None:
                self._replay(known.graph, scale)
                scale.restore(known.state)
                return self._hand_out(known.outputs)
            counters.add("cuda_graph_miss", reason)
        elif key in self._seen and key not in self._graphs:
            return self._capture(key, scale, args)
        self._seen.add(key)
        return scale(args)

    def call(
        self,
        key: Hashable,
        run: Callable[..., Sequence[Tensor]],
        args: Sequence[Tensor],
        fixed: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> list[Any]:
        """`run(*args)`, or `run(*args, generator)`, which reads `fixed` besides, as a graph."""

        def whole(given: Sequence[Any], *rest: Any) -> list[Any]:
            return list(run(*given[: len(args)], *rest))

        # `run` computes in the precision that the caller's autocast region asks for.
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        program = ("call", key, generator is not None, autocast)
        return self.run(Scale.stateless((program, None), whole, range(len(args)), generator), [*args, *fixed])

    def _capture(self, key: Hashable, scale: Scale, args: Sequence[Any]) -> list[Any]:
        fixed, fresh = self._put(scale, args)
        before = scale.save()
        graph = torch.cuda.CUDAGraph()
        own: Any = None
        if scale.generator is not None:
            own = self._generator = self._generator or torch.Generator(device=scale.generator.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # A weight that autocast has cast before would be read where it is then, and is freed with the user's region.
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            if own is not None:
                graph.register_generator_state(own)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = scale(fixed, own)
        except RuntimeError as error:
            self._graphs[key] = None
            scale.restore(before)
            reason = str(error).strip().splitlines()[0]
            counters.add("fallback", f"CUDA graph capture failed, the scale is launched kernel by kernel: {reason}")
            logger.warning("CUDA graph capture failed: %s", reason)
            return scale(args)
        finally:
            torch.set_autocast_cache_enabled(caching)
        self._replay(graph, scale)
        self._graphs[key] = _Captured(graph, fixed, [_place(a) for a in fixed], outputs, scale.save(), not fresh)
        self._groups[scale.group].add(key)
        counters.add("cuda_graph_captured")
        self._free_groups()
        return self._hand_out(outputs)

    def _free_groups(self) -> None:
        """Free the graphs of the plans that were not used for longest; they are captured anew when they come back."""
        named = [group for group in self._groups if group is not None]
        for group in named[:-_MAX_GROUPS]:
            for key in self._groups.pop(group):
                del self._graphs[key]
            counters.add("cuda_graph_freed", "more plans in turn than a lane keeps graphs of")

    def _replay(self, graph: torch.cuda.CUDAGraph, scale: Scale) -> None:
        if scale.generator is None:
            graph.replay()
            return
        assert self._generator is not None
        self._generator.set_state(scale.generator.get_state())
        graph.replay()
        scale.generator.set_state(self._generator.get_state())

    def _moved(self, scale: Scale, known: _Captured, args: Sequence[Any]) -> str | None:
        """Put the moving arguments in place; why the graph cannot be replayed with them, None if it can.

        Each tensor is looked at once in a generation: the same object later in it is taken to be where it was.
        """
        program = scale.key[0]
        checked = program in self._checked
        self._checked.add(program)
        for i, (a, b, place) in enumerate(zip(args, known.inputs, known.places, strict=True)):
            if (checked and a is b) or i in scale.moving:
                continue
            if a is b and isinstance(a, Tensor) and a.data_ptr() == place[0]:
                continue  # Dynamo guards the sizes and strides of what it holds itself
            if _place(a) != place:
                kind = (
                    "a weight or a cache is not where it was" if isinstance(a, Tensor) else "a size is not what it was"
                )
                return f"{kind} at capture"
        _, fresh = self._put(scale, args)
        return "the condition changed between scales" if fresh and known.reused else None

    def _put(self, scale: Scale, args: Sequence[Any]) -> tuple[list[Any], bool]:
        """The arguments at their fixed places, and whether the condition was put there anew.

        Programs that are first given the same tensor share a place, and it is copied once for all of them.
        """
        fixed, fresh, taken = list(args), False, set()
        for i in scale.moving:
            a = args[i]
            name = (scale.key[0], i, tuple(a.shape), a.stride(), a.dtype)
            place = self._inputs.get(name)
            if place is None:
                place = self._held.get(id(a))
                if place is None or id(place) in taken or not _unchanged(a, self._sources.get(id(place))):
                    with torch.inference_mode(False):
                        place = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
                self._inputs[name] = place
            taken.add(id(place))
            if not _unchanged(a, self._sources.get(id(place))):
                place.copy_(a)
                # Holding the source keeps its address from being taken by another tensor.
                self._sources[id(place)] = (a, -1 if a.is_inference() else a._version)
                self._held[id(a)] = place
                self._copies[id(place)] = self._copies.get(id(place), 0) + 1
            count = self._copies[id(place)]
            fresh = fresh or (i in scale.condition and self._read.get(name) != count)
            self._read[name] = count
            fixed[i] = place
        return fixed, fresh

    def _hand_out(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs, copied where the next replay would overwrite them under the caller."""
        return [o.clone() if isinstance(o, Tensor) and o.data_ptr() not in self._owned else o for o in outputs]


def _place(value: Any) -> Any:
    """Where a tensor is in memory; any other value itself."""
    return (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else value


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
