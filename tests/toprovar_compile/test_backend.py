"""What a user of `torch.compile(model, backend="toprovar")` relies on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters as compile_counters

from toprovar_compile import dispatch, explain
from toprovar_compile.backend import toprovar, writes_in_place
from toprovar_compile.errors import PlanError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.reference import pruned
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import current_session, generation

EAGER = {"inner": "eager"}
LABELS = torch.tensor([1, 7])
# The first scale, all later ones; and the decoder.
STEP_FRAMES, FRAMES = 2, 3
# A second batch size makes the batch dynamic, once and for all.
FRAMES_OF_ANOTHER_BATCH = 3
# Where entropy is measured, attention is another kernel: sums in another order.
TOLERANCE = {"rtol": 0.0, "atol": 2e-6}
# One rounding to bfloat16 of logits around 2, and another order of sums before it.
TOLERANCE_BF16 = {"rtol": 2e-2, "atol": 3e-2}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What is compiled in this file is shared by its tests."""


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.reset()


def frames() -> int:
    """Graphs that Dynamo has captured so far."""
    return int(compile_counters["stats"]["unique_graphs"])


def _compile(model: Callable[..., Any], **options: Any) -> Any:
    return compile_steps(model, EAGER | options)


def mixed_plan(var: VAR, **fields: Any) -> Plan:
    """Every kind of action at the last two scales."""
    rows = [ScalePlan(layers=(DENSE,) * 3)] * 3
    rows += [ScalePlan(layers=(LayerAction("prune", 6), SKIP, DENSE))]
    rows += [ScalePlan(layers=(LayerAction("prune", 9), LayerAction("prune", 20), SKIP))]
    return Plan(var.schedule, 3, tuple(rows), **fields)


@pytest.fixture(scope="module")
def model(make_var: Callable[..., VAR]) -> VAR:
    """Three layers, five scales, with a plan of its own that prunes."""
    made = make_var()
    made.plan = mixed_plan(made)
    return made


@pytest.fixture(scope="module")
def captured() -> dict[str, int]:
    """Frames captured while `fast` was warmed up."""
    return {}


@pytest.fixture(scope="module")
def fast(model: VAR, captured: dict[str, int]) -> Iterator[Any]:
    """The compiled model, warmed up with one and with two labels."""
    torch.compiler.reset()
    dispatch.reset()
    compile_counters["graph_break"].clear()  # of tests before this file
    compiled = _compile(model)
    for name, labels in (("first", LABELS[:1]), ("second", LABELS)):
        before = frames()
        compiled(labels, seed=0)
        captured[name] = frames() - before
    yield compiled
    torch.compiler.reset()


def reference(model: VAR, labels: Tensor = LABELS, **sampling: Any) -> Tensor:
    """The images of the eager reference by the model's own plan."""
    assert model.plan is not None
    with pruned(model, model.plan):
        return model(labels, **sampling)


# frames


def test_number_of_frames(fast: Any, captured: dict[str, int]) -> None:
    assert captured == {"first": FRAMES, "second": FRAMES_OF_ANOTHER_BATCH}
    assert compile_counters["graph_break"] == {}


@pytest.mark.parametrize(
    ("labels", "sampling"),
    [
        ([1, 7], {"seed": 1}),
        ([0, 3], {"seed": 2}),
        ([1, 7], {"seed": 1, "cfg": 3.0, "top_k": 9, "top_p": 0.9}),
        ([1, 2, 3], {"seed": 4}),
        ([5], {"seed": 6}),
        ([10], {"seed": 6}),
    ],
    ids=str,
)
def test_another_image_compiles_nothing(fast: Any, model: VAR, labels: list[int], sampling: dict[str, Any]) -> None:
    before = frames()
    images = fast(torch.tensor(labels), **sampling)
    assert frames() == before
    torch.testing.assert_close(images, reference(model, torch.tensor(labels), **sampling), **TOLERANCE)
    assert not [event for event in counters.snapshot() if not event.startswith("compiled")]


def test_without_a_seed_images_differ(fast: Any) -> None:
    assert not torch.equal(fast(LABELS), fast(LABELS))


# weights


def test_weights_loaded_in_place(fast: Any, model: VAR, make_var: Callable[..., VAR]) -> None:
    before, images = frames(), fast(LABELS, seed=3)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = {n: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for n, v in old.items()}
    try:
        model.load_state_dict(new)
        changed = fast(LABELS, seed=3)
        torch.testing.assert_close(changed, reference(model, seed=3), **TOLERANCE)
        assert not torch.equal(changed, images)
    finally:
        model.load_state_dict(old)
    assert torch.equal(fast(LABELS, seed=3), images)
    assert frames() == before


