"""Grids and positions of Infinity's aspect ratios and sizes."""

from __future__ import annotations

import pytest
import torch

from toprovar_compile.errors import OptionError
from toprovar_compile.models.infinity_schedule import GRIDS, SIZES, full_grid, infinity_schedule, rope_tables
from toprovar_compile.schedule import ScaleSchedule

CPU = torch.device("cpu")


def test_there_are_fifteen_ratios_in_four_sizes() -> None:
    assert len(GRIDS) == 15
    assert {len(grids) for grids in GRIDS.values()} == {13} == {SIZES["1M"]}
    for h_div_w, grids in GRIDS.items():
        for scales in SIZES.values():
            h, w = grids[scales - 1]
            assert h / w == pytest.approx(h_div_w, abs=0.01)
    assert infinity_schedule().total == 10521


@pytest.mark.parametrize(
    ("ratio", "last"),
    [("1:1", (64, 64)), ("16:9", (48, 84)), ("9:16", (84, 48)), (0.52, (45, 90)), (5, (111, 37)), ("2:3", (78, 52))],
)
def test_the_nearest_ratio_is_taken(ratio: str | float, last: tuple[int, int]) -> None:
    assert infinity_schedule(ratio).grids[-1] == last


@pytest.mark.parametrize("ratio", ["wide", "1:0", "0:1", -1.0, float("nan"), float("inf"), ":"])
def test_no_ratio(ratio: str | float) -> None:
    with pytest.raises(OptionError, match="aspect ratio"):
        infinity_schedule(ratio)


def test_no_size() -> None:
    with pytest.raises(OptionError, match="did you mean"):
        infinity_schedule("1:1", "0.2M")


def test_positions_of_a_scale_are_spread_over_the_full_grid() -> None:
    schedule = infinity_schedule("1:1", "0.06M")
    assert full_grid(schedule) == (64, 64)
    cos, sin = rope_tables(schedule, 8, 2, CPU)[1]
    assert cos.shape == sin.shape == (1, 1, 4, 4)
    angles = torch.tensor([[0, 0, 0, 0], [0, 0, 32, 0.32], [32, 0.32, 0, 0], [32, 0.32, 32, 0.32]])
    torch.testing.assert_close(cos[0, 0], angles.cos())
    torch.testing.assert_close(sin[0, 0], angles.sin())


@pytest.mark.parametrize("normalised", [0, 1, 2])
def test_every_scale_has_its_table(normalised: int) -> None:
    schedule = ScaleSchedule(((1, 1), (2, 3), (4, 6)))
    tables = rope_tables(schedule, 16, normalised, CPU)
    assert [tuple(cos.shape) for cos, _ in tables] == [(1, 1, n, 8) for n in schedule.tokens]
    assert rope_tables(schedule, 16, normalised, CPU) is tables
    for cos, sin in tables:
        assert torch.isfinite(cos).all() and torch.isfinite(sin).all()
        torch.testing.assert_close(cos[0, 0, 0], torch.ones(8))  # the first token is at the origin


def test_tables_made_in_inference_mode_serve_outside_of_it() -> None:
    with torch.inference_mode():
        cos, _ = rope_tables(ScaleSchedule(((1, 1), (2, 2), (5, 5))), 8, 2, CPU)[0]
    assert not cos.is_inference()
