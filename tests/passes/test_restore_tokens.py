"""The delta of an older scale is resized inside the graphs of pruned and skipped layers, as `resize_tokens` does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from toprovar_compile.inductor import compile_graph
from toprovar_compile.passes import placeholders, prove_token_axis, prune_tokens, restore_tokens
from toprovar_compile.policies.tokens import Grid, area_tables, resize_tokens

Trace = Callable[..., GraphModule]
C = 8
CPU = torch.device("cpu")
GRIDS = [((1, 1), (3, 4)), ((2, 3), (4, 6)), ((3, 3), (5, 7)), ((4, 6), (4, 7))]


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _inputs(batch: int, source: Grid, target: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = _normal(batch, target[0] * target[1], C, dtype=dtype)
    return x, _normal(batch, source[0] * source[1], C, dtype=dtype) * 3, _normal(batch, 1, C, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "target"), GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_skipped_and_pruned(trace: Trace, dtype: torch.dtype, source: Grid, target: Grid, batch: int) -> None:
    x, delta, cond = _inputs(batch, source, target, dtype)
    gm = trace(lambda x, c: x * c + 1, (x, cond), (x.shape[1],))
    tables = area_tables(source, target, CPU)
    base = x + resize_tokens(delta, source, target)
    skipped = restore_tokens(gm)
    assert [n.name for n in placeholders(skipped)] == ["x", "delta", "rows", "shares"]
    assert torch.equal(skipped(x, delta, *tables)[0], base)

    pruned = prune_tokens(gm, prove_token_axis(gm), cached=True, resized=True)
    names = [n.name for n in placeholders(pruned)]
    assert names == ["x", "idx", "delta", "rows", "shares", placeholders(gm)[1].name]
    idx = torch.rand(batch, x.shape[1]).argsort(1)[:, :4].sort(1).values
    at = idx.unsqueeze(-1).expand(-1, -1, C)
    want = base.scatter(1, at, x.gather(1, at) * cond + 1)
    assert torch.equal(pruned(x, idx, delta, *tables, cond)[0], want)


def test_compiled_code_writes_no_resized_delta(trace: Trace) -> None:
    source, target = (3, 3), (5, 7)
    x, delta, cond = _inputs(2, source, target, torch.float32)
    gm = trace(lambda x, c: x * c + 1, (x, cond), (x.shape[1],))
    pruned = prune_tokens(gm, prove_token_axis(gm), cached=True, resized=True)
    idx = torch.tensor([[0, 3, 17, 34], [1, 2, 20, 33]])
    args = [x, idx, delta, *area_tables(source, target, CPU), cond]
    stream = {0: "batch", 1: "n"}
    dims = [stream, {0: "batch", 1: "k"}, {0: "batch", 1: "old"}, {1: "n"}, {1: "n"}, {0: "batch"}]
    with config.patch(force_disable_caches=True):  # what is in the cache on disk shows no code
        compiled, codes = run_and_get_code(lambda: compile_graph(pruned, args, dims, "inductor"))
    (code,) = codes
    assert code.split("def call")[1].count("= empty_strided") == 1
    torch.testing.assert_close(compiled.call(*args)[0], pruned(*args)[0])
    x, delta, cond = _inputs(3, (2, 2), (3, 3), torch.float32)  # other sizes, one code
    args = [x, torch.tensor([[0, 8], [1, 2], [3, 4]]), delta, *area_tables((2, 2), (3, 3), CPU), cond]
    torch.testing.assert_close(compiled.call(*args)[0], pruned(*args)[0])