def test_two_models_of_one_architecture(fast: Any, model: VAR, make_var: Callable[..., VAR]) -> None:
    other = make_var()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.plan = mixed_plan(other, direction="high_entropy")
    second = _compile(other)
    for _ in range(2):
        torch.testing.assert_close(second(LABELS, seed=3), reference(other, seed=3), **TOLERANCE)
        torch.testing.assert_close(fast(LABELS, seed=3), reference(model, seed=3), **TOLERANCE)


def test_two_models_of_different_depth(fast: Any, model: VAR, make_var: Callable[..., VAR]) -> None:
    other = make_var(depth=2, shared_aln=False)
    other.plan = Plan.keep_share(other.schedule, 2, 0.5, 3, bucket=2)
    second = _compile(other)
    for _ in range(2):
        torch.testing.assert_close(second(LABELS, seed=3), reference(other, seed=3), **TOLERANCE)
        torch.testing.assert_close(fast(LABELS, seed=3), reference(model, seed=3), **TOLERANCE)


def test_bfloat16(make_var: Callable[..., VAR]) -> None:
    model = make_var().bfloat16()
    step = _compile(model.step, plan="dense")
    x, cond, mod, _ = model._begin(LABELS, 0)
    with torch.no_grad(), generation(model.schedule, model.fingerprint):
        want, keys, values = model.step(x, cond, mod, [], [])
        got, fast_keys, fast_values = step(x, cond, mod, [], [])
        torch.testing.assert_close(got, want, **TOLERANCE_BF16)
        x = x.repeat(1, 4, 1)
        want = model.step(x, cond, mod, keys, values)[0]
        torch.testing.assert_close(step(x, cond, mod, fast_keys, fast_values)[0], want, **TOLERANCE_BF16)


# plans and options


def test_plan_of_another_model(model: VAR) -> None:
    with pytest.raises(PlanError, match=r"model.*0123"):
        _compile(model, plan=mixed_plan(model, model="0123"))(LABELS, seed=0)
    assert current_session() is None


def test_plan_that_fits(model: VAR) -> None:
    plan = mixed_plan(model, model=model.fingerprint(), restore="identity")
    with pruned(model, plan):
        want = model(LABELS, seed=3)
    torch.testing.assert_close(_compile(model, plan=plan)(LABELS, seed=3), want, **TOLERANCE)


def test_auto_without_a_plan_is_dense(model: VAR, fast: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan, model.plan = model.plan, None
    try:
        with caplog.at_level(logging.WARNING, "toprovar_compile"):
            assert torch.equal(fast(LABELS, seed=3), model(LABELS, seed=3))
    finally:
        model.plan = plan
    (event,) = (e for e in counters.snapshot() if e.startswith("fallback"))
    assert event.startswith("fallback: plan='auto' runs dense: the model brings no plan")
    assert "runs dense" in caplog.text


def test_unknown_option(model: VAR) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"unknown option 'plam'.*did you mean 'plan'"):
        _compile(model, plam="dense")(LABELS, seed=0)


def test_mode_is_ignored_and_counted() -> None:
    module = nn.Linear(3, 3)
    compiled = torch.compile(module, backend=partial(toprovar, options=EAGER), mode="max-autotune")
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(2, 3)), module(torch.ones(2, 3)))
    assert counters.snapshot()["ignored: mode='max-autotune': it is a mode of Inductor; see docs/options.md"] == 1


def test_registered() -> None:
    assert "toprovar" in torch._dynamo.list_backends()


