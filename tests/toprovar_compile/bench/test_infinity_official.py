from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toprovar_compile.bench import infinity_official
from toprovar_compile.errors import OptionError


@pytest.mark.parametrize("below", ["", "Infinity"])
def test_the_package_is_importable_inside_only(tmp_path: Path, below: str) -> None:
    package = tmp_path / below / "infinity" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("import flash_attn, einops\nfrom timm.models.layers import DropPath\n")
    path, limit = list(sys.path), torch._dynamo.config.recompile_limit
    with infinity_official.imported(tmp_path):
        assert importlib.import_module("infinity.models").DropPath
        assert torch._dynamo.config.recompile_limit == 64
    assert "infinity" not in sys.modules and "infinity.models" not in sys.modules
    assert importlib.util.find_spec("timm") is not None or "timm" not in sys.modules
    assert (sys.path, torch._dynamo.config.recompile_limit) == (path, limit)


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no package `infinity`"), infinity_official.imported(tmp_path):
        pass


def test_variable_length_attention_keeps_prompts_apart() -> None:
    g = torch.Generator().manual_seed(0)
    q, kv = torch.randn(6, 2, 8, generator=g), torch.randn(5, 2, 2, 8, generator=g)
    lengths_q, lengths_k = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 4, 5], dtype=torch.int32)
    out = infinity_official._flash_attn_varlen_kvpacked_func(q, kv, lengths_q, lengths_k, 3, 4, softmax_scale=0.5)
    for rows, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 6), slice(4, 5))):
        k, v = kv[keys].permute(1, 2, 0, 3)
        want = F.scaled_dot_product_attention(q[rows].transpose(0, 1), k, v, scale=0.5).transpose(0, 1)
        torch.testing.assert_close(out[rows], want)


def test_rearrangements() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(infinity_official._rearrange(x, "b d ... -> b ... d"), x.permute(0, 2, 3, 1))
    assert torch.equal(infinity_official._rearrange(x, "b ... d -> b d ..."), x.permute(0, 3, 1, 2))
    packed, shapes = infinity_official._pack([x], "b * d")
    assert packed.shape == (2, 12, 5)
    assert torch.equal(infinity_official._unpack(packed, shapes, "b * d")[0], x)
    split = infinity_official._rearrange(packed, "b n (c d) -> b n c d", c=1)
    assert torch.equal(infinity_official._rearrange(split, "b n c d -> b n (c d)"), packed)
    assert torch.equal(infinity_official._unpack(split, shapes, "b * c d")[0].squeeze(-2), x)


def test_weights_are_copied_by_name() -> None:
    ours, theirs = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    infinity_official._copy(theirs, ours, lambda name: name)
    assert torch.equal(theirs[0].weight, ours[0].weight)
    with pytest.raises(OptionError, match=r"parameter 0\.weight, which our model has not"):
        infinity_official._copy(theirs, ours, lambda name: "x" + name)


def test_parameters_are_not_initialised_and_the_functions_come_back() -> None:
    original = nn.init.kaiming_uniform_
    with infinity_official._without_init():
        zero = nn.init.constant_(torch.zeros(3), 5.0)
        nn.Linear(4, 4)
    assert torch.equal(zero, torch.zeros(3))
    assert nn.init.kaiming_uniform_ is original
