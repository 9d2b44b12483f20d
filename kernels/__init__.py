"""Operators of the toprovar namespace: reference, kernel and registration in one file each.

Importing this package registers the operators; it needs only torch.
"""

from __future__ import annotations

from toprovar_compile.kernels.fae import fae, fae_cached, fae_reference, fae_varlen
from toprovar_compile.kernels.fae_rotated import fae_rotated
from toprovar_compile.kernels.singular_values import top_singular_values
from toprovar_compile.kernels.text_probabilities import text_probabilities

__all__ = [
    "fae",
    "fae_cached",
    "fae_reference",
    "fae_rotated",
    "fae_varlen",
    "text_probabilities",
    "top_singular_values",
]
