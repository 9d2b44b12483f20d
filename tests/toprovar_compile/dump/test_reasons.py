"""The reasons told of a plan are those it was made by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from toprovar_compile import models
from toprovar_compile.dump.reasons import decided_by, describe, why
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 4, 6))


@pytest.fixture(scope="module")
def shipped() -> Plan:
    plan = models.load("emoji-var").plan
    assert plan is not None
    return plan


def test_a_pruned_layer_of_a_calibrated_plan(shipped: Plan) -> None:
    text = " ".join(why(shipped, 8, 14))
    assert "Scale 8 (24 x 24 = 576 tokens), layer 14: pruned, 224 of 576 tokens (38.9%)" in text
    assert "lowest attention entropy" in text and "last measured at scale 7" in text
    assert "R = 0.431" in text and "detail_above = 0.3" in text and "depth = 8" in text
    assert "the next bucket is 0.375 of 576 tokens, in whole tiles 224" in text
    assert "50 calibration prompts" in text
    assert [decided_by(shipped, s, layer) for s, layer in ((8, 14), (8, 0), (5, 14), (9, 14))] == [7, None, None, None]


def test_a_scale_that_is_left_out(shipped: Plan) -> None:
    text = " ".join(why(shipped, 9, 14))
    assert "not run, because the generation is left before scale 9" in text and "exit_scale = 9" in text
    assert any("Pruning starts at scale 8" in line for line in describe(shipped))


@pytest.mark.parametrize(
    ("s", "layer", "reason"), [(8, 0, "global layer and stays dense"), (5, 9, "starts at scale 8")]
)
def test_dense_layers_of_a_calibrated_plan(shipped: Plan, s: int, layer: int, reason: str) -> None:
    assert reason in " ".join(why(shipped, s, layer))


def test_a_plan_edited_since_is_not_explained_by_its_policy(shipped: Plan) -> None:
    edited = replace(shipped, scales=(*shipped.scales[:8], shipped.scales[7], shipped.scales[9]))
    assert "made by toprovar with" in " ".join(why(edited, 8, 14))


def test_other_plans() -> None:
    by_share = Plan.keep_share(SCHEDULE, 2, 0.5, 2, bucket=2, restore="identity", score="random", unguided_from=3)
    text = " ".join(why(by_share, 3, 1))
    assert "18 of 36" in text and "a seeded random order" in text and "restore = identity" in text
    assert any("From scale 3 on guidance is off" in line for line in describe(by_share))
    skipped = Plan.keep_share(SCHEDULE, 2, 0.0, 3)
    assert "skipped, no token is computed" in why(skipped, 3, 0)[0]
    assert "made by hand" in " ".join(why(Plan.dense(SCHEDULE, 2), 3, 0))
