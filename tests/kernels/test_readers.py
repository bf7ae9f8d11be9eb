"""The gathered data gradient against its formula in fp64."""

import poisoned as layouts
import pytest
import torch
from activated import NAMES, derivative
from poisoned import fill, padding, rows
from thresholdnet.kernels import launch
from thresholdnet.kernels.configs import ReadersConfig
from tolerances import assert_near
from torch.nn.functional import conv_transpose2d

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def formula(dz, weights, features, gammas, betas, mean, rstd, activation, dtype, dilation=1):
    """(gradient of the features, sums of g, sums of g xhat), without the statistics' share."""
    mean, rstd = mean.double()[:, None, None], rstd.double()[:, None, None]
    xhat = (torch.cat(list(features), 1).double() - mean) * rstd
    total, sums, sums_xhat = 0, [], []
    for d, weight, gamma, beta in zip(dz, weights, gammas, betas, strict=True):
        y = gamma.double()[:, None, None] * xhat + beta.double()[:, None, None]
        spread = {"padding": dilation * (weight.shape[2] // 2), "dilation": dilation}
        g = conv_transpose2d(d.double(), weight.to(dtype).double(), **spread)
        g = g * derivative(y, activation)
        total = total + gamma.double()[:, None, None] * g
        sums.append(g.sum((0, 2, 3)))
        sums_xhat.append((g * xhat).sum((0, 2, 3)))
    return total * rstd, torch.stack(sums), torch.stack(sums_xhat)


def run(
    dtype, depth, readers, widths, add, activation="relu", size=(2, 5, 4), config=None, terms=False, kernel=1,
    dilation=1,
):  # fmt: skip
    _, (*outs, unlinked) = rows(*size, (*widths, 8), dtype)
    _, features = rows(*size, widths, dtype)
    _, dz = layouts.arena(*size, (depth,) * readers, dtype)
    for slot in (*features, *dz):
        fill(slot)
    start = [fill(out).clone() if add else out.clone() for out in outs]
    channels = sum(widths)
    weights = [torch.randn(depth, channels, kernel, kernel) / (kernel * depth**0.5) for _ in range(readers)]
    weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
    gammas, betas = [torch.rand(channels) * 3 for _ in weights], [torch.randn(channels) for _ in weights]
    gammas[0][:3] = betas[0][:3] = 0  # channels that reader 0 lacks
    weights[0][:, :3] = 0
    mean, rstd = torch.randn(channels), torch.rand(channels) + 0.5
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    around = torch.full((2, 2 + channels), float("nan"), dtype=exact)
    room, shares = around[:, 1:-1], [torch.randn(4, channels, dtype=exact)[::2] for _ in weights]
    room.copy_(given := torch.randn(2, channels))
    sums = launch.gradient_of_readers(
        dz, weights, outs, features, gammas, betas, mean, rstd, add=add, activation=activation, config=config,
        terms=(room, shares) if terms else None, dilation=dilation,
    )  # fmt: skip
    g, *expected = formula(dz, weights, features, gammas, betas, mean, rstd, activation, dtype, dilation)
    added = sum(share * torch.stack(both) for share, *both in zip(shares, *expected, strict=True)) if terms else 0
    assert_near(room, given.double() + added, exact)
    assert around[:, 0].isnan().all() and around[:, -1].isnan().all()
    for out, before, part in zip(outs, start, g.split(list(widths), 1), strict=True):
        assert_near(out, part + before.double() if add else part, dtype)
        assert not padding(out).any()
    for got, want in zip(sums, expected, strict=True):
        assert_near(got, want, exact)
    assert unlinked.isnan().all()
    return [*(out.clone() for out in outs), *sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("readers", (1, 2, 4))
@pytest.mark.parametrize("kernel", (1, 3))
def test_dtypes_and_readers(dtype, add, readers, kernel):
    run(dtype, 24, readers, (10, 14, 20), add, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("readers", (1, 2, 4))
def test_terms(dtype, readers):
    run(dtype, 24, readers, (10, 14, 20), True, terms=True)


def test_terms_that_do_not_fit():
    _, (out,), _, (feature,) = *rows(1, 2, 2, (8,), torch.float32), *rows(1, 2, 2, (8,), torch.float32)
    _, (dz,) = layouts.arena(1, 2, 2, (8,), torch.float32)
    ones, both = torch.ones(8), torch.ones(2, 8)
    for terms, error, message in (
        ((both, []), ValueError, "a share for each of the 1 readers, got 0"),
        ((both[:, :7], [both]), ValueError, r"terms\[0\] must have the shape \(2, 8\) and dense rows, got \(2, 7\)"),
        ((both, [both.T.contiguous().T]), ValueError, r"terms\[1\]\[0\] must have the shape"),
        ((both.double(), [both]), TypeError, r"terms\[0\] must be torch.float32, got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            launch.gradient_of_readers(
                [dz], [torch.ones(8, 8, 1, 1)], [out], [feature], [ones], [ones], ones, ones, add=False, terms=terms
            )


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("depth", (3, 16, 128, 300))
def test_depths(depth, kernel):
    run(torch.float32, depth, 2, (6, 12), True, kernel=kernel)


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("size", ((1, 1, 1), (3, 1, 13), (1, 9, 1), (2, 7, 6)), ids=str)
def test_sizes(size, kernel):
    run(torch.float32, 16, 2, (33,), False, "relu6", size, kernel=kernel)


@pytest.mark.parametrize("activation", NAMES)
def test_activations(activation):
    run(torch.float32, 16, 2, (10, 24), True, activation)


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("config", (ReadersConfig(16, 32), ReadersConfig(64, 64, 4, 2)), ids=str)
def test_tiles(config, kernel):
    run(torch.float32, 16, 3, (10, 40), True, config=config, kernel=kernel)


@pytest.mark.parametrize("kernel", (1, 3))
def test_two_runs_are_equal_to_the_bit(kernel):
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(run(torch.bfloat16, 12, 2, (10, 14), True, kernel=kernel))
    assert all(map(torch.equal, *made))


def test_weights_that_do_not_fit():
    _, (out,), _, (feature,) = *rows(1, 2, 2, (8,), torch.float32), *rows(1, 2, 2, (8,), torch.float32)
    _, dz = layouts.arena(1, 2, 2, (8, 8), torch.float32)
    ones = torch.ones(8)
    for sizes, message in (
        ((1, 3), "weights must have one kernel size, got 1 and 3"),
        ((3, 2), r"weights\[1\] must have the shape \(8, 8, k, k\), k 1 or 3, got \(8, 8, 2, 2\)"),
    ):
        weights = [torch.ones(8, 8, size, size) for size in sizes]
        with pytest.raises(ValueError, match=message):
            launch.gradient_of_readers(dz, weights, [out], [feature], [ones] * 2, [ones] * 2, ones, ones, add=False)
