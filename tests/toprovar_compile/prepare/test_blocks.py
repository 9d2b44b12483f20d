"""A model that no adapter knows: its list of blocks as one compiled step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo

import toprovar_compile as tv
from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

SIDES = [1, 2, 3, 4]
FRAMES = 3  # steps of one token, of the first cache, of all other scales


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.keep, self.k, self.v = False, None, None

    def start(self, keep: bool) -> None:
        self.keep, self.k, self.v = keep, None, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.keep and self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        if self.keep:
            self.k, self.v = k, v
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(16), Attention()

    def forward(self, h: Tensor, gain: Tensor) -> Tensor:
        return h + self.mix(self.norm(h)) * gain


class Model(nn.Module):
    """Scales of growing noise; the picture is the last scale's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Block() for _ in range(3))

    @torch.no_grad()
    def sample(self, batch: int, sides: list[int], seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        layers: Any = self.body.layers
        for layer in layers:
            layer.mix.start(True)
        h = torch.zeros(batch, 1, 16)
        for side in sides:
            grid = h.mean(1, keepdim=True) + torch.randn(batch, side * side, 16, generator=rng)
            h = grid
            for layer in layers:
                h = layer(h=h, gain=torch.full((batch, 1, 16), 0.5))
        for layer in layers:
            layer.mix.start(False)
        return h


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def accelerate(model: nn.Module, schedule: Any = SIDES, plan: Plan | str = "dense", **options: Any) -> Any:
    names = {"entry": "sample", "blocks": "body.layers", "caches": ("mix.k", "mix.v"), "stream": "h", "inner": "eager"}
    return tv.accelerate_blocks(model, schedule, plan, **names | options)


def test_dense_is_the_model_itself(model: Model) -> None:
    layers, keys = model.body.layers, list(model.state_dict())
    want = [model.sample(2, SIDES), model.sample(1, [1, 3])]
    before = dynamo["stats"]["unique_graphs"]
    with accelerate(model, lambda sides, **_: sides) as handle:
        torch.testing.assert_close(model.sample(2, SIDES), want[0])
        assert dynamo["stats"]["unique_graphs"] - before == FRAMES
        torch.testing.assert_close(model.sample(2, SIDES), want[0])
        assert dynamo["stats"]["unique_graphs"] - before == FRAMES
        torch.testing.assert_close(model.sample(1, [1, 3]), want[1])
        assert list(model.state_dict()) == keys and "active" in repr(handle)
        assert [type(layer) for layer in model.body.layers] == [Block] * 3  # outside of the entry point
    assert model.body.layers is layers
    assert torch.equal(model.sample(2, SIDES), want[0])


def test_a_plan_prunes_and_weights_stay_the_models_own(model: Model) -> None:
    plan = Plan.keep_share(ScaleSchedule.from_patch_nums(SIDES), 3, 0.5, 3, bucket=1)
    want = model.sample(2, SIDES)
    with accelerate(model, SIDES, plan):
        report = tv.explain(model.sample, 2, SIDES)
        assert not torch.allclose(report.result, want)
        assert any("prune" in line for graph in report.graphs for line in graph.variants())
    with accelerate(model, SIDES, "auto") as handle:
        handle.prepared.plan = plan
        torch.testing.assert_close(model.sample(2, SIDES), report.result)
        handle.prepared.plan = None
        model.body.layers[0].mix.out.weight.data.mul_(2)
        changed = model.sample(2, SIDES)
    torch.testing.assert_close(model.sample(2, SIDES), changed)


def test_text_before_the_first_scale(model: Model) -> None:
    class WithText(Model):
        @torch.no_grad()
        def sample(self, batch: int, sides: list[int], seed: int = 0) -> Tensor:
            rng = torch.Generator().manual_seed(seed)
            layers: Any = self.body.layers
            for layer in layers:
                layer.mix.start(True)
            for count in (5, *(side * side for side in sides)):
                h = torch.randn(batch, count, 16, generator=rng)
                for layer in layers:
                    h = layer(h, torch.full((batch, 1, 16), 0.5))
            return h

    other = WithText().eval()
    want = other.sample(2, [2, 3])
    plan = Plan.keep_share(ScaleSchedule.from_patch_nums([2, 3]), 3, 0.5, 1, bucket=1)
    with accelerate(other, [2, 3], prefix=5):
        report = tv.explain(other.sample, 2, [2, 3])
    torch.testing.assert_close(report.result, want)
    with accelerate(other, [2, 3], plan, prefix=5):
        pruned = tv.explain(other.sample, 2, [2, 3])
    assert not torch.allclose(pruned.result, want)
    assert not [e for e in {**report.events, **pruned.events} if e.startswith(("guard_miss", "fallback", "cache"))]


def test_paths_that_lead_nowhere_are_refused(model: Model) -> None:
    for wrong in ({"blocks": "body.blocks"}, {"caches": ("mix.cached_k",)}, {"entry": "generate"}):
        with pytest.raises(OptionError, match="has no such thing"):
            accelerate(model, **wrong)
    with pytest.raises(UnsupportedModelError, match="a ModuleList of two blocks or more"):
        accelerate(model, blocks="body.layers.0")
    assert "sample" not in vars(model)


def test_a_loop_that_goes_round_the_list_is_refused(model: Model) -> None:
    class ByIndex(Model):
        def sample(self, batch: int, sides: list[int], seed: int = 0) -> Tensor:
            layers: Any = self.body.layers
            h = torch.zeros(batch, 4, 16)
            for i in range(len(layers)):
                h = layers[i](h=h, gain=torch.ones(batch, 1, 16))
            return h

    other = ByIndex().eval()
    with accelerate(other), pytest.raises(UnsupportedModelError, match="did not iterate over body"):
        other.sample(1, SIDES)
    with accelerate(model), pytest.raises(UnsupportedModelError, match="accelerated already"):
        accelerate(model)
