"""Ask what was captured, proven, compiled and run, and whether anything fell back."""

import torch

import toprovar_compile as tv

model = tv.models.load("emoji-var")
plan = tv.Plan.keep_share(model.schedule, len(model.blocks), keep=0.5, from_scale=8)
fast = torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})

report = tv.explain(fast, torch.tensor([7]), seed=0)
print(report)

assert any(graph.kind == "step" for graph in report.graphs)
assert not any(event.startswith("fallback") for event in report.events)
