"""BatchNorm over linked nodes in the order of K: to the bit what its parts give one after the other."""

import pytest
import torch
from poisoned import NAN, fill, rows
from thresholdnet.kernels import launch
from thresholdnet.kernels.configs import ConvolutionConfig
from thresholdnet.kernels.packed_affine import PackedAffine, pack_affine
from thresholdnet.kernels.packed_weights import Matrix, pack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-3
WIDTHS, STARTS = (5, 12, 8), (40, 3, 20)  # not in the statistics' order, nor all of them


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def packed(widths=WIDTHS, dtype=torch.float32, chunk=32, kernel=1, group=(1, 1)):
    """A packed weight of 6 channels."""
    matrix = Matrix(widths, 6, kernel, False, ConvolutionConfig(32, 32, 0, chunk, group=group))
    (made,) = pack([matrix], [[torch.randn(6, sum(widths), kernel, kernel)]], torch.empty(0, dtype=dtype))
    return made


def poisoned(dtype, widths=WIDTHS, starts=STARTS):
    """Statistics of 60 channels, NaN but where the sources' channels are; and where those are, in order."""
    read = torch.cat([torch.arange(start, start + width) for width, start in zip(widths, starts, strict=True)])
    statistics = torch.full((2, 60), NAN, dtype=wide(dtype))
    statistics[:, read] = torch.rand(2, len(read), dtype=wide(dtype))
    return statistics, read


@pytest.mark.parametrize("chunk", (16, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("widths", "starts"), ((WIDTHS, STARTS), ((1,), (59,)), ((60,), (0,))), ids=str)
@pytest.mark.parametrize(("kernel", "group"), ((1, (1, 1)), (3, (1, 1)), (3, (2, 2))), ids=str)
def test_pack_affine(widths, starts, parameters, dtype, chunk, kernel, group):
    weight = packed(widths, dtype, chunk, kernel, group)
    statistics, read = poisoned(dtype, widths, starts)
    gamma, beta = torch.randn(2, 2 * len(read)).to(parameters)[:, ::2]  # not dense
    made, used = pack_affine(weight, gamma, beta, statistics, starts, EPS)
    assert made.matrix == weight.matrix and torch.equal(used, statistics[:, read]) and used._base is None
    affine = torch.stack(launch.batch_norm_affine(gamma, beta, *used, EPS))
    of_pixels = torch.from_numpy(weight.matrix.rows.copy()).long()  # each has a weight there, or -1
    channel = torch.where(of_pixels >= 0, of_pixels // kernel**2, -1).amax(0)
    expected = torch.where(channel >= 0, affine[:, channel], 0)
    assert torch.equal(made.values[:, : len(channel)], expected)
    assert not made.values[:, len(channel) :].any() and made.values.shape[1] == len(channel) + chunk
    scale = gamma.double() / (statistics[1, read].double() + EPS).sqrt()
    formula = torch.stack([scale, beta.double() - statistics[0, read].double() * scale])
    near = {"rtol": 1e-5, "atol": 1e-5} if wide(dtype) == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(
        made.values[:, : len(channel)][:, channel >= 0].double(), formula[:, channel[channel >= 0]], **near
    )


@pytest.mark.parametrize("splits", (1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "group"), ((1, (1, 1)), (3, (1, 1)), (3, (2, 2))), ids=str)
def test_a_convolution_with_both_packed_is_the_same(dtype, splits, kernel, group):
    _, (*sources, out) = rows(2, 4, 6, (*WIDTHS, 6), dtype)
    for source in sources:
        fill(source)
    config = ConvolutionConfig(32, 32, 0, 16, group=group, splits=splits)
    matrix = Matrix(WIDTHS, 6, kernel, False, config)
    values, gamma, beta = torch.randn(6, 25, kernel, kernel), torch.randn(25), torch.randn(25)
    statistics, _ = poisoned(dtype)
    (weight,) = pack([matrix], [[values]], sources[0])
    affine, used = pack_affine(weight, gamma, beta, statistics, STARTS, EPS)
    both = launch.conv(sources, weight, out, affine=affine, statistics=True)
    together = out.clone()
    plain = launch.batch_norm_affine(gamma, beta, *used, EPS)
    sums = launch.conv(sources, values, out, affine=plain, statistics=True, config=config)
    assert torch.equal(together, out) and all(map(torch.equal, both, sums)) and not out.isnan().any()


def test_the_chosen_tile_is_that_of_a_convolution_with_an_affine():
    like = torch.zeros(1, 8, 4, 4)
    values = torch.randn(20, 24, 1, 1)
    made = launch.pack([[values]] * 2, like, widths=[(24,)] * 2, affine=[True, False])
    for each, affine in zip(made, (True, False), strict=True):
        assert each.matrix.config == launch._chosen_config(like, (1, 4, 4), 24, 20, 1, affine, False)


def test_what_cannot_be_packed():
    weight, (statistics, _) = packed(), poisoned(torch.float32)
    gamma, beta = torch.randn(2, 25)
    turned = weight._replace(matrix=weight.matrix._replace(transposed=True))
    for error, words, arguments in (
        (ValueError, "for a convolution", (turned, gamma, beta, statistics, STARTS)),
        (TypeError, "statistics must be torch.float32", (weight, gamma, beta, statistics.double(), STARTS)),
        (ValueError, r"gamma must have the shape \(25,\)", (weight, gamma[1:], beta, statistics, STARTS)),
        (ValueError, r"beta must have the shape \(25,\)", (weight, gamma, beta[None], statistics, STARTS)),
        (ValueError, "statistics must be dense", (weight, gamma, beta, statistics[:, ::2], STARTS)),
        (ValueError, "channels within 60", (weight, gamma, beta, statistics, (40, 3, 53))),
        (ValueError, "one number for each of the 3 sources", (weight, gamma, beta, statistics, (40, 3))),
    ):
        with pytest.raises(error, match=words):
            pack_affine(*arguments, EPS)


def test_an_affine_packed_for_another_convolution():
    _, (*sources, out) = rows(1, 4, 4, (*WIDTHS, 6), torch.float32)
    for source in sources:
        fill(source)
    weight, other = packed(), packed(chunk=64)
    affine, _ = pack_affine(other, torch.ones(25), torch.ones(25), torch.ones(2, 60), STARTS, EPS)
    for given in (affine, PackedAffine(affine.values.double(), weight.matrix)):
        with pytest.raises(ValueError, match="affine must be packed for"):
            launch.conv(sources, weight, out, affine=given)
    with pytest.raises(ValueError, match="only there"):
        launch.conv(sources, torch.randn(6, 25, 1, 1), out, affine=affine)
