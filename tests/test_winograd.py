"""Winograd convolutions of the native backend: transforms, operators and whole blocks against convolutions in fp64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from saved import saved_tensors, storage_bytes
from tolerances import WINOGRAD, WINOGRAD_BLOCK, largest_error, rms_error
from torch import nn

from thresholdnet import ThresholdBlock, links
from thresholdnet.backends import csrc, engine_for, load, native, winograd
from thresholdnet.plan import plan_block

pytestmark = pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
F64 = torch.float64
TILES = 24
# Lavin and Gray 2016, arXiv:1509.09308, section 4.2 and the F(4x4, 3x3) matrices behind it
BT = torch.tensor(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
     [0, 4, 0, -5, 0, 1]], dtype=F64,
)  # fmt: skip
AT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=F64)
SIZES = [(1, 1, 1), (2, 1, 7), (3, 5, 2), (1, 4, 4), (2, 9, 13), (1, 16, 8), (2, 31, 29)]
SOURCES = [[24], [24, 17], [3, 40, 1], [72, 5, 8, 26], [30, 24, 24, 2, 9, 1]]
PATTERNS = {
    "harmonic": links.harmonic(8), "dense": links.dense(4), "threshold": links.threshold_ab(7, 3),
    "a dead end": ((0,), (0, 1), (0, 1), (1, 3)), "one layer": links.dense(1),
}  # fmt: skip
UNITS = ("conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck")


@pytest.fixture
def on(monkeypatch):
    """Winograd's form, for thin layers too."""
    monkeypatch.setattr(winograd, "ALONE", dict.fromkeys(winograd.ALONE, 8))
    before = winograd.enabled()
    winograd.use(True)
    yield
    winograd.use(before)


def _operators():
    assert csrc.reason() is None
    return torch.ops.thresholdnet_csrc


