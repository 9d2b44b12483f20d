"""Weights stored as int8 with a float16 factor for each row: half the size of float16, for models that are shipped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from toprovar_compile.errors import CheckpointError

_FACTOR = ":scale"
_SMALLEST = 1024  # tensors with fewer values stay float16


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and convolutions as int8 `name` and float16 `name:scale`, one a row; all else as float16."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.detach().float().cpu()
        if value.ndim < 2 or value.numel() < _SMALLEST:
            out[name] = value.half().contiguous()
            continue
        rows = value.flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp_min(1e-7).half()
        out[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view_as(value).contiguous()
        out[name + _FACTOR] = scale
    return out


def unpack(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Inverse of `pack`, float32; entries without a scale are only cast. Raises CheckpointError for a lost scale."""
    out = {}
    for name, value in state.items():
        if name.endswith(_FACTOR):
            continue
        scale = state.get(name + _FACTOR)
        if value.dtype != torch.int8:
            out[name] = value.float()
        elif scale is None or scale.shape != value.shape[:1]:
            raise CheckpointError(f"{name} has no scale for each of its rows", where=where, expected=name + _FACTOR)
        else:
            out[name] = value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))
    return out
