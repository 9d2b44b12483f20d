"""Our BSQ-VAE and our drawing of bits against the official code, FoundationVision/Infinity, with equal weights.

TOPROVAR_INFINITY_SOURCE is the path of a checkout of that repository.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.bench import infinity_official
from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig, sample_bits

ROOT = os.environ.get("TOPROVAR_INFINITY_SOURCE", "")
pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        not ROOT, reason="TOPROVAR_INFINITY_SOURCE is not set to a checkout of FoundationVision/Infinity"
    ),
]

GRIDS = ((1, 1), (2, 2), (3, 2), (4, 4), (6, 6))
TINY = BSQVAEConfig(codebook_dim=16, ch=32, ch_mult=(1, 2), num_res_blocks=1)
# SiLU as one operation and as x * sigmoid(x) round differently, in float32.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def official() -> Iterator[SimpleNamespace]:
    with infinity_official.imported(ROOT):
        sampler = importlib.import_module("infinity.models.infinity")
        draw = sampler.sample_with_top_k_top_p_also_inplace_modifying_logits_
        yield SimpleNamespace(vae=infinity_official.build_vae, draw=draw)


def pair(official: SimpleNamespace, cfg: BSQVAEConfig) -> tuple[BSQVAE, Any]:
    torch.manual_seed(0)
    theirs = official.vae(cfg)
    ours = BSQVAE(cfg).eval().requires_grad_(False)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("lfq.mask")}
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def features(dim: int) -> Tensor:
    return torch.randn(2, dim, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dim", "patch"), [(16, 16), (18, 16), (32, 16), (64, 16), (14, 8)])
def test_published_tokenizers_have_the_official_entries(official: SimpleNamespace, dim: int, patch: int) -> None:
    cfg = BSQVAEConfig.official(dim, patch)
    with torch.device("meta"):
        ours = BSQVAE(cfg).state_dict()
        theirs = official.vae(cfg).state_dict()
    want = {k: t.shape for k, t in theirs.items() if not k.endswith("lfq.mask")}
    assert {k: t.shape for k, t in ours.items()} == want


@pytest.mark.parametrize("dim", [14, 16, 32, 64])
def test_quantising_is_the_official_one(official: SimpleNamespace, dim: int) -> None:
    ours, theirs = pair(official, BSQVAEConfig(dim, 32, (1, 2), 1))
    total, bits = ours.quantize(features(dim), GRIDS)
    want, _, want_bits, *_ = theirs.quantizer(features(dim), scale_schedule=[(1, h, w) for h, w in GRIDS])
    for a, b in zip(bits, want_bits, strict=True):
        assert torch.equal(a, b.squeeze(1).long())
    assert torch.equal(total, want)


def test_encoding_an_image_is_the_official_one(official: SimpleNamespace) -> None:
    ours, theirs = pair(official, TINY)
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    want = theirs.encode(image, [(1, h, w) for h, w in GRIDS])[3]
    for a, b in zip(ours.encode(image, GRIDS), want, strict=True):
        assert torch.equal(a, b.squeeze(1).long())


@pytest.mark.parametrize("dim", [14, 16, 32, 64])
def test_codes_and_inputs_of_every_scale_are_the_official_ones(official: SimpleNamespace, dim: int) -> None:
    ours, theirs = pair(official, BSQVAEConfig(dim, 32, (1, 2), 1))
    summed: Tensor | None = None
    want: Any = 0.0
    up = theirs.quantizer.z_interplote_up
    for s, (h, w) in enumerate(GRIDS):
        bits = torch.randint(2, (2, h, w, dim), generator=torch.Generator().manual_seed(s))
        codes = theirs.quantizer.lfq.indices_to_codes(bits.unsqueeze(1), label_type="bit_label")
        assert torch.equal(ours.bits_to_codes(bits), codes.squeeze(2))
        assert torch.equal(ours.bits_to_codes(bits.bool()), codes.squeeze(2))
        summed, nxt = ours.next_input(s, summed, ours.bits_to_codes(bits), GRIDS)
        if s == len(GRIDS) - 1:
            want = want + codes
            assert nxt is None
        else:
            want = want + F.interpolate(codes, size=(1, *GRIDS[-1]), mode=up)
            assert nxt is not None
            assert torch.equal(nxt, F.interpolate(want, size=(1, *GRIDS[s + 1]), mode=up).squeeze(2))
        assert torch.equal(summed, want.squeeze(2))


@pytest.mark.parametrize("cfg", [TINY, BSQVAEConfig(14, 32, (1, 1, 2), 2)])
def test_decoding_is_the_official_one(official: SimpleNamespace, cfg: BSQVAEConfig) -> None:
    ours, theirs = pair(official, cfg)
    z = features(cfg.codebook_dim)
    want = (theirs.decode(z) + 1) / 2
    torch.testing.assert_close(ours.decode(z), want, atol=TOLERANCE, rtol=0)
    assert want.std() > 0.01


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(900, 0.97), (0, 0.97), (2, 0.0), (0, 0.0), (1, 0.97), (0, 0.5), (0, 1.0)]
)
def test_bits_are_drawn_as_by_the_official_code(official: SimpleNamespace, top_k: int, top_p: float) -> None:
    logits = 4 * torch.randn(2, 300, 2 * 16, generator=torch.Generator().manual_seed(3))
    logits[:, ::29] = -1.5  # both classes equally likely
    ours, theirs = torch.Generator().manual_seed(11), torch.Generator().manual_seed(11)
    for _ in range(2):  # the generators move on alike
        got = sample_bits(logits, top_k, top_p, ours)
        want = official.draw(logits.reshape(2, -1, 2).clone(), top_k=top_k, top_p=top_p, rng=theirs)
        assert torch.equal(got, want.view(2, 300, 16))
