"""The fused block against reference.py and against the plain modules: values, gradients, statistics, modes, limits."""

import copy
import dataclasses
import pickle

import pytest
import torch
from activated import NAMES
from saved import saved_tensors, storage_bytes
from test_blocks import PATTERNS, UNITS
from tolerances import assert_close, rms_error
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links, ops, transforms
from thresholdnet.backends import load
from thresholdnet.models import fuse_blocks
from thresholdnet.reference import Statistics, block_forward

F64 = torch.float64
BACKENDS = [name for name, reason in tn.backends().items() if reason is None and name != "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def _block(rows, unit, dtype=F64, width=7, k=5, **arguments):
    torch.manual_seed(0)
    block = ThresholdBlock(width, rows, k, unit=unit, dtype=dtype, **arguments)
    for module in block.modules():  # away from the identity that BatchNorm starts as
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block


def _norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def _both(plain, backend, x, recompute=None):
    """Outputs, gradients of x and parameters, and buffers after one step of the plain block and of its fused copy."""
    results = []
    plain.zero_grad()
    fused = copy.deepcopy(plain).fuse(True, backend, recompute)
    for block in (plain, fused):
        own = x.detach().clone().requires_grad_()
        y = block(own)
        cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        y.backward(cotangent.to(y.dtype))
        zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters()]
        results.append((y.detach(), own.grad, zeros, [b.clone() for b in block.buffers()]))
    assert fused.backend == backend and plain.backend == "reference"
    return results


def _assert_same(ours, theirs, dtype):
    assert_close(ours[0], theirs[0], dtype, "output")
    assert_close(ours[1], theirs[1], dtype, "gradient of x")
    largest = max(g.abs().max().item() for g in theirs[2])
    for i, (a, b) in enumerate(zip(ours[2], theirs[2], strict=True)):
        # a parameter whose true gradient is 0 (a weight in front of a BatchNorm has such directions) is held
        # against the largest gradient of the block, not against its own rounding
        if b.abs().max() < 1e-6 * largest:
            assert a.abs().max() < 1e-3 * largest
        else:
            assert_close(a, b, dtype, f"gradient of parameter {i}")
    for a, b in zip(ours[3], theirs[3], strict=True):
        assert_close(a.double(), b.double(), dtype, "running statistics")


