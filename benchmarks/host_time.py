"""Host microseconds of each scale's step of an Infinity of 32 layers, through Dynamo and replayed, on the CPU.

    python benchmarks/host_time.py [--depth 32]

Nothing is launched, so the numbers are what the host adds to a launch. See docs/infinity.md.
"""

from __future__ import annotations

import argparse
from statistics import median

from toprovar_compile.bench.host import measure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--images", type=int, default=9)
    given = parser.parse_args()
    for way, scales in measure(given.depth, given.images).items():
        print(f"{way:>14}: " + " ".join(f"{us:5.0f}" for us in scales) + f"   median {median(scales):.0f}")
