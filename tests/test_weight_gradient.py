"""The C++ library's weight gradient, which reads the links where they lie, against torch's in fp64."""

import copy
import itertools

import older
import pytest
import torch
from activated import NAMES
from pixels import among_others, pixels
from strategies import F64
from tolerances import PASS_RELATIVE, RELATIVE, assert_close, largest_error
from torch.nn.grad import conv2d_weight

from thresholdnet import ThresholdBlock, links
from thresholdnet.backends import csrc, elementwise, native

pytestmark = pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
# one row and one column, fewer pixels than the kernel reaches, rows longer than are packed at once, several images at
# once, several tasks over pixels
SIZES = [(1, 1, 1), (3, 1, 9), (2, 9, 1), (2, 2, 2), (1, 3, 300), (5, 7, 7), (4, 33, 31)]
DTYPES = [F64, torch.float32, torch.bfloat16]
BOUNDS = {
    F64: PASS_RELATIVE[F64],
    torch.float32: RELATIVE[torch.float32] / 10,
    torch.bfloat16: PASS_RELATIVE[torch.bfloat16],
}
CHANNELS = [([1], 1), ([16], 6), ([3, 14, 1, 20], 13), ([40, 7], 131), ([5] * 9, 260)]


def affine_of(channels, dtype):
    """Scale and shift, in the dtype of a CPU's arithmetic."""
    return tuple(torch.randn(channels, dtype=F64 if dtype == F64 else torch.float32) for _ in range(2))


