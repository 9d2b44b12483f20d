from pathlib import Path

import pytest

from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.plan import Plan
from toprovar_compile.plan_spec import parse_plan, plan_for
from toprovar_compile.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 4, 8))
DENSE = Plan.dense(SCHEDULE, 3)


def test_words_and_files(tmp_path: Path) -> None:
    assert parse_plan("dense", SCHEDULE, 3) == DENSE
    shipped = Plan.keep_share(SCHEDULE, 3, 0.5, 3)
    assert parse_plan("auto", SCHEDULE, 3, shipped) is shipped
    shipped.save(tmp_path / "plan.json")
    assert parse_plan(str(tmp_path / "plan.json"), SCHEDULE, 3) == shipped


def test_a_description_is_keep_share() -> None:
    text = "keep=0.25, from=2, layers=1-2, exit=3, bucket=2, restore=identity"
    expected = Plan.keep_share(SCHEDULE, 3, 0.25, 2, [1, 2], 2, exit_scale=3, restore="identity")
    assert parse_plan(text, SCHEDULE, 3) == expected


def test_one_share_for_each_scale() -> None:
    assert parse_plan("keep=0.5/0.25,from=2", SCHEDULE, 3) == Plan.keep_share(SCHEDULE, 3, {2: 0.5, 3: 0.25}, 2)


def test_scores_and_the_end_of_guidance() -> None:
    plan = parse_plan("keep=0.5,from=2,score=random,seed=3,unguided=3", SCHEDULE, 3)
    assert plan == Plan.keep_share(SCHEDULE, 3, 0.5, 2, score="random", seed=3, unguided_from=3)
    assert [plan.guided(s) for s in range(4)] == [True, True, True, False]


def test_only_an_exit() -> None:
    plan = parse_plan("exit=3", SCHEDULE, 3)
    assert plan.exit_scale == 3
    assert plan.token_share() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("densse", "did you mean 'dense'"),
        ("nothing.json", "there is no plan"),
        ("kep=0.5", "did you mean 'keep'"),
        ("keep=", "KEY=VALUE"),
        ("keep=half,from=2", "cannot read"),
        ("layers=a-b", "cannot read"),
        ("auto", "no plan of its own"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_plan(text, SCHEDULE, 3)


def test_values_out_of_range_are_plan_errors() -> None:
    with pytest.raises(PlanError, match=r"number in 0\.\.1"):
        parse_plan("keep=2,from=2", SCHEDULE, 3)
    with pytest.raises(PlanError, match="restore"):
        parse_plan("keep=0.5,from=2,restore=cachd", SCHEDULE, 3)


def test_a_plan_for_a_shipped_model_is_checked() -> None:
    from toprovar_compile import models

    model = models.load("emoji-var")
    assert plan_for("dense", model).is_dense
    with pytest.raises(PlanError, match="has not run dense before"):
        plan_for("keep=0,from=0", model)
