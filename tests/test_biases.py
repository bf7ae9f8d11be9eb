"""Blocks whose convolutions have biases: values, gradients, statistics in every mode, and what is made once."""

import copy

import pytest
import torch
from foreign import HarDBlock, InOneRow, NewFirst, PlainLayer, PowersOfTwoBack, Stage, dense_row, with_biases
from test_convert import assert_equal_in_all, blocks, quiet, randomise
from tolerances import RELATIVE, largest_error
from torch import nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links
from thresholdnet.biases import Biases

F64 = torch.float64
MAKE = {
    "bottleneck": lambda: dense_row(InOneRow, 12, 5, 3),
    "new first": lambda: dense_row(NewFirst, 12, 5, 3),
    "bn_relu_conv": lambda: dense_row(PlainLayer, 12, 5, 3),
    "conv_bn_relu": lambda: HarDBlock(12, 6, 1.7, 4, keep_base=True),
    "sparse": lambda: PowersOfTwoBack(12, 5, 5),
    "a transition in front": lambda: Stage(6, 5, 3),
}


def biased(name, some=False):
    torch.manual_seed(0)
    model = with_biases(randomise(nn.ModuleList([MAKE[name]()])))
    if some:  # every other convolution has none
        for module in [m for m in model.modules() if isinstance(m, nn.Conv2d)][::2]:
            module.bias = None
    return model.double()[0]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_biases(name, some):
    original = nn.Sequential(biased(name, some), nn.Conv2d(3, 3, 1))[:1]
    converted = quiet(nn.ModuleList([copy.deepcopy(original[0])]))
    assert len(blocks(converted)) == 1
    x = torch.randn(3, 12, 6, 7, dtype=F64)
    assert_equal_in_all(converted[0], original[0], x)
    assert converted[0].backend == "native"


@pytest.mark.parametrize("name", ["bottleneck", "bn_relu_conv", "conv_bn_relu"])
def test_gradients_behind_given_statistics(name):
    """In training with frozen BatchNorms a bias has a gradient, which has to pass through the shift."""
    original = biased(name).train()
    norms = [m for m in original.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms[::2]:
        norm.eval()
    converted = quiet(copy.deepcopy(original))
    x, grads = torch.randn(2, 12, 5, 6, dtype=F64), []
    for model in (converted, original):
        own = x.clone().requires_grad_()
        y = model(own)
        grads.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [own, *model.parameters()])])
    assert converted.backend == "native"
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert any(g.abs().max() > 1e-3 for g in grads[0][1:] if g.dim() == 1)
    for ours, theirs in zip(converted.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", ["bottleneck", "bn_relu_conv"])
def test_a_bias_is_dropped_with_its_feature(name, channels, monkeypatch):
    original = biased(name).train()
    for layer in original.children():
        drop = (nn.Dropout2d if channels else nn.Dropout)(0.4)
        if name == "bottleneck":
            layer.bottle_neck.append(drop)
        else:
            layer.drop = drop
    block = quiet(copy.deepcopy(original))
    assert block.drop_rate == 0.4 and block.drop_channels == channels
    x = torch.randn(3, 12, 5, 6, dtype=F64)
    masks = block._masks(x)
    monkeypatch.setattr(type(block), "_masks", lambda self, x: masks)

    class Drops(nn.Module):  # what these masks leave
        def __init__(self, mask):
            super().__init__()
            self.mask = mask

        def forward(self, y):
            return y * self.mask / 0.6

    for layer, mask in zip(original.children(), masks, strict=True):
        if name == "bottleneck":
            layer.bottle_neck[6] = Drops(mask)
        else:
            layer.drop = Drops(mask)
    grads = []
    for model in (block, original):
        own = x.clone().requires_grad_()
        y = model(own)
        grads.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [own, *model.parameters()])])
    assert block.backend == "native"
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_of_biases_alone():
    original = biased("bn_relu_conv").train()
    for name, parameter in original.named_parameters():
        parameter.requires_grad_(name == "1.conv.bias")
    block, x, grads = quiet(copy.deepcopy(original)), torch.randn(2, 12, 5, 6, dtype=F64), []
    for model in (block, original):
        model(x).sin().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert block.backend == "native" and list(grads[0]) == list(grads[1]) == ["1.conv.bias"]
    torch.testing.assert_close(grads[0]["1.conv.bias"], grads[1]["1.conv.bias"], rtol=1e-9, atol=1e-9)


def test_shifts_are_made_once_for_serving(monkeypatch):
    made = []
    monkeypatch.setattr(Biases, "__init__", lambda self, *args, init=Biases.__init__: made.append(init(self, *args)))
    original = biased("bottleneck").eval()
    block = tn.prepack(quiet(copy.deepcopy(original)))
    x = torch.randn(2, 12, 5, 6, dtype=F64)
    made.clear()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(block(x), original(x), rtol=1e-9, atol=1e-9)
        assert len(made) <= 1  # the check before it took its place ran it with these
        for change in (
            lambda m: m[1].bottle_neck[2].bias.add_(1),
            lambda m: m[0].bottle_neck[3].running_var.mul_(2),
            lambda m: setattr(m[2].bottle_neck[0], "eps", 0.1),
        ):
            for model in (block, original):
                change(model)
            made.clear()
            for _ in range(2):
                torch.testing.assert_close(block(x), original(x), rtol=1e-9, atol=1e-9)
            assert len(made) == 1
        torch.testing.assert_close(copy.deepcopy(block)(x), block(x), rtol=1e-9, atol=1e-9)


def test_half_and_compiled():
    original = biased("bn_relu_conv").float().eval()
    block = quiet(copy.deepcopy(original))
    x = torch.randn(2, 12, 5, 6)
    expected = original(x)
    torch.testing.assert_close(
        torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected, rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
        torch.testing.assert_close(block(x).float(), expected, rtol=0.1, atol=0.2)
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("unit", ("conv_bn_relu", "bn_relu_conv", "bottleneck"))
def test_modules_made_in_inference_mode(unit):
    """Whose writes nothing counts: their shifts are made at each call."""
    torch.manual_seed(0)
    with torch.inference_mode():
        block = ThresholdBlock(8, links.dense(3), 4, unit=unit, fused=True, backend="native").eval()
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.randn(module.out_channels))
        x = torch.randn(2, 8, 5, 6)
        for _ in range(2):
            found = block(x)
            assert block.backend == "native"
            assert largest_error(found, copy.deepcopy(block).fuse(False)(x)) <= RELATIVE[torch.float32]
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.bias.mul_(2)
