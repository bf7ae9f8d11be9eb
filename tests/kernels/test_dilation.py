"""Dilated 3x3 kernels: the tables alone know of them, and the kernel of readers, which counts its taps itself."""

import poisoned as layouts
import pytest
import torch
import torch.nn.functional as F
from poisoned import fill, padding, rows
from test_readers import run
from thresholdnet.kernels import launch
from thresholdnet.kernels.configs import convolution_config
from thresholdnet.kernels.tables import k_table
from tolerances import assert_near

DTYPES = (torch.float32, torch.bfloat16)
CASES = (((2, 7, 9), 2), ((1, 4, 6), 3), ((2, 4, 6), 2), ((1, 3, 5), 4), ((3, 1, 1), 2))
"""Images, those that tiles of 2 x 2 pixels would cover among them, and dilations, some beyond them."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "dilation"), CASES)
def test_convolution_and_its_gradients(size, dilation, dtype):
    _, (a, unlinked, b, out) = layouts.arena(*size, (10, 14, 24, 20), dtype)
    fill(a), fill(b)
    weight = torch.randn(20, 34, 3, 3) / 20
    x = torch.cat([b, a], 1).double().requires_grad_()
    exact = weight.to(dtype).double().requires_grad_()
    wanted = F.conv2d(x, exact, padding=dilation, dilation=dilation)
    mean, variance = launch.conv([b, a], weight, out, statistics=True, dilation=dilation)
    assert_near(out, wanted, dtype)
    assert_near(mean, out.double().mean((0, 2, 3)), torch.float32)
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), torch.float32, 10)
    assert unlinked.isnan().all() and not padding(out).any()
    _, (dz, _, dx) = rows(*size, (20, 8, 24), dtype)
    fill(dz)
    of_x, of_weight = torch.autograd.grad(wanted, [x, exact], dz.double())
    launch.gradient([dz], [weight[:, :24]], dx, dilation=dilation)
    assert_near(dx, of_x[:, :24], dtype)
    assert not padding(dx).any()
    assert_near(launch.weight_gradient([b, a], dz, 3, dilation=dilation), of_weight, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "dilation"), CASES)
def test_readers(size, dilation, dtype):
    run(dtype, 24, 2, (10, 14), True, size=size, kernel=3, dilation=dilation)


@pytest.mark.parametrize("size", ((2, 4, 6), (1, 5, 3)))
def test_packed_weights(size):
    """Packed for their dilation they do as those that are packed at the call: no tile of 2 x 2 pixels is theirs."""
    _, (a, b, out, again) = rows(*size, (10, 14, 20, 20), torch.float32)
    fill(a), fill(b)
    weight = torch.randn(20, 24, 3, 3)
    (packed,) = launch.pack([[weight]], a, widths=[(10, 14)], dilations=[2])
    launch.conv([a, b], weight, out, dilation=2)
    launch.conv([a, b], packed, again, dilation=2)
    assert torch.equal(again, out)
    _, (dz, dx, more) = rows(*size, (20, 10, 10), torch.float32)
    fill(dz)
    (turned,) = launch.pack([[weight[:, :10]]], dz, dilations=[3])
    launch.gradient([dz], [weight[:, :10]], dx, dilation=3)
    launch.gradient([dz], [turned], more, dilation=3)
    assert torch.equal(more, dx)


def test_two_runs_are_equal_to_the_bit():
    first, again = (_run_once() for _ in range(2))
    assert all(map(torch.equal, first, again))


def _run_once():
    torch.manual_seed(0)
    _, (a, b, out) = rows(2, 5, 6, (10, 14, 20), torch.bfloat16)
    fill(a), fill(b)
    weight = torch.randn(20, 24, 3, 3)
    launch.conv([a, b], weight, out, dilation=2)
    return out.clone(), launch.weight_gradient([a, b], out, 3, dilation=2)


@pytest.mark.parametrize("capability", ((8, 0), (9, 0), (10, 0)))
def test_no_tile_computes_several_pixels_at_once(capability):
    tiles = [
        convolution_config(capability, "bfloat16", 16, 3, 128 * 56 * 56, 56, 56, dilation=dilation)
        for dilation in (1, 2)
    ]
    assert [tile.group for tile in tiles] == [(2, 2), (1, 1)]
    with pytest.raises(ValueError, match=r"group must be \(1, 1\) with dilation 2, got \(2, 2\)"):
        k_table((), 8, 3, 32, (2, 2), dilation=2)
