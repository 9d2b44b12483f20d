"""The attention benchmark, on CPU with small shapes; what it reports of a GPU is made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from toprovar_compile.bench import fae as bench_fae
from toprovar_compile.bench.fae import Case, Settings
from toprovar_compile.kernels import fae_reference
from toprovar_compile.models.infinity_schedule import infinity_schedule

SMALL = [Case("small", "4x4", 2, 3, 16, 30, 8), Case("small", "5x5", 2, 3, 25, 400, 8, masked=True)]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench_fae, "CPU_CASES", SMALL)
    return bench_fae.run(Settings(device="cpu", rounds=2, threads=1), tmp_path, log=lambda text: None)


def test_a_run_on_the_cpu(path: Path) -> None:
    data = json.loads(path.read_text())
    assert path.name == "fae_cpu.json" and path.with_suffix(".png").exists()
    assert [row["shape"] for row in data["rows"]] == [
        {"B": 2, "H": 3, "n": 16, "m": 30, "D": 8},
        {"B": 2, "H": 3, "n": 25, "m": 400, "D": 8},
    ]
    for row in data["rows"]:
        assert row["threads"] == 1 and list(row["forms"]) == ["fae", "fae + entropy", "PyTorch", "naive"]
        for form in row["forms"].values():
            assert form["ms"] >= form["best_ms"] > 0 and form["clock"] == "process_time"
        assert row["forms"]["fae + entropy"]["entropy_error_nats"] < 1e-5
        assert "entropy_error_nats" not in row["forms"]["PyTorch"]
    assert data["singular_values"]["relative_error"] < 1e-3
    assert data["machine"]["precision"] == "float32"


def test_another_dtype_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_fae, "CPU_CASES", SMALL)
    settings = Settings(device="cpu", dtype="bfloat16", models="SMALL", rounds=1, threads=1)
    assert bench_fae.run(settings, tmp_path, log=lambda text: None).name == "fae_cpu_bfloat16.json"


def made_up() -> dict[str, Any]:
    """What a GPU would report; FlashAttention-2 takes no masks."""
    rows = []
    for case in bench_fae.CUDA_CASES:
        forms: dict[str, dict[str, Any]] = {
            name: {"ms": factor, "tflops": 500 / factor, "extra_mib": 1.5, "kernels": []}
            for name, factor in (("fae", 1.0), ("fae + entropy", 1.03), ("FA2", 1.4))
        }
        forms["fae + entropy"]["entropy_error_nats"] = 1e-6
        if case.masked:
            forms["FA2"] = {"failed": "takes no bias"}
        rows.append(bench_fae._row(case, "bfloat16", forms))
    return {"machine": {"hardware": "a GPU", "precision": "bfloat16"}, "rows": rows}


def test_the_table_marks_the_fastest_and_shows_what_failed() -> None:
    console = Console(width=200, record=True)
    console.print(bench_fae.table(made_up()))
    text = console.export_text()
    first, masked = (next(line for line in text.splitlines() if name in line) for name in ("Infinity-2B", "HART"))
    assert first.split() == ["Infinity-2B", "B2,", "32x32", "1.000", "1.030", "1.400", "485", "1.5", "1.0e-06"]
    assert masked.split()[:6] == ["HART", "B2,", "masked,", "27x27", "1.000", "1.030"] and masked.split()[6] == "-"


def test_plot(tmp_path: Path) -> None:
    bench_fae.plot(made_up(), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_shapes_are_those_of_the_models() -> None:
    tokens = infinity_schedule("1:1", "1M").tokens
    for model, heads in (("Infinity-2B", 16), ("Infinity-8B", 28)):
        found = [case for case in bench_fae.CUDA_CASES if case.model == model]
        assert [case.n for case in found] == list(tokens[-4:])
        assert [case.m for case in found] == [sum(tokens[:i]) for i in range(10, 14)]
        assert {(case.heads, case.head_dim) for case in found} == {(heads, 128)}
    hart = [case for case in bench_fae.CUDA_CASES if case.model == "HART"]
    assert all(case.masked for case in hart) and hart[-1].m == 300 + 9450


def test_masks_hide_padding_of_the_text_only() -> None:
    q, k, v, mask = bench_fae.inputs(SMALL[1], "float32", torch.device("cpu"))
    assert mask is not None and mask.shape == (2, 1, 1, 400)
    assert (~mask).sum(-1).flatten().tolist() == [30, 270] and mask[..., 270:].all()
    assert q.transpose(1, 2).is_contiguous() and k.is_contiguous() and v.is_contiguous()


@pytest.mark.parametrize("case", SMALL)
def test_naive_form_is_right(case: Case) -> None:
    q, k, v, mask = bench_fae.inputs(case, "float32", torch.device("cpu"))
    want = fae_reference(q, k, v, mask, 0.25)
    for a, b in zip(bench_fae._naive(q, k, v, mask, 0.25), want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_identity_gives_the_entropy() -> None:
    q, k, v, _ = bench_fae.inputs(SMALL[0], "float32", torch.device("cpu"))
    scores = q @ k.mT * 0.25
    entropy = bench_fae._identity(q, scores.softmax(-1) @ k, scores.logsumexp(-1), 0.25)
    torch.testing.assert_close(entropy, fae_reference(q, k, v, None, 0.25)[1])


def test_floating_point_operations() -> None:
    assert Case("x", "y", 2, 16, 4096, 10521, 128).flops == math.prod((4, 2, 16, 4096, 10521, 128))
