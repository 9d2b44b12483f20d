"""Random layers are pruned rightly or refused by name (benchmarks/fuzz_passes.py runs many more of them)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_passes.py"
LAYERS = 60  # as many again for the seeds of the script


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_passes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = _load()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Nothing is compiled here."""


@st.composite
def layers(draw: st.DrawFn) -> Any:
    return fuzz.make_layer(lambda options: draw(st.sampled_from(options)))


@settings(
    max_examples=LAYERS,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(layer=layers(), open_batch=st.booleans())
def test_a_random_layer_is_pruned_rightly_or_refused_by_name(layer: Any, open_batch: bool) -> None:
    verdict = fuzz.check(layer, open_batch=open_batch)
    assert not verdict.wrong, f"{verdict.kind}: {verdict.detail}"


def test_seeds_of_the_script() -> None:
    kinds: dict[str, int] = {}
    for seed in range(LAYERS):
        layer, verdict = fuzz.check_seed(seed)
        assert not verdict.wrong, f"seed {seed}, {layer}: {verdict}"
        kinds[verdict.kind] = kinds.get(verdict.kind, 0) + 1
    assert kinds["pruned"] > LAYERS / 8 and kinds["refused"] > LAYERS / 4, kinds


ALIKE = ("causal mask", "mask over tokens")  # masked attention to the kept tokens is what it is of all
EVEN = ("pooled keys", "convolution of a grid", "two neighbours", "resized")  # of even numbers of tokens alone


@pytest.mark.parametrize("name", [name for name in fuzz.TRAPS if name not in ALIKE + EVEN])
def test_every_trap_mixes_tokens(name: str) -> None:
    """A trap that does not would prove nothing when it is refused."""
    layer = fuzz.Layer((("trap", name),))
    probe = fuzz.Given(fuzz.INPUTS)
    layer(probe, fuzz.STREAM)
    try:
        different = fuzz._alike(layer, probe.used, fuzz._some_tokens(4, 4), None)
    except (IndexError, RuntimeError):  # an index of a token that is not there
        return
    assert different


def test_an_unsound_proof_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rule that lets flips pass, the check says so."""
    aten = torch.ops.aten
    rules = dict(fuzz.prove_token_axis.__globals__["RULES"])
    rules[aten.flip.default] = rules[aten.clone.default]
    monkeypatch.setitem(fuzz.prove_token_axis.__globals__, "RULES", rules)
    verdict = fuzz.check(fuzz.Layer((("scramble", (("flip", 1, 0),), "rightly"),)))
    assert verdict.kind == "unsound" and "attention masked" in verdict.detail


def test_a_layer_is_the_same_for_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz.check_seed(7) == fuzz.check_seed(7)
    out = tmp_path / "fuzz.json"
    for graphs in ("2", "3"):
        monkeypatch.setattr(sys, "argv", ["fuzz_passes.py", "--graphs", graphs, "--out", str(out)])
        assert fuzz.main() == 0
    assert '"next_seed": 3' in out.read_text()


@pytest.fixture(scope="module", autouse=True)
def _forget_the_script() -> Iterator[None]:
    yield
    sys.modules.pop("fuzz_passes", None)
