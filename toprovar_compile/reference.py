"""What pruning means, in eager PyTorch: the definition that every compiled form is tested against.

It replaces the `forward` of the model's blocks for a while and watches their attention calls; no graph is involved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toprovar_compile.errors import OptionError, UnsupportedGraphError
from toprovar_compile.plan import DENSE, Plan
from toprovar_compile.policies.decide import ENTROPY_SOURCE, FEATURES_SINK
from toprovar_compile.policies.selection import kept_tokens
from toprovar_compile.policies.tokens import Grid, resize_tokens
from toprovar_compile.session import current_session

_QUERY_CHUNK = 256  # rows of the attention matrix held at once when entropy is measured
_BLOCK = 2**27  # scores held at once on a GPU
_ATTENTION = F.scaled_dot_product_attention
_LOWEST = torch.finfo(torch.float32).min


@dataclass
class Trace:
    """What happened in the latest generation, by (scale, layer); every batch row counts, both halves of CFG.

    `plan` is what was followed to the end, of a plan with alternatives the one that was chosen.
    `entropy`: the stored map (B, N) after the layer ran. `kept`: token indices (B, K) of pruned layers. `tokens`:
    tokens computed. `kv_length`: keys in the layer's cache afterwards. `features`: what each decision read, (B, F), in
    order.
    """

    entropy: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    kv_length: dict[tuple[int, int], int] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    plan: Plan | None = None

    def clear(self) -> None:
        """Forget everything."""
        for records in (self.entropy, self.kept, self.tokens, self.kv_length):
            records.clear()
        self.features.clear()


@contextmanager
def pruned(model: nn.Module, plan: Plan, *, measure_all: bool = False) -> Iterator[Trace]:
    """Make `model` (a `models.var.VAR` or a model with its attributes) generate by `plan` inside the `with` block.

    The trace always holds the latest generation. `measure_all` measures every layer's entropy at every scale, whether a
    decision reads it or not. Raises PlanError when the plan does not fit the model, OptionError for a model without
    `blocks`, `schedule` and `fingerprint`. Not for several threads at once.
    """
    missing = [name for name in ("blocks", "schedule", "fingerprint") if not hasattr(model, name)]
    if missing:
        raise OptionError(
            f"{type(model).__name__} has no attribute {missing[0]!r}",
            where="reference.pruned",
            expected="a model of toprovar_compile.models",
        )
    blocks: Any = model.blocks
    fingerprint: Any = model.fingerprint
    plan.check_model(fingerprint() if plan.model else "", model.schedule, len(blocks))  # type: ignore[arg-type]
    trace = Trace()
    executor = _Executor(plan, trace, measure_all)
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            if "forward" in vars(block):
                raise OptionError(
                    f"block {layer} has a replaced forward already",
                    where="reference.pruned",
                    expected="one such `with` block at a time",
                )
            stack.callback(delattr, block, "forward")
            block.forward = executor.wrap(layer, block.forward)
        yield trace


@dataclass
class _Layer:
    """State of one layer in the image in progress: its latest map and delta, each with its grid."""

    entropy: tuple[Tensor, Grid] | None = None
    delta: tuple[Tensor, Grid] | None = None

    def narrow(self, rows: int) -> None:
        """Keep the first `rows` rows: guidance was switched off."""
        self.entropy, self.delta = (p and (p[0][:rows], p[1]) for p in (self.entropy, self.delta))


class _Executor:
    """Runs the blocks of a model by a plan; the state of the image in progress is in its session."""

    def __init__(self, plan: Plan, trace: Trace, measure_all: bool) -> None:
        self.root, self.trace, self.measure_all = plan, trace, measure_all
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.plan = plan
        self.reads, self.deltas = plan.reads_entropy(), plan.keeps_delta()

    def wrap(self, layer: int, block: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        """`block` under the plan: it takes the same arguments and returns the same kind of results."""

        def forward(
            x: Tensor,
            mod: Tensor,
            k_cache: Tensor | None,
            v_cache: Tensor | None,
            rows: tuple[Tensor, ...] = (),
            *rest: Any,
            **options: Any,
        ) -> Any:
            s, state = self._begin(layer)
            state.narrow(x.shape[0])
            action = self.plan.action(s, layer)
            # Mixing the halves of guidance takes every token of both; a layer that drops one cannot be left out.
            if "mix" in options and (action.kind == "prune" or options["mix"][1]):
                action = DENSE
            self.trace.tokens[s, layer] = action.tokens(x.shape[1])
            if action.kind == "skip":
                out, k, v = self._restored(state, x, s), k_cache, v_cache
            elif action.kind == "prune":
                entropy = self._resized_entropy(s, state) if self.plan.score == "entropy" else None
                idx = kept_tokens(self.plan, s, layer, action.tokens(x.shape[1]), x, entropy)
                self.trace.kept[s, layer] = idx
                kept = idx.unsqueeze(-1).expand(-1, -1, x.shape[-1])
                with self._measured(s, layer) as calls:
                    y, k, v = block(x.gather(1, kept), mod, k_cache, v_cache, *_of_tokens(rows, idx), *rest, **options)
                out = self._restored(state, x, s).scatter(1, kept, y)
                self._store_entropy(s, layer, state, calls, k, idx)
            else:
                with self._measured(s, layer) as calls:
                    out, k, v = block(x, mod, k_cache, v_cache, *((rows,) if rows else ()), *rest, **options)
                self._store_entropy(s, layer, state, calls, k, None)
                if (s, layer) in self.deltas and out.shape == x.shape:
                    state.delta = out - x, self.plan.schedule.grids[s]
            self.trace.kv_length[s, layer] = 0 if k is None else k.shape[2]
            return out, k, v

        return forward

    def _begin(self, layer: int) -> tuple[int, _Layer]:
        """The scale in progress and the layer's state, made afresh by the first block of a generation."""
        session = current_session()
        if session is None:
            raise OptionError(
                "a block was called outside a generation", where="reference.pruned", expected="model(labels, ...)"
            )
        if "reference" not in session.store:
            layers = session.store["reference"] = [_Layer() for _ in range(self.root.num_layers)]
            session.store[ENTROPY_SOURCE] = lambda: [known.entropy for known in layers]
            session.store[FEATURES_SINK] = lambda decision, features: self.trace.features.append(features)
            session.on_close.append(lambda: setattr(self.trace, "plan", session.plan))
            session.plan = self.root
            self.trace.clear()
        if session.plan is not self.plan:
            assert session.plan is not None
            self._follow(session.plan)
        return session.scale, session.store["reference"][layer]

    def _resized_entropy(self, s: int, state: _Layer) -> Tensor:
        assert state.entropy is not None, "Plan.validate_first demands a dense scale before the first prune"
        return resize_tokens(*state.entropy, self.plan.schedule.grids[s])

    def _restored(self, state: _Layer, x: Tensor, s: int) -> Tensor:
        """What the tokens become that the layer does not compute."""
        if self.plan.restore == "identity":
            return x
        assert state.delta is not None, "Plan.validate_first demands a dense scale before the first prune or skip"
        return x + resize_tokens(*state.delta, self.plan.schedule.grids[s])

    @contextmanager
    def _measured(self, s: int, layer: int) -> Iterator[_RecordAttention | None]:
        """Record the attention inside the `with` block, if anybody reads its entropy."""
        if not self.measure_all and (s, layer) not in self.reads:
            yield None
            return
        with _RecordAttention() as mode:
            yield mode

    def _store_entropy(
        self, s: int, layer: int, state: _Layer, mode: _RecordAttention | None, keys: Tensor, idx: Tensor | None
    ) -> None:
        """Store the entropy of the layer's attention on `keys`, its cache; attention on text does not count."""
        if mode is None:
            return
        found = [call for call in mode.calls if call[1] is keys]
        if len(found) != 1:
            raise UnsupportedGraphError(
                f"layer {layer} made {len(found) or 'no'} attention call on the keys it returns",
                where="reference.pruned",
                expected="one torch.nn.functional.scaled_dot_product_attention in every block",
            )
        entropy = attention_entropy(*found[0])
        if idx is not None:
            entropy = self._resized_entropy(s, state).scatter(1, idx, entropy)
        state.entropy = entropy, self.plan.schedule.grids[s]
        self.trace.entropy[s, layer] = entropy


