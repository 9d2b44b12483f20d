"""Official files of Infinity, made here from a model of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from toprovar_compile import models
from toprovar_compile.errors import CheckpointError, OptionError
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.infinity import Infinity, InfinityConfig
from toprovar_compile.models.infinity_loading import load_infinity, official_state
from toprovar_compile.schedule import ScaleSchedule

TINY = InfinityConfig(
    depth=4, embed_dim=64, num_heads=2, text_channels=128, text_maxlen=20, vae=BSQVAEConfig(8, 32, (1, 2), 1)
)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Infinity:
    return Infinity.random(TINY, seed=1)


def official(model: Infinity, chunk: int = 2) -> State:
    """Its transformer as official checkpoints have it, `chunk` blocks a chunk."""
    out: State = {}
    for key, value in model.state_dict().items():
        if key.startswith("vae."):
            continue
        if key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            key = f"block_chunks.{int(i) // chunk}.module.{int(i) % chunk}.{rest}"
        out[key] = value.transpose(1, 2).contiguous() if key.endswith("scale_mul_1H11") else value
    return out | {"lvl_1L": torch.zeros(1, 9)}


def tokenizer(model: Infinity) -> State:
    masks = {f"{name}.lfq.mask": torch.ones(8) for name in ("quantizer", "quantize")}
    return model.vae.state_dict() | masks


@pytest.fixture
def vae_file(model: Infinity, tmp_path: Path) -> Path:
    torch.save(tokenizer(model), tmp_path / "vae.pth")
    return tmp_path / "vae.pth"


def write(state: State, form: str, folder: Path) -> Path:
    if form == "shards":
        names = sorted(state)
        shards = folder / "model"
        shards.mkdir()
        for i in range(2):
            save_file({k: state[k] for k in names[i::2]}, shards / f"model-{i}-of-2.safetensors")
        (shards / "model.safetensors.index.json").write_text(json.dumps({}))
        return shards
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    nested: Any = {"trainer": {"gpt_fsdp": state}, "epoch": 3} if form == "training" else state
    torch.save(nested, folder / "model.pth")
    return folder / "model.pth"


def same(a: Infinity, b: Infinity) -> bool:
    text = [torch.randn(5, 128, generator=torch.Generator().manual_seed(0))]
    schedule = ScaleSchedule.from_patch_nums((1, 2, 3))
    return torch.equal(a(text, seed=0, schedule=schedule), b(text, seed=0, schedule=schedule))


@pytest.mark.parametrize("form", ["pth", "training", "safetensors", "shards"])
def test_official_files(model: Infinity, vae_file: Path, tmp_path: Path, form: str) -> None:
    loaded = load_infinity(write(official(model), form, tmp_path), vae_file)
    assert loaded.cfg == TINY and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.fingerprint() == model.fingerprint()
    assert same(loaded, model)


@pytest.mark.parametrize("prefix", ["unregistered_blocks", "blocks", "module.blocks"])
def test_other_names_of_blocks(model: Infinity, vae_file: Path, tmp_path: Path, prefix: str) -> None:
    state = {k.replace("block_chunks.0.module", prefix): v for k, v in official(model, chunk=4).items()}
    assert same(load_infinity(write(state, "pth", tmp_path), vae_file), model)


@pytest.mark.parametrize(
    "cfg",
    [replace(TINY, shared_aln=False), replace(TINY, ca_gamma=True), replace(TINY, spatial_patchify=True)],
    ids=["unshared", "gamma", "patchify"],
)
def test_configuration_is_read_off_the_shapes(vae_file: Path, tmp_path: Path, cfg: InfinityConfig) -> None:
    made = Infinity.random(cfg, seed=2)
    loaded = load_infinity(write(official(made), "pth", tmp_path), vae_file, dtype=torch.bfloat16, rope_normalised=1)
    assert loaded.cfg == replace(cfg, rope_normalised=1)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.sampling == made.sampling


def test_load_by_name(model: Infinity, vae_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(official(model), "pth", tmp_path)
    with pytest.raises(CheckpointError, match=r"depth 4, width 64.*depth 32, width 2048"):
        models.load("infinity-2b", checkpoint=file, vae_checkpoint=vae_file)
    with pytest.raises(OptionError, match="3b"):
        models.load("infinity-3b", checkpoint=file, vae_checkpoint=vae_file)
    monkeypatch.setattr("toprovar_compile.models.infinity_loading.official_config", lambda size: TINY)
    assert same(models.load("infinity-2b", checkpoint=file, vae_checkpoint=vae_file), model)
    for arguments in ({}, {"checkpoint": file}):
        with pytest.raises(OptionError, match="both files"):
            models.load("infinity-2b", **arguments)
    with pytest.raises(OptionError, match="with none"):
        models.load("emoji-var", checkpoint=file, vae_checkpoint=vae_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "missing head.weight"),
        ({"head.extra": torch.ones(1)}, "unexpected head.extra"),
        ({"block_chunks.1.module.0.ffn.fc3.weight": torch.ones(1)}, r"unexpected blocks\.2\.ffn\.fc3"),
        ({"head.bias": torch.ones(3)}, r"head.bias \(3,\) where \(16,\)"),
        ({"word_embed.weight": torch.ones(64, 24)}, "24 bits.*8, or 32"),
        ({"cfg_uncond": None}, "missing cfg_uncond"),
        ({"blocks.0.sa.proj.bias": torch.ones(64)}, "twice"),
        ({"head.bias": "text"}, "head.bias are not tensors"),
    ],
)
def test_files_that_do_not_fit(
    model: Infinity, vae_file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = {k: v for k, v in (official(model) | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        load_infinity(write(state, "pth", tmp_path), vae_file)


def test_folder_without_shards(vae_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no shards"):
        load_infinity(tmp_path / "empty", vae_file)


def test_official_state_leaves_our_own_names() -> None:
    state = {"blocks.3.sa.scale_mul_1H11": torch.ones(1, 2, 1, 1), "head.bias": torch.ones(1)}
    out = official_state(state, "here")
    assert list(out) == list(state) and out["blocks.3.sa.scale_mul_1H11"].shape == (1, 2, 1, 1)
