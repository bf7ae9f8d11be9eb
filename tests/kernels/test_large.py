"""Offsets near 2^31 elements: the last image of slots as large as the launchers take, against torch on it alone.

Such slots span 4 GB, of which nothing is touched but the first and the last image: torch.empty takes address space, and
the system's zeros lie between. Kernels that write run their last programs alone; what reads, runs whole.
"""

import pytest
import torch
import torch.nn.functional as F
import watched
from thresholdnet.kernels import launch, slots
from thresholdnet.kernels.configs import ConvolutionConfig, ReadersConfig, WeightGradientConfig
from tolerances import assert_near

DTYPE = torch.float16
IMAGES, SIDE = 63, 32
WIDTHS = (16, 2**15 - 48, 16, 16)  # rows of 2^15: 63 * 32 * 32 * 2^15 elements are 98.4 % of 2^31
CONVOLUTION = ConvolutionConfig(rows=128, columns=16, columns2=0, chunk=32)
LAST = SIDE * SIDE // 16  # programs that hold the last image, and more of larger tiles


@pytest.fixture
def large():
    """(first slot, one at the end of the rows, the one behind it), whose last images hold something."""

    def make():
        try:
            first, _, third, fourth = slots.allocate(IMAGES, WIDTHS, SIDE, SIDE, dtype=DTYPE, device="cpu")
        except RuntimeError as error:
            pytest.skip(f"needs 4 GB of address space: {error}")
        for slot in (first, third, fourth):
            slots.write(slot[-1:], torch.randn(1, 16, SIDE, SIDE))
        return first, third, fourth

    return make


def last(*tensors):
    """The last images, exactly."""
    return [tensor[-1:].double() for tensor in tensors]


@pytest.fixture
def at_the_end():
    """Launches run the last programs of the dimensions that are long."""
    with watched.programs(lambda index, grid: all(i >= n - LAST for i, n in zip(index, grid, strict=True))):
        yield


@pytest.mark.parametrize("kernel_size", (1, 3))
def test_convolution(large, at_the_end, kernel_size):
    first, third, out = large()
    weight = torch.randn(16, 32, kernel_size, kernel_size, dtype=DTYPE) / 8
    launch.conv([first, third], weight, out, statistics=True, config=CONVOLUTION)
    expected = F.conv2d(torch.cat(last(first, third), 1), weight.double(), padding=kernel_size // 2)
    assert_near(out[-1:], expected, DTYPE)


def test_masked_gradient(large, at_the_end):
    first, third, out = large()
    z, *_ = large()
    before, weights = out[-1:].double(), [torch.randn(16, 16, 3, 3, dtype=DTYPE) / 8 for _ in range(2)]
    scale, shift, mean, rstd = torch.rand(4, 16)
    mask = launch.Mask(z, scale, shift, mean, rstd)
    launch.gradient([first, third], weights, out, add=True, mask=mask, config=CONVOLUTION)
    expected = before + F.conv_transpose2d(torch.cat(last(first, third), 1), torch.cat(weights).double(), padding=1)
    passed = last(z)[0] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) > 0
    assert_near(out[-1:], expected * passed, DTYPE)


def test_passes_over_pixels(large, at_the_end):
    z, _, out = large()
    scale, shift = torch.rand(2, 16)
    launch.normalise(z, scale, shift, out, "relu6")
    y = (last(z)[0] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp(0, 6)
    assert_near(out[-1:], y, DTYPE)
    launch.bn_backward(out, z, None, scale, shift)
    assert_near(out[-1:], y + last(z)[0] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), DTYPE, 2)


def test_gathered_readers(large, at_the_end):
    feature, first, second = large()
    *_, out = large()
    gamma, beta, mean, rstd = torch.rand(4, 16)
    weights = [torch.randn(16, 16, 1, 1, dtype=DTYPE) / 4 for _ in range(2)]
    added = last(out)[0]
    launch.gradient_of_readers(
        [first, second], weights, [out], [feature], [gamma] * 2, [beta] * 2, mean, rstd, add=True,
        config=ReadersConfig(64, 16),
    )  # fmt: skip
    g = sum(F.conv_transpose2d(dz, weight.double()) for dz, weight in zip(last(first, second), weights, strict=True))
    xhat = (last(feature)[0] - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)
    g = g * (gamma.view(-1, 1, 1) * xhat + beta.view(-1, 1, 1) > 0) * gamma.view(-1, 1, 1) * rstd.view(-1, 1, 1)
    assert_near(out[-1:], added + g, DTYPE)


@pytest.mark.parametrize("kernel_size", (1, 3))
def test_weight_gradient(large, kernel_size):
    """All pixels: the others are zeros."""
    first, third, dz = large()
    config = WeightGradientConfig(rows=1024, chunk=32, columns=16)
    made = launch.weight_gradient([first, third], dz, kernel_size, config=config)
    x = torch.cat(last(first, third), 1)
    shape = (16, 32, kernel_size, kernel_size)
    expected = torch.nn.grad.conv2d_weight(x, shape, *last(dz), padding=kernel_size // 2)
    assert_near(made, expected, torch.float32)


def test_statistics(large):
    slot, *_ = large()
    mean, variance = launch.slot_statistics(slot)
    total, squares = (last(slot)[0] ** power for power in (1, 2))
    wanted = total.sum((0, 2, 3)) / (IMAGES * SIDE**2)
    assert_near(mean, wanted, torch.float32)
    assert_near(variance, squares.sum((0, 2, 3)) / (IMAGES * SIDE**2) - wanted**2, torch.float32)
