"""Volumes [N, C, D, H, W]: blocks of Conv3d and BatchNorm3d, transitions and other people's models, in the engine."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from on_gpu import needs_gpu
from saved import saved_tensors, storage_bytes
from test_blocks import PATTERNS, UNITS
from test_chain import Chained, _calls, _same
from test_engine import _block as _any_block
from tolerances import HALF_VOLUMES, PASS_RELATIVE, RELATIVE, assert_close, largest_error, rms_error
from torch import nn
from torch.nn.grad import conv3d_input, conv3d_weight
from torch.nn.modules.batchnorm import _BatchNorm

import thresholdnet as tn
from thresholdnet import ThresholdBlock, chain, downsampling, links, ops, pixels
from thresholdnet.backends import csrc, volumes
from thresholdnet.convert import ConvertedBlock
from thresholdnet.models import fuse_blocks
from thresholdnet.reference import Statistics, block_forward
from thresholdnet.selftest import full_precision

F64 = torch.float64
LAST = torch.channels_last_3d
_block = partial(_any_block, spatial_dims=3)
SIZES = [(2, 3, 4, 5), (1, 1, 3, 2), (3, 2, 1, 1), (1, 5, 2, 7)]  # N, D, H, W


@pytest.fixture(params=["C++", "torch"])
def passes(request, monkeypatch):
    """The library's passes over pixels, or torch's."""
    if request.param == "torch":
        monkeypatch.setattr(csrc, "takes", lambda x: False)
    elif csrc.reason() is not None:
        pytest.skip(f"no C++ library: {csrc.reason()}")


def _step(block, x):
    """Output, gradients of x and of the parameters."""
    own = x.detach().clone().requires_grad_()
    y = block(own)
    cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [own, *block.parameters()], cotangent)]


def _assert_same(ours, theirs):
    largest = max(g.abs().max().item() for g in theirs[1:])
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        # a gradient that is 0 but for rounding is held against the largest of all
        assert (a - b).abs().max() <= 1e-9 * max(b.abs().max().item(), 1e-3 * largest), i


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_plain_block(pattern, unit, size, passes):
    n, d, h, w = size
    plain = _block(PATTERNS[pattern], unit)
    fused = copy.deepcopy(plain).fuse(True, "native")
    x = torch.randn(n, 7, d, h, w, dtype=F64)
    _assert_same(_step(fused, x), _step(plain, x))
    assert fused.backend == "native"
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_reference_equals_the_plain_block(unit):
    """Two ways to write it down: the modules, and the reference's formulas."""
    block = _block(PATTERNS["threshold_ab"], unit)
    x = torch.randn(2, 7, 3, 4, 5, dtype=F64, requires_grad=True)
    expected, used = block_forward(block.plan, x, list(block.parameters()))
    assert_close(block(x), expected)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm3d)]
    for norm, statistics in zip(norms, used, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.1 * statistics.mean)
    block.eval()
    fixed = [Statistics(m.running_mean, m.running_var) for m in norms]
    expected, _ = block_forward(block.plan, x, list(block.parameters()), fixed)
    assert_close(block(x), expected)


