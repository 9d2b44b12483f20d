"""The eager semantics of pruning, checked against what they say about blocks, caches and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError, PlanError, UnsupportedGraphError
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import DENSE, SKIP, LayerAction, Plan, ScalePlan
from toprovar_compile.policies.tokens import resize_tokens, select_tokens
from toprovar_compile.reference import attention_entropy, pruned
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import current_session

LABELS = torch.tensor([1, 7])
Key = tuple[int, int]


def _prune(keep: int) -> LayerAction:
    return LayerAction("prune", keep)


def _plan(model: VAR, changes: dict[Key, LayerAction], **fields: Any) -> Plan:
    depth, count = len(model.blocks), len(model.schedule)
    rows = tuple(ScalePlan(layers=tuple(changes.get((s, i), DENSE) for i in range(depth))) for s in range(count))
    return Plan(model.schedule, depth, rows, **fields)


@contextmanager
def _recorded(model: VAR) -> Iterator[dict[Key, tuple[Tensor, ...]]]:
    """Inputs and outputs (x, mod, k_cache, v_cache, out, k, v) of every block by (scale, layer)."""
    calls: dict[Key, tuple[Any, ...]] = {}

    def hook(layer: int) -> Callable[..., None]:
        def record(_module: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> None:
            session = current_session()
            assert session is not None
            calls[session.scale, layer] = (*args, *result)

        return record

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(model.blocks)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _naive_entropy(q: Tensor, k: Tensor, scale: float) -> Tensor:
    a = (q.double() @ k.double().transpose(-1, -2) * scale).softmax(-1)
    return -(a * a.log()).nan_to_num(0).sum(-1).mean(1)


# attention entropy


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 9), (300, 513)])
def test_entropy_is_the_definition(n: int, m: int) -> None:
    q, k = torch.randn(2, 3, n, 8) * 3, torch.randn(2, 3, m, 8) * 3
    got = attention_entropy(q, k, scale=0.7)
    assert got.shape == (2, n) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), _naive_entropy(q, k, 0.7), atol=2e-6, rtol=1e-5)


def test_entropy_of_masked_attention() -> None:
    q, k = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 9, 8)
    mask = torch.rand(6, 9) > 0.4
    mask[:, 0] = True
    mask[2] = False
    got = attention_entropy(q, k, mask)
    bias = torch.zeros(6, 9).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attention_entropy(q, k, bias), got)
    row = attention_entropy(q[:, :, 1:2], k[:, :, mask[1]])
    torch.testing.assert_close(got[:, 1:2], row)
    assert got[:, 2].tolist() == [0, 0], "a query that attends to nothing"
    assert attention_entropy(q, k[:, :, :0]).tolist() == [[0] * 6] * 2


# dense


@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_dense_plan_is_the_plain_model(tiny_var: VAR, cfg: float) -> None:
    plain = tiny_var(LABELS, seed=3, cfg=cfg)
    plan = Plan.dense(tiny_var.schedule, len(tiny_var.blocks), tiny_var.fingerprint())
    with pruned(tiny_var, plan, measure_all=True) as trace:
        assert torch.equal(tiny_var(LABELS, seed=3, cfg=cfg), plain)
    assert not trace.kept
    assert trace.tokens[4, 2] == 36 and trace.kv_length[4, 2] == tiny_var.schedule.total
    assert torch.equal(tiny_var(LABELS, seed=3, cfg=cfg), plain), "the model is as before"


def test_trace_holds_measured_entropy_of_all_layers(tiny_var: VAR) -> None:
    calls: list[tuple[Tensor, Tensor, float]] = []
    original = F.scaled_dot_product_attention

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                calls.append((args[0], args[1], kwargs["scale"]))
            return func(*args, **(kwargs or {}))

    plan = Plan.dense(tiny_var.schedule, len(tiny_var.blocks))
    with pruned(tiny_var, plan, measure_all=True) as trace, Recorder():
        tiny_var(LABELS, seed=3)
    in_order = [_naive_entropy(*call) for call in calls]
    assert len(in_order) >= 15
    for i, (key, entropy) in enumerate(sorted(trace.entropy.items())):
        assert entropy.shape == (4, tiny_var.schedule.tokens[key[0]]), "both halves of CFG"
        torch.testing.assert_close(entropy.double(), in_order[i], atol=2e-6, rtol=1e-5)


def test_only_what_a_decision_reads_is_measured(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(3, 1): _prune(7), (4, 1): _prune(9), (4, 0): SKIP})
    with pruned(tiny_var, plan) as trace:
        tiny_var(LABELS, seed=3)
    assert set(trace.entropy) == {(2, 1), (3, 1)} == plan.reads_entropy()


# prune


@pytest.mark.parametrize("restore", ["cached", "identity"])
@pytest.mark.parametrize("direction", ["low_entropy", "high_entropy"])
@pytest.mark.parametrize("keep", [1, 10, 35])
def test_prune(tiny_var: VAR, restore: Any, direction: Any, keep: int) -> None:
    plan = _plan(tiny_var, {(4, 1): _prune(keep)}, restore=restore, direction=direction)
    with pruned(tiny_var, plan) as trace, _recorded(tiny_var) as calls:
        tiny_var(LABELS, seed=3)
    block = tiny_var.blocks[1]
    before, (x, mod, k_cache, v_cache, out, k, v) = calls[3, 1], calls[4, 1]
    idx = trace.kept[4, 1]
    entropy = resize_tokens(trace.entropy[3, 1], (4, 4), (6, 6))
    assert torch.equal(idx, select_tokens(entropy, keep, selection="topk", direction=direction))
    delta = resize_tokens(before[4] - before[0], (4, 4), (6, 6)) if restore == "cached" else 0
    wanted = x + delta
    for row in range(4):
        one = slice(row, row + 1)
        y, k_row, v_row = block(x[one, idx[row]], mod[one], k_cache[one], v_cache[one])
        wanted[row, idx[row]] = y[0]
        torch.testing.assert_close(k[one], k_row)
        torch.testing.assert_close(v[one], v_row)
    torch.testing.assert_close(out, wanted)
    assert k.shape[2] == k_cache.shape[2] + keep == trace.kv_length[4, 1]
    assert trace.tokens[4, 1] == keep and trace.tokens[4, 0] == 36


def test_kept_rows_are_the_block_on_the_kept_tokens(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(4, 1): _prune(10)})
    with pruned(tiny_var, plan) as trace, _recorded(tiny_var) as calls:
        tiny_var(LABELS, seed=3)
    x, mod, k_cache, v_cache, out, _, _ = calls[4, 1]
    rows = trace.kept[4, 1].unsqueeze(-1).expand(-1, -1, x.shape[-1])
    y, _, _ = tiny_var.blocks[1](x.gather(1, rows), mod, k_cache, v_cache)
    assert torch.equal(out.gather(1, rows), y)


def test_cache_lengths_differ_by_layer(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(3, 0): _prune(5), (3, 2): SKIP, (4, 0): _prune(7)})
    with pruned(tiny_var, plan) as trace:
        tiny_var(LABELS, seed=3)
    lengths = {layer: [trace.kv_length[s, layer] for s in range(5)] for layer in range(3)}
    assert lengths == {0: [1, 5, 14, 19, 26], 1: [1, 5, 14, 30, 66], 2: [1, 5, 14, 14, 50]}


def test_pruned_scale_updates_only_its_kept_positions(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(3, 1): _prune(6), (4, 1): _prune(6)})
    with pruned(tiny_var, plan) as trace:
        tiny_var(LABELS, seed=3)
    old = resize_tokens(trace.entropy[2, 1], (3, 3), (4, 4))
    new, idx = trace.entropy[3, 1], trace.kept[3, 1]
    changed = torch.zeros_like(old, dtype=torch.bool).scatter(1, idx, True)
    assert torch.equal(new[~changed], old[~changed])
    assert not torch.equal(new[changed], old[changed])


def test_delta_comes_from_the_last_dense_scale(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(2, 1): _prune(4), (3, 1): SKIP, (4, 1): _prune(6)})
    with pruned(tiny_var, plan) as trace, _recorded(tiny_var) as calls:
        tiny_var(LABELS, seed=3)
    first, last = calls[1, 1], calls[4, 1]
    delta = resize_tokens(first[4] - first[0], (2, 2), (6, 6))
    dropped = torch.ones(4, 36, dtype=torch.bool).scatter(1, trace.kept[4, 1], False)
    torch.testing.assert_close(last[4][dropped], (last[0] + delta)[dropped])
    # Scale 3 measured nothing, so scale 4 chooses by the map of scale 2.
    entropy = resize_tokens(trace.entropy[2, 1], (3, 3), (6, 6))
    wanted = select_tokens(entropy, 6, selection="topk", direction="low_entropy")
    assert torch.equal(trace.kept[4, 1], wanted)


@pytest.mark.parametrize("restore", ["cached", "identity"])
def test_kept_sets_do_not_depend_on_the_other_images(tiny_var: VAR, restore: Any) -> None:
    # Only scale 0 is sampled with equal inputs for both batches, so the pruning is put there.
    plan = _plan(tiny_var, {(1, 1): _prune(2)}, restore=restore)
    with pruned(tiny_var, plan, measure_all=True) as trace:
        tiny_var(LABELS, seed=3)
        both = trace.entropy[0, 1], trace.kept[1, 1]
        tiny_var(LABELS[:1], seed=3)
        one = trace.entropy[0, 1], trace.kept[1, 1]
    torch.testing.assert_close(both[0][[0, 2]], one[0])
    assert torch.equal(both[1][[0, 2]], one[1])


# skip, exit, selection, regions


@pytest.mark.parametrize("restore", ["cached", "identity"])
def test_skip(tiny_var: VAR, restore: Any) -> None:
    plan = _plan(tiny_var, {(4, 1): SKIP}, restore=restore)
    with pruned(tiny_var, plan) as trace, _recorded(tiny_var) as calls:
        tiny_var(LABELS, seed=3)
    before, (x, _, k_cache, v_cache, out, k, v) = calls[3, 1], calls[4, 1]
    delta = resize_tokens(before[4] - before[0], (4, 4), (6, 6)) if restore == "cached" else 0
    assert torch.equal(out, x + delta)
    assert k is k_cache and v is v_cache
    assert trace.tokens[4, 1] == 0


def test_skip_from_the_first_scale_on(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(0, 1): SKIP, (1, 1): SKIP}, restore="identity")
    with pruned(tiny_var, plan) as trace:
        images = tiny_var(LABELS, seed=3)
    assert images.isfinite().all()
    assert [trace.kv_length[s, 1] for s in range(5)] == [0, 0, 9, 25, 61]


def test_exit_leaves_the_generation(tiny_var: VAR) -> None:
    plan = Plan.keep_share(tiny_var.schedule, 3, 1.0, 5, exit_scale=3)
    with pruned(tiny_var, plan) as trace:
        images = tiny_var(LABELS, seed=3)
    assert max(s for s, _ in trace.tokens) == 2
    assert images.shape == tiny_var(LABELS, seed=3).shape


def test_gumbel_is_seeded(tiny_var: VAR) -> None:
    kept = []
    for seed in (0, 0, 1):
        plan = _plan(
            tiny_var,
            {(4, 1): _prune(12)},
            selection="gumbel",
            seed=seed,
            alpha_max=0.8,
            layer_scores=(0.2, 0.9, 0.4),
        )
        with pruned(tiny_var, plan) as trace:
            tiny_var(LABELS, seed=3)
        kept.append(trace.kept[4, 1])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_regions_reach_the_selection(tiny_var: VAR) -> None:
    kept = []
    for share in (0.0, 0.5):
        plan = _plan(tiny_var, {(4, 1): _prune(18)}, region_share=share)
        with pruned(tiny_var, plan) as trace:
            tiny_var(LABELS, seed=3)
        kept.append(trace.kept[4, 1])
    assert not torch.equal(*kept)


@pytest.mark.parametrize("shared_aln", [True, False])
def test_both_kinds_of_modulation(make_var: Callable[..., VAR], shared_aln: bool) -> None:
    model = make_var(shared_aln=shared_aln)
    plan = _plan(model, {(4, i): _prune(9) for i in range(3)})
    with pruned(model, plan) as trace:
        assert model(LABELS, seed=3).isfinite().all()
    assert len(trace.kept) == 3


def test_trace_holds_the_latest_generation(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(4, 1): _prune(9)})
    with pruned(tiny_var, plan) as trace:
        tiny_var(LABELS, seed=3)
        assert trace.kept[4, 1].shape == (4, 9)
        first = tiny_var(LABELS[:1], seed=5)
        assert trace.kept[4, 1].shape == (2, 9)
        assert torch.equal(tiny_var(LABELS[:1], seed=5), first)


# errors


def test_blocks_are_restored_after_an_error(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {(4, 1): _prune(9)})
    with pytest.raises(OptionError, match="out of range"), pruned(tiny_var, plan):
        tiny_var(torch.tensor([999]))
    assert not any("forward" in vars(block) for block in tiny_var.blocks)


def test_a_plan_of_another_model_is_refused(tiny_var: VAR) -> None:
    for plan in (
        dataclasses.replace(_plan(tiny_var, {}), model="0000"),
        Plan.dense(tiny_var.schedule, 4),
        _plan(tiny_var, {(0, 0): SKIP}),
    ):
        with pytest.raises(PlanError), pruned(tiny_var, plan):
            pass


def test_nesting_is_refused(tiny_var: VAR) -> None:
    plan = _plan(tiny_var, {})
    with pruned(tiny_var, plan), pytest.raises(OptionError, match="one such"), pruned(tiny_var, plan):
        pass
    assert not any("forward" in vars(block) for block in tiny_var.blocks)


def test_a_model_without_blocks_is_refused() -> None:
    plan = Plan.dense(ScaleSchedule.from_patch_nums((1, 2)), 1)
    with pytest.raises(OptionError, match="Linear has no attribute 'blocks'"), pruned(torch.nn.Linear(1, 1), plan):
        pass


def test_a_block_outside_a_generation_is_refused(tiny_var: VAR) -> None:
    x = torch.zeros(2, 1, 32)
    with pruned(tiny_var, _plan(tiny_var, {})), pytest.raises(OptionError, match="outside a generation"):
        tiny_var.blocks[0](x, x, None, None)


def test_attention_that_cannot_be_measured(tiny_var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.dense(tiny_var.schedule, 3)
    original = F.scaled_dot_product_attention

    def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return original(q, k, v, is_causal=True, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", causal)
    monkeypatch.setattr("toprovar_compile.reference._ATTENTION", original)
    with pruned(tiny_var, plan, measure_all=True), pytest.raises(UnsupportedGraphError, match="options"):
        tiny_var(LABELS, seed=3)


def test_no_attention_at_all(tiny_var: VAR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, scale: q)
    with (
        pruned(tiny_var, Plan.dense(tiny_var.schedule, 3), measure_all=True),
        pytest.raises(UnsupportedGraphError, match="no attention call"),
    ):
        tiny_var(LABELS, seed=3)
