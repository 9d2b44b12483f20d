"""The comparison of policies: quality of all their plans on the same images, by the eager reference.

Images are those of classes, or of EmojiEval's prompts where the model takes prompts. Quality is closeness to the
unpruned image of the same draws; cost is the share of tokens computed, and where asked for the time of the compiled
plan. Intervals come from resampling the images, the same resamples for all plans, so that differences between plans are
those of pairs.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toprovar_compile import measure, tune
from toprovar_compile.costs import Costs
from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.evaluate import candidates
from toprovar_compile.evaluate.candidates import Candidate
from toprovar_compile.evaluate.detector import load_detector
from toprovar_compile.evaluate.draw import Worst, plot
from toprovar_compile.evaluate.emoji_eval import Entry, load_prompts, reasons, summarise
from toprovar_compile.evaluate.images import generate, numbers
from toprovar_compile.evaluate.intervals import Interval, frontier, mean_interval, resamples
from toprovar_compile.evaluate.merging import reading_order, same_conditions
from toprovar_compile.evaluate.quality import closeness
from toprovar_compile.evaluate.timing import time_rows
from toprovar_compile.files import write_json
from toprovar_compile.metrics import frechet_distance
from toprovar_compile.plan import Plan
from toprovar_compile.policies.skipvar import try_strategies
from toprovar_compile.policies.statistics import Statistics

FORMAT_VERSION = 2
SHARES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Costs at which frontiers are compared."""

OURS = ("shipped", "toprovar", "toprovar adaptive", "tuned", "score: entropy")
_TRAINING_SEED, _SEARCH_SEED = 10_000, 20_000  # so that seeds of training, search and comparison do not meet
_TUNED = 10  # plans of a search that are compared
_WHOLE = {"skipvar": 30.0, "tuned": 16.0}
"""Groups of plans that one process makes, as they begin with training or a search; their costs in those of a plan."""

