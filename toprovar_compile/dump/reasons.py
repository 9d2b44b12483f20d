"""Why a plan does what it does at one scale and layer, in sentences, from the plan and its provenance alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toprovar_compile.errors import ToproVarError
from toprovar_compile.plan import Plan
from toprovar_compile.policies.statistics import Statistics
from toprovar_compile.policies.toprovar import Thresholds, ToProVarPolicy

_SCORES = {
    "mean_distance": "distance to the mean token of the map",
    "frequency": "distance to the mean of the tokens around it",
    "random": "a seeded random order",
}


def why(plan: Plan, s: int, layer: int) -> list[str]:
    """Sentences: what the plan does with `layer` at scale `s`, how, and what decided it."""
    n, (h, w) = plan.schedule.tokens[s], plan.schedule.grids[s]
    where = f"Scale {s} ({h} x {w} = {n} token{'s' if n > 1 else ''}), layer {layer}: "
    if not plan.runs(s):
        return [f"{where}not run, because the generation is left before scale {plan.exit_scale}.", *_exit(plan)]
    action = plan.action(s, layer)
    if action.kind == "dense":
        whole = f"all {n} tokens are computed" if n > 1 else "its one token is computed"
        return [f"{where}dense, nothing is pruned; {whole}.", *_dense(plan, s, layer)]
    if action.kind == "skip":
        return [f"{where}skipped, no token is computed. {_restored(plan, s, layer)}", *_made(plan)]
    share = (action.keep or 0) / n
    what = f"{where}pruned, {action.keep} of {n} tokens ({share:.1%}) are computed, {n - (action.keep or 0)} are not."
    return [what, _chosen(plan, s, layer), _restored(plan, s, layer), *_pruned(plan, s, layer)]


def decided_by(plan: Plan, s: int, layer: int) -> int | None:
    """The scale whose entropy map of `layer` chooses the tokens kept at scale `s`; None where none does."""
    read = [e for e in range(s) if (e, layer) in plan.reads_entropy()]
    chooses = plan.runs(s) and plan.action(s, layer).kind == "prune" and plan.score == "entropy"
    return read[-1] if chooses and read else None


def describe(plan: Plan) -> list[str]:
    """Sentences about the plan as a whole."""
    made = plan.provenance.get("made_by", "hand")
    texts = [f"Made by {made}; computes {plan.total_share():.1%} of the tokens of an unpruned generation."]
    if (policy := _policy(plan)) is not None:
        texts.append(f"Pruning starts at scale {policy.depth}: {_depth(policy)}")
        texts.append(
            f"Layers are classed at scale {policy.representative_scale} by R = exp(-beta * (ratio - 1)) of the first "
            f"two singular values of their entropy maps, beta = {policy.beta:.4g}: up to "
            f"{policy.thresholds.global_below} global (dense), from {policy.thresholds.detail_above} detail (pruned), "
            "between them ambiguous (dense)."
        )
    if plan.exit_scale is not None:
        texts += [f"Scales from {plan.exit_scale} on are not run.", *_exit(plan)]
    unguided = [s for s, scale in enumerate(plan.scales) if not scale.cfg]
    if unguided:
        texts.append(f"From scale {unguided[0]} on guidance is off: the unconditional half is not computed.")
    for decision in plan.decisions:
        texts.append(
            f"After scale {decision.after} each batch decides by its {decision.features} whether it goes on with one "
            f"of the {len(plan.alternatives)} alternatives."
        )
    return texts


def _chosen(plan: Plan, s: int, layer: int) -> str:
    """How the kept tokens are chosen."""
    if plan.score != "entropy":
        return f"Kept are the tokens of the highest score: {_SCORES[plan.score]}."
    by = decided_by(plan, s, layer)
    source = f"the entropy map of this layer, last measured at scale {by}" if by is not None else "its entropy map"
    order = "lowest" if plan.direction == "low_entropy" else "highest"
    how = f"the {order} attention entropy" if plan.selection == "topk" else "a sample by keep-probability"
    resized = f" and resized from {_grid(plan, by)} to {_grid(plan, s)}" if by is not None else ""
    regions = f"; every region of the map keeps at least {plan.region_share:.0%}" if plan.region_share else ""
    return f"Kept are the tokens of {how} in {source}{resized}{regions}."


def _restored(plan: Plan, s: int, layer: int) -> str:
    if plan.restore == "identity":
        return "The other tokens leave the layer as they came (restore = identity)."
    kept = [e for e in range(s) if (e, layer) in plan.keeps_delta()]
    at = f"scale {kept[-1]}" if kept else "its last dense scale"
    return (
        f"The other tokens get what this layer added at {at}, resized (restore = cached); they add no keys or values."
    )


def _dense(plan: Plan, s: int, layer: int) -> list[str]:
    policy = _policy(plan)
    if policy is None:
        return _made(plan)
    if policy.depth is None:
        return ["Why: no scale crosses tau, so the whole plan is dense."]
    if s < policy.depth:
        return [
            f"Why: pruning starts at scale {policy.depth}: {_depth(policy)}",
            f"This layer: {_score(policy, layer)}",
        ]
    if policy.layer_class(layer) != "detail":
        return [f"Why: {_score(policy, layer)}"]
    return [f"Why: the share to keep is so large that its bucket is the whole map. {_count(policy, s, layer)}"]


def _pruned(plan: Plan, s: int, layer: int) -> list[str]:
    policy = _policy(plan)
    if policy is None:
        return _made(plan)
    return [
        f"Why this scale: pruning starts at scale {policy.depth}: {_depth(policy)}",
        f"Why this layer: {_score(policy, layer)}",
        f"Why so many: {_count(policy, s, layer)}",
        f"Evidence: {policy.stats.prompts} calibration prompts, seed {policy.stats.seed}; mean entropy here "
        f"{policy.stats.entropy[s][layer]:.4g} nats.",
    ]


def _exit(plan: Plan) -> list[str]:
    by = plan.provenance.get("thresholds", {}).get("exit_scale")
    if by is not None:
        return [f"Why: the threshold exit_scale = {by} of the plan; the image is made from the scales before it."]
    return _made(plan)


def _score(policy: ToProVarPolicy, layer: int) -> str:
    rep, t = policy.representative_scale, policy.thresholds
    kind = policy.layer_class(layer)
    bound = {
        "detail": f"at least detail_above = {t.detail_above}, so it is a detail layer and may be pruned",
        "global": f"at most global_below = {t.global_below}, so it is a global layer and stays dense",
        "ambiguous": f"between global_below = {t.global_below} and detail_above = {t.detail_above}, so it stays dense",
    }[kind]
    ratio = policy.stats.ratio[rep][layer]
    return f"the layer's score at scale {rep} is R = {policy.scores[layer]:.3f} (ratio {ratio:.4g}), {bound}."


def _depth(policy: ToProVarPolicy) -> str:
    t = policy.thresholds
    if t.depth is not None:
        return f"the threshold depth = {t.depth} was set, whatever rho and tau say."
    at = policy.depth
    rho = policy.stats.rho[at] if at is not None else None
    sign = ">=" if t.crossing == "rising" else "<="
    return f"it is the first whose share of low-entropy tokens rho = {rho} is {sign} tau = {t.tau} ({t.crossing})."


def _count(policy: ToProVarPolicy, s: int, layer: int) -> str:
    t, n = policy.thresholds, policy.stats.schedule.tokens[s]
    share, count = policy.keep_share(s, layer), policy.keep_count(s, layer)
    bucket = next((b for b in t.buckets if b >= share - 1e-9), 1.0)
    return (
        f"the mean keep-probability over the map, with alpha {t.alpha_min}..{t.alpha_max} and R, is {share:.3f}; the "
        f"next bucket is {bucket} of {n} tokens, in whole tiles {count}."
    )


def _made(plan: Plan) -> list[str]:
    """For a plan of another origin: what its provenance says, but for long lists."""
    facts = {k: v for k, v in plan.provenance.items() if k not in ("statistics", "made_by") and len(str(v)) <= 300}
    by = plan.provenance.get("made_by")
    if by is None:
        return ["Why: the plan says so; it has no provenance (made by hand)."]
    told = ", ".join(f"{key} = {_short(value)}" for key, value in facts.items())
    return [f"Why: the plan was made by {by}" + (f" with {told}." if told else ".")]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items() if v is not None) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _grid(plan: Plan, s: int) -> str:
    return "{} x {}".format(*plan.schedule.grids[s])


def _policy(plan: Plan) -> ToProVarPolicy | None:
    """The policy that made the plan, if the plan still does what the policy says."""
    return _policy_of(plan.digest(), _Held(plan))


@dataclass(frozen=True)
class _Held:
    """A plan, for a cache that goes by another key: provenance cannot be hashed."""

    plan: Plan = field(compare=False)


@functools.lru_cache(maxsize=8)
def _policy_of(digest: str, held: _Held) -> ToProVarPolicy | None:
    plan, data = held.plan, held.plan.provenance
    if data.get("made_by") not in ("toprovar", "toprovar tune") or "statistics" not in data:
        return None
    try:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in data.get("thresholds", {}).items()}
        policy = ToProVarPolicy(Statistics.from_json(data["statistics"]), Thresholds.from_mapping(given))
    except ToproVarError:  # provenance that was edited by hand
        return None
    tokens = plan.schedule.tokens
    agrees = (policy.stats.schedule, policy.stats.num_layers) == (plan.schedule, plan.num_layers) and all(
        action.tokens(tokens[s]) == policy.keep_count(s, i)
        for s, scale in enumerate(plan.scales)
        for i, action in enumerate(scale.layers)
    )
    return policy if agrees else None
