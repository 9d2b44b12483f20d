"""Packing of prompts and their encoding."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.models.infinity_text import encode_prompts, pack_text

UNCONDITIONAL = torch.arange(12.0).view(6, 2)
TEXT = [torch.ones(3, 2), torch.full((5, 2), 2.0)]


def pack(text: Any = TEXT, lengths: Any = None, negative: Any = None, guided: bool = True) -> Any:
    return pack_text(text, lengths, negative, None, UNCONDITIONAL, guided=guided, multiple=4)


def test_rows_are_padded_and_the_unconditional_ones_are_as_long() -> None:
    batch = pack()
    assert batch.features.shape == (4, 8, 2)
    assert batch.mask.sum(1).tolist() == [3, 5, 3, 5]
    assert torch.equal(batch.features[2, :3], UNCONDITIONAL[:3])
    assert torch.equal(batch.features[3, :5], UNCONDITIONAL[:5])
    assert not batch.features[~batch.mask].any()
    assert torch.equal(batch.features[:2], pack(guided=False).features)


def test_padded_text_and_its_lengths() -> None:
    padded = torch.zeros(2, 6, 2)
    padded[0, :3], padded[1, :5] = TEXT[0], TEXT[1]
    batch, want = pack(padded, [3, 5]), pack()
    assert torch.equal(batch.features, want.features) and torch.equal(batch.mask, want.mask)


@pytest.mark.parametrize("count", [1, 2])
def test_negative_prompts(count: int) -> None:
    batch = pack(negative=[torch.full((6, 2), 7.0)] * count)
    assert batch.mask.sum(1).tolist() == [3, 5, 6, 6]
    assert (batch.features[2:, :6] == 7).all()
    assert pack(negative=[torch.ones(1, 2)], guided=False).features.shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, "empty"),
        ({"text": [torch.ones(3, 4)]}, r"\(3, 4\)"),
        ({"text": [torch.ones(0, 2)]}, r"\(0, 2\)"),
        ({"text": [torch.ones(7, 2)]}, r"\(7, 2\).*1\.\.6"),
        ({"lengths": [3]}, "lengths"),
        ({"lengths": [3, 6]}, "lengths"),
        ({"negative": [torch.ones(1, 2)] * 3}, "negative has 3"),
    ],
)
def test_text_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pack(**arguments)


class Encoder(nn.Module):
    """Token number as its feature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": (input_ids * attention_mask).unsqueeze(-1).to(torch.bfloat16)}


def tokenizer(text: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
    longest = max(map(len, text))
    ids = torch.tensor([[*map(ord, t), *[0] * (longest - len(t))] for t in text])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_prompts_are_encoded_without_their_padding() -> None:
    rows = encode_prompts(["ab", "c"], Encoder(), tokenizer)
    assert [r.tolist() for r in rows] == [[[97.0], [98.0]], [[99.0]]]
    assert rows[0].dtype == torch.float32
    with pytest.raises(OptionError, match="tokenizer"):
        encode_prompts(["a"], Encoder())


def test_encoder_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def load(name: str, **options: Any) -> Any:
        made.append((name, options))
        return Encoder()

    stand_in = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer),
        T5EncoderModel=SimpleNamespace(from_pretrained=load),
    )
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    assert len(encode_prompts(["abc"], dtype=torch.float32)[0]) == 3
    assert made == [("google/flan-t5-xl", {"torch_dtype": torch.float32})]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        encode_prompts(["a"])
