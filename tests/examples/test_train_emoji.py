"""The training scripts run, resume, and pack what the package can load, on tiny pictures."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from toprovar_compile import models

SCRIPTS = ("common", "data", "train_tokenizer", "train_var", "train_classifier", "evaluate", "pack")
CODES = [
    "0023-fe0f-20e3",
    "1f1eb-1f1f7",
    "1f44d",
    "1f44d-1f3fd",
    "1f468-200d-1f680",
    "1f6dc",
    "23-fe0f-20e3",
    "2764-fe0f",
]


@pytest.fixture
def pictures() -> Tensor:
    """Eight 32x32 pictures: a square each, of its own colour and place, on white."""
    images = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        image[:, 2 * i : 2 * i + 12, 4:20] = torch.tensor([30 * i, 255 - 30 * i, 90], dtype=torch.uint8).view(3, 1, 1)
    return images


def test_names_are_readable(scripts: SimpleNamespace) -> None:
    classes = scripts.data.classes_of(CODES)
    assert [c.name for c in classes] == [
        "keycap: # (0023-fe0f-20e3)",
        "flag: FR",
        "thumbs up sign",
        "thumbs up sign: medium skin tone",
        "man, rocket",
        "wireless",
        "keycap: # (23-fe0f-20e3)",
        "heavy black heart",
    ]
    assert [c.base for c in classes] == [0, 1, 2, 2, 4, 5, 0, 7]


def test_package_is_composited_on_white_and_cached(scripts: SimpleNamespace, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", "w:gz") as tar:
        for code, size in (("2764-fe0f", (256, 264)), ("1f44d", (256, 256))):
            picture = Image.new("RGBA", size, (0, 0, 0, 0))
            picture.paste((255, 0, 0, 255), (100, 100, 150, 150))
            raw = io.BytesIO()
            picture.save(raw, "webp", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{code}.webp")
            member.size = raw.tell()
            raw.seek(0)
            tar.addfile(member, raw)
    emoji = scripts.data.load(tmp_path)
    assert [c.code for c in emoji.classes] == ["1f44d", "2764-fe0f"]
    assert emoji.images.shape == (2, 3, 256, 256) and emoji.images.dtype == torch.uint8
    assert emoji.images[:, :, 0, 0].tolist() == [[255] * 3] * 2
    assert emoji.images[:, :, 120, 120].tolist() == [[255, 0, 0]] * 2
    (tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz").unlink()
    again = scripts.data.load(tmp_path)
    assert torch.equal(again.images, emoji.images) and again.classes == emoji.classes


def test_augmentation_keeps_white_and_can_do_nothing(scripts: SimpleNamespace, pictures: Tensor) -> None:
    x = scripts.common.to_float(pictures, torch.device("cpu"))
    still = scripts.common.augment(x, shift=0, scale=0, turn=0, flip=False, hue=0)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)
    white = torch.ones(4, 3, 16, 16)
    moved = scripts.common.augment(white, shift=0.2, scale=0.2, turn=20, flip=True, hue=90)
    torch.testing.assert_close(moved, white)


def test_muon_steps_are_orthogonal(scripts: SimpleNamespace) -> None:
    torch.manual_seed(0)
    stacked, tall = (torch.nn.Parameter(torch.zeros(s)) for s in ((24, 8), (16, 8)))
    optimizer = scripts.common.Muon([stacked, tall], lr=1.0)
    for p in (stacked, tall):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for block in stacked.detach().chunk(3):  # query, key and value each
        assert torch.linalg.svdvals(block).min() > 0.5 and torch.linalg.svdvals(block).max() < 1.3
    gain = (16 / 8) ** 0.5
    values = torch.linalg.svdvals(tall.detach())
    assert 0.5 * gain < values.min() and values.max() < 1.3 * gain


def test_noisy_tokens_without_noise_are_the_tokenizers(scripts: SimpleNamespace, pictures: Tensor) -> None:
    torch.manual_seed(0)
    vae = scripts.train_var.VQVAE(scripts.common.emoji_config(8, tiny=True).vae).eval().requires_grad_(False)
    features = scripts.train_var.encode_features(vae, pictures, torch.device("cpu"))
    neighbours = torch.zeros(32, 2, dtype=torch.int64)
    targets, inputs = scripts.train_var.noisy_tokens(vae.quantize, features, neighbours, 0.0, 4)
    tokens = vae.encode(scripts.common.to_float(pictures, torch.device("cpu")))
    assert torch.equal(targets, torch.cat(tokens, 1))
    torch.testing.assert_close(inputs, vae.quantize.teacher_inputs(tokens), atol=1e-5, rtol=1e-5)
    noisy, _ = scripts.train_var.noisy_tokens(vae.quantize, features, neighbours, 1.0, 4)
    assert torch.equal(noisy[:, 0], targets[:, 0]) and not torch.equal(noisy, targets)


def test_scripts_train_resume_evaluate_and_pack(
    scripts: SimpleNamespace, pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "weights"
    cfg = scripts.common.emoji_config(8, tiny=True)
    emoji = scripts.data.Emoji(pictures, scripts.data.classes_of(CODES))
    tokenizer, var = scripts.train_tokenizer, scripts.train_var
    monkeypatch.setattr(scripts.data, "load", lambda _: emoji)

    tokenizer.train(pictures, cfg, run, steps=20, batch=2)
    first = torch.load(run / "tokenizer.pt", weights_only=True)
    tokenizer.train(pictures, cfg, run, steps=20, batch=2)  # complete: nothing changes
    second = torch.load(run / "tokenizer.pt", weights_only=True)
    assert first["share"] == second["share"] == 1.0 and len(second["history"]) == 1
    assert torch.equal(first["model"]["encoder.conv_in.weight"], second["model"]["encoder.conv_in.weight"])

    options = {"tokens": 4 * 85, "compiled": False}
    var.train(pictures, cfg, run, steps=25, **options)
    state = torch.load(run / "var.pt", weights_only=True)
    assert state["share"] == 1.0 and state["spent"]["steps"] == 25
    state["share"] = 0.5  # as if it had been cut
    torch.save(state, run / "var.pt")
    var.train(pictures, cfg, run, steps=50, **options)
    resumed = torch.load(run / "var.pt", weights_only=True)
    assert resumed["spent"]["steps"] == 50 and resumed["share"] == 1.0
    losses = [sum(row[1:9:2]) for row in resumed["history"]]
    assert losses[-1] < losses[0]

    scripts.train_classifier.train(pictures, run, steps=4, batch=8)
    scripts.evaluate.main(tmp_path, run, count=8, batch=8, all_settings=False)
    scripts.pack.main(tmp_path, run, out, None, False)
    model = models.load_folder(out)
    assert model.class_names is not None and model.class_names[1] == "flag: FR"
    card = (out / "MODEL_CARD.md").read_text()
    assert model.fingerprint() in card and hashlib.sha256((out / "config.json").read_bytes()).hexdigest() in card
    assert json.loads((out / "classes.json").read_text())[3]["base"] == 2
    assert {p.name for p in out.glob("*.png")} == {"loss.png", "reconstruction.png", "samples.png"}

    warm = tmp_path / "warm"
    tokenizer.train(pictures, cfg, warm, steps=1, batch=2, init=out)
    var.train(pictures, cfg, warm, steps=1, init=out, **options)
