"""One module that runs on the parameters and buffers of another: the same tensors, not copies of them.

In-place changes of weights, `load_state_dict` and `to(...)` on the other module are seen at once; tensors that were
exchanged (`load_state_dict(assign=True)`, a new `nn.Parameter`) at the next `sync`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toprovar_compile.errors import UnsupportedModelError
from toprovar_compile.report import counters, logger

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NEW_MODEL = "see docs/new_model.md for models of your own"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class _Pair:
    """A module of ours, its path, and the names of the tensors that it takes from the module of the same place."""

    path: str
    module: nn.Module
    names: tuple[str, ...]


class Sharing:
    """`ours` on the tensors of other modules; `find(path)` gives the one that stands for our module at `path`.

    `within` names the children of `ours` that take part, "" being itself; all of them by default.
    `find` may raise AttributeError where there is none. Raises UnsupportedModelError where a tensor is missing or has
    another shape.
    """

    def __init__(
        self, ours: nn.Module, find: Callable[[str], nn.Module], where: str, within: Iterable[str] | None = None
    ) -> None:
        self._find, self._where = find, where
        self._pairs = []
        heads = None if within is None else set(within)
        for path, module in ours.named_modules():
            if heads is not None and path.partition(".")[0] not in heads:
                continue
            names = tuple(n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)
            if names:
                self._pairs.append(_Pair(path, module, names))
        problems = [p for pair in self._pairs for p in self._problems(pair)]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise UnsupportedModelError(
                f"the parameters are not those of this family: {', '.join(problems[:6])}{more}",
                where=where,
                expected="the official model, unmodified",
                todo=_NEW_MODEL,
            )
        self.sync()

    def _problems(self, pair: _Pair) -> Iterable[str]:
        try:
            theirs = self._find(pair.path)
        except AttributeError:
            yield f"no module {pair.path}"
            return
        for name in pair.names:
            mine, tensor = _tensor(pair.module, name), _tensor(theirs, name)
            if tensor is None:
                yield f"no {pair.path}.{name}"
            elif mine is not None and _squeezed(tensor) != _squeezed(mine):
                yield f"{pair.path}.{name} is {tuple(tensor.shape)}, not {tuple(mine.shape)}"

    def sync(self) -> None:
        """Take what the other modules hold now.

        Raises UnsupportedModelError where a module was replaced by one without these tensors (an adapter layer, a
        quantised one) or has forward hooks, which would not run.
        """
        for pair in self._pairs:
            try:
                theirs = self._find(pair.path)
            except AttributeError:
                raise self._changed(pair.path, "is gone") from None
            if any(getattr(theirs, hooks) for hooks in _HOOKS):
                raise self._changed(pair.path, "has forward hooks, which would not run", "remove the hooks")
            for name in pair.names:
                tensor = _tensor(theirs, name)
                if tensor is None:
                    raise self._changed(
                        pair.path,
                        f"is a {type(theirs).__name__} without {name!r} now",
                        "merge adapter weights into the layers first (merge_and_unload() in peft)",
                    )
                table: Any = pair.module._parameters if name in pair.module._parameters else pair.module._buffers
                table[name] = _shared(table[name], tensor)

    def _changed(self, path: str, what: str, todo: str = "undo the acceleration before changing modules") -> Exception:
        return UnsupportedModelError(
            f"module {path!r} {what}", where=self._where, expected="the modules that were there at first", todo=todo
        )

    def unused(self, theirs: nn.Module, ignored: Iterable[str] = ()) -> list[str]:
        """Parameters of the other module that ours does not use, those that start with an ignored prefix aside."""
        used = {id(_tensor(pair.module, name)) for pair in self._pairs for name in pair.names}
        prefixes = tuple(ignored)
        return [n for n, p in theirs.named_parameters() if id(p) not in used and not n.startswith(prefixes)]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _squeezed(tensor: Tensor) -> list[int]:
    """The sizes but 1: official temperatures are (1, 1, H, 1) or (1, H, 1, 1)."""
    return [n for n in tensor.shape if n != 1]


def _shared(mine: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself, or where its shape is another a view of it; the one that is there already if it is right."""
    if mine is tensor:
        return mine
    is_parameter = isinstance(mine, nn.Parameter)
    if tensor.shape == mine.shape and isinstance(tensor, nn.Parameter) == is_parameter:
        return tensor
    same = mine.dtype == tensor.dtype and mine.device == tensor.device
    if same and not mine.is_meta and mine.data_ptr() == tensor.data_ptr():
        return mine
    view = tensor.detach().view(mine.shape)
    return nn.Parameter(view, requires_grad=False) if is_parameter else view


