"""Find the stage of the compiler that makes a result wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toprovar_compile.options import Options
from toprovar_compile.passes import DYNAMO_PASSES, PASSES_OF_A_VARIANT, Outline
from toprovar_compile.passes._base import switched_off

PRUNING, INDUCTOR = "prune_tokens", "inductor"
"""The stages that are no passes: following the plan, and compiling the pieces."""

STAGES = (
    *(entry.run.__name__ for entry in DYNAMO_PASSES),
    Outline.outline_layers.__name__,
    *(entry.run.__name__ for entry in PASSES_OF_A_VARIANT),
    PRUNING,
    INDUCTOR,
)


@dataclass(frozen=True)
class Bisection:
    """The result: `stage` is the first one with which the check fails, None if it passes with all of them.

    "eager" stands for no stage at all: then the check fails without the compiler's doing. `tried` says what was run:
    (last stage switched on, whether the check passed).
    """

    stage: str | None
    tried: tuple[tuple[str, bool], ...]

    def __str__(self) -> str:
        lines = [f"with stages up to {name}: {'passes' if good else 'fails'}" for name, good in self.tried]
        found = "no stage makes the check fail" if self.stage is None else f"the check fails from {self.stage} on"
        return "\n".join([*lines, found])


def bisect_passes(fn: Callable[[], Any], check: Callable[[Any], bool]) -> Bisection:
    """Run `fn` with more or fewer stages of the compiler until the one is found that makes `check(fn())` fail.

    The stages are `STAGES`, in order, and are switched on from the first; what was compiled so far is forgotten before
    each run, so that `fn` compiles anew. An exception in `fn` or `check` is a failed check. The check must pass in the
    same way each time: set seeds.
    """
    tried: dict[int, bool] = {}

    def good(count: int) -> bool:
        if count not in tried:
            tried[count] = _passes(fn, check, frozenset(STAGES[count:]))
        return tried[count]

    low, high = 0, len(STAGES)  # good(low) and not good(high), once both are known
    if good(high):
        found: str | None = None
    elif not good(low):
        found = "eager"
    else:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        found = STAGES[high - 1]
    names = ("eager", *STAGES)
    return Bisection(found, tuple((names[count], result) for count, result in tried.items()))


def limited(options: Options) -> Options:
    """The options without the stages that are switched off."""
    off = switched_off.get()
    change: dict[str, Any] = {}
    if PRUNING in off:
        dense = {name: None for name in options.thresholds()}
        change |= {"plan": "dense", **dense}
    if INDUCTOR in off:
        change |= {"inner": "eager"}
    return options.model_copy(update=change) if change else options


def _passes(fn: Callable[[], Any], check: Callable[[Any], bool], off: frozenset[str]) -> bool:
    from toprovar_compile.dispatch import reset

    torch.compiler.reset()
    reset()
    token = switched_off.set(off)
    try:
        return bool(check(fn()))
    except Exception:
        return False
    finally:
        switched_off.reset(token)
        torch.compiler.reset()
        reset()
