"""Run the Triton kernel of fae.py in Triton's interpreter against the float64 reference; started by test_fae.py."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from toprovar_compile.kernels.fae import _launch_fae, fae_reference

# bfloat16 is left to real GPUs: the interpreter keeps it as integers.
CASES = [
    (1, 1, 64, torch.float32),
    (4, 5, 32, torch.float32),
    (9, 33, 24, torch.float32),
    (25, 169, 80, torch.float16),
    (130, 64, 128, torch.float32),
    (70, 129, 256, torch.float16),
]


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    for n, m, d, dtype in CASES:
        q, k, v = (torch.randn(2, x, 3, d).to(dtype).transpose(1, 2) for x in (n, m, m))
        keep = torch.rand(2, 1, n, m) > 0.5
        keep[:, :, 0] = False
        biases = (None, keep, torch.randn(3, n, m), torch.zeros(m).masked_fill_(torch.arange(m) > 3, -math.inf))
        for bias in (*biases, torch.zeros(m, dtype=torch.bool)):
            out, entropy = _launch_fae(q, k, v, bias, 0.3)
            want, want_entropy = fae_reference(q.double(), k.double(), v.double(), bias, 0.3)
            tolerance = 2e-3 if dtype == torch.float16 else 2e-5
            torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-5, rtol=0)
    extremes()
    packed()
    q[0, :, 3] = math.nan
    out, entropy = _launch_fae(q, k, v, None, 0.3)
    if not (out[0, :, 3].isnan().all() and entropy[0, 3].isnan() and entropy.isnan().sum() == 1):
        raise AssertionError("NaN in one query must show in its row, and only there")
    print("checked")


def extremes() -> None:
    """Equal, one-hot and huge scores, scales of either sign, and masks made of the lowest finite number."""
    q, k, v = (torch.randn(2, 3, x, 32) for x in (9, 77, 77))
    _, entropy = _launch_fae(torch.zeros_like(q), k, v, None, 0.3)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(77)), atol=1e-5, rtol=0)
    eye = torch.eye(32).expand(2, 3, 32, 32)
    out, entropy = _launch_fae(eye, eye, eye, None, 1000.0)
    torch.testing.assert_close(out, eye, atol=0, rtol=0, check_stride=False)
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), atol=0, rtol=0)
    lowest = torch.zeros(9, 77).masked_fill_(torch.rand(9, 77) > 0.5, torch.finfo(torch.float32).min)
    for scale in (1e4, 30.0, 0.0, -0.3):
        for bias in (None, lowest) if abs(scale) < 1 else (None,):
            out, entropy = _launch_fae(q, k, v, bias, scale)
            want, want_entropy = fae_reference(q.double(), k.double(), v.double(), bias, scale)
            largest = max(100.0, (q @ k.mT).abs().max().item() * scale)
            torch.testing.assert_close(entropy.double(), want_entropy, atol=4e-7 * largest, rtol=0)
            torch.testing.assert_close(out.double(), want, atol=1e-5 + 1e-6 * largest, rtol=0)


def packed() -> None:
    """Samples with keys of their own number, one of them with none."""
    lens = torch.tensor([0, 5, 5, 70], dtype=torch.int32)
    q, k, v = torch.randn(3, 2, 9, 32), torch.randn(1, 2, 70, 32), torch.randn(1, 2, 70, 32)
    out, entropy = _launch_fae(q, k, v, None, 0.3, lens)
    for i, (start, end) in enumerate(pairwise(lens.tolist())):
        keys, values = k[:, :, start:end], v[:, :, start:end]
        want, want_entropy = fae_reference(q[i : i + 1], keys, values, None, 0.3)
        torch.testing.assert_close(out[i : i + 1], want, atol=2e-5, rtol=0, check_stride=False)
        torch.testing.assert_close(entropy[i : i + 1], want_entropy, atol=1e-5, rtol=0)


if __name__ == "__main__":
    main()
