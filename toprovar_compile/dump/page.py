"""Write a recorder's files: graphs, code, plans and traces, with index.md and index.html over them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2

from toprovar_compile.dump.facts import UnitFacts, VariantFacts, gather
from toprovar_compile.dump.record import Recorder, Stage
from toprovar_compile.dump.trace import trace_events

_LONGEST = 150_000  # characters of a text that the page itself holds; longer ones are a link to their file


def write_page(recorder: Recorder) -> None:
    """Write everything into the recorder's folder; older files of the same names are replaced."""
    facts, root = gather(recorder), recorder.folder
    for graph in facts["graphs"]:
        graph["files"] = [_write_stage(root, graph["name"], i, stage) for i, stage in enumerate(graph["stages"])]
    units: dict[str, UnitFacts] = facts["units"]
    facts["unit_files"] = {name: _write_unit(root, unit) for name, unit in units.items()}
    for plan in facts["plans"]:
        plan["plan"].save(root / f"plan_{plan['digest']}.json")
    factors = {f"{name}: {v.name}": v.factors for name, unit in units.items() for v in unit.variants if v.factors}
    _write_json(root / "factors.json", {"machine": facts["machine"], "inductor": factors})
    _write_json(root / "events.json", facts["events"])
    _write_json(root / "trace.json", trace_events(units, recorder.generation))
    facts["compiles"] = _compiles(units)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["name"] = _safe
    environment.globals["longest"] = _LONGEST
    for source, target in (("page.html.j2", "index.html"), ("page.md.j2", "index.md")):
        environment.autoescape = target.endswith("html")
        text = environment.from_string(Path(__file__).with_name(source).read_text("utf-8")).render(facts)
        (root / target).write_text(text, encoding="utf-8")


def _safe(name: str) -> str:
    """A name that is one of files and of elements as well."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)


def _write_stage(root: Path, folder: str, i: int, stage: Stage) -> dict[str, str]:
    """Write a stage; the names of its files, relative to the root."""
    (root / folder).mkdir(exist_ok=True)
    if stage.name == "repro":
        texts = {"after": ("repro.py", stage.after)}
    elif stage.before is None:
        texts = {"after": (f"{i:03d}_{stage.name}.py", stage.after)}
    elif not stage.diff():
        texts = {}
    else:
        kinds = {"before": ("before.py", stage.before), "after": ("after.py", stage.after)}
        kinds["diff"] = ("diff", stage.diff())
        texts = {kind: (f"{i:03d}_{stage.name}.{end}", text) for kind, (end, text) in kinds.items()}
    for name, text in texts.values():
        (root / folder / _safe(name)).write_text(text, encoding="utf-8")
    return {kind: f"{folder}/{_safe(name)}" for kind, (name, _) in texts.items()}


def _write_unit(root: Path, unit: UnitFacts) -> dict[str, str]:
    """Write a unit's graph and generated code; file by variant, the graph's under the name ""."""
    folder = root / unit.name
    folder.mkdir(exist_ok=True)
    files = {"": f"{unit.name}/graph.py"}
    (root / files[""]).write_text(unit.text, encoding="utf-8")
    for i, variant in enumerate(unit.variants):
        if variant.code:
            name = f"{unit.name}/{i:02d}_{_safe(variant.name)}.inductor.py"
            (root / name).write_text(variant.code, encoding="utf-8")
            files[str(i)] = name
    return files


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _compiles(units: dict[str, UnitFacts]) -> list[dict[str, Any]]:
    """Compilations in order, placed in percent of the time from the first to the end of the last."""
    found: list[tuple[str, VariantFacts]] = [(n, v) for n, u in units.items() for v in u.variants]
    found.sort(key=lambda entry: entry[1].started)
    if not found:
        return []
    zero = found[0][1].started
    span = max(max(v.started + v.seconds for _, v in found) - zero, 1e-9)
    return [
        {
            "name": f"{name}: {v.name}",
            "seconds": v.seconds,
            "start": 100 * (v.started - zero) / span,
            "width": 100 * v.seconds / span,
        }
        for name, v in found
    ]
