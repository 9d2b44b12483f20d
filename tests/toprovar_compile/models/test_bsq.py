from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toprovar_compile.errors import CheckpointError, OptionError
from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig, load_bsq, sample_bits

TINY = BSQVAEConfig(codebook_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1)
GRIDS = ((1, 1), (2, 2), (2, 3), (4, 4))


def tiny(cfg: BSQVAEConfig = TINY) -> BSQVAE:
    torch.manual_seed(0)
    return BSQVAE(cfg).eval().requires_grad_(False)


def random_bits(grid: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(2, (2, *grid, 4), generator=torch.Generator().manual_seed(seed))


def sorted_and_filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The general way for any number of classes: logits (N, V) with those that are filtered at -inf."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values.amin(1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p:
        ordered, order = logits.sort(dim=1, stable=True)
        tail = ordered.softmax(1).cumsum(1) <= 1 - top_p
        tail[:, -1] = False
        logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    return logits


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (900, 0.97), (2, 0.5), (1, 0.0), (1, 0.9), (0, 0.4), (0, 1.0)])
def test_bits_are_those_that_filtering_and_multinomial_draw(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(3, 500, 8, generator=torch.Generator().manual_seed(5))
    logits[:, ::50] = 0.25  # both classes equally likely
    before = logits.clone()
    ours, general = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    got = sample_bits(logits, top_k, top_p, ours)
    p = sorted_and_filtered(logits.reshape(-1, 2), top_k, top_p).softmax(1)
    want = torch.multinomial(p, 1, replacement=True, generator=general).view(3, 500, 4)
    assert torch.equal(got, want)
    assert torch.equal(logits, before)
    assert torch.equal(ours.get_state(), general.get_state())
    assert 0.2 < got.float().mean() < 0.8


def test_bits_without_a_generator_take_the_default_one() -> None:
    logits = torch.zeros(1, 64, 4)
    torch.manual_seed(3)
    a = sample_bits(logits, 0, 0.0, None)
    assert torch.equal(a, sample_bits(logits, 0, 0.0, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_codes_lie_on_the_unit_sphere(dtype: torch.dtype) -> None:
    bits = random_bits((2, 3)).to(dtype)
    codes = tiny().bfloat16().bits_to_codes(bits)
    assert codes.shape == (2, 4, 2, 3) and codes.dtype == torch.float32
    torch.testing.assert_close(codes, torch.where(bits.bool(), 0.5, -0.5).permute(0, 3, 1, 2))


def test_next_input_adds_and_resizes() -> None:
    vae = tiny()
    summed, nxt = vae.next_input(0, None, vae.bits_to_codes(random_bits((1, 1))), GRIDS)
    assert summed.shape == (2, 4, 4, 4)
    assert nxt is not None and nxt.shape == (2, 4, 2, 2)
    first = summed.clone()
    more, nxt = vae.next_input(2, summed, vae.bits_to_codes(random_bits((2, 3))), GRIDS)
    assert torch.equal(summed, first)
    assert nxt is not None
    torch.testing.assert_close(nxt, more)
    codes = vae.bits_to_codes(random_bits((4, 4)))
    last, nxt = vae.next_input(3, more, codes, GRIDS)
    assert nxt is None
    assert torch.equal(last, more + codes)


def test_sums_while_generating_are_those_of_quantising() -> None:
    vae = tiny()
    features = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    total, bits = vae.quantize(features, GRIDS)
    summed: Tensor | None = None
    for s, b in enumerate(bits):
        summed, _ = vae.next_input(s, summed, vae.bits_to_codes(b), GRIDS)
    torch.testing.assert_close(summed, total)


def test_more_scales_reconstruct_the_features_better() -> None:
    vae = tiny()
    features = torch.nn.functional.normalize(torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    errors = [(vae.quantize(features, GRIDS[-1:] * n)[0] - features).square().mean() for n in (1, 2, 3)]
    assert errors[0] < features.square().mean()


def test_quantising_passes_gradients_straight_through() -> None:
    features = torch.randn(1, 4, 4, 4, requires_grad=True)
    tiny().quantize(features, GRIDS)[0].sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_encoding_gives_the_bits_of_every_scale() -> None:
    vae = tiny()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    bits = vae.encode(image, GRIDS)
    assert [tuple(b.shape) for b in bits] == [(2, *grid, 4) for grid in GRIDS]
    assert all(b.dtype == torch.int64 and set(b.unique().tolist()) <= {0, 1} for b in bits)
    with pytest.raises(OptionError, match=r"expected \(4, 4\)"):
        vae.encode(image, GRIDS[:-1])


def test_decoding_gives_images_in_the_dtype_of_the_weights() -> None:
    vae = tiny()
    summed = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    image = vae.decode(summed)
    assert image.shape == (2, 3, 8, 6) and image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    half = vae.bfloat16().to(memory_format=torch.channels_last).decode(summed)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), image, atol=0.05, rtol=0)


def test_decoding_is_one_graph() -> None:
    vae = tiny()
    summed = torch.randn(1, 4, 2, 2)
    decode = torch.compile(vae.decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decode(summed), vae.decode(summed))


@pytest.mark.parametrize(("dim", "patch"), [(16, 16), (32, 16), (64, 16), (14, 8)])
def test_published_tokenizers(dim: int, patch: int) -> None:
    cfg = BSQVAEConfig.official(dim, patch)
    assert cfg.patch_size == patch
    with torch.device("meta"):
        vae = BSQVAE(cfg)
    assert (vae.codebook_dim, vae.patch_size) == (dim, patch)
    assert vae.decode(torch.empty(1, dim, 2, 3, device="meta")).shape == (1, 3, 2 * patch, 3 * patch)
    with pytest.raises(OptionError, match="16 or 8"):
        BSQVAEConfig.official(dim, 32)


def checkpoint(folder: Path, vae: nn.Module, **extra: Tensor) -> Path:
    path = folder / "vae.pth"
    state = vae.state_dict() | {"quantizer.lfq.mask": torch.ones(4), "quantize.lfq.mask": torch.ones(4)} | extra
    torch.save({"vae": state}, path)
    return path


@pytest.mark.parametrize("cfg", [TINY, BSQVAEConfig(6, 64, (1, 1, 2), 2)])
def test_a_checkpoint_says_its_own_shape(tmp_path: Path, cfg: BSQVAEConfig) -> None:
    vae = tiny(cfg)
    loaded = load_bsq(checkpoint(tmp_path, vae), dtype=torch.bfloat16)
    assert loaded.cfg == cfg
    assert not loaded.training
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.bfloat16 and not p.requires_grad
        assert torch.equal(p, vae.get_parameter(name).bfloat16())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected decoder\.extra"):
        load_bsq(checkpoint(tmp_path, tiny(), **{"decoder.extra": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"mis-shaped decoder\.conv_in\.conv\.weight"):
        load_bsq(checkpoint(tmp_path, tiny(), **{"decoder.conv_in.conv.weight": torch.ones(1)}))
    vae = tiny()
    del vae.decoder.norm_out
    with pytest.raises(CheckpointError, match=r"missing decoder\.norm_out\.norm\.weight"):
        load_bsq(checkpoint(tmp_path, vae))
    with pytest.raises(CheckpointError, match="no encoder"):
        load_bsq(checkpoint(tmp_path, nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_bsq(tmp_path / "absent.pth")
