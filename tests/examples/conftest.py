"""The training scripts, importable for the tests that name them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "train_emoji"


@pytest.fixture(scope="module")
def scripts(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The modules of examples/train_emoji that the test module lists in SCRIPTS, by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in request.module.SCRIPTS})
    finally:
        sys.path.remove(str(FOLDER))
        for name in request.module.SCRIPTS:
            sys.modules.pop(name, None)
