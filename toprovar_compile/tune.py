"""Thresholds by search instead of by hand: the fastest plan that is close enough, or the closest that is fast enough.

Optuna proposes thresholds; each proposal becomes a plan by calibration statistics, is generated on a few images by the
eager reference, and priced by `costs`. The best of them are then confirmed on other images, and the first that keeps
the goal there is the result; its file holds the evidence. Needs the extra "tune".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toprovar_compile.costs import LATE, Costs
from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.evaluate.images import generate, numbers
from toprovar_compile.evaluate.intervals import mean_interval
from toprovar_compile.evaluate.quality import closeness
from toprovar_compile.plan import DENSE, Plan
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds, ToProVarPolicy, plan_from_statistics

_BUCKETS = {"coarse": (0.25, 0.5, 0.75), "fine": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)}
_CONFIRMED = 6  # plans at most that are generated on held-out images
_HELD_OUT_SEED = 5_000  # added to the seed: held-out images have other classes and other draws


@dataclass(frozen=True)
class Goal:
    """Exactly one: a mean SSIM to the unpruned images that must be reached, or a speed-up over dense."""

    ssim: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if (self.ssim is None) == (self.speedup is None):
            raise OptionError(
                f"the goal is ssim={self.ssim}, speedup={self.speedup}", where="tune", expected="exactly one of both"
            )
        if self.ssim is not None and not 0 < self.ssim < 1:
            raise OptionError(f"the SSIM is {self.ssim}", where="tune", expected="a number in 0..1")
        if self.speedup is not None and not 1 <= self.speedup < float("inf"):
            raise OptionError(f"the speed-up is {self.speedup}", where="tune", expected="a number of at least 1")

    def reached(self, ssim: float, speedup: float) -> bool:
        """Whether a plan of these is good enough."""
        return ssim >= self.ssim if self.ssim is not None else speedup >= (self.speedup or 0)

    def value(self, ssim: float, speedup: float) -> float:
        """What is then to be as large as possible."""
        return speedup if self.ssim is not None else ssim


@dataclass(frozen=True)
class Trial:
    """One plan that was tried: its mean SSIM on the few images and its estimated speed-up."""

    plan: Plan
    ssim: float
    speedup: float


@dataclass(frozen=True)
class Tuned:
    """`plan` keeps the goal on held-out images if `reached`; else it comes nearest. `frontier`: the best of all trials,
    fastest last, none of which is slower and less close than another."""

    plan: Plan
    reached: bool
    frontier: tuple[Trial, ...]
    trials: int


@dataclass(frozen=True)
class Settings:
    """`trials` proposals on `images` images each, confirmation on `held_out` others; `seed` fixes all of it.

    `guidance`: may the plan switch it off in late scales. `images_at_once`: the batch.
    """

    trials: int = 60
    images: int = 16
    held_out: int = 64
    seed: int = 0
    images_at_once: int = 16
    guidance: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "images", "held_out", "images_at_once"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}", where="tune", expected="at least 1")


def tune(
    model: Any,
    goal: Goal,
    settings: Settings | None = None,
    *,
    costs: Costs | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Search a plan for `model`, whose own plan holds calibration statistics. `costs` default to those by tokens.

    Raises MissingDependencyError without Optuna or torchmetrics, OptionError for a model without statistics.
    """
    settings = settings or Settings()
    stats = _statistics(model)
    costs = costs or Costs.by_tokens(Plan.dense(stats.schedule, stats.num_layers))
    return _confirm(model, goal, settings, costs, search(model, settings, costs, log), log)


def search(model: Any, settings: Settings, costs: Costs, log: Callable[[str], None] = lambda text: None) -> list[Trial]:
    """All different plans that were tried on the few images, for both aims at once. Raises as `tune` does."""
    optuna, stats = _optuna(), _statistics(model)
    images = _Images(model, settings, held_out=False)
    tried: dict[str, Trial] = {}

    def objective(trial: Any) -> tuple[float, float]:
        plan = _propose(trial, stats, settings.guidance)
        digest = plan.digest()
        if digest not in tried:
            ssim = float(images.ssim(plan).mean())
            tried[digest] = Trial(plan, ssim, costs.speedup(plan))
            log(f"{len(tried)}: SSIM {ssim:.4f}, {tried[digest].speedup:.2f} x")
        return tried[digest].ssim, tried[digest].speedup

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize", "maximize"], sampler=optuna.samplers.TPESampler(seed=settings.seed)
    )
    for start in _starting_points(stats, settings.guidance):
        study.enqueue_trial(start)
    study.optimize(objective, n_trials=settings.trials)
    return list(tried.values())


def _confirm(
    model: Any, goal: Goal, settings: Settings, costs: Costs, trials: list[Trial], log: Callable[[str], None]
) -> Tuned:
    """The best trial that keeps the goal on held-out images, of several fast enough ones the closest there."""
    edge = frontier_of(trials)
    promising = [t for t in edge if goal.reached(t.ssim, t.speedup)]
    # Where the few images were kinder than the held-out ones, the next plans have more in reserve.
    ordered = sorted(promising, key=lambda t: -goal.value(t.ssim, t.speedup))[:_CONFIRMED]
    held_out = _Images(model, settings, held_out=True)
    confirmed: list[tuple[Trial, Tensor]] = []
    for trial in ordered or [edge[0] if goal.ssim is not None else edge[-1]]:
        similar = held_out.ssim(trial.plan)
        log(f"held out: SSIM {similar.mean():.4f} ({trial.ssim:.4f} before), {trial.speedup:.2f} x")
        confirmed.append((trial, similar))
        if goal.ssim is not None and similar.mean() >= goal.ssim:
            confirmed = confirmed[-1:]
            break
    trial, similar = max(confirmed, key=lambda pair: float(pair[1].mean()))
    reached = goal.reached(float(similar.mean()), trial.speedup)
    plan = _with_evidence(trial, similar, goal, settings, costs, edge, len(trials), reached)
    return Tuned(plan, reached, edge, len(trials))


