"""What the compiler writes down is there, readable, linked, and answers what was pruned where and why."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.fx import symbolic_trace

from toprovar_compile.dump import Dump, record
from toprovar_compile.dump.facts import kernels_of
from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    found = Page()
    found.feed((folder / "index.html").read_text(encoding="utf-8"))
    return found


class Page(HTMLParser):
    """Ids, links, sources and the text of each row of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.rows: dict[str, str] = {}
        self._row = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.sources += [given[k] for k in ("src", "href") if k in given and tag != "a"]
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        if tag == "tr":
            self._row = given.get("id", "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._row:
            self.rows[self._row] = self.rows.get(self._row, "") + data


def test_without_a_directory_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dump = Dump.open(None)
    dump.graph("captured", symbolic_trace(torch.nn.Linear(2, 2)))
    dump.begin(None)
    assert not dump.on and dump.observe is None and dump._stages == [] and list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot write dumps.*expected a directory that can be written"):
        Dump.open(tmp_path / "file")


def test_one_folder_for_a_process_and_directory(tmp_path: Path) -> None:
    first, second = Dump.open(tmp_path), Dump.open(tmp_path)
    assert first.recorder is second.recorder is not None
    assert [f.name for f in tmp_path.iterdir()] == [first.recorder.folder.name]
    assert record._new_folder(tmp_path) != first.recorder.folder, "a process of the same number writes beside it"


def test_a_dump_changes_no_image(made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    assert torch.equal(made[2], made[3])


def test_files(folder: Path, made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    steps = sorted(f for f in folder.glob("graph_*") if re.fullmatch(r"graph_\d", f.name))
    assert len(steps) == 3, "two forms of the step, and the decoder"
    names = {f.name for f in steps[1].iterdir()}
    layers = {f"006_write_kv_cache.{f.name}.diff" for f in folder.glob("layer_*")}
    passes = {"002_rewrite_attention.diff", "003_outline_layers.diff"}
    assert passes | {"000_captured.py", "004_functional.py", "repro.py"} <= names
    assert len(layers & names) == 1
    for file in folder.rglob("*.py"):
        ast.parse(file.read_text(encoding="utf-8"))
    before = (steps[1] / "002_rewrite_attention.before.py").read_text(encoding="utf-8")
    after = (steps[1] / "002_rewrite_attention.after.py").read_text(encoding="utf-8")
    assert (
        before.count("torch._C._nn.scaled_dot_product_attention(")
        == after.count("torch.ops.toprovar.fae.default(")
        == 2
    )
    assert Plan.load(folder / f"plan_{made[1].digest()}.json") == made[1]


def test_the_page_holds_together(folder: Path, page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "ids are unique"
    assert [s for s in page.sources if not s.startswith("data:")] == [], "nothing is loaded from elsewhere"
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        else:
            assert (folder / link).is_file(), link
    assert {"plans", "graphs", "units", "guards", "time", "maps", "events", "cache"} <= set(page.ids)


def test_the_index_links_lead_somewhere(folder: Path) -> None:
    text = (folder / "index.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20 and [link for link in links if not (folder / link).is_file()] == []


def test_what_was_pruned_and_why(page: Page, made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    digest = made[1].digest()
    pruned = page.rows[f"why_{digest}_s4_l1"]
    assert "18 of 36 tokens (50.0%) are computed" in pruned
    assert "lowest attention entropy" in pruned and "last measured at scale 3" in pruned
    assert "made by keep_share with keep = 0.5, from_scale = 3" in pruned
    assert "dense, nothing is pruned" in page.rows[f"why_{digest}_s4_l0"]


def test_maps_show_the_tokens_that_were_kept(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    figure = text[text.index('id="map_s4_l1"') :].partition("</figure>")[0]
    assert "18 of 36 tokens computed" in figure
    uri = re.findall(r'class="kept" src="data:image/png;base64,([^"]+)"', figure)
    mask = Image.open(io.BytesIO(base64.b64decode(uri[0])))
    assert mask.size == (6, 6)
    assert mask.getchannel("A").histogram()[0] == 18


def test_every_node_has_its_token_axis(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "tokens in dimension 1" in text and "no tokens" in text
    assert "toprovar.fae_cached" in text


def test_the_trace(folder: Path) -> None:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["ph"] == "X"]
    assert [n for n in names if n.startswith("scale ")] == [f"scale {s}" for s in range(5)]
    assert names.count("layer 1") == 5 and any("prune" in n for n in names)
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_time_beside_its_prediction(folder: Path, made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    table = text[text.index("<th>predicted</th>") :].partition("</table>")[0]
    shares = re.findall(r'<td class="number">([\d.]+)%</td><td class="number">([\d.]+)%</td>', table)
    plan = made[1]
    computed = [n * share for n, share in zip(plan.schedule.tokens, plan.token_share(), strict=True)]
    assert [predicted for _, predicted in shares] == [f"{100 * n / sum(computed):.1f}" for n in computed]
    assert sum(float(measured) for measured, _ in shares) == pytest.approx(100, abs=0.5)


def test_pages_are_written_ever_more_rarely(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "Generation 2," in text, "after the first, second, fourth generation"


def test_the_script_runs_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / "graph_1" / "repro.py"))
    torch.set_grad_enabled(True)
    differences = re.findall(r"largest difference (\S+)", capsys.readouterr().out)
    assert len(differences) >= 5 and all(float(d) < 1e-4 for d in differences)


def test_structured_logs(make_var: Callable[..., VAR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(record, "is_traced", lambda: True)
    monkeypatch.setattr(record, "trace_artifact", lambda name, text: names.append(name))
    dump = Dump.open(None)
    dump.graph("functional", symbolic_trace(torch.nn.ReLU()))
    assert dump.on and names == ["functional"]


@pytest.mark.slow
def test_logs_of_a_process(tmp_path: Path) -> None:
    """As tlparse and a reader of messages get them; both are set up when torch is imported."""
    code = (
        "import torch\nfrom toprovar_compile.models.var import VAR, VARConfig\n"
        "from toprovar_compile.models.vqvae import VQVAEConfig\nfrom toprovar_compile.plan import Plan\n"
        "vae = VQVAEConfig(64, 8, 32, (1, 2), num_res_blocks=1, patch_nums=(1, 2))\n"
        "model = VAR(VARConfig(2, 32, 2, num_classes=10, shared_aln=True, vae=vae)).eval().requires_grad_(False)\n"
        "plan = Plan.dense(model.schedule, 2)\n"
        "torch.compile(model, backend='toprovar', options={'inner': 'eager', 'plan': plan})(torch.tensor([1]), seed=0)"
    )
    logs = {"TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+toprovar_compile", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **logs}, check=True, timeout=200, capture_output=True, text=True)
    assert re.search(r"rewrite_attention: 2 rewritten, in [\d.]+ ms", done.stderr), "passes are logged as they run"
    assert "compiled dense in" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    lines = trace.read_text().splitlines()
    entries = [json.loads(line[line.index("{") :]) for line in lines if '"artifact": {' in line]
    names = {entry["artifact"]["name"] for entry in entries}
    wanted = {
        "captured",
        "repro",
        "rewrite_attention",
        "rewrite_attention.diff",
        "functional",
        "prologue",
        "graph_report",
    }
    assert {f"toprovar_{name}" for name in wanted} <= names
    assert any(name.startswith("toprovar_plan_") for name in names)
    assert any("torch.ops.toprovar.fae.default(" in line for line in lines), "texts are in the log"


def test_kernels_of_generated_code() -> None:
    code = (
        "cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], '''\n''')\n"
        "extern_kernels.mm(a, b, out=c)\nextern_kernels.mm(c, b, out=a)\n"
        "torch.ops.toprovar.fae_cached.default(a)\n"
    )
    assert kernels_of(code) == {"cpp_fused_add_0": 1, "mm": 2, "toprovar.fae_cached.default": 1}
