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


@dataclass(frozen=True)
class _Pair:
    """A module of ours, its path, and the names of the tensors that it takes from the module of the same place."""

    path: str
    module: nn.Module
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Slot:
    """One shared tensor: where it is in the two modules, and its name."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    name: str


class Sharing:
    """`ours` on the tensors of other modules; `find(path)` gives the one that stands for our module at `path`.

    Those modules lie in `roots`; `find` may raise AttributeError where there is none. `within` names the children of
    `ours` that take part, "" being itself; all of them by default. Raises UnsupportedModelError where a tensor is
    missing or has another shape.
    """

    def __init__(
        self,
        ours: nn.Module,
        find: Callable[[str], nn.Module],
        where: str,
        roots: Iterable[nn.Module],
        within: Iterable[str] | None = None,
    ) -> None:
        self._find, self._where, self._roots = find, where, tuple(roots)
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
        self._links: list[tuple[dict[str, Any], str, Any]] = []
        self._modules: list[tuple[str, nn.Module]] = []
        self._slots: list[_Slot] = []
        self._resolve()
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

    def _resolve(self) -> None:
        """Find the modules and tensors anew, and remember which module was where."""
        modules, slots = [], []
        for pair in self._pairs:
            try:
                theirs = self._find(pair.path)
            except AttributeError:
                raise self._changed(pair.path, "is gone") from None
            modules.append((pair.path, theirs))
            for name in pair.names:
                if _tensor(theirs, name) is None:
                    raise self._changed(
                        pair.path,
                        f"is a {type(theirs).__name__} without {name!r} now",
                        "merge adapter weights into the layers first (merge_and_unload() in peft)",
                    )
                slots.append(_Slot(_table(theirs, name), _table(pair.module, name), name))
        self._modules, self._slots = modules, slots
        self._links = [
            (m._modules, name, child)
            for root in self._roots
            for m in root.modules()
            for name, child in m._modules.items()
        ]

    def sync(self) -> None:
        """Take what the other modules hold now.

        Raises UnsupportedModelError where a module was replaced by one without these tensors (an adapter layer, a
        quantised one) or has forward hooks, which would not run.
        """
        same = all(table.get(name) is child for table, name, child in self._links)
        if not same or any(slot.theirs.get(slot.name) is None for slot in self._slots):
            self._resolve()
        for path, module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks:
                raise self._changed(path, "has forward hooks, which would not run", "remove the hooks")
        for slot in self._slots:
            tensor, mine = slot.theirs[slot.name], slot.ours[slot.name]
            if tensor is not mine:
                slot.ours[slot.name] = _shared(mine, tensor)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The shared tensors by name."""
        return [(slot.name, slot.theirs[slot.name]) for slot in self._slots]

    def _changed(self, path: str, what: str, todo: str = "undo the acceleration before changing modules") -> Exception:
        return UnsupportedModelError(
            f"module {path!r} {what}", where=self._where, expected="the modules that were there at first", todo=todo
        )

    def unused(self, theirs: nn.Module, ignored: Iterable[str] = ()) -> list[str]:
        """Parameters of the other module that ours does not use, those that start with an ignored prefix aside."""
        used = {id(tensor) for _, tensor in self.tensors()}
        prefixes = tuple(ignored)
        return [n for n, p in theirs.named_parameters() if id(p) not in used and not n.startswith(prefixes)]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return found if found is not None else module._buffers.get(name)


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if module._parameters.get(name) is not None else module._buffers


def _squeezed(tensor: Tensor) -> list[int]:
    """The sizes but 1: official temperatures are (1, 1, H, 1) or (1, H, 1, 1)."""
    return [n for n in tensor.shape if n != 1]


def _shared(mine: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself, or where its shape is another a view of it; the one that is there already if it is right."""
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


def check_ready(model: nn.Module, where: str, tensors: Iterable[tuple[str, Tensor]] | None = None) -> torch.device:
    """The one device of a model's parameters, or of the named `tensors` that stand for them.

    Raises UnsupportedModelError for a model in training mode, on several devices or on none, and for weights that are
    not floating point numbers of 16 bits or more.
    """
    if model.training:
        raise UnsupportedModelError(
            "the model is in training mode", where=where, expected="model.eval()", todo="drop-out and drop-path act"
        )
    devices: set[torch.device] = set()
    for name, tensor in model.named_parameters() if tensors is None else tensors:
        devices.add(tensor.device)
        if tensor.dtype not in _FLOATS and isinstance(tensor, nn.Parameter):
            raise UnsupportedModelError(
                f"{name} is {tensor.dtype}",
                where=where,
                expected="float32, bfloat16 or float16 weights",
                todo="use the weights before quantisation",
            )
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UnsupportedModelError(
            f"parameters are on {', '.join(sorted(map(str, devices))) or 'no device'}",
            where=where,
            expected="all of them on one device",
            todo="move the model with model.to(device) once its weights are loaded",
        )
    return next(iter(devices))


def leave_inference(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Make tensors that were made in inference mode normal ones, of equal values: the others cannot be compiled with.

    A model loaded in inference mode has them, and one whose code assigns to `weight.data` there, as HART's norms do.
    """
    for _, tensor in tensors:
        if tensor.is_inference():
            with torch.inference_mode(False), torch.no_grad():
                tensor.data = tensor.data.clone()


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
