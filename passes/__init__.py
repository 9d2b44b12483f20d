"""Graph passes, one file each, run in the order of a literal list.

A step passes through them like this: attention is rewritten on the captured graph, and equal layers are taken out of it
until it is functional; the functional graph is split at the residual stream; of each class of layers the cache is
rewritten and the token axis proven; variants are made from that.
"""

from __future__ import annotations

from toprovar_compile.passes._base import Pass, PassContext, PassReport, run_passes
from toprovar_compile.passes._graph import copy_graph, output_values, placeholders
from toprovar_compile.passes._symbols import shape_of, symbols_of
from toprovar_compile.passes.absorb_projections import absorb_projections, absorbed, inputs_to_absorb, worth_it
from toprovar_compile.passes.drop_unread_entropy import check_drop_unread_entropy, drop_unread_entropy, read_entropy
from toprovar_compile.passes.fuse_gelu import check_fuse_gelu, fuse_gelu
from toprovar_compile.passes.fuse_rotation import check_fuse_rotation, fuse_rotation
from toprovar_compile.passes.outline_layers import Outline, check_inline_layers, check_outline_layers
from toprovar_compile.passes.prove_token_axis import TokenProof, prove_token_axis
from toprovar_compile.passes.prune_tokens import prune_tokens
from toprovar_compile.passes.restore_tokens import restore_tokens
from toprovar_compile.passes.rewrite_attention import attention_forms, check_rewrite_attention, rewrite_attention
from toprovar_compile.passes.split_layers import (
    Layer,
    Piece,
    SplitStep,
    check_split_layers,
    cut_shared,
    graph_key,
    split_layers,
)
from toprovar_compile.passes.write_kv_cache import check_write_kv_cache, write_kv_cache

DYNAMO_PASSES: tuple[Pass, ...] = (
    # On the captured graph operators are stable; after AOT attention is an operator of the device.
    Pass(rewrite_attention, check_rewrite_attention),
)

PASSES_OF_A_VARIANT: tuple[Pass, ...] = (
    # After the variant's outputs are chosen: only then is it known which entropy is read.
    Pass(drop_unread_entropy, check_drop_unread_entropy),
    # Last: rules and matchers of other passes know the plain product and attention.
    Pass(fuse_gelu, check_fuse_gelu),
    Pass(fuse_rotation, check_fuse_rotation),
)

__all__ = [
    "DYNAMO_PASSES",
    "PASSES_OF_A_VARIANT",
    "Layer",
    "Outline",
    "Pass",
    "PassContext",
    "PassReport",
    "Piece",
    "SplitStep",
    "TokenProof",
    "absorb_projections",
    "absorbed",
    "attention_forms",
    "check_inline_layers",
    "check_outline_layers",
    "check_split_layers",
    "check_write_kv_cache",
    "copy_graph",
    "cut_shared",
    "graph_key",
    "inputs_to_absorb",
    "output_values",
    "placeholders",
    "prove_token_axis",
    "prune_tokens",
    "read_entropy",
    "restore_tokens",
    "run_passes",
    "shape_of",
    "split_layers",
    "symbols_of",
    "worth_it",
    "write_kv_cache",
]
