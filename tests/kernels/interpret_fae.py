"""Run the Triton kernel of fae.py in Triton's interpreter against the float64 reference; started by test_fae.py."""

from __future__ import annotations

import math

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
    q[0, :, 3] = math.nan
    out, entropy = _launch_fae(q, k, v, None, 0.3)
    if not (out[0, :, 3].isnan().all() and entropy[0, 3].isnan() and entropy.isnan().sum() == 1):
        raise AssertionError("NaN in one query must show in its row, and only there")
    print("checked")


if __name__ == "__main__":
    main()
