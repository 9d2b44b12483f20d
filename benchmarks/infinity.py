"""Measure Infinity in every way and publish it: JSON and plot in benchmarks/results.

`python benchmarks/infinity.py --model 2b --official CHECKOUT --fastvar CHECKOUT` on a machine with one GPU; the options
are those of `toprovar bench infinity`. Ways can be measured in several calls (`--way dense`), which go on where
earlier ones stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from toprovar_compile.cli import app

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    given = sys.argv[1:]
    if not {"--out", "-o"} & set(given):
        given += ["--out", str(RESULTS)]
    app(["bench", "infinity", *given])


if __name__ == "__main__":
    main()