_PRECISION = {"cpu": "float32", "cuda": "float32, convolutions of the decoder in TF32"}
_BFLOAT16 = "bfloat16"  # of an Infinity on a GPU, as it is used
_DRAWS = 1000


Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Class scores (N, classes) and features (N, F), on the CPU, of images (N, 3, H, W) in 0..1."""

Jury = Callable[[Tensor], dict[str, Any]]
"""What is said of all images (N, 3, H, W) of a plan, as entries of its row."""


@dataclass(frozen=True)
class Settings:
    """`images` (class, seed) pairs, or prompts of EmojiEval, are compared, `training` others train SkipVAR.

    `minutes` bounds when a new plan may start, `timing` how many of them go to timing compiled plans, with
    `timing_batches` images a call. `search` is the number of plans that a search for good ones tries, on other draws; 0
    for none. `tuned` names plan files. `shard` (i, n) does part i of n of the work, for `merging.merge`.
    """

    model: str = "emoji-var"
    images: int = 256
    training: int = 256
    seed: int = 0
    batch: int = 32
    device: str = "auto"
    minutes: float = 8.0
    timing: float = 0.0
    timing_batches: tuple[int, ...] = (1,)
    shard: tuple[int, int] = (0, 1)
    search: int = 60
    policies: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()


def run(settings: Settings, folder: Path, log: Callable[[str], None] = print, classifier: Judge | None = None) -> Path:
    """Compare, writing the JSON after every plan and the plots at the end; the path of the JSON, of `result_name`.

    Plans that the file in `folder` has, of the same images and machine, are kept and not measured again.
    With a `classifier` the share of images that it names rightly is measured too, and the distance of its features to
    those of the unpruned images, 1 - cosine. A model that takes prompts is judged by EmojiEval instead.
    Raises OptionError for a model without calibration statistics in its plan.
    """
    from toprovar_compile import models

    started = time.monotonic()
    device = measure.pick_device(settings.device)
    model = models.load(settings.model, device=device)
    stats = _statistics(model, settings.model)
    takes_prompts = hasattr(model, "sample_prompts")
    if takes_prompts:
        measure.in_user_precision(model, device)
    training, labels, entries = _wanted(model, settings)
    path = folder / result_name(settings.model, device.type)
    dense = generate(
        model, Plan.dense(model.schedule, len(model.blocks)), labels, seed=settings.seed, batch=settings.batch
    )
    log(f"{len(labels)} images unpruned: {time.monotonic() - started:.0f} s")
    results: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "benchmark": "policies",
        "model": {"name": settings.model, "fingerprint": model.fingerprint()},
        "machine": measure.machine(device) | {"precision": _precision(model, device)},
        "settings": asdict(settings),
        "labels": labels if takes_prompts else labels.tolist(),
        "sampling": asdict(model.sampling),
        "plans": [],
        "not_measured": [],
        "timing": [],
        "worst": [],
    }
    jury = _readers(entries, dense.images, device) if takes_prompts else _jury(classifier, labels.cpu(), dense.images)
    results["unpruned"] = jury(dense.images)
    rows: list[dict[str, Any]] = results["plans"]
    worst = Worst()
    before = _measured_before(path, results)
    if before is not None:
        rows += before["plans"]
        results["timing"] += before["timing"]
        worst.load(before["worst"], path)
    known = {(row["policy"], row["name"], row["digest"]) for row in rows}
    kept: dict[str, Plan] = {}
    leaves: dict[str, Plan] = {}

    def trials() -> Any:
        return try_strategies(
            model,
            training,
            seed=settings.seed + _TRAINING_SEED,
            similarity=lambda a, b: closeness(a, b, device)[0],
            batch=settings.batch,
        )

    for candidate in _candidates(settings, model, stats, trials, results["not_measured"], log):
        label, digest = f"{candidate.policy}: {candidate.name}", candidate.plan.digest()
        kept[digest] = candidate.plan
        if (candidate.policy, candidate.name, digest) in known:
            continue
        if time.monotonic() - started > (settings.minutes - settings.timing) * 60:
            results["not_measured"].append(label)
            continue
        begin = time.monotonic()
        made = generate(model, candidate.plan, labels, seed=settings.seed, batch=settings.batch)
        similar, decibels = closeness(made.images, dense.images, device)
        rows.append(_row(candidate, made.shares, similar, decibels) | {"flips": made.flips(dense)} | jury(made.images))
        if candidate.plan.decisions:
            leaves[digest] = _commonest(made.plans)
        worst.offer(candidate, made, similar, dense.images)
        took = time.monotonic() - begin
        log(f"{label}: {rows[-1]['share']:.3f} of the tokens, SSIM {similar.mean():.4f}, {took:.1f} s")
        write_json(path, results)
    publish(results, worst, path)
    for i, batch in enumerate(settings.timing_batches if settings.timing else ()):
        left = started + settings.minutes * 60 - time.monotonic()
        until = time.monotonic() + left / (len(settings.timing_batches) - i)

        def save(about: dict[str, Any], earlier: tuple[dict[str, Any], ...] = tuple(results["timing"])) -> None:
            results["timing"] = [*earlier, about]
            write_json(path, results)

        time_rows(model, labels, rows, kept, leaves, batch, until, log, save)
    return path


def publish(results: dict[str, Any], worst: Worst, path: Path) -> None:
    """Write the JSON with its summary, and the pictures."""
    results["plans"] = reading_order(results["plans"])
    results |= summary(results["plans"]) | {"worst": worst.lines(results["plans"])}
    write_json(path, results)
    if results["plans"]:
        plot(results, path.with_suffix(".png"))
        worst.draw(path)


def _measured_before(path: Path, results: dict[str, Any]) -> dict[str, Any] | None:
    """The results of an earlier run whose conditions were those of `results`."""
    old = json.loads(path.read_text()) if path.exists() else None
    return old if old is not None and not same_conditions(old, results) else None


def _commonest(plans: Sequence[Plan]) -> Plan:
    """What most images made of a plan that decides."""
    (digest, _), *_ = Counter(plan.digest() for plan in plans).most_common(1)
    return next(plan for plan in plans if plan.digest() == digest)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Frontiers by policy, our frontier against each of theirs, and the pairs of equal shape, all with intervals."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["policy"], []).append(row)
    out: dict[str, Any] = {"frontiers": {}, "ours_against": {}, "pairs": []}
    curves = {name: _curve(members) for name, members in families.items()}
    ours = [row for name in OURS for row in families.get(name, ())]
    own = _curve(ours) if ours else None
    for name, (centre, drawn) in curves.items():
        out["frontiers"][name] = _intervals(centre, drawn)
        if own is not None and name not in OURS:
            out["ours_against"][name] = _intervals(own[0] - centre, own[1] - drawn)
    if own is not None:
        out["frontiers"]["ours, all together"] = _intervals(*own)
    entropy = {row["shape"]: row for row in families.get("score: entropy", ())}
    for name, members in families.items():
        for row in members:
            if row["shape"] in entropy and name != "score: entropy":
                difference = torch.tensor(entropy[row["shape"]]["ssim_each"]) - torch.tensor(row["ssim_each"])
                out["pairs"].append(
                    {"shape": row["shape"], "entropy_minus": name, "ssim": asdict(mean_interval(difference))}
                )
    return out


def _curve(rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The frontier at SHARES of plans, (T,), and of every resample, (D, T). Dense is always among them."""
    quality = torch.tensor([[*row["ssim_each"]] for row in rows], dtype=torch.float64)
    quality = torch.cat((quality, torch.ones(1, quality.shape[1], dtype=torch.float64)))
    share = torch.tensor([row["share"] for row in rows] + [1.0], dtype=torch.float64)
    at = torch.tensor(SHARES, dtype=torch.float64)
    drawn = resamples(quality.shape[1], _DRAWS) @ quality.T
    return frontier(share, quality.mean(1), at), frontier(share.expand_as(drawn), drawn, at)


