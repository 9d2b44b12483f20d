"""benchmarks/official.py times every official model through its entry point, tried on models of two layers.

TOPROVAR_VAR_SOURCE, TOPROVAR_HART_SOURCE and TOPROVAR_INFINITY_SOURCE are the paths of checkouts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/official.py"
pytestmark = [pytest.mark.upstream, pytest.mark.slow]


@pytest.mark.parametrize("family", ["var", "hart", "infinity"])
def test_official_and_dense(family: str, tmp_path: Path) -> None:
    root = os.environ.get(f"TOPROVAR_{family.upper()}_SOURCE", "")
    if not root:
        pytest.skip(f"TOPROVAR_{family.upper()}_SOURCE is not set to a checkout")
    if family == "hart" and importlib.util.find_spec("transformers") is None:
        pytest.skip("HART's code needs transformers")
    out = tmp_path / "results.json"
    options = ["--tiny", "--device", "cpu", "--inner", "eager", "--warmup", "1", "--repeats", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), family, root, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    official, dense = json.loads(out.read_text())["rows"]
    assert (official["way"], dense["way"]) == ("official", "dense")
    assert dense["mean_difference"] < 0.05, "in bfloat16 tokens may flip"
    assert "official, batch 1:" in done.stdout
