from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile.errors import OptionError
from toprovar_compile.models.var import VAR, Sampling, VARConfig, draw_tokens, filter_logits
from toprovar_compile.session import current_session

LABELS = torch.tensor([1, 5])


def step_logits(model: VAR, labels: Tensor, **kwargs: float) -> list[Tensor]:
    """Logits of every scale of one generation."""
    found: list[Tensor] = []
    original = model.step

    def step(*args: object) -> object:
        out = original(*args)  # type: ignore[arg-type]
        found.append(out[0])
        return out

    model.step = step  # type: ignore[method-assign, assignment]
    model(labels, **kwargs)
    del model.step
    return found


def test_images_have_shape_and_range(tiny_var: VAR) -> None:
    images = tiny_var(LABELS, seed=0)
    assert images.shape == (2, 3, 12, 12) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


def test_seed_fixes_the_images(tiny_var: VAR) -> None:
    first = tiny_var(LABELS, seed=4)
    assert torch.equal(first, tiny_var(LABELS, seed=4))
    assert not torch.equal(first, tiny_var(LABELS, seed=5))


def test_without_seed_the_global_generator_draws(tiny_var: VAR) -> None:
    torch.manual_seed(0)
    first = tiny_var(LABELS)
    assert not torch.equal(first, tiny_var(LABELS))
    torch.manual_seed(0)
    assert torch.equal(first, tiny_var(LABELS))


def test_labels_matter_and_samples_do_not_see_each_other(tiny_var: VAR) -> None:
    both = step_logits(tiny_var, LABELS, seed=0, top_k=1)
    alone = step_logits(tiny_var, LABELS[1:], seed=0, top_k=1)
    for b, a in zip(both, alone, strict=True):
        torch.testing.assert_close(b[1::2], a, atol=1e-4, rtol=1e-4)  # rows 1 and 3: conditional and unconditional
        assert not torch.allclose(b[0], b[1], atol=1e-2)


def test_int32_labels_are_accepted(tiny_var: VAR) -> None:
    assert torch.equal(tiny_var(LABELS.int(), seed=0), tiny_var(LABELS, seed=0))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([[1]]), "shape (1, 1)"),
        (torch.tensor(1), "shape ()"),
        (torch.tensor([11]), "out of range"),
        (torch.tensor([-1]), "out of range"),
        (torch.tensor([], dtype=torch.int64), "out of range"),
    ],
)
def test_bad_labels_are_refused(tiny_var: VAR, labels: Tensor, told: str) -> None:
    with pytest.raises(OptionError, match=r"VAR\.forward") as caught:
        tiny_var(labels)
    assert told in str(caught.value)


def test_unconditional_label_makes_guidance_void(tiny_var: VAR) -> None:
    label = torch.tensor([tiny_var.cfg.num_classes])
    logits = step_logits(tiny_var, label, seed=0, cfg=3.0)
    for scale in logits:
        torch.testing.assert_close(scale[0], scale[1])


def test_guidance_is_linear_in_the_two_predictions(tiny_var: VAR) -> None:
    seen: list[Tensor] = []
    original = tiny_var._advance

    def advance(s: int, logits: Tensor, *rest: Any, **how: Any) -> tuple[Tensor, Tensor]:
        seen.append(logits)
        return original(s, logits, *rest, **how)

    tiny_var._advance = advance  # type: ignore[method-assign]
    plain = tiny_var(LABELS, seed=0, cfg=0.0, top_k=1)
    cond = [logits[:2].argmax(-1) for logits in seen]
    del tiny_var._advance
    quantize = tiny_var.vae.quantize
    f_hat = torch.zeros(2, 8, 6, 6)
    for s, tokens in enumerate(cond):
        side = tiny_var.cfg.patch_nums[s]
        f_hat, _ = quantize.next_input(s, f_hat, quantize.embedding(tokens).transpose(1, 2).reshape(2, 8, side, side))
    torch.testing.assert_close(plain, tiny_var.vae.decode(f_hat))


def test_kv_cache_equals_recomputation(tiny_var: VAR) -> None:
    """The scales one by one, on the cache, give the logits of one block-causal pass over the same tokens."""
    tokens = [torch.randint(64, (2, pn * pn)) for pn in tiny_var.cfg.patch_nums]
    inputs = tiny_var.vae.quantize.teacher_inputs(tokens)
    want = tiny_var.teacher_forced(LABELS, inputs)
    x, cond, mod, scales = tiny_var.teacher_begin(LABELS, inputs)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for start, end in scales:
        logits, keys, values = tiny_var.step(x[:, start:end], cond, mod, keys, values)
        torch.testing.assert_close(logits, want[:, start:end], atol=1e-4, rtol=1e-4)
    assert keys[0].shape == (2, 2, 66, 32) and len(keys) == len(values) == 3


