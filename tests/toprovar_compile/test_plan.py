"""Plans: what they say about a run, and their files with every error path."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import toprovar_compile
from toprovar_compile.errors import PlanError
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 4, 8))


def _prune(keep: int) -> LayerAction:
    return LayerAction("prune", keep)


def _plan(*scales: Any, **fields: Any) -> Plan:
    """Each scale: a tuple of actions, or None for an exit."""
    rows = tuple(ScalePlan(False) if actions is None else ScalePlan(layers=actions) for actions in scales)
    return Plan(SCHEDULE, 2, rows, **fields)


MIXED = _plan((DENSE, DENSE), (DENSE, DENSE), (DENSE, _prune(6)), (SKIP, _prune(16)))


# actions


def test_actions() -> None:
    assert [str(a) for a in (DENSE, SKIP, _prune(5))] == ["dense", "skip", "prune 5"]
    assert [a.tokens(9) for a in (DENSE, SKIP, _prune(5))] == [9, 0, 5]
    assert LayerAction("dense", 4) == DENSE


@pytest.mark.parametrize("keep", [None, 0, -3, 2.0, True, "4"])
def test_prune_needs_a_count(keep: Any) -> None:
    with pytest.raises(PlanError, match="keep is"):
        LayerAction("prune", keep)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean 'prune'"):
        LayerAction("prun", 3)  # type: ignore[arg-type]


# construction


@pytest.mark.parametrize(
    ("scales", "match"),
    [
        (((DENSE,) * 2,) * 3, "3 scales"),
        (((DENSE,) * 2,) * 3 + ((DENSE,) * 3,), "3 layer actions"),
        (((DENSE,) * 2,) * 3 + ((DENSE, _prune(64)),), "keeps 64 tokens at scale 3"),
        (((DENSE, _prune(1)),) + ((DENSE,) * 2,) * 3, "keeps 1 tokens at scale 0"),
        ((None,) * 4, "scale 0 exits"),
        (((DENSE,) * 2, None, (DENSE,) * 2, None), "after the exit"),
    ],
)
def test_scales_must_fit(scales: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        _plan(*scales)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("restore", "cache"),
        ("selection", None),
        ("direction", ["low_entropy"]),
        ("normalisation", "mean"),
        ("seed", 1.0),
        ("seed", True),
        ("alpha_min", -0.1),
        ("alpha_max", "1"),
        ("alpha_max", math.nan),
        ("region_share", 2),
        ("layer_scores", (0.5,)),
        ("layer_scores", (0.5, 1.5)),
        ("num_layers", 0),
        ("num_layers", "2"),
        ("version", 2),
        ("version", True),
        ("version", 1.0),
        ("provenance", [1]),
    ],
)
def test_fields_are_validated(field: str, value: Any) -> None:
    with pytest.raises(PlanError, match=field):
        dataclasses.replace(MIXED, **{field: value})


def test_dense() -> None:
    plan = Plan.dense(SCHEDULE, 2, "abc")
    assert plan.is_dense and plan.model == "abc"
    assert plan.token_share() == [1.0] * 4 and plan.total_share() == 1.0
    assert not plan.reads_entropy() and not plan.keeps_delta() and plan.exit_scale is None
    with pytest.raises(PlanError, match="num_layers"):
        Plan.dense(SCHEDULE, 0)


def test_keep_share() -> None:
    plan = Plan.keep_share(SCHEDULE, 3, 0.3, 2, layers=[0, 2], bucket=4)
    assert [str(a) for a in plan.scales[2].layers] == ["prune 8", "dense", "prune 8"]
    assert [str(a) for a in plan.scales[3].layers] == ["prune 20", "dense", "prune 20"]
    assert plan.scales[1].layers == (DENSE,) * 3


def test_keep_share_by_scale() -> None:
    plan = Plan.keep_share(SCHEDULE, 1, {2: 0, 3: 0.99}, 0, exit_scale=None)
    assert [str(s.layers[0]) for s in plan.scales] == ["dense", "dense", "skip", "dense"]
    assert plan.provenance["keep"] == {"2": 0, "3": 0.99}


def test_keep_share_is_free_of_float_noise() -> None:
    schedule = ScaleSchedule(((1, 1), (5, 6)))
    assert Plan.keep_share(schedule, 1, 0.1, 1, bucket=1).scales[1].layers[0] == _prune(3)


def test_keep_share_with_exit() -> None:
    plan = Plan.keep_share(SCHEDULE, 2, 0.5, 2, exit_scale=3)
    assert plan.exit_scale == 3 and plan.runs(2) and not plan.runs(3)
    assert plan.token_share()[3] == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"keep": 1.5}, "keep of scale 0"),
        ({"keep": math.nan}, "keep of scale 0"),
        ({"keep": "half"}, "keep of scale 0"),
        ({"keep": {4: 0.5}}, "keep names 4"),
        ({"keep": {3: -1}}, "keep of scale 3"),
        ({"from_scale": 5}, "from_scale names 5"),
        ({"from_scale": 1.0}, "from_scale"),
        ({"layers": [2]}, "layers names 2"),
        ({"exit_scale": -1}, "exit_scale"),
        ({"exit_scale": 0}, "scale 0 exits"),
        ({"bucket": 0}, "bucket"),
    ],
)
def test_keep_share_validates(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        Plan.keep_share(**({"schedule": SCHEDULE, "num_layers": 2, "keep": 0.5, "from_scale": 2} | changes))


# what follows from a plan


def test_shares() -> None:
    assert MIXED.token_share() == [1.0, 1.0, (16 + 6) / 32, 16 / 128]
    assert MIXED.total_share() == pytest.approx((2 + 8 + 22 + 16) / (2 * 85))


def test_reads_entropy_back_to_the_last_dense_scale() -> None:
    assert MIXED.reads_entropy() == {(1, 1), (2, 1)}


def test_reads_entropy_passes_over_skips() -> None:
    plan = _plan((DENSE, DENSE), (DENSE, DENSE), (DENSE, SKIP), (DENSE, _prune(3)))
    assert plan.reads_entropy() == {(1, 1)}
    assert plan.keeps_delta() == {(1, 1)}


def test_keeps_delta() -> None:
    assert MIXED.keeps_delta() == {(1, 1), (2, 0)}
    assert not dataclasses.replace(MIXED, restore="identity").keeps_delta()


def test_action() -> None:
    assert MIXED.action(3, 0) == SKIP
    exits = _plan((DENSE,) * 2, (DENSE,) * 2, None, None)
    for plan, s, layer in ((MIXED, 3, 2), (MIXED, 3, -1), (exits, 2, 0)):
        with pytest.raises(PlanError, match="no action"):
            plan.action(s, layer)
    for s in (-1, 4):
        with pytest.raises(PlanError, match="no scale"):
            MIXED.runs(s)


@pytest.mark.parametrize(
    ("action", "restore", "match"),
    [(_prune(2), "cached", "an entropy"), (_prune(2), "identity", "an entropy"), (SKIP, "cached", "a delta")],
)
def test_what_pruning_needs_must_exist(action: LayerAction, restore: Any, match: str) -> None:
    plan = Plan(
        ScaleSchedule.from_patch_nums((2, 4)),
        1,
        (ScalePlan(layers=(action,)), ScalePlan(layers=(DENSE,))),
        restore=restore,
    )
    with pytest.raises(PlanError, match=match):
        plan.validate_first()


def test_skips_without_a_dense_scale_are_fine_under_identity() -> None:
    _plan((SKIP, DENSE), (SKIP, DENSE), (SKIP, DENSE), (SKIP, DENSE), restore="identity").validate_first()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("abd", SCHEDULE, 2), "made for model abc, the model has abd"),
        (("abc", SCHEDULE, 3), "num_layers 2"),
        (("abc", ScaleSchedule.from_patch_nums((1, 2, 4, 9)), 2), "schedule"),
    ],
)
def test_check_model(args: Any, match: str) -> None:
    plan = dataclasses.replace(MIXED, model="abc")
    plan.check_model("abc", SCHEDULE, 2)
    MIXED.check_model("anything", SCHEDULE, 2)
    with pytest.raises(PlanError, match=match):
        plan.check_model(*args)


def test_digest_names_what_a_plan_does() -> None:
    assert len(MIXED.digest()) == 16
    same = [
        dataclasses.replace(MIXED, provenance={"made_by": "hand"}),
        dataclasses.replace(MIXED, alpha_min=0, alpha_max=1, region_share=0),
        Plan.from_json(MIXED.to_json()),
    ]
    for plan in same:
        assert plan == MIXED and hash(plan) == hash(MIXED) and plan.digest() == MIXED.digest()
    other: list[dict[str, Any]] = [
        {"restore": "identity"},
        {"seed": 1},
        {"model": "abc"},
        {"layer_scores": (1, 1)},
        {"region_share": 0.1},
        {"normalisation": "literal"},
        {"scales": (*MIXED.scales[:3], ScalePlan(layers=(SKIP, _prune(17))))},
    ]
    assert len({MIXED.digest(), *(dataclasses.replace(MIXED, **change).digest() for change in other)}) == 8


# files


FULL = dataclasses.replace(
    MIXED,
    model="abc",
    restore="identity",
    selection="gumbel",
    seed=7,
    direction="high_entropy",
    alpha_min=0.1,
    alpha_max=0.9,
    normalisation="literal",
    layer_scores=(0.25, 1.0),
    region_share=0.05,
    provenance={"made_by": "hand", "note": "ä", "numbers": [[1.5] * 50, [2]], "nothing": None, "none": {}},
)


@pytest.mark.parametrize("plan", [MIXED, FULL, _plan((DENSE,) * 2, (DENSE,) * 2, None, None)])
def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.provenance == plan.provenance
    assert json.loads((tmp_path / "plan.json").read_text()) == plan.to_json()


def test_file_is_short_and_readable(tmp_path: Path) -> None:
    Plan.keep_share(SCHEDULE, 32, 0.5, 3, layers=range(3, 28), bucket=1).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '{"run": true, "layers": ["dense*3", "prune 32*25", "dense*4"]}' in text
    assert len(text.splitlines()) < 40 and text.endswith("}\n")


def test_fields_that_are_left_out_have_their_defaults() -> None:
    data = MIXED.to_json()
    for key in ("restore", "selection", "seed", "direction", "alpha_min", "alpha_max", "normalisation", "provenance"):
        del data[key]
    assert Plan.from_json(data) == MIXED
    data["scales"][0] = {"layers": ["dense", " dense * 1 "]}
    assert Plan.from_json(data) == MIXED


def _changed(**changes: Any) -> dict[str, Any]:
    return MIXED.to_json() | changes


def _scale(s: int, value: Any) -> dict[str, Any]:
    data = MIXED.to_json()
    data["scales"][s] = value
    return data


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "plan"),
        (None, "NoneType"),
        (_changed(restor="cached"), "unknown key 'restor'.*did you mean 'restore'"),
        (_changed(zzz=1), "unknown key 'zzz'.*remove it"),
        ({"version": 1}, "the key 'model' is missing"),
        (_changed(version=9, new_key=1), "version 9"),
        (_changed(schedule=[[1, 1], [0, 2]]), r"schedule, grids\[1\]"),
        (_changed(schedule={"grid": []}), "schedule"),
        (_changed(scales={}), "scales"),
        (_changed(scales=[]), "0 scales"),
        (_changed(layer_scores=1.0), "layer_scores"),
        (_changed(layer_scores=[1.0, "x"]), r"layer_scores\[1\]"),
        (_changed(num_layers=None), "num_layers"),
        (_changed(model=None), "model"),
        (_changed(provenance=[]), "provenance"),
        (_scale(1, []), r"scales\[1\]"),
        (_scale(1, {"run": 1}), r"scales\[1\].run"),
        (_scale(1, {"run": True}), r"scales\[1\].layers"),
        (_scale(1, {"layer": []}), "did you mean 'layers'"),
        (_scale(1, {"layers": "dense"}), r"scales\[1\].layers"),
        (_scale(1, {"layers": ["dense", 3]}), r"layers\[1\]"),
        (_scale(1, {"layers": ["dense*0", "dense*2"]}), r"layers\[0\]"),
        (_scale(1, {"layers": ["dense*99999999999"]}), r"layers\[0\]"),
        (_scale(1, {"layers": ["dense 3", "dense"]}), "dense has a count"),
        (_scale(1, {"layers": ["prune", "dense"]}), r"layers\[0\]"),
        (_scale(1, {"layers": ["prune 0", "dense"]}), "at least 1"),
        (_scale(1, {"layers": ["prune -1", "dense"]}), "cannot read"),
        (_scale(1, {"layers": ["dence", "dense"]}), "did you mean 'dense'"),
        (_scale(1, {"layers": ["dense*3"]}), "3 layer actions"),
        (_scale(2, {"run": False}), "after the exit"),
    ],
)
def test_damaged_files_name_file_and_field(data: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=match) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_files_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match="not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="cannot write the plan"):
        MIXED.save(tmp_path / "no" / "plan.json")


@pytest.mark.parametrize("provenance", [{"x": {1, 2}}, {"x": math.nan}, {"x": [math.inf]}])
def test_provenance_must_be_json(provenance: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="provenance"):
        dataclasses.replace(MIXED, provenance=provenance).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    MIXED.save(path)

    def fail(*_: Any) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(PlanError, match="no space left"):
            FULL.save(path)
    assert Plan.load(path) == MIXED
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    FULL.save(path)
    assert Plan.load(path) == FULL


def test_package_exports_it() -> None:
    assert toprovar_compile.Plan is Plan
