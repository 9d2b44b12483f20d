"""Decisions that a plan leaves to each image: which of its alternatives to follow, by a few measured numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from toprovar_compile.errors import PlanError, nearest

Features = Literal["entropy", "frequency"]


@dataclass(frozen=True)
class Decision:
    """A linear classifier that runs after scale `after`.

    `features`: what it reads, a vector of floats. "entropy": rho of that scale, then the layer score R of every layer
    under `beta` (see `policies.toprovar`), 1 + L numbers. "frequency": how much the fine detail of a preview changed in
    that scale, and its share of high frequencies (see `policies.frequency`), 2 numbers, from previews on the grid of
    scale `preview`. The outcome whose row of `weights` gives the largest weights . features + bias is taken, the first
    of equal ones; `outcomes` are indices of the plan's alternatives, None for going on with the plan itself.
    Raises PlanError for rows of unequal number or length, and for numbers that are not finite.
    """

    after: int
    features: Features
    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]
    outcomes: tuple[int | None, ...]
    beta: float = 1.0
    preview: int = 0

    def __post_init__(self) -> None:
        where = "decision"
        if self.features not in get_args(Features):
            raise PlanError(f"features is {self.features!r}", where=where, expected=" or ".join(get_args(Features)))
        object.__setattr__(self, "weights", tuple(tuple(_finite(v) for v in row) for row in self.weights))
        object.__setattr__(self, "biases", tuple(_finite(v) for v in self.biases))
        object.__setattr__(self, "outcomes", tuple(self.outcomes))
        object.__setattr__(self, "beta", _finite(self.beta))
        counts = {len(self.weights), len(self.biases), len(self.outcomes)}
        if len(counts) != 1 or counts == {0} or len({len(row) for row in self.weights}) != 1:
            raise PlanError(
                f"{len(self.weights)} rows of weights, {len(self.biases)} biases and {len(self.outcomes)} outcomes",
                where=where,
                expected="as many of each, at least one, the rows of one length",
            )
        for name in ("after", "preview"):
            if not _index(getattr(self, name)):
                raise PlanError(f"{name} is {getattr(self, name)!r}", where=where, expected="a scale of the plan")
        for outcome in self.outcomes:
            if outcome is not None and not _index(outcome):
                raise PlanError(f"an outcome is {outcome!r}", where=where, expected="an alternative's index, or null")

    def choose(self, features: Sequence[float]) -> int | None:
        """The outcome for one image. Raises PlanError for features of another length."""
        if len(features) != len(self.weights[0]):
            raise PlanError(
                f"{len(features)} features were measured", where="decision", expected=f"{len(self.weights[0])}"
            )
        values = [
            sum(w * f for w, f in zip(row, features, strict=True)) + b
            for row, b in zip(self.weights, self.biases, strict=True)
        ]
        return self.outcomes[values.index(max(values))]

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {
            "weights": [list(r) for r in self.weights],
            "biases": list(self.biases),
            "outcomes": list(self.outcomes),
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Decision:
        """The inverse of `to_json`. Raises PlanError naming `where`."""
        valid = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise PlanError(f"got {type(data).__name__}", where=where, expected="an object")
        for key in data:
            if key not in valid:
                close = nearest(str(key), valid)
                raise PlanError(
                    f"unknown key {key!r}",
                    where=where,
                    expected="one of " + ", ".join(valid),
                    todo=f"did you mean {close!r}?" if close else "remove it",
                )
        try:
            return cls(**data)
        except TypeError as error:
            raise PlanError(f"cannot read it: {error}", where=where, expected=", ".join(valid[:5])) from error
        except PlanError as error:
            raise PlanError(error.what, where=where, expected=error.expected, todo=error.todo) from error


def _index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"got {value!r}", where="decision", expected="a finite number")
    return float(value)
