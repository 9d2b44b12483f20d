"""Timing the same images generated in several ways, and comparing what came out.

What is timed is what a user waits for: the whole generation, VAE decoding included. The first images of a way, in which
it compiles, are counted apart.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.plan import Plan

PSNR_CAP = 100.0  # dB; equal images would give infinity, which neither a mean nor JSON can hold

Generate = Callable[..., Tensor]
Clock = Callable[[Callable[[], Tensor]], tuple[Tensor, float]]


@dataclass(frozen=True)
class Job:
    """One image: class label, readable name, seed of its draws. Without a label the name is the prompt."""

    label: int | None
    name: str
    seed: int

    def given(self, device: torch.device) -> Any:
        """What the model is called with: labels (1,), or a list of one prompt."""
        return [self.name] if self.label is None else torch.tensor([self.label], device=device)


@dataclass(frozen=True)
class Way:
    """One way to generate: `prepare` makes a callable of the model; `plan` is what toprovar prunes, None elsewhere."""

    name: str
    prepare: Callable[[nn.Module], Generate]
    plan: Plan | None = None


@dataclass(frozen=True)
class Outcome:
    """What one way did. `warmup` and `seconds` are one number an image; `images` is (N, 3, H, W) on the CPU."""

    way: str
    warmup: tuple[float, ...]
    seconds: tuple[float, ...]
    images: Tensor = field(repr=False)

    @property
    def median(self) -> float:
        """Seconds an image once everything is compiled."""
        return statistics.median(self.seconds)

    @property
    def compile_time(self) -> float:
        """Seconds that the warm-up took more than the same number of later images: compilation and recording."""
        return max(0.0, sum(self.warmup) - len(self.warmup) * self.median)


@dataclass(frozen=True)
class Quality:
    """Closeness to the unpruned images of the same seeds: mean and worst over all images. PSNR is capped at 100 dB."""

    ssim: float
    ssim_worst: float
    psnr: float
    psnr_worst: float

    @classmethod
    def of(cls, ssim: Tensor, psnr: Tensor) -> Quality:
        """From the values of each image, as `closeness` gives them."""
        return cls(float(ssim.mean()), float(ssim.min()), float(psnr.mean()), float(psnr.min()))

    @staticmethod
    def decibels(value: float) -> str:
        """A PSNR as text: "equal" at the cap."""
        return "equal" if value >= PSNR_CAP else f"{value:.1f}"


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is CUDA where it works, else the CPU. Raises OptionError for what is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is not a device", where="device", expected="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "CUDA is not available here",
            where="device",
            expected="a working NVIDIA GPU and a CUDA build of torch",
            todo="run toprovar doctor, or choose --device cpu",
        )
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"{name!r} is not supported", where="device", expected="auto, cpu, cuda or cuda:N")
    return device


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The precision users run these models in: float32 on the CPU, autocast to bfloat16 (or float16) on a GPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def in_user_precision(model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """`autocast` for a model; an Infinity, which does without, gets bfloat16 weights on a GPU instead."""
    from toprovar_compile.models.infinity import Infinity

    if not isinstance(model, Infinity):
        return autocast(device)
    if device.type == "cuda":
        model.to(torch.bfloat16)
    return nullcontext()


def precision(device: torch.device) -> str:
    """`autocast` in words."""
    if device.type != "cuda":
        return "float32"
    return "autocast bfloat16" if torch.cuda.is_bf16_supported() else "autocast float16"


def clock(device: torch.device) -> Clock:
    """Runs a call to its end and returns (result, seconds): by CUDA events on a GPU, by the wall clock elsewhere."""
    if device.type == "cuda":
        return _cuda_clock
    return _wall_clock


def run_way(
    way: Way,
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    device: torch.device,
    sampling: dict[str, Any],
    warmup: int | None = None,
    on_image: Callable[[str, int], None] = lambda phase, done: None,
) -> Outcome:
    """Generate every job, one image at a time, after `warmup` untimed ones (default 1, on a GPU 3).

    `sampling` goes to the model's forward. `on_image("compile" | "run", images done)` is called at the start and after
    each image.
    Compiled code of earlier ways is dropped first, so that no way pays for another's recompilations.
    """
    forget_compiled()
    generate = way.prepare(model)
    timed = clock(device)
    rounds = warmup if warmup is not None else (3 if device.type == "cuda" else 1)

    def image(job: Job, seed: int) -> tuple[Tensor, float]:
        given = job.given(device)
        return timed(lambda: generate(given, seed=seed, **sampling))

    with torch.no_grad(), in_user_precision(model, device):
        on_image("compile", 0)
        spent = []
        for i in range(rounds):
            spent.append(image(jobs[0], jobs[0].seed)[1])
            on_image("compile", i + 1)
        seconds, images = [], []
        for i, job in enumerate(jobs):
            out, elapsed = image(job, job.seed)
            seconds.append(elapsed)
            images.append(out.detach().float().cpu())
            on_image("run", i + 1)
    return Outcome(way.name, tuple(spent), tuple(seconds), torch.cat(images))


def forget_compiled() -> None:
    """Drop all compiled code of this process, Dynamo's and ours."""
    from toprovar_compile import dispatch

    torch.compiler.reset()
    dispatch.reset()
    gc.collect()  # what was compiled refers to itself, and holds the memory of its graphs


