"""The exceptions of toprovar_compile.

Every message says, in this order, what happened, where, what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToproVarError(Exception):
    """Base of every exception raised on purpose by this package.

    The message is "<what> (<where>); expected <expected>; <todo>", parts left empty being dropped. The parts stay
    readable as attributes of the same names.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", todo: str = "") -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.todo = todo
        super().__init__(_compose(what, where, expected, todo))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the parts: exceptions cross process borders when compilation runs in worker processes."""
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.todo))


class OptionError(ToproVarError, ValueError):
    """An option, argument or command line value is not valid."""


class PlanError(ToproVarError, ValueError):
    """A plan is malformed, or does not belong to the model it is used with."""


class ScheduleError(ToproVarError, ValueError):
    """A scale schedule is empty, not positive or does not grow."""


class CheckpointError(ToproVarError, ValueError):
    """A weights file is missing, damaged, or does not fit the model."""


class UnsupportedModelError(ToproVarError, TypeError):
    """A model object is of no known kind, or is in a state that generation cannot be taken over in."""


class PassInvariantError(ToproVarError):
    """A graph pass left the graph in a state that its own check refuses."""


class UnsupportedGraphError(ToproVarError):
    """The captured graph holds something that the compiler cannot handle."""


class ScaleGuardError(ToproVarError):
    """A step was called with sizes that no compiled variant and no scale of the schedule covers."""


class MissingTritonError(ToproVarError):
    """A Triton kernel was launched where Triton is not installed."""


class MissingCompilerError(ToproVarError):
    """Code generation needs a C++ compiler and none was found."""


class MissingDependencyError(ToproVarError, ImportError):
    """An optional Python package is needed for this call and is not installed."""


class CacheOverflowError(ToproVarError):
    """More tokens were written into a preallocated cache than it has room for."""


class ToproVarWarning(UserWarning):
    """Something works, but not the way that was asked for; the text says why."""


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The entry of `valid` that looks most like `key`, or None when none is close."""
    by_lower = {v.lower(): v for v in valid}
    found = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _compose(what: str, where: str, expected: str, todo: str) -> str:
    head = what.strip().rstrip(".")
    if where:
        head += f" ({where.strip()})"
    parts = [head]
    if expected:
        parts.append(f"expected {expected.strip().rstrip('.')}")
    if todo:
        parts.append(todo.strip().rstrip("."))
    return "; ".join(parts)


def _rebuild(cls: type[ToproVarError], what: str, where: str, expected: str, todo: str) -> ToproVarError:
    return cls(what, where=where, expected=expected, todo=todo)
