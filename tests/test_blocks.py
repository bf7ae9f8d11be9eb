"""ThresholdBlock against reference.py, and reference.py against code written out here."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from activated import NAMES
from torch import nn

from thresholdnet import ThresholdBlock, links
from thresholdnet.reference import Statistics, block_forward

PATTERNS = {
    "dense": links.dense(5),
    "log_dense": links.log_dense(5),
    "sparse_dense": links.sparse_dense(5, 1),
    "harmonic": links.harmonic(8),
    "even_log": links.even_log(6),
    "threshold_ab": links.threshold_ab(7, 3),
    "threshold_bc": links.threshold_bc(8, 4, "harmonic"),
    "custom": ((0,), (0,), (2, 0), (1, 3)),
    "one layer": links.dense(1),
}
UNITS = ("conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck")
F64 = torch.float64


def _block(pattern, unit, **arguments):
    torch.manual_seed(0)
    block = ThresholdBlock(7, PATTERNS[pattern], 5, unit=unit, dtype=F64, **arguments)
    for module in block.modules():  # away from the identity that BatchNorm starts as
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return block


def _norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("size", [(2, 6, 5), (1, 3, 1), (3, 1, 1)])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_reference(pattern, unit, size):
    block = _block(pattern, unit)
    n, h, w = size
    x = torch.randn(n, 7, h, w, dtype=F64, requires_grad=True)
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in _norms(block)]
    y = block(x)
    expected, used = block_forward(block.plan, x, list(block.parameters()))
    assert y.shape == (n, block.out_channels, h, w)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(y)
    inputs = [x, *block.parameters()]
    ours = torch.autograd.grad((y * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    pixels = n * h * w
    for norm, (mean, variance), batch in zip(_norms(block), before, used, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * batch.mean)
        unbiased = batch.variance * pixels / (pixels - 1)
        torch.testing.assert_close(norm.running_var, 0.9 * variance + 0.1 * unbiased)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("unit", UNITS)
def test_inference_equals_the_reference(unit, activation):
    block = _block("threshold_ab", unit, activation=activation, norm_eps=1e-3).eval()
    x = 20 * torch.randn(2, 7, 4, 3, dtype=F64)
    fixed = [Statistics(m.running_mean, m.running_var) for m in _norms(block)]
    expected, _ = block_forward(block.plan, x, list(block.parameters()), fixed, 1e-3, activation)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    if activation == "relu6" and unit == "conv_bn_relu":
        assert expected.max() == 6  # the clamp was reached


def test_reference_against_a_block_written_out():
    """Harmonic links, 4 layers: one line a layer, torch's own functions."""
    block = _block("harmonic", "conv_bn_relu")
    p = list(block.parameters())
    x = torch.randn(2, 7, 5, 4, dtype=F64)

    def layer(i, *sources):
        z = F.conv2d(torch.cat(sources, 1), p[3 * i - 3], padding=1)
        return F.relu(F.batch_norm(z, None, None, p[3 * i - 2], p[3 * i - 1], training=True))

    x1 = layer(1, x)
    x2 = layer(2, x1, x)
    x3 = layer(3, x2)
    x4 = layer(4, x3, x2, x)
    x5 = layer(5, x4)
    x6 = layer(6, x5, x4)
    x7 = layer(7, x6)
    x8 = layer(8, x7, x6, x4, x)
    y, _ = block_forward(block.plan, x, p)
    torch.testing.assert_close(y, torch.cat([x1, x3, x5, x7, x8], 1))


def test_reference_against_a_block_without_norms_written_out():
    """Dense links, 3 layers, LeakyReLU: one line a layer, torch's own functions."""
    block = ThresholdBlock(7, links.dense(3), 5, unit="conv_relu", activation="leaky_relu(0.2)", dtype=F64)
    p = list(block.parameters())
    x = torch.randn(2, 7, 5, 4, dtype=F64)
    x1 = F.leaky_relu(F.conv2d(x, p[0], p[1], padding=1), 0.2)
    x2 = F.leaky_relu(F.conv2d(torch.cat([x, x1], 1), p[2], p[3], padding=1), 0.2)
    x3 = F.leaky_relu(F.conv2d(torch.cat([x, x1, x2], 1), p[4], p[5], padding=1), 0.2)
    written = torch.cat([x, x1, x2, x3], 1)
    expected, used = block_forward(block.plan, x, p, activation="leaky_relu(0.2)")
    torch.testing.assert_close(expected, written, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(x), written, rtol=1e-12, atol=1e-12)
    assert not used


def test_reference_against_a_bottleneck_block_written_out():
    block = ThresholdBlock(6, links.dense(3), 4, unit="bottleneck", dtype=F64)
    p = list(block.parameters())
    x = torch.randn(2, 6, 5, 4, dtype=F64)

    def layer(i, joined):
        g1, b1, w1, g2, b2, w2 = p[6 * i - 6 : 6 * i]
        inner = F.conv2d(F.relu(F.batch_norm(joined, None, None, g1, b1, training=True)), w1)
        return F.conv2d(F.relu(F.batch_norm(inner, None, None, g2, b2, training=True)), w2, padding=1)

    joined = x
    for i in (1, 2, 3):
        joined = torch.cat([joined, layer(i, joined)], 1)
    y, _ = block_forward(block.plan, x, p)
    torch.testing.assert_close(y, joined)


