"""Options: what is accepted, and what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from toprovar_compile.errors import OptionError
from toprovar_compile.options import Options
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule


def test_defaults() -> None:
    options = Options.parse(None)
    assert (options.plan, options.inner, options.dump) == ("auto", "inductor", None)
    assert options.thresholds() == {}
    assert Options.parse({}) == options


def test_every_option() -> None:
    plan = Plan.dense(ScaleSchedule.from_patch_nums((1, 2)), 1)
    given: dict[str, Any] = {
        "plan": plan,
        "tau": 0.5,
        "crossing": "falling",
        "beta": 2.0,
        "alpha_min": 0.1,
        "alpha_max": 0.9,
        "buckets": (0.25, 0.5),
        "restore": "identity",
        "selection": "gumbel",
        "direction": "high_entropy",
        "inner": "eager",
        "dump": Path("graphs"),
    }
    options = Options.parse(given)
    assert {name: getattr(options, name) for name in given} == given
    chosen = {name: value for name, value in given.items() if name not in ("plan", "inner", "dump")}
    assert options.thresholds() == chosen
    assert set(given) == set(Options.model_fields), "an option without a test"


def test_a_plan_may_be_a_path_of_either_kind() -> None:
    for path in ("plan.json", Path("plan.json")):
        assert Options.parse({"plan": path}).plan == path


@pytest.mark.parametrize(
    ("key", "close"),
    [("plam", "plan"), ("alpha_mim", "alpha_min"), ("bucket", "buckets"), ("selct", "selection"), ("Dump", "dump")],
)
def test_unknown_key_names_the_nearest(key: str, close: str) -> None:
    with pytest.raises(OptionError, match=rf"unknown option '{key}'.*expected one of plan, .*did you mean '{close}'\?"):
        Options.parse({key: 1})


def test_unknown_key_like_none() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'xyzzy'.*; remove it"):
        Options.parse({"xyzzy": 1})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"plan": 3}, "plan"),
        ({"tau": "high"}, "tau"),
        ({"tau": True}, "tau"),
        ({"crossing": "up"}, "crossing"),
        ({"restore": "nothing"}, "restore"),
        ({"selection": "best"}, "selection"),
        ({"direction": "low"}, "direction"),
        ({"inner": "Inductor"}, "inner"),
        ({"buckets": 0.5}, "buckets"),
        ({"dump": 1}, "dump"),
    ],
)
def test_value_of_the_wrong_kind(values: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match=rf"option '{name}' is .*expected"):
        Options.parse(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 1.5}, "tau is 1.5"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"alpha_max": -0.1}, "alpha_max is -0.1"),
        ({"buckets": [0.5, 2.0]}, "buckets"),
    ],
)
def test_value_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse(values)


def test_dump_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPROVAR_DUMP", "somewhere")
    assert Options.parse(None).dump == "somewhere"
    assert Options.parse({"dump": "elsewhere"}).dump == "elsewhere"
    monkeypatch.setenv("TOPROVAR_DUMP", "")
    assert Options.parse(None).dump is None


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Options.parse(None).tau = 0.5  # type: ignore[misc]
