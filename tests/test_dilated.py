"""Blocks whose 3x3 convolutions are dilated: the reference, the engine on every path of the native backend, convert."""

import copy

import foreign
import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_blocks import UNITS
from test_convert import blocks, quiet
from test_engine import _assert_same, _block, _both
from tolerances import rms_error
from torch import nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links, plan
from thresholdnet.backends import csrc, winograd
from thresholdnet.reference import block_forward

F64 = torch.float64
MIXED = (1, 3, 2, 1)
"""Of a block's layers: two of them read as plain ones do."""


def spread(weight, dilation):
    """The same kernel with zeros between its taps: an undilated one."""
    sides = [2 * dilation + 1 if side == 3 else 1 for side in weight.shape[2:]]
    wide = weight.new_zeros(*weight.shape[:2], *sides)
    wide[(..., *[slice(None, None, dilation if side > 1 else None) for side in sides])] = weight
    return wide


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_reference_against_blocks_written_out(dims):
    """Wide kernels of zeros in the place of dilation: one line a layer."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    x = torch.randn(2, 5, *(4, 7, 6)[-dims:], dtype=F64)

    def normed(y, gamma, beta):
        return F.relu(F.batch_norm(y, None, None, gamma, beta, training=True))

    for unit in UNITS:
        block = ThresholdBlock(5, links.dense(2), 4, unit=unit, dilation=(2, 3), spatial_dims=dims, dtype=F64)
        nodes, parameters = [x], iter(block.parameters())
        for dilation in (2, 3):
            y = torch.cat(nodes, 1)
            if unit in ("bn_relu_conv", "bottleneck"):
                y = normed(y, next(parameters), next(parameters))
            if unit == "bottleneck":
                y = normed(conv(y, next(parameters)), next(parameters), next(parameters))
            y = conv(y, spread(next(parameters), dilation), padding=dilation)
            if unit == "conv_relu":
                y = F.relu(y + next(parameters).view(-1, *[1] * dims))
            nodes.append(normed(y, next(parameters), next(parameters)) if unit == "conv_bn_relu" else y)
        written = torch.cat([nodes[node] for node in block.plan.outputs], 1)
        expected, _ = block_forward(block.plan, x, list(block.parameters()))
        torch.testing.assert_close(expected, written, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block(x), written, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dilation", [2, MIXED])
@pytest.mark.parametrize("unit", UNITS)
def test_training_equals_the_plain_block(unit, dilation):
    """Single pixels, images that the taps leave, and those that they stay in."""
    for size in ((3, 1, 1), (4, 2, 2), (2, 7, 9), (2, 2, 7, 5)):
        block = _block(links.dense(4), unit, dilation=dilation, spatial_dims=len(size) - 1)
        x = torch.randn(size[0], 7, *size[1:], dtype=F64)
        for recompute in (None, "bottleneck"):
            theirs, ours = _both(block, "native", x, recompute)
            _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit):
    block = _block(
        links.dense(3), unit, width=2, k=2, dilation=(2, 1, 3), bottleneck_factor=1, outputs="all", fused=True,
        backend="native",
    )  # fmt: skip
    x = torch.randn(2, 2, 4, 3, dtype=F64, requires_grad=True)
    names = dict(block.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *names.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", UNITS)
def test_serving(unit, dtype):
    """Prepacked or not, more often than it takes to replay a call; and without the C++ library."""
    block = _block(links.dense(4), unit, torch.float32, dilation=MIXED)
    block(torch.randn(4, 7, 6, 6))
    exact = block.eval().to(F64)
    fused = copy.deepcopy(block).to(dtype).fuse(True, "native")
    for size in ((2, 7, 9), (1, 2, 2)):
        x = torch.randn(size[0], 7, *size[1:]).to(dtype)
        with torch.inference_mode():
            expected = exact(x.to(F64)).float()
            for packed in (False, True):
                tn.prepack(fused, packed)
                for _ in range(5):
                    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
                    torch.testing.assert_close(fused(x).float(), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("unit", UNITS)
def test_without_the_cpp_library(unit, monkeypatch):
    monkeypatch.setattr(csrc, "takes", lambda x: False)
    theirs, ours = _both(_block(links.dense(4), unit, dilation=MIXED), "native", torch.randn(2, 7, 5, 6, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_winograd_serves_layers_without_dilation(unit, monkeypatch):
    """Of pre-activation units, whose layers share no transforms; and none of the others' blocks."""
    made = []
    convolve = winograd.Verbs._convolve
    monkeypatch.setattr(
        winograd.Verbs, "_convolve", lambda *given, **named: made.append(given) or convolve(*given, **named)
    )
    block = _block(links.dense(4), unit, torch.float32, width=64, k=64, dilation=MIXED)
    x = torch.randn(2, 64, 24, 24)
    monkeypatch.setitem(winograd._state, "on", True)
    theirs, ours = _both(block, "native", x)
    for got, expected in zip([*ours[:2], *ours[2]], [*theirs[:2], *theirs[2]], strict=True):
        assert rms_error(got, expected) < 0.01  # a mask near 0 may flip
    plain = sum(dilation == 1 for dilation in MIXED)
    assert len(made) == (2 * plain if block.plan.pre_activation and csrc.takes(x) else 0)  # forward, data gradient


