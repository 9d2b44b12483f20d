"""`prepare` and `accelerate` on what is no official model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import toprovar_compile as tv
from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.prepare import hart, infinity


def test_the_message_says_what_was_looked_for() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        tv.prepare(nn.Linear(2, 2))
    text = str(caught.value)
    for part in (
        "Linear is of no known family",
        "class_emb",
        "context_embed",
        "text_proj_for_sos",
        "docs/new_model.md",
    ):
        assert part in text
    with pytest.raises(UnsupportedModelError, match="no known family"):
        tv.accelerate(nn.Linear(2, 2))


def test_our_own_model_is_not_taken_for_the_official_one(tiny_var: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match=r"VAR \(.*\) has .*vae_proxy, rng"):
        tv.prepare(tiny_var)


def test_wrong_arguments_are_refused_before_anything_is_done() -> None:
    with pytest.raises(OptionError, match=r"a torch\.nn\.Module"):
        tv.prepare("var_d16.pth")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'inner'"):
        tv.accelerate(nn.Linear(2, 2), iner="eager")


def test_prepare_is_a_package_and_a_function() -> None:
    from toprovar_compile.prepare import prepare

    assert callable(tv.prepare) and tv.prepare.prepare is prepare
    assert set(tv.prepare.__all__) <= set(dir(tv.prepare))


def block(**options: Any) -> SimpleNamespace:
    attn = SimpleNamespace(qkv_proj=None)
    return SimpleNamespace(**{"attn": attn, "use_cross_attn": False, "disable_aln": False} | options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": [block(use_cross_attn=True)]}, "use_cross_attn=True"),
        ({"context_token": 0}, "context_token=0"),
        ({"blocks": [block(attn=SimpleNamespace())]}, "attn_type='gpt2'"),
        ({"modules": lambda: [SimpleNamespace(use_quant=True)]}, "int8"),
        ({"patch_nums": [1]}, "fewer than two scales"),
    ],
)
def test_forms_of_hart_that_are_refused(options: dict[str, Any], reason: str) -> None:
    model = {"blocks": [block()], "context_token": 5, "patch_nums": [1, 2], "modules": list} | options
    with pytest.raises(UnsupportedModelError, match=reason):
        hart._check_supported(SimpleNamespace(**model))


def infinity_model(**options: Any) -> SimpleNamespace:
    one = SimpleNamespace(
        fused_norm_func=print, ca_norm=nn.LayerNorm(2), sa=SimpleNamespace(tau=1, cos_attn=True)
    )  # fmt: skip
    values = {
        "blocks": [one],
        "use_bit_label": 1,
        "add_lvl_embeding_only_first_block": 1,
        "rope2d_each_sa_layer": 1,
        "norm0_ve": nn.Identity(),
    }
    return SimpleNamespace(**values | options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blocks": [SimpleNamespace(fused_norm_func=None)]}, "drop `scale_ind`"),
        ({"use_bit_label": 0}, "use_bit_label=0"),
        ({"add_lvl_embeding_only_first_block": 0}, "add_lvl_embeding_only_first_block=0"),
        ({"rope2d_each_sa_layer": 0}, "rope2d_each_sa_layer=0"),
        ({"norm0_ve": nn.LayerNorm(2)}, "nm0=True"),
        ({"blocks": [SimpleNamespace(fused_norm_func=print, ca_norm=nn.RMSNorm(2))]}, "rms_norm=True"),
    ],
)
def test_forms_of_infinity_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        infinity._check_supported(infinity_model(**options))
    infinity._check_supported(infinity_model())


CALL = {
    "vae": object(),
    "vae_type": 32,
    "trunk_scale": 1000,
    "schedule": [(1, 1, 1), (1, 2, 2)],
    "layers": [0],
    "cfg_list": [3, 3],
    "tau_list": [1, 1],
}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vae": None}, "vae_type=0, or no vae"),
        ({"vae_type": 0}, "vae_type=0"),
        ({"schedule": [(2, 1, 1)]}, "more than one frame"),
        ({"schedule": []}, "or none"),
        ({"trunk_scale": 1}, "trunk_scale"),
        ({"layers": [1]}, "cfg_insertion_layer 1"),
        ({"cfg_list": [3]}, "shorter than scale_schedule"),
    ],
)
def test_calls_of_infinity_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        infinity._check_call(**CALL | options)  # type: ignore[arg-type]
    infinity._check_call(**CALL)  # type: ignore[arg-type]


def test_norms_need_no_kernel() -> None:
    class Fused(nn.Module):  # attributes as those of the official norm, which calls a CUDA extension
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    x, module = torch.randn(2, 3, 8), Fused()
    torch.testing.assert_close(hart.norm(module, x), nn.functional.rms_norm(x, (8,), module.weight, 1e-6))
    assert hart.norm(module, x.bfloat16()).dtype == torch.bfloat16
