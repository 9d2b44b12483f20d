"""Scales that are replayed give what running them gives, and are run where anything could differ.

Graphs are stand-ins here: launched, they run what was recorded on the memory that was recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo.utils import counters as compile_counters

from toprovar_compile import dispatch
from toprovar_compile.bench.host import stand_ins
from toprovar_compile.cuda_graph import Lane, Scale
from toprovar_compile.decision import Decision
from toprovar_compile.inductor import Guards, mode_guard, pure_frame, tensor_guard
from toprovar_compile.models import var
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.reference import pruned
from toprovar_compile.replay import StepReplays
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import Session

LABELS = torch.tensor([1, 7])
TOLERANCE = {"rtol": 0.0, "atol": 2e-6}
REFUSED = "not_replayed: a step is not one method of a module, or does more than its graph"
# All scales of an image are replayed.
REPLAYED = 5


class Recording:
    """A graph of a part of a generation, or of a scale, whose number its key holds."""

    def __init__(self, scale: Scale, fixed: list[Any]) -> None:
        self.scale, self.fixed, self.before = scale, fixed, scale.save()
        drawn = None if scale.generator is None else scale.generator.get_state()
        self.outputs = scale(fixed)
        self.after = scale.save()
        if scale.generator is not None:
            scale.generator.set_state(drawn)  # recording draws nothing

    def replay(self, generator: torch.Generator | None) -> None:
        state = getattr(self.scale.save, "__self__", None)
        if state is not None:
            state.session.scale = self.scale.key[1][1]
            state.prologues.clear()
        self.scale.restore(self.before)
        for out, new in zip(self.outputs, self.scale(self.fixed, generator), strict=True):
            if out is not None:
                out.copy_(new)
        if state is not None:
            for old, layer in zip(self.after.layers, state.layers, strict=True):
                for name in ("entropy", "delta"):
                    if getattr(old, name) is not None:
                        getattr(old, name)[0].copy_(getattr(layer, name)[0])
        self.scale.restore(self.after)


@pytest.fixture(scope="module", autouse=True)
def _graphs_on_the_cpu() -> Iterator[None]:
    def record(lane: Lane, scale: Scale, fixed: Any) -> tuple[Recording, list[Any]]:
        memory = [(t, t.clone()) for t in lane._memory.values()]
        made = Recording(scale, list(fixed))
        for caches, before in memory:  # recording writes nothing
            caches.copy_(before)
        return made, made.outputs

    torch.compiler.reset()
    dispatch.reset()
    with stand_ins(record):
        yield
    dispatch.reset()
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What is compiled in this file is shared by its tests."""
    counters.reset()


@pytest.fixture(scope="module")
def shared(make_var: Callable[..., VAR]) -> tuple[VAR, Any]:
    """A model and its compiled form, its graphs recorded and all scales known."""
    made = make_var()
    made.plan = Plan.dense(made.schedule, len(made.blocks))
    return made, warm(made)


@pytest.fixture
def model(shared: tuple[VAR, Any]) -> Iterator[VAR]:
    """The model, which a test may change: what it holds is put back."""
    made, plan = shared[0], shared[0].plan
    tables = [(table, dict(table)) for m in made.modules() for table in (m._parameters, m._buffers, m._modules)]
    data = [(t, t.data, t.detach().clone()) for t in (*made.parameters(), *made.buffers())]
    yield made
    made.plan = plan
    vars(made).pop("step", None)
    for table, before in tables:
        table.update(before)  # type: ignore[arg-type]
    for t, memory, values in data:
        t.data = memory.copy_(values)


@pytest.fixture
def fast(shared: tuple[VAR, Any], model: VAR) -> Any:
    return shared[1]


def warm(model: VAR) -> Any:
    """The model compiled, its graphs recorded and all scales known."""
    fast = compile_steps(model, {"inner": "eager"})
    for seed in range(2):
        fast(LABELS, seed=seed)
    return fast