def frontier_of(trials: list[Trial]) -> tuple[Trial, ...]:
    """Those that no other beats in both SSIM and speed, the fastest last."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.speedup, -t.ssim)):
        if not best or trial.ssim > best[-1].ssim:
            best.append(trial)
    return tuple(reversed(best))


def _propose(trial: Any, stats: Statistics, guidance: bool) -> Plan:
    """A plan from thresholds that Optuna proposes."""
    last = len(stats.schedule) - 1
    late = list(range(last - LATE + 1, last + 1))
    depth = trial.suggest_categorical("depth", [*late, last + 1])
    leave = trial.suggest_categorical("exit", [*late, last + 1])
    unguided = trial.suggest_categorical("unguided", [*late, last + 1]) if guidance else last + 1
    alpha_min = trial.suggest_float("alpha_min", 0.0, 0.9)
    spread = trial.suggest_float("alpha_spread", 0.0, 1.0)
    bound = trial.suggest_float("detail_above", 0.05, 0.95)
    thresholds = Thresholds(
        depth=min(depth, last),
        beta=ToProVarPolicy(stats, Thresholds()).beta * 2 ** trial.suggest_float("log2_beta", -1.5, 1.5),
        alpha_min=alpha_min,
        alpha_max=min(1.0, alpha_min + spread),
        global_below=bound,
        detail_above=bound,
        restore=trial.suggest_categorical("restore", ["cached", "identity"]),
        buckets=_BUCKETS[trial.suggest_categorical("buckets", list(_BUCKETS))],
        exit_scale=leave if leave <= last else None,
    )
    plan = plan_from_statistics(stats, thresholds)
    scales = []
    for s, scale in enumerate(plan.scales):
        layers = scale.layers if depth <= last else (DENSE,) * len(scale.layers)
        scales.append(replace(scale, layers=layers, cfg=s < unguided))
    return replace(plan, scales=tuple(scales))


def _starting_points(stats: Statistics, guidance: bool) -> list[dict[str, Any]]:
    """Where the search begins: plain exits, guidance dropped, and one plan that prunes."""
    last = len(stats.schedule) - 1
    base: dict[str, Any] = {
        "depth": last + 1, "exit": last + 1, "alpha_min": 0.5, "alpha_spread": 0.5, "detail_above": 0.3,
        "log2_beta": 0.0, "restore": "cached", "buckets": "fine",
    }  # fmt: skip
    if guidance:
        base["unguided"] = last + 1
    points = [base | {"exit": s} for s in range(last, last - LATE, -1)]
    points.append(base | {"depth": last - 1, "exit": last})
    if guidance:
        points += [base | {"unguided": s, "exit": leave} for s in (last - 1, last - 2) for leave in (last, last + 1)]
    return points


class _Images:
    """The classes or prompts of the search, or those held out, with their unpruned images."""

    labels: Any

    def __init__(self, model: Any, settings: Settings, *, held_out: bool) -> None:
        self.model, self.batch = model, settings.images_at_once
        self.seed = settings.seed + (_HELD_OUT_SEED if held_out else 0)
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(settings.seed)
        if hasattr(model, "sample_prompts"):
            drawn = model.sample_prompts(settings.images + settings.held_out, settings.seed)
            self.labels = drawn[settings.images :] if held_out else drawn[: settings.images]
        else:
            self.labels = self._classes(settings, held_out, generator)
        self.unpruned = self._images(Plan.dense(model.schedule, len(model.blocks)))

    def _classes(self, settings: Settings, held_out: bool, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.model.cfg.num_classes, generator=generator)
        # The search takes classes from the front, the confirmation from the back.
        chosen = order.flip(0)[: settings.held_out] if held_out else order[: settings.images]
        return chosen.to(self.device)

    def ssim(self, plan: Plan) -> Tensor:
        """One number an image."""
        return closeness(self._images(plan), self.unpruned, self.device)[0]

    def _images(self, plan: Plan) -> Tensor:
        return generate(self.model, plan, self.labels, seed=self.seed, batch=self.batch).images


def _with_evidence(
    trial: Trial,
    similar: Tensor,
    goal: Goal,
    settings: Settings,
    costs: Costs,
    edge: tuple[Trial, ...],
    tried: int,
    reached: bool,
) -> Plan:
    evidence: Mapping[str, Any] = {
        "goal": {k: v for k, v in asdict(goal).items() if v is not None},
        "reached": reached,
        "settings": asdict(settings),
        "tried": tried,
        "speedup": {"estimate": round(trial.speedup, 4), "by": costs.source},
        "ssim_search": round(trial.ssim, 5),
        "ssim_held_out": asdict(mean_interval(similar)) | {"worst": round(float(similar.min()), 5)},
        "ssim_held_out_each": numbers(similar),
        "frontier": [{"ssim": round(t.ssim, 5), "speedup": round(t.speedup, 4)} for t in edge],
    }
    return replace(trial.plan, provenance={**trial.plan.provenance, "made_by": "toprovar tune", "tuned": evidence})


def _statistics(model: Any) -> Statistics:
    found = model.plan.provenance.get("statistics") if model.plan is not None else None
    if found is None:
        raise OptionError(
            "the model has no calibration statistics",
            where="tune",
            expected="a plan made by calibration",
            todo="make one: toprovar calibrate",
        )
    return Statistics.from_json(found)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise MissingDependencyError(
            "optuna is not installed",
            where="tune",
            expected='the extra "tune"',
            todo="pip install 'toprovar_compile[tune]'",
        ) from error
