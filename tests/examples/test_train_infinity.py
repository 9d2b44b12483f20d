"""The training scripts of emoji-infinity run, resume, and pack what the package can load, on tiny pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from toprovar_compile.errors import ToproVarWarning
from toprovar_compile.evaluate.emoji_eval import load_prompts
from toprovar_compile.models import load_folder
from toprovar_compile.models.emoji_infinity import EmojiInfinity, init_weights

SCRIPTS = ("common", "bits", "train_bsq", "train_infinity", "pack_infinity", "choose_sampling")
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}
WORDS = [*COLOURS, "a", "square", "squares"]


def draw(n: int, rng: random.Random) -> tuple[Tensor, list[str]]:
    """32x32 pictures of a square on white, and their prompts."""
    images, prompts = torch.full((n, 3, 32, 32), 255, dtype=torch.uint8), []
    for image in images:
        colour = rng.choice(list(COLOURS))
        x, y = rng.randint(2, 18), rng.randint(2, 18)
        image[:, y : y + 12, x : x + 12] = torch.tensor(COLOURS[colour], dtype=torch.uint8).view(3, 1, 1)
        prompts.append(f"a {colour} square")
    return images, prompts


def make(scripts: SimpleNamespace) -> EmojiInfinity:
    torch.manual_seed(0)
    words = scripts.train_infinity.vocabulary_of(WORDS)
    model: EmojiInfinity = scripts.bits.make_model(words, scripts.bits.tokenizer_config(True), True)
    init_weights(model)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def test_training_sees_what_generation_computes(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, grids = make(scripts), scripts.bits.grids_of(scripts.bits.TINY_PATCH_NUMS)
    images, prompts = draw(2, random.Random(0))
    prompts[1] = f"{prompts[1]} a square"
    features = model.vae.encoder(scripts.common.to_float(images, torch.device("cpu")))
    bits, inputs = scripts.bits.residual_bits(model.vae, features, grids)
    assert torch.equal(bits, torch.cat([b.flatten(1, 2) for b in model.vae.quantize(features, grids)[1]], 1).bool())
    rows = [model.tokenizer.ids(p) for p in prompts]
    ids = torch.tensor([row + [0] * (16 - len(row)) for row in rows])
    counts = torch.tensor([len(row) for row in rows])
    expected = scripts.train_infinity.teacher_forced(model, ids, counts, inputs, 4)
    found: list[Tensor] = []
    original = model._advance

    def advance(s: int, schedule: object, logits: Tensor, *rest: object) -> object:
        found.append(logits.clone())
        return original(s, schedule, logits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "_advance", advance)
    parts = bits.split([h * w for h, w in grids], 1)
    forced = [p.view(2, h, w, -1) for p, (h, w) in zip(parts, grids, strict=True)]
    model(prompts, seed=0, cfg=1.0, tau=1.0, top_k=0, top_p=0.0, forced_bits=forced)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)


def test_turned_bits_are_repaired(scripts: SimpleNamespace) -> None:
    model, grids = make(scripts), scripts.bits.grids_of(scripts.bits.TINY_PATCH_NUMS)
    features = torch.randn(2, 8, 8, 8)
    plain, _ = scripts.bits.residual_bits(model.vae, features, grids)
    none, _ = scripts.bits.residual_bits(model.vae, features, grids, torch.zeros(2, 1, 1, 1))
    assert torch.equal(plain, none)
    every, _ = scripts.bits.residual_bits(model.vae, features, grids, torch.ones(2, 1, 1, 1))
    assert torch.equal(plain[:, :1], every[:, :1]) and not torch.equal(plain, every)


def test_tokenizer_quantises_as_the_package_does(scripts: SimpleNamespace) -> None:
    vae, grids = make(scripts).vae, scripts.bits.grids_of(scripts.bits.TINY_PATCH_NUMS)
    features = torch.randn(2, 8, 8, 8, requires_grad=True)
    used, commit, entropy = scripts.train_bsq.quantize(vae, features, grids, torch.tensor([4, 2]))
    torch.testing.assert_close(used[0], vae.quantize(features, grids)[0][0], atol=1e-5, rtol=1e-5)
    (used.sum() + commit + entropy).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_pool_keeps_the_newest(scripts: SimpleNamespace) -> None:
    numbers = iter(range(100))
    pool = scripts.bits.Pool(6, 4, lambda n: (torch.tensor([next(numbers) for _ in range(n)]),))
    pool.refresh(3)
    pool.refresh(4)  # only to the end of the pool
    pool.refresh(2)
    (drawn,) = pool.draw(200)
    assert set(drawn.tolist()) == {8, 9, 10, 11, 12, 13}


def test_scripts_train_resume_and_pack(scripts: SimpleNamespace, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "weights"
    tokenizer = {"patch_nums": scripts.bits.TINY_PATCH_NUMS, "batch": 4, "pool_size": 16}
    shape = scripts.bits.tokenizer_config(True)
    scripts.train_bsq.train(lambda n, rng: draw(n, rng)[0], shape, run, steps=20, **tokenizer)
    first = torch.load(run / "bsq.pt", weights_only=True)
    scripts.train_bsq.train(lambda n, rng: draw(n, rng)[0], shape, run, steps=20, **tokenizer)  # complete
    assert first["step"] == torch.load(run / "bsq.pt", weights_only=True)["step"] == 20
    report = json.loads((run / "bsq.json").read_text())
    assert report["psnr_mean_db"] > 5 and len(report["history"]) == 1 and (run / "bsq.png").exists()

    settings = {"tiny": True, "tokens": 85 * 8, "fresh": 4, "pool_size": 16, "compiled": False, "prompts": ()}
    for minutes in (0.03, 0.06):
        scripts.train_infinity.train(draw, WORDS, run, minutes=0.06, stop_after=minutes / 2, **settings)
    state = torch.load(run / "infinity.pt", weights_only=True)
    report = json.loads((run / "infinity.json").read_text())
    assert state["share"] > 0.5 and report["steps"] == state["spent"]["steps"] > 2
    assert report["config"]["text"]["words"] == ["a", "blue", "green", "red", "square"]

    again = tmp_path / "again"
    again.mkdir()
    (again / "bsq-1.safetensors").write_bytes((run / "bsq-1.safetensors").read_bytes())
    scripts.train_infinity.train(draw, [*WORDS, "zebra"], again, steps=1, init=run, **settings)
    before, after = (scripts.bits.exported(r, "infinity") for r in (run, again))
    assert after["text_encoder.embed.weight"].shape[0] == before["text_encoder.embed.weight"].shape[0] + 1
    torch.testing.assert_close(after["blocks.0.ffn.fc1.weight"], before["blocks.0.ffn.fc1.weight"], atol=0.02, rtol=0)

    scripts.pack_infinity.main(run, out, cfg=2.0, tau=None, encoder=False, earlier=None)
    model = load_folder(out)
    assert isinstance(model, EmojiInfinity) and model.sampling.cfg == 2.0
    assert model(["a red square", "two blue squares"[4:]], seed=0).shape == (2, 3, 32, 32)
    assert model.fingerprint() in (out / "MODEL_CARD.md").read_text()


def test_sampling_is_chosen_by_what_scenes_ask_for(scripts: SimpleNamespace, tmp_path: Path) -> None:
    entries = scripts.choose_sampling.draw_entries(20)
    assert {e.task for e in entries} == {"counting", "position"}
    assert all((len(e.groups) == 1) == (e.task == "counting") and e.prompt for e in entries)
    held_out = {e.prompt for e in load_prompts()}
    assert not held_out & {e.prompt for e in entries}
    model = make(scripts)
    scripts.pack_infinity.write_model(model, tmp_path, ["a red square"], encoder=False)
    with pytest.warns(ToproVarWarning, match="does not know"):
        scripts.choose_sampling.main(tmp_path, [1.5], [0.5], 2, 2, "cpu", True)
    sampling = json.loads((tmp_path / "config.json").read_text())["sampling"]
    assert (sampling["cfg"], sampling["tau"]) == (1.5, 0.5)
