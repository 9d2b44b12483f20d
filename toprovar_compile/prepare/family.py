"""What an adapter of a model family says about itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from toprovar_compile.inductor import WhileInside

_RECOMPILE_LIMIT = 64  # forms of a step: models, dtypes, batch sizes and first scales each have their own


@dataclass(frozen=True)
class Family:
    """A family of official models.

    `missing(model)` lists what the family's models have and this one lacks; nothing for a member. `prepare(model)` is
    the module that generates with compilable steps on the model's parameters, and `make_entry(prepared, compiled)` the
    function that takes the place of the method `entry`, whose arguments are `arguments`.
    """

    name: str
    entry: str
    arguments: tuple[str, ...]
    missing: Callable[[nn.Module], list[str]]
    prepare: Callable[[nn.Module], nn.Module]
    make_entry: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]


def compile_steps(module: nn.Module, options: Mapping[str, Any], *, fullgraph: bool = False) -> Any:
    """`torch.compile` with this backend and room for the forms that a step has."""
    compile_with: Any = partial(torch.compile, module, backend="toprovar", options=dict(options), fullgraph=fullgraph)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return compile_with(recompile_limit=_RECOMPILE_LIMIT)
    compiled = compile_with()

    @wraps(compiled)
    def call(*args: Any, **how: Any) -> Any:
        with _room:
            return compiled(*args, **how)

    return call


def _raise_limit() -> int:
    """What it was."""
    config = torch._dynamo.config
    before, config.recompile_limit = config.recompile_limit, _RECOMPILE_LIMIT
    return before


def _set_limit(limit: int) -> None:
    torch._dynamo.config.recompile_limit = limit


_room = WhileInside(_raise_limit, _set_limit)
"""The process's limit is raised. It is read when a call compiles;
before torch 2.12 a function had none of its own."""


def lacks(model: nn.Module, modules: tuple[str, ...], attributes: tuple[str, ...]) -> list[str]:
    """The module paths and attributes that `model` does not have."""
    return [p for p in modules if not has_module(model, p)] + [a for a in attributes if not hasattr(model, a)]


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a submodule at `path`."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
