"""FoundationVision/Infinity: the official `Infinity` object on our `models.infinity.Infinity`, with its own parameters.

The tokenizer comes with each call of the official entry point; its parameters are shared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig, Start
from toprovar_compile.prepare.family import Family, lacks
from toprovar_compile.prepare.sharing import Sharing, check_ready, check_used, leave_inference, without_autocast
from toprovar_compile.schedule import ScaleSchedule

_WHERE = "prepare, FoundationVision/Infinity"
_ENTRY = "autoregressive_infer_cfg"


class PreparedInfinity(Infinity):
    """Our Infinity on the parameters of an official one; `use_tokenizer` gives it those of a tokenizer.

    Under autocast, as the official scripts call it, linear layers compute in its dtype, and modulations and the head
    in float32, as there.
    """

    def __init__(self, official: nn.Module) -> None:
        _check_supported(official)
        with torch.device("meta"):
            super().__init__(read_config(official))
        self._official = (official,)  # tuples, as modules in them are not submodules
        self._tokenizer: tuple[nn.Module, Sharing] | None = None
        transformer = [path for path, _ in self.named_children() if path != "vae"]

        def find(path: str) -> nn.Module:
            model: Any = official
            head, _, rest = path.partition(".")
            if head != "blocks" or not rest:
                return model.get_submodule(path)  # type: ignore[no-any-return]
            index, _, inside = rest.partition(".")
            return blocks_of(model)[int(index)].get_submodule(inside)

        self.sharing = Sharing(self, find, _WHERE, self._official, within=("", *transformer))
        check_used(self.sharing, official, _WHERE)
        self.eval()

    def use_tokenizer(self, vae: nn.Module) -> None:
        """Decode with the official BSQ-VAE `vae`, on its own parameters."""
        if self._tokenizer is not None and self._tokenizer[0] is vae:
            return
        missing = lacks(vae, ("encoder.conv_in.conv", "decoder.conv_out.conv"), ("decode",))
        if missing:
            raise UnsupportedModelError(
                f"the tokenizer has no {', '.join(missing)}", where=_WHERE, expected="the official BSQ-VAE"
            )
        with torch.device("meta"):
            tokenizer = BSQVAE(_tokenizer_config(vae)).eval()
        sharing = Sharing(tokenizer, vae.get_submodule, _WHERE, (vae,))
        if 4 * tokenizer.codebook_dim < self.cfg.bits or self.cfg.bits % tokenizer.codebook_dim:
            raise UnsupportedModelError(
                f"the tokenizer has {tokenizer.codebook_dim} bits a position, the transformer {self.cfg.bits} a token",
                where=_WHERE,
                expected="the tokenizer that the transformer was made for",
            )
        self.vae = tokenizer
        self._tokenizer = (vae, sharing)
        self.cfg = replace(self.cfg, vae=tokenizer.cfg)  # the fingerprint is that of both

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, *args: Any) -> tuple[Start, torch.Generator | None]:
        """As in `Infinity`; a generator as seed, the last argument, is used as it is."""
        if self._tokenizer is None:
            raise UnsupportedModelError(
                "there is no tokenizer yet",
                where=_WHERE,
                todo="call prepared.use_tokenizer(vae), or the official entry point",
            )
        self.sharing.sync()
        self._tokenizer[1].sync()
        tensors = self.sharing.tensors() + self._tokenizer[1].tensors()
        check_ready(self._official[0], _WHERE, tensors)
        leave_inference(tensors)
        *rest, seed = args
        if isinstance(seed, torch.Generator):
            return super()._begin(*rest, None)[0], seed
        return super()._begin(*args)  # type: ignore[no-any-return]

    def _modulation(self, cond: Tensor) -> Tensor:
        """As in `Infinity`, in float32 under autocast too."""
        with without_autocast(cond.device):
            return super()._modulation(cond)

    def get_logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """As in `Infinity`, in float32 under autocast too."""
        with without_autocast(x.device):
            return super().get_logits(x, cond)


def blocks_of(official: Any) -> Sequence[nn.Module]:
    """The official blocks in order: one list, or chunks of them."""
    if hasattr(official, "block_chunks"):
        return [block for chunk in official.block_chunks for block in chunk.module]
    return official.blocks  # type: ignore[no-any-return]


def read_config(official: Any) -> InfinityConfig:
    """The configuration that an official Infinity was made with; that of its tokenizer is the published one."""
    block = blocks_of(official)[0]
    fold = bool(official.apply_spatial_patchify)
    bits = official.d_vae // (4 if fold else 1)
    return InfinityConfig(
        depth=official.depth,
        embed_dim=official.C,
        num_heads=official.num_heads,
        mlp_ratio=block.ffn.fc1.weight.shape[0] / official.C,  # type: ignore[union-attr, index]
        text_channels=official.Ct5,
        text_maxlen=official.text_maxlen,
        norm_eps=official.norm_eps,
        shared_aln=bool(block.shared_aln),
        ca_gamma=isinstance(block.ca_gamma, nn.Parameter),
        rope_normalised=official.rope2d_normalized_by_hw,
        spatial_patchify=fold,
        vae=BSQVAEConfig.official(bits, patch_size=8 if fold else 16),
    )


def _tokenizer_config(vae: Any) -> BSQVAEConfig:
    encoder = vae.encoder
    ch = encoder.conv_in.conv.weight.shape[0]
    widths = [level.block[-1].conv2.conv.weight.shape[0] for level in encoder.down]
    return BSQVAEConfig(
        encoder.conv_out.conv.weight.shape[0], ch, tuple(w // ch for w in widths), len(encoder.down[0].block)
    )


def _check_supported(official: Any) -> None:
    """Raise UnsupportedModelError for options of the official class that are not taken over, or are wrong there."""
    blocks: Any = blocks_of(official)
    if any(block.fused_norm_func is None for block in blocks):
        raise UnsupportedModelError(
            "the model was built without fused norms: its blocks then drop `scale_ind` and turn the queries and keys "
            "of every scale by the positions of the first",
            where=_WHERE,
            expected="fused_norm=True, as in the official scripts, and infinity.models.fused_op importable",
            todo="build the model with it and load the same weights",
        )
    problem = None
    if not official.use_bit_label:
        problem = "use_bit_label=0: tokens that are no bits"
    elif not official.add_lvl_embeding_only_first_block:
        problem = "add_lvl_embeding_only_first_block=0"
    elif not official.rope2d_each_sa_layer:
        problem = "rope2d_each_sa_layer=0"
    elif not isinstance(blocks[0].ca_norm, nn.LayerNorm):
        problem = "rms_norm=True"
    elif official.norm0_ve is not None and not isinstance(official.norm0_ve, nn.Identity):
        problem = "nm0=True"
    elif float(getattr(blocks[0].sa, "tau", 1)) != 1 or not blocks[0].sa.cos_attn:
        problem = "another attention than cosine attention with tau=1"
    if problem:
        raise UnsupportedModelError(
            f"the model was built with {problem}", where=_WHERE, expected="the options of the published models"
        )


def _missing(model: nn.Module) -> list[str]:
    found = lacks(
        model,
        ("word_embed", "text_proj_for_sos", "text_proj_for_ca", "text_norm", "lvl_embed", "head_nm", "head"),
        ("cfg_uncond", "pos_start", "unregistered_blocks", "rope2d_freqs_grid", "rng"),
    )
    blocks: Any = [] if found else blocks_of(model)
    return found or lacks(blocks[0], ("sa.mat_qkv", "ca.mat_kv", "ffn", "ca_norm"), ("fused_norm_func",))


def _entry(prepared: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(prepared, PreparedInfinity)
    official: Any = prepared._official[0]

    @torch.no_grad()
    def autoregressive_infer_cfg(
        vae: Any = None,
        scale_schedule: Any = None,
        label_B_or_BLT: Any = None,
        B: int = 1,
        negative_label_B_or_BLT: Any = None,
        force_gt_Bhw: Any = None,
        g_seed: int | None = None,
        cfg_list: Sequence[float] = (),
        tau_list: Sequence[float] = (),
        cfg_sc: float = 3,
        top_k: int = 0,
        top_p: float = 0.0,
        returns_vemb: int = 0,
        ratio_Bl1: Any = None,
        gumbel: int = 0,
        norm_cfg: bool = False,
        cfg_exp_k: float = 0.0,
        cfg_insertion_layer: Sequence[int] = (-5,),
        vae_type: int = 0,
        softmax_merge_topk: int = -1,
        ret_img: bool = False,
        trunk_scale: int = 1000,
        gt_leak: int = 0,
        gt_ls_Bl: Any = None,
        inference_mode: bool = False,
        save_img_path: Any = None,
        sampling_per_bits: int = 1,
    ) -> tuple[list[Any], list[Any], Any]:
        """The official function on compiled steps: two empty lists and images, uint8 (B, H, W, 3) in BGR.

        Arguments without effect there have none here.
        """
        _check_call(vae, vae_type, trunk_scale, scale_schedule, cfg_insertion_layer, cfg_list, tau_list)
        prepared.use_tokenizer(vae)
        schedule = ScaleSchedule(tuple((int(h), int(w)) for _, h, w in scale_schedule))
        negative = _rows(negative_label_B_or_BLT) if negative_label_B_or_BLT else None
        forced = [bits.squeeze(1).bool() for bits in (gt_ls_Bl or ())[: max(gt_leak, 0)]]
        images = compiled(
            _rows(label_B_or_BLT),
            seed=None if g_seed is None else official.rng.manual_seed(g_seed),
            cfg=list(cfg_list),
            tau=list(tau_list),
            top_k=top_k or official.top_k,
            top_p=top_p or official.top_p,
            cfg_layers=list(cfg_insertion_layer),
            negative=negative,
            schedule=schedule,
            forced_bits=forced,
        )
        if not ret_img:
            return [], [], []
        pixels = images.permute(0, 2, 3, 1).mul(255).to(torch.uint8).flip(dims=(3,))
        return [], [], pixels

    return autoregressive_infer_cfg


def _rows(packed: Any) -> list[Tensor]:
    """Text features of each prompt, from the official tuple (all rows, lengths, their cumulated sums, the largest)."""
    features, lengths = packed[0], [int(n) for n in packed[1]]
    return list(features.split(lengths))


def _check_call(
    vae: Any, vae_type: int, trunk_scale: int, schedule: Any, layers: Any, cfg_list: Any, tau_list: Any
) -> None:
    """Raise OptionError for calls that are not taken over, and for those that the official function refuses."""
    problem = None
    if vae is None or vae_type == 0:
        problem = "vae_type=0, or no vae: tokenizers other than BSQ-VAE"
    elif not schedule or any(t != 1 for t, _, _ in schedule):
        problem = "a scale_schedule of more than one frame, or none"
    elif trunk_scale < len(schedule):
        problem = "trunk_scale, which leaves scales out; a plan with an exit does that"
    elif 1 in layers:
        problem = "cfg_insertion_layer 1, which has no effect in the official code"
    elif min(len(cfg_list), len(tau_list)) < len(schedule):
        problem = "a cfg_list or tau_list shorter than scale_schedule"
    if problem:
        raise OptionError(
            f"called with {problem}", where=_ENTRY, expected="a call as in the official tools/run_infinity.py"
        )


FAMILY = Family(
    name="Infinity (FoundationVision/Infinity)",
    entry=_ENTRY,
    arguments=(
        "vae",
        "scale_schedule",
        "label_B_or_BLT",
        "B",
        "negative_label_B_or_BLT",
        "force_gt_Bhw",
        "g_seed",
        "cfg_list",
        "tau_list",
        "cfg_sc",
        "top_k",
        "top_p",
        "returns_vemb",
        "ratio_Bl1",
        "gumbel",
        "norm_cfg",
        "cfg_exp_k",
        "cfg_insertion_layer",
        "vae_type",
        "softmax_merge_topk",
        "ret_img",
        "trunk_scale",
        "gt_leak",
        "gt_ls_Bl",
        "inference_mode",
        "save_img_path",
        "sampling_per_bits",
    ),
    missing=_missing,
    prepare=PreparedInfinity,
    make_entry=_entry,
)
