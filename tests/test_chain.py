"""Transitions in one operator against the modules themselves: values, gradients, running statistics, bytes kept."""

import copy

import pytest
import torch
from saved import saved_tensors, storage_bytes
from torch import nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, chain, links, ops
from thresholdnet.backends import csrc
from thresholdnet.models import fuse_blocks

F64 = torch.float64


class Chained(nn.Sequential):
    def forward(self, x):
        return chain.run(self, x)


def _modules(*modules, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(*modules).to(F64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


TRANSITIONS = {
    "norm act": lambda: [nn.BatchNorm2d(6), nn.ReLU()],
    "in place": lambda: [nn.BatchNorm2d(6), nn.ReLU(inplace=True)],
    "relu6": lambda: [nn.BatchNorm2d(6), nn.ReLU6()],
    "max pool": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2, 2)],
    "overlapping max pool": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
    "ceil": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True)],
    "average": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)],
    "padded average": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "densenet": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.AvgPool2d(2, 2)],
    "1x1": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)],
    "3x3": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=False)],
    "strided": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1, bias=False)],
    "dilated": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=2, dilation=2, bias=False)],
    "depth-wise": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False)],
    "no affine": lambda: [nn.BatchNorm2d(6, affine=False, eps=1e-3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)],
    "no statistics": lambda: [nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)],
    "cumulative": lambda: [nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.MaxPool2d(2)],
    "two in a row": lambda: [
        nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.MaxPool2d(2),
    ],
}  # fmt: skip

LEFT_ALONE = {
    "bias": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)],
    "max pool behind a convolution": lambda: [
        nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.MaxPool2d(2)
    ],
    "average behind 3x3": lambda: [
        nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.AvgPool2d(2)
    ],
    "reflected": lambda: [
        nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, bias=False, padding_mode="reflect")
    ],
    "same": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding="same", bias=False)],
    "other activation": lambda: [nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2)],
    "dilated pool": lambda: [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2, dilation=2)],
    "norm alone": lambda: [nn.BatchNorm2d(6)],
    "not a batch norm": lambda: [nn.GroupNorm(2, 6), nn.ReLU()],
}  # fmt: skip


def _calls(run):
    """Names of our operators that ran, in order."""
    names = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "thresholdnet::" in str(func._schema.name):
                names.append(func._schema.name.removeprefix("thresholdnet::"))
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return names


def _same(net, x, runs=2):
    """Chained and plain: outputs, all gradients, buffers, over several steps."""
    plain = copy.deepcopy(net)
    for _ in range(runs):
        results = []
        for model, run in ((net, chain.run), (plain, lambda m, x: nn.Sequential(*m)(x))):
            leaf = x.clone().requires_grad_()
            y = run(list(model), leaf * 1)  # a ReLU in place may not write into a leaf
            cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
            results.append((y, torch.autograd.grad(y, [leaf, *model.parameters()], cotangent)))
        (y, grads), (expected, wanted) = results
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for (name, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_equals_the_modules(name, train):
    net = _modules(*TRANSITIONS[name]())
    x = torch.randn(3, 6, 9, 7, dtype=F64)
    chain.run(list(net), x)  # running statistics other than 0 and 1
    net.train(train)
    _same(net, x)
    _same(net, x[:1, :, :, :].to(memory_format=torch.channels_last), runs=1)
    assert set(_calls(lambda: chain.run(list(net), x))) == {"transition"}
    kept = saved_tensors(Chained(*net), x)
    own = [t for t in kept if t.numel() > 100 and t.data_ptr() not in {p.data_ptr() for p in net.parameters()}]
    assert len({t.untyped_storage().data_ptr() for t in own}) == name.count("two") + 1  # the input of each


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
@pytest.mark.parametrize("name", ["densenet", "1x1", "3x3", "strided", "dilated", "depth-wise"])
def test_few_pixels_take_the_layers_convolution(name, monkeypatch):
    convolve, calls = csrc.linked_conv2d, []
    monkeypatch.setattr(csrc, "linked_conv2d", lambda *given: calls.append(given) or convolve(*given))
    net, x = _modules(*TRANSITIONS[name]()), torch.randn(1, 6, 4, 4, dtype=F64)
    _same(net, x)
    _same(net.eval(), x, runs=1)
    assert len(calls) == 3 * (name in ("densenet", "1x1", "3x3"))


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_known_runs_as_itself(name):
    net = _modules(*LEFT_ALONE[name]())
    x = torch.randn(2, 6, 9, 7, dtype=F64)
    _same(net, x)


def test_nested_containers_and_hooks():
    net = _modules(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), nn.Sequential(nn.Conv2d(6, 4, 1, bias=False)))
    x = torch.randn(2, 6, 5, 5, dtype=F64)
    assert _calls(lambda: chain.run(list(net), x)) == ["transition"]
    seen = []
    net[1][0].register_forward_hook(lambda m, i, o: seen.append("conv"))
    assert _calls(lambda: chain.run(list(net), x)) == ["transition"] and seen == ["conv"]
    net[0].register_forward_hook(lambda m, i, o: seen.append("container"))
    assert _calls(lambda: chain.run(list(net), x)) == [] and seen == ["conv", "container", "conv"]
    _same(net, x)