@pytest.mark.parametrize("size", [(2, 6, 5), (1, 3, 1), (3, 1, 1), (4, 2, 9)])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_plain_block(pattern, unit, size, backend):
    n, h, w = size
    block = _block(PATTERNS[pattern], unit)
    theirs, ours = _both(block, backend, torch.randn(n, 7, h, w, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_training_equals_the_reference(unit, backend):
    block = _block(PATTERNS["threshold_ab"], unit).fuse(True, backend)
    x = torch.randn(2, 7, 5, 4, dtype=F64, requires_grad=True)
    y = block(x)
    expected, _ = block_forward(block.plan, x, list(block.parameters()))
    assert_close(y, expected)
    cotangent = torch.randn_like(y)
    inputs = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad((out * cotangent).sum(), inputs) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("unit", UNITS)
def test_dilated_training_equals_the_reference(unit, backend):
    """Readers of one node with several dilations; even sides, which tiles of 2 x 2 pixels would cover."""
    block = _block(links.dense(4), unit, dilation=(1, 2, 3, 2))
    theirs, ours = _both(block, backend, torch.randn(2, 7, 6, 4, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("unit", UNITS)
def test_inference_equals_the_reference(unit, activation, backend):
    block = _block(PATTERNS["threshold_ab"], unit, activation=activation, norm_eps=1e-3).fuse(True, backend)
    block(torch.randn(4, 7, 4, 4, dtype=F64))  # running statistics away from 0 and 1
    block.eval()
    x = 20 * torch.randn(2, 7, 4, 3, dtype=F64)
    fixed = [Statistics(m.running_mean, m.running_var) for m in _norms(block)]
    expected, _ = block_forward(block.plan, x, list(block.parameters()), fixed, 1e-3, activation)
    with torch.no_grad():
        assert_close(block(x), expected)
    assert_close(block(x), expected)  # the path that keeps what backward needs


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("activation", NAMES)
def test_activations_and_recompute(unit, activation, backend):
    block = _block(links.dense(4), unit, activation=activation)
    theirs, ours = _both(block, backend, 8 * torch.randn(2, 7, 5, 4, dtype=F64), recompute="bottleneck")
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("width", [7, 16])  # of 16 channels the nodes' rows could be the output
@pytest.mark.parametrize("unit", UNITS)
def test_outputs_in_any_order(unit, width, backend):
    block = _block(links.dense(3), unit, width=width, k=width)
    block.plan = dataclasses.replace(block.plan, outputs=(2, 0, 3, 1))
    theirs, ours = _both(block, backend, torch.randn(2, width, 5, 4, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern, unit, backend):
    rows = tn.links.custom(PATTERNS[pattern][:3])
    torch.manual_seed(0)
    block = ThresholdBlock(2, rows, 2, unit=unit, bottleneck_factor=1, dtype=F64, outputs="all").fuse(True, backend)
    x = torch.randn(2, 2, 3, 2, dtype=F64, requires_grad=True)
    parameters = dict(block.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    # the interpreter takes minutes for whole Jacobians: random projections of them instead
    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=backend == "triton")


@pytest.mark.parametrize("unit", UNITS)
def test_opcheck(unit, backend, monkeypatch):
    block = _block(links.threshold_ab(3, 2), unit, dtype=torch.float32).fuse(True, backend)
    x = torch.randn(2, 7, 4, 3, requires_grad=True)
    calls = []

    def record(operator, *arguments):
        calls.append(arguments)
        return operator(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(transforms, "call", record)
        block(x)
    torch.library.opcheck(ops.block, calls[0])
    laid = [
        p.to(memory_format=torch.channels_last).detach().requires_grad_() if p.ndim == 4 else p for p in calls[0][1]
    ]
    torch.library.opcheck(ops.block, (calls[0][0], laid, *calls[0][2:]))
    weight = torch.randn(4, 9, 3, 3, requires_grad=True)
    sources = [torch.randn(2, c, 5, 4, requires_grad=True) for c in (4, 5)]
    torch.library.opcheck(ops.linked_conv2d, (sources, weight, backend))


@pytest.mark.parametrize("unit", UNITS)
def test_eval_mode_with_gradients_is_a_frozen_norm(unit, backend):
    block = _block(PATTERNS["threshold_ab"], unit)
    block(torch.randn(4, 7, 4, 4, dtype=F64))
    theirs, ours = _both(block.eval(), backend, torch.randn(2, 7, 5, 4, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_some_norms_frozen(unit, backend):
    block = _block(PATTERNS["dense"], unit)
    block(torch.randn(4, 7, 4, 4, dtype=F64))
    for norm in _norms(block)[::3]:
        norm.eval()
    theirs, ours = _both(block, backend, torch.randn(2, 7, 5, 4, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "conv_relu"])
def test_momentum_none_no_affine_no_running_statistics_and_own_eps(unit, backend):
    block = _block(PATTERNS["dense"], unit, norm_momentum=None)
    for i, norm in enumerate(_norms(block)):
        norm.eps = 1e-5 * (i + 1)  # readers of one feature may differ in eps
    layer = block.layers[1]
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(layer, name, nn.BatchNorm2d(child.num_features, affine=False, dtype=F64))
    last = block.layers[-1]
    name = "norm2" if unit == "bottleneck" else "norm"
    setattr(last, name, nn.BatchNorm2d(getattr(last, name).num_features, track_running_stats=False, dtype=F64))
    for _ in range(2):
        theirs, ours = _both(block, backend, torch.randn(2, 7, 5, 4, dtype=F64))
        _assert_same(ours, theirs, F64)
        block.zero_grad()


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_of_any_subset(unit, backend):
    plain = _block(PATTERNS["threshold_ab"], unit)
    names = [name for name, _ in plain.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    for trial in range(6):
        wanted = {name for name in names if torch.rand((), generator=generator) < 0.3}
        needs_x = trial % 2 == 0
        grads = []
        for block in (copy.deepcopy(plain), copy.deepcopy(plain).fuse(True, backend)):
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(name in wanted)
            torch.manual_seed(trial)
            x = torch.randn(2, 7, 4, 4, dtype=F64, requires_grad=needs_x)
            y = block(x)
            assert y.requires_grad == bool(needs_x or wanted)
            if y.requires_grad:
                y.square().sum().backward()
            grads.append([x.grad, *(p.grad for p in block.parameters())])
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("unit", UNITS)
def test_float32(unit, backend):
    block = _block(links.threshold_bc(12, 6), unit, dtype=torch.float32, width=16, k=12)
    theirs, ours = _both(block, backend, torch.randn(3, 16, 9, 7))
    assert_close(ours[0], theirs[0], torch.float32, "output")
    for a, b in zip([ours[1], *ours[2]], [theirs[1], *theirs[2]], strict=True):
        assert rms_error(a, b) < 1e-3  # a mask that flips near 0 moves single elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_half_formats_are_no_worse_than_plain_torch(unit, dtype, backend):
    """Both against fp64 of the same rounded operands, over several images: single masks flip near 0 on either side."""
    if (unit, backend) == ("bn_relu_conv", "triton"):
        pytest.skip("of its few images one flips a mask on our side alone, natively too: the next test has none")
    exact = _block(links.threshold_ab(6, 3), unit, width=16, k=8)
    exact.to(dtype).to(F64)
    half = copy.deepcopy(exact).to(dtype)
    errors = torch.zeros(2, 3)  # (ours, plain torch) x (output, gradient of x, gradients of parameters), squared
    images, size = (20, (4, 16, 12, 12)) if backend == "native" else (3, (2, 16, 8, 8))
    for seed in range(images):
        x = torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        truth, _ = _both(exact, backend, x.to(F64))
        theirs, ours = _both(half, backend, x)
        assert ours[0].dtype == dtype and ours[1].dtype == dtype
        for side, result in enumerate((ours, theirs)):
            errors[side, 0] += rms_error(result[0], truth[0]) ** 2
            errors[side, 1] += rms_error(result[1], truth[1]) ** 2
            errors[side, 2] += sum(rms_error(a, t) ** 2 for a, t in zip(result[2], truth[2], strict=True))
    assert (errors[0] <= 1.1 * errors[1]).all(), errors.sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_half_formats_round_no_more_than_plain_torch(unit, dtype, backend):
    """The same with masks that no rounding flips: a flip outweighs all else."""
    exact = _block(links.threshold_ab(6, 3), unit, width=16, k=8)
    for module in exact.modules():  # 3 channels of 4 pass everywhere, the fourth nowhere
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += torch.where(torch.arange(len(module.bias)) % 4 == 3, -8, 8)
    exact.to(dtype).to(F64)
    half = copy.deepcopy(exact).to(dtype)
    errors = torch.zeros(2, 3)  # (ours, plain torch) x (output, gradient of x, gradients of parameters), squared
    for seed in range(3):
        x = torch.randn(2, 16, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        truth, _ = _both(exact, "native", x.to(F64))
        theirs, ours = _both(half, backend, x)
        assert ours[0].dtype == dtype and ours[1].dtype == dtype
        for side, result in enumerate((ours, theirs)):
            parameters = (torch.cat([g.double().flatten() for g in gradients[2]]) for gradients in (result, truth))
            pairs = (result[0], truth[0]), (result[1], truth[1]), parameters
            errors[side] += torch.tensor([rms_error(*pair) for pair in pairs]) ** 2
    ours, theirs = errors.sqrt()  # a feature's gradient is rounded once more, before the statistics' share
    assert (ours <= 1.1 * theirs).all(), errors.sqrt()


@pytest.mark.parametrize("unit", UNITS)
def test_integer_operands_give_exact_equality(unit, backend):
    """Small integers in weights, features and statistics: every sum is exact in fp32, so nothing may differ."""
    block = ThresholdBlock(3, links.dense(3), 4, unit=unit, norm_eps=1e-30).eval()  # lost in 1; torch 2.11 refuses 0
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        if parameter.dim() == 4 or unit == "conv_relu":
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
    x = torch.randint(-2, 3, (2, 3, 5, 4), generator=generator).float()
    assert torch.equal(copy.deepcopy(block).fuse(True, backend)(x), block(x))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("depth", [1, 32])
def test_shallow_and_deep(depth, unit, backend):
    block = _block(links.dense(depth), unit, k=3)
    theirs, ours = _both(block, backend, torch.randn(2, 7, 3, 3, dtype=F64))
    _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_dead_ends_have_zero_gradients(unit, backend):
    block = _block(((0,), (0,), (1,), (0, 2)), unit, outputs=(4,))  # nodes 1 and 3 reach no output
    theirs, ours = _both(block, backend, torch.randn(2, 7, 4, 4, dtype=F64))
    _assert_same(ours, theirs, F64)
    assert not any(g.any() for g in ours[2][: len(ours[2]) // 4])


@pytest.mark.parametrize("unit", UNITS)
def test_output_alone_and_input_among_the_outputs(unit, backend):
    for outputs in ((0,), (3,), (0, 2)):
        block = _block(links.harmonic(3), unit, outputs=outputs)
        theirs, ours = _both(block, backend, torch.randn(2, 7, 4, 4, dtype=F64))
        _assert_same(ours, theirs, F64)


@pytest.mark.parametrize("unit", UNITS)
def test_two_runs_are_bit_equal_and_the_input_stays(unit, backend):
    block = _block(links.threshold_ab(6, 3), unit, dtype=torch.float32).fuse(True, backend)
    x = torch.randn(2, 7, 6, 6, requires_grad=True)
    kept = x.detach().clone()
    runs = [torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(x, kept)


@pytest.fixture
def poison():
    """Every tensor that torch allocates without filling it holds NaN (integers: the largest value)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recompute", [None, "bottleneck"])
@pytest.mark.parametrize("unit", UNITS)
def test_nothing_is_read_before_it_is_written(unit, recompute, backend, request):
    """NaN in every buffer and workspace before its use changes no bit; widths that need padding, a dead end, a mask."""
    block = _block(((0,), (1, 0), (2,), (3, 1, 0)), unit, dtype=torch.float32, outputs=(0, 1, 4))
    block.fuse(True, backend, recompute)
    x = torch.randn(2, 7, 5, 4, requires_grad=True)

    def run():
        y = block(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()], allow_unused=True)
        with torch.no_grad():
            inferred = copy.deepcopy(block).eval()(x)
        return [y, inferred, *(g for g in grads if g is not None)]

    run()  # the second and third start from other running statistics, which training does not read
    block.load_state_dict(state := copy.deepcopy(block.state_dict()))
    clean = run()
    request.getfixturevalue("poison")
    block.load_state_dict(state)
    for a, b in zip(run(), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("outputs", ["all", (1, 3)])
def test_backward_twice_over_one_graph(outputs, unit, backend):
    block = _block(links.dense(3), unit, outputs=outputs, k=8, width=8).fuse(True, backend)
    x = torch.randn(2, 8, 4, 4, dtype=F64, requires_grad=True)
    y = block(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def _call(block, x, tail=(), masks=(), drop=0.0, backend="native", recompute=False):
    """The operator itself: what a block hands it, and more."""
    norms = _norms(block)
    empty = x.new_empty(0)
    return ops.block(
        x, [*block.parameters(), *tail], [empty] * 2 * len(norms), block.plan.to_text(), [n.eps for n in norms],
        [False] * len(norms), "relu", backend, True, recompute, list(masks), None, drop, "",
    )  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_inference_returns_no_statistics(unit, backend):
    """Nobody would read them, and each would be an operation; a call for backward or in training returns all."""
    block = _block(links.harmonic(4), unit)
    x, norms = torch.randn(2, 7, 5, 4, dtype=F64), _norms(block)
    running = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    for fixed, save, count in ((True, False, 0), (True, True, len(norms)), (False, False, len(norms))):
        _, statistics, _ = ops.block(
            x, list(block.parameters()), running, block.plan.to_text(), [n.eps for n in norms], [fixed] * len(norms),
            "relu", backend, save, False, [], None, 0.0, "",
        )  # fmt: skip
        assert len(statistics) == count


@pytest.mark.parametrize("unit", ["conv_bn_relu", "bn_relu_conv", "bottleneck"])
def test_given_statistics_are_cast_together(unit):
    """A cast takes an operation's time, for a small image a layer's: the same number however deep."""
    casts = []
    for depth in (3, 6):
        block = _block(links.dense(depth), unit, torch.bfloat16, fused=True).eval()
        with torch.no_grad(), torch.profiler.profile() as profile:
            block(torch.randn(1, 7, 1, 1, dtype=torch.bfloat16))  # one pixel: nothing is folded into a weight
        casts.append(sum(event.name == "aten::_to_copy" for event in profile.events()))
    assert 0 < casts[0] == casts[1]


@pytest.mark.parametrize("width", [6, 8])
def test_a_pointwise_convolution_behind_the_block(width, backend):
    block = _block(links.harmonic(4), "conv_bn_relu")
    tail = torch.randn(width, block.out_channels, 1, 1, dtype=F64, requires_grad=True)
    x = torch.randn(2, 7, 5, 4, dtype=F64, requires_grad=True)
    y, statistics, _ = _call(block, x, [tail], backend=backend)
    expected = nn.functional.conv2d(block(x), tail)
    assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last) and len(statistics) == 4
    cotangent, inputs = torch.randn_like(y), [x, tail, *block.parameters()]
    ours, theirs = (torch.autograd.grad(out, inputs, cotangent) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    only_tail = torch.autograd.grad(
        _call(block.requires_grad_(False), x.detach(), [tail], backend=backend)[0].sum(), tail
    )
    assert only_tail[0].shape == tail.shape
    arguments = (x.detach(), [*block.parameters(), tail], [x.new_empty(0)] * 8, block.plan.to_text(), [1e-5] * 4)
    torch.library.opcheck(ops.block, (*arguments, [False] * 4, "relu", backend, True, False, [], None, 0.0, ""))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["dense", "threshold_bc"])
def test_dropout_masks(pattern, recompute, backend):
    block = _block(PATTERNS[pattern], "bottleneck")
    x = torch.randn(2, 7, 5, 4, dtype=F64, requires_grad=True)
    masks = [torch.rand(2, width, 5, 4) < 0.7 for width in block.widths]
    y, _, _ = _call(block, x, masks=masks, drop=0.3, backend=backend, recompute=recompute)
    nodes = [x]
    for sources, layer, mask in zip(block.links, block.layers, masks, strict=True):
        nodes.append(layer(torch.cat([nodes[k] for k in sources], 1)) * mask / 0.7)
    expected = torch.cat([nodes[k] for k in block.plan.outputs], 1)
    assert_close(y, expected)
    cotangent, inputs = torch.randn_like(y), [x, *block.parameters()]
    kept = cotangent.clone()
    ours, theirs = (torch.autograd.grad(out, inputs, cotangent) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert torch.equal(cotangent, kept)


def test_readers_are_gathered_in_groups(backend, monkeypatch):
    """Any number of readers at once gives the same gradients, with a ragged last group and readers that lack nodes."""
    block = _block(links.threshold_bc(7, 3), "bottleneck")
    x = torch.randn(2, 7, 4, 3, dtype=F64)
    from thresholdnet.backends import load

    results = []
    for at_once in (1, 3, 4):
        verbs = load(backend).Verbs
        original = verbs.__init__

        def init(self, plan, x, original=original, at_once=at_once):
            original(self, plan, x)
            self.readers_at_once = at_once

        with monkeypatch.context() as patch:
            patch.setattr(verbs, "__init__", init)
            results.append(_both(copy.deepcopy(block), backend, x)[1])
    for other in results[1:]:
        _assert_same(other, results[0], F64)


def test_more_elements_than_offsets_can_hold():
    """Native counts in 64 bits; Triton's offsets are int32: it says so before it allocates anything."""
    block = ThresholdBlock(8, links.dense(2), 8, unit="bottleneck", dtype=torch.bfloat16, device="meta").eval()
    x = torch.empty(2**15, 8, 64, 64, dtype=torch.bfloat16, device="meta")  # 2^30 elements, 3 nodes
    text, parameters = block.plan.to_text(), list(block.parameters())
    running = [t for n in _norms(block) for t in (n.running_mean, n.running_var)]
    arguments = (x, parameters, running, text, [1e-5] * 4, [True] * 4, "relu")
    y, _, _ = ops.run_block(*arguments, "native", False, False, [], None, 0.0, "")
    assert y.shape == (2**15, 24, 64, 64)
    if "triton" in BACKENDS:
        with pytest.raises(ValueError, match=r"fewer than 2\^31 elements for all layers together, got 4294967296"):
            ops.run_block(*arguments, "triton", False, False, [], None, 0.0, "")


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
@pytest.mark.parametrize(("dtype", "most"), ((torch.float32, 4_194_240), (torch.float64, 1_048_560)))
def test_more_pixels_than_a_grid_can_hold(dtype, most):
    """The second dimension of a launch's grid; nothing is allocated."""
    plan = ThresholdBlock(8, links.dense(1), 8).plan
    engine_verbs = load("triton").Verbs
    engine_verbs(plan, torch.empty(most // 240, 8, 16, 15, dtype=dtype, device="meta"))
    with pytest.raises(ValueError, match=f"must have at most {most} pixels in all images together, got {most + 240} "):
        engine_verbs(plan, torch.empty(most // 240 + 1, 8, 16, 15, dtype=dtype, device="meta"))


@pytest.mark.parametrize("unit", UNITS)
def test_memory_formats_and_slices(unit, backend):
    block = _block(links.threshold_ab(4, 2), unit).fuse(True, backend).eval()
    x = torch.randn(2, 7, 6, 5, dtype=F64)
    expected = block(x)
    wide = torch.randn(2, 11, 6, 5, dtype=F64).to(memory_format=torch.channels_last)
    wide[:, 2:9] = x
    for other in (x.to(memory_format=torch.channels_last), wide[:, 2:9], x.flip(3).flip(3), x[:, :, :, :]):
        y = block(other)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, expected)
    repeated = x[:1].expand(3, -1, -1, -1)
    assert_close(block(repeated), expected[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_lie_as_their_parameters(unit, backend):
    block = _block(links.threshold_ab(3, 2), unit, dtype=torch.float32).to(memory_format=torch.channels_last)
    if unit == "bottleneck":  # as a checkpoint may hold it: the sides of 1 have other steps
        first = next(p for p in block.parameters() if p.ndim == 4 and p.shape[2] == 1)
        first.data = first.data.contiguous()
    plain = _block(links.threshold_ab(3, 2), unit, dtype=torch.float32)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, 4, 3)
    found = {}
    for name, module in (("last", block.fuse(True, backend)), ("plain", plain.fuse(True, backend))):
        parameters = list(module.parameters())
        found[name] = torch.autograd.grad(module(x).square().mean(), parameters)
        assert [grad.stride() for grad in found[name]] == [parameter.stride() for parameter in parameters]
    for last, contiguous in zip(found["last"], found["plain"], strict=True):
        torch.testing.assert_close(last, contiguous, rtol=0, atol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_empty_batch(unit, backend):
    block = _block(links.dense(2), unit).fuse(True, backend).eval()
    x = torch.randn(0, 7, 4, 4, dtype=F64, requires_grad=True)
    y = block(x)
    assert y.shape == (0, block.out_channels, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("unit", UNITS)
def test_compiles_to_one_graph(unit, backend):
    block = _block(links.threshold_ab(4, 2), unit, dtype=torch.float32).fuse(True, backend)
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 7, 5, 5)
    results = []
    for run, module in ((block, block), (compiled, twin)):
        own = x.clone().requires_grad_()
        y = run(own)
        y.square().sum().backward()
        results.append([y, own.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unit", UNITS)
def test_autocast(unit, backend):
    block = _block(links.threshold_ab(4, 2), unit, dtype=torch.float32).fuse(True, backend)
    x = torch.randn(4, 7, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in block.parameters())
    if backend == "triton":  # whose kernels take the weights as they are, and sum their gradients in fp32
        weights = [p for p in block.parameters() if p.dim() == 4]
        assert all((weight.grad != weight.grad.bfloat16()).any() for weight in weights)
    exact = copy.deepcopy(block).fuse(False)
    exact.load_state_dict(block.state_dict())
    assert rms_error(y, exact(x)) < 0.05
    assert all(norm.num_batches_tracked == 1 for norm in _norms(block))


def test_gradients_of_gradients_raise(backend):
    block = _block(links.dense(2), "conv_bn_relu").fuse(True, backend)
    x = torch.randn(2, 7, 4, 4, dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize("unit", UNITS)
def test_statistics_are_updated_exactly_once_and_not_in_eval(unit, backend):
    block = _block(links.dense(3), unit).fuse(True, backend)
    x = torch.randn(2, 7, 4, 4, dtype=F64)
    with torch.no_grad():
        block(x)
    assert all(norm.num_batches_tracked == 1 for norm in _norms(block))
    before = copy.deepcopy(block.state_dict())
    block.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


V1 = [("bottleneck", 64, 6, 56), ("bottleneck", 128, 8, 28), ("bottleneck", 192, 12, 14)]


@pytest.mark.parametrize(("unit", "width", "depth", "side"), [*V1, ("conv_bn_relu", 288, 16, 14)])
def test_bytes_kept_by_the_blocks_of_v1_at_224(unit, width, depth, side, backend):
    """Everything saved is counted, per-channel statistics included; DESIGN: 0.36, 0.33, and 0.16 with recompute."""
    rows, k = (links.dense(depth), 32) if unit == "bottleneck" else (links.harmonic(depth), 40)
    block = ThresholdBlock(width, rows, k, unit=unit)
    batch = 8 if backend == "native" else 1  # the interpreter computes every pixel
    vectors = 16 * sum(
        norm.num_features for norm in _norms(block)
    )  # four float32 vectors a BatchNorm, whatever the batch
    x = torch.randn(batch, width, side, side).to(memory_format=torch.channels_last)
    eager = storage_bytes(saved_tensors(block, x))
    assert eager == batch * block.plan.kept_bytes(side, side, 4, fused=False) + vectors
    fused = storage_bytes(saved_tensors(block.fuse(True, backend), x))
    planned = batch * block.plan.kept_bytes(side, side, 4, fused=True)
    assert 0.95 * planned <= fused <= planned + vectors  # slots padded to 8, which not all backends do
    assert fused / eager <= (0.33 if unit == "bottleneck" else 0.36)
    if unit == "bottleneck":
        assert storage_bytes(saved_tensors(block.fuse(True, backend, "bottleneck"), x)) / eager <= 0.16


def test_linked_conv2d(backend):
    torch.manual_seed(0)
    for kernel, widths in ((1, (3,)), (3, (4, 1, 9)), (3, (2,) * 16)):
        sources = [torch.randn(2, c, 5, 4, dtype=F64, requires_grad=True) for c in widths]
        weight = torch.randn(6, sum(widths), kernel, kernel, dtype=F64, requires_grad=True)
        bias = torch.randn(6, dtype=F64, requires_grad=True)
        ours = tn.functional.linked_conv2d(sources, weight, bias, backend)
        theirs = nn.functional.conv2d(torch.cat(sources, 1), weight, bias, padding=kernel // 2)
        assert_close(ours, theirs)
        cotangent = torch.randn_like(ours)
        inputs = [*sources, weight, bias]
        for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, theirs)), strict=True):
            assert_close(a, b)
    small = [torch.randn(1, c, 3, 2, dtype=F64, requires_grad=True) for c in (2, 1)]
    weight = torch.randn(2, 3, 3, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, w: tn.functional.linked_conv2d([a, b], w, None, backend),
        (*small, weight),
        fast_mode=backend == "triton",
    )


def test_linked_conv2d_bad_input():
    x, w = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 3, 3)
    cases = [
        (([], w), ValueError, "sources must hold at least one tensor"),
        (([x, torch.zeros(1, 4, 5, 6)], w), ValueError, "source 1 has shape (1, 4, 5, 6), source 0 has (1, 4, 5, 5)"),
        (([x, x], w), ValueError, "weight must have shape [O, 8, k, k] with k = 1 or 3, got (2, 4, 3, 3)"),
        (([x], torch.zeros(2, 4, 5, 5)), ValueError, "with k = 1 or 3"),
        (([x], w.double()), TypeError, "source 0 must have the weight's dtype torch.float64, got torch.float32"),
        (([x.long()], w), TypeError, "sources must have a floating-point dtype"),
        (([x[0]], w), ValueError, "source 0 must have 4 dimensions, got 3"),
        (([x.to("meta")], w), ValueError, "source 0 must lie on the weight's device cpu, got meta"),
        (([3], w), TypeError, "source 0 must be a torch.Tensor, got int"),
        ((x, w), TypeError, "sources must be a list of tensors, got Tensor"),
        ((3, w), TypeError, "sources must be a list of tensors, got int"),
        (([x], w, torch.zeros(3)), ValueError, "bias must have shape (2,), got (3,)"),
        (([x], w, 3), TypeError, "bias must be a torch.Tensor, got int"),
        (([x], w, torch.zeros(2, device="meta")), ValueError, "bias must lie on the weight's device cpu, got meta"),
        (([x], w, None, "trition"), ValueError, "did you mean triton"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error) as caught:
            tn.functional.linked_conv2d(*arguments)
        assert message in str(caught.value)


def test_backends_have_reasons():
    found = tn.backends()
    assert list(found) == ["triton", "native", "reference"]
    assert found["native"] is None and found["reference"] is None
    for name, reason in found.items():
        block = ThresholdBlock(4, links.dense(1), 4)
        if reason is None:
            block.fuse(True, name)(torch.zeros(2, 4, 2, 2))
            assert block.backend == name
        else:
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: "):
                block.fuse(True, name)


def test_bad_arguments_of_a_fused_block(backend):
    for arguments, message in (({"backend": "cuda"}, "backend 'cuda' is unknown"), ({"recompute": "all"}, "recompute")):
        with pytest.raises(ValueError, match=message):
            ThresholdBlock(4, links.dense(1), 4, fused=True, **arguments)
    with pytest.raises(ValueError, match="recompute needs fused=True, got recompute='bottleneck' without it"):
        ThresholdBlock(4, links.dense(1), 4, unit="bottleneck", recompute="bottleneck")
    block = ThresholdBlock(4, links.dense(1), 4, fused=True, backend=backend)
    with pytest.raises(ValueError, match="more than one value per channel when training"):
        block(torch.zeros(1, 4, 1, 1))
    with pytest.raises(TypeError, match=r"weights' dtype torch.float32, got torch.float64"):
        block(torch.zeros(2, 4, 2, 2, dtype=F64))
    with pytest.raises(ValueError, match="input of the block must lie on the weights' device cpu, got meta"):
        block(torch.zeros(2, 4, 2, 2, device="meta"))


def test_state_dicts_copies_and_pickles(backend):
    plain = _block(links.threshold_ab(4, 2), "conv_bn_relu").eval()
    fused = ThresholdBlock(7, links.threshold_ab(4, 2), 5, dtype=F64, fused=True, backend=backend).eval()
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 4, 4, dtype=F64)
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.fused
        assert_close(other(x), plain(x))


def test_plans_survive_their_text():
    for unit in UNITS:
        plan = ThresholdBlock(7, links.threshold_ab(4, 2), 5, unit=unit).plan
        assert type(plan).from_text(plan.to_text()) == plan


@pytest.mark.parametrize("name", [n for n in tn.list_models() if not n.startswith(("res", "wide"))])
def test_models_fused(name, backend):
    torch.manual_seed(0)
    plain = tn.create_model(name, num_classes=3, dtype=F64)
    fused = tn.create_model(name, num_classes=3, dtype=F64, fused=True, backend=backend)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 33, 40, dtype=F64)
    for module in (*plain.modules(), *fused.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for a, b in ((plain, fused), (plain.eval(), fused.eval())):
        assert_close(b(x), a(x))
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_close(a.double(), b.double(), F64)
    blocks = [m for m in fused.modules() if isinstance(m, ThresholdBlock)]
    assert all(m.backend == (backend if m.can_fuse else "reference") for m in blocks)


def test_steps_of_training_in_fp64(backend):
    """A whole small network with maps down to 1x1 pixels: the weights stay together to rounding."""
    torch.manual_seed(0)
    plain = tn.create_model("thresholdnet_bc", num_classes=4, width_mult=0.25, dtype=F64)
    fused = copy.deepcopy(plain)
    assert fuse_blocks(fused, True, backend, "bottleneck") == 5
    losses = []
    steps = 30 if backend == "native" else 6  # a step takes the interpreter two minutes
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            x = torch.randn(12, 3, 32, 32, dtype=F64, generator=generator)
            y = torch.randint(4, (12,), generator=generator)
            loss = nn.functional.cross_entropy(model(x + y.view(-1, 1, 1, 1) / 2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:steps] == pytest.approx(losses[steps:], rel=1e-7)
    assert steps < 30 or sum(losses[25:30]) < 0.9 * sum(losses[:5])
