"""Infinity by itself: what arguments mean, plans, how it compiles. Upstream tests compare it with the official code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters as compile_counters

from toprovar_compile import dispatch
from toprovar_compile.errors import OptionError
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import (
    INFINITY_2B,
    INFINITY_8B,
    Guidance,
    Infinity,
    InfinityConfig,
    official_config,
)
from toprovar_compile.models.infinity_text import pack_text
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.reference import pruned
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule

TINY = InfinityConfig(
    depth=3,
    embed_dim=64,
    num_heads=2,
    text_channels=128,
    text_maxlen=48,
    text_pad=16,
    vae=BSQVAEConfig(8, 32, (1, 2), 1),
)
SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 3, 4, 6))
WIDE = ScaleSchedule(((1, 1), (2, 2), (2, 3), (3, 5), (4, 7)))
# The first scale, the second, all later ones.
STEP_FRAMES = 3
# The same sums in batches of another size.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Compiling tests reset the compiler themselves, the others do without."""


def make(cfg: InfinityConfig = TINY, dtype: torch.dtype = torch.float32) -> Infinity:
    model = Infinity.random(cfg, dtype=dtype, seed=1)
    model.schedule = SCHEDULE
    return model


@pytest.fixture(scope="module")
def model() -> Infinity:
    """Tests must not change it."""
    return make()


def texts(*lengths: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, TINY.text_channels, generator=generator) for n in lengths]


def all_bits(batch: int, schedule: ScaleSchedule = SCHEDULE) -> list[Tensor]:
    """Bits of every scale, so that generations that differ otherwise see the same inputs."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, (batch, h, w, 8), generator=generator) for h, w in schedule.grids]


def logits_of(model: Infinity, text: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Logits of every scale, as steps return them."""
    found: list[Tensor] = []
    original = model.get_logits

    def keep(x: Tensor, cond: Tensor) -> Tensor:
        found.append(original(x, cond))
        return found[-1]

    model.get_logits = keep  # type: ignore[method-assign]
    try:
        model(text, seed=0, forced_bits=all_bits(len(text), arguments.get("schedule", SCHEDULE)), **arguments)
    finally:
        del model.get_logits  # type: ignore[method-assign]
    return found


# what is generated


def test_images_follow_text_and_seed(model: Infinity) -> None:
    images = model(texts(5, 9), seed=0)
    assert images.shape == (2, 3, 12, 12)
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    assert torch.equal(images, model(texts(5, 9), seed=0))
    for other in (model(texts(5, 9), seed=1), model(texts(5, 9, seed=8), seed=0), model(texts(5, 9), seed=0, cfg=2.0)):
        assert not torch.equal(images, other)
    assert not torch.equal(model(texts(5)), model(texts(5)))


def test_prompts_of_a_batch_do_not_see_each_other(model: Infinity) -> None:
    together = logits_of(model, texts(5, 40))
    for i, text in enumerate(texts(5, 40)):
        alone = logits_of(model, [text], schedule=SCHEDULE)
        first = together[0][[i, 2 + i]]
        torch.testing.assert_close(first, alone[0], **TOLERANCE)


