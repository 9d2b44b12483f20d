"""A model that this package has never seen: its list of blocks as one compiled step, and a loop of one's own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toprovar_compile as tv
from toprovar_compile.session import generation

SIDES = [1, 2, 4, 6]


class Attention(nn.Module):
    """Keeps its keys and values in attributes, as VAR and its descendants do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.k, self.v = nn.Linear(32, 96), None, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Theirs(nn.Module):
    """Somebody's model, which stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def draw(self, noise: Tensor) -> Tensor:
        for b in self.layers:
            b.attn.k = b.attn.v = None
        for side in SIDES:
            x = noise[:, : side * side]
            for b in self.layers:
                x = b(x)
        return x


class Mine(nn.Module):
    """The same blocks in a loop of one's own: a session around it, a step with explicit inputs, a fingerprint."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self.schedule = tv.ScaleSchedule.from_patch_nums(SIDES)

    def step(self, x: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        new_keys, new_values = [], []
        for i, block in enumerate(self.layers):
            block.attn.k, block.attn.v = (keys[i], values[i]) if keys else (None, None)
            x = block(x)
            new_keys.append(block.attn.k)
            new_values.append(block.attn.v)
            block.attn.k = block.attn.v = None
        return x.clone(), new_keys, new_values  # something has to follow the last block

    @torch.compiler.disable(recursive=False)  # the loop runs in Python, what it calls is compiled
    def forward(self, noise: Tensor) -> Tensor:
        keys, values = [], []
        with torch.no_grad(), generation(self.schedule, lambda: "mine-1") as session:
            for s in session.scales():
                x, keys, values = self.step(noise[:, : self.schedule.tokens[s]], keys, values)
            return x


torch.manual_seed(0)
model, noise = Theirs().eval(), torch.randn(2, 36, 32)
with torch.no_grad():
    want = model.draw(noise)

options = {"entry": "draw", "blocks": "layers", "caches": ("attn.k", "attn.v"), "inner": "eager"}
with tv.accelerate_blocks(model, SIDES, "dense", **options):
    torch.testing.assert_close(model.draw(noise), want)

plan = tv.Plan.keep_share(tv.ScaleSchedule.from_patch_nums(SIDES), 3, 0.5, from_scale=3, bucket=1)
with tv.accelerate_blocks(model, SIDES, plan, **options):
    report = tv.explain(model.draw, noise)
print(report)  # "tokens proven independent", and reasons where something was left alone
assert any("prune" in line for graph in report.graphs for line in graph.variants())

for block in model.layers:
    block.attn.k = block.attn.v = None
mine = torch.compile(Mine(model.layers).eval(), backend="toprovar", options={"plan": plan, "inner": "eager"})
torch.testing.assert_close(mine(noise), report.result)
