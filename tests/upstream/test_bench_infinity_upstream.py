"""The Infinity benchmark runs the official code and FastVAR's with our weights: same draws, same bits.

TOPROVAR_INFINITY_SOURCE and TOPROVAR_FASTVAR_SOURCE are the paths of checkouts of the two repositories.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from toprovar_compile.bench import infinity as bench_infinity
from toprovar_compile.bench.infinity import Settings, tiny

ROOTS = {
    "official": os.environ.get("TOPROVAR_INFINITY_SOURCE", ""),
    "fastvar": os.environ.get("TOPROVAR_FASTVAR_SOURCE", ""),
}
pytestmark = pytest.mark.upstream


@pytest.mark.parametrize("way", ["official", "fastvar"])
@pytest.mark.parametrize("patchify", [False, True])
def test_the_code_draws_the_bits_that_our_model_draws(
    way: str, patchify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ROOTS[way]:
        pytest.skip(f"no checkout for {way}")
    cfg = bench_infinity.TINY
    vae = replace(cfg.vae, ch_mult=(1, 1, 2) if patchify else cfg.vae.ch_mult)
    monkeypatch.setitem(bench_infinity.MODELS, "tiny", replace(cfg, spatial_patchify=patchify, vae=vae))
    settings = tiny(Settings(ways=(way,), **{way: ROOTS[way]}))
    path = bench_infinity.run(settings, tmp_path, log=lambda text: None)
    (entry,) = json.loads(path.read_text())["ways"]
    assert len(entry["scale_ms"]) == 7
    assert max(entry["bit_flips"]) < 0.001  # float32, other kernels: next to equal probabilities may be drawn apart