def read(sources, affine, activation):
    """What the convolution read, in fp64: rounded to the sources' dtype."""
    wide = None if affine is None else tuple(v.double() for v in affine)
    return elementwise.gather([s.double() for s in sources], wide, activation).to(sources[0].dtype).double()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=lambda c: f"{sum(c[0])} to {c[1]}")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_convolutions_gradient(dtype, size, channels, kernel):
    torch.manual_seed(0)
    widths, outputs = channels
    n, h, w = size
    sources = [among_others(pixels(n, width, h, w, dtype=dtype)) for width in widths]
    dz = among_others(pixels(n, outputs, h, w, dtype=dtype))
    shape, padding = (outputs, sum(widths), *kernel), [side // 2 for side in kernel]
    for affine in (None, affine_of(sum(widths), dtype)):
        for activation in NAMES if affine else ("relu",):
            wanted = conv2d_weight(read(sources, affine, activation), shape, dz.double(), padding=padding)
            found = csrc.weight_gradient(sources, dz, kernel, affine, activation)
            assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
            assert largest_error(found, wanted) <= BOUNDS[dtype]


@pytest.mark.parametrize("dilation", [2, 3, 40])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dilation(dtype, size, dilation):
    """Taps that reach into other images and beyond all of them."""
    torch.manual_seed(0)
    n, h, w = size
    sources = [among_others(pixels(n, width, h, w, dtype=dtype)) for width in (3, 14, 40)]
    dz = among_others(pixels(n, 13, h, w, dtype=dtype))
    affine = affine_of(57, dtype)
    for kernel in ((3, 3), (1, 3), (3, 1)):
        form = {"padding": [dilation * (side // 2) for side in kernel], "dilation": dilation}
        wanted = conv2d_weight(read(sources, affine, "relu"), (13, 57, *kernel), dz.double(), **form)
        found = csrc.weight_gradient(sources, dz, kernel, affine, "relu", dilation)
        assert largest_error(found, wanted) <= BOUNDS[dtype]


def test_no_worse_than_the_library_over_many_pixels():
    torch.manual_seed(0)
    x, dz = pixels(8, 24, 56, 56, dtype=torch.float32), pixels(8, 20, 56, 56, dtype=torch.float32)
    shape = (20, 24, 3, 3)
    wanted = conv2d_weight(x.double(), shape, dz.double(), padding=1)
    library = largest_error(conv2d_weight(x, shape, dz, padding=1), wanted)
    assert largest_error(csrc.weight_gradient([x], dz, (3, 3), None, "relu"), wanted) <= 2 * library


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_taps_outside_the_image_are_no_products_with_zero(dtype):
    inf = float("inf")  # where a tap sees that corner; a zero beside the image, times it, would be NaN
    wanted = torch.tensor([[inf, inf, 4], [inf, inf, 6], [4, 6, 4]], dtype=dtype)
    for corner in (0, -1):
        for infinite in (0, 1):
            given = torch.ones(2, 1, 1, 3, 3, dtype=dtype)
            given[infinite, 0, 0, corner, corner] = inf
            found = csrc.weight_gradient([given[0]], given[1], (3, 3), None, "relu")[0, 0]
            assert torch.equal(found, wanted if (corner == 0) != infinite else wanted.flip(0, 1))


def written_out(x, dz, dilation):
    """The 3x3 gradient of one channel and one output, [H, W] each, over the products that there are."""
    height, width = x.shape
    found = torch.zeros(3, 3, dtype=F64)
    for i, j, y, p in itertools.product(range(3), range(3), range(height), range(width)):
        row, column = y + (i - 1) * dilation, p + (j - 1) * dilation
        if 0 <= row < height and 0 <= column < width:
            found[i, j] += x[row, column].double() * dz[y, p].double()
    return found


@pytest.mark.parametrize("width", [1, 2, 5, 6])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_pairs_end_where_rows_end(width, dilation):
    """bfloat16 is multiplied in pairs of pixels, and an infinite one is in no product but its own."""
    for place in range(2 * width):
        x, dz = torch.randint(1, 5, (2, 2, width)).bfloat16()
        for holder in (x, dz):
            held = holder.view(-1)[place].clone()
            holder.view(-1)[place] = float("inf")
            found = csrc.weight_gradient([x[None, None]], dz[None, None], (3, 3), None, "relu", dilation)[0, 0]
            assert torch.equal(found.double(), written_out(x, dz, dilation))
            holder.view(-1)[place] = held


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "baseline"])
def test_older_instructions(instructions):
    older.assert_passes(__file__, instructions, "bfloat16 or pairs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 28, 28), (9, 7, 7)])
def test_sums_do_not_depend_on_the_number_of_threads(size, dtype):
    n, h, w = size
    x, dz = pixels(n, 70, h, w, dtype=dtype), pixels(n, 33, h, w, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [csrc.weight_gradient([x[:, :31], x[:, 31:]], dz, (3, 3), None, "relu") for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("unit", ["conv_bn_relu", "bottleneck"])
def test_blocks_run_on_it_and_gather_nothing_for_it(unit, monkeypatch):
    ran, library = [], []
    true = csrc.weight_gradient
    monkeypatch.setattr(csrc, "weight_gradient", lambda *given: (ran.append(given[2]), true(*given))[1])
    monkeypatch.setattr(native, "conv2d_weight", lambda *given, **named: library.append(given))
    torch.manual_seed(0)
    plain = ThresholdBlock(9, links.threshold_ab(5, 2), 6, unit=unit, dtype=F64)
    fused = copy.deepcopy(plain).fuse(True, "native")
    x = torch.randn(3, 9, 6, 5, dtype=F64)
    for block in (plain, fused):
        y = block(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape))
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    assert sorted(ran) == sorted([(3, 3)] * 5 if unit == "conv_bn_relu" else [(1, 1), (3, 3)] * 5) and not library


def test_what_goes_to_the_library(monkeypatch):
    assert csrc.correlates(pixels(1, 500, 2, 1), 3) and csrc.correlates(pixels(1, 128, 2, 2), 1)
    assert not csrc.correlates(pixels(1, 129, 2, 2), 1), "measured: the library's is faster"
    assert not csrc.correlates(pixels(2, 3, 1, 1), 3), "one tap counts: taps.py"
    assert not csrc.correlates(pixels(2, 3, 4, 4, dtype=torch.float16), 3)
    assert not csrc.correlates(torch.zeros(2, 3, 4, 4, device="meta"), 3)
    for has in (True, False):
        monkeypatch.setattr(csrc, "_multiplies_bfloat16", lambda has=has: has)
        assert csrc.correlates(pixels(2, 3, 4, 4, dtype=torch.bfloat16), 3) == has


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kernel_width": 2}, "a kernel's sides must be odd and at most 31, got 3 x 2"),
        ({"dilation": 0}, "dilation must be from 1 to 1048576, got 0"),
        ({"kernel_height": -1}, "a kernel's sides must be odd and at most 31, got -1 x 3"),
        ({"kernel_width": 2**63 - 1}, f"a kernel's sides must be odd and at most 31, got 3 x {2**63 - 1}"),
        ({"scale": None}, "scale and shift must come together"),
        ({"sources": []}, "must have pixels and channels, got 0 channels"),
        ({"activation": 3}, "activation must be 0 (none), 1 (ReLU), 2 (ReLU6) or a slope between 0 and 1, got 3"),
        ({"dz": pixels(2, 3, 4, 5)}, "tensor 0 must have shape [2, C, 4, 5], got [2, 6, 4, 4]"),
        ({"dz": pixels(2, 3, 4, 4, dtype=torch.float32)}, "tensor 0 must have the dtype of the other tensors"),
        ({"shift": torch.zeros(5, dtype=F64)}, "shift must be a contiguous vector of 6 elements"),
    ],
)
def test_wrong_arguments_are_one_sentence(change, said):
    vector = torch.ones(6, dtype=F64)
    kernel = dict(kernel_height=3, kernel_width=3)
    given = dict(sources=[pixels(2, 6, 4, 4)], scale=vector, shift=vector, activation=1, dz=pixels(2, 3, 4, 4))
    with pytest.raises(RuntimeError) as error:
        torch.ops.thresholdnet_csrc.weight_gradient(**{**given, **kernel, **change})
    assert said in str(error.value) and str(error.value).startswith("weight_gradient: ")


def test_float16_is_refused():
    x = pixels(2, 6, 4, 4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="weight_gradient: tensors must be float32, float64 or bfloat16"):
        torch.ops.thresholdnet_csrc.weight_gradient([x], None, None, 0, x, 3, 3)
