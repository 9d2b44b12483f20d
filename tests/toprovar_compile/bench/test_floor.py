from __future__ import annotations

import pytest

from toprovar_compile.bench.floor import Rates, decoder_flops, scale_floors
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import INFINITY_2B
from toprovar_compile.models.infinity_schedule import infinity_schedule
from toprovar_compile.plan import Plan

SCHEDULE = infinity_schedule()


def total(plan: Plan | None) -> float:
    return sum(f.ms for f in scale_floors(INFINITY_2B, SCHEDULE, plan, Rates()))


def test_infinity_2b_dense() -> None:
    floors = scale_floors(INFINITY_2B, SCHEDULE, None, Rates(tflops=600, tbytes=3))
    linear, attention = sum(f.linear_flops for f in floors), sum(f.attention_flops for f in floors)
    n = SCHEDULE.total
    assert linear == pytest.approx(2 * n * 32 * 28 * 2048**2, rel=0.01)  # 14 C^2 products a token, layer and row
    assert 35e12 < attention < 37e12
    # the first scale reads the weights of the layers, 1.9 billion in two bytes, and computes next to nothing
    assert floors[0].ms == pytest.approx(32 * 14 * 2048**2 * 2 / 3e9, rel=0.01)
    # the last is arithmetic
    assert floors[-1].ms == pytest.approx((floors[-1].linear_flops + floors[-1].attention_flops) / 600e9)


def test_a_dense_plan_costs_what_no_plan_does_and_pruning_costs_less() -> None:
    dense = total(None)
    assert total(Plan.dense(SCHEDULE, 32)) == dense
    kept = total(Plan.keep_share(SCHEDULE, 32, 0.25, 9))
    assert 0.25 * dense < kept < 0.35 * dense
    assert len(scale_floors(INFINITY_2B, SCHEDULE, Plan.keep_share(SCHEDULE, 32, 1.0, 9, exit_scale=11), Rates())) == 11


def test_decoder_convolutions_are_counted() -> None:
    tiny = BSQVAEConfig(codebook_dim=4, ch=32, ch_mult=(1,), num_res_blocks=0)
    # conv_in, four convolutions in the middle and two in the one block, conv_out; 3x3 taps
    per_pixel = 2 * 9 * (4 * 32 + 4 * 32 * 32 + 2 * 32 * 32 + 32 * 3)
    assert decoder_flops(tiny, (2, 3)) == 6 * per_pixel
    assert decoder_flops(INFINITY_2B.vae, (64, 64)) == pytest.approx(9.85e12, rel=0.01)