# what is no generation


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (1, 3, 8, 8), "plain_graph: the graph has no attention"),
        (_Attention(), (1, 2, 5, 8), "plain_graph: no repeated module of the model is a layer"),
    ],
)
def test_other_modules_compile_plainly(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        report = explain(_compile(module), x)
        torch.testing.assert_close(report.result, module(x))
    assert [g.kind for g in report.graphs] == ["plain"]
    (event,) = report.events
    assert event.startswith(reason)


def test_with_gradients_enabled(model: VAR, caplog: pytest.LogCaptureFixture) -> None:
    x, cond, mod, _ = model._begin(LABELS, 0)
    with caplog.at_level(logging.WARNING, "toprovar_compile"):
        logits, _, _ = _compile(model.step)(x, cond, mod, [], [])
    torch.testing.assert_close(logits, model.step(x, cond, mod, [], [])[0])
    reason = "gradients are enabled, and a plan is for generation"
    assert counters.snapshot()[f"plain_graph: {reason}"] == 1 and reason in caplog.text


def test_a_step_outside_a_generation(model: VAR, fast: Any) -> None:
    step = _compile(model.step)
    x, cond, mod, _ = model._begin(LABELS, 0)
    wide = x.repeat(1, 4, 1)
    with torch.no_grad():
        want = [model.step(x, cond, mod, [], [])]
        want.append(model.step(wide, cond, mod, *want[0][1:]))
        got = [step(x, cond, mod, [], [])]
        got.append(step(wide, cond, mod, *got[0][1:]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_a_foreign_cache_is_copied(model: VAR, fast: Any) -> None:
    step = _compile(model.step)
    x, cond, mod, _ = model._begin(LABELS, 0)
    wide = x.repeat(1, 4, 1)
    with torch.no_grad(), generation(model.schedule, model.fingerprint, Plan.dense(model.schedule, 3)) as session:
        for session.scale, tokens in ((0, x), (1, wide)):
            if session.scale == 0:
                _, keys, values = step(tokens, cond, mod, [], [])
        keys = [k + 1 for k in keys]
        want = model.step(wide, cond, mod, keys, values)
        got = step(wide, cond, mod, keys, values)
    torch.testing.assert_close(got, want, **TOLERANCE)
    event = "cache_copied: the step was given a key/value cache that it had not returned"
    assert counters.snapshot()[event] == 3, "the keys of each layer; the values are those it returned"


# failures and threads


def test_after_an_exception_in_mid_generation(model: VAR, fast: Any) -> None:
    images = fast(LABELS, seed=3)
    advance = model._advance

    @torch.compiler.disable
    def fail(s: int, *args: Any, **how: Any) -> Any:
        if s == 3:
            raise ValueError("in mid-generation")
        return advance(s, *args, **how)

    model._advance = fail  # type: ignore[method-assign]
    try:
        with pytest.raises(ValueError, match="in mid-generation"):
            fast(LABELS, seed=3)
    finally:
        del model._advance
    assert current_session() is None
    assert torch.equal(fast(LABELS, seed=3), images)


def test_two_threads_at_once(fast: Any) -> None:
    jobs = [(LABELS, 11), (LABELS, 12), (LABELS[:1], 13), (LABELS, 14)]
    alone = [fast(labels, seed=seed) for labels, seed in jobs]
    together: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(mine: list[Tensor]) -> None:
        start.wait()
        mine += [fast(labels, seed=seed) for labels, seed in jobs]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in together:
        assert len(mine) == len(alone)
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


def test_weights_are_cast_once_an_image_in_inference_mode(
    fast: Any, model: VAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    run = dispatch.Unit.run

    def counted(self: Any, name: str, *args: Any) -> Any:
        made.append(name)
        return run(self, name, *args)

    monkeypatch.setattr(dispatch.Unit, "run", counted)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fast(LABELS, seed=0)
    assert made.count("prologue") == 4  # from weights, from each of two conditions, and from both: for all three steps
    assert made.count("epilogue") == len(model.schedule)


def test_inference_mode(fast: Any, model: VAR) -> None:
    with torch.inference_mode():
        images = fast(LABELS, seed=3)
    torch.testing.assert_close(images, reference(model, seed=3), **TOLERANCE)


def test_a_scale_that_dynamo_no_longer_compiles_is_counted(make_var: Callable[..., VAR]) -> None:
    model = make_var(depth=2)
    model.plan = Plan.dense(model.schedule, 2)
    few = torch.compile(model, backend="toprovar", options=EAGER, recompile_limit=1, isolate_recompiles=True)
    assert torch.equal(few(LABELS, seed=3), model(LABELS, seed=3))
    assert counters.snapshot()[_NO_MORE_FORMS] == len(model.schedule) - 1


_NO_MORE_FORMS = (
    "fallback: a scale ran outside the compiled steps and without its plan: Dynamo compiles no further form of the "
    "step; raise torch._dynamo.config.recompile_limit, for instance to 64"
)


@pytest.mark.parametrize(("function", "may"), [(_compile, True), (F.relu, False), (torch.relu_, True)])
def test_what_dynamo_does_not_follow_may_write(function: Callable[..., Any], may: bool) -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    assert writes_in_place(torch.fx.GraphModule(nn.Module(), graph)) == may


# explain


def test_explain(fast: Any, model: VAR) -> None:
    report = explain(fast, LABELS, seed=3)
    torch.testing.assert_close(report.result, reference(model, seed=3), **TOLERANCE)
    steps = [g for g in report.graphs if g.kind == "step"]
    assert [g.kind for g in report.graphs] == ["step"] * STEP_FRAMES + ["plain"]
    assert steps[0].passes == [
        "attention: 3 x scaled_dot_product_attention",
        "rewrite_attention: 3 rewritten",
        "outline_layers: 3 rewritten",
    ]
    assert [[name.rpartition("self.")[2] for name, _, _ in g.layers] for g in steps] == [
        [f"blocks.{i}" for i in range(3)]
    ] * STEP_FRAMES
    proofs = [{proof for _, _, proof in g.layers} for g in steps]
    assert len(proofs[0]) == 1 and "not an open number of tokens" in proofs[0].pop()
    assert proofs[1:] == [{"tokens proven independent"}]
    names = [line.split(": ")[0].split(" ", 2)[2] for line in steps[1].variants() if line.startswith("layer")]
    assert {"dense", "dense with entropy", "prune, cached", "prune, cached with entropy"} <= set(names)
    assert {"Eq(n, 4)", "Eq(n, 9)", "Eq(n, 16)"} <= {text.split(" &")[0] for text in steps[1].guards()}
    text = str(report)
    for part in ("graph 0: step", "3 layers, blocks.0 to blocks.2", "events: none"):
        assert part in text


# layers of other models


class _Block(nn.Module):
    """A block with what VAR's own does not have, by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, rope: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[1]
        h = self.norm(x)
        if self.kind == "constants":
            h = h * torch.tensor([1.0, 2.0] * 8) * n**-0.5
        if self.kind == "token count":
            h = h * (n / 100)
        if self.kind == "mean of tokens":
            h = h - h.mean(1, keepdim=True)
        q, new_k, new_v = self.qkv(h).view(x.shape[0], n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "rope":
            start = 0 if k is None else k.shape[2]
            part = rope[:, start : start + n].unsqueeze(1)
            q, new_k = q * part, new_k * part
        if self.kind == "reads its cache" and k is not None and v is not None:
            x = x + k.mean((1, 2, 3)).view(-1, 1, 1) / v.shape[2]
        if k is not None and v is not None:
            new_k, new_v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
        out = F.scaled_dot_product_attention(q, new_k, new_v, scale=0.5)
        return x + self.proj(out.transpose(1, 2).reshape(x.shape)), new_k, new_v


class _Other(nn.Module):
    """A model of our session protocol that is not VAR: three scales, two blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.schedule = ScaleSchedule.from_patch_nums((1, 2, 3, 4))
        self.blocks = nn.ModuleList(_Block(kind) for _ in range(2))
        self.head = nn.Linear(16, 16)
        self.register_buffer("rope", torch.randn(1, self.schedule.total, 8))
        prune = LayerAction("prune", 6)
        rows = [ScalePlan(layers=(DENSE, DENSE))] * 3 + [ScalePlan(layers=(prune, DENSE))]
        self.plan = Plan(self.schedule, 2, tuple(rows))

    def step(self, x: Tensor, rope: Tensor, keys: list[Tensor], values: list[Tensor]) -> Any:
        new_keys, new_values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, rope, keys[i] if keys else None, values[i] if values else None)
            new_keys.append(k)
            new_values.append(v)
        return self.head(x), new_keys, new_values

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), generation(self.schedule, lambda: "other", self.plan) as session:
            keys: list[Tensor] = []
            values: list[Tensor] = []
            outputs = []
            for s in session.scales():
                tokens = x[:, self.schedule.prior[s] :][:, : self.schedule.tokens[s]].contiguous()
                y, keys, values = self.step(tokens, self.rope, keys, values)
                outputs.append(y)
            return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("constants", ""),
        ("rope", ""),
        ("token count", "it computes with the number of tokens"),
        ("mean of tokens", "it reduces over the tokens"),
    ],
)
def test_layers_of_another_model(kind: str, refusal: str) -> None:
    torch.manual_seed(0)
    model = _Other(kind).eval().requires_grad_(False)
    x = torch.randn(2, model.schedule.total, 16)
    want = model(x)
    compiled = torch.compile(model, backend="toprovar", options=EAGER, isolate_recompiles=True)
    dense = model.schedule.prior[3]
    got = compiled(x)
    torch.testing.assert_close(got[:, :dense], want[:, :dense], rtol=1e-5, atol=1e-5)
    fallbacks = [e for e in counters.snapshot() if e.startswith("fallback")]
    if refusal:
        assert (
            len(fallbacks) == 1 and "blocks.0 runs dense instead of prune 6" in fallbacks[0] and refusal in fallbacks[0]
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert fallbacks == []
        same = (got - want).abs().amax((0, 2))[dense:] < 1e-4
        assert not same.any(), "tokens of the pruned scale differ from those of the dense model"


def test_a_layer_that_reads_its_cache_elsewhere_is_compiled_densely() -> None:
    torch.manual_seed(0)
    model = _Other("reads its cache").eval().requires_grad_(False)
    x = torch.randn(2, model.schedule.total, 16)
    compiled = torch.compile(model, backend="toprovar", options=EAGER | {"plan": "dense"}, isolate_recompiles=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
