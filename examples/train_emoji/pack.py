"""Write a trained run as the weights folder that the package ships.

    python pack.py --data ../../data --work runs/emoji --out ../../toprovar_compile/models/weights/emoji_var

`--weights-only` writes the safetensors alone, in shards, to carry a run from one machine to another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from toprovar_compile.models.var import VAR


def write_weights(model: VAR, out: Path, shard_mib: float = 0.0) -> None:
    """Write model.safetensors in float16, or shards model-1.safetensors, ... of at most `shard_mib` MiB."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if shard_mib and size + half.nbytes > shard_mib * 2**20:
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    for i, shard in enumerate(shards, 1):
        path = out / (f"model-{i}.safetensors" if shard_mib else "model.safetensors")
        save_file(shard, path)
        path.chmod(0o644)


def main(
    run: Annotated[Path, typer.Option("--work", help="Folder of the trained run.")] = Path("runs/emoji"),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("weights"),
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Write only the weights, in shards.")] = False,
) -> None:
    """Pack a run."""
    model = common.load_model(run, torch.device("cpu"))
    write_weights(model, out, shard_mib=15.0 if weights_only else 0.0)


if __name__ == "__main__":
    typer.run(main)
