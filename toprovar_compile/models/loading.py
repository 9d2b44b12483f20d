"""Loading weights: the models shipped in the package and the official checkpoints of VAR and Infinity."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toprovar_compile.errors import CheckpointError, OptionError, nearest
from toprovar_compile.models.packed import unpack
from toprovar_compile.models.var import VAR, Sampling, VARConfig
from toprovar_compile.plan import Plan

if TYPE_CHECKING:
    from toprovar_compile.models.emoji_infinity import EmojiInfinity
    from toprovar_compile.models.infinity import Infinity

WEIGHTS = Path(__file__).parent / "weights"
_KNOWN = ("emoji-infinity", "emoji-var")  # what a complete installation holds


def names() -> list[str]:
    """Names of the shipped models."""
    return sorted(p.parent.name.replace("_", "-") for p in WEIGHTS.glob("*/config.json"))


def folder_of(name: str) -> Path:
    """The folder of a shipped model's weights, configuration, classes and plan.

    Raises OptionError for other names, and for a model whose weights this installation lacks.
    """
    if name in _KNOWN and name not in names():
        raise OptionError(
            f"the weights of {name} are not installed",
            where="models.load",
            expected=f"config.json and model.safetensors in {WEIGHTS / name.replace('-', '_')}",
            todo="install a release that ships them, or train and pack them: see examples/train_emoji/README.md",
        )
    if name not in names():
        close = nearest(name, names())
        raise OptionError(
            f"there is no model {name!r}",
            where="models.load",
            expected=f"one of {', '.join(names())}",
            todo=f"did you mean {close!r}?" if close else "choose one of these",
        )
    return WEIGHTS / name.replace("-", "_")


@overload
def load(  # type: ignore[overload-overlap]
    name: Literal["emoji-infinity"], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> EmojiInfinity: ...
@overload
def load(name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VAR: ...
@overload
def load(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    checkpoint: str | Path,
    vae_checkpoint: str | Path,
) -> Infinity: ...
def load(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    checkpoint: str | Path | None = None,
    vae_checkpoint: str | Path | None = None,
) -> VAR | EmojiInfinity | Infinity:
    """A model in eval mode, float32 on the CPU unless `device` and `dtype` say otherwise.

    A shipped model by its name (see `names`), with its default sampling and, if it has classes, its `class_names`; or
    an Infinity, "infinity-2b", "infinity-8b" and so on, from its official files `checkpoint` and `vae_checkpoint`.
    Raises OptionError for an unknown name and CheckpointError for files that are damaged or of another model.
    """
    if not name.startswith("infinity-") and checkpoint is None and vae_checkpoint is None:
        return load_folder(folder_of(name)).to(device=device, dtype=dtype)
    if not name.startswith("infinity-") or checkpoint is None or vae_checkpoint is None:
        raise OptionError(
            f"{name!r} with checkpoint={checkpoint!r} and vae_checkpoint={vae_checkpoint!r}",
            where="models.load",
            expected='"infinity-2b" or the like with both files, or the name of a shipped model with none',
        )
    from toprovar_compile.models.infinity_loading import load_infinity  # which reads files as this module does

    size = name.removeprefix("infinity-")
    return load_infinity(checkpoint, vae_checkpoint, size=size, device=device, dtype=dtype)


def load_folder(folder: Path) -> VAR | EmojiInfinity:
    """A model from a folder of config.json and model*.safetensors, float32 on the CPU, in eval mode.

    A configuration with "text" is that of an EmojiInfinity, whose example prompts are in prompts.json; a VAR has its
    classes in classes.json.
    """
    config = _read_json(folder / "config.json")
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        state.update(_read(shard))
    state = unpack(state, str(folder))
    model: VAR | EmojiInfinity
    if "text" in config:
        # Not at the top: its Infinity reads files as this module does.
        from toprovar_compile.models.emoji_infinity import EmojiInfinity

        with torch.device("meta"):
            model = EmojiInfinity.from_json(config)
        _fill(model, state, str(folder))
        model.example_prompts = _read_json(folder / "prompts.json")
    else:
        model = _empty(VARConfig.from_json(json.dumps(config["model"])))
        _fill(model, state, str(folder))
        model.sampling = Sampling(**config["sampling"])
        model.class_names = [c["name"] for c in _read_json(folder / "classes.json")]
    if (folder / "plan.json").exists():
        model.plan = Plan.load(folder / "plan.json")
    return model


def load_official(
    var_ckpt: str | Path,
    vae_ckpt: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VAR:
    """A VAR from the official checkpoint files, such as var_d16.pth and vae_ch160v4096z32.pth, in eval mode.

    The files are .pth or .safetensors; the depth and AdaLN sharing are read off the first. Raises CheckpointError
    that names the keys when they are missing, unexpected or of another shape than the model's.
    """
    transformer = _transformer_state(_read(Path(var_ckpt)), str(var_ckpt))
    vae = _read(Path(vae_ckpt))
    depth = 1 + max((int(m[1]) for k in transformer if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    if depth == 0:
        raise CheckpointError(
            "there is no transformer layer", where=str(var_ckpt), expected="keys named blocks.<layer>.<parameter>"
        )
    model = _empty(VARConfig.official(depth, shared_aln="blocks.0.ada_gss" in transformer))
    both = transformer | {f"vae.{k}": v for k, v in vae.items()}
    _fill(model, both, f"{var_ckpt} and {vae_ckpt}")
    return model.to(device=device, dtype=dtype)


def find_class(text: str, name: str = "emoji-var") -> list[int]:
    """Labels of a shipped model's classes that fit `text`, best first.

    `text` is a class name, an emoji character, or words that all occur in the name. Raises OptionError when none fits.
    """
    classes = _classes(name)
    wanted = text.strip().lower()
    code = "-".join(f"{ord(c):04x}" for c in text.strip() if ord(c) != 0xFE0F)
    for i, c in enumerate(classes):
        if wanted == c["name"] or code == c["code"].replace("-fe0f", ""):
            return [i]
    words = wanted.split()
    found = [i for i, c in enumerate(classes) if words and all(w in c["name"] for w in words)]
    if not found:
        close = nearest(wanted, [c["name"] for c in classes])
        raise OptionError(
            f"no class of {name} is called {text!r}",
            where="models.find_class",
            expected="a class name, part of one, or an emoji",
            todo=f"did you mean {close!r}?" if close else "look at model.class_names",
        )
    return sorted(found, key=lambda i: (len(classes[i]["name"]), i))


@cache
def _classes(name: str) -> list[dict[str, Any]]:
    classes: list[dict[str, Any]] = _read_json(folder_of(name) / "classes.json")
    return classes


def _empty(cfg: VARConfig) -> VAR:
    with torch.device("meta"):
        return VAR(cfg)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"it cannot be read: {error}", where=str(path), expected="a JSON file") from error


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a .pth file, which is unpickled with weights_only."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, ImportError) as error:
        raise CheckpointError(f"it cannot be read: {error}", where=str(path)) from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError, KeyError and others for damaged files
        raise CheckpointError(
            f"it is not a file of plain tensors: {error}", where=str(path), expected=".pth or .safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"it holds a {type(state).__name__}", where=str(path), expected="a mapping of names to tensors"
        )
    return dict(state)


def _transformer_state(state: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The transformer's entries of a plain checkpoint, or of a training one, which nests them under "trainer"."""
    trainer = state.get("trainer")
    if isinstance(trainer, Mapping):
        state = trainer.get("var_wo_ddp", {})
    bad = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if bad:
        raise CheckpointError(f"{_some(bad)} are not tensors", where=where, expected="a checkpoint of VAR")
    # attn_bias_for_masking and lvl_1L are constants that follow from the schedule.
    return {k: v for k, v in state.items() if k not in ("attn_bias_for_masking", "lvl_1L")}


def _fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give a model built on the meta device its parameters and buffers, or raise before it holds any of them."""
    _check_fit(model.state_dict(), state, where)
    model.to_empty(device="cpu")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    if isinstance(model, VAR):
        model.reset_constants()
    model.eval().requires_grad_(False)


def _check_fit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError that names the entries unless `state` has exactly those of `wanted`, of equal shapes."""
    problems = []
    if missing := [k for k in wanted if k not in state]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [k for k in state if k not in wanted]:
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{k} {tuple(state[k].shape)} where {tuple(wanted[k].shape)} is needed"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if shapes:
        problems.append(f"mis-shaped {_some(shapes)}")
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model: {'; '.join(problems)}",
            where=where,
            expected=f"the {len(wanted)} entries of this configuration",
            todo="check that the files belong together and are complete",
        )


def _some(items: Iterable[str], limit: int = 6) -> str:
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
