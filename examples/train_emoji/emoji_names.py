"""Names and keywords of the emoji renders, from the annotations of Unicode's CLDR: writes emoji_names.json.

    npm pack cldr-annotations-modern@45.0.0 cldr-annotations-derived-modern@45.0.0
    python emoji_names.py --data data --annotations .

The file is kept in the repository, so that training needs neither package.
"""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import typer

import data

NAMES = Path(__file__).with_name("emoji_names.json")
_KEYWORDS = 3


def plain(text: str) -> str:
    """A name in the words that prompts use: lower case, ASCII, no punctuation but commas, colons as commas."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'").replace("&", "and").replace("\u00df", "ss").lower())
    text = re.sub(r"keycap: (.)", lambda m: "keycap " + {"#": "hash", "*": "star"}.get(m[1], m[1]), text)
    text = "".join(c for c in text if c.isascii()).replace(":", ",")
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9', ]", " ", text.replace("-", " "))).strip(" ,")


def read_annotations(folder: Path) -> dict[str, dict[str, Any]]:
    """The English annotations of both npm packages by emoji, without variation selectors."""
    out: dict[str, dict[str, Any]] = {}
    for tgz in sorted(folder.glob("cldr-annotations-*.tgz")):
        with tarfile.open(tgz) as tar:
            for member in tar:
                if member.name.endswith("/en/annotations.json"):
                    found = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    for part in found.values():
                        out |= {k.replace("\ufe0f", ""): v for k, v in part["annotations"].items()}
    return out


def describe(code: str, annotations: dict[str, dict[str, Any]]) -> list[str]:
    """The name of an emoji and up to three words more."""
    text = "".join(chr(p) for p in data.code_points(code) if p != 0xFE0F)
    found = annotations.get(text)
    if found is None:
        return [plain(data.readable_name(code))]
    name = plain(found["tts"][0])
    more = [w for w in map(plain, found.get("default", ())) if w and " " not in w and w.isalpha() and w not in name]
    return [name, *more[:_KEYWORDS]]


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder of the renders' package file.")] = Path("data"),
    annotations: Annotated[Path, typer.Option(help="Folder of the two annotation packages.")] = Path("."),
) -> None:
    """Write emoji_names.json."""
    with tarfile.open(sorted(folder.glob("*fluent-emoji-3d*.tgz"))[0]) as tar:
        codes = sorted(Path(m.name).stem for m in tar if m.name.endswith(".webp"))
    known = read_annotations(annotations)
    lines = [f"{json.dumps(c)}: {json.dumps(describe(c, known))}" for c in codes]
    NAMES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} names in {NAMES}")


if __name__ == "__main__":
    typer.run(main)
