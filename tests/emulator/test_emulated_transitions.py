"""Transitions on the passes of GPUs, in the emulator, against the modules themselves."""

import copy

import pytest
import torch
from tolerances import rms_error
from torch import nn

from thresholdnet import chain
from thresholdnet.backends import csrc

F64 = torch.float64
TRANSITIONS = {
    "densenet": lambda: [nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1, bias=False), nn.AvgPool2d(2, 2)],
    "average": lambda: [nn.BatchNorm2d(24), nn.ReLU6(), nn.AvgPool2d(3)],
    "padded average": lambda: [nn.BatchNorm2d(24), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "max": lambda: [nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)],
    "overlapping max": lambda: [nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
}


@pytest.fixture(autouse=True)
def on_the_emulator(emulated, monkeypatch):
    monkeypatch.setattr(csrc, "_operators", lambda: emulated)
    monkeypatch.setattr(csrc, "takes", lambda x: True)
    monkeypatch.setattr(csrc, "convolves", lambda *_: False)  # of few pixels: a CPU's
    monkeypatch.setattr(csrc, "AVERAGING", ("cpu",))
    torch.manual_seed(0)


def _step(net, run, x):
    """Output, gradients of x and of the parameters."""
    leaf = x.detach().clone().requires_grad_()
    y = run(leaf)
    cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *net.parameters()], cotangent)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_equals_the_modules(name, train):
    net = nn.Sequential(*TRANSITIONS[name]()).to(F64).train(train)
    for size in ((3, 24, 9, 7), (2, 24, 8, 12)):
        x = torch.randn(size, dtype=F64)
        found = _step(net, lambda x: chain.run(list(net), x), x)
        for got, expected in zip(found, _step(net, net, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["densenet", "average"])
def test_no_worse_than_plain_torch(name, dtype):
    """Both against fp64 of the same rounded operands; not the maxima, which rounding moves from pixel to pixel."""
    exact = nn.Sequential(*TRANSITIONS[name]()).to(dtype).to(F64)
    half = copy.deepcopy(exact).to(dtype)
    errors = torch.zeros(2, 5 if name == "densenet" else 4)
    for _ in range(8):
        x = torch.randn(4, 24, 9, 8).to(dtype)
        truth = _step(exact, exact, x.to(F64))
        for row, run in enumerate((lambda x: chain.run(list(half), x), half)):
            found = _step(half, run, x)
            errors[row] += torch.tensor([rms_error(a, t) for a, t in zip(found, truth, strict=True)])
    assert (errors[0] <= 1.1 * errors[1]).all(), errors
