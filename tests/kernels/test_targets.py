"""The Triton kernels, built for GPUs that are not here: they must compile and fit the device.

Only where Triton is installed; it brings the assembler with it, and needs no GPU to build for one.
"""

from __future__ import annotations

import importlib
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from toprovar_compile.kernels import singular_values
from toprovar_compile.kernels.fae import CONFIGS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")

fae = importlib.import_module("toprovar_compile.kernels.fae")

# Bytes of shared memory that a program can have (CUDA programming guide, table of compute capabilities).
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (12, 0): 99 << 10}


def build(
    kernel: Any, capability: tuple[int, int], types: dict[str, str], constants: dict[str, Any], **launch: int
) -> Any:
    """Compile for a device; `types` are those of the arguments that are no constants, int32 where they are left out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    major, minor = capability
    return compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=launch)


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of a thread that did not fit its registers."""
    import triton

    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(found.stdout.partition("STACK:")[2].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("capability", CONFIGS)
def test_attention_fits(capability: tuple[int, int]) -> None:
    config = fae.pick_config(capability, 2, 128, False, 4096)
    types = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "bias_ptr", "out_ptr")}
    types |= {"ent_ptr": "*fp32", "lens_ptr": "*i32", "scale": "fp32"}
    constants = dict.fromkeys(("qsd", "ksd", "vsd", "bsm"), 1) | {"D": 128, "BD": 128, "BIAS": 0, "PACKED": False}
    constants |= {"BM": config.block_m, "BN": config.block_n, "PRECISION": "tf32"}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = build(fae._fae_kernel, capability, types, constants, **launch)
    assert compiled.metadata.shared <= SHARED[capability]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "block_n", "stages", "consumers", "masked"),
    [(128, 128, 2, 2, False), (128, 128, 2, 1, True), (64, 128, 3, 2, True), (256, 64, 2, 2, False)],
)
def test_attention_for_hopper_stays_in_registers(
    tmp_path: Path, head_dim: int, block_n: int, stages: int, consumers: int, masked: bool
) -> None:
    hopper = importlib.import_module("toprovar_compile.kernels.fae_hopper")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile
    from triton.experimental.gluon._runtime import GluonASTSource

    def descriptor(rows: int) -> str:
        block = (1, 1, rows, head_dim)
        return f"tensordesc<bf16[1, 1, {rows}, {head_dim}],{hopper._layout(block, torch.bfloat16)!r}>"

    constants = {"D": head_dim, "BN": block_n, "STAGES": stages, "CONSUMERS": consumers, "ENTROPY": True}
    constants |= {"MASKED": masked, "REGISTERS": 240, "LOADER_REGISTERS": 24}
    types = {name: descriptor(64) for name in ("q_desc", "out_desc")}
    types |= {name: descriptor(block_n) for name in ("k_desc", "v_desc")}
    types |= {"ent_ptr": "*fp32", "mask_ptr": "*u8", "scale_log2": "fp32"}
    names = hopper._kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(hopper._kernel, signature, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= SHARED[9, 0] and stack_bytes(compiled, tmp_path) == 0


@pytest.mark.slow
def test_singular_values_stay_in_registers(tmp_path: Path) -> None:
    constants = {"SQUARINGS": singular_values._SQUARINGS, "BR": 64, "BC": 64, "PRECISION": "ieee"}
    types = {"maps_ptr": "*fp32", "out_ptr": "*fp32"}
    kernel = singular_values._singular_values_kernel
    compiled = build(kernel, (9, 0), types, constants, num_warps=singular_values._NUM_WARPS)
    assert compiled.metadata.shared <= SHARED[9, 0] and stack_bytes(compiled, tmp_path) == 0