def test_dense_bottleneck_block_equals_torchvision():
    densenet = pytest.importorskip("torchvision.models.densenet")
    theirs = densenet._DenseBlock(4, 10, 4, 6, 0.0).double()
    ours = ThresholdBlock(10, links.dense(4), 6, unit="bottleneck", dtype=F64)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        b.copy_(a)
    x = torch.randn(2, 10, 5, 5, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_links_by_numbers_equal_links_by_hand():
    made = ThresholdBlock(64, num_layers=16, threshold=8, below="sparse_dense", above="harmonic", growth_rate=20)
    assert made.links == links.threshold_bc(16, 8, "harmonic")
    assert ThresholdBlock(64, num_layers=16, threshold=8, growth_rate=20).links == links.threshold_ab(16, 8)
    assert made.widths == made.plan.widths and len(made.widths) == 16


def test_parameters_come_in_forward_order():
    block = ThresholdBlock(6, links.harmonic(2), 4)
    assert [tuple(p.shape) for p in block.parameters()] == [
        (4, 6, 3, 3),
        (4,),
        (4,),
        (6, 10, 3, 3),
        (6,),
        (6,),
    ]
    block = ThresholdBlock(6, links.dense(1), 4, unit="bottleneck")
    assert [tuple(p.shape) for p in block.parameters()] == [
        (6,), (6,), (16, 6, 1, 1), (16,), (16,), (4, 16, 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit):
    block = ThresholdBlock(3, links.threshold_ab(3, 2), 2, unit=unit, dtype=F64)
    x = torch.randn(2, 3, 3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_input_is_never_changed_and_memory_format_is_kept():
    for unit in UNITS:
        block = ThresholdBlock(8, links.dense(3), 4, unit=unit)
        x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
        copy_of_x = x.clone()
        assert block(x).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, copy_of_x)


def test_copies_and_pickles():
    block = ThresholdBlock(8, links.threshold_ab(4, 2), 4).eval()
    x = torch.randn(1, 8, 4, 4)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.links.pattern == "threshold_ab"
        torch.testing.assert_close(other(x), block(x))


def test_device_and_dtype():
    block = ThresholdBlock(8, links.dense(2), 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}


def test_compiles_to_one_graph():
    block = ThresholdBlock(8, links.threshold_ab(4, 2), 4)
    x = torch.randn(2, 8, 4, 4)
    expected = copy.deepcopy(block)(x)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"links": None}, ValueError, "links, or both num_layers and threshold, must be given"),
        (
            {"links": None, "num_layers": 4},
            ValueError,
            "links, or both num_layers and threshold, must be given",
        ),
        ({"num_layers": 4}, ValueError, "links must be given alone"),
        (
            {"links": None, "num_layers": 4, "threshold": -1},
            ValueError,
            "threshold must be at least 0, got -1",
        ),
        ({"below": "dens"}, ValueError, "did you mean dense"),
        ({"above": "even"}, ValueError, "did you mean even_log"),
        ({"activation": "gelu"}, ValueError, "activation 'gelu' is unknown; did you mean relu"),
        ({"activation": "leaky_relu(2)"}, ValueError, "activation must be leaky_relu(SLOPE) with 0 < SLOPE < 1, got"),
        ({"unit": "conv_relu", "drop_rate": 0.1}, ValueError, "drop_rate must be 0 for unit 'conv_relu', got 0.1"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be at least 0, got -1.0"),
        ({"norm_momentum": 2}, ValueError, "norm_momentum must be from 0 to 1, got 2.0"),
        ({"in_channels": "64"}, TypeError, "in_channels must be an integer, got '64'"),
        ({"fused": "no"}, TypeError, "fused must be True or False, got 'no'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        ThresholdBlock(**{"in_channels": 8, "links": links.dense(2), "growth_rate": 4, **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 7, 4, 4), ValueError, "must have 8 channels, got 7 with shape (1, 7, 4, 4)"),
        (torch.zeros(8, 4, 4), ValueError, "must have 4 dimensions [N, C, H, W], got 3 with shape (8, 4, 4)"),
        (
            torch.zeros(1, 8, 4, 4, dtype=torch.int64),
            TypeError,
            "must have a floating-point dtype, got torch.int64",
        ),
        ([1.0], TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_bad_inputs(x, error, message):
    with pytest.raises(error) as caught:
        ThresholdBlock(8, links.dense(2), 4)(x)
    assert message in str(caught.value)


def test_dropout_as_in_densenet():
    """Plain and fused with the same masks agree; evaluation drops nothing; the share dropped is the rate."""
    block = ThresholdBlock(
        6, links.dense(3), 4, unit="bottleneck", drop_rate=0.4, fused=True, backend="native"
    ).double()
    x = torch.randn(3, 6, 9, 8, dtype=F64, requires_grad=True)
    masks = block._masks(x)
    kept = torch.cat([m.flatten() for m in masks]).double().mean()
    assert 0.55 < kept < 0.65 and not torch.equal(masks[0], masks[1])
    block._masks = lambda x: masks
    plain = copy.deepcopy(block).fuse(False)
    for layer, mask in zip(plain.layers, masks, strict=True):
        layer.drop.forward = lambda y, mask=mask: y * mask / 0.6
    for run in (torch.nn.Module.train, torch.nn.Module.eval):
        if run is torch.nn.Module.eval:
            del block._masks  # evaluation asks for none
            for layer in plain.layers:
                del layer.drop.forward
        ours, theirs = (torch.autograd.grad(run(b)(x).square().sum(), [x, *b.parameters()]) for b in (block, plain))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert "0.4" in repr(plain.layers[0].drop)
    with pytest.raises(ValueError, match=r"drop_rate must be 0 for unit 'conv_bn_relu', got 0\.4"):
        ThresholdBlock(6, links.dense(3), 4, drop_rate=0.4)
