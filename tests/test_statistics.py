"""Running statistics as nn.BatchNorm2d keeps them, in whatever way somebody has set it."""

import copy

import pytest
import torch
from test_blocks import UNITS
from tolerances import assert_close
from torch import nn

from thresholdnet import ThresholdBlock, links


def trained(block, x, change):
    """Buffers after a step in training, and what the block gives in eval mode then."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        change(norm)
    block.train()
    for _ in range(3):
        block(x)
    buffers = dict(block.named_buffers())
    return buffers, block.eval()(x if len(x) else x.new_ones(1, *x.shape[1:])).detach()


def untracked(norm):
    norm.track_running_stats = False


def uncounted(norm):
    norm.num_batches_tracked = None


def averaged(norm):
    norm.momentum = None


def neither(norm):
    norm.num_batches_tracked = norm.momentum = None


@pytest.mark.parametrize("batch", (2, 0))
@pytest.mark.parametrize("change", (lambda norm: None, untracked, uncounted, averaged, neither))
@pytest.mark.parametrize("unit", UNITS)
def test_buffers_are_the_plain_blocks(unit, change, batch):
    """An empty batch is counted and changes no statistics; its mean would be NaN for good."""
    torch.manual_seed(0)
    plain = ThresholdBlock(5, links.dense(3), 4, unit=unit, dtype=torch.float64)
    fused = copy.deepcopy(plain).fuse(True, "native")
    x = torch.randn(batch, 5, 6, 7, dtype=torch.float64)
    (expected, wanted), (found, got) = trained(plain, x, change), trained(fused, x, change)
    assert fused.backend == "native" and found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert_close(found[name].double(), buffer.double(), torch.float64, name)
    assert got.isfinite().all()
    assert_close(got, wanted, torch.float64)
