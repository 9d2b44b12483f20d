"""Host time is measured on what runs on a GPU, but for the launches."""

from __future__ import annotations

from toprovar_compile.bench.host import measure
from toprovar_compile.report import counters


def test_every_scale_is_measured_both_ways() -> None:
    counters.reset()
    found = measure(depth=2, images=1)
    assert list(found) == ["through Dynamo", "replayed"]
    assert [len(scales) for scales in found.values()] == [7, 7]
    assert min(us for scales in found.values() for us in scales) > 0
    assert counters.snapshot()["replayed"] >= 7
