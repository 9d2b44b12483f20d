"""Loading official Infinity checkpoints: one .pth or .safetensors file, or a folder of shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.errors import CheckpointError
from toprovar_compile.models.bsq import BSQVAE, load_bsq
from toprovar_compile.models.infinity import Infinity, InfinityConfig, official_config
from toprovar_compile.models.loading import _check_fit, _read, _some

# Masks that follow from the schedule; the official loader drops them as well.
_CONSTANTS = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_NESTS = ("trainer", "gpt_fsdp", "gpt_wo_ddp", "model", "state_dict")  # where training checkpoints keep the transformer
_BLOCK = re.compile(r"(?:module\.)?(?:block_chunks\.(\d+)\.module|unregistered_blocks|blocks)\.(\d+)\.(.+)")


def load_infinity(
    checkpoint: str | Path,
    vae_checkpoint: str | Path,
    *,
    size: str | None = None,
    rope_normalised: int = 2,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Infinity:
    """An Infinity from official files, such as infinity_2b_reg.pth and infinity_vae_d32reg.pth, in eval mode.

    Shapes are read off the files; `size` ("2b", "8b", ...), if given, has to be theirs. What files do not tell is
    `rope_normalised`, the official option rope2d_normalized_by_hw. Weights go to `device` one by one, as `dtype`
    (float32 by default). Raises CheckpointError that names the entries when some are missing, unexpected or of another
    shape than the model's.
    """
    known = official_config(size) if size is not None else None
    vae = load_bsq(vae_checkpoint, device, dtype)
    where = str(checkpoint)
    state = official_state(_read_any(Path(checkpoint)), where)
    cfg = replace(_config_of(state, vae, where), rope_normalised=rope_normalised)
    if known is not None and _shape(known) != _shape(cfg):
        raise CheckpointError(
            f"it holds a model of depth {cfg.depth}, width {cfg.embed_dim} and {cfg.num_heads} heads",
            where=where,
            expected=f"depth {known.depth}, width {known.embed_dim} and {known.num_heads} heads of Infinity {size}",
        )
    with torch.device("meta"):
        model = Infinity(cfg)
    model.vae = vae
    _check_fit({k: v for k, v in model.state_dict().items() if not k.startswith("vae.")}, state, where)
    moved = {k: state.pop(k).to(device=device, dtype=dtype or torch.float32) for k in list(state)}
    model.load_state_dict(moved, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def official_state(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The transformer's entries of an official checkpoint, under our names and in our shapes.

    Official blocks are `block_chunks.<chunk>.module.<i>`, `unregistered_blocks.<i>` or `blocks.<i>`; the attention
    temperature is (1, 1, H, 1) in models made for flash attention and (1, H, 1, 1) otherwise.
    """
    while nest := next((n for n in _NESTS if isinstance(state.get(n), Mapping)), None):
        state = state[nest]
    if bad := [k for k, v in state.items() if not isinstance(v, Tensor)]:
        raise CheckpointError(f"{_some(bad)} are not tensors", where=where, expected="a checkpoint of Infinity")
    places = [m for k in state if (m := _BLOCK.fullmatch(k)) and m[1] is not None]
    in_a_chunk = 1 + max((int(m[2]) for m in places), default=0)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name in _CONSTANTS:
            continue
        if m := _BLOCK.fullmatch(key):
            name = f"blocks.{int(m[1] or 0) * in_a_chunk + int(m[2])}.{m[3]}"
        if name.endswith("scale_mul_1H11") and value.ndim == 4:
            value = value.reshape(1, -1, 1, 1)
        if name in out:
            raise CheckpointError(f"{key} is there twice, under two names", where=where)
        out[name] = value
    return out


def _config_of(state: Mapping[str, Tensor], vae: BSQVAE, where: str) -> InfinityConfig:
    """What the shapes of a checkpoint tell about its configuration."""
    depth = 1 + max((int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    needed = ("word_embed.weight", "cfg_uncond", "blocks.0.sa.scale_mul_1H11", "blocks.0.ffn.fc1.weight")
    if missing := [k for k in needed if k not in state]:
        raise CheckpointError(
            f"missing {_some(missing)}", where=where, expected="a text-conditional Infinity with cosine attention"
        )
    width, bits = state["word_embed.weight"].shape
    if bits not in (vae.codebook_dim, 4 * vae.codebook_dim):
        raise CheckpointError(
            f"a token has {bits} bits",
            where=where,
            expected=f"{vae.codebook_dim}, or {4 * vae.codebook_dim} with spatial patchify, for this tokenizer",
            todo="load the tokenizer that belongs to the model",
        )
    length, channels = state["cfg_uncond"].shape
    return InfinityConfig(
        depth=depth,
        embed_dim=width,
        num_heads=state["blocks.0.sa.scale_mul_1H11"].numel(),
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        text_channels=channels,
        text_maxlen=length,
        shared_aln="blocks.0.ada_gss" in state,
        ca_gamma="blocks.0.ca_gamma" in state,
        spatial_patchify=bits != vae.codebook_dim,
        vae=vae.cfg,
    )


def _shape(cfg: InfinityConfig) -> tuple[int, int, int]:
    return cfg.depth, cfg.embed_dim, cfg.num_heads


def _read_any(path: Path) -> dict[str, Any]:
    """The entries of a file, or of all shards (*.safetensors, else *.bin or *.pth) of a folder."""
    if not path.is_dir():
        return _read(path)
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        if shards := sorted(path.glob(pattern)):
            return {k: v for shard in shards for k, v in _read(shard).items()}
    raise CheckpointError("there are no shards", where=str(path), expected="*.safetensors, *.bin or *.pth files")
