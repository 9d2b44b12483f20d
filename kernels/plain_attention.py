"""Plain attention by the fastest kernel of this machine, found by measurement: what attention costs without entropy.

Shapes: q (B, H, n, D), k and v (B, H, m, D) of one dtype, n, m > 0; bias None or broadcastable to (B, H, n, m),
additive or boolean (True = attend). out (B, H, n, D) has the memory of a contiguous (B, n, H, D); a row that attends
to nothing is 0.

The candidates are cuDNN, FlashAttention-2 and the memory-efficient kernel of PyTorch, as far as its switches
(`torch.backends.cuda`) allow them, and those that `register` adds. All are timed once for each class of shapes: dtype,
head dimension, kind of bias, memory of q, and batch * heads, n and m rounded up to powers of two. The winner is
kept for the process and on disk, in one file for each GPU and set of versions, so that later processes run the same
kernels and give the same numbers. While a CUDA graph is captured nothing is timed: the nearest class that is known
serves, or what PyTorch prefers where none is, and that is counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toprovar_compile.errors import OptionError, ToproVarError
from toprovar_compile.files import cache_folder, write_json
from toprovar_compile.kernels._triton import TritonError, triton
from toprovar_compile.report import counters

Candidate = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(q, k, v, bias, scale) -> out, as the module describes them. Raises RuntimeError where it cannot run."""

_FALLBACK = "pytorch"
_ROUNDS = 7
_TOLERANCE = 0.05  # of the largest value: several roundings to bfloat16
_SWITCHES = {"cudnn": "c", "flash": "f", "efficient": "e"}  # letters of ShapeClass.switches


@dataclass(frozen=True)
class ShapeClass:
    """Attentions that are timed together: `rows` is batch * heads, a power of two like `n` and `m`."""

    dtype: str
    head_dim: int
    bias: str
    layout: str
    switches: str
    rows: int
    n: int
    m: int

    def __str__(self) -> str:
        return (
            f"{self.dtype} D{self.head_dim} {self.bias}, q {self.layout}, B*H <= {self.rows}, n <= {self.n}, "
            f"m <= {self.m}" + ("" if self.switches == "cfe" else f", switches {self.switches or 'none'}")
        )

    def distance(self, other: ShapeClass) -> float:
        """Doublings between two classes, infinite between those that are not comparable."""
        if replace(other, rows=self.rows, n=self.n, m=self.m) != self:
            return math.inf
        pairs = ((self.rows, other.rows), (self.n, other.n), (self.m, other.m))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class Choice:
    """The winner of a class, the milliseconds of all that ran, and why the others did not."""

    winner: str
    ms: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.winner} (" + ", ".join(f"{name} {ms:g} ms" for name, ms in self.ms.items()) + ")"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention by the winner of the class of these inputs, which is measured first where it is not known."""
    q, scale = positive_scale(q, scale)
    return _candidate(_winner(q, k, v, bias, scale))(q, k, v, bias, scale)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale that give the same scores: kernels take maxima before they scale."""
    if scale > 0.0:
        return q, scale
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)


def chosen() -> dict[str, dict[str, Any]]:
    """What serves each class that this process has met: {class: {"winner", "ms", "failed"}}."""
    return {str(kind): asdict(choice) for found in _known.values() for kind, choice in found.items()}


def register(name: str, run: Candidate) -> None:
    """Let a further kernel compete."""
    _candidates[name] = run


def candidates() -> dict[str, Candidate]:
    """The kernels that compete, by name."""
    return dict(_candidates)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The kernel that PyTorch prefers; runs everywhere."""
    mask = None
    if bias is not None:
        mask = bias.expand(*q.shape[:3], k.shape[2])
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return _finish(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), bias)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _half_only(q)
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return _finish(attention(q, k, v, additive(q, k, bias), False, 0.0, False, False, scale=scale)[0], bias)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    if bias is not None:
        raise NotImplementedError("takes no bias")
    _half_only(q)
    return _finish(torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0], None)


def _half_only(q: Tensor) -> None:
    """cuDNN's operator, called past PyTorch's checks, reads float32 as if it were half precision."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"takes no {q.dtype}")


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    attention = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return _finish(attention(q, k, v, additive(q, k, bias), False, scale=scale)[0], bias)


_candidates: dict[str, Candidate] = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}
_known: dict[int | None, dict[ShapeClass, Choice]] = {}  # by index of the device
_lock = threading.Lock()


def _candidate(name: str) -> Candidate:
    return by_pytorch if name == _FALLBACK else _candidates[name]


def additive(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias as those kernels want it: in the dtype of q, its rows aligned to 16 bytes."""
    if bias is None:
        return None
    m = k.shape[2]
    bias = bias.expand(*bias.shape[:-1], m) if bias.dim() else bias.expand(m)
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill_(~bias, -math.inf)
    padding = -m % 8
    return F.pad(bias.to(q.dtype), (0, padding))[..., :m].expand(*q.shape[:3], m)


