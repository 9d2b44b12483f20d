"""Which plan a generation follows: from the options, the model's own plan and the model's fingerprint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.options import Options
from toprovar_compile.plan import Plan
from toprovar_compile.policies.toprovar import Thresholds, plan_from_statistics
from toprovar_compile.report import counters, logger
from toprovar_compile.session import Session, current_session

_OF_PLAN = ("restore", "selection", "direction")  # overrides that need no new decisions


class PlanBinder:
    """Gives each generation its plan, checked once for each state of the weights."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._explicit: Plan | None = None
        if isinstance(options.plan, Plan):
            self._explicit = options.plan
        elif options.plan not in ("auto", "dense"):
            self._explicit = Plan.load(os.fspath(options.plan))
        if options.plan == "dense" and options.thresholds():
            raise OptionError(
                f"{', '.join(options.thresholds())} given with plan='dense'",
                where="options",
                expected="thresholds only with a plan that prunes",
                todo="remove them, or use plan='auto'",
            )
        if self._explicit is not None:
            self._explicit = _with_thresholds(self._explicit, options)
        self._checked: tuple[object, Plan | None] | None = None

    def plan(self, weights: Sequence[Tensor], num_layers: int) -> Plan | None:
        """The plan of the generation in progress, bound to its session; None runs everything.

        `weights` stand for the model: when one of them, or the model's own plan, was changed or exchanged, the plan is
        checked again. That is looked at once a generation.
        Raises PlanError when an explicit plan does not fit the model.
        """
        session = current_session()
        if session is None:
            return None
        if not session.bound and self._options.plan == "dense":
            session.plan, session.bound = None, True
        elif not session.bound:
            state = [w.data_ptr() for w in weights], [_version(w) for w in weights]
            key = (session.schedule, num_layers, session.known_plan, state)
            if self._checked is None or self._checked[0] != key:
                self._checked = (key, self._resolve(session, num_layers))
            session.plan, session.bound = self._checked[1], True
        return session.plan

    def _resolve(self, session: Session, num_layers: int) -> Plan | None:
        if self._explicit is not None:
            self._explicit.check_model(session.fingerprint(), session.schedule, num_layers)
            return self._explicit
        if session.known_plan is None:
            return self._dense(
                "the model brings no plan; calibrate one, or use plan='dense' to say that none is wanted"
            )
        try:
            session.known_plan.check_model(session.fingerprint(), session.schedule, num_layers)
        except PlanError as error:
            return self._dense(f"the model's own plan does not fit it: {error}")
        return _with_thresholds(session.known_plan, self._options)

    @staticmethod
    def _dense(reason: str) -> Plan | None:
        counters.add("fallback", f"plan='auto' runs dense: {reason}")
        logger.warning("plan='auto' runs dense: %s", reason)
        return None


def _with_thresholds(plan: Plan, options: Options) -> Plan:
    """The plan under the options' thresholds and overrides."""
    chosen = options.thresholds()
    if not chosen:
        return plan
    if set(chosen) <= set(_OF_PLAN):
        return replace(plan, **chosen)
    statistics = plan.provenance.get("statistics")
    if statistics is None:
        raise OptionError(
            f"{', '.join(chosen)} given, but the plan holds no statistics to decide by",
            where="options",
            expected="a plan made by calibration",
            todo="calibrate one with `toprovar calibrate`, or remove the thresholds",
        )
    names = {f.name for f in fields(Thresholds)}
    before: dict[str, Any] = {k: v for k, v in plan.provenance.get("thresholds", {}).items() if k in names}
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in before.items()}
    if chosen.keys() & {"tau", "crossing"}:
        before.pop("depth", None)  # a depth set by hand would leave them without effect
    return plan_from_statistics(statistics, Thresholds(**{**before, **chosen}))


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version
