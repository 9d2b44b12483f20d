"""Official models, unmodified: `prepare` and `accelerate`.

`accelerate(model)` makes the model's own entry point generate with compiled steps, in place, until `undo()`;
`prepare(model)` gives the module that does it, for `torch.compile(..., backend="toprovar")` by hand. An adapter
recognises its family by attributes, parameter names and shapes, and by what the first block computes.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.options import Options
from toprovar_compile.plan import Plan
from toprovar_compile.prepare import hart, infinity, var
from toprovar_compile.prepare.blocks import Schedule, install
from toprovar_compile.prepare.family import Family, compile_steps
from toprovar_compile.prepare.shims import shims

__all__ = ["Handle", "accelerate", "accelerate_blocks", "prepare", "shims"]

FAMILIES: tuple[Family, ...] = (var.FAMILY, hart.FAMILY, infinity.FAMILY)


def prepare(model: nn.Module) -> nn.Module:
    """A module on the parameters of an official model whose forward is one generation, for `torch.compile`.

    The official object is left as it is, and its weights are not copied. The forward is that of our model of the
    family (VAR, Infinity), or has the official arguments (HART). Raises UnsupportedModelError that says what each
    family was looked for by.
    """
    return _family(model).prepare(model)


def accelerate(model: nn.Module, plan: Plan | str | os.PathLike[str] = "auto", **options: Any) -> Handle:
    """Make the entry point of an official model generate with compiled steps, until `Handle.undo()`.

    `plan` and `options` are those of the backend (docs/options.md): "dense" keeps the images, "auto" takes the plan in
    `handle.prepared.plan` and runs dense where there is none. Arguments, results and random draws of the entry point
    stay the official ones. Raises UnsupportedModelError as `prepare` does, and for a model that is accelerated already;
    OptionError for an unknown option.
    """
    options = _options(plan, options)
    family = _family(model)
    _check_new(model, family.entry)
    prepared = family.prepare(model)
    compiled = compile_steps(prepared, options)
    return Handle(model, family.name, family.entry, prepared, family.make_entry(prepared, compiled))


def accelerate_blocks(
    model: nn.Module,
    schedule: Schedule,
    plan: Plan | str | os.PathLike[str] = "auto",
    *,
    entry: str = "autoregressive_infer_cfg",
    blocks: str = "blocks",
    caches: Sequence[str] = ("attn.cached_k", "attn.cached_v"),
    prefix: int = 0,
    stream: str = "x",
    **options: Any,
) -> Handle:
    """Do as `accelerate` for a model of no known family, whose method `entry` runs `for block in blocks` at each scale.

    `schedule` are the sides, or (h, w), of the token maps, or a function that gives them and is called with all
    arguments of the entry point by name. `blocks` is the path of the ModuleList; `caches` are the attributes in which
    a block keeps keys and values between scales, () if it keeps none; `stream` is the name of the blocks' argument
    that holds the tokens (B, n, C), if it is not the first. `prefix` counts tokens that a first step puts into the
    caches before scale 0. See docs/new_model.md. Raises OptionError for paths that lead nowhere.
    """
    options = _options(plan, options)
    _check_new(model, entry)
    listed, call, take_out = install(model, entry, blocks, tuple(caches), schedule, prefix, stream, options)
    return Handle(model, f"blocks of {type(model).__name__}", entry, listed, call, take_out)


class Handle:
    """What was done to a model: `model`, `family`, and `prepared`, whose `plan` is followed under plan="auto".

    `undo()` takes it back, as leaving a `with` block does.
    """

    def __init__(
        self,
        model: nn.Module,
        family: str,
        entry: str,
        prepared: nn.Module,
        call: Callable[..., Any],
        take_out: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.family, self.prepared = model, family, prepared
        self._entry, self._take_out = entry, take_out
        self._before = vars(model).get(entry)
        setattr(model, entry, Entry(model, entry, call))

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated."""
        return isinstance(vars(self.model).get(self._entry), Entry)

    def undo(self) -> None:
        """Give the model its own entry point back. A second call does nothing."""
        if not self.active:
            return
        delattr(self.model, self._entry)
        if self._before is not None:
            setattr(self.model, self._entry, self._before)
        if self._take_out is not None:
            self._take_out()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Handle({self.family}, {self._entry}, {'active' if self.active else 'undone'})"


class Entry:
    """The function in the place of an official method. A copy of the model gets the official method, not this one."""

    def __init__(self, model: nn.Module, name: str, call: Callable[..., Any]) -> None:
        self._model, self._name, self._call = model, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copied = memo[id(self._model)]
        return types.MethodType(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> tuple[Any, ...]:
        raise UnsupportedModelError(
            f"{type(self._model).__name__} is accelerated and cannot be pickled",
            where="accelerate",
            expected="its state_dict",
            todo="save model.state_dict(), or call undo() first",
        )


def _options(plan: Plan | str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options of the backend, checked."""
    options = {"plan": os.fspath(plan) if isinstance(plan, os.PathLike) else plan, **options}
    Options.parse(options)
    return options


def _check_new(model: nn.Module, entry: str) -> None:
    if isinstance(vars(model).get(entry), Entry):
        raise UnsupportedModelError(
            f"{type(model).__name__} is accelerated already", where="accelerate", todo="call undo() of its handle first"
        )


def _family(model: nn.Module) -> Family:
    """The family of a model."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"got a {type(model).__name__}", where="prepare", expected="a torch.nn.Module")
    looked = []
    for family in FAMILIES:
        missing = family.missing(model)
        if not missing:
            missing = _other_arguments(model, family)
        if not missing:
            return family
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        looked.append(f"{family.name} has {', '.join(missing[:5])}{more}")
    raise UnsupportedModelError(
        f"{type(model).__name__} is of no known family",
        where="prepare",
        expected=f"a model of one of them, as its authors' code builds it, but {'; '.join(looked)}, which it has not",
        todo="pass the transformer itself (no wrapper, no pipeline), or see docs/new_model.md for models of your own",
    )


def _other_arguments(model: nn.Module, family: Family) -> list[str]:
    """Where the entry point is not the official one."""
    method = getattr(type(model), family.entry, None)
    if method is None:
        return [f"a method {family.entry}"]
    found = [name for name in inspect.signature(method).parameters if name != "self"]
    return [] if found == list(family.arguments) else [f"a method {family.entry}({', '.join(family.arguments)})"]


class _CallableModule(types.ModuleType):
    """`toprovar_compile.prepare` is this package and, called, its function of that name."""

    def __call__(self, model: nn.Module) -> nn.Module:
        return prepare(model)


sys.modules[__name__].__class__ = _CallableModule