def _intervals(centre: Tensor, drawn: Tensor) -> list[dict[str, Any]]:
    return [
        {"share": share, **asdict(Interval.of(c, d))}
        for share, c, d in zip(SHARES, centre, drawn.T, strict=True)
        if bool(c.isfinite()) and bool(d.isfinite().all())
    ]


def _row(candidate: Candidate, shares: Tensor, similar: Tensor, decibels: Tensor) -> dict[str, Any]:
    plan = candidate.plan
    provenance = {k: v for k, v in plan.provenance.items() if k != "statistics"}
    return {
        "policy": candidate.policy,
        "name": candidate.name,
        "shape": candidate.shape,
        "place": candidate.place,
        "digest": plan.digest(),
        "provenance": provenance,
        "share": float(shares.mean()),
        "share_interval": asdict(mean_interval(shares)),
        "ssim": asdict(mean_interval(similar)),
        "ssim_worst": float(similar.min()),
        "psnr": asdict(mean_interval(decibels)),
        "ssim_each": numbers(similar),
        "psnr_each": numbers(decibels, 2),
        "share_each": numbers(shares) if plan.decisions else None,
    }


def _candidates(
    settings: Settings,
    model: Any,
    stats: Statistics,
    trials: Callable[[], Any],
    left_out: list[str],
    log: Callable[[str], None],
) -> Iterator[Candidate]:
    """What is asked for of this part of the work, the cheap ones and the short lists first."""
    depth, schedule = len(model.blocks), model.schedule
    groups: dict[str, Callable[[], Iterator[Candidate]]] = {
        "shipped": lambda: iter([Candidate("shipped", "auto", model.plan)]),
        "files": lambda: (Candidate("tuned", Path(text).stem, Plan.load(text)) for text in settings.tuned),
        "fixed": lambda: candidates.fixed(schedule, depth),
        "fastvar": lambda: candidates.fastvar(schedule, depth),
        "skipvar": lambda: candidates.skipvar(trials()),
        "toprovar": lambda: candidates.toprovar(stats),
        "tuned": lambda: _tuned(settings, model, left_out, log),
        "scores": lambda: candidates.shapes(schedule, depth),
        "ablation": lambda: candidates.ablation(stats),
    }
    for name in settings.policies:
        if name not in groups:
            raise OptionError(f"there is no policy {name!r}", where="policies", expected="one of " + ", ".join(groups))
    wanted = [n for n in groups if not settings.policies or n in settings.policies or n == "files"]
    deal = _Deal(*settings.shard)
    whole = {name: deal.mine(_WHOLE[name]) for name in wanted if name in _WHOLE}
    for at, name in enumerate(groups):
        if name in wanted and whole.get(name, True):
            for i, candidate in enumerate(groups[name]()):
                if name in whole or deal.mine():
                    yield replace(candidate, place=(at, i))


class _Deal:
    """Deals work out to equal parts: each piece goes to the part that has least so far."""

    def __init__(self, part: int, parts: int) -> None:
        if not 0 <= part < parts:
            raise OptionError(f"part {part} of {parts}", where="shard", expected="i/n with i in 0..n-1")
        self._part, self._loads = part, [0.0] * parts

    def mine(self, cost: float = 1.0) -> bool:
        """Whether the next piece is in this part."""
        least = self._loads.index(min(self._loads))
        self._loads[least] += cost
        return least == self._part


