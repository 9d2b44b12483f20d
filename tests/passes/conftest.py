"""Graphs to run passes on: functions traced through AOT with an open number of tokens, and a VAR through Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import aot_module_simplified
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig
from toprovar_compile.passes import DYNAMO_PASSES, PassContext, run_passes

Trace = Callable[..., GraphModule]


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        out = self.function(*args)
        return out if isinstance(out, tuple) else (out,)


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor], open_sizes: Sequence[int]) -> GraphModule:
    """The functional graph of `function`; dimensions of these sizes are open, equal ones by one symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for i, value in enumerate(inputs):
        dims = [DimDynamic.DUCK if size in open_sizes else DimDynamic.STATIC for size in value.shape]
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        fakes.append(mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"input_{i}")))
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad(), tracing(TracingContext(mode)):
        aot_module_simplified(_Function(function), fakes, fw_compiler=keep, inference_compiler=keep)
    return graphs[0]


@pytest.fixture(scope="session")
def trace() -> Trace:
    """trace(function, inputs, open_sizes) -> functional ATen graph with example values."""
    return _trace


@pytest.fixture(scope="session")
def steps() -> list[GraphModule]:
    """The functional step graphs of a VAR of two layers, attention rewritten.

    In order: the first scale, the second, all later ones; batch 1, doubled for guidance.
    """
    vae = VQVAEConfig(vocab_size=16, z_channels=4, ch=32, ch_mult=(1,), num_res_blocks=1, patch_nums=(1, 2, 3, 4))
    config = VARConfig(depth=2, embed_dim=16, num_heads=2, num_classes=4, shared_aln=True, vae=vae)
    model = VAR(config).eval().requires_grad_(False)
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        copy = Graph()
        copy.output(copy.graph_copy(gm.graph, {}))
        step = GraphModule(gm, copy)
        run_passes(step, DYNAMO_PASSES, PassContext())
        return aot_module_simplified(step, inputs, fw_compiler=keep, inference_compiler=keep)

    torch.compiler.reset()
    model.step = torch.compile(model.step, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    model(torch.tensor([1]), seed=0)
    torch.compiler.reset()
    return graphs
