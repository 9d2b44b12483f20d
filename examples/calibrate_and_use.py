"""Make a plan from sample prompts, then use it."""

import tempfile
from pathlib import Path

import torch

import toprovar_compile as tv
from toprovar_compile.calibrate import calibrate
from toprovar_compile.policies.toprovar import Thresholds

model = tv.models.load("emoji-var")
plan = calibrate(model, prompts=4, seed=0, thresholds=Thresholds(tau=0.4))  # use about 50 prompts in earnest

path = Path(tempfile.mkdtemp()) / "plan.json"
plan.save(path)
print("share of tokens computed, scale by scale:", ", ".join(f"{share:.0%}" for share in plan.token_share()))

fast = torch.compile(model, backend="toprovar", options={"plan": str(path), "inner": "eager"})
images = fast(torch.tensor([7]), seed=0)

assert plan.model == model.fingerprint()
assert 0 < plan.total_share() <= 1
assert images.shape == (1, 3, 256, 256)
