"""Text for Infinity: T5 features of prompts, and their packing into one padded batch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from toprovar_compile.errors import MissingDependencyError, OptionError

_MAX_TOKENS = 512


@dataclass(frozen=True)
class TextBatch:
    """Padded text: features float32 (R, T, C) and mask bool (R, T), true at tokens; zeros where it is false."""

    features: Tensor
    mask: Tensor


def pack_text(
    text: Sequence[Tensor] | Tensor,
    lengths: Sequence[int] | None,
    negative: Sequence[Tensor] | Tensor | None,
    negative_lengths: Sequence[int] | None,
    unconditional: Tensor,
    *,
    guided: bool,
    multiple: int,
) -> TextBatch:
    """The prompts' rows and, if `guided`, as many unconditional ones after them, T a multiple of `multiple`.

    Unconditional rows are `negative`, one for all or one a prompt, or else the first rows of `unconditional`
    (max tokens, C), as many as the prompt has. For the forms of text see `Infinity.forward`. Raises OptionError for
    text of another width, without tokens or with more than `unconditional` has.
    """
    rows = _rows("text", text, lengths, unconditional)
    if negative is not None and guided:
        against = _rows("negative", negative, negative_lengths, unconditional)
        if len(against) not in (1, len(rows)):
            raise OptionError(
                f"negative has {len(against)} prompts", where="Infinity.forward", expected=f"1 or {len(rows)}"
            )
        rows += against * (len(rows) // len(against))
    elif guided:
        rows += [unconditional[: len(row)].float() for row in rows]
    counts = tuple(len(row) for row in rows)
    total = -(-max(counts) // multiple) * multiple
    padded = pad_sequence(rows, batch_first=True)
    features = padded.new_zeros(len(rows), total, padded.shape[2])
    features[:, : padded.shape[1]] = padded
    return TextBatch(features, _mask(counts, total, features.device))


@lru_cache(maxsize=64)
def _mask(counts: tuple[int, ...], total: int, device: torch.device) -> Tensor:
    """Kept, because copying it to a device waits for what runs there: the image before."""
    with torch.inference_mode(False), torch.no_grad():
        return (torch.arange(total) < torch.tensor(counts)[:, None]).to(device)


def _rows(name: str, text: Sequence[Tensor] | Tensor, lengths: Sequence[int] | None, like: Tensor) -> list[Tensor]:
    rows = list(text)
    if lengths is not None:
        if len(lengths) != len(rows) or any(n > len(row) for n, row in zip(lengths, rows, strict=False)):
            raise OptionError(
                f"the lengths {list(lengths)} do not fit {name}",
                where="Infinity.forward",
                expected=f"one for each of {len(rows)} prompts, no longer than it is padded to",
            )
        rows = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    bad = [tuple(r.shape) for r in rows if r.ndim != 2 or r.shape[1] != like.shape[1] or not 0 < len(r) <= len(like)]
    if bad or not rows:
        raise OptionError(
            f"{name} has features of shape {bad[0]}" if bad else f"{name} is empty",
            where="Infinity.forward",
            expected=f"(1..{len(like)}, {like.shape[1]}) for each prompt",
            todo="encode prompts with encode_prompts" if bad else "pass at least one prompt",
        )
    return [row.to(device=like.device, dtype=torch.float32) for row in rows]


def encode_prompts(
    prompts: Sequence[str],
    encoder: Any = "google/flan-t5-xl",
    tokenizer: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """T5 features of prompts, one float32 (length, C) each, as the official models were trained on (flan-t5-xl).

    `encoder` is a name or folder for transformers, or a loaded T5EncoderModel, then with its `tokenizer`. A prompt is
    cut at 512 tokens. Raises MissingDependencyError without the package transformers.
    """
    if isinstance(encoder, str):
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise MissingDependencyError(
                "prompts are encoded with the package transformers, which is not installed",
                where="encode_prompts",
                todo="pip install transformers sentencepiece, or pass features that were encoded elsewhere",
            ) from error
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, legacy=True)
        encoder = transformers.T5EncoderModel.from_pretrained(encoder, torch_dtype=dtype).to(device).eval()
    elif tokenizer is None:
        raise OptionError("an encoder is given without a tokenizer", where="encode_prompts", expected="both")
    tokens = tokenizer(
        text=list(prompts), max_length=_MAX_TOKENS, padding="longest", truncation=True, return_tensors="pt"
    )
    where = next(encoder.parameters()).device
    mask = tokens["attention_mask"].to(where)
    with torch.no_grad():
        states = encoder(input_ids=tokens["input_ids"].to(where), attention_mask=mask)["last_hidden_state"].float()
    return [row[: int(n)] for row, n in zip(states, mask.sum(-1), strict=True)]
