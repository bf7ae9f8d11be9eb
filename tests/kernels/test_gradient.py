"""The data gradient and the weight gradient against autograd in fp64 on the same rounded operands."""

import poisoned as layouts
import pytest
import torch
from activated import FUNCTIONS, NAMES, derivative
from poisoned import fill, padding, rows, whole
from thresholdnet.kernels import launch
from thresholdnet.kernels.configs import ConvolutionConfig, WeightGradientConfig
from thresholdnet.kernels.packed_weights import MOST_WEIGHTS
from tolerances import assert_near

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1, 1), (2, 1, 5), (2, 5, 7), (1, 6, 4))


def input_gradient(dz, weights, dtype):
    """Sum over the readers of conv2d's gradient by its input."""
    total = 0
    for d, weight in zip(dz, weights, strict=True):
        shape = (d.shape[0], weight.shape[1], *d.shape[2:])
        w = weight.to(dtype).double()
        total = total + torch.nn.grad.conv2d_input(shape, w, d.double(), padding=w.shape[2] // 2)
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_plain(size, dtype, kernel_size):
    _, (a, unlinked, b, out) = rows(*size, (10, 14, 24, 20), dtype)
    fill(a), fill(b)
    wide = torch.randn(10, 50, kernel_size, kernel_size) / 10  # the reader's whole weight: this slot has a slice of it
    weights = [wide[:, 7:27], torch.randn(24, 20, kernel_size, kernel_size) / 10]
    assert launch.gradient([a, b], weights, out) is None
    assert_near(out, input_gradient([a, b], weights, dtype), dtype)
    assert unlinked.isnan().all() and not padding(out).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("size", ((2, 5, 3), (1, 4, 6)), ids=str)
def test_mask_and_sums(size, add, activation, dtype):
    _, (a, b, out) = rows(*size, (10, 14, 20), dtype)
    _, (_, z) = rows(*size, (6, 20), dtype)  # another buffer with other rows
    fill(a), fill(b), fill(z)
    start = fill(out).clone()
    if add:
        padding(out).fill_(float("nan"))  # whatever lies in the padding: it is written as zeros
    weights = [torch.randn(10, 20, 3, 3) / 10, torch.randn(14, 20, 3, 3) / 10]
    scale, shift, mean, rstd = torch.rand(20) * 5, torch.randn(20), torch.randn(20), torch.rand(20)
    sums = launch.gradient([a, b], weights, out, add=add, mask=(z, scale, shift, mean, rstd), activation=activation)
    g = input_gradient([a, b], weights, dtype) + (start.double() if add else 0)
    y = z.double() * scale[:, None, None] + shift[:, None, None]
    g = g * derivative(y, activation)
    assert_near(out, g, dtype)
    xhat = (z.double() - mean[:, None, None]) * rstd[:, None, None]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(sums[0], out.double().sum((0, 2, 3)), exact)
    assert_near(sums[1], (out.double() * xhat).sum((0, 2, 3)), exact)
    assert not padding(out).any()


def test_add_leaves_no_poison_in_the_padding():
    _, (dz, out) = rows(2, 3, 3, (8, 12), torch.float32)
    fill(dz)
    start = fill(out).clone()
    padding(out).fill_(float("nan"))
    weight = torch.randn(8, 12, 3, 3)
    launch.gradient([dz], [weight], out, add=True)
    assert_near(out, input_gradient([dz], [weight], out.dtype) + start.double(), out.dtype)
    assert not padding(out).any()


@pytest.mark.parametrize("add", (False, True))
def test_a_slot_without_readers(add):
    _, (z, out) = rows(2, 3, 3, (12, 12), torch.float32)
    start = fill(out).clone()
    fill(z)
    one, zero = torch.ones(12), torch.zeros(12)
    sums = launch.gradient([], [], out, add=add, mask=(z, one, zero, zero, one))
    g = start * (z > 0) if add else torch.zeros_like(start)
    assert torch.equal(out, g)
    assert_near(sums[1], (g * z).sum((0, 2, 3)), torch.float32)


@pytest.mark.parametrize(
    "config",
    (
        ConvolutionConfig(16, 16, 0, 16),
        ConvolutionConfig(32, 32, 16, 64),
        ConvolutionConfig(16, 64, 32, 32, group=(2, 2)),
    ),
    ids=str,
)
def test_every_tile_form_gives_the_same(config):
    _, (a, b, z, out) = layouts.arena(2, 4, 6, (10, 14, 22, 22), torch.float32)
    fill(a), fill(b), fill(z), fill(out)
    start = out.clone()
    weights = [torch.randn(10, 22, 3, 3) / 10, torch.randn(14, 22, 3, 3) / 10]
    one, zero = torch.ones(22), torch.zeros(22)
    sums = launch.gradient([a, b], weights, out, add=True, mask=(z, one, zero, zero, one), config=config)
    g = (input_gradient([a, b], weights, out.dtype) + start.double()) * (z > 0)
    assert_near(out, g, out.dtype)
    assert_near(sums[0], g.sum((0, 2, 3)), out.dtype)
    assert_near(sums[1], (g * z).sum((0, 2, 3)), out.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype):
    _, (a, dz, out) = rows(2, 4, 5, (9, 7, 9), dtype)
    fill(a, integers=True), fill(dz, integers=True)
    weight = torch.randint(-1, 2, (7, 9, 3, 3)).float() * (torch.rand(7, 9, 1, 1) < 0.3)
    launch.gradient([dz], [weight], out)
    assert torch.equal(out.double(), input_gradient([dz], [weight], dtype))
    got = launch.weight_gradient([a], dz, 3)
    assert torch.equal(got.double(), torch.nn.grad.conv2d_weight(a.double(), weight.shape, dz.double(), padding=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_weight_gradient(size, dtype, kernel_size):
    buffer, (a, _, b, dz) = rows(*size, (10, 14, 24, 20), dtype)
    fill(a), fill(b), fill(dz)
    before = buffer.nan_to_num(nan=7.0)
    got = launch.weight_gradient([b, a], dz, kernel_size)
    x = torch.cat([b, a], 1).double()
    shape = (20, 34, kernel_size, kernel_size)
    exact = torch.float64 if dtype == torch.float64 else torch.float32  # products of rounded operands are exact in it
    assert got.dtype == exact
    assert_near(got, torch.nn.grad.conv2d_weight(x, shape, dz.double(), padding=kernel_size // 2), exact)
    laid = launch.weight_gradient([b, a], dz, kernel_size, channels_last=True)
    assert got.is_contiguous() and laid.is_contiguous(memory_format=torch.channels_last) and torch.equal(laid, got)
    assert torch.equal(buffer.nan_to_num(nan=7.0), before)


@pytest.mark.parametrize("layout", (rows, layouts.arena), ids=("rows", "arena"))
@pytest.mark.parametrize("activation", (*NAMES, None))
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_weight_gradient_with_affine(activation, kernel_size, layout):
    _, (a, b, dz) = layout(2, 5, 4, (10, 14, 36), torch.bfloat16)
    fill(a), fill(b), fill(dz)
    scale, shift = torch.rand(24) * 6, torch.randn(24)
    got = launch.weight_gradient([a, b], dz, kernel_size, affine=(scale, shift), activation=activation)
    x = torch.cat([a, b], 1).double() * scale[:, None, None] + shift[:, None, None]
    x = FUNCTIONS[activation](x).to(torch.bfloat16).double()
    shape = (36, 24, kernel_size, kernel_size)
    assert_near(got, torch.nn.grad.conv2d_weight(x, shape, dz.double(), padding=kernel_size // 2), torch.bfloat16)


@pytest.mark.parametrize(
    "config",
    (
        WeightGradientConfig(16, 64, 16),
        WeightGradientConfig(64, 16, 32, swapped=True),
        WeightGradientConfig(16, 32, 64),
    ),
    ids=str,
)
def test_weight_gradient_tiles(config):
    _, (a, b, dz) = rows(2, 5, 4, (10, 14, 41), torch.float32)
    fill(a), fill(b), fill(dz)
    got = launch.weight_gradient([a, b], dz, 3, config=config, dtype=torch.float64)
    x = torch.cat([a, b], 1).double()
    assert got.dtype == torch.float64
    assert_near(got, torch.nn.grad.conv2d_weight(x, (41, 24, 3, 3), dz.double(), padding=1), torch.float32)


def test_two_runs_are_equal_to_the_bit():
    _, (a, dz, out) = rows(2, 9, 5, (10, 14, 10), torch.float32)
    fill(a), fill(dz)
    weight = torch.randn(14, 10, 3, 3)
    runs = []
    for _ in range(2):
        whole(out).fill_(float("nan"))
        launch.gradient([dz], [weight], out)
        runs.append((out.clone(), launch.weight_gradient([a], dz, 3)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_batch_of_none():
    _, (a, dz, out) = rows(0, 3, 3, (8, 8, 8), torch.float32)
    assert not launch.weight_gradient([a], dz, 3).any()
    vectors = [torch.ones(8)] * 4
    sums = launch.gradient([dz], [torch.ones(8, 8, 3, 3)], out, mask=(a, *vectors))
    assert not sums[0].any() and not sums[1].any()


@pytest.mark.parametrize("readers", (9, MOST_WEIGHTS + 1))
@pytest.mark.parametrize("group", ((1, 1), (2, 2)), ids=str)
def test_many_readers(readers, group):
    _, (*dz, out) = rows(1, 4, 6, (*(3 + i % 9 for i in range(readers)), 12), torch.float32)
    for slot in dz:
        fill(slot)
    weights = [torch.randn(d.shape[1], 40, 3, 3)[:, 5:17] / 10 for d in dz]
    launch.gradient(dz, weights, out, config=ConvolutionConfig(16, 64, 0, 32, group=group))
    assert_near(out, input_gradient(dz, weights, out.dtype), out.dtype)