def _tuned(settings: Settings, model: Any, left_out: list[str], log: Callable[[str], None]) -> Iterator[Candidate]:
    """The frontier of a search on a few other images, thinned to a handful of plans."""
    if not settings.search:
        return
    chosen = tune.Settings(settings.search, seed=settings.seed + _SEARCH_SEED, images_at_once=settings.batch)
    costs = Costs.by_tokens(Plan.dense(model.schedule, len(model.blocks)))
    try:
        found = tune.frontier_of(tune.search(model, chosen, costs))
    except MissingDependencyError as error:
        log(f"no search: {error}")
        left_out.append("tuned plans (optuna is not installed)")
        return
    step = max(1, -(-len(found) // _TUNED))
    for i, trial in enumerate(found[::step]):
        yield Candidate("tuned", f"{i}: {_summary(trial.plan)}", trial.plan)


def _summary(plan: Plan) -> str:
    """Depth, exit and end of guidance of a plan that tuning made."""
    scales = [s for s in range(len(plan.schedule)) if plan.runs(s)]
    pruned = next((s for s in scales if any(a.kind != "dense" for a in plan.scales[s].layers)), None)
    unguided = next((s for s in scales if not plan.guided(s)), None)
    return f"from={pruned},unguided={unguided},exit={plan.exit_scale}"


def result_name(model: str, device: str) -> str:
    """The file of a comparison: policies_cuda.json of emoji-VAR, policies_emoji_infinity_cuda.json of another model."""
    own = "" if model == Settings.model else model.replace("-", "_") + "_"
    return f"policies_{own}{device}.json"


def _precision(model: Any, device: torch.device) -> str:
    """How the eager reference computes."""
    narrow = next(model.parameters()).dtype == torch.bfloat16
    return _BFLOAT16 if narrow else _PRECISION[device.type]


def _jury(classifier: Judge | None, labels: Tensor, unpruned: Tensor) -> Jury:
    """What the classifier says of images."""
    if classifier is None:
        return lambda images: {}
    _, wanted = classifier(unpruned)

    def entries(images: Tensor) -> dict[str, Any]:
        scores, features = classifier(images)
        named = (scores.argmax(1) == labels).float()
        distance = 1 - torch.nn.functional.cosine_similarity(features.float(), wanted.float())
        return {
            "named": asdict(mean_interval(named)),
            "feature_distance": asdict(mean_interval(distance)),
            "frechet": frechet_distance(wanted, features),
        }

    return entries


def _readers(entries: Sequence[Entry], unpruned: Tensor, device: torch.device) -> Jury:
    """EmojiEval of images, one for each of its entries: scores, those less the unpruned images' ones, and the distances
    of the detector's features to theirs, image by image and as a whole."""
    detector = load_detector(device=device)

    def right(images: Tensor) -> Tensor:
        return torch.tensor([float(not reason) for reason in reasons(images, entries, detector)])

    wanted, known = right(unpruned), detector.embed(unpruned)

    def said(images: Tensor) -> dict[str, Any]:
        marks = right(images)
        return {
            "scores": {k: asdict(v) for k, v in summarise(entries, marks.tolist()).items()},
            "minus_unpruned": asdict(summarise(entries, (marks - wanted).tolist())["overall"]),
            "feature_distance": asdict(mean_interval(detector.distance(images, unpruned))),
            "frechet": frechet_distance(known, detector.embed(images)),
        }

    return said


def _wanted(model: Any, settings: Settings) -> tuple[Any, Any, list[Entry]]:
    """Classes for training and for the comparison, as far as the model has enough of them all different; or example
    prompts for training and EmojiEval's, evenly spread, with their entries, for the comparison."""
    if hasattr(model, "sample_prompts"):
        every = load_prompts()
        count = min(settings.images, len(every))
        entries = [every[i * len(every) // count] for i in range(count)]
        return model.sample_prompts(settings.training, settings.seed), [e.prompt for e in entries], entries
    total = settings.training + settings.images
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = -(-total // model.cfg.num_classes)
    order = torch.cat([torch.randperm(model.cfg.num_classes, generator=generator) for _ in range(rounds)])
    order = order[:total].to(next(model.parameters()).device)
    return order[: settings.training], order[settings.training :], []


def _statistics(model: Any, name: str) -> Statistics:
    found = model.plan.provenance.get("statistics") if model.plan is not None else None
    if found is None:
        raise OptionError(
            f"{name} has no calibration statistics",
            where="policies",
            expected="a plan made by calibration",
            todo="make one: toprovar calibrate",
        )
    return Statistics.from_json(found)
