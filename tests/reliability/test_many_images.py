"""Images in a row leave nothing behind: no memory, graphs, variants, guards or kinds of counters.

TOPROVAR_IMAGES=1000 runs as many; the suite runs 60.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters as dynamo

from toprovar_compile import dispatch
from toprovar_compile.cuda_graph import lanes
from toprovar_compile.models.var import VAR
from toprovar_compile.report import _watchers, counters
from toprovar_compile.session import current_session

IMAGES = int(os.environ.get("TOPROVAR_IMAGES", "60"))
# Pages that the allocator of the system keeps.
GROWTH_KIB = 16 * 1024


def _resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def _counts() -> dict[str, int]:
    gc.collect()
    classes = dispatch._classes.values()
    return {
        "tensors": sum(issubclass(type(o), Tensor) for o in gc.get_objects()),
        "frames": dynamo["stats"]["unique_graphs"],
        "classes": len(classes),
        "variants": sum(len(cls.variants) for cls in classes),
        "sizes known": sum(len(cls._chosen) for cls in classes),
        "lanes": len(lanes._idle),
        "buffers": sum(len(lane.buffers) for _, lane in lanes._idle),
        "kinds of events": len(counters.snapshot()),
        "watchers": len(_watchers),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of this process from /proc")
def test_images_in_a_row(fast: Callable[..., Tensor], model: VAR) -> None:
    def generate(count: int) -> None:
        for i in range(count):
            labels = torch.tensor([i % 10] * (1 + i % 2))
            assert fast(labels, seed=i).shape[0] == len(labels)

    generate(10)  # both batch sizes, and what the allocator keeps
    before, memory = _counts(), _resident_kib()
    generate(IMAGES)
    after = _counts()
    # What earlier tests left may go at any time.
    assert after.pop("tensors") <= before.pop("tensors")
    assert after == before
    assert _resident_kib() - memory < GROWTH_KIB
    assert current_session() is None
