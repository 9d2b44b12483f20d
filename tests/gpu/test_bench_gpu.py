"""The attention benchmark on a CUDA device, with small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from toprovar_compile.bench import fae as bench_fae
from toprovar_compile.bench.fae import Case, Settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = [
    Case("small", "8x8", 2, 4, 64, 155, 64),
    Case("small", "16x16", 2, 4, 256, 680, 64),
    Case("text", "16x16", 2, 4, 256, 680, 64, masked=True),
]


@pytest.mark.slow
def test_every_form_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_fae, "CUDA_CASES", SMALL)
    path = bench_fae.run(Settings(device="cuda", rounds=3), tmp_path, log=lambda text: None)
    data = json.loads(path.read_text())
    assert path.name == "fae_cuda.json" and path.with_suffix(".png").exists()
    assert data["singular_values"]["relative_error"] < 1e-3 and data["plain_attention"]
    for row in data["rows"]:
        failed = {name: form["failed"] for name, form in row["forms"].items() if "failed" in form}
        if row["masked"]:  # FlashAttention-2 and our kernel without entropy take no mask
            failed.pop("FA2"), failed.pop("fae kernel", None)
        elif torch.cuda.get_device_capability() != (9, 0):
            failed.pop("fae kernel", None)
        assert not failed
        # The identity subtracts rounded means of keys; the naive form rounds its probabilities.
        for name, bound in (("fae + entropy", 1e-4), ("identity", 0.1), ("flex identity", 0.1), ("naive", 0.1)):
            assert row["forms"][name]["entropy_error_nats"] < bound
