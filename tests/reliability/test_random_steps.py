"""Random steps through Dynamo and the whole backend: a pruned scale is right, or runs dense and says which node.

Blocks are drawn from forms of attention, norms, positions, masks of the text and MLPs; some get a trap that mixes
tokens. TOPROVAR_STEPS=200 runs as many; the suite runs a few.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile import dispatch
from toprovar_compile.plan import DENSE, LayerAction, Plan, ScalePlan
from toprovar_compile.policies.selection import kept_tokens
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import generation

STEPS = int(os.environ.get("TOPROVAR_STEPS", "4"))
B, C, H, D, TEXT, KEEP = 2, 24, 3, 8, 5, 6
SCHEDULE = ScaleSchedule.from_patch_nums((1, 2, 3, 4))
LAST = len(SCHEDULE) - 1
# Sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

TRAPS = {
    "token mean": "aten.mean", "cumulative sum": "aten.cumsum", "convolution": "aten.convolution",
    "sort": "aten.sort", "shift": "aten.roll", "softmax": "aten._softmax",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What a block is made of; `trap` "" for none."""

    attention: str
    norm: str
    rope: bool
    normed: bool
    text: str
    mlp: str
    trap: str

    @classmethod
    def draw(cls, seed: int) -> Form:
        """The form of a seed; one in three has a trap."""
        rng = random.Random(seed)
        return cls(
            rng.choice(("sdpa", "sdpa, scale", "matmul", "einsum", "scaled queries")),
            rng.choice(("layer", "rms", "by hand")),
            rng.random() < 0.5,
            rng.random() < 0.5,
            rng.choice(("", "plain", "masked")),
            rng.choice(("gelu", "swiglu", "relu squared")),
            rng.choice(tuple(TRAPS)) if seed % 3 == 2 else "",
        )