def test_teacher_forcing_takes_the_first_scales_alone(tiny_var: VAR) -> None:
    tokens = [torch.randint(64, (2, pn * pn)) for pn in tiny_var.cfg.patch_nums]
    inputs = tiny_var.vae.quantize.teacher_inputs(tokens)
    want = tiny_var.teacher_forced(LABELS, inputs)[:, :14]
    torch.testing.assert_close(tiny_var.teacher_forced(LABELS, inputs[:, :13]), want, atol=1e-5, rtol=1e-5)


def test_training_drops_labels_at_the_configured_rate(tiny_var: VAR) -> None:
    inputs = torch.zeros(400, 0, 8)
    torch.manual_seed(0)
    _, cond, _, _ = tiny_var.train().teacher_begin(torch.ones(400, dtype=torch.int64), inputs)
    dropped = int((cond == tiny_var.class_emb.weight[-1]).all(1).sum())
    assert 20 <= dropped <= 65
    _, cond, _, _ = tiny_var.eval().teacher_begin(torch.ones(400, dtype=torch.int64), inputs)
    assert torch.equal(cond, tiny_var.class_emb.weight[1].expand(400, -1))


def test_top_k_keeps_k_logits() -> None:
    logits = torch.randn(2, 3, 20)
    kept = filter_logits(logits, 4, 0.0)
    assert (kept.isfinite().sum(-1) == 4).all()
    assert torch.equal(kept[kept.isfinite()], logits[logits >= logits.topk(4).values[..., -1:]])
    assert filter_logits(logits, 0, 0.0) is logits and torch.equal(filter_logits(logits, 99, 0.0), logits)


def test_top_p_keeps_the_smallest_set_above_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().view(1, 1, 4)
    assert filter_logits(logits, 0, 0.7).isfinite().tolist() == [[[True, True, False, False]]]
    assert filter_logits(logits, 0, 0.01).isfinite().tolist() == [[[True, False, False, False]]]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.7, 0.3, 1e-9]).log().expand(1, 4000, 3)
    drawn = draw_tokens(logits, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 4000) and drawn.dtype == torch.int64
    assert 0.66 < (drawn == 0).float().mean() < 0.74 and (drawn < 2).all()


def test_model_sampling_is_the_default(tiny_var: VAR) -> None:
    explicit = tiny_var(LABELS, seed=0, cfg=3.0, top_k=2, top_p=0.5)
    assert not torch.equal(explicit, tiny_var(LABELS, seed=0))
    tiny_var.sampling = Sampling(3.0, 2, 0.5)
    assert torch.equal(explicit, tiny_var(LABELS, seed=0))


def test_more_smooth_blends_codes(tiny_var: VAR) -> None:
    smooth = tiny_var(LABELS, seed=0, more_smooth=True)
    assert smooth.isfinite().all() and not torch.equal(smooth, tiny_var(LABELS, seed=0))


def test_session_is_open_during_generation_only(tiny_var: VAR) -> None:
    scales: list[int] = []

    def note(*_: object) -> None:
        session = current_session()
        assert session is not None and session.schedule is tiny_var.schedule
        scales.append(session.scale)

    tiny_var.blocks[0].register_forward_pre_hook(note)
    tiny_var(LABELS, seed=0)
    assert scales == [0, 1, 2, 3, 4] and current_session() is None


def test_fingerprint_of_a_parameter_whose_positions_float32_cannot_count(tiny_var: VAR) -> None:
    tiny_var.register_parameter("large", torch.nn.Parameter(torch.zeros(22_118_400, dtype=torch.bfloat16)))
    before = tiny_var.fingerprint()
    with torch.no_grad():
        tiny_var.get_parameter("large")[-1] = 1
    assert tiny_var.fingerprint() != before


def test_fingerprint_is_of_weights_and_configuration(tiny_var: VAR, make_var: Callable[..., VAR]) -> None:
    before = tiny_var.fingerprint()
    assert before == deepcopy(tiny_var).bfloat16().fingerprint()
    assert before != make_var().fingerprint()
    with torch.no_grad():
        tiny_var.blocks[1].ffn.fc1.weight.add_(0.1)  # type: ignore[union-attr, operator]
    assert tiny_var.fingerprint() != before


def test_config_survives_json() -> None:
    cfg = VARConfig.official(20)
    assert VARConfig.from_json(cfg.to_json()) == cfg and cfg.embed_dim == 1280 and cfg.patch_nums[-1] == 16


def test_initialised_model_starts_near_the_uniform_distribution(make_var: Callable[..., VAR]) -> None:
    model = make_var()
    model.init_weights()
    logits = step_logits(model, LABELS, seed=0)[-1]
    assert logits.abs().max() < 0.2
