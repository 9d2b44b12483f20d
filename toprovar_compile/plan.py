"""The plan: for every scale and layer of a model, whether it runs on all tokens, on some, or not at all.

A plan is data, made by hand, by calibration or by tuning, and stored as one readable JSON file. It answers what follows
from it for a run: which entropies must be measured, which layer deltas must be kept, how much work is left.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from toprovar_compile.decision import Decision
from toprovar_compile.errors import PlanError, ScheduleError, nearest
from toprovar_compile.files import replace_file
from toprovar_compile.schedule import ScaleSchedule

Kind = Literal["dense", "prune", "skip"]
Restore = Literal["cached", "identity"]
Selection = Literal["topk", "gumbel"]
Direction = Literal["low_entropy", "high_entropy"]
Normalisation = Literal["mean_one", "literal"]
Score = Literal["entropy", "mean_distance", "frequency", "random"]

PLAN_VERSION = 1

_LINE = 120  # width of a plan file

_KEYS = (
    "version", "model", "num_layers", "restore", "score", "selection", "seed", "direction", "alpha_min", "alpha_max",
    "normalisation", "layer_scores", "region_share", "schedule", "scales", "decisions", "alternatives", "provenance",
)  # fmt: skip
_BRANCHES = ("scales", "decisions", "alternatives")  # what an alternative does not share with its plan
_REQUIRED = ("version", "model", "num_layers", "schedule", "scales")
_SCALE_KEYS = ("run", "cfg", "layers")
_ACTION = re.compile(r"(?P<kind>[a-z_]+)(?:\s+(?P<keep>\d+))?(?:\s*\*\s*(?P<times>[1-9]\d{0,3}))?")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _typed(where: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = {
            "Mapping": "an object",
            "list": "a list",
            "int": "an integer",
            "str": "a string",
            "bool": "true or false",
        }
        raise PlanError(f"got {type(value).__name__}", where=where, expected=name[kind.__name__])


def _share(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PlanError(f"{where} is {value!r}", where=where, expected="a number in 0..1")
    return float(value)


def _check_version(version: object) -> None:
    if version != PLAN_VERSION or not _is_int(version):
        raise PlanError(
            f"version {version!r} is unknown",
            where="version",
            expected=str(PLAN_VERSION),
            todo="make the plan again with this release",
        )


def _choice(where: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        close = nearest(str(value), valid)
        raise PlanError(
            f"{where} is {value!r}",
            where=where,
            expected="one of " + ", ".join(valid),
            todo=f"did you mean {close!r}?" if close else "",
        )


@dataclass(frozen=True)
class LayerAction:
    """What one layer does at one scale.

    "dense" runs it on all tokens, "prune" on the `keep` best ones, "skip" not at all. `keep` is None unless the kind is
    "prune". Raises PlanError for an unknown kind, or a prune without a `keep` of at least 1.
    """

    kind: Kind = "dense"
    keep: int | None = None

    def __post_init__(self) -> None:
        _choice("kind", self.kind, get_args(Kind))
        if self.kind != "prune":
            object.__setattr__(self, "keep", None)
        elif not _is_int(self.keep) or self.keep < 1:  # type: ignore[operator]
            raise PlanError(f"keep is {self.keep!r}", where="prune", expected="an integer of at least 1")

    def tokens(self, n: int) -> int:
        """Tokens that the layer computes, out of the `n` of the scale."""
        if self.kind == "prune":
            assert self.keep is not None
            return self.keep
        return n if self.kind == "dense" else 0

    def __str__(self) -> str:
        return f"prune {self.keep}" if self.kind == "prune" else self.kind


DENSE = LayerAction("dense")
SKIP = LayerAction("skip")


@dataclass(frozen=True)
class ScalePlan:
    """What one scale does: `run` False leaves the generation before it, and `layers` is then empty.

    `cfg` False runs it on the conditional half alone, whose logits then stand for the guided ones.
    """

    run: bool = True
    layers: tuple[LayerAction, ...] = ()
    cfg: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers) if self.run else ())
        object.__setattr__(self, "cfg", bool(self.cfg) or not self.run)


@dataclass(frozen=True)
class Plan:
    """One action for every (scale, layer), and how tokens are chosen and restored.

    `model` is the fingerprint of the model it was made for, "" for any model of the same schedule and depth.
    `restore`: a token that a layer does not compute gets the layer's delta of its last dense scale, resized ("cached"),
    or nothing ("identity"). `selection`: the best tokens ("topk"), or a sample by keep-probability seeded with `seed`
    ("gumbel"), the probability being made with `alpha_min`, `alpha_max` (0..1), `normalisation` and one score R in 0..1
    a layer in `layer_scores` (empty: 1 for each). `direction`: which tokens are kept. `region_share`: the share (0..1)
    of its tokens that every region of a map keeps in any case. `score`: what tokens are chosen by, their attention
    entropy or one of the scores of `policies.selection`; only entropy has a "gumbel" and a `direction`.
    `decisions`: what an image decides for itself; it goes on with one of the `alternatives`, plans that differ from
    this one in what they do after the decision (and may hold further decisions). `provenance` says how the plan was
    made (calibration numbers, thresholds); it takes no part in equality and in `digest`.

    Raises PlanError when an action does not fit the schedule: a wrong number of scales or layers, a prune that keeps
    all tokens of its scale, a scale that runs after an exit, an exit at scale 0, guidance switched off at scale 0 or on
    again; and when a decision or an alternative does not fit the plan.
    """

    schedule: ScaleSchedule
    num_layers: int
    scales: tuple[ScalePlan, ...]
    model: str = ""
    restore: Restore = "cached"
    selection: Selection = "topk"
    seed: int = 0
    direction: Direction = "low_entropy"
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    normalisation: Normalisation = "mean_one"
    layer_scores: tuple[float, ...] = ()
    region_share: float = 0.0
    version: int = PLAN_VERSION
    score: Score = "entropy"
    decisions: tuple[Decision, ...] = ()
    alternatives: tuple[Plan, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in _BRANCHES:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_version(self.version)
        _typed("model", self.model, str)
        _typed("provenance", self.provenance, Mapping)
        _typed("seed", self.seed, int)
        _choice("restore", self.restore, get_args(Restore))
        _choice("selection", self.selection, get_args(Selection))
        _choice("direction", self.direction, get_args(Direction))
        _choice("normalisation", self.normalisation, get_args(Normalisation))
        _choice("score", self.score, get_args(Score))
        if self.score != "entropy" and (self.selection, self.direction) != ("topk", "low_entropy"):
            raise PlanError(
                f"score {self.score!r} with selection {self.selection!r} and direction {self.direction!r}",
                where="score",
                expected="'entropy', which alone has a keep-probability and a direction",
                todo="leave selection and direction at their defaults",
            )
        for name in ("alpha_min", "alpha_max", "region_share"):
            object.__setattr__(self, name, _share(name, getattr(self, name)))
        scores = tuple(_share(f"layer_scores[{i}]", score) for i, score in enumerate(self.layer_scores))
        object.__setattr__(self, "layer_scores", scores)
        if self.layer_scores and len(self.layer_scores) != self.num_layers:
            raise PlanError(
                f"there are {len(self.layer_scores)} layer scores",
                where="layer_scores",
                expected=f"none, or {self.num_layers}, one for each layer",
            )
        if not _is_int(self.num_layers) or self.num_layers < 1:
            raise PlanError(
                f"num_layers is {self.num_layers!r}", where="num_layers", expected="an integer of at least 1"
            )
        if len(self.scales) != len(self.schedule):
            raise PlanError(
                f"the plan has {len(self.scales)} scales",
                where="scales",
                expected=f"{len(self.schedule)}, one for each grid of the schedule",
            )
        for s, scale in enumerate(self.scales):
            self._check_scale(s, scale)
        for decision in self.decisions:
            self._check_decision(decision)

    def _check_decision(self, decision: Decision) -> None:
        where, after = "decisions", decision.after
        _in_range(where, [after, decision.preview], len(self.scales))
        _in_range(where, [o for o in decision.outcomes if o is not None], len(self.alternatives))
        wanted = 1 + self.num_layers if decision.features == "entropy" else 2
        if len(decision.weights[0]) != wanted:
            raise PlanError(f"a decision weighs {len(decision.weights[0])} features", where=where, expected=f"{wanted}")
        if not self.scales[after].run or (decision.features == "frequency" and after == 0):
            raise PlanError(f"a decision is made after scale {after}", where=where, expected="a scale that runs")
        if decision.features == "entropy" and any(a.kind != "dense" for a in self.scales[after].layers):
            raise PlanError(
                f"scale {after} is pruned, and a decision reads its entropies", where=where, expected="a dense scale"
            )
        shared = [f for f in _KEYS if f not in (*_BRANCHES, "provenance")]
        for alternative in (self.alternatives[o] for o in decision.outcomes if o is not None):
            same = alternative.scales[: after + 1] == self.scales[: after + 1]
            if not same or any(getattr(alternative, f) != getattr(self, f) for f in shared):
                raise PlanError(
                    f"an alternative differs from the plan before the decision after scale {after}",
                    where="alternatives",
                    expected="plans that differ only in later scales",
                )
            if any(later.after <= after for later in alternative.decisions):
                raise PlanError(
                    f"an alternative decides again at scale {after} or before", where="alternatives", expected="later"
                )

    def _check_scale(self, s: int, scale: ScalePlan) -> None:
        if not scale.run:
            if s == 0:
                raise PlanError("scale 0 exits", where="scales[0].run", expected="at least one scale that runs")
            return
        if scale.cfg and not self.scales[max(s - 1, 0)].cfg:
            raise PlanError(
                f"scale {s} is guided after one that is not",
                where=f"scales[{s}].cfg",
                expected="guidance off from one scale to the end: later the unconditional half lacks its cache",
            )
        if s == 0 and not scale.cfg:
            raise PlanError("scale 0 is not guided", where="scales[0].cfg", expected="guidance at least there")
        if not self.scales[max(s - 1, 0)].run:
            raise PlanError(
                f"scale {s} runs after the exit at scale {s - 1}",
                where=f"scales[{s}].run",
                expected="every scale after an exit to exit as well",
            )
        if len(scale.layers) != self.num_layers:
            raise PlanError(
                f"scale {s} has {len(scale.layers)} layer actions",
                where=f"scales[{s}].layers",
                expected=f"{self.num_layers}, one for each layer",
            )
        n = self.schedule.tokens[s]
        for layer, action in enumerate(scale.layers):
            if action.tokens(n) >= n and action.kind == "prune":
                raise PlanError(
                    f"layer {layer} keeps {action.keep} tokens at scale {s}, which has {n}",
                    where=f"scales[{s}].layers[{layer}]",
                    expected=f"fewer than {n}",
                    todo="use dense to keep all of them",
                )

    # making plans

    @classmethod
    def dense(cls, schedule: ScaleSchedule, num_layers: int, fingerprint: str = "") -> Plan:
        """The lossless plan: every layer runs on every token of every scale."""
        scale = ScalePlan(layers=(DENSE,) * max(num_layers, 0))
        return cls(schedule, num_layers, (scale,) * len(schedule), model=fingerprint)

    @classmethod
    def keep_share(
        cls,
        schedule: ScaleSchedule,
        num_layers: int,
        keep: float | Mapping[int, float],
        from_scale: int,
        layers: Iterable[int] | None = None,
        bucket: int = 16,
        *,
        exit_scale: int | None = None,
        fingerprint: str = "",
        restore: Restore = "cached",
        selection: Selection = "topk",
        seed: int = 0,
        direction: Direction = "low_entropy",
        score: Score = "entropy",
        unguided_from: int | None = None,
    ) -> Plan:
        """A plan that keeps a share of the tokens in some layers of the late scales.

        `keep`: share in 0..1, one for all scales or one for each scale index (scales it does not name stay dense).
        `from_scale`: first scale to prune. `layers`: the layers to prune, None for all. The tokens kept are rounded up
        to a multiple of `bucket`; what reaches all tokens of a scale is dense, and a share of 0 skips the layer.
        `exit_scale`: leave the generation before this scale. `unguided_from`: run this scale and later ones on the
        conditional half alone. Raises PlanError for a share, scale or layer out of range.
        """
        count = len(schedule)
        shares = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(range(count), keep)
        chosen = set(range(num_layers)) if layers is None else set(layers)
        _in_range("from_scale", [from_scale], count + 1)
        _in_range("keep", shares, count)
        _in_range("layers", chosen, num_layers)
        for name, scale in (("exit_scale", exit_scale), ("unguided_from", unguided_from)):
            if scale is not None:
                _in_range(name, [scale], count + 1)
        if not _is_int(bucket) or bucket < 1:
            raise PlanError(f"bucket is {bucket!r}", where="bucket", expected="an integer of at least 1")
        for s, share in shares.items():
            _share(f"keep of scale {s}", share)
        scales = []
        for s, n in enumerate(schedule.tokens):
            action = _action_for(shares.get(s, 1.0), n, bucket) if s >= from_scale else DENSE
            actions = tuple(action if layer in chosen else DENSE for layer in range(num_layers))
            guided = unguided_from is None or s < unguided_from
            scales.append(ScalePlan(exit_scale is None or s < exit_scale, actions, guided))
        return cls(
            schedule, num_layers, tuple(scales), fingerprint, restore, selection, seed, direction, score=score,
            provenance={
                "made_by": "keep_share",
                "keep": {str(s): share for s, share in keep.items()} if isinstance(keep, Mapping) else keep,
                "from_scale": from_scale,
                "bucket": bucket,
            },
        )  # fmt: skip

    # reading plans

    def action(self, s: int, layer: int) -> LayerAction:
        """The action of `layer` at scale `s`. Raises PlanError when there is none: out of range, or the scale exits."""
        if not 0 <= layer < self.num_layers or not self.runs(s):
            raise PlanError(
                f"there is no action for scale {s}, layer {layer}",
                where="Plan.action",
                expected=f"a layer below {self.num_layers} and a scale that runs, below "
                f"{len(self.scales) if self.exit_scale is None else self.exit_scale}",
            )
        return self.scales[s].layers[layer]

    def runs(self, s: int) -> bool:
        """Whether scale `s` is generated; False from the exit on. Raises PlanError for a scale out of range."""
        if not 0 <= s < len(self.scales):
            raise PlanError(f"there is no scale {s}", where="Plan.runs", expected=f"0..{len(self.scales) - 1}")
        return self.scales[s].run

    @property
    def exit_scale(self) -> int | None:
        """The first scale that is not generated, None when all are."""
        return next((s for s, scale in enumerate(self.scales) if not scale.run), None)

    @property
    def last_scale(self) -> int:
        """The last scale that is generated, here or in an alternative."""
        end = len(self.scales) if self.exit_scale is None else self.exit_scale
        return max(end - 1, *(alternative.last_scale for alternative in self.alternatives), 0)

    def guided(self, s: int) -> bool:
        """Whether scale `s` runs with its unconditional half, as guidance needs it."""
        return self.scales[s].cfg

    @property
    def is_dense(self) -> bool:
        """Whether the plan is lossless: every scale runs, guided, every layer on all tokens, for every image."""
        whole = self.exit_scale is None and all(scale.cfg for scale in self.scales)
        return whole and not self.alternatives and all(a.kind == "dense" for _, _, a in self._actions())

    @cached_property
    def is_even(self) -> bool:
        """Whether at each scale all layers run on equally many tokens, for every image: their caches grow alike."""
        alike = all(
            len({a.tokens(n) for a in scale.layers}) < 2
            for scale, n in zip(self.scales, self.schedule.tokens, strict=True)
        )
        return alike and all(alternative.is_even for alternative in self.alternatives)

    def reads_entropy(self) -> frozenset[tuple[int, int]]:
        """The (scale, layer) whose attention entropy must be measured: a later scale prunes that layer by it, or a
        decision reads it, here or in an alternative.

        A layer pruned at one scale measures only the tokens it keeps; the others keep their older value, so the scales
        before it are read as well, back to the layer's last dense one.
        """
        return self._reads_entropy

    @cached_property
    def _reads_entropy(self) -> frozenset[tuple[int, int]]:
        read = {(d.after, i) for d in self.decisions if d.features == "entropy" for i in range(self.num_layers)}
        for alternative in self.alternatives:
            read |= alternative.reads_entropy()
        for s, layer, action in self._actions():
            if action.kind != "prune" or self.score != "entropy":
                continue
            for earlier in range(s - 1, -1, -1):
                kind = self.scales[earlier].layers[layer].kind
                if kind != "skip":
                    read.add((earlier, layer))
                if kind == "dense":
                    break
        return frozenset(read)

    def keeps_delta(self) -> frozenset[tuple[int, int]]:
        """The (scale, layer) whose delta (layer output minus its input) is kept to restore tokens at a later scale.

        It is the last dense scale of the layer before each prune or skip, here or in an alternative; empty with
        restore="identity".
        """
        return self._keeps_delta

    @cached_property
    def _keeps_delta(self) -> frozenset[tuple[int, int]]:
        if self.restore == "identity":
            return frozenset()
        found = ((self._last_dense(s, layer), layer) for s, layer, a in self._actions() if a.kind != "dense")
        own = frozenset((s, layer) for s, layer in found if s is not None)
        return own.union(*(alternative.keeps_delta() for alternative in self.alternatives))

    def validate_first(self) -> None:
        """Check that what a prune or skip needs exists when it runs.

        Raises PlanError for a prune before the layer's first dense scale (it has no entropy to choose tokens by; other
        scores need none), and, with restore="cached", for such a skip (it has no delta).
        """
        for alternative in self.alternatives:
            alternative.validate_first()
        for s, layer, action in self._actions():
            lacks_entropy = action.kind == "prune" and self.score == "entropy"
            lacks_delta = action.kind != "dense" and not lacks_entropy and self.restore == "cached"
            if (lacks_entropy or lacks_delta) and self._last_dense(s, layer) is None:
                need = "a delta to restore from" if lacks_delta else "an entropy to choose tokens by"
                raise PlanError(
                    f"layer {layer} has {action} at scale {s} and has not run dense before",
                    where=f"scales[{s}].layers[{layer}]",
                    expected=f"an earlier dense scale of this layer, which gives {need}",
                    todo="start pruning one scale later" + (" or use restore='identity'" if lacks_delta else ""),
                )

    def token_share(self) -> list[float]:
        """Share (0..1) of each scale's tokens-times-layers that is computed; 0 for a scale that exits.

        A scale without guidance computes one half of the rows. Decisions do not count: see `alternatives`.
        """
        return [
            sum(a.tokens(n) for a in scale.layers) / (n * self.num_layers) / (1 if scale.cfg else 2)
            for scale, n in zip(self.scales, self.schedule.tokens, strict=True)
        ]

    def total_share(self) -> float:
        """Share (0..1) of the tokens-times-layers of the whole image that is computed."""
        done = sum(share * n for share, n in zip(self.token_share(), self.schedule.tokens, strict=True))
        return done / self.schedule.total

    def check_model(self, fingerprint: str, schedule: ScaleSchedule, num_layers: int) -> None:
        """Raise PlanError, naming both sides, unless the plan was made for this model and can run (`validate_first`).

        A plan with model="" fits every model of its schedule and depth.
        """
        sides: list[tuple[str, Any, Any]] = [
            ("schedule", self.schedule.to_json(), schedule.to_json()),
            ("num_layers", self.num_layers, num_layers),
        ]
        if self.model:
            sides.append(("model", self.model, fingerprint))
        for name, ours, theirs in sides:
            if ours != theirs:
                raise PlanError(
                    f"the plan was made for {name} {ours}, the model has {theirs}",
                    where=f"plan.{name}",
                    expected="the model that the plan was made for",
                    todo="calibrate a plan for this model, or load the model of the plan",
                )
        self.validate_first()

    def digest(self) -> str:
        """A short name (16 hex digits of a SHA-256) of what the plan does; provenance takes no part in it."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        data = self.to_json()
        del data["provenance"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _actions(self) -> Iterator[tuple[int, int, LayerAction]]:
        for s, scale in enumerate(self.scales):
            for layer, action in enumerate(scale.layers):
                yield s, layer, action

    def _last_dense(self, s: int, layer: int) -> int | None:
        earlier = range(s - 1, -1, -1)
        return next((e for e in earlier if self.scales[e].layers[layer].kind == "dense"), None)

    # files

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; equal neighbouring layers are written once, as in "dense*3" or "prune 128*12"."""
        values: dict[str, Any] = {key: getattr(self, key) for key in _KEYS}  # in this order
        values["layer_scores"] = list(self.layer_scores)
        values["schedule"] = self.schedule.to_json()
        values["provenance"] = dict(self.provenance)
        return _without_none(values | self._branches())

    def _branches(self) -> dict[str, Any]:
        """The keys that differ between alternatives as JSON data, None for those that are left out."""
        return {
            "scales": [_scale_to_json(scale) for scale in self.scales],
            "decisions": [d.to_json() for d in self.decisions] or None,
            "alternatives": [_without_none(a._branches()) for a in self.alternatives] or None,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The inverse of `to_json`. Raises PlanError naming the field, and for an unknown key the nearest valid one."""
        _typed("plan", data, Mapping)
        _check_version(data.get("version", PLAN_VERSION))
        _known_keys("plan", data, _KEYS)
        for key in _REQUIRED:
            if key not in data:
                raise PlanError(f"the key {key!r} is missing", where="plan", expected=f"all of {', '.join(_REQUIRED)}")
        values = dict(data)
        try:
            values["schedule"] = ScaleSchedule.from_json(data["schedule"])
        except ScheduleError as error:
            raise PlanError(
                error.what, where=f"schedule, {error.where}", expected=error.expected, todo=error.todo
            ) from error
        if "layer_scores" in data:
            _typed("layer_scores", data["layer_scores"], list)
        return cls._branch({key: v for key, v in values.items() if key not in _BRANCHES}, data)

    @classmethod
    def _branch(cls, shared: Mapping[str, Any], data: Any, where: str = "") -> Plan:
        """The plan of the shared fields and of the branch keys in `data`."""
        for key in _BRANCHES:
            _typed(where + key, data.get(key, []), list)
        inner = {k: v for k, v in shared.items() if k != "provenance"}
        alternatives = []
        for i, branch in enumerate(data.get("alternatives", [])):
            at = f"{where}alternatives[{i}]"
            _typed(at, branch, Mapping)
            _known_keys(at, branch, _BRANCHES)
            alternatives.append(cls._branch(inner, branch, f"{at}."))
        return cls(
            **shared,
            scales=tuple(_scale_from_json(f"{where}scales[{s}]", v) for s, v in enumerate(data.get("scales", []))),
            decisions=tuple(
                Decision.from_json(v, f"{where}decisions[{i}]") for i, v in enumerate(data.get("decisions", []))
            ),
            alternatives=tuple(alternatives),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears complete or not at all; an older one is replaced.

        Raises PlanError when the file cannot be written, or when `provenance` is not JSON data.
        """
        try:
            text = _pretty(self.to_json()) + "\n"
        except (TypeError, ValueError) as error:
            raise PlanError(f"not JSON data: {error}", where="provenance", expected="plain finite values") from error
        try:
            replace_file(Path(path), text.encode())
        except OSError as error:
            raise PlanError(
                f"cannot write the plan: {error.strerror}", where=str(path), expected="a writable folder"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`. Raises PlanError naming the file and the field."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(
                f"cannot read the plan: {error.strerror}", where=str(path), expected="a plan file"
            ) from error
        except ValueError as error:
            raise PlanError(f"not JSON: {error}", where=str(path), expected="a plan file") from error
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(
                error.what, where=f"{path}: {error.where}", expected=error.expected, todo=error.todo
            ) from error


def _action_for(share: float, n: int, bucket: int) -> LayerAction:
    if share == 0:
        return SKIP
    # The small term undoes float noise: 0.1 * 30 must be 3 tokens, not 4.
    kept = math.ceil(share * n / bucket - 1e-9) * bucket
    return LayerAction("prune", kept) if kept < n else DENSE


def _scale_to_json(scale: ScalePlan) -> dict[str, Any]:
    if not scale.run:
        return {"run": False}
    runs = ((str(action), len(list(same))) for action, same in groupby(scale.layers))
    cfg = {} if scale.cfg else {"cfg": False}
    return {"run": True, **cfg, "layers": [text if times == 1 else f"{text}*{times}" for text, times in runs]}


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _scale_from_json(where: str, data: Any) -> ScalePlan:
    _typed(where, data, Mapping)
    _known_keys(where, data, _SCALE_KEYS)
    run, cfg = data.get("run", True), data.get("cfg", True)
    _typed(f"{where}.run", run, bool)
    _typed(f"{where}.cfg", cfg, bool)
    if not run:
        return ScalePlan(run=False)
    texts = data.get("layers")
    _typed(f"{where}.layers", texts, list)
    layers: list[LayerAction] = []
    for i, text in enumerate(texts):
        layers += _parse_actions(f"{where}.layers[{i}]", text)
    return ScalePlan(layers=tuple(layers), cfg=cfg)


def _parse_actions(where: str, text: Any) -> list[LayerAction]:
    match = _ACTION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise PlanError(f"cannot read {text!r}", where=where, expected='"dense", "skip" or "prune 128", "*3" for three')
    kind, keep, times = match["kind"], match["keep"], match["times"]
    if keep is not None and kind in ("dense", "skip"):
        raise PlanError(f"{kind} has a count in {text!r}", where=where, expected=f"{kind!r} alone")
    try:
        action = LayerAction(kind, None if keep is None else int(keep))  # type: ignore[arg-type]
    except PlanError as error:
        raise PlanError(error.what, where=where, expected=error.expected, todo=error.todo) from error
    return [action] * int(times or 1)


def _known_keys(where: str, data: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for key in data:
        if key not in valid:
            close = nearest(str(key), valid)
            raise PlanError(
                f"unknown key {key!r}",
                where=where,
                expected="one of " + ", ".join(valid),
                todo=f"did you mean {close!r}?" if close else "remove it",
            )


def _in_range(where: str, values: Iterable[int], limit: int) -> None:
    for value in values:
        if not _is_int(value) or not 0 <= value < limit:
            raise PlanError(f"{where} names {value!r}", where=where, expected=f"an integer in 0..{limit - 1}")


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON text in which whatever fits into a line is on one, and so is every list of plain values."""
    line = json.dumps(value, allow_nan=False)
    if indent + len(line) <= _LINE or not isinstance(value, Mapping | list):
        return line
    if not isinstance(value, Mapping) and not any(isinstance(v, Mapping | list) for v in value):
        return line
    inner = " " * (indent + 2)
    if isinstance(value, Mapping):
        rows = [f"{inner}{json.dumps(str(k))}: {_pretty(v, indent + 2)}" for k, v in value.items()]
    else:
        rows = [inner + _pretty(v, indent + 2) for v in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n" + ",\n".join(rows) + f"\n{' ' * indent}{closing}"