def _finish(out: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:  # cuDNN gives the mean of v to rows that attend to nothing
        nothing = ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else bias.amax(-1, keepdim=True) == -math.inf
        out = out.masked_fill(nothing, 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _winner(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> str:
    kind = _classify(q, k, bias)
    known = _known.get(q.device.index)
    choice = known.get(kind) if known else None
    return choice.winner if choice else _meet(kind, q, k, v, bias, scale)


def _meet(kind: ShapeClass, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> str:
    """The winner of a class that this process meets for the first time."""
    with _lock:
        if q.device.index not in _known:
            _known[q.device.index] = _load(q.device)
        known = _known[q.device.index]
        if kind in known:
            return known[kind].winner
        near = min(known, key=kind.distance, default=kind)
        guess = known[near].winner if near in known and kind.distance(near) < math.inf else _FALLBACK
        if torch.cuda.is_current_stream_capturing():
            counters.add("plain attention not measured", f"a CUDA graph is captured; {guess} serves {kind}")
            return guess
        try:
            choice = _measure(q, k, v, bias, scale, kind)
        except torch.OutOfMemoryError:
            counters.add("plain attention not measured", f"out of memory; {guess} serves {kind}")
            return guess
        known[kind] = choice
        counters.add("plain attention measured", f"{choice} for {kind}")
        _save(q.device)
    return choice.winner


def _classify(q: Tensor, k: Tensor, bias: Tensor | None) -> ShapeClass:
    b, h, n, d = q.shape
    cuda: Any = torch.backends.cuda
    enabled = (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    return ShapeClass(
        dtype=str(q.dtype).removeprefix("torch."),
        head_dim=d,
        bias="without bias" if bias is None else "with a mask" if bias.dtype == torch.bool else "with a bias",
        layout="(B, n, H, D)" if h == 1 or q.stride(1) < q.stride(2) else "(B, H, n, D)",
        switches="".join(letter for letter, on in zip("cfe", enabled, strict=True) if on),
        rows=_power_of_two(b * h),
        n=_power_of_two(n),
        m=_power_of_two(k.shape[2]),
    )


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _measure(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, kind: ShapeClass) -> Choice:
    ms: dict[str, float] = {}
    failed: dict[str, str] = {}
    right = by_pytorch(q, k, v, bias, scale)
    tolerance = _TOLERANCE * max(float(right.abs().max()), 1e-6)

    def time(name: str, run: Candidate) -> None:
        try:
            off = float((run(q, k, v, bias, scale) - right).abs().max())
            if not off <= tolerance:  # also where it is nan
                failed[name] = f"its result is off by {off:.1e}"
                return
            ms[name] = time_ms(lambda: run(q, k, v, bias, scale), q.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ToproVarError, TritonError) as error:
            failed[name] = str(error).strip().partition("\n")[0][:200]

    for name, run in _candidates.items():
        if name in _SWITCHES and _SWITCHES[name] not in kind.switches:
            failed[name] = "switched off"
        else:
            time(name, run)
    if not ms.keys() & _SWITCHES.keys():
        time(_FALLBACK, by_pytorch)
    return Choice(min(ms, key=ms.__getitem__, default=_FALLBACK), ms, failed)


def time_ms(run: Callable[[], object], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Median milliseconds on the device, its L2 cache cold; as a CUDA graph, so that the host's part does not count."""
    event: Any = torch.cuda.Event
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        for _ in range(2):
            run()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        size = 4 * int(torch.cuda.get_device_properties(device).L2_cache_size)
        other = torch.empty(max(size, 1 << 20), dtype=torch.int8, device=device)
        marks = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(rounds)]
        for start, end in marks:
            other.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(device)
    times: list[float] = [start.elapsed_time(end) for start, end in marks]
    return round(statistics.median(times), 5)


def _machine(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    cudnn: Any = torch.backends.cudnn
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": str(cudnn.version()),
        "triton": getattr(triton, "__version__", "none"),
        "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16],
        "candidates": ", ".join(_candidates),
    }


def _path(device: torch.device) -> Path:
    key = hashlib.sha256(json.dumps(_machine(device)).encode()).hexdigest()[:16]
    return cache_folder() / f"plain_attention_{key}.json"


def _load(device: torch.device) -> dict[ShapeClass, Choice]:
    """What earlier processes measured on such a device."""
    path = _path(device)
    try:
        entries = json.loads(path.read_text())["classes"]
        found = {ShapeClass(**entry["class"]): Choice(**entry["choice"]) for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        counters.add("plain attention measured again", f"{path.name} cannot be read: {type(error).__name__}")
        return {}
    return {kind: choice for kind, choice in found.items() if choice.winner in (_FALLBACK, *_candidates)}


def _save(device: torch.device) -> None:
    classes = _known[device.index].items()
    entries = [{"class": asdict(kind), "choice": asdict(choice)} for kind, choice in classes]
    try:
        write_json(_path(device), {"machine": _machine(device), "classes": entries})
    except (OSError, OptionError) as error:  # the next process measures again
        counters.add("plain attention not kept", str(error))
