"""Whole blocks through the engine behind "native" on a GPU, on the emulated operators; and which engine that is."""

import copy

import pytest
import torch
from tolerances import rms_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thresholdnet import ThresholdBlock, links, ops
from thresholdnet.backends import backends, csrc, cuda, cuda_launch, engine_for, load

F64 = torch.float64
UNITS = ("conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck")
PATTERNS = {"dense": links.dense(3), "harmonic": links.harmonic(4), "threshold_ab": links.threshold_ab(5, 2)}


@pytest.fixture(autouse=True)
def launched(emulated, monkeypatch):
    """The engine of GPUs for half formats, on the CPU."""
    monkeypatch.setattr(cuda_launch, "operators", lambda: emulated)
    monkeypatch.setattr(
        ops, "engine_for", lambda name, plan, x: "cuda" if name == "native" and cuda.fits(plan, x) else name
    )
    torch.manual_seed(0)


def _block(rows, unit, width=12, **arguments):
    block = ThresholdBlock(width, rows, 8, unit=unit, bottleneck_factor=2, **arguments)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return block


def _step(block, x):
    """Output, gradient of x, gradients of parameters, buffers."""
    own = x.detach().clone().requires_grad_()
    block.zero_grad()
    y = block(own)
    cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    y.backward(cotangent.to(y.dtype))
    return y.detach(), own.grad, [p.grad for p in block.parameters()], [b.clone() for b in block.buffers()]


def _errors(found, truth):
    """Errors of the output, of x's gradient, of the parameters' gradients, of the buffers."""
    pairs = zip(found[2], truth[2], strict=True), zip(found[3], truth[3], strict=True)
    summed = [sum(rms_error(a, t) ** 2 for a, t in each) ** 0.5 for each in pairs]
    return torch.tensor([rms_error(found[0], truth[0]), rms_error(found[1], truth[1]), *summed])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", [*PATTERNS, "dilated"])
def test_no_worse_than_plain_torch(pattern, unit):
    """Both in bf16 against fp64 of the same rounded operands; many images, as a mask that flips near 0 moves one."""
    rows, dilation = (links.dense(3), (1, 2, 4)) if pattern == "dilated" else (PATTERNS[pattern], 1)
    exact = _block(rows, unit, dilation=dilation).bfloat16().to(F64)
    half = copy.deepcopy(exact).bfloat16()
    ours, theirs = [], []
    for _ in range(25):
        x = torch.randn(2, 12, 6, 5).bfloat16()
        truth = _step(copy.deepcopy(exact), x.to(F64))
        theirs.append(_errors(_step(copy.deepcopy(half), x), truth))
        fused = copy.deepcopy(half).fuse(True, "native")
        found = _step(fused, x)
        assert fused.backend == "native" and found[0].dtype == torch.bfloat16
        ours.append(_errors(found, truth))
    own, plain = (torch.stack(errors).square().mean(0).sqrt() for errors in (ours, theirs))
    assert (own <= 1.1 * plain).all(), (own, plain)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("activation", "seed"), [("relu6", 1), ("leaky_relu(0.2)", 5)])
def test_float16_recompute_and_activations(activation, seed, unit):
    torch.manual_seed(seed)  # with others a mask near 0 flips in one unit or another, in plain torch too
    block = _block(links.dense(3), unit, activation=activation)
    block.half()
    x = torch.randn(2, 12, 6, 5).half()
    kept = _step(copy.deepcopy(block).fuse(True, "native"), x)
    again = _step(copy.deepcopy(block).fuse(True, "native", "bottleneck"), x)
    truth = _step(copy.deepcopy(block).to(F64), x.to(F64))
    for a, b in zip([*kept[:2], *kept[2]], [*again[:2], *again[2]], strict=True):
        assert torch.equal(a, b)  # also: two runs are equal to the bit
    assert (_errors(kept, truth) < 0.05).all(), _errors(kept, truth)


def test_features_are_read_out_of_the_output():
    """Where no slot and no row is padded, the rows of all nodes are the output, and backward's only copy of them."""
    block = _block(links.dense(4), "bottleneck", width=16).bfloat16()
    assert cuda.output_holds_features(block.plan)
    x = torch.randn(2, 16, 6, 5).bfloat16()
    truth, found = _step(copy.deepcopy(block).to(F64), x.to(F64)), _step(copy.deepcopy(block).fuse(True, "native"), x)
    assert (_errors(found, truth) <= 1.5 * _errors(_step(copy.deepcopy(block), x), truth)).all()


@pytest.mark.parametrize("unit", UNITS)
def test_inference(unit):
    exact = _block(PATTERNS["harmonic"], unit).bfloat16().to(F64)
    for _ in range(3):
        exact(torch.randn(4, 12, 6, 5, dtype=F64))
    exact.bfloat16().to(F64).eval()
    half = copy.deepcopy(exact).bfloat16()
    x = torch.randn(2, 12, 6, 5).bfloat16()
    with torch.no_grad():
        truth, plain, ours = exact(x.to(F64)), half(x), copy.deepcopy(half).fuse(True, "native")(x)
    assert rms_error(ours, truth) <= 1.5 * rms_error(plain, truth)


def test_a_convolution_behind_the_block():
    block = _block(PATTERNS["threshold_ab"], "conv_bn_relu").bfloat16().fuse(True, "native")
    x = torch.randn(2, 12, 6, 5).bfloat16().requires_grad_()
    tail = torch.randn(24, block.out_channels, 1, 1).bfloat16().requires_grad_()
    ours, theirs = block(x, tail), nn.functional.conv2d(block(x), tail)
    found, expected = (torch.autograd.grad(y.float().square().sum(), [x, tail]) for y in (ours, theirs))
    for a, b in zip((ours, *found), (theirs, *expected), strict=True):
        assert rms_error(a, b) < 2**-6


@pytest.mark.parametrize("unit", UNITS)
def test_fake_tensors_know_the_engine(unit):
    block = _block(links.dense(2), unit).bfloat16()
    x = torch.randn(2, 12, 4, 3).bfloat16()
    running = [t for m in block.modules() if isinstance(m, nn.BatchNorm2d) for t in (m.running_mean, m.running_var)]
    count = len(running) // 2
    arguments = (
        x.requires_grad_(), list(block.parameters()), running, block.plan.to_text(), [1e-5] * count, [False] * count,
        "relu", "native", True, False, [], None, 0.0, "",
    )  # fmt: skip
    torch.library.opcheck(ops.block, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("unit", UNITS)
def test_engine_for(unit, monkeypatch):
    plan = _block(links.dense(2), unit).plan
    ready = {"here": True}
    monkeypatch.setattr(csrc, "takes", lambda x: ready["here"])
    with FakeTensorMode():
        for dtype in cuda.DTYPES:
            x = torch.empty(2, 12, 4, 4, dtype=dtype, device="cuda")
            assert engine_for("native", plan, x) == "cuda"
            assert engine_for("triton", plan, x) == "triton"
            assert engine_for("native", plan, x[:0]) == "native"  # no pixels
            assert engine_for("native", plan, x.float()) == "native"
            assert engine_for("native", plan, torch.empty_like(x, device="cpu")) == "native"
        huge = torch.empty(1 << 20, 12, 8, 8, dtype=torch.bfloat16, device="cuda")  # slots of more than 2^31 elements
        assert engine_for("native", plan, huge) == "native"
        ready["here"] = False
        assert engine_for("native", plan, x) == "native"
    assert load("cuda") is cuda and load("native").Verbs is not cuda.Verbs
    assert "cuda" not in backends()
