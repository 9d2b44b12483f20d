"""Writing what the compiler made to a directory: graphs as Python, guards as sympy relations, the plan as JSON."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from toprovar_compile.errors import OptionError

if TYPE_CHECKING:
    from toprovar_compile.dispatch import StepProgram
    from toprovar_compile.plan import Plan

_numbers = itertools.count()


class Dump:
    """One captured graph's folder, `<dir>/<pid>_<number>`; with no directory, nothing is written."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._step = 0

    @classmethod
    def open(cls, directory: str | os.PathLike[str] | None) -> Dump:
        """Make the folder of the next graph. Raises OptionError where it cannot be written."""
        if directory is None:
            return cls(None)
        folder = Path(directory) / f"{os.getpid()}_{next(_numbers):03d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"cannot write dumps: {error.strerror}", where=str(folder), expected="a directory that can be written"
            ) from error
        return cls(folder)

    def graph(self, name: str, gm: GraphModule) -> None:
        """A graph as readable Python."""
        if self.folder is not None:
            text = gm.print_readable(print_output=False, include_stride=True)
            self._write(f"{name}.py", text.replace("class <lambda>(", f"class {name}("))  # AOT's name is no Python

    def program(self, program: StepProgram) -> None:
        """The pieces of a split step, each class of layers once."""
        if self.folder is None:
            return
        self.graph("prologue", program.split.prologue.graph)
        for key, bound in {b.cls.key: b for b in program.layers}.items():
            self.graph(f"layer_{key}", bound.cls.graph)
        self.graph("epilogue", program.split.epilogue.graph)

    def run(self, program: StepProgram, plan: Plan | None) -> None:
        """Guards, variants and plan as they are now; later calls replace the files."""
        if self.folder is None:
            return
        report = program.report
        (self.folder / "guards.txt").write_text("\n".join([*report.guards(), *report.variants()]) + "\n", "utf-8")
        if plan is not None:
            plan.save(self.folder / "plan.json")

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        (self.folder / f"{self._step:03d}_{name}").write_text(text, encoding="utf-8")
        self._step += 1
