"""The session: state of one batch of images being generated, shared by a model's loop and the compiled steps.

A model opens it around its loop over scales; compiled steps find it through a context variable, so that threads and
several models in one process never share state, and everything in it is freed when the generation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from toprovar_compile.errors import ScaleGuardError
from toprovar_compile.inductor import backend_name, not_captured, open_lengths, paused_collector
from toprovar_compile.report import counters, logger

if TYPE_CHECKING:
    from toprovar_compile.plan import Plan
    from toprovar_compile.schedule import ScaleSchedule

_NOT_COMPILED = (
    "a scale ran outside the compiled steps and without its plan: Dynamo compiles no further form of the step; "
    "raise torch._dynamo.config.recompile_limit, for instance to 64"
)


IMAGE_SINK = "image"
"""Key in `Session.store` of a callable that is given the images of a generation."""


on_generation: list[Callable[[Session], None]] = []
"""What is called with each session when its generation begins; compiled steps go on there with what they know."""


class Replays(Protocol):
    """How compiled steps run a scale again that they have run before; see `toprovar_compile.replay`."""

    def replay(self, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What `run(*args)` returns, or None where it has to run."""

    def learn(self, run: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
        """`run(*args)` ran and returned `result`."""


@dataclass
class Session:
    """One generation. `scale` is the scale in progress; `plan` is `bound` by the first compiled step, None in eager
    mode, and exchanged for one of its alternatives when the image decides so.

    `ran` is the latest scale that a compiled step has run, None before the first. `prefix` counts the tokens that a
    model puts into its caches before the first scale, in a step while `scale` is -1. `keeps_caches` is False where
    nobody reads the caches after the last scale that runs, which then need not be kept.
    `store` belongs to whoever executes the steps (KV buffers, entropy maps, layer deltas); `on_close` is called when
    the generation ends, however it ends, and `store` is then emptied. `graphs` is how they launch a part of the
    generation as a CUDA graph, and `replays` how they run a scale that was one before; `early` are arguments and
    results of `launch` before the first step. `compiler` is what Dynamo compiles the steps by, and None in eager mode.
    """

    schedule: ScaleSchedule
    fingerprint: Callable[[], str]
    known_plan: Plan | None = None
    prefix: int = 0
    keeps_caches: bool = True
    scale: int = -1
    ran: int | None = None
    plan: Plan | None = None
    bound: bool = False
    store: dict[str, Any] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)
    compiler: Any = None
    graphs: Callable[..., Sequence[Tensor]] | None = None
    replays: Replays | None = None
    early: list[tuple[Any, ...]] = field(default_factory=list)

    @not_captured
    def step(self, run: Callable[..., Any], *args: Any, caches: Sequence[Tensor | None] = ()) -> Any:
        """`run(*args)`: one scale through all layers, in a method of the model that is compiled when it is called.

        `caches` are those among the arguments, (B, H, p, D). Where they are told, the scale at which they hold one
        token is captured together with later ones.

        A model runs its steps through this, so that a scale that was launched as a CUDA graph before can be launched
        again without the compiler's checks of everything that cannot have changed since.
        """
        if self.replays is not None and (result := self.replays.replay(run, args)) is not None:
            return result
        compiles = backend_name(self.compiler) == "toprovar"
        with open_lengths(args, caches), paused_collector if compiles else nullcontext():
            result = run(*args)
        if self.replays is not None:
            self.replays.learn(run, args, result)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def even(self, caches: Sequence[Tensor | None]) -> bool:
        """Whether all of `caches` (B, H, p, D) have one length, now and, as far as the plan tells, at later scales."""
        if self.plan is None and self.bound:
            return True
        lengths = {None if t is None else t.shape[2] for t in caches}
        return (self.plan is None or self.plan.is_even) and len(lengths) < 2

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def launch(
        self,
        key: Hashable,
        run: Callable[..., Sequence[Tensor]],
        args: Sequence[Tensor],
        fixed: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
    ) -> Sequence[Tensor]:
        """`run(*args)`, or `run(*args, generator)`: what a model does between its steps, as one launch where it can.

        Where compiled steps are CUDA graphs this becomes one as well. So `run` must not wait for the device, must read
        no tensors but `args` and those in `fixed` (weights), must return new ones, and everything else it depends on
        must be in `key`. What it returns holds until the same is launched again, in a later generation as a rule.
        """
        if self.graphs is not None:
            return self.graphs(key, run, args, fixed, generator)
        results = run(*args) if generator is None else run(*args, generator)
        if self.compiler is not None and self.ran is None:
            self.early.append((key, run, args, fixed, generator, results))
        return results

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finished(self, images: Tensor) -> Tensor:
        """`images` (B, 3, H, W) in 0..1, unchanged: what a model returns goes through this, for dumps to show."""
        if (sink := self.store.get(IMAGE_SINK)) is not None:
            sink(images)
        return images

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def guided(self) -> bool:
        """Whether the scale in progress runs with its unconditional half; so it is unless the plan says otherwise."""
        return self.plan is None or self.plan.guided(self.scale)

    def scales(self) -> Iterator[int]:
        """Scale indices to run, in order, up to the scale where the plan leaves the generation (an exit)."""
        for s in range(len(self.schedule.tokens)):
            if self.plan is not None and not self.plan.runs(s):
                return
            self.scale = s
            yield s
            if self.ran not in (None, s):
                counters.add("fallback", _NOT_COMPILED)
                logger.warning(_NOT_COMPILED)


def check_equal_sizes(sizes: Sequence[int]) -> None:
    """In a step: have the compiler know that these sizes are one, which it then has one symbol for instead of many.

    Raises ScaleGuardError where they are not.
    """
    for size in sizes[1:]:
        if size != sizes[0]:
            raise ScaleGuardError(f"sizes differ: {sizes[0]} and {size}", where="step", expected="one size")


_current: ContextVar[Session | None] = ContextVar("toprovar_session", default=None)


def current_session() -> Session | None:
    """The session opened by the model that is generating in this thread (or task), None outside a generation."""
    return _current.get()


@contextmanager
def generation(
    schedule: ScaleSchedule,
    fingerprint: Callable[[], str],
    known_plan: Plan | None = None,
    prefix: int = 0,
    keeps_caches: bool = True,
) -> Iterator[Session]:
    """Open a session for the `with` block, without gradients. Nested generations see their own session.

    `fingerprint` names the model and its weights; `known_plan` is the plan that came with them, which compiled steps
    take when the user asks for plan="auto"; `prefix` and `keeps_caches` are those of the session.
    """
    session = Session(schedule, fingerprint, known_plan, prefix, keeps_caches)
    session.compiler = eval_frame.get_eval_frame_callback() or None  # False: it runs what is compiled, and no more
    token = _current.set(session)
    try:
        # In inference mode tensors count no versions, and nothing that was computed from them could be kept.
        with torch.inference_mode(False), torch.no_grad():
            for resume in on_generation:
                resume(session)
            yield session
    finally:
        _current.reset(token)
        for callback in session.on_close:
            callback()
        # What is stored refers back to the session. Memory of a generation must not wait for the garbage collector.
        session.store.clear()
        session.on_close.clear()
        session.early.clear()
