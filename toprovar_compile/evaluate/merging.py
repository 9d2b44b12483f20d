"""Parts of one comparison of policies, made by several processes or on several GPUs, as one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toprovar_compile.errors import OptionError
from toprovar_compile.evaluate.draw import Worst

_CONDITIONS = ("version", "benchmark", "model", "machine", "labels", "sampling", "unpruned")
_SETTINGS = ("training", "seed", "batch")
_HOST = ("cores", "threads", "cpu_capability", "python")  # of a machine whose GPU computes

Row = dict[str, Any]


def same_conditions(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What differs in the conditions of two comparisons, so that their plans cannot stand in one table; "" if nothing.

    Numbers that a judge gave the unpruned images may differ by rounding: another GPU of the same kind made them.
    """
    for name in _CONDITIONS:
        if not _alike(_compared(a[name]), _compared(b[name])):
            return name
    return next((f"settings.{name}" for name in _SETTINGS if a["settings"][name] != b["settings"][name]), "")


def merge(parts: Sequence[Path], folder: Path) -> Path:
    """Write the comparison whose parts these JSON files are, with its pictures, into `folder`: the JSON's path.

    A plan that several parts have is taken from the first, its times from all. Raises OptionError for parts that do not
    belong together.
    """
    from toprovar_compile.evaluate.compare import publish

    found = [json.loads(path.read_text()) for path in parts]
    results, worst = found[0], Worst()
    for path, other in zip(parts, found, strict=True):
        if differs := same_conditions(results, other):
            raise OptionError(
                f"{differs} is not that of {parts[0]}",
                where=str(path),
                expected="parts of one comparison, of one kind of machine",
            )
        worst.load(other["worst"], path)
    rows: dict[tuple[str, ...], Row] = {}
    for row in (row for other in found for row in other["plans"]):
        known = rows.setdefault((row["policy"], row["name"], row["digest"]), row)
        known["times"] = row.get("times", {}) | known.get("times", {})
    done = {f"{policy}: {name}" for policy, name, _ in rows}
    results["plans"] = list(rows.values())
    results["timing"] = [about for other in found for about in other["timing"]]
    left = dict.fromkeys(label for other in found for label in other["not_measured"])
    results["not_measured"] = [label for label in left if label not in done]
    path = folder / parts[0].name
    publish(results, worst, path)
    return path


def reading_order(rows: Sequence[Row]) -> list[Row]:
    """Rows as the list of all plans has them."""
    return sorted(rows, key=lambda row: tuple(row["place"]))


def _compared(value: Any) -> Any:
    """What matters of a condition."""
    if isinstance(value, Mapping) and value.get("device") == "cuda":
        return {k: v for k, v in value.items() if k not in _HOST}
    return value


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)
    return bool(a == b)
