"""The official Infinity code, and FastVAR's version of it, run from a checkout for comparison.

What the code imports and is not installed is stood in for, as far as generating images needs it: flash-attn by
PyTorch's attention, einops by the few rearrangements used there, timm, torchvision and others by names alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toprovar_compile.errors import OptionError

if TYPE_CHECKING:
    from toprovar_compile.models.infinity import Infinity
    from toprovar_compile.schedule import ScaleSchedule

STAND_INS = "flash_attn: PyTorch's variable-length flash attention on CUDA, scaled_dot_product_attention elsewhere"
_DYNAMO_LIMIT = 64  # what the official scripts raise Dynamo's recompile limit to


@dataclass(frozen=True)
class Official:
    """The official transformer and tokenizer with the weights of one of our models."""

    model: Any
    vae: Any
    sampler: types.ModuleType

    def generate(
        self,
        text: Tensor,
        schedule: ScaleSchedule,
        *,
        seed: int,
        cfg: float,
        tau: float,
        top_k: int,
        top_p: float,
        forced_bits: list[Tensor] | None = None,
    ) -> Tensor:
        """One image, uint8 (1, H, W, 3) in BGR, for T5 features (length, C), as the official scripts call the model.

        `forced_bits`, bool (1, h, w, d) of each scale, take the place of what is drawn.
        """
        scales = len(schedule)
        lengths = torch.tensor([0, len(text)], dtype=torch.int32, device=text.device)
        forced = [bits.unsqueeze(1).long() for bits in forced_bits or ()]
        _, _, image = self.model.autoregressive_infer_cfg(
            vae=self.vae,
            scale_schedule=[(1, h, w) for h, w in schedule.grids],
            label_B_or_BLT=(text, [len(text)], lengths, len(text)),
            B=1,
            g_seed=seed,
            cfg_list=[cfg] * scales,
            tau_list=[tau] * scales,
            top_k=top_k,
            top_p=top_p,
            returns_vemb=1,
            cfg_insertion_layer=[0],
            vae_type=self.vae.codebook_dim,
            ret_img=True,
            gt_leak=len(forced),
            gt_ls_Bl=forced,
            inference_mode=True,
        )
        out: Tensor = image
        return out

    def compile_blocks(self) -> None:
        """`block.compile()` of every layer."""
        for block in self.model.unregistered_blocks:
            block.compile()


@contextmanager
def imported(checkout: str | Path) -> Iterator[Callable[[Infinity], Official]]:
    """Inside it the package `infinity` of `checkout` is importable; gives a function that builds it from our model.

    Raises OptionError when the folder holds no such package.
    """
    root = next((p for p in (Path(checkout), Path(checkout) / "Infinity") if (p / "infinity/models").is_dir()), None)
    if root is None:
        raise OptionError(
            f"{checkout} has no package `infinity`",
            where="official code",
            expected="a checkout of FoundationVision/Infinity or csguoh/FastVAR",
        )
    before, limit = set(sys.modules), torch._dynamo.config.recompile_limit
    missing = {name for name in _stand_ins() if not _installed(name)}
    sys.modules.update({name: module for name, module in _stand_ins().items() if name in missing})
    sys.path.insert(0, str(root))
    # It has no __init__.py, so any infinity.py on the path, such as the benchmark's own script, would come before it.
    sys.modules["infinity"] = types.ModuleType("infinity")
    sys.modules["infinity"].__path__ = [str(root / "infinity")]
    torch._dynamo.config.recompile_limit = _DYNAMO_LIMIT
    try:
        yield _build
    finally:
        torch._dynamo.config.recompile_limit = limit
        sys.path.remove(str(root))
        for name in set(sys.modules) - before:
            if name in missing or name.partition(".")[0] == "infinity":
                del sys.modules[name]


def _installed(name: str) -> bool:
    package = name.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _build(ours: Infinity) -> Official:
    """The official model of the same shape, device and weights; its layers in the dtype of ours, the rest float32."""
    cfg = ours.cfg
    weight = ours.head.weight
    module = importlib.import_module("infinity.models.infinity")
    with _without_init(), redirect_stdout(io.StringIO()):
        vae = build_vae(cfg.vae).to("meta")
        model = module.Infinity(
            vae_local=vae,
            text_channels=cfg.text_channels,
            text_maxlen=cfg.text_maxlen,
            embed_dim=cfg.embed_dim,
            depth=cfg.depth,
            num_heads=cfg.num_heads,
            mlp_ratio=cfg.mlp_ratio,
            norm_eps=cfg.norm_eps,
            drop_path_rate=0.1,
            shared_aln=cfg.shared_aln,
            checkpointing="full-block",
            customized_flash_attn=False,
            fused_norm=True,
            pad_to_multiplier=128,
            block_chunks=8 if cfg.depth % 8 == 0 else cfg.depth,
            rope2d_each_sa_layer=1,
            rope2d_normalized_by_hw=cfg.rope_normalised,
            pn="1M",
            train_h_div_w_list=[1.0],
            apply_spatial_patchify=int(cfg.spatial_patchify),
            inference_mode=True,
        ).to("meta")
    for block in model.unregistered_blocks:
        block.to(weight.dtype)
    for part in (model, vae):
        part.to_empty(device=weight.device)
        part.eval().requires_grad_(False)
        for buffer in part.buffers():
            buffer.zero_()
    chunk = cfg.depth // len(model.block_chunks)
    _copy(model, ours, lambda name: re.sub(r"^block_chunks\.(\d+)\.module\.(\d+)", _flat(chunk), name))
    _copy(vae, ours.vae, lambda name: name)
    model.rng = torch.Generator(device=weight.device)
    return Official(model, vae, module)


def build_vae(cfg: Any) -> Any:
    """The official tokenizer of the shape `cfg`, a BSQVAEConfig, with random weights, in eval mode."""
    module: Any = importlib.import_module("infinity.models.bsq_vae.vae")
    original = module.AutoEncoder

    def shaped(args: Any) -> Any:
        args.base_ch, args.num_res_blocks = cfg.ch, cfg.num_res_blocks
        return original(args)

    module.AutoEncoder = shaped
    try:
        return module.vae_model(
            None,
            "dynamic",
            cfg.codebook_dim,
            2**cfg.codebook_dim,
            patch_size=cfg.patch_size,
            encoder_ch_mult=list(cfg.ch_mult),
            decoder_ch_mult=list(cfg.ch_mult),
        )
    finally:
        module.AutoEncoder = original


def _flat(chunk: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"blocks.{int(found[1]) * chunk + int(found[2])}"


def _copy(theirs: nn.Module, ours: nn.Module, rename: Callable[[str], str]) -> None:
    known = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if rename(name) not in known:
                raise OptionError(f"the official code has a parameter {name}, which our model has not")
            parameter.copy_(known[rename(name)])


@contextmanager
def _without_init() -> Iterator[None]:
    """Parameters stay as they are allocated: random numbers for billions of them take minutes."""
    names = [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")]
    originals = {n: getattr(nn.init, n) for n in names}
    for n in names:
        setattr(nn.init, n, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for n, function in originals.items():
            setattr(nn.init, n, function)


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
) -> Tensor:
    """(B, n, H, D) each."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def _flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """q (total queries, H, D), kv (total keys, 2, H, D)."""
    k, v = kv.unbind(1)
    if q.is_cuda:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, False, False, scale=softmax_scale
        )[0]
        return out
    counts_q, counts_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = zip(torch.split(q, counts_q), torch.split(k, counts_k), torch.split(v, counts_k), strict=True)
    outs = [_flash_attn_func(a[None], b[None], c[None], 0.0, softmax_scale)[0] for a, b, c in rows]
    return torch.cat(outs)


class _DropPath(nn.Module):
    """timm's DropPath while not training."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


