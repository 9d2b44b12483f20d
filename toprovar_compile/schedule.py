"""The scale schedule: which token grid each scale of a next-scale model generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from toprovar_compile.errors import ScheduleError, nearest


@dataclass(frozen=True)
class ScaleSchedule:
    """Token grids of all scales, coarse to fine.

    `grids[s]` is (height, width) of scale s in tokens. Equal schedules compare and hash equal.
    Raises ScheduleError for no grids, a side below 1, or a scale with fewer tokens than the one before it.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        grids = tuple(_grid(s, g) for s, g in enumerate(self.grids))
        object.__setattr__(self, "grids", grids)
        if not grids:
            raise ScheduleError("the schedule has no scales", where="grids", expected="at least one (h, w)")
        for s in range(1, len(grids)):
            if self.tokens[s] < self.tokens[s - 1]:
                raise ScheduleError(
                    f"scale {s} has {self.tokens[s]} tokens, fewer than the {self.tokens[s - 1]} of scale {s - 1}",
                    where=f"grids[{s}]",
                    expected="token counts that never decrease",
                    todo="list the grids coarse to fine",
                )

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each scale, h*w."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def prior(self) -> tuple[int, ...]:
        """Tokens of all scales before each scale: the length of an unpruned key/value cache when it starts."""
        return tuple(accumulate(self.tokens, initial=0))[:-1]

    @cached_property
    def total(self) -> int:
        """Tokens of all scales together."""
        return sum(self.tokens)

    def find(self, n: int, p: int) -> int | None:
        """The scale with `n` tokens and `p` tokens before it, None when no scale fits."""
        for s, (tokens, prior) in enumerate(zip(self.tokens, self.prior, strict=True)):
            if tokens == n and prior == p:
                return s
        return None

    @classmethod
    def from_patch_nums(cls, patch_nums: Sequence[int] | Iterable[Sequence[int]]) -> ScaleSchedule:
        """A schedule from side lengths (square grids) or (h, w) pairs, coarse to fine."""
        return cls(tuple((n, n) if isinstance(n, int) else n for n in patch_nums))  # type: ignore[misc]

    def to_json(self) -> list[list[int]]:
        """The grids as lists of two integers, ready for `json.dumps`."""
        return [list(g) for g in self.grids]

    @classmethod
    def from_json(cls, data: Any) -> ScaleSchedule:
        """The inverse of `to_json`; {"grids": [...]} is understood as well. Raises ScheduleError otherwise."""
        if isinstance(data, Mapping):
            unknown = [k for k in data if k != "grids"]
            if unknown:
                close = nearest(str(unknown[0]), ["grids"])
                raise ScheduleError(
                    f"unknown key {unknown[0]!r}",
                    where="schedule",
                    expected="only the key 'grids'",
                    todo=f"did you mean {close!r}?" if close else "remove it",
                )
            data = data.get("grids", ())
        if not isinstance(data, list | tuple):
            raise ScheduleError(f"got {type(data).__name__}", where="schedule", expected="a list of [h, w]")
        return cls(tuple(data))


def _grid(scale: int, grid: Any) -> tuple[int, int]:
    ok = isinstance(grid, list | tuple) and len(grid) == 2
    if not ok or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
        raise ScheduleError(
            f"scale {scale} is {grid!r}", where=f"grids[{scale}]", expected="(h, w), two integers of at least 1"
        )
    return grid[0], grid[1]
