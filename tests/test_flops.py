"""torch's FlopCounterMode counts for fused networks what it counts for plain ones, forward and backward."""

import copy

import pytest
import torch
from test_blocks import UNITS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import thresholdnet as tn
from thresholdnet import links
from thresholdnet.models import fuse_blocks


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()


def assert_counts_equal(plain, x, training=True):
    fused = copy.deepcopy(plain)
    assert fuse_blocks(fused, True, "native") > 0
    plain.train(training)
    fused.train(training)
    for run in (lambda model: model(x), lambda model: model(x).sum().backward()):
        counts = flops(lambda run=run: run(plain))
        assert flops(lambda run=run: run(fused)) == counts and sum(counts["Global"].values()) > 0
    fused(x)
    blocks = [module for module in fused.modules() if isinstance(module, tn.ThresholdBlock)]
    assert all(block.backend == "native" for block in blocks)  # again


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ("thresholdnet_ab", "log_densenet121"))
def test_networks(name, training):
    """The second has transitions with a convolution and a pool, fused as well."""
    assert_counts_equal(tn.create_model(name, 5), torch.randn(2, 3, 32, 32), training)


@pytest.mark.parametrize("unit", UNITS)
def test_blocks(unit):
    assert_counts_equal(tn.ThresholdBlock(3, links.harmonic(5), 4, unit=unit), torch.randn(2, 3, 6, 5))


def test_linked_convolution():
    sources = [torch.randn(2, width, 6, 5, requires_grad=True) for width in (3, 4)]
    weight = torch.randn(8, 7, 3, 3, requires_grad=True)
    plain = flops(lambda: nn.functional.conv2d(torch.cat(sources, 1), weight, padding=1).sum().backward())
    ours = flops(lambda: tn.functional.linked_conv2d(sources, weight, backend="native").sum().backward())
    assert plain["Global"] == ours["Global"]
