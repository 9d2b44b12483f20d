"""The pruned form of a layer: what it gathers, what it restores, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from toprovar_compile.errors import PassInvariantError
from toprovar_compile.passes import (
    TokenProof,
    placeholders,
    prove_token_axis,
    prune_tokens,
    split_layers,
    write_kv_cache,
)

B, N, K, C = 2, 9, 4, 8
Trace = Callable[..., GraphModule]
aten = torch.ops.aten


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, DELTA, COND = _normal(B, N, C), _normal(B, N, C) * 2, _normal(B, 1, C)
IDX = torch.tensor([[0, 3, 4, 8], [1, 2, 3, 7]])
ROWS = IDX.unsqueeze(-1).expand(-1, -1, C)


def _counts(gm: GraphModule) -> Counter[Any]:
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


def _prune(gm: GraphModule, *, cached: bool) -> GraphModule:
    proof = prove_token_axis(gm)
    assert proof.holds, proof.reason
    return prune_tokens(gm, proof, cached=cached)


def test_identity_restores_the_tokens_themselves(trace: Trace) -> None:
    gm = trace(lambda x, c: x * c + 1, (X, COND), (N,))
    before = str(gm.graph)
    pruned = _prune(gm, cached=False)
    assert [n.name for n in placeholders(pruned)] == ["x", "idx", placeholders(gm)[1].name]
    found = _counts(pruned)
    assert (found[aten.gather.default], found[aten.scatter.src], found[aten.mul.Tensor]) == (1, 1, 1)
    assert found[aten.add.Tensor] == 1
    assert str(gm.graph) == before
    assert torch.equal(pruned(X, IDX, COND)[0], X.scatter(1, ROWS, X.gather(1, ROWS) * COND + 1))


def test_cached_restores_with_the_delta(trace: Trace) -> None:
    gm = trace(lambda x, c: x * c + 1, (X, COND), (N,))
    pruned = _prune(gm, cached=True)
    assert [n.name for n in placeholders(pruned)] == ["x", "idx", "delta", placeholders(gm)[1].name]
    assert _counts(pruned)[aten.add.Tensor] == 2
    want = (X + DELTA).scatter(1, ROWS, X.gather(1, ROWS) * COND + 1)
    assert torch.equal(pruned(X, IDX, DELTA, COND)[0], want)


def test_one_token_and_all_tokens(trace: Trace) -> None:
    pruned = _prune(trace(lambda x: x * 2, (X,), (N,)), cached=False)
    assert torch.equal(pruned(X, IDX[:, :1])[0][0, 0], X[0, 0] * 2)
    assert torch.equal(pruned(X, torch.arange(N).expand(B, -1))[0], X * 2)


def test_every_input_with_tokens_is_gathered(trace: Trace) -> None:
    rope, table = _normal(B, 3, N, C), _normal(1, N, C)
    pruned = _prune(trace(lambda x, r, t: x * r.sum(1) + t, (X, rope, table), (N,)), cached=False)
    assert _counts(pruned)[aten.gather.default] == 3
    want = X.scatter(1, ROWS, (X * rope.sum(1) + table).gather(1, ROWS))
    torch.testing.assert_close(pruned(X, IDX, rope, table)[0], want)


def test_other_open_dimensions_are_gathered_whole(trace: Trace) -> None:
    parts = _normal(B, 5, N, C)
    pruned = _prune(trace(lambda x, p: x + p.sum(1), (X, parts), (N, 5)), cached=False)
    want = X.scatter(1, ROWS, (X + parts.sum(1)).gather(1, ROWS))
    torch.testing.assert_close(pruned(X, IDX, parts)[0], want)


def test_further_outputs_are_those_of_the_kept_tokens(trace: Trace) -> None:
    pruned = _prune(trace(lambda x: (x * 2, x.sum(2)), (X,), (N,)), cached=False)
    torch.testing.assert_close(pruned(X, IDX)[1], X.sum(2).gather(1, IDX))


def test_a_layer_that_returns_its_input(trace: Trace) -> None:
    assert torch.equal(_prune(trace(lambda x: x, (X,), (N,)), cached=False)(X, IDX)[0], X)


def test_layer_of_a_var(steps: list[GraphModule]) -> None:
    gm = split_layers(steps[2]).layers[0].piece.graph
    write_kv_cache(gm)
    before, after = _counts(gm), _counts(_prune(gm, cached=True))
    assert (after[aten.gather.default], after[aten.scatter.src]) == (1, 1)
    assert after[aten.add.Tensor] == before[aten.add.Tensor] + 1
    for target in (aten.addmm.default, aten.native_layer_norm.default, torch.ops.toprovar.fae_cached.default):
        assert after[target] == before[target]


@pytest.mark.parametrize("reason", ["node mean: it reduces over the tokens"])
def test_no_proof(trace: Trace, reason: str) -> None:
    gm = trace(lambda x: x * 2, (X,), (N,))
    with pytest.raises(PassInvariantError, match=reason):
        prune_tokens(gm, TokenProof(None, (), reason), cached=False)
