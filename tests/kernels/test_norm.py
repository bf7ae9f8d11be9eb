"""BatchNorm's kernels against plain torch in fp64."""

import pytest
import torch
import torch.nn.functional as F
from activated import FUNCTIONS, NAMES
from poisoned import fill, padding, rows, whole
from thresholdnet.kernels import launch
from tolerances import assert_near

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1, 1), (2, 1, 5), (3, 9, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", (*NAMES, None))
def test_normalise(size, dtype, activation):
    _, (z, other) = rows(*size, (20, 14), dtype)
    _, (unlinked, y) = rows(*size, (9, 20), dtype)  # another buffer with other rows
    fill(z)
    scale, shift = torch.randn(20) * 5, torch.randn(20)
    launch.normalise(z, scale, shift, y, activation)
    act = FUNCTIONS[activation]
    assert_near(y, act(z.double() * scale[:, None, None] + shift[:, None, None]), dtype)
    assert not padding(y).any() and other.isnan().all() and unlinked.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", (torch.float32, torch.bfloat16), ids=str)
def test_normalise_by_statistics(parameters, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, (z, other) = rows(3, 9, 7, (20, 14), dtype)
    _, (unlinked, y) = rows(3, 9, 7, (9, 20), dtype)
    fill(z)
    gamma, beta = torch.randn(2, 20).to(parameters)
    mean, variance = torch.randn(2, 40, dtype=wide)[:, ::2].abs()  # not dense
    launch.normalise(z, gamma, beta, y, "relu", statistics=(mean, variance, 1e-3))
    scale = gamma.double() / (variance.double() + 1e-3).sqrt()
    shift = beta.double() - mean.double() * scale
    assert_near(y, F.relu(z.double() * scale[:, None, None] + shift[:, None, None]), dtype)
    assert not padding(y).any() and other.isnan().all() and unlinked.isnan().all()


@pytest.mark.parametrize("wide", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (1, 70, 256, 300))
def test_batch_norm_affine(channels, dtype, wide):
    gamma, beta = torch.randn(2, channels).to(dtype)
    mean, variance = torch.randn(2, 2 * channels, dtype=wide)[:, ::2].abs()  # not dense
    scale, shift = launch.batch_norm_affine(gamma, beta, mean, variance, 1e-3)
    expected = gamma.double() / (variance.double() + 1e-3).sqrt()
    near = {"rtol": 1e-5, "atol": 1e-5} if wide == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(scale, expected.to(wide), **near)
    torch.testing.assert_close(shift, (beta.double() - mean.double() * expected).to(wide), **near)


@pytest.mark.parametrize("wide", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (1, 70, 256, 300))
def test_batch_norm_vectors(channels, dtype, wide):
    gamma, beta = torch.randn(2, channels).to(dtype)
    mean, variance = torch.randn(2, 2 * channels, dtype=wide)[:, ::2].abs()  # not dense
    made = launch.batch_norm_vectors(gamma, beta, mean, variance, 1e-3, 77)
    rstd = (variance.double() + 1e-3).rsqrt()
    scale = gamma.double() * rstd
    rows = [gamma.double(), beta.double(), scale, beta.double() - mean.double() * scale, rstd, -scale / 77]
    near = {"rtol": 1e-5, "atol": 1e-5} if wide == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(made, torch.stack([*rows, -scale / 77 * rstd]).to(wide), **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("given", ((), ("a",), ("mean",), ("a", "mean", "share")), ids=str)
def test_bn_backward(size, dtype, given):
    _, (z, g, other) = rows(*size, (70, 70, 6), dtype)
    fill(z), fill(g)
    q, r = torch.randn(2, 70)
    plain = {"a": torch.ones(70), "mean": torch.zeros(70), "share": torch.ones(2, 70)}
    all_given = {"a": torch.randn(70), "mean": torch.randn(70), "share": torch.randn(2, 70)}
    used = {name: all_given[name] if name in given else None for name in plain}
    a, mean, share = ((all_given if name in given else plain)[name].double()[..., None, None] for name in plain)
    expected = g.double() * a + (z.double() - mean) * (q[:, None, None] * share[1]) + r[:, None, None] * share[0]
    launch.bn_backward(g, z, used["a"], q, r, used["mean"], used["share"])
    assert_near(g, expected, dtype)
    assert not padding(g).any() and other.isnan().all()


def test_bn_backward_where_the_mean_is_many_deviations():
    _, (z, g, _) = rows(4, 8, 8, (70, 70, 6), torch.float32)
    fill(z), fill(g)
    mean, q = torch.full((70,), 3e4), torch.full((70,), 100.0)
    z.add_(3e4)
    expected = g.double() + (z.double() - 3e4) * 100 + 1
    launch.bn_backward(g, z, None, q, torch.ones(70), mean)
    assert_near(g, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", (1, 20, 131))
def test_slot_statistics(size, dtype, channels):
    _, (other, x) = rows(*size, (8, channels), dtype)
    fill(x)
    x.add_(30)
    whole(x)[:, channels:] = 0
    mean, variance = launch.slot_statistics(x)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(mean, x.double().mean((0, 2, 3)), exact)
    assert_near(variance, x.double().var((0, 2, 3), unbiased=False), exact, 10)
    assert other.isnan().all()


def test_nan_stays():
    _, (z, y) = rows(1, 2, 2, (8, 8), torch.float32)
    fill(z)[0, 3, 0, 0] = float("nan")
    launch.normalise(z, torch.ones(8), torch.zeros(8), y, "relu6")
    assert y[0, 3, 0, 0].isnan() and y.isnan().sum() == 1


def test_batch_of_none():
    _, (z, y) = rows(0, 2, 2, (8, 8), torch.float32)
    launch.normalise(z, torch.ones(8), torch.zeros(8), y)
    launch.bn_backward(y, z, None, torch.ones(8), torch.ones(8))
    assert launch.slot_statistics(z)[0].isnan().all()