def closeness(images: Tensor, unpruned: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and PSNR (capped) of each image (N, 3, H, W) in 0..1 to the unpruned one. Needs the "metrics" extra."""
    from toprovar_compile.metrics import psnr, ssim

    return ssim(images, unpruned), psnr(images, unpruned).clamp_max(PSNR_CAP)


def require_metrics(where: str) -> None:
    """Raise MissingDependencyError, before minutes are spent, when images could not be compared in the end."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise MissingDependencyError(
            "torchmetrics is not installed",
            where=where,
            expected='the extra "metrics", to compare images',
            todo="pip install 'toprovar_compile[metrics]'",
        )


def eager_way() -> Way:
    """Plain PyTorch."""
    return Way("eager", lambda model: model)


def inductor_way(mode: str | None = None) -> Way:
    """`torch.compile` as it comes, in one of its modes (None: the default)."""
    name = "inductor" if mode is None else f"inductor {mode}"
    return Way(name, lambda model: torch.compile(model, mode=mode))


def toprovar_way(plan: Plan, name: str = "toprovar", **options: Any) -> Way:
    """`torch.compile(backend="toprovar")` with a plan and further backend options."""

    def prepare(model: nn.Module) -> Generate:
        settings: dict[str, Any] = {"plan": plan, **options}
        return torch.compile(model, backend="toprovar", options=settings)

    return Way(name, prepare, plan)


def choose_jobs(model: nn.Module, count: int, seed: int) -> list[Job]:
    """`count` different classes, or example prompts, drawn with `seed`, the image seeds counted up from it."""
    if hasattr(model, "sample_prompts"):
        drawn: Any = model.sample_prompts
        return [Job(None, prompt, seed + i) for i, prompt in enumerate(drawn(count, seed))]
    classes: int = model.cfg.num_classes  # type: ignore[union-attr, assignment]
    if not 1 <= count <= classes:
        raise OptionError(f"{count} classes were asked for", where="count", expected=f"1..{classes}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(classes, generator=generator)[:count].tolist()
    return [Job(label, class_name(model, label), seed + i) for i, label in enumerate(labels)]


def class_name(model: nn.Module, label: int) -> str:
    """Readable name of a class, "class 12" where the model has none."""
    names = getattr(model, "class_names", None)
    return str(names[label]) if names else f"class {label}"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: hardware, thread count, versions, precision, attention kernel."""
    info: dict[str, Any] = {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": precision(device),
        "attention": attention_kernel(device),
    }
    if device.type == "cuda":
        info["cuda"] = torch.version.cuda
        info["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return info


def cpu_name() -> str:
    """Name of the processor, from /proc/cpuinfo where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def attention_kernel(device: torch.device) -> str:
    """The kernels that scaled_dot_product_attention may choose from, in PyTorch's order."""
    if device.type != "cuda":
        return "PyTorch flash attention (CPU)"
    cuda: Any = torch.backends.cuda
    on = {
        "cuDNN": cuda.cudnn_sdp_enabled(),
        "FlashAttention": cuda.flash_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return "PyTorch SDPA: " + ", ".join(name for name, enabled in on.items() if enabled)


def _wall_clock(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


def _cuda_clock(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    out = call()
    end.record()
    torch.cuda.synchronize()
    return out, start.elapsed_time(end) / 1e3


def cold_caches() -> AbstractContextManager[None]:
    """Inside it nothing compiled earlier is found: caches in memory are emptied, those on disk are in a new folder."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()
