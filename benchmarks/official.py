"""Time the entry points of the official VAR, HART and Infinity objects, as they are and accelerated, on random weights.

    python benchmarks/official.py var CHECKOUT --depth 30 --batch 1 8 --plans dense keep=0.4,from=7
    python benchmarks/official.py hart CHECKOUT --plans dense keep=0.4,from=10
    python benchmarks/official.py infinity CHECKOUT --plans dense keep=0.25,from=9

Speed does not depend on weights. What is timed is a call of `autoregressive_infer_cfg`, decoder included, as the
authors' scripts make it: VAR and HART in inference mode under float16 autocast over float32 weights, Infinity-2B under
bfloat16 autocast over bfloat16 layers, the rest float32. On the CPU autocast is to bfloat16, over float32. HART needs
the package transformers, and is given the shape that its size tells (0.7 billion parameters, 1024x1024); Infinity needs
no package (see `toprovar_compile.bench.infinity_official`). Results are written after each way, so that a run that is
cut short keeps them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import toprovar_compile as tv
from toprovar_compile.bench import infinity_official
from toprovar_compile.bench.infinity import TINY
from toprovar_compile.bench.infinity_ways import Picture, random_model
from toprovar_compile.cuda_graph import lanes
from toprovar_compile.files import write_json
from toprovar_compile.models.infinity import INFINITY_2B
from toprovar_compile.models.infinity_schedule import infinity_schedule
from toprovar_compile.plan import Plan
from toprovar_compile.plan_spec import parse_plan
from toprovar_compile.schedule import ScaleSchedule

HART_SIDES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
TEXT_TOKENS = 24  # of the prompt of Infinity
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """An official model. `call(batch)` makes a function that generates images (batch, ...) in 0..1.

    `mode` and, on a GPU, autocast to `dtype` are those of the authors' scripts.
    """

    model: nn.Module
    call: Callable[[int], Call]
    schedule: ScaleSchedule
    depth: int
    mode: Callable[[], Any] = torch.inference_mode
    dtype: torch.dtype = torch.float16


def build_var(args: argparse.Namespace, _: ExitStack) -> Subject:
    """The official VAR."""
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

    model.to(args.device).eval()
    return Subject(model, call, tv.prepare(model).schedule, len(model.blocks))  # type: ignore[arg-type]


def build_hart(args: argparse.Namespace, _: ExitStack) -> Subject:
    """The official HART."""
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

    model.to(args.device).eval()
    return Subject(model, call, tv.prepare(model).schedule, len(model.blocks))  # type: ignore[arg-type]


def build_infinity(args: argparse.Namespace, stack: ExitStack) -> Subject:
    """The official Infinity-2B, made on the device; its stand-ins stay importable until `stack` closes."""
    build = stack.enter_context(infinity_official.imported(args.checkout))
    config = TINY if args.tiny else INFINITY_2B
    schedule = infinity_schedule("1:1", "0.06M" if args.tiny else "1M")
    device = torch.device(args.device)
    # On the CPU the official layers cannot run in bfloat16: a norm there takes no mixed precision.
    official = build(random_model(config, schedule, device, torch.float32 if args.device == "cpu" else torch.bfloat16))
    text = torch.randn(TEXT_TOKENS, config.text_channels, generator=torch.Generator().manual_seed(0))
    picture = Picture(schedule, text.to(device))

    def call(batch: int) -> Call:
        if batch != 1:
            raise SystemExit("infinity is timed at batch 1, as its script calls it")
        return lambda: official.generate(picture.text, schedule, seed=0, **picture.sampling()).float() / 255

    return Subject(official.model, call, schedule, config.depth, torch.no_grad, torch.bfloat16)


BUILDERS = {"var": build_var, "hart": build_hart, "infinity": build_infinity}


def measure(subject: Subject, call: Call, args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The last image, the times, in seconds, of warm-up and measured calls, and GPU memory before them and at most."""
    cuda = args.device != "cpu"
    seconds = []
    held = None
    if cuda:
        lanes.clear()  # graphs and buffers that an earlier way left
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**30
    with subject.mode(), torch.autocast(args.device, dtype=subject.dtype if cuda else torch.bfloat16):
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
        "held_gib": held,
        "peak_gib": peak,
    }


class Clock:
    """Says how many seconds each stage took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """Print the seconds since the stage before."""
        now = time.perf_counter()
        print(f"{name}: {now - self._last:.1f} s", flush=True)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=BUILDERS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--depth", type=int, default=30, help="of VAR")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--plans", nargs="+", default=["dense"], help="as `toprovar generate --plan` takes them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.family != "infinity":  # whose package is found without the path
        sys.path.insert(0, str(args.checkout))
    torch.manual_seed(0)
    with ExitStack() as stack:
        run(args, stack)


def run(args: argparse.Namespace, stack: ExitStack) -> None:
    """Build the model and time it in all ways."""
    clock = Clock()
    with redirect_stdout(StringIO()):
        subject = BUILDERS[args.family](args, stack)
    clock.stage("build")
    plans: dict[str, Plan | str] = {
        text: text if text == "dense" else parse_plan(text, subject.schedule, subject.depth) for text in args.plans
    }
    rows = []
    for batch in args.batch:
        call = subject.call(batch)
        want, result = measure(subject, call, args)
        official = result["median_s"]
        for name, plan in (("official", None), *plans.items()):
            if plan is not None:
                with tv.accelerate(subject.model, plan, inner=args.inner):
                    images, result = measure(subject, call, args)
                result["mean_difference"] = (images - want).abs().mean().item()
            clock.stage(f"{name}, batch {batch}")
            row = {"way": name, "batch": batch, **result, "speed_up": official / result["median_s"]}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                facts = {
                    "family": args.family,
                    "depth": subject.depth,
                    "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
                    "torch": torch.__version__,
                    "rows": rows,
                }
                write_json(args.out, facts)


if __name__ == "__main__":
    main()
