"""FastVAR's ranking and SkipVAR's features against the functions of the official repositories.

Environment variables give the paths of checkouts of csguoh/FastVAR and fakerone-li/SkipVAR.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toprovar_compile.policies.fastvar import FastVarPolicy, fastvar_plan
from toprovar_compile.policies.frequency import frequency_features
from toprovar_compile.policies.selection import kept_tokens
from toprovar_compile.policies.tokens import resize_tokens
from toprovar_compile.schedule import ScaleSchedule

FASTVAR = os.environ.get("TOPROVAR_UPSTREAM_FASTVAR", "")
SKIPVAR = os.environ.get("TOPROVAR_UPSTREAM_SKIPVAR", "")
pytestmark = pytest.mark.upstream


@pytest.mark.skipif(not FASTVAR, reason="TOPROVAR_UPSTREAM_FASTVAR is not set to a checkout of csguoh/FastVAR")
@pytest.mark.parametrize(("s", "side"), [(9, 32), (10, 40)])
def test_fastvar_keeps_and_restores_the_same_tokens(s: int, side: int) -> None:
    path = Path(FASTVAR) / "Infinity/infinity/models/fastvar_utils.py"
    spec = importlib.util.spec_from_file_location("fastvar_utils", path)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    generator = torch.Generator().manual_seed(0)
    x, cached = torch.randn(2, side**2, 8, generator=generator), torch.randn(2, 576, 8, generator=generator)
    merge, unmerge, indices = official.compute_merge(x, is_later_layer=True, x_shape=(1, side, side))
    schedule = ScaleSchedule.from_patch_nums((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
    plan = fastvar_plan(FastVarPolicy.like_published(schedule, 32), 32)
    keep = plan.action(s, 10).keep
    assert keep is not None
    ours = kept_tokens(plan, s, 10, keep, x, None)
    assert torch.equal(ours, indices()[..., 0].sort(dim=1).values)
    values = merge(x) * 2
    rows = ours.unsqueeze(-1).expand(-1, -1, 8)
    restored = resize_tokens(cached, (24, 24), (side, side)).scatter(1, rows, x.gather(1, rows) * 2)
    torch.testing.assert_close(restored, unmerge(values, cached, (24, 24)))


@pytest.mark.skipif(not SKIPVAR, reason="TOPROVAR_UPSTREAM_SKIPVAR is not set to a checkout of fakerone-li/SkipVAR")
def test_skipvar_features() -> None:
    tree = ast.parse((Path(SKIPVAR) / "infinity/models/infinity.py").read_text())
    wanted = ("extract_high_freq_sobel", "extract_high_freq_ratio_fft_circle")
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in wanted]
    official: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module(body=list(found), type_ignores=[]), "skipvar", "exec"), official)
    before, after = torch.rand(2, 1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sobel, ratio = (official[name] for name in wanted)
    change = F.l1_loss(sobel(after), sobel(before))
    ours = frequency_features(before, after)[0]
    torch.testing.assert_close(ours[0], change)
    torch.testing.assert_close(ours[1], ratio(after, freq_ratio=0.4)[0, 0])
