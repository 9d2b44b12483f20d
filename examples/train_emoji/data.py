"""The emoji renders: reads the npm package, names its files, and caches all images as one array.

Class i is the i-th file of the package in sorted order. The renders are composited on white.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SIDE = 256
_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_SKIPPED = {0xFE0F, 0x200D}  # variation selector and joiner
_GENDER = {0x2640: "woman", 0x2642: "man"}
# Unicode 15.0 characters, which the unicodedata of Python 3.11 does not know.
_NEW_NAMES = {
    0x1F6DC: "wireless",
    0x1FA75: "light blue heart",
    0x1FA76: "grey heart",
    0x1FA77: "pink heart",
    0x1FA87: "maracas",
    0x1FA88: "flute",
    0x1FAAD: "folding hand fan",
    0x1FAAE: "hair pick",
    0x1FAAF: "khanda",
    0x1FABB: "hyacinth",
    0x1FABC: "jellyfish",
    0x1FABD: "wing",
    0x1FABF: "goose",
    0x1FACE: "moose",
    0x1FACF: "donkey",
    0x1FADA: "ginger root",
    0x1FADB: "pea pod",
    0x1FAE8: "shaking face",
    0x1FAF7: "leftwards pushing hand",
    0x1FAF8: "rightwards pushing hand",
}


@dataclass(frozen=True)
class EmojiClass:
    """One class: readable name, code points joined by "-", and the label of the same emoji without skin tone."""

    name: str
    code: str
    base: int


@dataclass(frozen=True)
class Emoji:
    """All renders: `images` uint8 (N, 3, 256, 256) and their classes in the same order."""

    images: torch.Tensor
    classes: list[EmojiClass]


def code_points(code: str) -> list[int]:
    """The code points of a file stem such as "1f44d-1f3fb"."""
    return [int(part, 16) for part in re.split("[-_]", code)]


def readable_name(code: str) -> str:
    """A readable name of an emoji sequence: "thumbs up sign: light skin tone", "flag: FR", "man, rocket"."""
    points = code_points(code)
    if all(0x1F1E6 <= p <= 0x1F1FF for p in points):
        return "flag: " + "".join(chr(p - 0x1F1E6 + ord("A")) for p in points)
    tags = "".join(chr(p - 0xE0000) for p in points if 0xE0061 <= p <= 0xE007A)
    if tags:
        return f"flag: {tags.upper()}"
    if 0x20E3 in points:
        return f"keycap: {chr(points[0])}"
    parts: list[str] = []
    tones: list[str] = []
    for p in points:
        if p in _TONES:
            tones.append(_TONES[p])
        elif p in _GENDER and parts:
            parts.append(_GENDER[p])
        elif p not in _SKIPPED:
            parts.append((_NEW_NAMES.get(p) or unicodedata.name(chr(p))).lower().removeprefix("emoji component "))
    name = ", ".join(parts)
    return f"{name}: {' and '.join(tones)} skin tone" if tones else name


def classes_of(codes: list[str]) -> list[EmojiClass]:
    """The classes of sorted file stems. Files that share a name get their code points appended to it."""
    names = [readable_name(c) for c in codes]
    bare = {}
    for i, code in enumerate(codes):
        key = tuple(p for p in code_points(code) if p not in _TONES and p not in _SKIPPED)
        if not any(p in _TONES for p in code_points(code)):
            bare.setdefault(key, i)
    out = []
    for i, (code, name) in enumerate(zip(codes, names, strict=True)):
        key = tuple(p for p in code_points(code) if p not in _TONES and p not in _SKIPPED)
        out.append(EmojiClass(name if names.count(name) == 1 else f"{name} ({code})", code, bare.get(key, i)))
    return out


def composite(raw: bytes) -> NDArray[np.uint8]:
    """A render, an RGBA picture file, on white: uint8 (3, 256, 256). Other sizes are centre-cropped."""
    image = Image.open(io.BytesIO(raw)).convert("RGBA")
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    image = image.crop((left, top, left + SIDE, top + SIDE))
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB")).transpose(2, 0, 1)


def read_package(tgz: Path) -> Emoji:
    """All renders of the npm package file."""
    with tarfile.open(tgz) as tar:
        files = {Path(m.name).stem: tar.extractfile(m).read() for m in tar if m.name.endswith(".webp")}  # type: ignore[union-attr]
    codes = sorted(files)
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(lambda c: composite(files[c]), codes)))
    return Emoji(torch.from_numpy(images), classes_of(codes))


def load(folder: Path) -> Emoji:
    """The renders from the cache in `folder`; the first call makes it from a .tgz there, or downloads that with npm."""
    cache = folder / "emoji.npz"
    if not cache.exists():
        found = sorted(folder.glob("*fluent-emoji-3d*.tgz"))
        if not found:
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", PACKAGE, "--pack-destination", str(folder)], check=True)
            found = sorted(folder.glob("*fluent-emoji-3d*.tgz"))
        emoji = read_package(found[0])
        save(emoji, cache)
        return emoji
    with np.load(cache) as data:
        classes = [EmojiClass(**c) for c in json.loads(str(data["classes"]))]
        return Emoji(torch.from_numpy(data["images"]), classes)


def save(emoji: Emoji, cache: Path) -> None:
    """Write the cache file that `load` reads."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(cache, images=emoji.images.numpy(), classes=json.dumps([vars(c) for c in emoji.classes]))


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the package file and the cache.")] = Path("data"),
) -> None:
    """Fetch and cache the emoji renders."""
    emoji = load(folder)
    print(f"{len(emoji.classes)} images {tuple(emoji.images.shape)} in {folder / 'emoji.npz'}")


if __name__ == "__main__":
    typer.run(main)
