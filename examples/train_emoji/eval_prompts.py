"""Write the prompts of EmojiEval: compositions that `scenes.reserved` keeps out of training, in GenEval's proportions.

    python eval_prompts.py --out ../../toprovar_compile/evaluate/emoji_prompts.json

The order of the candidates is a hash of their words, so the same vocabulary gives the same prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from toprovar_compile.evaluate.emoji_eval import PROMPTS, SIZES, TASKS

from scenes import COLOURS, GROUNDS, Group, Scene, prompt, reserved, reserved_parts, vocabulary


def candidates(task: str) -> Iterator[Scene]:
    """Scenes of a task; those that hold no reserved composition are no candidates."""
    nouns = list(vocabulary())
    coloured = [(n, c) for n in nouns if vocabulary()[n].recoloured for c in COLOURS if c != vocabulary()[n].own]
    if task == "single object":
        yield from (Scene((Group(n),), None, g) for n in nouns for g in GROUNDS)
    elif task == "two objects":
        yield from (Scene((Group(a), Group(b)), "and") for a, b in itertools.permutations(nouns, 2))
    elif task == "counting":
        yield from (Scene((Group(n, count),)) for n in nouns for count in (2, 3, 4))
    elif task == "colors":
        yield from (Scene((Group(n, 1, c),)) for n, c in coloured)
    elif task == "position":
        relations = ("left of", "right of", "above", "below")
        pairs = itertools.permutations(nouns, 2)
        yield from (Scene((Group(a), Group(b)), r) for a, b in pairs for r in relations)
    else:
        for (a, x), (b, y) in itertools.permutations(coloured, 2):
            if a < b and x != y:
                yield Scene((Group(a, 1, x), Group(b, 1, y)), "and")


_KINDS = {"position": "relation", "two objects": "pair", "attribute binding": "pair"}


def choose(task: str, size: int) -> list[Scene]:
    """The scenes of a task, objects as even as can be: none again before all that can have been taken."""
    found = []
    for scene in candidates(task):
        kinds = {part[0] for part in reserved_parts(scene)}
        if kinds and (task not in _KINDS or kinds == {_KINDS[task]}):
            found.append(scene)
    found.sort(key=lambda s: hashlib.blake2b(prompt(s).encode(), digest_size=8).hexdigest())
    used: dict[str, int] = {}
    chosen: list[Scene] = []
    limit = 1
    while len(chosen) < size:
        before = len(chosen)
        for scene in found:
            words = [w for g in scene.groups for w in (g.noun, *([f"colour {g.colour}"] if g.colour else []))]
            words += [f"relation {scene.relation}"] if task == "position" else []
            words += [f"count {scene.groups[0].count}"] if task == "counting" else []
            words += [f"ground {scene.ground}"] if task == "single object" else []
            room = all(used.get(w, 0) < limit * (1 if w in vocabulary() else size // 4) for w in words)
            if len(chosen) < size and scene not in chosen and room:
                chosen.append(scene)
                used.update({w: used.get(w, 0) + 1 for w in words})
        limit += len(chosen) == before
    random.Random(task).shuffle(chosen)
    return chosen


def entries() -> list[dict[str, Any]]:
    """All prompts, task by task as in TASKS."""
    out = []
    for task, size in zip(TASKS, SIZES, strict=True):
        for scene in choose(task, size):
            assert reserved(scene)
            out.append({"task": task, "prompt": prompt(scene)} | scene.to_json())
    return out


def text() -> str:
    """The prompts file, an entry a line."""
    return "[\n" + ",\n".join(json.dumps(e) for e in entries()) + "\n]\n"


def main(out: Annotated[Path, typer.Option(help="File to write.")] = PROMPTS) -> None:
    """Write the prompts of EmojiEval."""
    out.write_text(text())
    print(f"{sum(SIZES)} prompts in {out}")


if __name__ == "__main__":
    typer.run(main)
