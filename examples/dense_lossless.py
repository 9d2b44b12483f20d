"""plan="dense" is lossless: the images are those of the model itself."""

import torch

import toprovar_compile as tv

model = tv.models.load("emoji-var")
# inner="eager" runs the captured pieces without generating code; leave it out to be fast.
dense = torch.compile(model, backend="toprovar", options={"plan": "dense", "inner": "eager"})

labels = torch.tensor([7, 2000])
difference = (dense(labels, seed=3) - model(labels, seed=3)).abs().max().item()
print(f"largest difference of a pixel: {difference:.1e}")

assert difference < 1e-3
