"""How far a kernel may be from the same computation in fp64 on the same rounded operands; one table for all tests.

A result is rounded once to its slot's dtype, so an element may be off by half a unit in the last place (2^-9 of it in
bf16, 2^-12 in fp16, 2^-24 in fp32), plus fp32 accumulation: a few 2^-24 of the summed magnitudes, which cancellation
leaves as an absolute error. Two rounded steps (a weight packed from fp32, an affine on load) double the first part.
"""

import torch

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # x largest


def assert_near(got, expected, dtype, factor=1.0):
    """Fail unless `got` is within the dtype's tolerance of `expected` (fp64), `factor` times for chains of kernels."""
    expected = expected.detach().double()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        got.detach().double(), expected, rtol=RELATIVE[dtype] * factor, atol=ABSOLUTE[dtype] * factor * (largest + 1e-6)
    )