def check_used(sharing: Sharing, theirs: nn.Module, where: str, ignored: Iterable[str] = ()) -> None:
    """Raise UnsupportedModelError where `theirs` has parameters that would have no effect."""
    unused = sharing.unused(theirs, ignored)
    if unused:
        raise UnsupportedModelError(
            f"{type(theirs).__name__} has parameters that this family does not know: {', '.join(unused[:6])}",
            where=where,
            expected="the official model, unmodified",
            todo=_NEW_MODEL,
        )


def compare_blocks(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], like: Tensor, where: str) -> None:
    """Raise UnsupportedModelError unless both compute the same, to about the precision of `like`.

    Code that has the official parameters and computes something else would give wrong images without an error. Where
    the official block cannot run by itself (a kernel that is not for this device), this is logged and nothing checked.
    """
    with torch.inference_mode(), torch.autocast(like.device.type, enabled=False):
        try:
            want = theirs().float()
        except (RuntimeError, ImportError, NotImplementedError) as error:
            counters.add("prepare", "the official block did not run, so ours was not compared with it")
            logger.warning("the official block did not run, ours is not compared with it: %s", error)
            return
        got = ours().float()
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-3}.get(like.dtype, 0.05) * float(want.abs().amax())
    if not float((got - want).abs().amax()) <= tolerance:
        raise UnsupportedModelError(
            "its first block computes something else than this family's, though its parameters are the same",
            where=where,
            expected="the official model, unmodified",
            todo=_NEW_MODEL,
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which operators compute in the dtype of their operands."""
    return torch.autocast(device.type, enabled=False)


def check_ready(model: nn.Module, where: str) -> torch.device:
    """The one device of a model's parameters.

    Raises UnsupportedModelError for a model in training mode, on several devices or on none, and for weights that are
    not floating point numbers of 16 bits or more.
    """
    if model.training:
        raise UnsupportedModelError(
            "the model is in training mode", where=where, expected="model.eval()", todo="drop-out and drop-path act"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UnsupportedModelError(
            f"parameters are on {', '.join(sorted(map(str, devices))) or 'no device'}",
            where=where,
            expected="all of them on one device",
            todo="move the model with model.to(device) once its weights are loaded",
        )
    bad = next((n for n, p in model.named_parameters() if p.dtype not in _FLOATS), None)
    if bad is not None:
        raise UnsupportedModelError(
            f"{bad} is {model.get_parameter(bad).dtype}",
            where=where,
            expected="float32, bfloat16 or float16 weights",
            todo="use the weights before quantisation",
        )
    return next(iter(devices))


def check_device(name: str, value: object, device: torch.device, where: str) -> None:
    """Raise UnsupportedModelError for a tensor that is not on `device`."""
    if isinstance(value, Tensor) and value.device != device:
        raise UnsupportedModelError(
            f"{name} is on {value.device}", where=where, expected=str(device), todo=f"pass {name}.to({str(device)!r})"
        )


def fingerprint(config: str, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (16 hex digits) of a configuration and of eight bfloat16-rounded values of each parameter."""
    digest = hashlib.sha256(config.encode())
    picks = []
    for name, p in parameters:
        flat = p.detach().reshape(-1)
        step = (flat.numel() - 1) / 7
        picks.append(flat[torch.tensor([round(i * step) for i in range(8)], device=flat.device)].bfloat16())
        digest.update(name.encode())
    digest.update(str(torch.cat(picks).float().tolist()).encode())
    return digest.hexdigest()[:16]
