"""Options of the backend: `torch.compile(model, backend="toprovar", options={...})`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.plan import Direction, Plan, Restore, Selection
from toprovar_compile.policies.toprovar import Crossing, Thresholds


class Options(BaseModel):
    """What a user may set.

    `plan`: "auto" (the plan that comes with the model's weights, none for other models), "dense" (lossless), the path
    of a plan file, or a Plan. `tau`, `crossing`, `beta`, `alpha_min`, `alpha_max`, `buckets`: thresholds that make the
    plan anew from the statistics inside it (see `policies.toprovar.Thresholds`). `restore`, `selection`, `direction`:
    override the plan's. `inner`: the compiler of the pieces, "inductor" or "eager" (for tests). `dump`: a directory for
    graphs, guards and plan; TOPROVAR_DUMP in the environment does the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    plan: Plan | Path | str = "auto"
    tau: float | None = None
    crossing: Crossing | None = None
    beta: float | None = None
    alpha_min: float | None = None
    alpha_max: float | None = None
    buckets: tuple[float, ...] | list[float] | None = None
    restore: Restore | None = None
    selection: Selection | None = None
    direction: Direction | None = None
    inner: Literal["inductor", "eager"] = "inductor"
    dump: Path | str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from the user's mapping. Raises OptionError, naming the nearest valid key for an unknown one."""
        values = dict(options or {})
        for key in values:
            if key not in cls.model_fields:
                close = nearest(str(key), cls.model_fields)
                raise OptionError(
                    f"unknown option {key!r}",
                    where="torch.compile(..., backend='toprovar', options=...)",
                    expected="one of " + ", ".join(cls.model_fields),
                    todo=f"did you mean {close!r}?" if close else "remove it",
                )
        values.setdefault("dump", os.environ.get("TOPROVAR_DUMP") or None)
        try:
            parsed = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise OptionError(
                f"option {name!r} is {values[name]!r}",
                where="torch.compile(..., backend='toprovar', options=...)",
                expected=first["msg"],
            ) from error
        parsed.thresholds()
        return parsed

    def thresholds(self) -> dict[str, Any]:
        """The thresholds that are set, by name. Raises OptionError for a value out of range."""
        names = {f.name for f in fields(Thresholds)}
        chosen = {k: v for k, v in self.model_dump(exclude={"plan"}).items() if k in names and v is not None}
        Thresholds(**chosen)
        return chosen
