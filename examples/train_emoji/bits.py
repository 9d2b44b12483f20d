"""What training the bitwise tokenizer and its transformer share: the models' shapes, residual bits, pools, exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toprovar_compile.models.bsq import BSQVAE, BSQVAEConfig
from toprovar_compile.models.emoji_infinity import EmojiInfinity
from toprovar_compile.models.infinity import InfinityConfig, InfinitySampling
from toprovar_compile.models.word_text import WordTextConfig

import common

PATCH_NUMS = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
TINY_PATCH_NUMS = (1, 2, 4, 8)
SAMPLING = InfinitySampling(cfg=3.0, tau=0.7, top_k=0, top_p=0.0, cfg_layers=0)
_SHARD = 15 * 2**20  # bytes of one exported file


def tokenizer_config(tiny: bool = False) -> BSQVAEConfig:
    """The shape of emoji-infinity's tokenizer; `tiny` is for CPU tests with 32x32 images."""
    if tiny:
        return BSQVAEConfig(8, 16, (1, 2), 1, shuffle=2, groups=4)
    return BSQVAEConfig(16, 64, (1, 2, 2), 1, shuffle=2, groups=4)


def make_model(words: Sequence[str], vae: BSQVAEConfig, tiny: bool = False) -> EmojiInfinity:
    """emoji-infinity with a vocabulary, its weights not initialised."""
    if tiny:
        text = WordTextConfig(tuple(words), 128, 1, 2, 16)
        cfg = InfinityConfig(2, 64, 2, 4.0, 128, 16, text_pad=8, vae=vae)
        model = EmojiInfinity(cfg, text, TINY_PATCH_NUMS)
    else:
        text = WordTextConfig(tuple(words))
        cfg = InfinityConfig(16, 256, 4, 3.0, text.width, text.max_words, vae=vae)
        model = EmojiInfinity(cfg, text, PATCH_NUMS)
    model.sampling = SAMPLING
    return model


def grids_of(patch_nums: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Square grids."""
    return tuple((n, n) for n in patch_nums)


@torch.no_grad()
def residual_bits(
    vae: BSQVAE, features: Tensor, grids: Sequence[tuple[int, int]], flipped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bits of the scales (B, L, d), bool, and what the transformer is given before them (B, L - first, d), float32.

    `grids` are all of the tokenizer's or its first ones. `flipped` (B, 1, 1, 1) is the share of bits of each image that
    are turned round in what later scales see; the bits returned are those of the residual as it is then, so that a
    model learns to repair what it got wrong.
    """
    rest = features.float()
    side = (rest.shape[2], rest.shape[3])
    total = torch.zeros_like(rest)
    bits, inputs = [], []
    for s, grid in enumerate(grids):
        z = rest if grid == side else F.interpolate(rest, size=grid, mode="area")
        ones = z > 0
        bits.append(ones.flatten(2).transpose(1, 2))
        if s + 1 == len(grids):
            break
        if flipped is not None:
            ones = ones ^ (torch.rand(z.shape, device=z.device) < flipped)
        codes = vae.bits_to_codes(ones.permute(0, 2, 3, 1))
        step = codes if grid == side else F.interpolate(codes, size=side, mode="bilinear")
        total, rest = total + step, rest - step
        nxt = F.interpolate(total, size=grids[s + 1], mode="bilinear") if grids[s + 1] != side else total
        inputs.append(nxt.flatten(2).transpose(1, 2))
    return torch.cat(bits, 1), torch.cat(inputs, 1)


class Pool:
    """The newest `size` training examples, on the device: making one costs more than using it several times.

    `make(n)` gives tensors of n rows each. Batches are drawn with replacement.
    """

    def __init__(self, size: int, chunk: int, make: Callable[[int], tuple[Tensor, ...]]) -> None:
        self._make, self._next = make, 0
        first = make(min(chunk, size))
        self._kept = tuple(t.new_empty((size, *t.shape[1:])) for t in first)
        self._size = size
        self._put(first)
        while self._next:
            self._put(make(min(chunk, size - self._next)))

    def _put(self, rows: tuple[Tensor, ...]) -> None:
        n = len(rows[0])
        for kept, new in zip(self._kept, rows, strict=True):
            kept[self._next : self._next + n] = new
        self._next = (self._next + n) % self._size

    def refresh(self, n: int) -> None:
        """Replace the n oldest examples, or those up to the end of the pool."""
        self._put(self._make(min(n, self._size - self._next)))

    def draw(self, n: int) -> tuple[Tensor, ...]:
        """n random examples."""
        picked = torch.randint(self._size, (n,), device=self._kept[0].device)
        return tuple(t[picked] for t in self._kept)


def export(state: dict[str, Tensor], run: Path, stem: str) -> list[Path]:
    """Write weights in float16 as run/stem-1.safetensors, ..., each at most 15 MiB."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if size + half.nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    run.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, shard in enumerate(shards, 1):
        paths.append(run / f"{stem}-{i}.safetensors")
        save_file(shard, paths[-1].with_suffix(".tmp"))
        paths[-1].with_suffix(".tmp").replace(paths[-1])
    return paths


def exported(folder: Path, stem: str) -> dict[str, Tensor]:
    """What `export` wrote, float32."""
    files = sorted(folder.glob(f"{stem}-*.safetensors"))
    if not files:
        raise SystemExit(f"there is no {stem}-*.safetensors in {folder}")
    return {k: v.float() for f in files for k, v in load_file(f).items()}


def load_tokenizer(folder: Path, cfg: BSQVAEConfig, device: torch.device) -> BSQVAE:
    """The trained tokenizer of a run, frozen."""
    vae = BSQVAE(cfg)
    vae.load_state_dict(exported(folder, "bsq"))
    return vae.to(device).eval().requires_grad_(False)


def start_from(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module the weights of an export or of a packed model; names have to be equal."""
    module.load_state_dict({k: state[k].float() for k in module.state_dict()})


def composer(folder: Path, device: torch.device, singles: float) -> Any:
    """The composer of the training pictures. On several processes the first one makes the cache of the renders."""
    import scenes

    workers = common.Workers()
    if workers.first:
        scenes.load_assets(folder)
    workers.wait()
    return scenes.Composer(scenes.load_assets(folder), device, singles=singles)
