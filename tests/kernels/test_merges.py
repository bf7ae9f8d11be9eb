"""What joins partial results: many tiles and splits, in the interpreter's tiles and in those of a GPU."""

import poisoned as layouts
import pytest
import torch
from poisoned import fill, rows
from thresholdnet.kernels import launch, weight_gradients
from thresholdnet.kernels import tiles as tiles_of_small_kernels
from thresholdnet.kernels.configs import ConvolutionConfig, WeightGradientConfig
from tolerances import assert_near

EXACT = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


@pytest.fixture(params=(True, False), ids=("interpreter's", "GPU's"), autouse=True)
def tiles(request, monkeypatch):
    """The choices of tiles for what merges."""
    monkeypatch.setattr(tiles_of_small_kernels, "INTERPRETED", request.param)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("channels", (1, 12, 40))
@pytest.mark.parametrize("size", ((1, 1, 1024), (1, 33, 33)), ids=str)
def test_statistics(size, channels, dtype):
    _, (x,) = rows(*size, (channels,), dtype)
    fill(x)
    mean, variance = launch.slot_statistics(x)
    assert_near(mean, x.double().mean((0, 2, 3)), EXACT[dtype])
    assert_near(variance, x.double().var((0, 2, 3), unbiased=False), EXACT[dtype])


@pytest.mark.parametrize("bands", (1, 15, 16, 17, 64))
def test_statistics_of_a_GPUs_many_bands(bands, monkeypatch):
    """The form that reads twice, with the tile's own number of bands."""
    chosen = launch.merge_tile(10**6, torch.float32)
    monkeypatch.setattr(launch, "merge_tile", lambda *_: (16, *chosen[1:]))
    _, (x,) = rows(1, 1, 64 * bands - 5, (20,), torch.float64)
    fill(x)
    x.add_(1e6)  # a sum of squares would have lost the variance
    mean, variance = launch.slot_statistics(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-15, atol=0)
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False), rtol=1e-9, atol=0)


@pytest.mark.parametrize("group", ((1, 1), (1, 2), (2, 2)), ids=str)
def test_groups(group):
    _, (a, z, out) = rows(1, 12, 16, (8, 12, 12), torch.float32)
    fill(a), fill(z)
    config = ConvolutionConfig(16, 64, 0, 16, group=group)
    weight = torch.randn(12, 8, 3, 3) / 8
    mean, variance = launch.conv([a], weight, out, statistics=True, config=config)
    assert_near(mean, out.double().mean((0, 2, 3)), torch.float32)
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), torch.float32)
    one, zero = torch.ones(12), torch.zeros(12)
    sums = launch.gradient([a], [weight.transpose(0, 1)], out, mask=(z, one, zero, zero, one), config=config)
    assert_near(sums[0], out.double().sum((0, 2, 3)), torch.float32)
    assert_near(sums[1], (out.double() * z.double()).sum((0, 2, 3)), torch.float32)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("splits", "widths"), ((1, (10, 17)), (5, (3, 20)), (300, (3, 1))), ids=str)
def test_splits(splits, widths, dtype, monkeypatch):
    _, (a, dz) = layouts.arena(1, 1, 16 * splits, widths, torch.float32)
    fill(a, integers=True), fill(dz, integers=True)
    monkeypatch.setattr(weight_gradients, "weight_gradient_splits", lambda *_: splits)
    got = launch.weight_gradient([a], dz, 1, config=WeightGradientConfig(16, 16, 16), dtype=dtype)
    wanted = torch.nn.grad.conv2d_weight(a.double(), got.shape, dz.double())
    assert torch.equal(got, wanted.to(got.dtype))


@pytest.mark.parametrize(("elements", "splits"), ((100, 6), (10**5, 6), (10**6, 6), (100, 1), (100, 3), (10**6, 3)))
def test_split_tiles(elements, splits, monkeypatch):
    """Each of the tiles, whatever the size asks for."""
    tile = weight_gradients.reduce_tile(elements, 48, splits)
    monkeypatch.setattr(weight_gradients, "reduce_tile", lambda *_: tile)
    _, (a, dz) = rows(1, 12, 8, (19, 41), torch.float32)
    fill(a, integers=True), fill(dz, integers=True)
    monkeypatch.setattr(weight_gradients, "weight_gradient_splits", lambda *_: splits)
    got = launch.weight_gradient([a], dz, 3, config=WeightGradientConfig(16, 16, 16))
    assert torch.equal(got.double(), torch.nn.grad.conv2d_weight(a.double(), got.shape, dz.double(), padding=1))


@pytest.mark.parametrize("count", (2, 5, weight_gradients.MOST_GRADIENTS + 3))
def test_several_gradients_are_what_each_is_alone(count, monkeypatch):
    """Of several shapes, splits, dtypes and formats; a launch for each dtype in a row, of MOST_GRADIENTS at most."""
    later, alone, together, launches = [], [], [], []
    for i in range(count):
        _, (a, dz) = rows(1, 5 + i % 3, 4, (8 * (i % 2) + 3, 8 * (i % 3) + 5), torch.float32)
        fill(a), fill(dz)
        kernel_size, dtype = (3, 1)[i % 2], torch.bfloat16 if i >= count // 2 else None
        options = {"channels_last": i % 3 == 0, "dtype": dtype, "config": WeightGradientConfig(16, 16, 16)}
        monkeypatch.setattr(weight_gradients, "weight_gradient_splits", lambda *_, splits=1 + i % 4: splits)
        alone.append(launch.weight_gradient([a], dz, kernel_size, **options))
        together.append(launch.weight_gradient([a], dz, kernel_size, later=later, **options))
    monkeypatch.setattr(
        weight_gradients, "start", lambda kernel, grid, *a, **o: launches.append(grid) or kernel[grid](*a, **o)
    )
    launch.reduce_splits(later)
    assert [each.result for each in later] == together and len(launches) == 2
    for one, other in zip(alone, together, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
