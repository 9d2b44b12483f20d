"""Host time of a scale's step, apart from the device: graphs are stand-ins that launch nothing and return what was.

Everything around the launch runs as on a GPU, for a model as deep as Infinity-2B and narrow, on the CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from toprovar_compile.cuda_graph import Lane, Scale
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import INFINITY_2B, Infinity
from toprovar_compile.models.infinity_schedule import infinity_schedule
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.replay import StepReplays
from toprovar_compile.session import Session


class _Nothing:
    def replay(self, generator: torch.Generator | None) -> None:
        """Launch nothing."""


def _record(lane: Lane, scale: Scale, fixed: Any) -> tuple[Any, list[Any]]:
    return _Nothing(), scale.run(fixed) if scale.generator is None else scale.run(fixed, scale.generator)


@contextmanager
def stand_ins(record: Callable[[Lane, Scale, Any], tuple[Any, list[Any]]] = _record) -> Iterator[None]:
    """Steps on the CPU are recorded and launched as on a CUDA device, without one.

    `record(lane, scale, inputs)` makes a graph, whose `replay(generator)` launches it, and its outputs; by default a
    launch does nothing, and images are arbitrary.
    """
    with (
        patch.object(Lane, "_record", record),
        patch.object(Lane, "_replay", lambda lane, graph, generator: graph.replay(generator)),
        patch.object(Lane, "recordable", staticmethod(lambda x: True)),
        patch.object(torch.cuda, "graph_pool_handle", lambda: (0, 0)),
    ):
        yield


def measure(depth: int, images: int = 9) -> dict[str, list[float]]:
    """Microseconds of the host in each scale's step, the least of so many images, by the way that steps go."""
    cfg = replace(
        INFINITY_2B, depth=depth, embed_dim=128, num_heads=2, text_channels=128, vae=BSQVAEConfig(8, 32, (1, 2), 1)
    )
    model = Infinity.random(cfg, dtype=torch.bfloat16)
    model.schedule = infinity_schedule("1:1", "0.06M")
    compiled = compile_steps(model, {"inner": "eager", "plan": "dense"})
    text = [torch.randn(7, cfg.text_channels)]
    seconds: list[float] = []
    original: Any = Session.step

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def timed(session: Session, run: Any, *args: Any, **how: Any) -> Any:
        start = time.perf_counter()
        result = original(session, run, *args, **how)
        seconds.append(time.perf_counter() - start)
        return result

    def image() -> list[float]:
        seconds.clear()
        compiled(text, seed=0)
        return [1e6 * s for s in seconds]

    def least() -> list[float]:
        for _ in range(3):
            image()
        gc.collect()
        gc.disable()
        try:
            return [min(scale) for scale in zip(*[image() for _ in range(images)], strict=True)]
        finally:
            gc.enable()

    with stand_ins(), patch.object(Session, "step", timed):
        with patch.object(StepReplays, "replay", lambda *_: None):
            through_dynamo = least()
        return {"through Dynamo": through_dynamo, "replayed": least()}
