"""The native backend's passes over pixels where rounding decides, in C++ and in torch's operations."""

import pytest
import torch

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
