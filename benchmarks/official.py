"""Time the entry points of the official VAR and HART objects, as they are and accelerated, on random weights.

    python benchmarks/official.py var CHECKOUT --depth 30 --batch 1 8 --plans dense keep=0.4,from=7
    python benchmarks/official.py hart CHECKOUT --plans dense keep=0.4,from=10

Speed does not depend on weights. What is timed is a call of `autoregressive_infer_cfg` under float16 autocast (bfloat16
on the CPU), decoder included: the median after warm-up. HART needs the package transformers, and is given the shape
that its size tells (0.7 billion parameters, 1024x1024).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import toprovar_compile as tv
from toprovar_compile.files import write_json
from toprovar_compile.plan import Plan
from toprovar_compile.plan_spec import parse_plan

HART_SIDES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
Call = Callable[[], Tensor]


def build_var(args: argparse.Namespace) -> tuple[nn.Module, Callable[[int], Call]]:
    """The official VAR and what makes a call for a batch size."""
    if importlib.util.find_spec("huggingface_hub") is None:  # used there only to publish models
        stub = types.ModuleType("huggingface_hub")
        stub.PyTorchModelHubMixin = object  # type: ignore[attr-defined]
        sys.modules["huggingface_hub"] = stub
    models = importlib.import_module("models")
    vae = models.VQVAE(4096, 32, 32 if args.tiny else 160)
    size = {"depth": 2, "embed_dim": 64, "num_heads": 2} if args.tiny else {}
    size = size or {"depth": args.depth, "embed_dim": 64 * args.depth, "num_heads": args.depth}
    model = models.VAR(vae, attn_l2_norm=True, **size)
    vae.to(args.device)

    def call(batch: int) -> Call:
        labels = torch.arange(batch, device=args.device) % 1000
        return lambda: model.autoregressive_infer_cfg(batch, labels, g_seed=0, cfg=4.0, top_k=900, top_p=0.95)

    return model.to(args.device).eval(), call


def build_hart(args: argparse.Namespace) -> tuple[nn.Module, Callable[[int], Call]]:
    """The official HART and what makes a call for a batch size."""
    if args.device == "cpu":  # the official code moves everything to a GPU
        Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    with tv.shims("hart_backend") as used:
        official: Any = importlib.import_module("hart.modules.models.transformer.hart_transformer_t2i")
    print(used)
    autoencoder = importlib.import_module("hart.modules.models.autoencoder.hart_autoencoder").HARTAutoEncoder
    configuration = importlib.import_module("hart.modules.models.autoencoder.configuration").HARTAutoEncoderConfig
    config = importlib.import_module("hart.modules.models.transformer.configuration").HARTForT2IConfig
    sides = HART_SIDES[:5] if args.tiny else HART_SIDES
    tokens, width = (10, 16) if args.tiny else (300, 1536)
    size = {"depth": 2, "embed_dim": 64, "num_heads": 2, "diff_width": 32, "diff_depth": 2} if args.tiny else {}
    size = size or {"depth": 24, "embed_dim": 1536, "num_heads": 24}
    vae = autoencoder(
        configuration(ch=32 if args.tiny else 160, v_patch_nums=sides, quantizer_type="var_hybrid", test_mode=True)
    )
    official.HARTAutoEncoderWithDisc = types.SimpleNamespace(from_pretrained=lambda _: types.SimpleNamespace(vae=vae))
    options = {"attn_type": "llama", "mlp_type": "llama", "disable_aln": True, "use_timestep_embed": True}
    model = official.HARTForT2I(
        config(vae_path="none", context_token=tokens, context_dim=width, patch_nums=sides, **size, **options)
    )
    vae.to(args.device)

    def call(batch: int) -> Call:
        text = torch.randn(batch, tokens, width, device=args.device)
        mask = torch.arange(tokens, device=args.device).expand(batch, -1) < tokens // 2
        positions = mask.cumsum(1) - 1

        def generate() -> Tensor:
            torch.manual_seed(0)
            np.random.seed(0)
            return model.autoregressive_infer_cfg(  # type: ignore[no-any-return]
                batch, text, g_seed=0, cfg=4.5, context_position_ids=positions, context_mask=mask, more_smooth=True
            )

        return generate

    return model.to(args.device).eval(), call


def measure(call: Call, args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The last image and the times, in seconds, of warm-up and measured calls."""
    cuda = args.device != "cpu"
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode(), torch.autocast(args.device, dtype=torch.float16 if cuda else torch.bfloat16):
        for _ in range(args.warmup + args.repeats):
            start = time.perf_counter()
            images = call()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    measured = seconds[args.warmup :]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return images.float(), {
        "median_s": statistics.median(measured),
        "min_s": min(measured),
        "first_s": seconds[0],
        "peak_gib": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=("var", "hart"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--plans", nargs="+", default=["dense"], help="as `toprovar generate --plan` takes them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))
    torch.manual_seed(0)
    with redirect_stdout(StringIO()):
        model, make_call = (build_var if args.family == "var" else build_hart)(args)
    schedule, depth = tv.prepare(model).schedule, len(model.blocks)  # type: ignore[arg-type]
    plans: dict[str, Plan | str] = {
        text: text if text == "dense" else parse_plan(text, schedule, depth)  # type: ignore[arg-type]
        for text in args.plans
    }
    rows = []
    for batch in args.batch:
        call = make_call(batch)
        want, result = measure(call, args)
        official = result["median_s"]
        for name, plan in (("official", None), *plans.items()):
            if plan is not None:
                with tv.accelerate(model, plan, inner=args.inner):
                    images, result = measure(call, args)
                result["mean_difference"] = (images - want).abs().mean().item()
            row = {"way": name, "batch": batch, **result, "speed_up": official / result["median_s"]}
            rows.append(row)
            print(json.dumps(row))
            if args.out:
                facts = {
                    "family": args.family,
                    "depth": depth,
                    "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
                    "torch": torch.__version__,
                    "rows": rows,
                }
                write_json(args.out, facts)


if __name__ == "__main__":
    main()
