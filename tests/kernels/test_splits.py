"""Splits of K against conv2d and autograd in fp64: every epilogue, whatever a split gets, in memory full of NaN."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from poisoned import arena, fill, padding, rows
from test_conv import expected, random_weight
from test_gradient import input_gradient
from thresholdnet.kernels import launch
from thresholdnet.kernels.configs import MOST_SPLITS, ConvolutionConfig
from tolerances import assert_near

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILES = {
    "narrow": ConvolutionConfig(16, 16, 0, 16),  # the 22 channels below take two tiles of columns
    "two parts": ConvolutionConfig(64, 32, 16, 32),
    "four pixels": ConvolutionConfig(16, 32, 16, 32, group=(2, 2)),
}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Fills new memory with NaN; names the kernels that were started, with their grids."""
    seen, start = [], launch.start

    def noted(kernel, grid, *arguments, **options):
        seen.append((kernel.__name__, grid))
        start(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "start", noted)
    torch.use_deterministic_algorithms(True)
    yield seen
    torch.use_deterministic_algorithms(False)


def split(launched):
    """The splits of the last convolution."""
    return [grid[2] for name, grid in launched if name == "convolution"][-1]


def with_splits(name, splits):
    return replace(TILES[name], splits=splits)


@pytest.mark.parametrize("splits", (2, 3, 7, MOST_SPLITS))
@pytest.mark.parametrize("name", TILES)
def test_statistics(name, splits, launched):
    _, (a, unlinked, b, out) = rows(3, 4, 6, (10, 14, 24, 22), torch.float32)
    fill(a), fill(b)
    weight = random_weight(22, 34, 3)
    mean, variance = launch.conv([a, b], weight, out, statistics=True, config=with_splits(name, splits))
    assert_near(out, expected([a, b], weight, out.dtype), out.dtype)
    assert_near(mean, out.double().mean((0, 2, 3)), out.dtype)
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), out.dtype)
    assert unlinked.isnan().all() and not padding(out).any()
    assert "finish_splits" in dict(launched) and 1 < split(launched) <= splits


@pytest.mark.parametrize("layout", (rows, arena), ids=("rows", "arena"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "kernel_size"), (((1, 1, 1), 3), ((2, 5, 7), 3), ((2, 5, 7), 1)), ids=str)
def test_sizes_dtypes_and_layouts(size, kernel_size, dtype, layout):
    _, (a, b, out) = layout(*size, (10, 40, 20), dtype)
    fill(a, integers=True), fill(b, integers=True)
    weight = torch.randint(-1, 2, (20, 50, kernel_size, kernel_size)).float() * (torch.rand(20, 50, 1, 1) < 0.2)
    launch.conv([a, b], weight, out, config=with_splits("narrow", 3))
    assert torch.equal(out.double(), expected([a, b], weight, dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_affine_on_load(dtype, kernel_size):
    _, (a, b, out) = rows(2, 5, 4, (10, 40, 24), dtype)
    fill(a), fill(b)
    affine = torch.rand(50) * 6, torch.randn(50)
    weight = random_weight(24, 50, kernel_size)
    options = {"affine": affine, "activation": "relu6", "statistics": True}
    mean, variance = launch.conv([a, b], weight, out, config=with_splits("two parts", 2), **options)
    assert_near(out, expected([a, b], weight, dtype, affine, "relu6"), dtype)
    assert_near(mean, out.double().mean((0, 2, 3)), torch.float32)
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), torch.float32)


@pytest.mark.parametrize("name", TILES)
def test_bias(name):
    _, (a, out) = rows(1, 4, 6, (27, 22), torch.float32)
    fill(a)
    weight, bias = random_weight(22, 27, 3) * 4, torch.randn(22) * 3
    launch.conv([a], weight, out, bias=bias, config=with_splits(name, 5))
    assert_near(out, F.relu(expected([a], weight, out.dtype) + bias[:, None, None]), out.dtype)
    assert not padding(out).any()


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", TILES)
def test_gradient(name, masked, add):
    _, (a, b, out) = arena(2, 4, 6, (10, 14, 22), torch.float32)
    _, (_, z) = rows(2, 4, 6, (6, 22), torch.float32)
    fill(a), fill(b), fill(z)
    start = fill(out).clone()
    padding(out).fill_(float("nan"))
    weights = [torch.randn(10, 22, 3, 3) / 10, torch.randn(14, 22, 3, 3) / 10]
    scale, shift, mean, rstd = torch.rand(22) * 5, torch.randn(22), torch.randn(22), torch.rand(22)
    mask = (z, scale, shift, mean, rstd) if masked else None
    sums = launch.gradient([a, b], weights, out, add=add, mask=mask, config=with_splits(name, 4))
    g = input_gradient([a, b], weights, out.dtype) + (start.double() if add else 0)
    if masked:
        g = g * (z * scale[:, None, None] + shift[:, None, None] > 0)
        xhat = (z.double() - mean[:, None, None]) * rstd[:, None, None]
        assert_near(sums[0], out.double().sum((0, 2, 3)), out.dtype)
        assert_near(sums[1], (out.double() * xhat).sum((0, 2, 3)), out.dtype)
    assert_near(out, g, out.dtype)
    assert not padding(out).any()


def test_a_split_has_a_chunk_at_least(launched):
    _, (a, out) = rows(1, 3, 3, (40, 8), torch.float32)
    fill(a)
    weight = random_weight(8, 40, 1)
    launch.conv([a], weight, out, config=with_splits("narrow", 30))
    assert split(launched) == 3, "40 channels are three chunks of 16"
    assert_near(out, expected([a], weight, out.dtype), out.dtype)
    launch.conv([a], weight, out, config=with_splits("two parts", 2))
    launch.gradient([], [], out, config=with_splits("narrow", 2))
    assert split(launched) == 1 and not out.any(), "a slot without readers has no chunk"


def test_the_products_stay_below_what_an_int32_reaches(launched, monkeypatch):
    _, (a, out) = rows(1, 4, 4, (40, 8), torch.float32)
    fill(a)
    weight = random_weight(8, 40, 3)
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 5 * 16 * 16 + 1)
    launch.conv([a], weight, out, config=with_splits("narrow", 8))
    assert split(launched) == 5
    assert_near(out, expected([a], weight, out.dtype), out.dtype)


def test_two_runs_are_equal_to_the_bit():
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        _, (a, out) = rows(2, 5, 6, (40, 12), torch.float32)
        fill(a)
        sums = launch.conv([a], random_weight(12, 40, 3), out, statistics=True, config=with_splits("narrow", 6))
        results.append((*sums, out.clone()))
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))
