"""FastVAR as a policy: its published counts, and its semantics against a plain eager statement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR
from toprovar_compile.policies.fastvar import FastVarPolicy, fastvar_plan
from toprovar_compile.reference import pruned
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import current_session

INFINITY = ScaleSchedule.from_patch_nums((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
LABELS = torch.tensor([2, 7, 9])


def test_published_settings_of_infinity() -> None:
    plan = fastvar_plan(FastVarPolicy.like_published(INFINITY, 32), 32)
    assert [plan.action(9, i).kind for i in (2, 3, 27, 28)] == ["dense", "prune", "prune", "dense"]
    assert plan.action(9, 10).keep == 1024 - int(1024 * 0.4) and plan.action(10, 10).keep == 800
    assert plan.exit_scale == 11 and plan.action(8, 10).kind == "dense"
    assert plan.keeps_delta() == {(8, i) for i in range(3, 28)}  # the 24x24 scale
    assert plan.reads_entropy() == frozenset() and plan.score == "mean_distance"


def test_kept_counts_fill_buckets() -> None:
    policy = FastVarPolicy.like_published(INFINITY, 32, bucket=16)
    assert policy.keep_count(9, 10) == 624 and policy.keep_count(10, 10) == 800


def test_errors() -> None:
    with pytest.raises(OptionError, match="at least 6"):
        FastVarPolicy.like_published(ScaleSchedule.from_patch_nums((1, 2, 4, 8, 16)), 8)
    with pytest.raises(OptionError, match="shares below 1"):
        FastVarPolicy(INFINITY, {0: 0.5}, range(4))
    with pytest.raises(OptionError, match="bucket"):
        FastVarPolicy(INFINITY, {4: 0.5}, range(4), bucket=0)


class _Plain:
    """The method, stated plainly: blocks of one model replaced by a function that prunes at given scales."""

    def __init__(self, model: VAR, ratios: dict[int, float], layers: range, reference: int) -> None:
        self.model, self.ratios, self.layers, self.reference = model, ratios, layers, reference
        self.cache: dict[int, Tensor] = {}
        self.outputs: list[Tensor] = []

    def block(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, mod: Tensor, k_cache: Tensor | None, v_cache: Tensor | None) -> Any:
            session = current_session()
            assert session is not None
            s = session.scale
            (b, n, c), side = x.shape, self.model.cfg.patch_nums[s]
            if s not in self.ratios or layer not in self.layers:
                y, k, v = forward(x, mod, k_cache, v_cache)
                if s == self.reference:
                    self.cache[layer] = y - x
            else:
                mean = F.adaptive_avg_pool2d(x.view(b, side, side, c).permute(0, 3, 1, 2), 1).view(b, 1, c)
                order = ((x - mean) ** 2).sum(-1, keepdim=True).argsort(dim=1, descending=True)
                # Ascending, so that keys lie in the cache in the order in which the other implementation has them.
                kept = order[:, : n - int(n * self.ratios[s])].sort(dim=1).values.repeat(1, 1, c)
                y, k, v = forward(x.gather(1, kept), mod, k_cache, v_cache)
                old = self.model.cfg.patch_nums[self.reference]
                maps = self.cache[layer].view(b, old, old, c).permute(0, 3, 1, 2)
                base = F.interpolate(maps, size=(side, side), mode="area").permute(0, 2, 3, 1).reshape(b, n, c)
                y = x + base.scatter(1, kept, y - x.gather(1, kept))
            self.outputs.append(y)
            return y, k, v

        return run


def test_plain_statement(make_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_var(depth=4, patch_nums=(1, 2, 3, 4, 5, 6))
    policy = FastVarPolicy(model.schedule, {3: 0.4, 4: 0.5}, range(1, 3), exit_scale=5)
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: outputs.append(out[0])) for b in model.blocks]
    with pruned(model, fastvar_plan(policy, 4, model.fingerprint())) as trace:
        image = model(LABELS, seed=3)
    for handle in handles:
        handle.remove()
    assert trace.tokens[3, 1] == 16 - 6 and trace.tokens[4, 2] == 25 - 12 and not trace.entropy
    plain = _Plain(model, {3: 0.4, 4: 0.5}, range(1, 3), 2)
    with monkeypatch.context() as patch:
        for layer, block in enumerate(model.blocks):
            patch.setattr(block, "forward", plain.block(layer, block.forward))
        patch.setattr("toprovar_compile.session.Session.scales", _five_scales)
        wanted = model(LABELS, seed=3)
    assert len(plain.outputs) == len(outputs) == 4 * 5
    torch.testing.assert_close(
        torch.cat([o.flatten() for o in outputs]), torch.cat([o.flatten() for o in plain.outputs])
    )
    torch.testing.assert_close(image, wanted)


def _five_scales(session: Any) -> Any:
    for session.scale in range(5):
        yield session.scale
