"""Generate two emoji with the compiled model and save them."""

from pathlib import Path

import torch

import toprovar_compile as tv
from toprovar_compile.demo import to_image

model = tv.models.load("emoji-var")
fast = torch.compile(model, backend="toprovar")

labels = torch.tensor([tv.models.find_class(name)[0] for name in ("rocket", "red apple")])
images = fast(labels, seed=0)  # the first call compiles; later ones only run

folder = Path("toprovar-out")
folder.mkdir(exist_ok=True)
for name, image in zip(("rocket", "red-apple"), images, strict=True):
    to_image(image).save(folder / f"{name}.png")
print(f"wrote {len(images)} pictures of {images.shape[-1]}x{images.shape[-2]} to {folder}")

assert images.shape == (2, 3, 256, 256)
assert 0 <= images.min() <= images.max() <= 1