def test_empty_and_single_inputs_are_left_to_torch():
    net = _modules(*TRANSITIONS["densenet"]()).eval()
    assert chain.run(list(net), torch.empty(0, 6, 4, 4, dtype=F64)).shape == (0, 4, 2, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain.run(list(net.train()), torch.ones(1, 6, 1, 1, dtype=F64))
    with pytest.raises(RuntimeError, match=r"expected 6|should contain 5"):
        chain.run(list(net), torch.ones(2, 5, 4, 4, dtype=F64))


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)])
def test_gradients_of_a_subset(needs):
    net = _modules(*TRANSITIONS["densenet"]())
    x = torch.randn(2, 6, 4, 6, dtype=F64)
    wanted = [t for t, need in zip((x, net[0].weight, net[0].bias, net[2].weight), needs, strict=True) if need]
    for tensor in (x, *net.parameters()):
        tensor.requires_grad_(any(tensor is w for w in wanted))
    ours = torch.autograd.grad(chain.run(list(net), x).square().sum(), wanted)
    theirs = torch.autograd.grad(net(x).square().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["densenet", "overlapping max pool", "3x3", "relu6"])
def test_gradcheck_and_opcheck(name):
    net = _modules(*TRANSITIONS[name]())
    x = torch.randn(2, 6, 4, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: chain.run(list(net), x), (x, *net.parameters()), nondet_tol=0.0)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (dx,) = torch.autograd.grad(chain.run(list(net), x).square().sum(), x, create_graph=True)
        dx.sum().backward()
    conv = next((m for m in net if isinstance(m, nn.Conv2d)), None)
    pool = chain._pooling(net[-1], 2) or ("", [0] * 8)
    window = [1, 1, 0, 0, 1, 1] if conv is None else [*conv.stride, *conv.padding, *conv.dilation]
    torch.library.opcheck(
        ops.transition,
        (x, net[0].weight, net[0].bias, None if conv is None else conv.weight, [x.new_empty(0)] * 2, None, 1e-5, False,
         "relu", window, *pool, ""),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats(dtype):
    """Both against fp64 of the same rounded operands."""
    from tolerances import rms_error

    exact = _modules(*TRANSITIONS["densenet"]()).to(dtype).to(F64)
    half = copy.deepcopy(exact).to(dtype)
    errors = torch.zeros(2)
    for seed in range(8):
        x = torch.randn(4, 6, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        truth = exact(x.to(F64))
        errors += torch.tensor([rms_error(y, truth) for y in (chain.run(list(half), x), half(x))])
    assert errors[0] <= 1.1 * errors[1]


def test_autocast_and_compile():
    net = _modules(
        *TRANSITIONS["two in a row"](), ThresholdBlock(5, links.harmonic(4), 4), nn.Conv2d(20, 4, 1, bias=False)
    )
    x = torch.randn(2, 6, 8, 8, dtype=F64)
    out = chain.run(list(net), x)
    torch.testing.assert_close(torch.compile(lambda x: chain.run(list(net), x), fullgraph=True)(x), out)
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = chain.run(list(net), x.float()), net(x.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.1, atol=0.1)


def test_a_block_takes_the_convolution_behind_it_along():
    block = ThresholdBlock(6, links.harmonic(4), 4, fused=True, backend="native", dtype=F64)
    net = nn.Sequential(block, nn.Conv2d(block.out_channels, 5, 1, bias=False, dtype=F64), nn.ReLU())
    x = torch.randn(2, 6, 5, 4, dtype=F64)
    y = chain.run(list(net), x)
    torch.testing.assert_close(y, copy.deepcopy(net)(x))
    fused = storage_bytes(saved_tensors(Chained(*net), x))
    apart = storage_bytes(saved_tensors(net, x))
    assert apart - fused == block.out_channels * 2 * 5 * 4 * 8  # the block's output
    shapes = []
    block.register_forward_hook(lambda m, i, o: shapes.append(o.shape[1]))
    chain.run(list(net), x)
    assert shapes == [block.out_channels]  # a hook sees the block's own output
    weight = net[1].weight
    torch.testing.assert_close(block.fuse(False)(x, tail=weight), nn.functional.conv2d(block(x), weight))
    with pytest.raises(
        ValueError, match=r"tail must be None for unit 'bottleneck', got a weight of shape \(5, 20, 1, 1\)"
    ):
        ThresholdBlock(6, links.dense(1), 4, unit="bottleneck")(x.float(), tail=weight)


@pytest.mark.parametrize("name", ["thresholdnet_v1", "thresholdnet_bc", "hardnet39ds", "hardnet68", "densenet121"])
@pytest.mark.parametrize("pyramid", [False, True], ids=["classifier", "pyramid"])
def test_whole_networks_equal_plain_ones(name, pyramid):
    torch.manual_seed(0)
    arguments = {"features_only": True} if pyramid else {"num_classes": 3, "drop_rate": 0.0}
    plain = tn.create_model(name, dtype=F64, **arguments)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused, backend="native")
    x = torch.randn(2, 3, 64, 64, dtype=F64)
    for train in (True, False):
        outs = [model.train(train)(x) for model in (plain, fused)]
        outs = outs if pyramid else [[out] for out in outs]
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)
        grads = [torch.autograd.grad(sum(o.square().mean() for o in out), list(m.parameters())[:-2], allow_unused=True)
                 for out, m in zip(outs, (plain, fused), strict=True)]  # fmt: skip
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for (key, a), b in zip(plain.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8, msg=key)


KEPT = {  # DESIGN section 7's bytes kept against eager, whole networks at 224: fused, and with recompute
    "thresholdnet_v1": (0.32, 0.16), "thresholdnet_v2": (0.32, 0.16), "hardnet68": (0.33, 0.33),
    "densenet121": (0.27, 0.11),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_bytes_kept_by_whole_networks(name):
    report = tn.memory.account(tn.create_model(name, drop_rate=0.0), (8, 3, 224, 224))
    shares = [report[mode].kept / report["eager"].kept for mode in ("fused", "fused, recompute")]
    assert all(share <= bound for share, bound in zip(shares, KEPT[name], strict=True)), shares
