"""Convolutions of tiny images by their taps, against torch's in fp64; and the fused blocks that run on them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from activated import NAMES
from pixels import pixels
from tolerances import assert_close, assert_one_pass
from torch.nn.grad import conv2d_input, conv2d_weight

from thresholdnet import ThresholdBlock, links
from thresholdnet.backends import csrc, taps

F64 = torch.float64
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(1, 1), (5, 1), (1, 4), (13, 7)])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_are_the_convolution_and_its_gradients(batch, channels, size):
    read, written = channels
    x, dz = pixels(batch, read, *size), pixels(batch, written, *size)
    weight = pixels(written, read, 3, 3)
    torch.testing.assert_close(taps.conv(x, weight), F.conv2d(x, weight, padding=1))
    torch.testing.assert_close(taps.data_gradient(dz, weight), conv2d_input(x.shape, weight, dz, padding=1))
    torch.testing.assert_close(taps.weight_gradient(x, dz), conv2d_weight(x, weight.shape, dz, padding=1))


@pytest.mark.parametrize("batch", [1, 3, 70])
def test_bfloat16_is_rounded_once(batch):
    """Of single pixels; sums in fp32 are as good as exact beside that."""
    x, dz, weight = (
        pixels(*shape, dtype=torch.bfloat16) for shape in ((batch, 40, 1, 1), (batch, 33, 1, 1), (33, 40, 3, 3))
    )
    wide_x, wide_dz, wide = x.double(), dz.double(), weight.double()
    assert_one_pass(taps.conv(x, weight), F.conv2d(wide_x, wide, padding=1), torch.bfloat16)
    assert_one_pass(taps.data_gradient(dz, weight), conv2d_input(x.shape, wide, wide_dz, padding=1), torch.bfloat16)
    wanted = conv2d_weight(wide_x, weight.shape, wide_dz, padding=1)
    assert_one_pass(taps.weight_gradient(x, dz), wanted, torch.bfloat16)


def test_parts_of_other_tensors_are_read_where_they_lie():
    whole, weight = pixels(4, 12, 2, 2), pixels(6, 5, 3, 3)
    x, dz = whole[:, 3:8], whole[:, 2:8]
    torch.testing.assert_close(taps.conv(x, weight), F.conv2d(x, weight, padding=1))
    torch.testing.assert_close(taps.data_gradient(dz, weight), conv2d_input(x.shape, weight, dz, padding=1))
    torch.testing.assert_close(taps.weight_gradient(x, dz), conv2d_weight(x, weight.shape, dz, padding=1))


def test_what_it_takes():
    assert all(taps.takes(torch.zeros(2, 3, *size), 3) for size in SIZES)
    assert not taps.takes(torch.zeros(2, 3, 3, 1), 3) and not taps.takes(torch.zeros(2, 3, 2, 2), 1)
    for size in SIZES:  # larger images of bfloat16 would be rounded at every product
        assert taps.takes(torch.zeros(2, 3, *size, dtype=torch.bfloat16), 3) == (size == (1, 1))
    assert not taps.takes(torch.zeros(0, 3, 2, 2), 3) and not taps.takes(torch.zeros(2, 3, 2, 2, device="meta"), 3)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("unit", ["conv_bn_relu", "bottleneck"])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_equal_the_plain_block(size, unit, activation, monkeypatch):
    """Of many images, which the C++ library leaves to these products."""
    monkeypatch.setattr(csrc, "convolves", lambda *_: False)
    ran = set()
    for name in ("conv", "data_gradient", "weight_gradient"):
        true = getattr(taps, name)
        monkeypatch.setattr(taps, name, lambda *given, true=true, name=name: (ran.add(name), true(*given))[1])
    torch.manual_seed(0)
    plain = ThresholdBlock(9, links.threshold_ab(5, 2), 6, unit=unit, activation=activation, dtype=F64)
    fused = copy.deepcopy(plain).fuse(True, "native")
    x = torch.randn(5, 9, *size, dtype=F64)
    results = []
    for block in (fused, plain):
        own = x.clone().requires_grad_()
        y = block.train()(own)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape))
        with torch.no_grad():
            inference = block.eval()(x)
        results.append([y, own.grad, inference, *(p.grad for p in block.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    of_weights = csrc.reason() is not None or max(size) == 1  # else the C++ library's, which is faster from 2 pixels on
    assert ran == {"conv", "data_gradient"} | ({"weight_gradient"} if of_weights else set())
