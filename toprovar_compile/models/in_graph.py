"""Functions that Dynamo captures as one call each, for layers of which a step has many."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Function = TypeVar("Function", bound=Callable[..., Any])

# Of each trace: a call's results as (shape, stride, dtype, device), None where they lie in the memory of an argument.
_known: weakref.WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = weakref.WeakKeyDictionary()


def in_graph(function: Function) -> Function:
    """`function`, whose calls Dynamo captures and does not follow: it reads its arguments alone, and writes to none.

    Arguments are tensors and constants; the result is a tensor or a tuple of tensors. AOTAutograd traces into the
    call, so what is compiled is the same. Dynamo has fewer nodes to follow, each of which takes it a millisecond, and
    it is told at once how large results are for arguments as large as others before in its trace.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if type(tensor) is not FakeTensor or torch.is_grad_enabled():  # it runs, or AOTAutograd traces it
            return function(*args)
        known = _known.setdefault(tensor.fake_mode, {})
        key = (function, *map(_form, args))
        if key not in known:
            result = function(*args)
            known[key] = None if _aliased(args, result) else _each(_sizes, result)
            return result
        return function(*args) if known[key] is None else _each(_made, known[key])

    return torch.compiler.allow_in_graph(call)  # type: ignore[no-any-return, no-untyped-call]


class _Sizes(tuple[Any, ...]):
    """Shape, strides, dtype and device of a tensor. Holding the tensor would hold the trace that it is of."""


def _each(do: Callable[[Any], Any], result: Any) -> Any:
    return tuple(map(do, result)) if type(result) is tuple else do(result)


def _sizes(value: Tensor) -> _Sizes:
    return _Sizes((value.shape, value.stride(), value.dtype, value.device))


def _made(sizes: _Sizes) -> Tensor:
    shape, stride, dtype, device = sizes
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _form(value: Any) -> Any:
    """What the sizes of results depend on; sizes are the expressions of their symbols."""
    if not isinstance(value, Tensor):
        return value
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return (tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes), value.dtype, value.device)


def _aliased(args: tuple[Any, ...], result: Any) -> bool:
    """Whether a result lies in the memory of an argument."""
    memory = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
    return any(r.untyped_storage()._cdata in memory for r in (result if type(result) is tuple else (result,)))