def test_plans():
    """One form for blocks without dilation, and one text for every plan."""
    made = plan.plan_block(8, links.dense(3), 4, dilation=(1, 1, 1))
    assert made == plan.plan_block(8, links.dense(3), 4) and made.dilations == ()
    dilated = plan.plan_block(8, links.dense(3), 4, dilation=(1, 2, 1))
    assert dilated.dilations == (1, 2, 1) and [dilated.dilation(i) for i in (1, 2, 3)] == [1, 2, 1]
    assert plan.BlockPlan.from_text(dilated.to_text()) == dilated
    assert "dilations=(1, 2, 1)" in repr(ThresholdBlock(8, links.dense(3), 4, dilation=(1, 2, 1)))
    assert "dilations" not in repr(ThresholdBlock(8, links.dense(3), 4))


def dilated(module, *dilations):
    """The 3x3 convolutions of a module with these dilations, in turn."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for i, conv in enumerate(convs):
        conv.dilation = conv.padding = (dilations[i % len(dilations)],) * 2
    return module


FOREIGN = {
    "torchvision's": (lambda: torchvision.models.DenseNet(8, (3,), 12, num_classes=2).features.denseblock1, 12),
    "HarDNet's": (lambda: foreign.HarDBlock(12, 8, 1.7, 4), 12),
    "VoVNet's": (lambda: foreign.Aggregation(12, 8, 16, 3), 12),
    "in a row": (lambda: foreign.dense_row(foreign.InOneRow, 12, 6, 3), 12),
    "plain layers": (lambda: foreign.dense_row(foreign.PlainLayer, 12, 6, 3), 12),
    "AHDRNet's": (lambda: foreign.ResidualFused(12, 6, 4), 12),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_convert(name):
    """Other people's blocks by rules and by running: their own results and gradients, and the way back."""
    make, channels = FOREIGN[name]
    torch.manual_seed(0)
    plain = dilated(make(), 2, 1, 4).to(F64)
    model = quiet(copy.deepcopy(plain))
    (found,) = blocks(model)
    assert 2 in found.plan.dilations and 1 in found.plan.dilations
    x, step = torch.randn(2, channels, 9, 8, dtype=F64), []
    for each in (plain, model):
        own = x.clone().requires_grad_()
        y = each(own)
        y.square().sum().backward()
        step.append((y.detach(), own.grad, *(p.grad for p in each.parameters())))
    assert found.backend == "native"
    for expected, got in zip(*step, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert tn.to_reference(model).state_dict().keys() == plain.state_dict().keys()


def test_padding_to_the_same_size():
    plain = dilated(foreign.dense_row(foreign.NewFirst, 12, 6, 3), 2, 1, 4).eval()
    for conv in (m for m in plain.modules() if isinstance(m, nn.Conv2d)):
        conv.padding = "same"
    model, x = quiet(copy.deepcopy(plain)), torch.randn(2, 12, 9, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert model.backend == "native" and model.plan.dilations == (2, 1, 4)


def test_two_dilations_in_one_convolution_are_left():
    block, lines = dilated(foreign.dense_row(foreign.InOneRow, 12, 6, 3), 2), []
    block[1].bottle_neck[5].dilation = block[1].bottle_neck[5].padding = (2, 3)
    tn.convert(nn.ModuleList([block]), report=lines.append)
    assert lines[0] == (
        "left 0: 1.bottle_neck.5 must be a 3x3 convolution of stride 1, padding 3, dilation 3, one group"
    )


def test_another_dilation_later_runs_as_it_is():
    block = _block(links.dense(3), "bottleneck", torch.float32, dilation=2, fused=True, backend="native").eval()
    x = torch.randn(2, 7, 9, 8)
    block(x)
    assert block.backend == "native"
    dilated(block.layers[1], 3)
    after = block(x)
    assert block.backend == "reference"
    torch.testing.assert_close(after, block.fuse(False)(x))


def test_linked_conv2d():
    sources = [torch.randn(2, c, 7, 6, dtype=F64, requires_grad=True) for c in (3, 5)]
    weight = torch.randn(4, 8, 3, 3, dtype=F64, requires_grad=True)
    expected = F.conv2d(torch.cat(sources, 1), weight, padding=3, dilation=3)
    for backend in ("native", "reference"):
        made = tn.functional.linked_conv2d(sources, weight, None, backend, dilation=3)
        torch.testing.assert_close(made, expected)
        cotangent = torch.randn_like(made)
        for got, true in zip(
            *(torch.autograd.grad(y, [*sources, weight], cotangent, retain_graph=True) for y in (made, expected)),
            strict=True,
        ):
            torch.testing.assert_close(got, true)
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        tn.functional.linked_conv2d(sources, weight, dilation=0)


def test_replayed_calls_know_their_dilation():
    sources = [torch.randn(2, c, 9, 9) for c in (3, 5)]
    weight = torch.randn(4, 8, 3, 3)
    for call in range(36):  # each more often than it takes to replay
        dilation = 1 + call % 3
        made = tn.functional.linked_conv2d(sources, weight, None, "native", dilation=dilation)
        expected = F.conv2d(torch.cat(sources, 1), weight, padding=dilation, dilation=dilation)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