def test_padding_of_text_does_not_matter(model: Infinity) -> None:
    padded = make(replace(TINY, text_pad=48))
    for a, b in zip(logits_of(model, texts(5, 9)), logits_of(padded, texts(5, 9)), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_unconditional_text_is_the_negative_prompt_by_default(model: Infinity) -> None:
    same = [model.cfg_uncond[:n].clone() for n in (5, 9)]
    assert torch.equal(model(texts(5, 9), seed=0), model(texts(5, 9), seed=0, negative=same))
    assert not torch.equal(model(texts(5, 9), seed=0), model(texts(5, 9), seed=0, negative=texts(7)))


def test_without_guidance_there_is_one_row_a_prompt(model: Infinity) -> None:
    one, two = logits_of(model, texts(5, 9), cfg=1.0), logits_of(model, texts(5, 9), cfg=[2.0, 1.0, 1.0, 1.0, 1.0])
    for a, b in zip(one, two, strict=True):
        assert a.shape[0] == 2 and b.shape[0] == 4
        torch.testing.assert_close(a, b[:2], **TOLERANCE)


def test_dropped_rows_are_those_that_nobody_reads(model: Infinity) -> None:
    dropped = logits_of(model, texts(5, 9), cfg_layers=-2)
    kept = logits_of(model, texts(5, 9), cfg_layers=(-2, 0))
    for a, b in zip(dropped, kept, strict=True):
        assert a.shape[0] == 2 and b.shape[0] == 4
        torch.testing.assert_close(a, b[:2], **TOLERANCE)


def test_guidance_matrix() -> None:
    guidance = Guidance((3.0, 1.0), (False, True), False)
    on, off = (guidance.matrix(s, torch.device("cpu")) for s in (0, 1))
    assert on is not None and off is not None
    assert on.tolist() == [[3, -2], [3, -2]] and off.tolist() == [[1, 0], [0, 1]]
    assert guidance.drop and not replace(guidance, logits=True).drop
    assert Guidance((3.0,), (), True).matrix(0, torch.device("cpu")) is None
    assert not guidance.off().on


def test_ratio_size_and_schedule(model: Infinity) -> None:
    images = model(texts(5), seed=0, ratio="3:4", size="0.06M")
    assert images.shape == (1, 3, 40, 30)  # tokens of 2x2 pixels here
    assert model(texts(5), seed=0, schedule=WIDE).shape == (1, 3, 8, 14)
    with pytest.raises(OptionError, match="schedule"):
        model(texts(5), ratio="1:1", schedule=WIDE)


def test_spatial_patchify() -> None:
    model = make(replace(TINY, spatial_patchify=True))
    assert model.word_embed.in_features == 32 and model.sampling.tau == 1.0
    assert model(texts(5), seed=0).shape == (1, 3, 24, 24)


def test_forced_bits(model: Infinity) -> None:
    first = model(texts(5, 9), seed=0, forced_bits=all_bits(2))
    assert torch.equal(first, model(texts(5, 9), seed=1, cfg=1.0, forced_bits=all_bits(2)))
    with pytest.raises(OptionError, match=r"forced_bits\[1\].*\(2, 2, 2, 8\)"):
        model(texts(5, 9), forced_bits=[all_bits(2)[0]] * 2)


@pytest.mark.parametrize("cfg", [replace(TINY, shared_aln=False), replace(TINY, ca_gamma=True)])
def test_other_forms_of_a_layer(cfg: InfinityConfig) -> None:
    assert make(cfg)(texts(5), seed=0).std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg": [1.0, 2.0]}, "cfg has 2 values"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"cfg_layers": 1}, "cfg_layers is 1"),
        ({"cfg_layers": (0, -3)}, r"-1\.\.-2"),
        ({"cfg_layers": ()}, "cfg_layers"),
        ({"size": "2M"}, "size '2M'"),
        ({"negative": []}, "negative"),
    ],
)
def test_arguments_that_do_not_fit(model: Infinity, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model(texts(5), seed=0, **arguments)


# the model itself


def test_published_sizes() -> None:
    assert (INFINITY_2B.depth, INFINITY_2B.embed_dim, INFINITY_2B.bits, INFINITY_2B.hidden) == (32, 2048, 32, 8192)
    assert (INFINITY_8B.depth, INFINITY_8B.embed_dim, INFINITY_8B.bits, INFINITY_8B.num_heads) == (40, 3584, 56, 28)
    for cfg in (INFINITY_8B, replace(TINY, ca_gamma=True)):
        assert InfinityConfig.from_json(cfg.to_json()) == cfg
    with pytest.raises(OptionError, match="layer12"):
        official_config("layer13")


def test_whole_bfloat16() -> None:
    half = make().to(torch.bfloat16)
    assert {p.dtype for m in (half, make(dtype=torch.bfloat16)) for p in m.parameters()} == {torch.bfloat16}
    assert make().fingerprint() == half.fingerprint() != make(replace(TINY, depth=2)).fingerprint()
    start = half.begin(pack_text(texts(5), None, None, None, half.cfg_uncond, guided=True, multiple=half.cfg.text_pad))
    assert start.x.dtype == start.mod.dtype == start.cond.dtype == torch.float32
    assert start.text_k[0].dtype == torch.bfloat16 and start.text_k[0].shape == (2, 2, 16, 32)
    exact, rounded = logits_of(make(), texts(5)), logits_of(half, texts(5))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).std() < 0.05 * a.std()
    half.stream_dtype = torch.bfloat16
    assert 0 < (logits_of(half, texts(5))[-1] - rounded[-1]).std() < 0.1 * exact[-1].std()


# plans


def mixed_plan(depth: int = 3, **fields: Any) -> Plan:
    """Every kind of action at the last two scales."""
    last = [(LayerAction("prune", 6), SKIP, DENSE), (LayerAction("prune", 9), LayerAction("prune", 20), SKIP)]
    rows = [ScalePlan(layers=(DENSE,) * depth)] * 3 + [ScalePlan(layers=actions[:depth]) for actions in last]
    return Plan(SCHEDULE, depth, tuple(rows), **fields)


