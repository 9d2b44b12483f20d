"""Plans named on a command line: a word, a file, or a short description such as "keep=0.4,from=8"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toprovar_compile.errors import OptionError, nearest
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

if TYPE_CHECKING:
    from toprovar_compile.models.emoji_infinity import EmojiInfinity
    from toprovar_compile.models.var import VAR

_KEYS = ("keep", "from", "layers", "exit", "unguided", "restore", "score", "selection", "direction", "bucket", "seed")
_EXPECTED = "auto, dense, a plan file, or keep=SHARE,from=SCALE with optional " + ", ".join(_KEYS[2:])


def plan_for(text: str, model: VAR | EmojiInfinity) -> Plan:
    """The plan that `text` names (see `parse_plan`) for this model, checked to fit it."""
    plan = parse_plan(text, model.schedule, len(model.blocks), model.plan)
    plan.check_model(model.fingerprint(), model.schedule, len(model.blocks))
    return plan


def parse_plan(text: str, schedule: ScaleSchedule, num_layers: int, shipped: Plan | None = None) -> Plan:
    """The plan that `text` names for a model of this schedule and depth.

    "auto" is `shipped`; "dense" the lossless plan; what holds "=" a description in the words of `Plan.keep_share`:
    "keep=0.4,from=8,layers=2-13,exit=9,restore=identity", where keep may list a share for each scale from `from` on
    ("keep=0.5/0.3"), and unguided names the first scale that runs on the conditional half alone. Anything else is read
    as a file. Raises OptionError or PlanError.
    """
    if text == "dense":
        return Plan.dense(schedule, num_layers)
    if text == "auto":
        if shipped is None:
            raise OptionError(
                "this model has no plan of its own",
                where="plan",
                expected="dense, a plan file or a description such as keep=0.4,from=8",
                todo="make one: toprovar calibrate",
            )
        return shipped
    if "=" in text and not Path(text).exists():
        return _described(text, schedule, num_layers)
    if not Path(text).exists():
        close = nearest(text, ("auto", "dense"))
        raise OptionError(
            f"there is no plan {text!r}",
            where="plan",
            expected=_EXPECTED,
            todo=f"did you mean {close!r}?" if close else "check the path",
        )
    return Plan.load(text)


def _described(text: str, schedule: ScaleSchedule, num_layers: int) -> Plan:
    words = dict(_word(part) for part in text.split(","))
    try:
        start = int(words.pop("from", len(schedule)))
        shares = [float(share) for share in words.pop("keep", "1").split("/")]
        keep: Any = shares[0]
        if len(shares) > 1:
            keep = {start + i: share for i, share in enumerate(shares)}
        layers = _layers(words.pop("layers")) if "layers" in words else None
        numbers = {"exit_scale": "exit", "unguided_from": "unguided", "bucket": "bucket", "seed": "seed"}
        extra: dict[str, Any] = {key: int(words.pop(word)) for key, word in numbers.items() if word in words}
    except ValueError as error:
        raise OptionError(f"cannot read {text!r}: {error}", where="plan", expected=_EXPECTED) from error
    return Plan.keep_share(schedule, num_layers, keep, start, layers, **extra, **words)  # type: ignore[arg-type]


def _word(part: str) -> tuple[str, str]:
    key, _, value = (piece.strip() for piece in part.partition("="))
    if key not in _KEYS or not value:
        close = nearest(key, _KEYS)
        raise OptionError(
            f"{part!r} in a plan description",
            where="plan",
            expected="KEY=VALUE with one of " + ", ".join(_KEYS),
            todo=f"did you mean {close!r}?" if close and close != key else "",
        )
    return key, value


def _layers(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))