@pytest.mark.parametrize("unit", UNITS)
def test_a_volume_of_one_slice_is_an_image(unit):
    """Of a 3x3x3 kernel the middle 3x3 alone meets it."""
    volumes = _block(PATTERNS["threshold_ab"], unit).fuse(True, "native")
    images = ThresholdBlock(7, PATTERNS["threshold_ab"], 5, unit=unit, dtype=F64, fused=True, backend="native")
    for ours, theirs in zip(images.parameters(), volumes.parameters(), strict=True):
        ours.data.copy_(theirs[:, :, theirs.shape[2] // 2] if theirs.dim() == 5 else theirs)
    x = torch.randn(2, 7, 5, 4, dtype=F64)
    assert_close(volumes(x[:, :, None])[:, :, 0], images(x))


@pytest.mark.parametrize("mode", ["frozen", "inference"])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (4, 6, 7, 8)])  # normalised behind the convolution, and folded into it
@pytest.mark.parametrize("unit", UNITS)
def test_given_statistics(unit, size, mode, passes):
    n, d, h, w = size
    plain = _block(PATTERNS["threshold_ab"], unit, activation="leaky_relu(0.1)")
    x = torch.randn(n, 7, d, h, w, dtype=F64)
    plain(4 * x + 1)  # running statistics away from 0 and 1
    plain.eval()
    fused = copy.deepcopy(plain).fuse(True, "native")
    if mode == "frozen":
        _assert_same(_step(fused, x), _step(plain, x))
        return
    with torch.no_grad():
        assert_close(fused(x), plain(x))
        expected = plain(x)
        tn.prepack(fused)
        for _ in range(2):
            assert_close(fused(x), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 4, 5, 6), (1, 3, 1, 2), (1, 2, 3, 3), (2, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_of_volumes_and_their_gradients(dtype, size, dilation, packed):
    """Of single volumes, which torch would send through loops of its own; of two sources among other channels."""
    torch.manual_seed(0)
    n, d, h, w = size
    whole = torch.full((n, 40, d, h, w), float("nan"), dtype=dtype).contiguous(memory_format=LAST)
    whole[:, 3:26], whole[:, 30:37] = torch.randn(n, 23, d, h, w), torch.randn(n, 7, d, h, w)
    read = torch.cat([whole[:, 3:26], whole[:, 30:37]], 1).double()
    weight = torch.randn(12, 30, 3, 3, 3).to(dtype).contiguous(memory_format=LAST)
    dz, bias = torch.randn(n, 12, d, h, w).to(dtype).contiguous(memory_format=LAST), torch.randn(12)
    verbs, images = volumes.Verbs(None, pixels.as_images(whole), (d, h)), pixels.as_images(whole)
    sources, arriving = [images[:, 3:26], images[:, 30:37]], pixels.as_images(dz)
    way = verbs.way(1, weight, dilation)
    if dtype == torch.bfloat16 and (d <= 2 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        assert way == "", "oneDNN does not take such volumes here, or takes them in float32"
    else:
        assert way == "library"
    kernel = verbs.packed(way, weight, dilation) if packed else weight
    form = {"padding": dilation, "dilation": dilation}
    found = {
        F.conv3d(read, weight.double(), **form): verbs.conv(sources, kernel, into=("node", 1), dilation=dilation)[0],
        F.leaky_relu(F.conv3d(read, weight.double(), bias.double(), **form), 0.1): verbs.conv(
            sources, kernel, into=("node", 1), bias=bias, activation="leaky_relu(0.1)", dilation=dilation
        )[0],
        conv3d_input(read.shape, weight.double(), dz.double(), **form): verbs._data_gradient(
            arriving, weight, dilation
        ),
        conv3d_weight(read, weight.shape, dz.double(), **form): verbs.weight_gradient(
            sources, arriving, 3, like=weight, dilation=dilation
        ),
    }
    bound = RELATIVE[dtype] if dtype == torch.float32 else PASS_RELATIVE[dtype]
    for wanted, made in found.items():
        assert made.dtype == dtype
        assert largest_error(made.view(wanted.shape), wanted) <= bound


@pytest.mark.parametrize("order", ["NCDHW", "channels_last_3d", "strided", "repeated"])
@pytest.mark.parametrize("unit", UNITS)
def test_layouts_replays_and_recomputation(unit, order, monkeypatch):
    """The same whatever the input's memory is like, at every call; the output and the input's gradient lie as said."""
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    plain = _block(PATTERNS["threshold_ab"], unit)
    fused = copy.deepcopy(plain).fuse(True, "native", "bottleneck").to(memory_format=LAST)
    x = torch.randn(2, 7, 3, 4, 5, dtype=F64)
    if order == "repeated":
        x = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    expected = _step(plain, x)
    laid = {
        "NCDHW": lambda: x.contiguous(), "channels_last_3d": lambda: x.contiguous(memory_format=LAST),
        "strided": lambda: torch.stack([x, x + 1], 3)[:, :, :, 0].transpose(2, 4).clone().transpose(2, 4),
        "repeated": lambda: x,
    }[order]()  # fmt: skip
    y = assert_repeats(fused, laid, expected)
    assert y.is_contiguous(memory_format=LAST)


def assert_repeats(block, laid, expected):
    """The same at four calls, of the first ones and replays; returns the last output."""
    for _ in range(4):
        own = laid.detach().requires_grad_()
        y = block(own)
        cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, [own, *block.parameters()], cotangent)
        _assert_same([y.detach(), *grads], expected)
    return y


@pytest.mark.parametrize("channels", [False, True])
def test_dropout(channels):
    block = _block(links.dense(3), "bottleneck", drop_rate=0.5).fuse(True, "native")
    block.drop_channels = channels
    x = torch.randn(2, 7, 3, 4, 5, dtype=F64, requires_grad=True)
    torch.manual_seed(0)
    y = block(x)
    dropped = (y[:, 7:] == 0).double()
    assert 0.3 < dropped.mean() < 0.7
    by_channel = dropped.mean((2, 3, 4))
    assert bool(((by_channel == 0) | (by_channel == 1)).all()) == channels
    (grad,) = torch.autograd.grad(y[:, 7:12].sum(), block.layers[0].conv2.weight)
    kept = (dropped[:, :5] == 0).double() * 2  # the first layer's own features, doubled where they are kept
    layer = copy.deepcopy(block.layers[0])
    layer.drop.p = 0.0
    torch.testing.assert_close(grad, torch.autograd.grad((layer(x) * kept).sum(), layer.conv2.weight)[0])


@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit):
    assert_gradients(unit, (2, 3, 2))


