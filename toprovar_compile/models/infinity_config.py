"""The shape of an Infinity model, and the published shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.models.bsq import BSQVAEConfig


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an Infinity transformer and its tokenizer; `INFINITY_2B` and `INFINITY_8B` are the published ones.

    `rope_normalised` is the official rope2d_normalized_by_hw (see `rope_tables`). `spatial_patchify`: a token stands
    for 2x2 positions of the tokenizer. `ca_gamma`: a learned gain on cross-attention, as some checkpoints have.
    `text_pad`: prompts are padded to a multiple of this many tokens.
    """

    depth: int = 32
    embed_dim: int = 2048
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_channels: int = 2048
    text_maxlen: int = 512
    norm_eps: float = 1e-6
    shared_aln: bool = True
    ca_gamma: bool = False
    rope_normalised: int = 2
    spatial_patchify: bool = False
    text_pad: int = 32
    vae: BSQVAEConfig = field(default_factory=lambda: BSQVAEConfig.official(32))

    @property
    def bits(self) -> int:
        """Bits of one token."""
        return self.vae.codebook_dim * (4 if self.spatial_patchify else 1)

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward."""
        return round(self.embed_dim * self.mlp_ratio / 256) * 256

    def to_json(self) -> str:
        """Canonical JSON text of the configuration."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> InfinityConfig:
        """Inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        vae: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("vae").items()}
        return replace(cls(**raw), vae=BSQVAEConfig(**vae))


# depth, width and heads of the official sizes; the small ones were published for studies of scaling
_SIZES: Mapping[str, tuple[int, int, int]] = {
    "layer12": (12, 768, 8),
    "layer16": (16, 1152, 12),
    "layer24": (24, 1536, 16),
    "layer32": (32, 2080, 20),
    "layer40": (40, 2688, 24),
    "layer48": (48, 3360, 28),
    "2b": (32, 2048, 16),
    "8b": (40, 3584, 28),
}


def official_config(size: str) -> InfinityConfig:
    """The configuration of an official size, such as "2b" or "8b". Raises OptionError for another name."""
    if size not in _SIZES:
        close = nearest(size, _SIZES)
        raise OptionError(
            f"there is no Infinity of size {size!r}",
            where="official_config",
            expected=f"one of {', '.join(_SIZES)}",
            todo=f"did you mean {close!r}?" if close else "choose one of these",
        )
    depth, width, heads = _SIZES[size]
    patchify = size == "8b"
    vae = BSQVAEConfig.official(14, patch_size=8) if patchify else BSQVAEConfig.official(32)
    return InfinityConfig(depth, width, heads, spatial_patchify=patchify, vae=vae)


INFINITY_2B = official_config("2b")
INFINITY_8B = official_config("8b")
