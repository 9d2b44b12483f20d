"""FastVAR as a policy (arXiv 2503.23367): tokens far from the mean token of their map are kept.

Its published code prunes single branches (attention, cross-attention, feed-forward), each by its own ranking; here the
layer is the unit, ranked once at its input. The rest is the same: counts, layers, the restoring from the scale before
the first pruned one, and leaving the generation early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toprovar_compile.errors import OptionError
from toprovar_compile.plan import Plan, Restore, Score
from toprovar_compile.policies import make_plan
from toprovar_compile.schedule import ScaleSchedule

# Infinity-2B at 1024 px: 40 % of the tokens pruned at 32x32 and 50 % at 40x40, two more scales left out,
# layers 3..27 of 32.
_RATIOS = (0.4, 0.5)
_LEFT_OUT = 2
_LAYERS = (3 / 32, 28 / 32)


@dataclass(frozen=True)
class FastVarPolicy:
    """`ratios`: the share (0..1) of its tokens that each named scale prunes, in the layers of `layers` alone.

    `exit_scale`: leave before this scale. `bucket`: kept counts are rounded up to multiples of it.
    Raises OptionError for a ratio, scale or layer out of range.
    """

    schedule: ScaleSchedule
    ratios: Mapping[int, float]
    layers: range
    exit_scale: int | None = None
    bucket: int = 1

    def __post_init__(self) -> None:
        last = len(self.schedule) - 1
        if any(not 1 <= s <= last or not 0 <= r < 1 for s, r in self.ratios.items()):
            raise OptionError(
                f"ratios are {dict(self.ratios)}", where="FastVarPolicy", expected=f"shares below 1 of scales 1..{last}"
            )
        if self.bucket < 1:
            raise OptionError(f"bucket is {self.bucket}", where="FastVarPolicy", expected="at least 1")

    @classmethod
    def like_published(cls, schedule: ScaleSchedule, num_layers: int, *, bucket: int = 1) -> FastVarPolicy:
        """The published settings of Infinity-2B, at the same places counted from the end: two scales pruned, two left
        out, layers in the same proportion.

        Raises OptionError for fewer than six scales.
        """
        exit_scale = len(schedule) - _LEFT_OUT
        first = exit_scale - len(_RATIOS)
        if first < 2:
            raise OptionError(f"the model has {len(schedule)} scales", where="FastVarPolicy", expected="at least 6")
        start, end = (round(share * num_layers) for share in _LAYERS)
        return cls(schedule, dict(enumerate(_RATIOS, first)), range(start, end), exit_scale, bucket)

    def scores_by(self) -> Score:
        """Distance to the mean token."""
        return "mean_distance"

    def keep_count(self, s: int, layer: int) -> int:
        """All tokens but the pruned share, which is rounded down."""
        n = self.schedule.tokens[s]
        if s not in self.ratios or layer not in self.layers:
            return n
        kept = n - int(n * self.ratios[s])
        return min(-(-kept // self.bucket) * self.bucket, n)

    def restore(self) -> Restore:
        """From what the layer added at its last dense scale."""
        return "cached"

    def exits(self, s: int) -> bool:
        """Whether `s` is the exit."""
        return s == self.exit_scale

    def guided(self, s: int) -> bool:
        """Always."""
        return True


def fastvar_plan(policy: FastVarPolicy, num_layers: int, fingerprint: str = "") -> Plan:
    """The plan of the policy for a model of so many layers."""
    return make_plan(
        policy,
        policy.schedule,
        num_layers,
        model=fingerprint,
        provenance={
            "made_by": "fastvar",
            "ratios": {str(s): r for s, r in policy.ratios.items()},
            "layers": [policy.layers.start, policy.layers.stop],
            "bucket": policy.bucket,
        },
    )
