"""Readings of Dynamo graphs (torch IR, values in `meta["example_value"]`), and new nodes with complete meta."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import SymBool, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

_PURE = frozenset({"torch", "toprovar_compile", "einops"})  # functions of these write to nothing, but those named so
_OWN = frozenset({"", "torch", "_operator", "builtins"})  # modules whose functions go by their plain name
_INPLACE_OPERATORS = frozenset(
    {operator.setitem, operator.delitem}
    | {getattr(operator, f"i{n}") for n in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")}
    | {getattr(operator, f"i{n}") for n in ("and", "or", "xor", "lshift", "rshift", "concat")}
)


def op_name(node: Node) -> str:
    """What the node calls, one name for all spellings: functions, methods and aten operators of PyTorch by the plain
    name (`softmax`), other operators as `namespace::name`, functions of other packages as `package.name`.
    """
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.__name__}"
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        space, _, name = str(target).partition(".")
        return name if space == "aten" else f"{space}::{name}"
    root = (getattr(target, "__module__", None) or "").partition(".")[0]
    name = getattr(target, "__name__", "")
    return name if root in _OWN else f"{root}.{name}"


def arguments(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name; `names` are those that may be positional, from the signature when left out."""
    given = dict(zip(names or _parameters(node.target), node.args, strict=False))
    return given | dict(node.kwargs)


def fake(value: object) -> Tensor | None:
    """The example tensor of a node, or None when it has none."""
    example = value.meta.get("example_value") if isinstance(value, Node) else None
    return example if isinstance(example, Tensor) else None


def number(value: object) -> float | None:
    """A finite Python number, written out or known as the value of a node; None for anything else."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def same(a: object, b: object) -> bool:
    """True where two sizes are equal for every input; adds no guard."""
    equal = a == b
    return statically_known_true(equal) if isinstance(equal, bool | SymBool) else False


def differ(a: object, b: object) -> bool:
    """True where two sizes are unequal for every input; adds no guard."""
    unequal = a != b
    return statically_known_true(unequal) if isinstance(unequal, bool | SymBool) else False


def all_same(a: Iterable[object], b: Iterable[object]) -> bool:
    """`same` on each pair, and as many of them."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def same_strides(a: Tensor, b: Tensor) -> bool:
    """True where two tensors of one shape have one memory layout; strides of dimensions of size 1 do not count."""
    return all_same(a.shape, b.shape) and all(
        same(x, y) or same(size, 1) for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def permutation(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """(source, order) when the node is `source.permute(order)` in any spelling, else None."""
    name, source = op_name(node), node.args[0] if node.args else None
    value = fake(source)
    if not isinstance(source, Node) or value is None:
        return None
    order = list(range(value.dim()))
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = [d for d in (*node.args[1:], *node.kwargs.values()) if isinstance(d, int)]
    elif name == "getattr" and node.args[1:] == ("mT",):
        dims = [-2, -1]
    elif name == "permute":
        given = node.args[1:] or tuple(node.kwargs.values())
        flat = given[0] if given and isinstance(given[0], list | tuple) else given
        ints = [d for d in flat if isinstance(d, int)]
        return (source, tuple(d % len(order) for d in ints)) if len(ints) == len(order) else None
    else:
        return None
    if len(dims) != 2:
        return None
    a, b = dims
    order[a], order[b] = order[b], order[a]
    return source, tuple(order)


def mutates(node: Node) -> bool:
    """True when running the node may write to a tensor that existed before it."""
    if node.op == "call_module" or "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    target: Any = node.target
    if node.op == "call_function":
        if isinstance(target, torch._ops.HigherOrderOperator):
            return str(target.__name__) != "flex_attention"
        schema = _schema(target)
        if schema is not None:
            return bool(schema.is_mutable)
        if target in _INPLACE_OPERATORS:
            return True
        if isinstance(target, types.FunctionType) and target.__module__.partition(".")[0] not in _PURE:
            return True  # `torch.compiler.allow_in_graph` of somebody else's
    name = op_name(node)
    return name.endswith("_") and not name.endswith("__")


def user_line(node: Node) -> str:
    """`file:line` of the user's code behind a node, PyTorch's own left out, or an empty string."""
    frames = [s for s in str(node.meta.get("stack_trace") or "").splitlines() if s.lstrip().startswith("File ")]
    frames = [s for s in frames if "/torch/" not in s] or frames
    if not frames:
        return ""
    file, _, rest = frames[-1].strip().removeprefix("File ").partition(", line ")
    return f"{file.strip(chr(34)).rpartition('/')[2]}:{rest.partition(',')[0]}"


class Emitter:
    """Makes nodes in front of one node, each with its trace and an example value found under the fake mode."""

    def __init__(self, before: Node) -> None:
        self.before = before
        self.made: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        """Insert a call of a function."""
        return self._insert("call_function", target, args, {})

    def method(self, target: str, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of a method of args[0]."""
        return self._insert("call_method", target, args, kwargs)

    def permute(self, node: Node, order: tuple[int, ...]) -> Node:
        """Insert `node.permute(order)`, as a transpose where that is one, and nothing where none is needed."""
        behind = permutation(node)
        if behind is not None and tuple(behind[1][d] for d in order) == tuple(range(len(order))):
            return behind[0]
        moved = [i for i, d in enumerate(order) if i != d]
        if not moved:
            return node
        return self.method("transpose", node, *moved) if len(moved) == 2 else self.method("permute", node, *order)

    def clean(self) -> None:
        """Take out what was made and is not read."""
        for node in reversed(self.made):
            if not node.users:
                node.graph.erase_node(node)

    def undo(self, since: int = 0) -> None:
        """Take out what was made, but for the first `since` nodes."""
        for node in reversed(self.made[since:]):
            node.graph.erase_node(node)
        del self.made[since:]

    def _insert(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.create_node(op, target, args, kwargs)
        node.meta = {k: self.before.meta[k] for k in ("stack_trace", "nn_module_stack") if k in self.before.meta}
        node.meta["example_value"] = evaluate(node)
        self.made.append(node)
        return node


def evaluate(node: Node, values: Mapping[Node, Any] | None = None) -> Any:
    """Run a node on the example values of its arguments, those in `values` taking precedence."""
    values = values or {}

    def load(n: Node) -> Any:
        return values[n] if n in values else n.meta["example_value"]

    args, kwargs = map_arg(node.args, load), map_arg(node.kwargs, load)
    target: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
    with _fake_mode(load(n) for n in node.all_input_nodes), torch.no_grad():
        return target(*args, **kwargs)


@contextlib.contextmanager
def _fake_mode(values: Iterable[Any]) -> Iterator[None]:
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    with mode or contextlib.nullcontext():
        yield


def _schema(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])  # type: ignore[no-untyped-call]
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _parameters(target: Any) -> tuple[str, ...]:
    schema = _schema(target)
    if schema is not None:
        return tuple(a.name for a in schema.arguments)
    return tuple(inspect.signature(target).parameters)
