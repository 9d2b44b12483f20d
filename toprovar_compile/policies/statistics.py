"""What calibration measures on a model: enough to make plans for any thresholds without running the model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from toprovar_compile.errors import PlanError, ScheduleError, nearest
from toprovar_compile.schedule import ScaleSchedule

SPREAD_POINTS = 16
"""Points of the distribution of a map's entropy that are kept: the quantiles (i + 0.5) / 16."""


@dataclass(frozen=True)
class Statistics:
    """Attention entropies of one model, averaged over prompts: S scales, L layers.

    `model` is its fingerprint; `prompts` images were generated with `seed`. `rho[s]`: share of the tokens with less
    entropy than the mean of their map, None for a scale of one token. `entropy[s][l]`: mean in nats. `ratio[s][l]`:
    first by second singular value of the map. `spread[s][l]`: quantiles of the entropy divided by the mean of its map.
    Raises PlanError, naming the field, for wrong lengths or values that are not finite numbers.
    """

    model: str
    schedule: ScaleSchedule
    num_layers: int
    prompts: int
    seed: int
    rho: tuple[float | None, ...]
    entropy: tuple[tuple[float, ...], ...]
    ratio: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        scales, layers = len(self.schedule), self.num_layers
        shapes = {
            "rho": (scales,),
            "entropy": (scales, layers),
            "ratio": (scales, layers),
            "spread": (scales, layers, SPREAD_POINTS),
        }
        for name, shape in shapes.items():
            allow_none = name == "rho"
            object.__setattr__(self, name, _numbers(f"statistics.{name}", getattr(self, name), shape, allow_none))

    def to_json(self) -> dict[str, Any]:
        """The statistics as JSON data."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["schedule"] = self.schedule.to_json()
        data.update({name: _lists(data[name]) for name in ("rho", "entropy", "ratio", "spread")})
        return data

    @classmethod
    def from_json(cls, data: Any) -> Statistics:
        """The inverse of `to_json`. Raises PlanError naming the field."""
        if not isinstance(data, Mapping):
            raise PlanError(f"got {type(data).__name__}", where="statistics", expected="an object")
        valid = [f.name for f in fields(cls)]
        for key in data:
            if key not in valid:
                close = nearest(str(key), valid)
                raise PlanError(
                    f"unknown key {key!r}",
                    where="statistics",
                    expected="one of " + ", ".join(valid),
                    todo=f"did you mean {close!r}?" if close else "remove it",
                )
        values = dict(data)
        for key in valid:
            if key not in values:
                raise PlanError(
                    f"the key {key!r} is missing", where="statistics", expected="the output of a calibration"
                )
        for key in ("num_layers", "prompts", "seed"):
            if isinstance(values[key], bool) or not isinstance(values[key], int):
                raise PlanError(f"got {values[key]!r}", where=f"statistics.{key}", expected="an integer")
        try:
            values["schedule"] = ScaleSchedule.from_json(values["schedule"])
        except ScheduleError as error:
            raise PlanError(error.what, where="statistics.schedule", expected=error.expected) from error
        return cls(**values)


def _numbers(where: str, values: Any, shape: tuple[int, ...], allow_none: bool) -> Any:
    """`values` as nested tuples of floats of the given shape."""
    if not shape:
        if values is None and allow_none:
            return None
        if isinstance(values, bool) or not isinstance(values, int | float) or not abs(values) < float("inf"):
            raise PlanError(f"got {values!r}", where=where, expected="a finite number")
        return float(values)
    if not isinstance(values, list | tuple) or len(values) != shape[0]:
        got = len(values) if isinstance(values, list | tuple) else type(values).__name__
        raise PlanError(f"got {got}", where=where, expected=f"a list of {shape[0]}")
    return tuple(_numbers(f"{where}[{i}]", v, shape[1:], allow_none) for i, v in enumerate(values))


def _lists(values: Any) -> Any:
    return [_lists(v) for v in values] if isinstance(values, tuple) else values
