"""The one table of tolerances, and why each is what it is.

A result is compared as max |a - b| <= tolerance * max |b|: layers sum hundreds of products, so a single small element
may carry the rounding of large ones. Half formats have no entry: a ReLU mask that flips near 0 moves whole gradients,
on either side, so tests hold ours and plain torch's error from fp64 against each other (rms_error).
"""

import torch

RELATIVE = {
    torch.float64: 1e-10,  # two orders of summation in fp64, twenty layers deep
    torch.float32: 5e-5,  # fp32 sums of up to 9 x 708 products, a dozen layers deep
}


def assert_close(actual, expected, dtype=None, what=""):
    """Per element, relative to the largest element."""
    dtype = dtype or expected.dtype
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1e-12)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= RELATIVE[dtype], f"{what}: {error:.2e} > {RELATIVE[dtype]:.0e}"


def rms_error(actual, expected):
    """Root mean square of the difference over that of `expected`."""
    difference = actual.double() - expected.double()
    return (difference.square().mean().sqrt() / expected.double().square().mean().sqrt().clamp_min(1e-12)).item()
