"""emoji-infinity's class, text encoder and weights file, on a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toprovar_compile import dispatch
from toprovar_compile.calibrate import calibrate
from toprovar_compile.errors import CheckpointError, OptionError, ToproVarWarning
from toprovar_compile.files import write_json
from toprovar_compile.models import load_folder, loading
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.emoji_infinity import EmojiInfinity, init_weights
from toprovar_compile.models.infinity import InfinityConfig
from toprovar_compile.models.packed import pack, unpack
from toprovar_compile.models.word_text import UNKNOWN, WordTextConfig, WordTokenizer, vocabulary_of
from toprovar_compile.plan import Plan
from toprovar_compile.plan_spec import parse_plan
from toprovar_compile.reference import pruned

WORDS = ("a", "above", "apple", "blue", "key", "red", "two")
PROMPTS = ["two red apples above a blue key", "a key"]
PATCH_NUMS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> EmojiInfinity:
    """Tests must not change it."""
    torch.manual_seed(0)
    vae = BSQVAEConfig(4, 8, (1, 2), 1, shuffle=2, groups=4)
    cfg = InfinityConfig(2, 64, 2, text_channels=128, text_maxlen=12, text_pad=8, vae=vae)
    model = EmojiInfinity(cfg, WordTextConfig(WORDS, depth=1, max_words=12), PATCH_NUMS)
    init_weights(model)
    with torch.no_grad():
        for p in (model.head.weight, *(b.ada_gss for b in model.blocks)):
            p.normal_(std=0.3)  # type: ignore[operator]
    return model.eval().requires_grad_(False)


def test_prompts_become_images(model: EmojiInfinity) -> None:
    images = model(PROMPTS, seed=0)
    assert images.shape == (2, 3, 16, 16) and 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.equal(images, model(model.encode(PROMPTS), seed=0))
    assert torch.equal(model(PROMPTS[0], seed=1), model(PROMPTS[:1], seed=1))
    assert not torch.equal(model(PROMPTS[0], seed=1), model(PROMPTS[0], seed=1, negative="a key"))
    assert not torch.equal(model("a red apple", seed=1), model("a blue key", seed=1))


def test_a_padded_prompt_is_that_prompt(model: EmojiInfinity) -> None:
    long, short = model.encode(PROMPTS)
    assert (len(long), len(short)) == (7, 2)
    torch.testing.assert_close(short, model.encode(PROMPTS[1:])[0])


@pytest.mark.parametrize(
    "text", ["keep=0.5,from=2,exit=3,bucket=1", pytest.param("dense", marks=pytest.mark.slow)], ids=["pruned", "dense"]
)
def test_compiled_plans_are_the_reference(model: EmojiInfinity, text: str) -> None:
    torch.compiler.reset()
    dispatch.reset()
    plan = parse_plan(text, model.schedule, len(model.blocks))
    fast = torch.compile(model, backend="toprovar", options={"plan": plan, "inner": "eager"})
    for prompts in (PROMPTS, ["a blue key", "two apples"]):
        with pruned(model, plan):
            expected = model(prompts, seed=3)
        torch.testing.assert_close(fast(prompts, seed=3), expected, atol=2e-5, rtol=1e-4)
    torch.compiler.reset()


def test_scales_are_reported(model: EmojiInfinity) -> None:
    seen: list[tuple[int, int]] = []
    model.on_scale = lambda done, total: seen.append((done, total))
    try:
        model("a key", seed=0)
    finally:
        del model.on_scale
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_calibration_draws_prompts(model: EmojiInfinity, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no example prompts"):
        calibrate(model, prompts=1)
    monkeypatch.setattr(model, "example_prompts", PROMPTS)
    plan = calibrate(model, prompts=3, batch=2)
    plan.check_model(model.fingerprint(), model.schedule, 2)


def test_words_are_numbered() -> None:
    assert vocabulary_of(["keys", "key", "glass", "bus", "a"]) == ("a", "bus", "glass", "key")
    tokenizer = WordTokenizer(WordTextConfig(WORDS, max_words=5))
    assert tokenizer.ids("Two RED apples, above") == [7, 6, 3, UNKNOWN, 2]
    with pytest.warns(ToproVarWarning, match="'zebra'"):
        assert tokenizer.ids("a zebra") == [1, UNKNOWN]
    assert tokenizer.ids("a zebra") == [1, UNKNOWN]  # told once
    assert tokenizer.ids("") == [UNKNOWN]
    batch = tokenizer(["a key", "a red key"])
    assert batch["input_ids"].tolist() == [[1, 5, 0], [1, 6, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(OptionError, match="a list of at least one text"):
        tokenizer("a key")


def test_text_encoder_has_to_fit() -> None:
    with pytest.raises(OptionError, match="12 of width 128"):
        EmojiInfinity(InfinityConfig(text_channels=128, text_maxlen=12), WordTextConfig(width=64), PATCH_NUMS)


@pytest.mark.parametrize("encoder", [True, False])
def test_packed_weights_load(model: EmojiInfinity, tmp_path: Path, encoder: bool) -> None:
    state = {k: v for k, v in model.state_dict().items() if encoder or not k.startswith("vae.encoder.")}
    save_file(pack(state), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", model.to_json() | {"encoder": encoder})
    write_json(tmp_path / "prompts.json", PROMPTS)
    plan = Plan.keep_share(model.schedule, 2, 0.5, 2, bucket=1)
    plan.save(tmp_path / "plan.json")
    loaded = load_folder(tmp_path)
    assert isinstance(loaded, EmojiInfinity) and loaded.plan == plan and loaded.sampling == model.sampling
    for name, value in loaded.state_dict().items():
        wanted = state[name]
        atol = float(wanted.abs().max()) / 200
        torch.testing.assert_close(value, wanted, atol=atol, rtol=1e-3)
    assert sorted(loaded.sample_prompts(2, 5)) == sorted(PROMPTS) and len(loaded.sample_prompts(3, 5)) == 3
    assert loaded(PROMPTS, seed=0).shape == (2, 3, 16, 16)
    image = torch.zeros(1, 3, 16, 16)
    if encoder:
        assert len(loaded.vae.encode(image, model.schedule.grids)) == 4
    else:
        with pytest.raises(OptionError, match="without its encoder"):
            loaded.vae.encode(image, model.schedule.grids)


def test_a_lost_factor_is_named() -> None:
    packed = pack({"a.weight": torch.randn(32, 32), "a.bias": torch.ones(32)})
    assert packed["a.weight"].dtype == torch.int8 and packed["a.bias"].dtype == torch.float16
    del packed["a.weight:scale"]
    with pytest.raises(CheckpointError, match=r"a\.weight has no scale"):
        unpack(packed, "here")


def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path)
    with pytest.raises(OptionError, match="the weights of emoji-infinity are not installed"):
        loading.load("emoji-infinity")
