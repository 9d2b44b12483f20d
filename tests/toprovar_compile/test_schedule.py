"""The scale schedule: lookups, JSON, and the error of every malformed input."""

from __future__ import annotations

from typing import Any

import pytest

import toprovar_compile
from toprovar_compile.errors import ScheduleError
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (2, 3), (4, 4)))


def test_token_counts() -> None:
    assert SCHEDULE.tokens == (1, 6, 16)
    assert SCHEDULE.prior == (0, 1, 7)
    assert SCHEDULE.total == 23
    assert len(SCHEDULE) == 3


def test_find() -> None:
    assert [SCHEDULE.find(n, p) for n, p in ((1, 0), (6, 1), (16, 7), (16, 6), (5, 1))] == [0, 1, 2, None, None]


def test_from_patch_nums() -> None:
    assert ScaleSchedule.from_patch_nums((1, 2, 4)).grids == ((1, 1), (2, 2), (4, 4))
    assert ScaleSchedule.from_patch_nums([(1, 2), [2, 4]]).grids == ((1, 2), (2, 4))


def test_equality_and_hash() -> None:
    other = ScaleSchedule.from_json(SCHEDULE.to_json())
    assert other.tokens and other == SCHEDULE and hash(other) == hash(SCHEDULE)
    assert ScaleSchedule(((1, 1), (3, 2), (4, 4))) != SCHEDULE


def test_json() -> None:
    assert SCHEDULE.to_json() == [[1, 1], [2, 3], [4, 4]]
    assert ScaleSchedule.from_json({"grids": SCHEDULE.to_json()}) == SCHEDULE


def test_scales_of_equal_size_are_allowed() -> None:
    assert ScaleSchedule(((2, 3), (3, 2))).find(6, 6) == 1


@pytest.mark.parametrize(
    ("grids", "match"),
    [
        ((), "no scales"),
        (((1, 1), (0, 2)), r"grids\[1\]"),
        (((1, -1),), r"grids\[0\]"),
        (((1, 1), (1,)), r"grids\[1\]"),
        (((1, 1), 4), r"grids\[1\]"),
        (((1, 1.0),), r"grids\[0\]"),
        (((1, True),), r"grids\[0\]"),
        ((("1", "1"),), r"grids\[0\]"),
        (((2, 2), (1, 3)), "coarse to fine"),
    ],
)
def test_malformed_grids(grids: Any, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        ScaleSchedule(grids)


@pytest.mark.parametrize(
    ("data", "match"),
    [(3, "got int"), ("1x1", "got str"), ({"grid": []}, "did you mean 'grids'"), ({}, "no scales"), (None, "NoneType")],
)
def test_malformed_json(data: Any, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        ScaleSchedule.from_json(data)


def test_from_patch_nums_refuses_other_types() -> None:
    for bad in ([1, 2.5], [1, None], [True]):
        with pytest.raises(ScheduleError):
            ScaleSchedule.from_patch_nums(bad)  # type: ignore[arg-type]


def test_package_exports_it() -> None:
    assert toprovar_compile.ScaleSchedule is ScaleSchedule
    with pytest.raises(AttributeError, match="no attribute 'ScaleSchedul'"):
        toprovar_compile.ScaleSchedul  # noqa: B018
