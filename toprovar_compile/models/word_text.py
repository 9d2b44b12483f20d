"""A small text encoder over whole words, learned together with the model that it serves.

It stands where Infinity has T5: `encode_prompts(prompts, encoder, tokenizer)` of `infinity_text` takes the two classes
of this module as it takes those of the package transformers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import OptionError, ToproVarWarning
from toprovar_compile.models.var import FeedForward

UNKNOWN = 0  # id of every word that the vocabulary lacks
_WORD = re.compile(r"[a-z0-9']+|,")


@dataclass(frozen=True)
class WordTextConfig:
    """Shape of a word encoder. `words` are the vocabulary in the order of their ids, which start at 1."""

    words: tuple[str, ...] = ()
    width: int = 128
    depth: int = 3
    num_heads: int = 2
    max_words: int = 32

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> WordTextConfig:
        """From what `dataclasses.asdict` gave."""
        return cls(**{**raw, "words": tuple(raw["words"])})


def vocabulary_of(words: Sequence[str]) -> tuple[str, ...]:
    """The sorted words without those that are another one with an s: `WordTokenizer` reads both as one."""
    every = set(words)
    return tuple(sorted(w for w in every if not (len(w) > 3 and w.endswith("s") and w[:-1] in every)))


class WordTokenizer:
    """Splits prompts into lower-case words, numbers and commas, and numbers them.

    A word that ends in s and is not in the vocabulary is read without it. What is then still unknown is id 0; the first
    time that a word is, a ToproVarWarning names it.
    """

    def __init__(self, cfg: WordTextConfig) -> None:
        self.cfg = cfg
        self._ids = {word: i for i, word in enumerate(cfg.words, 1)}
        self._told: set[str] = set()

    def ids(self, prompt: str, *, quiet: bool = False) -> list[int]:
        """The words of a prompt, at most `max_words`; one unknown word if it has none."""
        found, unknown = [], []
        for word in _WORD.findall(prompt.lower())[: self.cfg.max_words]:
            known = self._ids.get(word) or self._ids.get(word.removesuffix("s"), UNKNOWN)
            found.append(known)
            if known == UNKNOWN and word != "," and word not in self._told:
                unknown.append(word)
        if unknown and not quiet:
            self._told.update(unknown)
            warnings.warn(
                f"the model does not know {', '.join(map(repr, unknown))}; it takes any such word for the same unknown",
                ToproVarWarning,
                stacklevel=2,
            )
        return found or [UNKNOWN]

    def __call__(
        self,
        text: Sequence[str],
        max_length: int | None = None,
        padding: str = "longest",
        truncation: bool = True,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 (prompts, longest), as tokenizers of transformers give them."""
        if isinstance(text, str) or not text:
            raise OptionError(f"prompts are {text!r}", where="WordTokenizer", expected="a list of at least one text")
        rows = [self.ids(prompt)[:max_length] for prompt in text]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [UNKNOWN] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


class _Layer(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, cfg: WordTextConfig) -> None:
        super().__init__()
        c = cfg.width
        self.num_heads = cfg.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.ffn = FeedForward(c, 4 * c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(out.transpose(1, 2).reshape(b, n, c))
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]


class WordEncoder(nn.Module):
    """Bidirectional transformer over the ids of a `WordTokenizer`."""

    def __init__(self, cfg: WordTextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(len(cfg.words) + 1, cfg.width)
        self.position = nn.Parameter(torch.zeros(cfg.max_words, cfg.width))
        self.layers = nn.ModuleList(_Layer(cfg) for _ in range(cfg.depth))

    def init_weights(self) -> None:
        """Initialise for training from scratch."""
        std = (1 / self.cfg.width / 3) ** 0.5
        for name, p in self.named_parameters():
            if name == "position" or name.startswith("embed."):
                nn.init.normal_(p, std=0.5)
            elif "norm" not in name:
                nn.init.trunc_normal_(p, std=std) if p.ndim == 2 else nn.init.zeros_(p)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`last_hidden_state` (B, T, width) of ids (B, T); words where the mask is 0 are seen by none."""
        mask = attention_mask.bool()[:, None, None]
        x = self.embed(input_ids) + self.position[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return {"last_hidden_state": x}