_REARRANGE: dict[str, Callable[..., Tensor]] = {
    "... c d -> ... (c d)": lambda x: x.flatten(-2),
    "b n c d -> b n (c d)": lambda x: x.flatten(-2),
    "b n (c d) -> b n c d": lambda x, c: x.reshape(*x.shape[:-1], c, -1),
    "... 1 d -> ... d": lambda x: x.squeeze(-2),
    "b ... d -> b d ...": lambda x: x.movedim(-1, 1),
    "b d ... -> b ... d": lambda x: x.movedim(1, -1),
}


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    return _REARRANGE[pattern](x, **sizes)


def _pack(tensors: list[Tensor], pattern: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    """For the pattern "b * d"."""
    return tensors[0].flatten(1, -2), [tuple(tensors[0].shape[1:-1])]


def _unpack(x: Tensor, shapes: list[tuple[int, ...]], pattern: str) -> list[Tensor]:
    """For "b * d" and "b * c d"."""
    return [x.view(x.shape[0], *shapes[0], *x.shape[2:])]


def _stand_ins() -> dict[str, types.ModuleType]:
    def module(name: str, **content: Any) -> types.ModuleType:
        out = types.ModuleType(name)
        vars(out).update(content)
        return out

    def identity(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    transforms = module("torchvision.transforms")
    layers = module("timm.models.layers", DropPath=_DropPath, drop_path=identity)
    models = module("timm.models", register_model=identity, layers=layers)
    loss = module("timm.loss", SoftTargetCrossEntropy=nn.CrossEntropyLoss)
    modules = [
        module(
            "flash_attn",
            flash_attn_func=_flash_attn_func,
            flash_attn_varlen_kvpacked_func=_flash_attn_varlen_kvpacked_func,
        ),
        module("einops", __version__="0.8.2", rearrange=_rearrange, pack=_pack, unpack=_unpack, reduce=None),
        module("timm", models=models, loss=loss),
        models,
        layers,
        loss,
        module("torchvision", transforms=transforms),
        transforms,
        *(module(name) for name in ("cv2", "imageio", "pytz", "tqdm")),
    ]
    return {m.__name__: m for m in modules}
