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


def largest_error(actual, expected, least=1e-30):
    """The largest difference of two elements, relative to the largest element, or to `least` if that is larger."""
    scale = max(expected.abs().max().item(), least)
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_close(actual, expected, dtype=None, what=""):
    """Per element, relative to the largest element."""
    dtype = dtype or expected.dtype
    assert actual.shape == expected.shape, what
    if expected.numel() == 0:
        return
    error = largest_error(actual, expected, least=1e-12)
    assert error <= RELATIVE[dtype], f"{what}: {error:.2e} > {RELATIVE[dtype]:.0e}"


# One pass over pixels, against the same in fp64 on the same rounded operands: an element is rounded once to its dtype,
# half a unit in the last place, which bf16 and fp16 alone feel; fp32 may cancel inside, so its error is of the largest.
PASS_RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PASS_ABSOLUTE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 2**-25}


def assert_one_pass(actual, expected, dtype):
    """Per element, within the rounding of one pass in `dtype`; `expected` in fp64."""
    assert actual.shape == expected.shape
    largest = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=PASS_RELATIVE[dtype], atol=PASS_ABSOLUTE[dtype] * largest, equal_nan=True
    )


# Winograd's F(4x4, 3x3) in fp32 against fp64. Its transforms multiply by up to 8 and cancel, which costs one to two of
# fp32's digits: one convolution is held relative to its largest element (up to 1e-5 was seen), and whole blocks, some
# layers deep and with statistics between, by their rms_error.
WINOGRAD = 3e-5
WINOGRAD_BLOCK = 3e-5


# Of blocks of volumes in half formats, our error from fp64 over plain torch's. A feature's gradient is rounded once
# more on our side, before the statistics' share: up to 1.15 was seen over all parameters, as of images on some seeds.
HALF_VOLUMES = 1.2


def rms_error(actual, expected):
    """Root mean square of the difference over that of `expected`."""
    difference = actual.double() - expected.double()
    return (difference.square().mean().sqrt() / expected.double().square().mean().sqrt().clamp_min(1e-12)).item()