def _pixels(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def _transform(x, gradient=False):
    n, c, h, w = x.shape
    blocks = -(-n * -(-h // 4) * -(-w // 4) // TILES)
    out = torch.full((blocks, 36, TILES, -(-c // 16) * 16 if gradient else c), float("nan"))
    _operators().winograd_transform(x, gradient, out)
    return out


def _convolve(sources, packed, shape, bias=None, add=None, activation=0):
    out = torch.full(shape, float("nan")).contiguous(memory_format=torch.channels_last)
    _operators().winograd_conv(sources, packed, bias, add, activation, out)
    return out


def _error(actual, expected):
    assert actual.shape == expected.shape
    return largest_error(actual, expected)


def _tiles(x, side, before):
    """[tiles, C, side, side] in fp64: the patches around the 4x4 tiles, zeros outside."""
    h, w = x.shape[2:]
    padded = F.pad(x.double(), (before, 8, before, 8))
    cut = padded.unfold(2, side, 4).unfold(3, side, 4)[:, :, : -(-h // 4), : -(-w // 4)]
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gradient", [False, True])
def test_transforms_are_the_matrices(size, gradient):
    n, h, w = size
    for channels in (1, 3, 8, 24, 29):
        x = _pixels(n, channels + 3, h, w)[:, 2 : 2 + channels]  # a slice, as the block's output's gradient has
        matrix, side, before = (AT.T, 4, 0) if gradient else (BT, 6, 1)
        expected = (matrix @ _tiles(x, side, before) @ matrix.T).flatten(2)  # [tiles, C, 36]
        out = _transform(x, gradient)
        found = out.permute(0, 2, 3, 1).flatten(0, 1)  # [tiles, C, 36]
        assert _error(found[: len(expected), :channels], expected) < 1e-6  # a dozen roundings
        assert not found[len(expected) :].any() and not found[:, channels:].any(), "filled up with zeros"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("widths", SOURCES)
def test_operators_are_convolutions(size, widths):
    torch.manual_seed(0)
    n, h, w = size
    for written in (24, 33, 70):
        sources = [_pixels(n, c, h, w) for c in widths]
        weight, bias = torch.randn(written, sum(widths), 3, 3), torch.randn(written)
        joined = torch.cat(sources, 1).double().requires_grad_()
        wide = weight.double().requires_grad_()
        expected = F.conv2d(joined, wide, padding=1)
        grad = _pixels(*expected.shape)
        expected.backward(grad.double())
        expected = expected.detach()

        read = [_transform(x) for x in sources]
        packed = _operators().winograd_weights([weight], False)
        assert _error(_convolve(read, packed, grad.shape), expected) < WINOGRAD
        for layout in (torch.contiguous_format, torch.channels_last):
            again = _operators().winograd_weights([weight.contiguous(memory_format=layout)], False)
            assert torch.equal(again, packed)

        add = _pixels(n, written + 5, h, w)[:, 3:-2]
        whole = expected + bias.double().view(1, -1, 1, 1) + add
        for activation, clamped in enumerate((whole, whole.relu(), whole.clamp(0, 6))):
            found = _convolve(read, packed, grad.shape, bias, add, activation)
            assert (found.double() - clamped).abs().max() < WINOGRAD * whole.abs().max()

        dz, start = _transform(grad), 0
        for x in sources:
            part = weight[:, start : start + x.shape[1]]
            found = _convolve([dz], _operators().winograd_weights([part], True), x.shape)
            assert _error(found, joined.grad[:, start : start + x.shape[1]]) < WINOGRAD
            start += x.shape[1]
        found = _operators().winograd_weight_gradient(read, _transform(grad, True), written)
        assert _error(found, wide.grad) < WINOGRAD


def test_gradient_of_a_node_from_all_its_readers():
    widths, size = (24, 7, 40), (2, 13, 10)
    arriving = [_pixels(size[0], o, *size[1:]) for o in widths]
    weights = [torch.randn(o, 60, 3, 3)[:, 5:34] for o in widths]
    expected = sum(
        F.conv_transpose2d(g.double(), w.double(), padding=1) for g, w in zip(arriving, weights, strict=True)
    )
    packed = _operators().winograd_weights(weights, True)
    found = _convolve([_transform(g) for g in arriving], packed, expected.shape)
    assert _error(found, expected) < WINOGRAD


def _block(pattern, dtype=torch.float32, activation="relu", unit="conv_bn_relu"):
    """A block whose activations are far from their kinks: every channel is either open everywhere or shut."""
    torch.manual_seed(0)
    block = ThresholdBlock(26, PATTERNS[pattern], 12, dtype=dtype, activation=activation, unit=unit)
    for i, module in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(module.weight, 0.2, 0.4)
        nn.init.constant_(module.bias, 3.0)
        module.bias.data[i % 5 :: 5] = -3.0
    return block


def _step(block, x, train=True, tail=None):
    own = x.detach().clone().requires_grad_()
    y = block.train(train)(own, tail) if tail is not None else block.train(train)(own)
    cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    y.backward(cotangent.to(y.dtype))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    return [y.detach(), own.grad, *grads, *([] if tail is None else [tail.grad])]


def _assert_like_fp64(ours, theirs):
    largest = max(t.abs().max() for t in theirs[2:])
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b.abs().max() < 1e-6 * largest:  # truly 0: behind a shut channel
            assert a.abs().max() < 1e-4 * largest, i
        else:
            assert rms_error(a, b) < WINOGRAD_BLOCK, i


EITHER = itertools.product(PATTERNS, ("relu", "relu6"))


@pytest.mark.parametrize(("pattern", "activation"), [*EITHER, ("threshold", "leaky_relu(0.2)")])
@pytest.mark.parametrize("unit", UNITS)
def test_blocks_equal_the_plain_block(unit, pattern, activation, on, calls):
    plain = _block(pattern, activation=activation, unit=unit)
    x = torch.randn(3, 26, 19, 18)
    fused = copy.deepcopy(plain).fuse(True, "native")
    wide = copy.deepcopy(plain).double()
    _assert_like_fp64(_step(fused, x), _step(wide, x.double()))
    _assert_like_fp64(_step(fused, x, train=False), _step(wide, x.double(), train=False))
    for block in (fused, wide):
        block.eval()
    with torch.no_grad():  # BatchNorm in the weights
        assert rms_error(fused(x), wide(x.double())) < WINOGRAD_BLOCK
    assert {"winograd_conv", "winograd_weight_gradient"} <= calls


@pytest.fixture
def calls(monkeypatch):
    """The operators that ran."""
    found, operators = set(), winograd._operators()

    class Recorder:
        def __getattr__(self, name):
            found.add(name)
            return getattr(operators, name)

    monkeypatch.setattr(winograd, "_operators", Recorder)
    return found


def test_a_convolution_behind_the_block(on, calls):
    plain = _block("harmonic")
    fused, wide = copy.deepcopy(plain).fuse(True, "native"), copy.deepcopy(plain).double()
    tail = torch.randn(9, plain.plan.out_channels, 1, 1, requires_grad=True)
    wide_tail = tail.detach().double().requires_grad_()
    x = torch.randn(3, 26, 19, 18)
    _assert_like_fp64(_step(fused, x, tail=tail), _step(wide, x.double(), tail=wide_tail))
    assert "winograd_conv" in calls


@pytest.mark.parametrize("unit", UNITS)
def test_some_gradients_only(unit, on):
    block = _block("harmonic", unit=unit).fuse(True, "native")
    x = torch.randn(3, 26, 19, 18)
    names = [name for name, _ in block.named_parameters()]
    whole = dict(zip(names, _step(block, x)[2:], strict=True))
    for wanted in (names[3:4], names[6::5], names[-1:]):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in wanted)
        block.train()(x).sum().backward()
        assert all((p.grad is not None) == (name in wanted) for name, p in block.named_parameters())
        block.zero_grad()
        y = block(x)
        cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).float()
        y.backward(cotangent)
        for name, parameter in block.named_parameters():
            assert name not in wanted or torch.equal(parameter.grad, whole[name]), name
        block.zero_grad()


@pytest.mark.parametrize("unit", UNITS)
def test_runs_and_threads_are_bit_equal(unit, on):
    block, x = _block("harmonic", unit=unit).fuse(True, "native"), torch.randn(3, 26, 22, 25)
    threads, results = torch.get_num_threads(), []
    try:
        # the library's 1x1 convolutions, which bottleneck layers have, sum in another order for each number of threads
        for count in (1, 1, 2, 3) if unit == "conv_bn_relu" else (2, 2, 2):
            torch.set_num_threads(count)
            results.append(_step(block, x))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unit", UNITS)
def test_workspaces_are_written_before_they_are_read(unit, on):
    block, x = _block("threshold", unit=unit).fuse(True, "native"), torch.randn(2, 26, 21, 18)
    expected = _step(block, x)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        found = _step(block, x)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_transforms_go_with_their_last_reader(on, monkeypatch):
    made = []

    class Watched(winograd._Transforms):
        def __init__(self):
            super().__init__()
            made.append(self)
            self.most = 0

        def of(self, tensors, readers):
            found = super().of(tensors, readers)
            self.most = max(self.most, len(self.made))
            return found

    monkeypatch.setattr(winograd, "_Transforms", Watched)
    for pattern, unit in itertools.product(PATTERNS, UNITS):
        made.clear()
        block = _block(pattern, unit=unit).fuse(True, "native")
        _step(block, torch.randn(3, 26, 19, 18))
        forward, backward = made
        assert forward.most > 0 and not forward.made, pattern
        assert backward.most > 0 and not backward.made, pattern
    made.clear()
    block = ThresholdBlock(8, links.harmonic(16), 8, outputs="layers").fuse(True, "native")
    block(torch.randn(3, 8, 16, 16))
    assert made[0].most <= 5, "of 17 nodes a harmonic layer needs at most as many as it reads"


def test_memory_is_taken_again():
    transforms, x = winograd._Transforms(), _pixels(2, 12, 9, 9)
    first = transforms.make(x)
    address = first.data_ptr()
    transforms.recycle(first)
    small = transforms.make(x[:1, :1].contiguous(memory_format=torch.channels_last))
    assert small.data_ptr() != address, "a twelfth of the memory would hold all of it"
    assert not transforms.free
    transforms.recycle(small)
    second = transforms.make(x)
    transforms.recycle(second)
    address = second.data_ptr()
    third = transforms.make(x[:, :11].contiguous(memory_format=torch.channels_last))
    assert third.data_ptr() == address and third.shape[3] == 11


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_more_is_kept(unit, on):
    block, x = _block("harmonic", unit=unit).fuse(True, "native"), torch.randn(3, 26, 19, 18, requires_grad=True)
    ours = storage_bytes(saved_tensors(block, x))
    winograd.use(False)
    assert ours == storage_bytes(saved_tensors(block, x))


def test_off_is_the_native_backend_as_it_is(calls):
    before, x = winograd.enabled(), torch.randn(3, 26, 19, 18)
    block = _block("harmonic").fuse(True, "native")
    try:
        winograd.use(False)
        assert load(engine_for("native", block.plan, x)) is native
        _step(block, x)
        assert not calls
        winograd.use(True)
        assert load(engine_for("native", block.plan, x)) is winograd
        _step(block, x)
        assert calls
    finally:
        winograd.use(before)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ["float64", "bfloat16", "small"])
def test_left_to_the_library(case, unit, on, calls):
    dtype = getattr(torch, case, torch.float32)
    torch.manual_seed(0)
    block = ThresholdBlock(24, links.harmonic(4), 24, unit=unit, dtype=dtype).fuse(True, "native")
    side = 5 if case == "small" else 16
    x = torch.randn(3, 24, side, side, dtype=dtype)
    ours = _step(block, x)
    winograd.use(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, _step(block, x), strict=True))
    assert not calls


@pytest.mark.parametrize(("unit", "growth"), (("bn_relu_conv", 48), ("bottleneck", 32)))
def test_layers_alone_with_what_they_read_must_be_wide(unit, growth):
    """Their transforms serve one convolution."""
    for width, wide in ((growth, True), (growth - 8, False)):
        plan = plan_block(64, links.dense(2), width, unit=unit, width_rule="constant")
        verbs = winograd.Verbs(plan, torch.empty(8, 64, 28, 28))
        assert (verbs.way(1, torch.empty(width, 128, 3, 3)) == "winograd") == wide
    assert verbs.way(1, torch.empty(growth, 128, 1, 1)) != "winograd"


def test_the_rule():
    assert winograd.pays(8, 8, 1, 28, 28) and winograd.pays(288, 40, 8, 14, 14)
    assert not winograd.pays(7, 64, 8, 28, 28) and not winograd.pays(64, 7, 8, 28, 28), "thin"
    assert not winograd.pays(64, 64, 8, 7, 7), "32 tiles do not repay the weights' transforms"
    assert winograd.pays(64, 64, 100, 6, 6) and not winograd.pays(64, 64, 100, 5, 5), "mostly outside the image"
    plan = plan_block(24, ((0,), (0, 1), (0, 1), (1, 3)), 24, outputs=(2, 4))
    chosen = winograd._choose(plan, 8, 28, 28)
    assert chosen.forward == {1: [3], 2: [3, 3], 3: [3, 3], 4: [3, 1]}
    assert chosen.weight == chosen.forward
    assert chosen.gradient == {0: [1, 2, 2], 1: [2, 2, 2], 3: [2]}
    dead = plan_block(24, ((0,), (0, 1), (0, 1)), 24, outputs=(1, 3))  # layer 2 reaches no output
    chosen = winograd._choose(dead, 8, 28, 28)
    assert chosen.forward == {1: [3], 2: [3, 2], 3: [3, 2]} and chosen.weight == {1: [2], 3: [2, 1]}
    assert chosen.gradient == {0: [1, 2], 1: [2]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x, u, w: o.winograd_transform(x, False, u[:, :35]), "out must be contiguous with shape"),
        (lambda o, x, u, w: o.winograd_transform(x.double(), False, u), "x must be float32"),
        (lambda o, x, u, w: o.winograd_transform(x.contiguous(), False, u), "x must be channels_last"),
        (lambda o, x, u, w: o.winograd_transform(x[0], False, u), "x must have 4 dimensions"),
        (lambda o, x, u, w: o.winograd_weights([w[..., :2]], False), r"weight 0 must have shape \[O, C, 3, 3\]"),
        (lambda o, x, u, w: o.winograd_weights([w, w[:4]], False), "with one O for all of them"),
        (lambda o, x, u, w: o.winograd_weights([w, w[:, :4]], True), "with one C for all of them"),
        (lambda o, x, u, w: o.winograd_conv([u], w, None, None, 0, x), "weights must be contiguous with shape"),
        (lambda o, x, u, w: o.winograd_conv([u[0]], w, None, None, 0, x), "source 0 must be contiguous"),
        (
            lambda o, x, u, w: o.winograd_conv([u], _packed(w), None, x[:, 1:], 0, x),
            "add must have 16 channels, got 15",
        ),
        (lambda o, x, u, w: o.winograd_conv([u], _packed(w), x.new_zeros(3), None, 0, x), "bias must be"),
        (lambda o, x, u, w: o.winograd_conv([u], _packed(w), None, None, 3, x), "activation must be 0"),
        (lambda o, x, u, w: o.winograd_weight_gradient([u], u, 17), "padded to a multiple of 16, got 16 for 17"),
        (lambda o, x, u, w: o.winograd_weight_gradient([u[:1]], u, 16), "source 0 must be contiguous with shape"),
    ],
)
def test_refusals_are_one_sentence(call, message):
    x = _pixels(2, 16, 20, 20)
    with pytest.raises(RuntimeError, match=message) as caught:
        call(_operators(), x, _transform(x), torch.randn(16, 16, 3, 3))
    assert "winograd_" in str(caught.value).splitlines()[0]


def _packed(weight):
    return _operators().winograd_weights([weight], False)
