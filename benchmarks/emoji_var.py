"""Measure emoji-VAR in every way and publish it: JSON and plot in benchmarks/results, the table of the README.

Run it as `python benchmarks/emoji_var.py` (about an hour on two CPU cores; it goes on where it stopped); with
`--update-readme` to put the tables into README.md as well, with `--only-readme` for that alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from toprovar_compile.bench import emoji_var as bench
from toprovar_compile.errors import ToproVarError
from toprovar_compile.files import write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin (written by benchmarks/emoji_var.py) -->", "<!-- results: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=64, help="classes, one image each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--minutes", type=float, default=180.0, help="start no new way after this long")
    parser.add_argument("--plan", action="append", help="a plan to measure, repeatable; default: the whole frontier")
    parser.add_argument("--inductor-mode", action="append", default=[], help="a further mode of torch.compile")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--update-readme", action="store_true")
    parser.add_argument("--only-readme", action="store_true")
    given = parser.parse_args()
    if not given.only_readme:
        settings = bench.Settings(
            given.classes,
            given.seed,
            given.device,
            given.minutes,
            tuple(given.plan or bench.FRONTIER),
            tuple(given.inductor_mode),
        )
        try:
            path = bench.run(settings, given.results, ROOT / "toprovar-out" / "bench")
        except ToproVarError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"wrote {path}")
    if given.update_readme or given.only_readme:
        readme = ROOT / "README.md"
        write_bytes(readme, filled(readme.read_text(), given.results).encode())
        print(f"wrote {readme}")
    return 0


def filled(readme: str, results: Path) -> str:
    """README text with a table for each published JSON between its two markers."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    files = [path for device in ("cpu", "cuda") if (path := results / f"emoji_var_{device}.json").exists()]
    sections = [section(json.loads(path.read_text())) for path in files]
    return "\n".join([head + BEGIN, "", *(sections or ["Nothing is published yet.\n"]), END + tail])


def section(results: dict[str, Any]) -> str:
    """One device's table in Markdown."""
    machine = results["machine"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    lines = [
        f"**{machine['hardware']}{threads}**, torch {machine['torch']}, {machine['precision']}, batch 1, "
        f"{len(results['images'])} classes, one image each; attention: {machine['attention']}.",
        "",
        "| " + " | ".join(bench.COLUMNS) + " |",
        "|---|" + "---:|" * (len(bench.COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in bench.rows(results)),
        "",
    ]
    if cost := results["entropy_cost"]:
        lines += [f"Measuring the entropy of every layer costs {cost['share']:+.1%} of a dense generation.", ""]
    if remark := results.get("remark"):
        lines += [remark, ""]
    if results["not_measured"]:
        lines += ["Not measured: " + ", ".join(results["not_measured"]) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
