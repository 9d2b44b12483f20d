from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from toprovar_compile import models
from toprovar_compile.errors import CheckpointError, OptionError
from toprovar_compile.models import loading
from toprovar_compile.models.var import VAR, Sampling, VARConfig

LABELS = torch.tensor([1, 5])


class Checkpoint:
    """The files of a tiny model in the official format."""

    def __init__(self, model: VAR, folder: Path) -> None:
        state = model.state_dict()
        self.vae = {k.removeprefix("vae."): v for k, v in state.items() if k.startswith("vae.")}
        self.var: dict[str, object] = {k: v for k, v in state.items() if not k.startswith("vae.")}
        self.var |= {"lvl_1L": model.lvl_1L, "attn_bias_for_masking": torch.zeros(1, 1, 66, 66)}
        self.folder = folder

    def save(self, suffix: str = ".pth") -> tuple[Path, Path]:
        paths = self.folder / f"var{suffix}", self.folder / f"vae{suffix}"
        for path, state in zip(paths, (self.var, self.vae), strict=True):
            if suffix == ".safetensors":
                save_file({k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}, path)
            else:
                torch.save(state, path)
        return paths


@pytest.fixture
def checkpoint(tiny_var: VAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Published sizes are too large for tests: what `official` gives for depth 3 is the tiny model."""

    def official(depth: int, *, shared_aln: bool = False) -> VARConfig:
        assert (depth, shared_aln) == (3, True)
        return tiny_var.cfg

    monkeypatch.setattr(VARConfig, "official", official)
    return Checkpoint(tiny_var, tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_checkpoint_gives_the_same_images(tiny_var: VAR, checkpoint: Checkpoint, suffix: str) -> None:
    model = models.load_official(*checkpoint.save(suffix))
    assert not model.training and torch.equal(model(LABELS, seed=0), tiny_var(LABELS, seed=0))


def test_training_checkpoint_is_unwrapped(tiny_var: VAR, checkpoint: Checkpoint) -> None:
    checkpoint.var = {"epoch": 3, "trainer": {"var_wo_ddp": checkpoint.var}}
    assert models.load_official(*checkpoint.save()).fingerprint() == tiny_var.fingerprint()


def test_official_checkpoint_takes_a_dtype(checkpoint: Checkpoint) -> None:
    assert models.load_official(*checkpoint.save(), dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_misfits_are_all_named(checkpoint: Checkpoint) -> None:
    del checkpoint.var["blocks.1.ffn.fc1.weight"]
    checkpoint.var["blocks.1.ffn.extra"] = torch.zeros(1)
    checkpoint.vae["post_quant_conv.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        models.load_official(*checkpoint.save())
    message = str(caught.value)
    assert "missing blocks.1.ffn.fc1.weight" in message and "unexpected blocks.1.ffn.extra" in message
    assert "mis-shaped vae.post_quant_conv.bias (3,) where (8,) is needed" in message and "var.pth" in message


def test_long_lists_of_misfits_are_cut(checkpoint: Checkpoint) -> None:
    checkpoint.vae = {}
    with pytest.raises(CheckpointError, match=r"missing vae\.[^;]* and \d+ more"):
        models.load_official(*checkpoint.save())


def test_failed_filling_leaves_no_weights(tiny_var: VAR) -> None:
    state = tiny_var.state_dict()
    del state["head.bias"]
    model = loading._empty(tiny_var.cfg)
    with pytest.raises(CheckpointError):
        loading._fill(model, state, "here")
    assert all(p.is_meta for p in model.parameters())


def test_file_without_layers_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.var = {"head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no transformer layer"):
        models.load_official(*checkpoint.save())


def test_objects_are_not_unpickled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    checkpoint.var["blocks.0.trap"] = Trap()
    with pytest.raises(CheckpointError, match="plain tensors"):
        models.load_official(*checkpoint.save())
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_or_missing_file_is_named(checkpoint: Checkpoint, suffix: str) -> None:
    var, vae = checkpoint.save(suffix)
    vae.write_bytes(vae.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="vae"):
        models.load_official(var, vae)
    vae.unlink()
    with pytest.raises(CheckpointError, match="vae"):
        models.load_official(var, vae)


def test_something_else_than_a_mapping_is_refused(checkpoint: Checkpoint) -> None:
    var, vae = checkpoint.save()
    torch.save([torch.zeros(1)], vae)
    with pytest.raises(CheckpointError, match="holds a list"):
        models.load_official(var, vae)


def test_folder_round_trip(tiny_var: VAR, tmp_path: Path) -> None:
    state = {k: v.half() for k, v in tiny_var.state_dict().items()}
    half = len(state) // 2
    save_file(dict(list(state.items())[:half]), tmp_path / "model-1.safetensors")
    save_file(dict(list(state.items())[half:]), tmp_path / "model-2.safetensors")
    config = {"model": json.loads(tiny_var.cfg.to_json()), "sampling": {"cfg": 2.0, "top_k": 3, "top_p": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "classes.json").write_text(json.dumps([{"name": "a", "code": "61"}]))
    model = models.load_folder(tmp_path)
    assert model.sampling == Sampling(2.0, 3, 0.0) and model.class_names == ["a"]
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight, tiny_var.head.weight, atol=1e-3, rtol=1e-3)
    assert torch.equal(model.lvl_1L, tiny_var.lvl_1L)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        models.load_folder(tmp_path)


def test_unknown_model_gets_the_nearest_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'emoji-var'"):
        models.load("emojivar")
    with pytest.raises(OptionError, match="one of emoji-infinity, emoji-var"):
        models.load("something")


def test_classes_are_found_by_name_emoji_and_words() -> None:
    names = models.load("emoji-var").class_names
    assert names is not None and len(names) == len(set(names)) == 3391
    (label,) = models.find_class("👍")
    assert names[label] == "thumbs up sign" and models.find_class("Thumbs up sign") == [label]
    assert [names[i] for i in models.find_class("👍🏽")] == ["thumbs up sign: medium skin tone"]
    found = models.find_class("thumbs up")
    assert found[0] == label and len(found) == 6
    with pytest.raises(OptionError, match="did you mean 'pineapple'"):
        models.find_class("pinapple")
    with pytest.raises(OptionError):
        models.find_class("  ")


def test_shipped_model_is_the_one_of_its_card() -> None:
    folder = loading.folder_of("emoji-var")
    card = (folder / "MODEL_CARD.md").read_text()
    model = models.load("emoji-var")
    assert hashlib.sha256((folder / "config.json").read_bytes()).hexdigest() in card
    assert model.fingerprint() in card
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 40 * 2**20
    assert model.cfg.depth == 16 and model.schedule.total == 2240 and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_shipped_model_knows_its_pictures() -> None:
    """At the first scale it is sure of two classes' tokens, which differ."""
    model = models.load("emoji-var", dtype=torch.float32)
    labels = torch.tensor([models.find_class("red apple")[0], models.find_class("large blue circle")[0]])
    x, cond, mod, _ = model._begin(labels, seed=0)
    logits, _, _ = model.step(x, cond, mod, [], [])
    chosen = logits[:2, 0].softmax(-1).max(-1)
    assert chosen.values.min() > 0.5 and chosen.indices[0] != chosen.indices[1]
