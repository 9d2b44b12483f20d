"""The session: state of one batch of images being generated, shared by a model's loop and the compiled steps.

A model opens it around its loop over scales; compiled steps find it through a context variable, so that threads and
several models in one process never share state, and everything in it is freed when the generation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toprovar_compile.report import counters, logger

if TYPE_CHECKING:
    from toprovar_compile.plan import Plan
    from toprovar_compile.schedule import ScaleSchedule

_NOT_COMPILED = (
    "a scale ran outside the compiled steps and without its plan: Dynamo compiles no further form of the step; "
    "raise the limit with torch.compile(..., recompile_limit=64)"
)


@dataclass
class Session:
    """One generation. `scale` is the scale in progress; `plan` is bound by the first compiled step, None in eager mode.

    `ran` is the latest scale that a compiled step has run, None before the first.
    `store` belongs to whoever executes the steps (KV buffers, entropy maps, layer deltas); `on_close` is called when
    the generation ends, however it ends.
    """

    schedule: ScaleSchedule
    fingerprint: Callable[[], str]
    known_plan: Plan | None = None
    scale: int = -1
    ran: int | None = None
    plan: Plan | None = None
    store: dict[str, Any] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)

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


_current: ContextVar[Session | None] = ContextVar("toprovar_session", default=None)


def current_session() -> Session | None:
    """The session opened by the model that is generating in this thread (or task), None outside a generation."""
    return _current.get()


@contextmanager
def generation(
    schedule: ScaleSchedule, fingerprint: Callable[[], str], known_plan: Plan | None = None
) -> Iterator[Session]:
    """Open a session for the `with` block. Nested generations see their own session.

    `fingerprint` names the model and its weights; `known_plan` is the plan that came with them, which compiled steps
    take when the user asks for plan="auto".
    """
    session = Session(schedule, fingerprint, known_plan)
    token = _current.set(session)
    try:
        yield session
    finally:
        _current.reset(token)
        for callback in session.on_close:
            callback()
