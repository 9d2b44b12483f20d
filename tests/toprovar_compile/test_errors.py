"""The error hierarchy and the form of its messages."""

from __future__ import annotations

import inspect
import pickle
import warnings

import pytest

from toprovar_compile import errors
from toprovar_compile.errors import OptionError, ToproVarError, ToproVarWarning, nearest

ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ToproVarError)]


def test_message_has_the_parts_in_order() -> None:
    error = ToproVarError("It broke.", where="here", expected="no break.", todo="mend it.")
    assert str(error) == "It broke (here); expected no break; mend it"
    assert (error.what, error.where, error.expected, error.todo) == ("It broke.", "here", "no break.", "mend it.")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "x"),
        ({"where": "w"}, "x (w)"),
        ({"expected": "e"}, "x; expected e"),
        ({"todo": "t"}, "x; t"),
        ({"where": "w", "todo": "t"}, "x (w); t"),
    ],
)
def test_empty_parts_are_dropped(parts: dict[str, str], text: str) -> None:
    assert str(ToproVarError("x", **parts)) == text


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_survive_pickling(cls: type[ToproVarError]) -> None:
    error = cls("what", where="where", expected="expected", todo="todo")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls and str(again) == str(error) and again.__dict__ == error.__dict__


def test_user_errors_are_value_errors_too() -> None:
    for cls in (OptionError, errors.PlanError, errors.ScheduleError, errors.CheckpointError):
        assert issubclass(cls, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)


def test_warning_is_a_user_warning() -> None:
    with pytest.warns(ToproVarWarning, match="slow"):
        warnings.warn("slow", ToproVarWarning, stacklevel=1)


def test_nearest() -> None:
    assert nearest("Alpha_mx", ["alpha_max", "tau"]) == "alpha_max"
    assert nearest("TAU", ["alpha_max", "Tau"]) == "Tau"
    assert nearest("zzz", ["alpha_max", "tau"]) is None
    assert nearest("", []) is None
