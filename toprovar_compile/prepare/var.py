"""FoundationVision/VAR: the official `VAR` object on our `models.var.VAR`, with its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.models.var import VAR, VARConfig
from toprovar_compile.models.vqvae import VQVAEConfig
from toprovar_compile.prepare.family import Family, lacks
from toprovar_compile.prepare.sharing import (
    Sharing,
    check_device,
    check_ready,
    check_used,
    compare_blocks,
    leave_inference,
)

_WHERE = "prepare, FoundationVision/VAR"
_CONSTANTS = ("attn_bias_for_masking",)


class PreparedVAR(VAR):
    """Our VAR on the parameters of an official one and of its VQ-VAE."""

    def __init__(self, official: nn.Module) -> None:
        with torch.device("meta"):
            super().__init__(read_config(official))
        vae: Any = official.vae_proxy[0]  # type: ignore[index]
        self._official: tuple[nn.Module, nn.Module] = (official, vae)  # a tuple, as modules in it are not submodules

        def find(path: str) -> nn.Module:
            if path == "vae" or path.startswith("vae."):
                return vae.get_submodule(_vae_path(vae, path[4:]))  # type: ignore[no-any-return]
            return official.get_submodule(path)

        self.sharing = Sharing(self, find, _WHERE, self._official)
        check_used(self.sharing, official, _WHERE)
        self.eval()
        _check_block(self, official)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self, labels: Tensor, seed: int | torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor, torch.Generator | None]:
        """As in `VAR`; a generator as `seed` is used as it is."""
        self.sharing.sync()
        tensors = self.sharing.tensors()
        device = check_ready(self._official[0], _WHERE, tensors)
        leave_inference(tensors)
        check_device("labels", labels, device, _WHERE)
        if isinstance(seed, torch.Generator):
            return *super()._begin(labels, None)[:3], seed
        return super()._begin(labels, seed)  # type: ignore[no-any-return]


def read_config(official: Any) -> VARConfig:
    """The configuration that an official VAR was made with. Raises AttributeError where it has none."""
    attn, vae = official.blocks[0].attn, official.vae_proxy[0]
    quantize, encoder = vae.quantize, vae.encoder
    ch = encoder.conv_in.weight.shape[0]
    widths = [level.block[-1].conv2.weight.shape[0] for level in encoder.down]
    table = quantize.quant_resi
    shared = len(table.qresi_ls) if hasattr(table, "qresi_ls") else (1 if hasattr(table, "qresi") else 0)
    return VARConfig(
        depth=len(official.blocks),
        embed_dim=official.C,
        num_heads=official.num_heads,
        mlp_ratio=official.blocks[0].ffn.fc1.weight.shape[0] / official.C,
        num_classes=official.num_classes,
        norm_eps=official.head_nm.ln_wo_grad.eps,
        shared_aln=bool(official.blocks[0].shared_aln),
        attn_l2_norm=bool(attn.attn_l2_norm),
        cond_drop_rate=official.cond_drop_rate,
        vae=VQVAEConfig(
            vocab_size=vae.vocab_size,
            z_channels=vae.Cvae,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=len(encoder.down[0].block),
            using_sa=len(encoder.down[-1].attn) > 0,
            using_mid_sa=hasattr(encoder.mid.attn_1, "qkv"),
            using_znorm=bool(quantize.using_znorm),
            share_quant_resi=shared,
            quant_resi=quantize.quant_resi_ratio,
            beta=quantize.beta,
            patch_nums=tuple(official.patch_nums),
        ),
    )


def _vae_path(vae: Any, path: str) -> str:
    """Our table of convolutions is one list; the official one has three forms."""
    table, head = vae.quantize.quant_resi, "quantize.quant_resi.qresi_ls."
    if not path.startswith(head) or hasattr(table, "qresi_ls"):
        return path
    return "quantize.quant_resi.qresi" if hasattr(table, "qresi") else path.replace(".qresi_ls", "")


def _check_block(prepared: VAR, official: Any) -> None:
    """Raise UnsupportedModelError unless the first official block computes what ours does."""
    theirs, ours = official.blocks[0], prepared.blocks[0]
    weight = theirs.attn.mat_qkv.weight
    rng = torch.Generator().manual_seed(0)
    cfg = prepared.cfg
    x = torch.randn(2, 3, cfg.embed_dim, generator=rng).to(weight)
    cond = torch.randn((2, 1, 6, cfg.embed_dim) if cfg.shared_aln else (2, cfg.embed_dim), generator=rng).to(weight)
    compare_blocks(lambda: theirs(x=x, cond_BD=cond, attn_bias=None), lambda: ours(x, cond, None, None)[0], x, _WHERE)


def _missing(model: nn.Module) -> list[str]:
    found = lacks(
        model,
        ("word_embed", "class_emb", "lvl_embed", "head_nm", "head", "blocks.0.attn.mat_qkv", "blocks.0.ffn.fc1"),
        ("patch_nums", "num_classes", "pos_start", "pos_1LC", "vae_proxy", "rng"),
    )
    if not found:
        vae: Any = model.vae_proxy
        inside = lacks(vae[0], ("encoder", "decoder", "quantize.embedding", "post_quant_conv"), ("vocab_size", "Cvae"))
        found = [f"vae_proxy[0].{name}" for name in inside]
    return found


def _entry(prepared: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    assert isinstance(prepared, PreparedVAR)
    official: Any = prepared._official[0]

    @torch.no_grad()
    def autoregressive_infer_cfg(
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """The official function on compiled steps: images (B, 3, H, W) in 0..1."""
        rng = None if g_seed is None else official.rng.manual_seed(g_seed)
        if label_B is None:
            labels = torch.multinomial(official.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            label = prepared.cfg.num_classes if label_B < 0 else label_B
            labels = torch.full((B,), label, device=official.lvl_1L.device)
        else:
            labels = label_B
        return compiled(  # type: ignore[no-any-return]
            labels, seed=rng, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth
        )

    return autoregressive_infer_cfg


FAMILY = Family(
    name="VAR (FoundationVision/VAR)",
    entry="autoregressive_infer_cfg",
    arguments=("B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth"),
    missing=_missing,
    prepare=PreparedVAR,
    make_entry=_entry,
)
