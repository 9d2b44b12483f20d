from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toprovar_compile.models.vqvae import VQVAE, VQVAEConfig

CFG = VQVAEConfig(vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, patch_nums=(1, 2, 3, 4, 6))


@pytest.fixture
def vae() -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQVAE(CFG).eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_gives_one_map_a_scale(vae: VQVAE, images: Tensor) -> None:
    tokens = vae.encode(images)
    assert [t.shape for t in tokens] == [(2, pn * pn) for pn in CFG.patch_nums]
    assert all(t.dtype == torch.int64 and t.min() >= 0 and t.max() < 32 for t in tokens)


def test_tokens_rebuild_the_quantised_features(vae: VQVAE, images: Tensor) -> None:
    f_hat, _, tokens = vae.quantize(vae.quant_conv(vae.encoder(images)))
    built = torch.zeros_like(f_hat)
    for s, (pn, idx) in enumerate(zip(CFG.patch_nums, tokens, strict=True)):
        h = vae.quantize.embedding(idx).transpose(1, 2).reshape(2, 8, pn, pn)
        built, _ = vae.quantize.next_input(s, built, h)
    torch.testing.assert_close(built, f_hat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae(images)[0], vae.decoder(vae.post_quant_conv(f_hat)))


def test_nearest_is_the_closest_code(vae: VQVAE) -> None:
    z = torch.randn(50, 8)
    assert torch.equal(vae.quantize.nearest(z), torch.cdist(z, vae.quantize.embedding.weight).argmin(1))


def test_nearest_on_the_sphere_ignores_length() -> None:
    vae = VQVAE(VQVAEConfig(16, 8, 32, (1,), using_znorm=True, patch_nums=(1, 2)))
    z = torch.randn(20, 8)
    assert torch.equal(vae.quantize.nearest(z), vae.quantize.nearest(7 * z))


def test_kept_cuts_the_features_but_not_the_loss(vae: VQVAE) -> None:
    f = torch.randn(3, 8, 6, 6)
    full, loss, tokens = vae.quantize(f)
    cut, cut_loss, cut_tokens = vae.quantize(f, torch.tensor([5, 2, 1]))
    torch.testing.assert_close(cut[0], full[0])
    assert torch.equal(loss, cut_loss) and all(map(torch.equal, tokens, cut_tokens))
    h = vae.quantize.embedding(tokens[0][2:]).view(1, 8, 1, 1)
    torch.testing.assert_close(cut[2:], vae.quantize.contribution(h, 0, (6, 6)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cut[1], full[1])


def test_gradient_passes_straight_through(vae: VQVAE) -> None:
    f = torch.randn(1, 8, 6, 6, requires_grad=True)
    vae.quantize(f)[0].sum().backward()
    assert f.grad is not None and torch.equal(f.grad, torch.ones_like(f))


def test_loss_trains_codebook_and_features(vae: VQVAE) -> None:
    vae.requires_grad_(True)
    f = torch.randn(1, 8, 6, 6, requires_grad=True)
    vae.quantize(f)[1].backward()
    book = vae.quantize.embedding.weight.grad
    assert f.grad is not None and f.grad.abs().sum() > 0 and book is not None and book.abs().sum() > 0


def test_decode_is_an_image(vae: VQVAE) -> None:
    out = vae.decode(torch.randn(2, 8, 6, 6) * 5)
    assert out.shape == (2, 3, 12, 12) and out.min() >= 0 and out.max() <= 1


def test_channels_last_decodes_the_same(vae: VQVAE) -> None:
    f_hat = torch.randn(1, 8, 6, 6)
    want = vae.decode(f_hat)
    torch.testing.assert_close(vae.to(memory_format=torch.channels_last).decode(f_hat), want, atol=1e-5, rtol=1e-5)  # type: ignore[call-overload]


def test_convolutions_of_scales_follow_the_official_ticks() -> None:
    """With ten scales and four convolutions, two positions are equally far from two ticks."""
    quantize = VQVAE(VQVAEConfig(16, 8, 32, (1,), patch_nums=(1, 1, 1, 2, 2, 2, 3, 3, 4, 4))).quantize
    table = list(quantize.quant_resi.qresi_ls)
    assert [table.index(quantize.phi(s)) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_one_convolution_a_scale() -> None:
    quantize = VQVAE(VQVAEConfig(16, 8, 32, (1,), share_quant_resi=0, patch_nums=(1, 2, 3, 4, 5))).quantize
    assert [list(quantize.quant_resi.qresi_ls).index(quantize.phi(s)) for s in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.gpu
def test_resize_on_the_gpu_is_that_of_the_cpu(vae: VQVAE) -> None:
    h = torch.randn(2, 8, 3, 3)
    on_gpu = vae.cuda().quantize.contribution(h.cuda(), 1, (6, 6)).cpu()
    torch.testing.assert_close(on_gpu, vae.cpu().quantize.contribution(h, 1, (6, 6)), atol=1e-5, rtol=1e-4)
