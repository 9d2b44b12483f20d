"""Write the table of compile-time counts anew: `python tests/compile_time/rewrite.py`."""

from __future__ import annotations

import measure  # the module beside this script
import torch

torch.set_num_threads(1)
old = measure.load() if measure.TABLE.exists() else []
rows = measure.measure()
measure.save(rows)
print(*(measure.differences(rows, old) or ["no count is off by more than its margin"]), sep="\n")
