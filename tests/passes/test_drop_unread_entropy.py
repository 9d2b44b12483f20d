"""Entropy is computed exactly where it is read."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.kernels import fae, fae_cached
from toprovar_compile.passes import PASSES_OF_A_VARIANT as PASSES
from toprovar_compile.passes import (
    PassContext,
    check_drop_unread_entropy,
    drop_unread_entropy,
    read_entropy,
    run_passes,
    split_layers,
    write_kv_cache,
)

Trace = Callable[..., GraphModule]
# Without entropy the attention is another kernel: sums in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
Q = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))


def _graph(*reads: int, extra: int = 0) -> GraphModule:
    """A graph with an attention that reads these items of it, and `extra` attentions whose item 0 is read."""
    graph = Graph()
    q = graph.placeholder("q")
    outputs = []
    for items in (reads, *((0,),) * extra):
        node = graph.call_function(fae, (q, q, q, None, 0.5, True))
        outputs += [graph.call_function(operator.getitem, (node, i)) for i in items]
    graph.output(tuple(outputs))
    return GraphModule(torch.nn.Module(), graph)


def _flags(gm: GraphModule) -> list[bool]:
    return [n.args[-1] for n in gm.graph.nodes if n.target in (fae, fae_cached)]


def test_unread_entropy_is_turned_off() -> None:
    gm = _graph(0, extra=1)
    before = gm(Q)
    assert drop_unread_entropy(gm, PassContext()).matched == 2
    check_drop_unread_entropy(gm)
    assert _flags(gm) == [False, False]
    torch.testing.assert_close(gm(Q), before, **TOLERANCE)


def test_read_entropy_stays() -> None:
    gm = _graph(0, 1, extra=1)
    before = gm(Q)
    assert drop_unread_entropy(gm, PassContext()).matched == 1
    assert _flags(gm) == [True, False]
    torch.testing.assert_close(gm(Q), before, **TOLERANCE)


def test_an_item_that_nobody_reads_counts_as_unread() -> None:
    gm = _graph(0)
    node = next(n for n in gm.graph.nodes if n.target is fae)
    with gm.graph.inserting_after(node):
        gm.graph.call_function(operator.getitem, (node, 1))
    assert drop_unread_entropy(gm, PassContext()).matched == 1


def test_second_run_finds_nothing() -> None:
    gm = _graph(0, 1, extra=2)
    drop_unread_entropy(gm, PassContext())
    assert drop_unread_entropy(gm, PassContext()).matched == 0


@pytest.mark.parametrize(("reads", "entropy"), [((0,), True), ((0, 1), False)])
def test_checker_raises_on_a_wrong_flag(reads: tuple[int, ...], entropy: bool) -> None:
    gm = _graph(*reads)
    node = next(n for n in gm.graph.nodes if n.target is fae)
    node.args = (*node.args[:-1], entropy)
    with pytest.raises(PassInvariantError, match=f"{node.name} has entropy={entropy}"):
        check_drop_unread_entropy(gm)


def test_the_runner_checks() -> None:
    reports = run_passes(_graph(0), PASSES, PassContext())
    assert [str(r) for r in reports] == [
        "drop_unread_entropy: 1 rewritten",
        "fuse_gelu: 0 rewritten",
        "fuse_rotation: 0 rewritten",
    ]


# read_entropy


def test_read_entropy_adds_the_output(trace: Trace) -> None:
    def layer(x: Tensor) -> Tensor:
        q = x.view(2, x.shape[1], 2, 4).transpose(1, 2)
        return x + fae(q, q, q, None, 0.5, True)[0].transpose(1, 2).reshape(x.shape)

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    gm = trace(layer, (x,), (5,))
    before = str(gm.graph)
    measured = read_entropy(gm)
    assert drop_unread_entropy(measured, PassContext()).matched == 0
    out, entropy = measured(x)
    q = x.view(2, 5, 2, 4).transpose(1, 2)
    torch.testing.assert_close(entropy, fae(q, q, q, None, 0.5, True)[1])
    assert torch.equal(out, gm(x)[0])
    assert str(gm.graph) == before


def test_read_entropy_takes_the_attention_on_the_cache(steps: list[GraphModule]) -> None:
    layer = split_layers(steps[2]).layers[0].piece.graph
    write_kv_cache(layer)
    measured = read_entropy(layer)
    (node,) = (n for n in measured.graph.nodes if n.target is fae_cached)
    assert sorted(u.args[1] for u in node.users) == [0, 1]
    assert drop_unread_entropy(layer, PassContext()).matched == 1


@pytest.mark.parametrize(("extra", "count"), [(1, 2), (2, 3)])
def test_read_entropy_of_several_attentions(extra: int, count: int) -> None:
    with pytest.raises(PassInvariantError, match=f"the layer has {count} self-attentions"):
        read_entropy(_graph(0, extra=extra))


def test_read_entropy_without_attention(trace: Trace) -> None:
    with pytest.raises(PassInvariantError, match="the layer has 0 self-attentions"):
        read_entropy(trace(lambda x: x * 2, (Q,), ()))
