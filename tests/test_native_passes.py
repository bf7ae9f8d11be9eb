"""The native backend's passes over pixels where rounding decides, in C++ and in torch's operations."""

import pytest
import torch
from activated import FUNCTIONS, NAMES
from tolerances import assert_one_pass

from thresholdnet.backends import csrc, elementwise

PASSES = [pytest.param(csrc, marks=pytest.mark.skipif(csrc.reason() is not None, reason="no C++ library")), elementwise]


@pytest.mark.parametrize("passes", PASSES, ids=("C++", "torch"))
@pytest.mark.parametrize(("dtype", "bits"), ((torch.float32, 24), (torch.float64, 53)), ids=str)
def test_a_mean_of_many_deviations_does_not_cancel(passes, dtype, bits):
    """Numbers from `2^bits` on lie 2 apart: three times one is rounded, its distance times three is not."""
    distance = 2 * torch.arange(24).to(dtype).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    g, mean = torch.ones_like(distance), torch.full((3,), 2.0**bits, dtype=dtype)
    three, five = torch.full_like(mean, 3), torch.full_like(mean, 5)
    made = passes.linear(g, distance + 2.0**bits, None, three, five, mean, False)
    assert torch.equal(made, 3 * distance + 6)


@pytest.mark.parametrize("passes", PASSES, ids=("C++", "torch"))
@pytest.mark.parametrize("wide", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_batch_norm_vectors(passes, dtype, wide):
    """Written out; parameters narrower or wider than the statistics, which need not be dense."""
    gamma, beta = torch.randn(20, 2).to(dtype).T
    mean, variance = torch.rand(20, 2, dtype=wide).T
    made = passes.batch_norm_vectors(gamma, beta, mean, variance, 1e-3, 50)
    assert made.dtype == wide
    rstd = (variance.double() + 1e-3).rsqrt()
    scale = gamma.double() * rstd
    rows = [gamma.double(), beta.double(), scale, beta.double() - mean.double() * scale, rstd, -scale / 50]
    assert_one_pass(made, torch.stack([*rows, -scale / 50 * rstd]), wide)
    affine = passes.batch_norm_affine(gamma, beta, mean, variance, 1e-3)
    assert_one_pass(torch.stack(affine), torch.stack(rows[2:4]), wide)


@pytest.mark.parametrize("passes", PASSES, ids=("C++", "torch"))
def test_batch_norm_vectors_of_channels_and_ranks(passes):
    """An eps of each channel, and the pixels of all ranks as a tensor."""
    gamma, beta, mean, variance, eps = torch.rand(5, 20, dtype=torch.float64)
    made = passes.batch_norm_vectors(gamma, beta, mean, variance, eps, torch.tensor(50))
    each = [
        passes.batch_norm_vectors(*(v[i : i + 1] for v in (gamma, beta, mean, variance)), eps[i].item(), 50)
        for i in range(20)
    ]
    assert_one_pass(made, torch.cat(each, 1), torch.float64)


@pytest.mark.parametrize("passes", PASSES, ids=("C++", "torch"))
@pytest.mark.parametrize("activation", NAMES)
def test_gathered_values_are_activated(passes, activation):
    sources = [
        torch.linspace(-9, 9, 2 * c * 6).view(2, c, 3, 2).contiguous(memory_format=torch.channels_last) for c in (3, 1)
    ]
    scale, shift = torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([0.0, 1.0, 2.0, -1.0])
    y = torch.cat(sources, 1).double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    wanted = FUNCTIONS[activation](y)
    assert y.max() > 6 and y.min() < 0
    assert_one_pass(passes.gather(sources, (scale, shift), activation), wanted, torch.float32)
