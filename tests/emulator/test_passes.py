"""The CUDA passes over pixels, in the emulator, against torch's own operations in fp64 on the same operands."""

import pytest
import torch
import torch.nn.functional as F
from activated import NAMES
from tolerances import assert_one_pass

from thresholdnet.backends import csrc, elementwise

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS = [1, 3, 7, 8, 40, 129, 300]  # one access of 16 bytes a column, odd ones, more columns than a piece has
SHAPES = [(1, 1, 1), (2, 7, 5), (1, 13, 17)]  # N, H, W: fewer rows than a tile has, several tiles
NAN = float("nan")


@pytest.fixture(autouse=True)
def on_the_emulator(emulated, monkeypatch):
    """`csrc`'s functions, which GPUs run too, call the emulated operators."""
    monkeypatch.setattr(csrc, "_operators", lambda: emulated)
    monkeypatch.setattr(csrc, "AVERAGING", ("cpu",))
    torch.manual_seed(0)


def wide(dtype):
    """The dtype of vectors and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pixels(shape, channels, dtype):
    """Random values in channels_last order."""
    batch, height, width = shape
    made = 2 * torch.randn(batch, channels, height, width, dtype=torch.float64) + 0.5
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


class Slice:
    """A copy of x as a channel slice of a larger tensor that is NaN all around."""

    def __init__(self, x, before=3, after=2):
        batch, channels, height, width = x.shape
        self.before, self.after = before, after
        self.buffer = torch.full((batch, before + channels + after, height, width), NAN, dtype=x.dtype)
        self.buffer = self.buffer.contiguous(memory_format=torch.channels_last)
        self.slice = self.buffer[:, before : before + channels]
        self.slice.copy_(x)

    def assert_untouched(self):
        """Nothing but the slice was written."""
        channels = self.slice.shape[1]
        assert self.buffer[:, : self.before].isnan().all()
        assert self.buffer[:, self.before + channels :].isnan().all()


def vectors(count, channels, dtype):
    """Vectors per channel; the third and fourth are a mean and a positive rstd."""
    made = [torch.randn(channels, dtype=wide(dtype)) for _ in range(count)]
    return [v.abs() + 0.5 if i == 3 else v for i, v in enumerate(made)]


def double(*tensors):
    """In fp64."""
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_normalises_and_activates(shape, channels, dtype):
    x, (scale, shift) = pixels(shape, channels, dtype), vectors(2, channels, dtype)
    for activation in NAMES:
        made = csrc.gather([x], (scale, shift), activation)
        assert_one_pass(made, elementwise.gather(double(x), double(scale, shift), activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [[3, 8, 1], [16, 40, 7, 64], [1 + j % 5 for j in range(40)], [8] * 33])
def test_gather_lays_sources_side_by_side(widths, dtype):
    held = [Slice(pixels((2, 5, 3), width, dtype), before=8 * (j % 2), after=j % 3) for j, width in enumerate(widths)]
    sources = [h.slice for h in held]
    joined = torch.cat(sources, 1)
    assert torch.equal(csrc.gather(sources, None, "relu"), joined)
    affine = vectors(2, sum(widths), dtype)
    assert_one_pass(
        csrc.gather(sources, affine, "relu6"), elementwise.gather(double(*sources), double(*affine), "relu6"), dtype
    )
    for h in held:
        h.assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_without_activation_and_into_a_slice(emulated, dtype):
    x, (scale, shift) = pixels((2, 5, 3), 24, dtype), vectors(2, 24, dtype)
    out = Slice(torch.zeros_like(x))
    emulated.gather([x], scale, shift, 0, out.slice)
    expected = x.double() * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1)
    assert_one_pass(out.slice, expected, dtype)
    out.assert_untouched()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_as_torch_rounds_them(emulated, dtype):
    """All 65536 patterns, times factors that make ties, subnormals and infinities."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 4, 128, 128)
    x = x.contiguous(memory_format=torch.channels_last)
    factors = torch.tensor([1.0, 1.0 + 2**-9, 2**-11 * 1.5, 3.0])
    out = torch.empty_like(x)
    emulated.gather([x], factors, torch.zeros(4), 0, out)
    expected = (x.float() * factors.view(1, 4, 1, 1) + 0.0).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0, 8.0, -8.0), expected.nan_to_num(7.0, 8.0, -8.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_batch_norm_vectors(emulated, channels, dtype):
    gamma, beta = torch.randn(2, channels).to(dtype)
    mean, variance = vectors(2, channels, dtype)
    variance = variance.abs() + 0.1
    made = emulated.batch_norm_vectors(gamma, beta, mean, variance, 1e-3, 70.0)
    expected = elementwise.batch_norm_vectors(*double(gamma, beta, mean, variance), 1e-3, 70)
    assert_one_pass(made, expected, wide(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, channels, dtype):
    held = Slice(pixels(shape, channels, dtype))
    expected = elementwise.moments(held.slice.double())
    for got, wanted in zip(csrc.moments(held.slice), expected, strict=True):
        assert_one_pass(got, wanted, wide(dtype))
    held.assert_untouched()


@pytest.mark.parametrize("rows", [(1, 1, 65), (3, 110, 111)])  # the second: more tiles than are kept apart
def test_moments_do_not_cancel(rows):
    x = pixels(rows, 2, torch.float32) + 4000
    mean, variance = csrc.moments(x)
    expected = elementwise.moments(x.double())
    assert_one_pass(mean, expected[0], torch.float32)
    assert ((variance.double() - expected[1]) / expected[1]).abs().max() < 1e-3  # of 4000^2 it would be 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", NAMES)
def test_mask_sums(shape, channels, dtype, activation):
    g, z = (pixels(shape, channels, dtype) for _ in range(2))
    scale, shift, mean, rstd = vectors(4, channels, dtype)
    (g64, z64), norm64 = double(g, z), double(mean, rstd)
    expected = elementwise.mask_sums(g64, None, z64, double(scale, shift), *norm64, activation, owned=False)
    held, read = Slice(g), Slice(z, before=0, after=5)
    made = csrc.mask_sums(held.slice, None, read.slice, (scale, shift), mean, rstd, activation, owned=True)
    assert made[0].data_ptr() == held.slice.data_ptr()
    if activation in ("relu", "relu6"):
        assert torch.equal(made[0].double(), expected[0])
    else:
        assert_one_pass(made[0], expected[0], dtype)
    for got, wanted in zip(made[1:], expected[1:], strict=True):
        assert_one_pass(got, wanted, wide(dtype))
    held.assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into", ["g", "add", "new"])
def test_mask_sums_of_a_sum(emulated, dtype, into):
    g, add, z = (pixels((2, 7, 5), 20, dtype) for _ in range(3))
    norm = vectors(4, 20, dtype)
    mask = (z.double() * norm[0].double().view(1, -1, 1, 1) + norm[1].double().view(1, -1, 1, 1)) > 0
    out, expected = {"g": g, "add": add, "new": torch.empty_like(g)}[into], (g.double() + add.double()) * mask
    sums = emulated.mask_sums(g, add, z, *norm, 1, out)
    assert_one_pass(out, expected, dtype)
    assert_one_pass(sums[0], expected.sum((0, 2, 3)), wide(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [[1], [3, 8, 1], [129, 40, 7], [1 + j % 5 for j in range(40)]])
@pytest.mark.parametrize("activation", NAMES)
def test_send(widths, dtype, activation):
    shape, total = (2, 7, 5), sum(widths)
    g, norm = pixels(shape, total, dtype), vectors(4, total, dtype)
    sources = [Slice(pixels(shape, width, dtype)) for width in widths]
    arrived = [None if j % 3 == 1 else Slice(pixels(shape, width, dtype)) for j, width in enumerate(widths)]
    before = [None if a is None else a.slice for a in arrived]
    owned = [j % 2 == 0 and b is not None for j, b in enumerate(before)]
    kept = [None if b is None else b.clone() for b in before]
    expected = elementwise.send(
        g.double(), double(*(s.slice for s in sources)), double(*norm[:2]), *double(*norm[2:]),
        [None if b is None else b.double() for b in before], owned, activation,
    )  # fmt: skip
    features = [s.slice for s in sources]
    sent, *sums = csrc.send(g, features, tuple(norm[:2]), *norm[2:], before, owned, activation)
    for made, wanted, so_far, mine, old in zip(sent, expected[0], before, owned, kept, strict=True):
        assert_one_pass(made, wanted, dtype)
        assert not mine or made.data_ptr() == so_far.data_ptr()
        assert mine or so_far is None or torch.equal(so_far, old)
    for got, wanted in zip(sums, expected[1:], strict=True):
        assert_one_pass(got, wanted, wide(dtype))
    for held in (*sources, *(a for a in arrived if a is not None)):
        held.assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("owned", [False, True])
def test_linear(channels, dtype, owned):
    held, z = Slice(pixels((2, 7, 5), channels, dtype)), pixels((2, 7, 5), channels, dtype)
    a, b, c, mean = vectors(4, channels, dtype)
    for some in ((a, b, c, mean), (None, b, c, mean), (a, b, c, None)):
        g = Slice(held.slice)
        made = csrc.linear(g.slice, z, *some, owned)
        wide = [None if each is None else each.double() for each in some]
        expected = elementwise.linear(*double(held.slice, z), *wide, False)
        assert_one_pass(made, expected, dtype)
        assert (made.data_ptr() == g.slice.data_ptr()) == owned
        g.assert_untouched()


def test_two_runs_are_bit_equal_in_either_order_of_threads(emulated):
    x = pixels((2, 29, 31), 44, torch.bfloat16)
    g, norm = pixels((2, 29, 31), 44, torch.bfloat16), vectors(4, 44, torch.bfloat16)

    def run():
        out = torch.empty_like(g)
        sums = emulated.mask_sums(g, None, x, *norm, 1, out)
        parts = [torch.empty_like(x[:, :20]), torch.empty_like(x[:, 20:])]
        sent = emulated.send(g, [x[:, :20], x[:, 20:]], *norm, [x.new_empty(0)] * 2, 1, parts)
        pooled = emulated.max_pool2d(x, 3, 2, 1)
        back = emulated.max_pool2d_backward(pooled, x, 3, 2, 1)
        averages = emulated.avg_pool2d(x, *norm[:2], 1, 2)
        masked = torch.empty_like(x)
        masked_sums = emulated.spread_mask_sums(averages, x, *norm, 1, 2, masked)
        return [
            out, sums, sent, *parts, emulated.moments(x), pooled, back, averages, masked, masked_sums,
        ]  # fmt: skip

    first, again = run(), run()
    emulated.reverse_order(True)
    try:
        reverse = run()
    finally:
        emulated.reverse_order(False)
    for one, two, three in zip(first, again, reverse, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (1, 3, 0), (5, 2, 2)])
@pytest.mark.parametrize("shape, channels", [((2, 7, 5), 40), ((1, 13, 17), 3), ((3, 5, 5), 1), ((1, 34, 19), 72)])
def test_max_pool(emulated, shape, channels, dtype, kernel, stride, padding):
    """Values of a few integers tie in nearly every window."""
    x = (torch.randint(-2, 3, (shape[0], channels, *shape[1:])).to(dtype)).contiguous(memory_format=torch.channels_last)
    x[0, 0, 3, 2] = x[-1, -1, 0, 0] = x[-1, -1, 1, 1] = NAN
    wanted = x.double().requires_grad_()
    pooled = F.max_pool2d(wanted, kernel, stride, padding)
    made = emulated.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(made.double().nan_to_num(99), pooled.detach().nan_to_num(99))
    grad = torch.randn(pooled.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    pooled.backward(grad.double())
    assert_one_pass(emulated.max_pool2d_backward(grad, x, kernel, stride, padding), wanted.grad, dtype)


@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (2, 1, 1), (3, 2, 1), (3, 3, 1)])
@pytest.mark.parametrize("value", [-float("inf"), NAN, 1.0])
def test_max_pool_of_equal_values(emulated, value, kernel, stride, padding):
    """One pixel of a window takes its gradient, at the image's borders too; what pads an image takes none."""
    x = torch.full((1, 8, 6, 7), value).contiguous(memory_format=torch.channels_last)
    wanted = x.double().requires_grad_()
    pooled = F.max_pool2d(wanted, kernel, stride, padding)
    made = emulated.max_pool2d(x, kernel, stride, padding)
    torch.testing.assert_close(made.double(), pooled.detach(), equal_nan=True)
    grad = torch.randint(1, 9, made.shape).float().contiguous(memory_format=torch.channels_last)
    pooled.backward(grad.double())
    assert torch.equal(emulated.max_pool2d_backward(grad, x, kernel, stride, padding).double(), wanted.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("shape, channels", [((2, 7, 5), 40), ((1, 13, 17), 3), ((3, 6, 8), 300), ((1, 5, 5), 1)])
def test_average_pooling(shape, channels, dtype, kernel):
    """Sides of whole windows and others, whose last pixels no window holds."""
    x, (scale, shift, mean, rstd) = pixels(shape, channels, dtype), vectors(4, channels, dtype)
    window = [kernel] * 2, [kernel] * 2, [0, 0], False, True
    pooled = F.avg_pool2d(x.double(), kernel)
    assert_one_pass(csrc.avg_pool2d(x, window), pooled, dtype)
    grad = pixels(tuple(pooled.shape[i] for i in (0, 2, 3)), channels, dtype)
    for activation in NAMES:
        made = csrc.avg_pool2d(x, window, (scale, shift), activation)
        activated = elementwise.gather(double(x), double(scale, shift), activation)
        assert_one_pass(made, F.avg_pool2d(activated, kernel), dtype)
        found = csrc.avg_mask_sums(grad, window, x, (scale, shift), mean, rstd, activation)
        expected = elementwise.avg_mask_sums(
            grad.double(), window, x.double(), double(scale, shift), *double(mean, rstd), activation
        )
        for got, value, kind in zip(found, expected, (dtype, wide(dtype), wide(dtype)), strict=True):
            assert_one_pass(got, value, kind)


@pytest.mark.parametrize(
    "kernel, stride, padding, ceil", [(2, 1, 0, 0), (3, 3, 1, 0), ((2, 3), (2, 3), 0, 0), (2, 2, 0, 1)]
)
def test_other_windows_are_averaged_by_torch(emulated, kernel, stride, padding, ceil):
    """Between our passes."""
    window = *(torch.nn.modules.utils._pair(side) for side in (kernel, stride, padding)), bool(ceil), False
    x, (scale, shift, mean, rstd) = pixels((2, 7, 5), 8, torch.float32), vectors(4, 8, torch.float32)
    made, expected = (passes.avg_pool2d(x, window, (scale, shift)) for passes in (csrc, elementwise))
    assert_one_pass(made, expected.double(), torch.float32)
    grad = torch.randn_like(made)
    found, wanted = (
        passes.avg_mask_sums(grad, window, x, (scale, shift), mean, rstd, "relu") for passes in (csrc, elementwise)
    )
    for got, value in zip(found, wanted, strict=True):
        assert_one_pass(got, value.double(), torch.float32)


def test_averages_keep_infinities_and_nan_in_their_windows(emulated):
    x = torch.zeros(1, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 2], x[0, 5, 2, 5] = float("inf"), NAN
    assert torch.equal(emulated.avg_pool2d(x, None, None, 0, 2).nan_to_num(9), F.avg_pool2d(x, 2).nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_images(emulated, dtype):
    empty, norm = pixels((0, 4, 4), 5, dtype), vectors(4, 5, dtype)
    out = torch.empty_like(empty)
    emulated.gather([empty], norm[0], norm[1], 1, out)
    emulated.linear(empty, empty, None, norm[0], norm[1], None, out)
    assert torch.equal(emulated.mask_sums(empty, None, empty, *norm, 1, out), torch.zeros(2, 5, dtype=wide(dtype)))
    sums = emulated.send(empty, [empty], *norm, [empty.new_empty(0)], 1, [out])
    assert torch.equal(sums, torch.zeros(2, 5, dtype=wide(dtype)))
    assert emulated.max_pool2d(empty, 2, 2, 0).shape == (0, 5, 2, 2)
    assert emulated.max_pool2d_backward(emulated.max_pool2d(empty, 2, 2, 0), empty, 2, 2, 0).shape == empty.shape
    assert emulated.avg_pool2d(empty, *norm[:2], 1, 2).shape == (0, 5, 2, 2)
    few = emulated.avg_pool2d(empty, None, None, 0, 2)
    assert torch.equal(emulated.spread_mask_sums(few, empty, *norm, 1, 2, out), torch.zeros(2, 5, dtype=wide(dtype)))
    with pytest.raises(RuntimeError, match="moments: z must have at least one pixel"):
        emulated.moments(empty)


def test_refusals(emulated):
    x, norm, small = pixels((2, 4, 4), 6, torch.float32), vectors(4, 6, torch.float32), torch.zeros(2, 3, 4, 4)
    pooled = pixels((2, 2, 2), 6, torch.float32)
    cases = [
        ("gather: out must have 6 channels, got 3", lambda: emulated.gather([x], None, None, 1, small)),
        ("gather: tensor 0 must have the dtype", lambda: emulated.gather([x.half()], None, None, 1, x)),
        ("gather: tensor 0 must be channels_last", lambda: emulated.gather([x.contiguous()], None, None, 1, x)),
        ("gather: activation must be 0", lambda: emulated.gather([x], None, None, 5, x.clone())),
        ("gather: scale must be a contiguous vector of 6", lambda: emulated.gather([x], norm[0][:5], norm[1], 1, x)),
        ("gather: scale must be .* float32", lambda: emulated.gather([x], norm[0].double(), norm[1], 1, x)),
        ("float32, float64, bfloat16 or float16", lambda: emulated.gather([x.int()], None, None, 1, x.int())),
        ("send: before must hold 1 tensors", lambda: emulated.send(x, [x], *norm, [], 1, [x.clone()])),
        ("send: out 0 must have shape", lambda: emulated.send(x, [x], *norm, [x.new_empty(0)], 1, [norm[0]])),
        ("max_pool2d: kernel_size and stride", lambda: emulated.max_pool2d(x, 2, 0, 0)),
        ("max_pool2d: kernel_size and stride", lambda: emulated.max_pool2d(x, 2, 2**32, 0)),
        ("max_pool2d: .* padding from 0 to half", lambda: emulated.max_pool2d(x, 3, 1, 2**63 - 1)),
        ("max_pool2d: x must have pixels", lambda: emulated.max_pool2d(x[:, :, :0], 2, 1, 1)),
        ("max_pool2d: x must be channels_last, got a slice", lambda: emulated.max_pool2d(x[:, :3], 2, 2, 0)),
        ("avg_pool2d: kernel_size and stride", lambda: emulated.avg_pool2d(x, None, None, 0, 0)),
        ("avg_pool2d: x must have pixels", lambda: emulated.avg_pool2d(x, None, None, 0, 5)),
        ("avg_pool2d: scale and shift must come", lambda: emulated.avg_pool2d(x, norm[0], None, 0, 2)),
        ("avg_pool2d: shift must be .* float32", lambda: emulated.avg_pool2d(x, norm[0], norm[1].double(), 0, 2)),
        ("spread_mask_sums: out must be", lambda: emulated.spread_mask_sums(pooled, x, *norm, 1, 2, small)),
        ("spread_mask_sums: grad must be", lambda: emulated.spread_mask_sums(small[..., :2, :2], x, *norm, 1, 2, x)),
        ("spread_mask_sums: grad must have", lambda: emulated.spread_mask_sums(x, x, *norm, 1, 2, x.clone())),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