def test_entropy_is_that_of_self_attention(model: Infinity) -> None:
    with pruned(model, Plan.dense(SCHEDULE, 3), measure_all=True) as trace:
        model(texts(5, 9), seed=0)
    assert not trace.entropy[0, 0].any()  # one token, one key: attention to the text has more
    assert trace.entropy[4, 2].shape == (4, 36) and trace.entropy[4, 2].min() > 0
    assert trace.kv_length[4, 0] == SCHEDULE.total


def test_plan_without_guidance_from_a_scale(model: Infinity) -> None:
    rows = [ScalePlan(layers=(DENSE,) * 3, cfg=s < 3) for s in range(5)]
    for layers in (0, -2):
        with pruned(model, Plan(SCHEDULE, 3, tuple(rows))) as trace:
            images = model(texts(5, 9), seed=0, cfg=3.0, cfg_layers=layers)
        assert trace.plan is not None
        want = model(texts(5, 9), seed=0, cfg=[3.0, 3.0, 3.0, 1.0, 1.0], cfg_layers=layers)
        torch.testing.assert_close(images, want, atol=1e-4, rtol=0)


def test_plan_that_exits(model: Infinity) -> None:
    plan = Plan.keep_share(SCHEDULE, 3, 1.0, 4, exit_scale=4)
    summed: list[Tensor] = []
    hook = model.vae.decoder.register_forward_pre_hook(lambda _, args: summed.append(args[0]))
    with pruned(model, plan):
        images = model(texts(5), seed=0)
    hook.remove()
    assert images.shape == (1, 3, 12, 12) and summed[0].shape == (1, 8, 6, 6)


# compilation


def step_frames(captured: list[torch.fx.GraphModule]) -> int:
    """Captured graphs that hold attention: a step, and no decoder."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return sum(any(n.target is attention for n in gm.graph.nodes) for gm in captured)


def test_number_of_frames() -> None:
    torch.compiler.reset()
    compile_counters["graph_break"].clear()  # of other tests
    captured: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        captured.append(gm)
        return gm.forward

    model = make(replace(TINY, depth=2))
    fast = torch.compile(model, backend=backend)

    def run(text: list[Tensor], **arguments: Any) -> int:
        before = step_frames(captured)
        assert torch.equal(fast(text, **arguments), model(text, **arguments))
        return step_frames(captured) - before

    assert run(texts(5, 9), seed=0) == STEP_FRAMES
    assert run(texts(30, 2), seed=1) == 0
    assert run(texts(30, 48), seed=1, cfg=[2.0, 1.0, 3.0, 4.0, 5.0], tau=0.7, top_p=0.9) == 0
    assert run(texts(8, 8), seed=2, negative=texts(40)) == 0
    assert run(texts(8, 8), seed=2, schedule=WIDE) == 0
    assert run(texts(8, 8), seed=2, ratio="3:4", size="0.06M") == 0
    assert run(texts(5, 9), seed=0, cfg_layers=-1) == STEP_FRAMES  # an own form of the step
    assert run(texts(5, 30), seed=1, cfg_layers=-1, cfg=2.5) == 0
    assert compile_counters["graph_break"] == {}
    torch.compiler.reset()


@pytest.mark.parametrize(("arguments", "even"), [({}, False), ({"cfg_layers": -1}, True)], ids=["logits", "layer"])
def test_compiled_plan_is_the_reference(arguments: dict[str, Any], even: bool) -> None:
    """Guidance at a layer makes the caches of an even plan uneven."""
    torch.compiler.reset()
    dispatch.reset()
    counters.reset()
    model = make(replace(TINY, depth=2))
    plan = Plan.keep_share(SCHEDULE, 2, 0.5, 2) if even else mixed_plan(depth=2)
    assert plan.is_even == even
    fast = torch.compile(model, backend="toprovar", options={"inner": "eager", "plan": plan})
    for text in (texts(5, 9), texts(30, 9)):
        with pruned(model, plan):
            want = model(text, seed=3, **arguments)
        torch.testing.assert_close(fast(text, seed=3, **arguments), want, atol=2e-6, rtol=0)
    assert not torch.equal(want, model(text, seed=3, **arguments))
    fallbacks = [e for e in counters.snapshot() if e.startswith(("fallback", "guard_miss", "cache_copied"))]
    assert all("blocks.1 runs dense" in e for e in fallbacks) and bool(fallbacks) == bool(arguments)
    torch.compiler.reset()
