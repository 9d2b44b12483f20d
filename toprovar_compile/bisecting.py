"""Find what makes a result wrong: the stage of the compiler, and the smallest part of a graph."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from toprovar_compile.errors import OptionError
from toprovar_compile.measure import forget_compiled
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


@dataclass(frozen=True)
class Minified:
    """The smallest graph that was found to fail, and its inputs. `str()` is a script that runs it alone."""

    graph: GraphModule
    inputs: tuple[Any, ...]

    def __str__(self) -> str:
        from toprovar_compile.dump.repro import repro_text

        return repro_text(self.graph, self.inputs, "inductor")


def minify(
    module: nn.Module, inputs: Sequence[Any], fails: Callable[[nn.Module, Sequence[Any]], bool] | None = None
) -> Minified:
    """Cut the graph of `module` down to a small part with which `fails(part, its inputs)` still holds.

    Parts are made by functorch's minifier: ends are cut off, and operators replaced by inputs of the value they had.
    Without `fails` it is `differs`. A part for which `fails` raises is left alone. Raises OptionError where the whole
    graph does not fail.
    """
    from functorch.compile import minifier

    wrong = differs if fails is None else fails
    graph, given = _captured(module, inputs)
    if not wrong(graph, given):
        raise OptionError("the graph does not fail", where="minify", expected="fails(module, inputs) to be True")

    def part_fails(part: GraphModule, values: Sequence[Any]) -> bool:
        try:
            return bool(wrong(part, values))
        except Exception:
            return False

    with redirect_stderr(io.StringIO()):  # its progress
        small, values = minifier(graph, given, part_fails, dump_state=lambda *_: None, skip_sanity=True)
    small.recompile()
    return Minified(small, tuple(values))


def differs(module: nn.Module, inputs: Sequence[Any], inner: str = "inductor", tolerance: float = 1e-3) -> bool:
    """Whether compiling `module`, unpruned, raises or gives other numbers than running it.

    Numbers may be off by `tolerance` of the largest one. What was compiled so far is forgotten.
    """
    from toprovar_compile.backend import toprovar

    expected = module(*inputs)
    forget_compiled()
    try:
        compiled: Any = torch.compile(module, backend=toprovar, options={"plan": "dense", "inner": inner})
        found = compiled(*inputs)
    except Exception:
        return True
    finally:
        forget_compiled()
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    return any(_off(a, b) > tolerance for a, b in pairs)


def _off(expected: Tensor, found: Tensor) -> float:
    """The largest difference in parts of the largest number; infinite where only one of both is finite."""
    a, b = expected.detach().double(), found.detach().double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) if a.numel() else 0.0


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _captured(module: nn.Module, inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, parameters being inputs, and the inputs of this call."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append((gm, list(args)))
            return gm(*args)

        return run

    forget_compiled()
    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    forget_compiled()
    ((gm, args),) = found
    return gm, args


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
    forget_compiled()
    token = switched_off.set(off)
    try:
        return bool(check(fn()))
    except Exception:
        return False
    finally:
        switched_off.reset(token)
        forget_compiled()