def _of_tokens(rows: tuple[Tensor, ...], idx: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """The argument `rows`, if a block takes one, for the tokens idx (B, K): each of its tensors (B or 1, 1, K, D)."""
    at = idx[:, None, :, None]
    kept = tuple(t.expand(len(idx), -1, -1, -1).gather(2, at.expand(-1, -1, -1, t.shape[3])) for t in rows)
    return (kept,) if rows else ()


class _RecordAttention(TorchFunctionMode):
    """Keeps the operands (q, k, bias, scale) of the attention calls made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, float | None]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            if len(args) > 3 or kwargs.get("is_causal") or kwargs.get("enable_gqa"):
                raise UnsupportedGraphError(
                    "the attention call has options that entropy is not measured with",
                    where="reference.pruned",
                    expected="scaled_dot_product_attention(q, k, v, attn_mask=..., scale=...)",
                )
            q, k, _ = args
            self.calls.append((q, k, kwargs.get("attn_mask"), kwargs.get("scale")))
        return func(*args, **kwargs)


def attention_entropy(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Entropy in nats of each query's attention, averaged over heads: q (B, H, n, D), k (B, H, m, D) -> float32 (B, n).

    `bias`, boolean (True attends) or added to the scores, broadcasts to (B, H, n, m); `scale` defaults to D ** -0.5.
    A query that attends to nothing has entropy 0.
    """
    b, h, n, d = q.shape
    scale = d**-0.5 if scale is None else scale
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -torch.inf)
    bias = None if bias is None else bias.float().expand(b, h, n, k.shape[2])
    keys = k.float().transpose(-2, -1)
    total = q.new_zeros((b, n), dtype=torch.float32)
    if k.shape[2] == 0:
        return total
    # One matrix at a time stays in a CPU's cache; a GPU wants many at once.
    count = max(1, _BLOCK // (h * min(n, _QUERY_CHUNK) * k.shape[2])) if q.is_cuda else 1
    heads = h if q.is_cuda else 1
    for row, head in itertools.product(range(0, b, count), range(0, h, heads)):
        at = slice(row, row + count), slice(head, head + heads)
        for start in range(0, n, _QUERY_CHUNK):
            rows = slice(start, start + _QUERY_CHUNK)
            scores = (q[*at, rows].float() @ keys[at]) * scale
            if bias is not None:
                scores = (scores + bias[*at, rows]).clamp_min(_LOWEST)
            # With t = score - max and Z = sum exp(t): H = ln Z - sum(t exp(t)) / Z. Masked scores are the lowest
            # float and not -inf, whose product with exp(-inf) would be NaN.
            top = scores.amax(-1, keepdim=True)
            t = scores.sub_(top)
            p = t.exp()
            z = p.sum(-1)
            entropy = (z.log() - p.mul_(t).sum(-1) / z).where(top[..., 0] > _LOWEST, 0.0)
            total[at[0], rows] += entropy.sum(1)
    return total / h
