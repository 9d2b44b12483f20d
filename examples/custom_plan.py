"""Write a plan by hand: prune the last two scales in the middle layers, and leave everything else alone."""

import tempfile
from pathlib import Path

import torch

import toprovar_compile as tv

model = tv.models.load("emoji-var")
depth = len(model.blocks)
plan = tv.Plan.keep_share(model.schedule, depth, keep={8: 0.5, 9: 0.25}, from_scale=8, layers=range(2, depth - 2))

path = Path(tempfile.mkdtemp()) / "plan.json"
plan.save(path)  # a readable file; edit it as you like
assert tv.Plan.load(path) == plan

for (height, width), share in zip(plan.schedule.grids, plan.token_share(), strict=True):
    print(f"{height:>3} x {width:<3} {share:6.1%} of the tokens computed")

pruned = torch.compile(model, backend="toprovar", options={"plan": str(path), "inner": "eager"})
images = pruned(torch.tensor([7]), seed=0)

assert plan.token_share()[:8] == [1.0] * 8
assert plan.total_share() < 0.65
assert images.shape == (1, 3, 256, 256)
assert images.isfinite().all()