def attend(form: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention (B, H, n, D) in one of its forms, all with the scale of D."""
    if form == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if form == "sdpa, scale":
        return F.scaled_dot_product_attention(q * 2, k, v, attn_mask=bias, scale=0.5 * D**-0.5)
    if form == "einsum":
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * D**-0.5
    elif form == "scaled queries":
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
    else:
        scores = torch.matmul(q, k.transpose(2, 3)) / D**0.5
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1) @ v


class Block(nn.Module):
    """`absent`, of eager calls alone, is a bias against keys of this scale."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.norm = nn.RMSNorm(C) if form.norm == "rms" else nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.gate, self.down = nn.Linear(C, 2 * C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.conv = nn.Conv1d(C, C, 3, padding=1, groups=C)

    def _norm(self, x: Tensor) -> Tensor:
        if self.form.norm == "by hand":
            return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        normed: Tensor = self.norm(x)
        return normed

    def _trap(self, h: Tensor) -> Tensor:
        kind = self.form.trap
        if kind == "token mean":
            return h - h.mean(1, keepdim=True)
        if kind == "cumulative sum":
            return h + h.cumsum(1)
        if kind == "convolution":
            return h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        if kind == "sort":
            return h + h.sort(1).values
        if kind == "shift":
            return h + h.roll(1, 1)
        return h + h.softmax(1)

    def forward(
        self, x: Tensor, rope: Tensor, text: Tensor, mask: Tensor, k: Tensor | None, v: Tensor | None,
        absent: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        b, n, _ = x.shape
        h = self._norm(x)
        if self.form.trap:
            h = self._trap(h)
        q, new_k, new_v = self.qkv(h).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form.normed:
            q, new_k = F.normalize(q, dim=-1) * 3, F.normalize(new_k, dim=-1)
        if self.form.rope:
            q, new_k = q * rope.unsqueeze(1), new_k * rope.unsqueeze(1)
        if k is not None and v is not None:
            new_k, new_v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
        out = attend(self.form.attention, q, new_k, new_v, absent)
        x = x + self.proj(out.transpose(1, 2).reshape(b, n, C))
        if self.form.text:
            heads = x.view(b, n, H, D).transpose(1, 2)
            out = attend(self.form.attention, heads, text, text, mask if self.form.text == "masked" else None)
            x = x + out.transpose(1, 2).reshape(b, n, C)
        h = self.up(self._norm(x))
        if self.form.mlp == "swiglu":
            h = F.silu(h) * self.gate(x)
        else:
            h = F.gelu(h, approximate="tanh") if self.form.mlp == "gelu" else h.relu().square()
        return x + self.down(h), new_k, new_v


class Model(nn.Module):
    """Four scales, two blocks, of which the first is pruned at the last scale and the second too."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(2))
        self.head = nn.Linear(C, C)
        dense = ScalePlan(layers=(DENSE, DENSE))
        prune = ScalePlan(layers=(LayerAction("prune", KEEP), LayerAction("prune", KEEP + 3)))
        self.plan = Plan(SCHEDULE, 2, (dense,) * LAST + (prune,), restore="identity", score="random")
        self.register_buffer("rope", torch.randn(1, SCHEDULE.total, D))
        self.register_buffer("text", torch.randn(B, H, TEXT, D))
        self.register_buffer("mask", torch.randn(B, 1, 1, TEXT))

    def step(
        self, x: Tensor, rope: Tensor, text: Tensor, mask: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Any:
        new_keys, new_values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, rope, text, mask, keys[i] if keys else None, values[i] if values else None)
            new_keys.append(k)
            new_values.append(v)
        return self.head(x), new_keys, new_values

    @torch.compiler.disable
    def of_scale(self, x: Tensor, s: int) -> tuple[Tensor, ...]:
        """Tokens and rope of a scale, the text and its mask."""
        at = slice(SCHEDULE.prior[s], SCHEDULE.prior[s] + SCHEDULE.tokens[s])
        return x[:, at].contiguous(), self.rope[:, at].contiguous(), self.text, self.mask

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad(), generation(SCHEDULE, lambda: "random", self.plan) as session:
            keys: list[Tensor] = []
            values: list[Tensor] = []
            outputs = []
            for s in session.scales():
                y, keys, values = self.step(*self.of_scale(x, s), keys, values)
                outputs.append(y)
            return outputs


@torch.no_grad()
def pruned_in_plain_pytorch(model: Model, x: Tensor) -> Tensor:
    """The last scale: each block on all tokens, attention masked to the kept ones, whose results alone are taken."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for s in range(LAST):
        _, keys, values = model.step(*model.of_scale(x, s), keys, values)
    tokens, *rest = model.of_scale(x, LAST)
    for i, block in enumerate(model.blocks):
        keep = model.plan.scales[LAST].layers[i].keep
        assert keep is not None
        idx = kept_tokens(model.plan, LAST, i, keep, tokens, None)
        absent = torch.full(tokens.shape[:2], -torch.inf).scatter_(1, idx, 0.0)[:, None, None]
        absent = F.pad(absent, (keys[i].shape[2], 0))
        rows = idx.unsqueeze(-1).expand(-1, -1, C)
        out = block(tokens, *rest, keys[i], values[i], absent)[0]
        tokens = tokens.scatter(1, rows, out.gather(1, rows))
    result: Tensor = model.head(tokens)
    return result


@pytest.mark.parametrize("seed", range(STEPS))
def test_a_random_step(seed: int) -> None:
    torch.compiler.reset()
    dispatch.reset()
    torch.manual_seed(seed)
    form = Form.draw(seed)
    model = Model(form).eval().requires_grad_(False)
    x = torch.randn(B, SCHEDULE.total, C)
    dense = model(x)
    got = compile_steps(model, {"inner": "eager"})(x)
    torch.testing.assert_close(got[:LAST], dense[:LAST], **TOLERANCE)
    events = [e for e in counters.snapshot() if e.startswith(("fallback", "plain_graph", "guard_miss"))]
    if form.trap:
        torch.testing.assert_close(got[LAST], dense[LAST], **TOLERANCE)
        assert len(events) == 2, events
        assert all("runs dense instead of prune" in e and TRAPS[form.trap] in e for e in events), events
    else:
        assert events == [], events
        torch.testing.assert_close(got[LAST], pruned_in_plain_pytorch(model, x), **TOLERANCE)
        assert not torch.allclose(got[LAST], dense[LAST], atol=1e-3)
    torch.compiler.reset()
