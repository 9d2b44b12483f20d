"""Drawing bits and decoding on a CUDA device: the draws of torch.multinomial, also inside a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.bench.timeline import Timeline
from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig, sample_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DECODED = 0.05  # bfloat16 convolutions against float32 ones, of pixels in 0..1


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def logits(n: int) -> Tensor:
    return 3 * torch.randn(1, n, 64, device="cuda", generator=generator(1))


@pytest.mark.parametrize("n", [1, 36, 576, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), [(900, 0.97), (0, 0.0), (1, 0.5)])
def test_bits_are_those_that_filtering_and_multinomial_draw(n: int, top_k: int, top_p: float) -> None:
    x = logits(n)
    got, other = generator(7), generator(7)
    pairs = x.view(-1, 2)
    p = pairs.softmax(1)
    unlikely = (p <= 1 - top_p) if top_p else torch.zeros_like(p, dtype=torch.bool)
    if top_k == 1:
        unlikely |= p < p.amax(1, keepdim=True)
    p = pairs.masked_fill(unlikely & (pairs < pairs.amax(1, keepdim=True)), -torch.inf).softmax(1)
    for _ in range(2):
        want = torch.multinomial(p, 1, replacement=True, generator=other)
        assert torch.equal(sample_bits(x, top_k, top_p, got).view(-1, 1), want)


def test_a_cuda_graph_draws_on() -> None:
    x, rng, other = logits(256), generator(3), generator(3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample_bits(x, 900, 0.97, generator(0))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        bits = sample_bits(x, 900, 0.97, rng)
    for _ in range(3):
        graph.replay()
        assert torch.equal(bits, sample_bits(x, 900, 0.97, other))


def test_decoding_compiles_in_bfloat16() -> None:
    torch.manual_seed(0)
    vae: Any = BSQVAE(BSQVAEConfig(16, 64, (1, 2), 1)).eval().requires_grad_(False).cuda()
    summed = torch.randn(1, 16, 32, 32, device="cuda")
    want = vae.decode(summed)
    got = torch.compile(vae.bfloat16().decode, fullgraph=True)(summed)
    assert got.dtype == torch.bfloat16 and got.shape == (1, 3, 64, 64)
    torch.testing.assert_close(got.float(), want, atol=DECODED, rtol=0)


def test_kernels_and_launches_of_spans_are_counted() -> None:
    line = Timeline(torch.device("cuda"))
    x = torch.randn(64, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.add(1).mul(2)  # loads the kernels
    with torch.cuda.graph(graph):
        y = x.add(1).mul(2)

    def call() -> None:
        x.add(1)
        x.mul(2)
        x.sub(3)
        line.mark("graph")
        graph.replay()
        line.mark("nothing")

    first, replayed, nothing = line.profile(call, "eager")
    assert (first.name, first.kernels, first.launches) == ("eager", 3, 3)
    assert (replayed.name, replayed.kernels, replayed.launches) == ("graph", 2, 1)
    assert (nothing.kernels, nothing.launches) == (0, 0)
    _, spans = line.record(call, "eager")
    assert [s.name for s in spans] == ["eager", "graph", "nothing"]
    assert all(s.ms > 0 for s in spans)
    assert y.shape == x.shape
