"""The convolution kernel against torch.nn.functional.conv2d in fp64 on the same rounded operands."""

import itertools

import poisoned as layouts
import pytest
import torch
import torch.nn.functional as F
from activated import FUNCTIONS, NAMES
from poisoned import fill, padding, rows, whole
from thresholdnet.kernels import launch, operands
from thresholdnet.kernels.configs import ConvolutionConfig
from tolerances import assert_near

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1, 1), (2, 1, 5), (1, 7, 1), (3, 2, 2), (2, 5, 7), (1, 6, 4))  # (batch, height, width)


def expected(sources, weight, dtype, affine=None, activation=None):
    """conv2d in fp64; the activated operand is rounded as a slot would be."""
    x = torch.cat([s.double() for s in sources], 1)
    if affine is not None:
        scale, shift = (v.double()[:, None, None] for v in affine)
        x = FUNCTIONS[activation](x * scale + shift)
        x = x.to(dtype).double()
    return F.conv2d(x, weight.to(dtype).double(), padding=weight.shape[2] // 2)


def random_weight(out_channels, channels, kernel_size):
    return torch.randn(out_channels, channels, kernel_size, kernel_size) / (kernel_size * channels**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kernel_size", (1, 3))
def test_sizes_and_dtypes(size, dtype, kernel_size):
    _, (a, unlinked, b, out) = rows(*size, (10, 14, 24, 20), dtype)
    fill(a), fill(b)
    weight = random_weight(20, 34, kernel_size)
    mean, variance = launch.conv([b, a], weight, out, statistics=True)
    assert_near(out, expected([b, a], weight, dtype), dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == exact
    assert_near(mean, out.double().mean((0, 2, 3)), exact)
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), exact, 10)
    assert unlinked.isnan().all() and not padding(out).any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_statistics_are_written_where_asked(dtype):
    _, (a, out) = rows(2, 5, 3, (10, 20), dtype)
    fill(a)
    weight, exact = random_weight(20, 10, 3), torch.float64 if dtype == torch.float64 else torch.float32
    around = torch.full((2, 22), float("nan"), dtype=exact)
    made = launch.conv([a], weight, out, statistics=True, moments=around[:, 1:-1])
    assert [each.data_ptr() for each in made] == [row.data_ptr() for row in around[:, 1:]]
    assert all(map(torch.equal, launch.conv([a], weight, out, statistics=True), made))
    assert around[:, 0].isnan().all() and around[:, -1].isnan().all()
    with pytest.raises(ValueError, match=r"moments must have the shape \(2, 20\) and dense rows"):
        launch.conv([a], weight, out, statistics=True, moments=around)


@pytest.mark.parametrize("out_channels", (1, 8, 13, 16, 22, 32, 40, 46, 70, 134))
@pytest.mark.parametrize("size", ((2, 5, 3), (1, 4, 6)), ids=str)
def test_widths(out_channels, size):
    _, (a, b, out) = rows(*size, (3, 12, out_channels), torch.float32)
    fill(a), fill(b)
    weight = random_weight(out_channels, 15, 3)
    mean, _ = launch.conv([a, b], weight, out, statistics=True)
    assert_near(out, expected([a, b], weight, out.dtype), out.dtype)
    assert_near(mean, out.mean((0, 2, 3)), out.dtype)
    assert not padding(out).any()


@pytest.mark.parametrize("count", (1, 2, 3, 7, 16))
@pytest.mark.parametrize("layout", (rows, layouts.arena), ids=("rows", "arena"))
def test_sources(count, layout):
    widths = [4 + 3 * i for i in range(count)]
    _, (*sources, out) = layout(2, 4, 3, (*widths, 18), torch.float32)
    for source in sources:
        fill(source)
    for order in (sources, sources[::-1]):
        weight = random_weight(18, sum(widths), 3)
        launch.conv(order, weight, out)
        assert_near(out, expected(order, weight, out.dtype), out.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", (5, 6))
def test_integers_are_exact(dtype, side):
    _, (a, b, out) = rows(2, side, side, (9, 6, 12), dtype)
    fill(a, integers=True), fill(b, integers=True)
    weight = torch.randint(-1, 2, (12, 15, 3, 3)).float() * (torch.rand(12, 15, 1, 1) < 0.3)
    launch.conv([a, b], weight, out)
    assert torch.equal(out.double(), expected([a, b], weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "kernel_size"), (("relu", 1), ("relu6", 1), ("leaky_relu(0.2)", 1), (None, 1), ("relu", 3))
)
def test_affine_on_load(dtype, activation, kernel_size):
    _, (a, b, out) = rows(2, 5, 4, (10, 14, 24), dtype)
    fill(a), fill(b)
    affine = torch.rand(24) * 6, torch.randn(24)
    weight = random_weight(24, 24, kernel_size)
    mean, variance = launch.conv([a, b], weight, out, affine=affine, activation=activation, statistics=True)
    assert_near(out, expected([a, b], weight, dtype, affine, activation), dtype)
    assert_near(mean, out.double().mean((0, 2, 3)), torch.float32)  # rows past the end hold act(shift) W, not zeros
    assert_near(variance, out.double().var((0, 2, 3), unbiased=False), torch.float32)


@pytest.mark.parametrize("activation", (*NAMES, None))
@pytest.mark.parametrize("size", ((2, 5, 3), (1, 4, 6)), ids=str)
def test_bias(activation, size):
    _, (a, out) = rows(*size, (11, 13), torch.float32)
    fill(a)
    weight, bias = random_weight(13, 11, 3) * 4, torch.randn(13) * 3
    launch.conv([a], weight, out, bias=bias, activation=activation)
    act = FUNCTIONS[activation]
    assert_near(out, act(expected([a], weight, out.dtype) + bias[:, None, None]), out.dtype)
    assert not padding(out).any()


CONFIGS = [
    ConvolutionConfig(16, 16, 0, 16),
    ConvolutionConfig(64, 32, 16, 64),
    ConvolutionConfig(32, 16, 16, 32),
    ConvolutionConfig(32, 64, 32, 32, group=(2, 2)),
    ConvolutionConfig(16, 32, 0, 16, group=(2, 2)),
    ConvolutionConfig(16, 32, 16, 32, group=(1, 2)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile_form_gives_the_same(config):
    _, (a, unlinked, b, out) = rows(2, 4, 6, (10, 14, 24, 22), torch.float32)
    fill(a), fill(b)
    weight = random_weight(22, 34, 3)
    mean, variance = launch.conv([a, b], weight, out, statistics=True, config=config)
    assert_near(out, expected([a, b], weight, out.dtype), out.dtype)
    assert_near(mean, out.mean((0, 2, 3)), out.dtype)
    assert_near(variance, out.var((0, 2, 3), unbiased=False), out.dtype)
    assert unlinked.isnan().all()


def test_statistics_do_not_cancel():
    _, (a, out) = rows(4, 8, 8, (8, 8), torch.float32)
    fill(a)
    a.add_(1000)  # sum of squares minus squared sum would leave noise alone
    weight = torch.eye(8)[:, :, None, None]
    mean, variance = launch.conv([a], weight, out, statistics=True)
    assert_near(mean, out.double().mean((0, 2, 3)), torch.float32)
    torch.testing.assert_close(variance.double(), out.double().var((0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


def test_only_the_linked_slots_are_read_and_only_the_output_is_written():
    buffer, slots = rows(2, 5, 4, (24, 14, 20, 6, 17), torch.float32)
    for linked in ((0, 2), (1, 3), (3,)):
        buffer.fill_(float("nan"))
        for i in linked:
            fill(slots[i])
        before = buffer.clone()
        launch.conv([slots[i] for i in linked], random_weight(17, sum(slots[i].shape[1] for i in linked), 3), slots[4])
        assert not slots[4].isnan().any()
        written = buffer.clone()
        for state in (written, before):  # the output apart, all must be as it was
            whole(state.as_strided(slots[4].shape, slots[4].stride(), slots[4].storage_offset())).zero_()
        assert torch.equal(written.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_two_runs_are_equal_to_the_bit(dtype):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        _, (a, out) = rows(2, 5, 6, (20, 12), dtype)
        fill(a)
        results.append((*launch.conv([a], random_weight(12, 20, 3), out, statistics=True), out.clone()))
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


def test_nan_and_infinity_reach_the_output():
    _, (a, out) = rows(1, 3, 3, (8, 8), torch.float32)
    fill(a)
    a[0, 0, 1, 1] = float("nan")
    launch.conv([a], torch.ones(8, 8, 1, 1), out, affine=(torch.ones(8), torch.zeros(8)), activation="relu6")
    assert out[0, :, 1, 1].isnan().all() and out.isnan().sum() == 8


def test_batch_of_none():
    _, (a, out) = rows(0, 3, 3, (8, 8), torch.float32)
    assert launch.conv([a], torch.ones(8, 8, 1, 1), out) is None
    mean, variance = launch.conv([a], torch.ones(8, 8, 3, 3), out, statistics=True)
    assert mean.isnan().all() and variance.isnan().all()


STRIDES = {
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "slices": lambda w: torch.randn(30, 40, 3, 3)[3:25:2, 5:].copy_(w[:, :35]) if w.shape[2] == 3 else w,
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "taps turned": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda w: w[:1, :1].expand_as(w),
    "bfloat16": lambda w: w.bfloat16(),
}


@pytest.mark.parametrize("kernel_size", (1, 3))
@pytest.mark.parametrize("form", STRIDES)
def test_weights_are_read_where_they_lie(form, kernel_size):
    _, (a, b, out, back) = rows(1, 3, 4, (20, 15, 11, 35), torch.float32)
    fill(a), fill(b)
    weight = STRIDES[form](random_weight(11, 35, kernel_size))
    launch.conv([a, b], weight, out)
    assert_near(out, expected([a, b], weight, out.dtype), out.dtype)
    launch.gradient([out], [weight], back)
    wanted = torch.nn.grad.conv2d_input(back.shape, weight.double(), out.double(), padding=kernel_size // 2)
    assert_near(back, wanted, out.dtype)


def test_tf32_is_used_where_torch_allows_it_and_for_float32_alone():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        for allowed in (False, True):
            cudnn.allow_tf32 = allowed
            assert operands.uses_tf32(torch.zeros(1)) is allowed
            assert not any(operands.uses_tf32(torch.zeros(1, dtype=dtype)) for dtype in DTYPES if dtype.itemsize != 4)
    finally:
        cudnn.allow_tf32 = before
