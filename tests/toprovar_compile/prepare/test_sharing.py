"""Parameters of one module in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from toprovar_compile.errors import UnsupportedModelError
from toprovar_compile.prepare.sharing import (
    Sharing,
    check_device,
    check_ready,
    check_used,
    compare_blocks,
    fingerprint,
    leave_inference,
)


class Scaled(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (1, 2, 1)) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.rand(shape))
        self.register_buffer("offset", torch.rand(2))


def pair(shape: tuple[int, ...] = (1, 2, 1)) -> tuple[Any, Any, Sharing]:
    with torch.device("meta"):
        ours = Scaled()
    theirs = Scaled(shape)
    return ours, theirs, Sharing(ours, theirs.get_submodule, "test", (theirs,))


def test_tensors_are_the_same() -> None:
    ours, theirs, _ = pair()
    assert ours.inner.weight is theirs.inner.weight and ours.offset is theirs.offset
    theirs.load_state_dict(Scaled().state_dict())
    assert torch.equal(ours.scale, theirs.scale)


def test_exchanged_tensors_are_seen_at_the_next_sync() -> None:
    ours, theirs, sharing = pair()
    theirs.load_state_dict(Scaled().state_dict(), assign=True)
    theirs.register_buffer("offset", torch.rand(2))
    assert not torch.equal(ours.inner.weight, theirs.inner.weight)
    sharing.sync()
    assert ours.inner.weight is theirs.inner.weight and ours.offset is theirs.offset


def test_another_place_of_a_size_of_one_is_a_view() -> None:
    ours, theirs, sharing = pair((1, 1, 2))
    assert ours.scale.shape == (1, 2, 1) and ours.scale.data_ptr() == theirs.scale.data_ptr()
    before = ours.scale
    sharing.sync()
    assert ours.scale is before
    theirs.scale.data = torch.rand(1, 1, 2)  # as `to(device)` does
    sharing.sync()
    assert torch.equal(ours.scale.flatten(), theirs.scale.flatten())


def test_other_parameters_are_refused() -> None:
    with torch.device("meta"):
        ours = Scaled()
    with pytest.raises(UnsupportedModelError, match=r"scale is \(3,\), not \(1, 2, 1\)"):
        Sharing(ours, Scaled((3,)).get_submodule, "test", ())
    theirs: Any = Scaled()
    del theirs.inner
    with pytest.raises(UnsupportedModelError, match="no module inner"):
        Sharing(ours, theirs.get_submodule, "test", (theirs,))
    _, theirs, sharing = pair()
    theirs.extra = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match=r"does not know: extra\.weight, extra\.bias"):
        check_used(sharing, theirs, "test")


def test_changed_modules_are_refused() -> None:
    _, theirs, sharing = pair()
    hook = theirs.inner.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="forward hooks"):
        sharing.sync()
    hook.remove()
    theirs.inner = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="merge adapter weights"):
        sharing.sync()
    del theirs.inner
    with pytest.raises(UnsupportedModelError, match="is gone"):
        sharing.sync()


def test_states_that_cannot_generate_are_refused() -> None:
    model = Scaled()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        check_ready(model, "test")
    assert check_ready(model.eval(), "test") == torch.device("cpu")
    model.inner.to("meta")
    with pytest.raises(UnsupportedModelError, match="parameters are on cpu, meta"):
        check_ready(model, "test")
    model = Scaled().eval()
    model.scale = nn.Parameter(torch.zeros(1, 2, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"scale is torch\.int8"):
        check_ready(model, "test")
    with pytest.raises(UnsupportedModelError, match="on cpu, meta"):
        check_ready(model, "test", [("a", torch.zeros(1)), ("b", torch.zeros(1, device="meta"))])
    with pytest.raises(UnsupportedModelError, match="labels is on meta"):
        check_device("labels", torch.zeros(1, device="meta"), torch.device("cpu"), "test")


def test_tensors_of_inference_mode_become_normal_ones() -> None:
    model = Scaled()
    with torch.inference_mode():
        other = Scaled()
        model.scale.data = model.scale.data.double()
        leave_inference(other.named_parameters())
    before = model.scale.clone()
    leave_inference(model.named_parameters())
    assert torch.equal(model.scale, before)
    assert not any(p.is_inference() for p in (*model.parameters(), *other.parameters()))


def test_blocks_that_differ_are_refused() -> None:
    x = torch.randn(3)
    compare_blocks(lambda: x * 2, lambda: x + x, x, "test")
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        compare_blocks(lambda: x * 2, lambda: x * 2.1, x, "test")
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        compare_blocks(lambda: x * 2, lambda: x * torch.nan, x, "test")

    def fails() -> torch.Tensor:
        raise RuntimeError("no kernel for this device")

    compare_blocks(fails, lambda: x, x, "test")


def test_fingerprint_knows_configuration_and_weights() -> None:
    model = Scaled()
    first = fingerprint("a", model.named_parameters())
    assert first == fingerprint("a", model.to(torch.bfloat16).named_parameters())
    assert first != fingerprint("b", model.named_parameters())
    model.scale.data.mul_(-1)
    assert first != fingerprint("a", model.named_parameters())