def replayed() -> int:
    return counters.snapshot().get("replayed", 0)


def frames() -> int:
    return int(compile_counters["stats"]["unique_graphs"])


@contextmanager
def between(scale: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` after `scale` of each image."""
    decide = var.decide

    @torch.compiler.disable
    def then(session: Session, *rest: Any) -> None:
        if session.scale == scale:
            act()
        decide(session, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(var, "decide", then)
        yield


def test_images_of_replayed_scales(model: VAR, fast: Any) -> None:
    before = frames()
    for seed, arguments in enumerate(({}, {"cfg": 3.0}, {"top_k": 5}, {})):
        labels = torch.tensor([seed, 9 - seed])
        torch.testing.assert_close(
            fast(labels, seed=seed, **arguments), model(labels, seed=seed, **arguments), **TOLERANCE
        )
        assert replayed() == REPLAYED * (seed + 1)
    assert frames() == before
    assert counters.snapshot() == {"replayed": 4 * REPLAYED}


def test_pruned_images_of_replayed_scales(model: VAR, fast: Any) -> None:
    model.plan = Plan.keep_share(model.schedule, len(model.blocks), 0.5, 3, bucket=2)
    for seed in range(2):
        fast(LABELS, seed=seed)
    counters.reset()
    for seed in range(2):
        with pruned(model, model.plan):
            want = model(LABELS, seed=seed)
        torch.testing.assert_close(fast(LABELS, seed=seed), want, **TOLERANCE)
    assert replayed() == 2 * REPLAYED


def test_plans_in_turn_and_chosen_by_the_image(model: VAR, fast: Any) -> None:
    depth = len(model.blocks)
    dense, half = Plan.dense(model.schedule, depth), Plan.keep_share(model.schedule, depth, 0.5, 4, bucket=2)
    dense, half = (replace(plan, restore="identity", score="mean_distance") for plan in (dense, half))
    choice = Decision(3, "frequency", ((0.0, 0.0), (0.0, 0.0)), (0.0, 1.0), (None, 0), preview=2)
    deciding = replace(dense, decisions=(choice,), alternatives=(half,))
    for plan, followed in ((dense, dense), (half, half), (deciding, half), (dense, dense)):
        model.plan = plan
        for seed in range(2):
            fast(LABELS, seed=seed)
        before = replayed()
        with pruned(model, followed):
            want = model(LABELS, seed=3)
        torch.testing.assert_close(fast(LABELS, seed=3), want, **TOLERANCE)
        assert replayed() == before + REPLAYED


@pytest.mark.parametrize("layer", [0, -1])
def test_infinity(layer: int) -> None:
    tokenizer = BSQVAEConfig(8, 32, (1, 2), 1)
    cfg = InfinityConfig(
        depth=2, embed_dim=64, num_heads=2, text_channels=128, text_maxlen=48, text_pad=16, vae=tokenizer
    )
    model = Infinity.random(cfg, dtype=torch.bfloat16, seed=1)
    model.schedule = ScaleSchedule.from_patch_nums((1, 2, 3, 4, 5, 6))
    fast = compile_steps(model, {"inner": "eager", "plan": "dense"})
    prompts = [[torch.randn(length, 128)] for length in (7, 20)]  # padded to 16 and to 32
    for count in (0, 0, 6, 6):
        for text in prompts:
            before = replayed()
            got = fast(text, seed=3, cfg_layers=layer)
            assert torch.equal(got, model(text, seed=3, cfg_layers=layer))
            assert replayed() == before + count
    assert not [e for e in counters.snapshot() if e.startswith(("not_replayed", "cuda_graph_miss", "fallback"))]


# weights


def test_weights_changed_in_place_between_images(model: VAR, fast: Any) -> None:
    before = fast(LABELS, seed=3)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.mul_(1.1)
    count = replayed()
    after = fast(LABELS, seed=3)
    assert not torch.equal(after, before) and replayed() == count + REPLAYED
    torch.testing.assert_close(after, model(LABELS, seed=3), **TOLERANCE)


def test_weights_loaded_between_images(model: VAR, fast: Any) -> None:
    model.load_state_dict({n: v + 0.1 * torch.randn_like(v.float()).to(v) for n, v in model.state_dict().items()})
    torch.testing.assert_close(fast(LABELS, seed=3), model(LABELS, seed=3), **TOLERANCE)


def _replace_weight(model: VAR) -> None:
    linear: Any = model.blocks[1].attn.proj
    linear.weight = nn.Parameter(linear.weight * -3.0, requires_grad=False)


def _replace_data(model: VAR) -> None:
    linear: Any = model.blocks[1].attn.proj
    linear.weight.data = linear.weight.data * -3.0


def _replace_module(model: VAR) -> None:
    old: Any = model.blocks[1].ffn.fc2
    new = nn.Linear(old.in_features, old.out_features)
    new.load_state_dict({name: -3.0 * value for name, value in old.state_dict().items()})
    model.blocks[1].ffn.fc2 = new.requires_grad_(False)


def _write_weight(model: VAR) -> None:
    linear: Any = model.blocks[1].attn.proj
    with torch.no_grad():
        linear.weight.mul_(-3.0)


def _write_bias(model: VAR) -> None:
    """The biases of queries and values are put together once an image."""
    attn: Any = model.blocks[1].attn
    with torch.no_grad():
        attn.v_bias.add_(5.0)


@pytest.mark.parametrize("change", [_replace_weight, _replace_data, _replace_module, _write_weight, _write_bias])
def test_weights_exchanged_between_images(model: VAR, fast: Any, change: Callable[[VAR], None]) -> None:
    before = fast(LABELS, seed=3)
    change(model)
    for _ in range(3):
        after = fast(LABELS, seed=3)
        torch.testing.assert_close(after, model(LABELS, seed=3), **TOLERANCE)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("change", [_replace_weight, _replace_module, _write_weight, _write_bias])
def test_weights_exchanged_between_scales(
    model: VAR, fast: Any, make_var: Callable[..., VAR], change: Callable[[VAR], None], scale: int
) -> None:
    twin = make_var()
    before = replayed()
    with between(scale, lambda: change(model)):
        got = fast(LABELS, seed=3)
    with between(scale, lambda: change(twin)):
        torch.testing.assert_close(got, twin(LABELS, seed=3), **TOLERANCE)
    late = replayed() - before - (scale + 1)
    assert late == (len(model.schedule) - 1 - scale if change is _write_weight else 0)
    torch.testing.assert_close(fast(LABELS, seed=3), twin(LABELS, seed=3), **TOLERANCE)


def test_a_graph_reads_what_graphs_before_it_left(make_var: Callable[..., VAR]) -> None:
    """The step without guidance serves scales before it as well, in the second image: they are recorded a turn later
    than the last scale, which reads their entropies and deltas. It does so from the second scale on, as that has a
    cache of more than one token."""
    torch.compiler.reset()  # what other tests captured would serve as well
    model = make_var(patch_nums=(2, 3, 4, 5, 6))
    model.plan = Plan.keep_share(model.schedule, len(model.blocks), 0.5, 3, bucket=2, unguided_from=4)
    fast = compile_steps(model, {"inner": "eager"})
    for seed in range(4):
        with pruned(model, model.plan):
            expected = model(LABELS, seed=seed)
        torch.testing.assert_close(fast(LABELS, seed=seed), expected, **TOLERANCE)
    assert any(key.startswith("cuda_graph_postponed") for key in counters.snapshot())


def test_a_flag_changed_between_images(model: VAR, fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(LABELS, seed=3)
    monkeypatch.setattr(model.blocks[1].attn, "scale", 0.5)
    replay = StepReplays.replay

    def refused(*args: Any) -> Any:
        assert replay(*args) is not None, "the step has to run"
        return None

    monkeypatch.setattr(StepReplays, "replay", torch.compiler.disable(refused))
    with pytest.raises(AssertionError, match="the step has to run"):
        fast(LABELS, seed=3)


def test_another_precision(model: VAR, fast: Any) -> None:
    model.double()
    for _ in range(3):
        torch.testing.assert_close(fast(LABELS, seed=3), model(LABELS, seed=3), rtol=0.0, atol=1e-5)


def test_two_models_in_turn(model: VAR, make_var: Callable[..., VAR]) -> None:
    other = make_var()
    other.plan = model.plan
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    compiled = [(m, warm(m)) for m in (model, other)]
    for seed in range(3):
        for m, fast in compiled:
            torch.testing.assert_close(fast(LABELS, seed=seed), m(LABELS, seed=seed), **TOLERANCE)


# user code around a step


def test_generations_inside_one_another(model: VAR, fast: Any) -> None:
    inner: list[Tensor] = []
    depth = [0]

    def generate() -> None:
        if depth[0] == 0:
            depth[0] = 1
            inner.append(torch.compiler.disable(model.forward)(LABELS, seed=8))
            inner.append(fast(LABELS, seed=8))
            depth[0] = 0

    want = model(LABELS, seed=3)
    for _ in range(3):
        with between(3, generate):
            torch.testing.assert_close(fast(LABELS, seed=3), want, **TOLERANCE)
    for image in inner:
        torch.testing.assert_close(image, inner[0], **TOLERANCE)


def test_two_threads(model: VAR, fast: Any) -> None:
    want = {seed: model(LABELS, seed=seed) for seed in range(4)}
    got: dict[int, Tensor] = {}

    def work(seeds: range) -> None:
        for _ in range(3):
            got.update({seed: fast(LABELS, seed=seed) for seed in seeds})

    threads = [threading.Thread(target=work, args=(range(start, 4, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, image in want.items():
        torch.testing.assert_close(got[seed], image, **TOLERANCE)


def test_a_stance_that_forbids_compiled_code(model: VAR, fast: Any) -> None:
    want, count = fast(LABELS, seed=3), replayed()
    assert count == REPLAYED
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(fast(LABELS, seed=3), want, **TOLERANCE)
    assert replayed() == count


class _Keeping(VAR):
    """Its step does more than return something."""

    kept: list[Tensor]

    def step(self, *args: Any) -> Any:
        """As in VAR."""
        out = super().step(*args)
        self.kept.append(out[0])
        return out


def test_a_step_that_keeps_something_runs_at_every_scale(model: VAR) -> None:
    keeping = _Keeping(model.cfg).eval().requires_grad_(False)
    keeping.load_state_dict(model.state_dict())
    keeping.plan, keeping.kept = model.plan, []
    fast = warm(keeping)
    keeping.kept.clear()
    torch.testing.assert_close(fast(LABELS, seed=3), model(LABELS, seed=3), **TOLERANCE)
    assert len(keeping.kept) == len(model.schedule) and replayed() == 0
    assert counters.snapshot()[REFUSED] > 0


def test_a_wrapper_around_the_step_runs_at_every_scale(model: VAR) -> None:
    step, calls = model.step, []

    @torch.compiler.disable(recursive=False)
    def wrapper(*args: Any) -> Any:
        calls.append(len(args))
        return step(*args)

    model.step = wrapper  # type: ignore[method-assign]
    fast = warm(model)
    calls.clear()
    torch.testing.assert_close(fast(LABELS, seed=3), model(LABELS, seed=3), **TOLERANCE)
    assert calls == [5] * 2 * len(model.schedule) and replayed() == 0


def test_autocast_that_begins_between_scales(model: VAR, fast: Any) -> None:
    region = torch.autocast("cpu", torch.bfloat16)
    images, counts = [], []
    for run in (fast, fast, fast, model):
        with between(2, region.__enter__):
            try:
                images.append(run(LABELS, seed=3))
            finally:
                region.__exit__(None, None, None)
        counts.append(replayed())
    assert counts[0] == 3, "what was replayed after scale 2 was in another precision"
    for image in images[:3]:
        torch.testing.assert_close(image, images[3], rtol=0.0, atol=0.1)


def test_other_sizes_are_run_and_then_replayed(model: VAR, fast: Any) -> None:
    one = torch.tensor([3])
    for _ in range(4):
        before = replayed()
        torch.testing.assert_close(fast(one, seed=3), model(one, seed=3), **TOLERANCE)
    assert replayed() == before + REPLAYED
    torch.testing.assert_close(fast(LABELS, seed=3), model(LABELS, seed=3), **TOLERANCE)


# what is looked at


def _frames_of(run: Callable[..., Any], *args: Any) -> list[Any]:
    found: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(pure_frame())
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(run, backend=backend, dynamic=True)(*args)
    return found


class _Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept: list[Tensor] = []
        self.count = 7

    def pure(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        grown = []
        for cache in caches:
            grown.append(torch.cat((cache, x)))
        return x * self.weight + x.shape[0], grown

    def keeps(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return x * self.weight

    def sets(self, x: Tensor) -> Tensor:
        self.kept = [x * 2]
        return x * self.weight

    def breaks(self, x: Tensor) -> Tensor:
        y = x * self.weight
        torch._dynamo.graph_break()
        return y + 1

    def counts(self, x: Tensor) -> Tensor:
        return x * self.weight + self.count


def test_what_is_nothing_but_its_graph() -> None:
    steps, x = _Steps(), torch.ones(2, 3)
    assert [f.code for f in _frames_of(steps.pure, x, [torch.ones(4, 3)])] == [_Steps.pure.__code__]
    for run in (steps.keeps, steps.sets):
        assert _frames_of(run, x) == [None]
    first, second = _frames_of(steps.breaks, x)
    assert first is None and second.code is not _Steps.breaks.__code__
    assert pure_frame() is None


@torch.no_grad()
def test_guards_of_a_compilation() -> None:
    steps, x, caches = _Steps(), torch.ones(2, 3), [torch.ones(4, 3)]
    gone, guards = (_frames_of(steps.pure, x, caches)[0].guards() for _ in range(2))  # a reset lies between them
    assert guards.hold(steps.pure, (torch.ones(5, 3), caches))
    for method, args in ((steps.pure, (x.double(), caches)), (steps.pure, (x,)), (steps.keeps, (x, caches))):
        assert not guards.hold(method, args)
    assert not gone.hold(steps.pure, (x, caches)) and gone.about_model() is None

    def recompiled(*args: Any) -> str | None:
        torch.compile(steps.pure, backend="eager")(*args)
        code = _Steps.pure.__code__
        return Guards(code, eval_frame._debug_get_cache_entry_list(code)[0].code).about_model()

    assert recompiled(x, [*caches, x]) == guards.about_model(), "the arguments differ alone"
    steps.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert not guards.hold(steps.pure, (x, caches))
    assert recompiled(x, caches) != guards.about_model()


def test_numbers_of_the_model() -> None:
    steps = _Steps()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        assert _frames_of(steps.counts, torch.ones(2, 3)) == [None]


def test_tensors_that_are_alike() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    like = tensor_guard([a, b])
    assert like(a + 1, b)
    others = [b.T, a.double(), torch.ones(3, 3), a.clone().requires_grad_(), nn.Parameter(a), a.to("meta")]
    assert not any(like(other, b) for other in others)
    assert not tensor_guard([a, a + 1])(a, a)


def test_modes() -> None:
    same = mode_guard()
    assert same()
    regions: list[Any] = [torch.no_grad(), torch.autocast("cpu"), torch.inference_mode(), torch.device("cpu")]
    for region in regions:
        with region:
            assert not same()
    assert same()