def assert_gradients(unit, sides):
    """Those of finite differences, and none of gradients."""
    rows = tn.links.custom(PATTERNS["threshold_ab"][:3])
    torch.manual_seed(0)
    block = ThresholdBlock(
        2, rows, 2, unit=unit, bottleneck_factor=1, dtype=F64, outputs="all", spatial_dims=len(sides), fused=True,
        backend="native",
    )  # fmt: skip
    x = torch.randn(2, 2, *sides, dtype=F64, requires_grad=True)
    parameters = dict(block.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(torch.autograd.grad(block(x).sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("unit", UNITS)
def test_opcheck_and_compile(unit):
    block = _block(links.threshold_ab(3, 2), unit, dtype=torch.float32).fuse(True, "native")
    x = torch.randn(2, 7, 2, 4, 3)
    assert_passes_opcheck(block, x)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(_step(compiled, x), _step(block, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def assert_passes_opcheck(block, x):
    """Of a block's operator, whose pixels are x."""
    parameters = [p.detach().requires_grad_() for p in block.parameters()]
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    running = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    torch.library.opcheck(
        ops.block,
        (x.requires_grad_(), parameters, running, block.plan.to_text(), [1e-5] * len(norms), [False] * len(norms),
         "relu", "native", True, False, [], None, 0.0, ""),
    )  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_unwritten_is_read(unit, monkeypatch, passes):
    """Memory that nobody wrote is NaN, and of two equal calls every bit is the same."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(made):
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    block = _block(PATTERNS["threshold_bc"], unit).fuse(True, "native")
    x = torch.randn(2, 7, 3, 4, 5, dtype=F64)
    expected = _step(block, x)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    for ours, theirs in zip(_step(block, x), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_half_formats_round_no_more_than_plain_torch(unit, dtype):
    assert_rounds_no_more_than_plain_torch(unit, dtype, (2, 16, 4, 5, 6))


def assert_rounds_no_more_than_plain_torch(unit, dtype, shape):
    """Both against fp64 of the same rounded operands, with masks that no rounding flips: a flip outweighs all else."""
    exact = _any_block(links.threshold_ab(6, 3), unit, width=16, k=8, spatial_dims=len(shape) - 2)
    for module in exact.modules():
        if isinstance(module, _BatchNorm):  # 3 channels of 4 pass everywhere, the fourth nowhere
            module.bias.data += torch.where(torch.arange(len(module.bias)) % 4 == 3, -8, 8)
        elif isinstance(module, pixels.CONVOLUTIONS) and module.bias is not None:
            nn.init.constant_(module.bias, 8.0)
    exact.to(dtype).to(F64)
    plain = copy.deepcopy(exact).to(dtype)
    fused = copy.deepcopy(plain).fuse(True, "native")
    errors = torch.zeros(2, 3)  # (ours, plain torch) x (output, gradient of x, gradients of parameters), squared
    for seed in range(3):
        x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        truth = _step(exact, x.to(F64))
        for row, block in enumerate((fused, plain)):
            found = _step(block, x)
            assert all(ours.dtype == dtype for ours in found)
            parameters = (torch.cat([g.double().flatten() for g in own[2:]]) for own in (found, truth))
            pairs = (found[0], truth[0]), (found[1], truth[1]), parameters
            errors[row] += torch.tensor([rms_error(*pair) for pair in pairs]) ** 2
    ours, theirs = errors.sqrt()
    assert (ours <= HALF_VOLUMES * theirs).all(), errors.sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("sides", [(1, 3, 4), (2, 1, 1), (2, 3, 4), (3, 2, 2)])
def test_few_slices(sides, width, dtype):
    """Of one and two in bf16 the library leaves elements unwritten: ours are right all the same."""
    torch.manual_seed(0)
    exact = ThresholdBlock(width, links.dense(1), 5, unit="conv_relu", spatial_dims=3, dtype=F64)
    nn.init.constant_(exact.layers[0].conv.bias, 8.0)  # every activation is open
    exact.to(dtype).to(F64)
    x = torch.randn(2, width, *sides).to(dtype)
    expected = _step(exact, x.double())
    block = copy.deepcopy(exact).to(dtype).fuse(True, "native")
    for _ in range(4):
        held = [torch.full((2**n,), 1e9, dtype=torch.float32) for n in range(4, 16) for _ in range(8)]
        del held  # so that unwritten memory shows
        for ours, theirs in zip(_step(block, x), expected, strict=True):
            assert rms_error(ours, theirs) <= 2 * torch.finfo(dtype).eps


def test_autocast():
    assert_casts((3, 4, 5))


def assert_casts(sides):
    """Under autocast a fused block gives what the plain one does."""
    block = _any_block(links.dense(3), "bottleneck", dtype=torch.float32, spatial_dims=len(sides)).fuse(True, "native")
    x = torch.randn(2, 7, *sides)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), copy.deepcopy(block).fuse(False)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.1, atol=0.1)


def test_a_convolution_behind_the_block():
    assert_nothing_is_kept_in_front_of_a_convolution((3, 4, 5))


def assert_nothing_is_kept_in_front_of_a_convolution(sides):
    """Of a block that is one with the convolution behind it."""
    block = _any_block(links.harmonic(4), "conv_bn_relu", spatial_dims=len(sides)).fuse(True, "native")
    (conv,) = modules_of(len(sides), "Conv")
    net = nn.Sequential(block, conv(block.out_channels, 5, 1, bias=False, dtype=F64))
    x = torch.randn(2, 7, *sides, dtype=F64)
    plain = copy.deepcopy(net)
    fuse_blocks(plain, False)
    _assert_same(_step(Chained(*net), x), _step(plain, x))
    apart = storage_bytes(saved_tensors(net, x)) - storage_bytes(saved_tensors(Chained(*net), x))
    assert apart == block.out_channels * x[:, 0].numel() * 8  # the block's output


TRANSITIONS = {
    "norm act": lambda: [nn.BatchNorm3d(6), nn.ReLU()],
    "max pool": lambda: [nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.MaxPool3d(3, 2, 1)],
    "ceil": lambda: [nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d((3, 2, 1), 2, (1, 0, 0), ceil_mode=True)],
    "average": lambda: [nn.BatchNorm3d(6), nn.ReLU6(), nn.AvgPool3d(2)],
    "padded average": lambda: [nn.BatchNorm3d(6), nn.ReLU(), nn.AvgPool3d(3, 2, 1, count_include_pad=False)],
    "densenet": lambda: [nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 1, bias=False), nn.AvgPool3d(2, 2)],
    "strided": lambda: [nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 5, 3, (1, 2, 2), 1, bias=False)],
    "depth-wise": lambda: [nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 6, 3, 1, 1, groups=6, bias=False)],
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions_equal_the_modules(name, train):
    assert_one_operator(TRANSITIONS[name](), train, (5, 7, 4))


def assert_one_operator(modules, train, sides):
    """Modules run as one, with the same results, and keep what they read alone."""
    torch.manual_seed(0)
    net = nn.Sequential(*modules).to(F64)
    nn.init.uniform_(net[0].weight, 0.5, 1.5)
    nn.init.uniform_(net[0].bias, -0.5, 0.5)
    x = torch.randn(3, 6, *sides, dtype=F64)
    chain.run(list(net), x)  # running statistics other than 0 and 1
    net.train(train)
    _same(net, x)
    _same(net, x[:1].movedim(1, -1).contiguous().movedim(-1, 1), runs=1)
    assert _calls(lambda: chain.run(list(net), x)) == ["transition"]
    made = {p.data_ptr() for p in net.parameters()}
    kept = [t for t in saved_tensors(Chained(*net), x) if t.numel() > 400 and t.data_ptr() not in made]
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 1  # its input


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.MaxPool3d(3, 2, 1), (2, 6, 5, 7, 4)),
        (nn.MaxPool3d((2, 3, 1), (3, 1, 2), (1, 1, 0), ceil_mode=True), (1, 6, 6, 5, 5)),
        (nn.MaxPool2d(3, 2, 1), (7, 6, 8, 5)),
    ],
)
def test_largest_values_in_pieces(pool, shape, dtype, monkeypatch):
    """Some images or slices after the others are all at once, to the bit, NaN included."""
    x = torch.randn(shape).to(dtype)
    x[0, 1, ..., 2, 2], x[0, 2, ..., 1] = float("nan"), 1.5  # and ties
    net = [nn.BatchNorm3d(6) if len(shape) == 5 else nn.BatchNorm2d(6), nn.ReLU(), pool]
    net[0].eval().to(dtype)
    with torch.no_grad():
        y = chain.run(net[:2], x)
        expected = pool(y.contiguous())
        for piece in (1, 300, 1 << 30):
            monkeypatch.setattr(downsampling, "PIECE", piece)
            found = chain.run(net, x)
            assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().any()
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_transitions_pass_opcheck():
    net = nn.Sequential(*TRANSITIONS["densenet"]()).to(F64)
    x = torch.randn(2, 6, 4, 3, 5, dtype=F64, requires_grad=True)
    norm, _, conv, pool = net
    how = [*conv.stride, *conv.padding, *conv.dilation]
    torch.library.opcheck(
        ops.transition,
        (x, norm.weight, norm.bias, conv.weight, [x.new_empty(0)] * 2, None, 1e-5, False, "relu", how,
         *chain._pooling(pool, 3), ""),
    )  # fmt: skip


def test_images_and_volumes_do_not_mix():
    """What torch refuses, torch is asked."""
    x = torch.randn(2, 6, 4, 4)
    for modules in ([nn.BatchNorm3d(6), nn.ReLU()], [nn.BatchNorm2d(6), nn.ReLU(), nn.Conv3d(6, 4, 1, bias=False)]):
        with pytest.raises((ValueError, RuntimeError)):
            chain.run(modules, x if isinstance(modules[0], nn.BatchNorm3d) else x[:, :, None].expand(-1, -1, 3, -1, -1))


def test_bad_input():
    block = _block(links.dense(2), "bottleneck", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"input of the block must have 5 dimensions \[N, C, D, H, W\], got 4"):
        block(torch.randn(2, 7, 4, 5))
    with pytest.raises(ValueError, match="must have 7 channels, got 6"):
        block(torch.randn(2, 6, 3, 4, 5))
    with pytest.raises(ValueError, match="more than one value per channel"):
        block.fuse(True, "native")(torch.randn(1, 7, 1, 1, 1))
    with pytest.raises(ValueError, match=r"input of the block must have 4 dimensions \[N, C, H, W\], got 5"):
        ThresholdBlock(7, links.dense(2), 4)(torch.randn(2, 7, 3, 4, 5))
    for wrong, error in ((0, ValueError), (4, ValueError), ("3", TypeError)):
        with pytest.raises(error, match="spatial_dims must"):
            ThresholdBlock(7, links.dense(2), 4, spatial_dims=wrong)


def test_a_convolution_of_images_in_its_place_is_noticed():
    block = ThresholdBlock(7, links.dense(2), 5, spatial_dims=3, fused=True, backend="native")
    conv = block.layers[1].conv
    block.layers[1].conv = nn.Conv2d(conv.in_channels, 5, 3, padding=1, bias=False)
    with pytest.raises(RuntimeError, match="conv2d"):  # which torch itself refuses
        block(torch.randn(2, 7, 3, 4, 5))
    assert block.backend == "reference"


def test_triton_is_refused_by_name_and_passed_over_by_auto():
    block = _block(links.dense(2), "bottleneck", dtype=torch.float32).fuse(True)
    block._candidates = ("triton", "native")  # as where Triton can run
    block(torch.randn(2, 7, 3, 4, 5))
    assert block.backend == "native"
    block._candidates, block._choice = ("triton",), "triton"
    with pytest.raises(
        RuntimeError, match=r"backend 'triton' cannot run here: it takes images \[N, C, H, W\], got vol"
    ):
        block(torch.randn(2, 7, 3, 4, 5))


def modules_of(dims, *names):
    """torch's classes of so many spatial dimensions."""
    return [getattr(nn, f"{name}{dims}d") for name in names]


class Layer(nn.Module):
    """A dense layer whose modules stand in a Sequential, as MONAI lays them out; `drop`: behind it, of channels."""

    def __init__(self, read, k, drop=0.0, dims=3, taps=3):
        super().__init__()
        conv, norm, dropout = modules_of(dims, "Conv", "BatchNorm", "Dropout")
        self.layers = nn.Sequential()
        for name, module in (
            ("norm1", norm(read)), ("relu1", nn.ReLU(inplace=True)), ("conv1", conv(read, 4 * k, 1, bias=False)),
            ("norm2", norm(4 * k)), ("relu2", nn.ReLU(inplace=True)),
            ("conv2", conv(4 * k, k, taps, padding=taps // 2, bias=False)),
        ):  # fmt: skip
            self.layers.add_module(name, module)
        if drop:
            self.layers.add_module("dropout", dropout(drop))

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


class DenseNet(nn.Module):
    """Of volumes or signals, in MONAI's manner: one Sequential of everything up to the head."""

    def __init__(self, depths=(3, 2), k=6, drop=0.0, dims=3, taps=3):
        super().__init__()
        conv, norm, largest, average = modules_of(dims, "Conv", "BatchNorm", "MaxPool", "AvgPool")
        width = 8
        self.features = nn.Sequential()
        for name, module in (
            ("conv0", conv(1, width, 7, 2, 3, bias=False)), ("norm0", norm(width)),
            ("relu0", nn.ReLU(inplace=True)), ("pool0", largest(3, 2, 1)),
        ):  # fmt: skip
            self.features.add_module(name, module)
        for i, depth in enumerate(depths, start=1):
            layers = [Layer(width + j * k, k, drop, dims, taps) for j in range(depth)]
            self.features.add_module(f"denseblock{i}", nn.Sequential(*layers))
            width += depth * k
            if i < len(depths):
                transition = nn.Sequential(
                    norm(width), nn.ReLU(inplace=True), conv(width, width // 2, 1, bias=False), average(2, 2)
                )
                self.features.add_module(f"transition{i}", transition)
                width //= 2
        self.features.add_module("norm5", norm(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(F.relu(self.features(x)).flatten(2).mean(2))


class Harmonic(nn.Module):
    """HarDNet's block of volumes or signals: attributes links and layers."""

    def __init__(self, read, k, depth, dims=3):
        super().__init__()
        conv, norm = modules_of(dims, "Conv", "BatchNorm")
        self.links = [list(row) for row in links.harmonic(depth)]
        widths = [read, *[k] * depth]
        self.layers = nn.ModuleList(
            nn.Sequential(conv(sum(widths[s] for s in row), k, 3, 1, 1, bias=False), norm(k), nn.ReLU6())
            for row in self.links
        )

    def forward(self, x):
        nodes = [x]
        for row, layer in zip(self.links, self.layers, strict=True):
            nodes.append(layer(torch.cat([nodes[s] for s in row], 1)))
        last = len(self.layers)
        return torch.cat([nodes[i] for i in range(1, last + 1) if i % 2 or i == last], 1)


class Residual(nn.Module):
    """A residual dense block of volumes or signals; channels are joined along a dim from the end."""

    def __init__(self, width=6, k=4, dims=3, taps=3):
        super().__init__()
        (conv,) = modules_of(dims, "Conv")
        self.convs = nn.ModuleList(conv(width + i * k, k, taps, padding=taps // 2) for i in range(3))
        self.last = conv(width + 3 * k, width, 1)

    def forward(self, x):
        nodes = x
        for conv in self.convs:
            nodes = torch.cat([nodes, F.leaky_relu(conv(nodes), 0.2)], dim=1 - nodes.dim())
        return x + 0.2 * self.last(nodes)


FOREIGN = {
    "MONAI's DenseNet": (DenseNet, (2, 1, 24, 20, 28), 2),
    "HarDNet's block": (lambda: Harmonic(6, 4, 4), (2, 6, 3, 4, 5), 1),
    "residual dense block": (Residual, (2, 6, 3, 4, 5), 1),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_convert(name):
    assert_converted(*FOREIGN[name], dims=3)


def assert_converted(make, shape, count, dims):
    """The blocks of a model are found, and compute what it does."""
    torch.manual_seed(0)
    original = make().double()
    lines = []
    converted = tn.convert(copy.deepcopy(original), report=lines.append)
    found = [m for m in converted.modules() if isinstance(m, ConvertedBlock)]
    assert len(found) == count and all(block.plan.spatial_dims == dims for block in found), lines
    assert list(converted.state_dict()) == list(original.state_dict())
    x = torch.randn(shape, dtype=F64)
    for train in (True, False):
        original.train(train)
        converted.train(train)
        _assert_same(_step(converted, x), _step(original, x))
        assert {block.backend for block in found} == {"native"}
    for ours, theirs in zip(converted.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert type(tn.to_reference(converted)) is type(original)


def test_a_converted_model_keeps_less():
    original = DenseNet(depths=(6, 8), k=8)
    converted = tn.convert(copy.deepcopy(original), report=None)
    x = torch.randn(1, 1, 32, 32, 32).to(memory_format=LAST)
    ours, theirs = (storage_bytes(saved_tensors(model, x)) for model in (converted, original))
    assert ours < 0.4 * theirs
    recomputing = tn.convert(copy.deepcopy(original), recompute="bottleneck", report=None)
    assert storage_bytes(saved_tensors(recomputing, x)) < 0.75 * ours
    account = tn.memory.account(converted, x.shape, torch.float32)
    assert account["fused"].kept < 0.4 * account["eager"].kept
    assert account["fused, recompute"].kept < account["fused"].kept


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FOREIGN if name != "residual dense block"])
def test_on_a_gpu(name, dtype):
    assert_converted_on_a_gpu(*FOREIGN[name][:2], dtype)


def assert_converted_on_a_gpu(make, shape, dtype):
    """Converted and plain, in the same format, against fp64 on the CPU; replayed calls among them."""
    torch.manual_seed(0)
    exact = make().to(dtype).double()
    x = torch.randn(shape, dtype=F64).to(dtype)
    truth = _step(exact, x.double())
    plain = copy.deepcopy(exact).to("cuda", dtype)
    converted = tn.convert(copy.deepcopy(plain), report=None)
    with full_precision():
        theirs = _step(plain, x.cuda())
        for _ in range(4):
            ours = _step(converted, x.cuda())
    blocks = [m for m in converted.modules() if isinstance(m, ConvertedBlock)]
    assert {block.backend for block in blocks} == {"native"}
    bound = 5e-5 if dtype == torch.float32 else 1.5 * rms_error(theirs[0].cpu(), truth[0]) + 2**-8
    assert rms_error(ours[0].cpu(), truth[0]) <= bound
    if dtype == torch.float32:
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert rms_error(a.cpu(), b.cpu().double()) <= 1e-2  # masks flip near 0


def test_a_dropout_of_channels_is_found():
    assert_drops_channels(DenseNet(drop=0.5), (20, 20, 20))


def assert_drops_channels(model, sides):
    """Both blocks of the model, converted."""
    converted = tn.convert(model, report=None)
    found = [m for m in converted.modules() if isinstance(m, ConvertedBlock)]
    assert [(block.drop_rate, block.drop_channels) for block in found] == [(0.5, True)] * 2
    converted.train()(torch.randn(2, 1, *sides)).sum().backward()


def test_the_plan_as_text():
    plan = _block(links.dense(2), "bottleneck").plan
    assert type(plan).from_text(plan.to_text()) == plan
    assert ThresholdBlock(7, links.dense(2), 5, unit="bottleneck").plan != plan


SMALL = {"layers": [3, 4], "growth_rates": [6, 8], "transitions": [16, 24], "width_mult": 0.5}


@pytest.mark.parametrize(
    ("name", "sides"),
    [("thresholdnet_ab", (18, 17, 20)), ("thresholdnet_bc", (18, 17, 20)), ("densenet40", (5, 4, 6)),
     ("hardnet39ds", (18, 17, 20))],
)  # fmt: skip
def test_networks_of_the_zoo(name, sides):
    plain, x = assert_network(name, sides)
    with pytest.raises(ValueError, match=r"volumes must have 5 dimensions \[N, C, D, H, W\], got 4"):
        plain(x[:, :, 0])
    if plain.min_size > 1:
        with pytest.raises(ValueError, match=rf"volumes must be at least {plain.min_size}x.* voxels .*, got 2x"):
            plain(x[:, :, :2])


def assert_network(name, sides):
    """Fused and plain are the same; returns the plain one, and what it takes."""
    arguments = SMALL if name.startswith("threshold") else {}
    torch.manual_seed(0)
    plain = tn.create_model(name, 3, 1, spatial_dims=len(sides), dtype=F64, **arguments, drop_rate=0.0)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused, True, "native")
    x = torch.randn(2, 1, *sides, dtype=F64)
    _assert_same(_step(fused, x), _step(plain, x))
    assert fused(x).shape == (2, 3) and fused.spatial_dims == len(sides)
    return plain, x


def test_densenet121_of_volumes_has_monais_parameters():
    model = tn.create_model("densenet121", 2, 1, spatial_dims=3, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 11_244_674  # monai.networks.nets.DenseNet121(3, 1, 2)


def test_a_pyramid_of_volumes():
    pyramid = tn.create_model("thresholdnet_ab", features_only=True, spatial_dims=3, fused=True, **SMALL)
    x = torch.randn(1, 3, 32, 16, 48)
    for level, found in zip(pyramid.feature_info, pyramid(x), strict=True):
        assert found.shape[1:] == (level["channels"], *(side // level["reduction"] for side in x.shape[2:]))


def test_saving_and_the_baselines(tmp_path):
    pytest.importorskip("huggingface_hub")
    model = tn.create_model("thresholdnet_ab", 3, 1, spatial_dims=3, **SMALL)
    tn.save_pretrained(model, tmp_path / "saved")
    loaded = tn.from_pretrained(tmp_path / "saved")
    assert loaded.spatial_dims == 3
    for ours, theirs in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="spatial_dims must be 2 for resnet50, which is torchvision's, got 3"):
        tn.create_model("resnet50", spatial_dims=3)
    with pytest.raises(ValueError, match="spatial_dims must"):
        tn.create_model("densenet121", spatial_dims=5)
