"""What tests of several kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture
def interpret() -> Callable[[str | Path], str]:
    """Runs a script whose Triton kernels are interpreted on the CPU, and returns what it printed.

    Triton must be told so before it is imported, hence a process of its own.
    """
    if find_spec("triton") is None:
        pytest.skip("needs the triton package")

    def run(script: str | Path) -> str:
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, env=env, timeout=300, check=False
        )
        if "only 0-dimensional arrays can be converted" in done.stderr:
            pytest.skip("this Triton's interpreter cannot loop with this NumPy (2.4 or later)")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
