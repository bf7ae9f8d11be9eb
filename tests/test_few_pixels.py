"""The C++ library's convolution of few pixels, which reads the links where they lie, against torch's in fp64."""

import copy

import older
import pytest
import torch
import torch.nn.functional as F
from activated import FUNCTIONS, NAMES
from pixels import among_others, pixels
from strategies import F64, LAST
from tolerances import PASS_RELATIVE, RELATIVE, assert_close, largest_error

from thresholdnet import ThresholdBlock, links
from thresholdnet.backends import csrc, elementwise, native

pytestmark = pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
# single pixels, rows and columns, fewer pixels than the kernel reaches, pixels that are taken together and some left
SIZES = [(1, 1, 1), (3, 1, 9), (2, 9, 1), (1, 2, 2), (4, 2, 3), (1, 7, 6)]
# vectors of all lengths in whole, a few elements less than one, some behind the last one
CHANNELS = [([1], 1), ([16], 6), ([3, 14, 1, 20], 13), ([40, 7], 131), ([64], 8)]


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=lambda c: f"{sum(c[0])} to {c[1]}")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_it_is_the_convolution(dtype, size, channels, kernel):
    torch.manual_seed(0)
    widths, outputs = channels
    n, h, w = size
    sources = [among_others(pixels(n, width, h, w, dtype=dtype)) for width in widths]
    weight, bias = pixels(outputs, sum(widths), *kernel, dtype=dtype), torch.randn(outputs, dtype=dtype)
    bound = PASS_RELATIVE[F64] if dtype == F64 else RELATIVE[torch.float32] / 10
    for affine in (None, [torch.randn(sum(widths), dtype=dtype) for _ in range(2)]):
        wide_affine = None if affine is None else tuple(v.double() for v in affine)
        for activation in NAMES:
            read = elementwise.gather([s.double() for s in sources], wide_affine, activation)
            wanted = F.conv2d(read, weight.double(), padding=[side // 2 for side in kernel])
            found = csrc.linked_conv2d(sources, weight, affine, None, activation)
            assert found.shape == wanted.shape and found.dtype == dtype
            assert found.is_contiguous(memory_format=LAST)
            assert largest_error(found, wanted) <= bound
            wanted = FUNCTIONS[activation](wanted + bias.double().view(-1, 1, 1))
            assert largest_error(csrc.linked_conv2d(sources, weight, affine, bias, activation), wanted) <= bound


@pytest.mark.parametrize("length", range(1, 40))
def test_what_fills_no_vector_is_added_once(length):
    """Ones: every element that is left out, or added twice, is one too few or many."""
    x, weight = torch.ones(1, length, 1, 1), torch.ones(5, length, 1, 1)
    assert torch.equal(csrc.linked_conv2d([x], weight, None, None, "relu"), torch.full((1, 5, 1, 1), float(length)))


def test_infinite_values_meet_no_zeros():
    """Of 19 channels the last vector begins inside those before; taps outside the image are no products with zero."""
    inf = float("inf")
    x, weight = torch.ones(1, 19, 2, 2).contiguous(memory_format=LAST), torch.ones(1, 19, 3, 3)
    x[0, 5, 0, 0] = inf
    weight = weight.contiguous(memory_format=LAST)
    assert csrc.linked_conv2d([x], weight, None, None, "relu").flatten().tolist() == [inf] * 4
    weight[0, 5, 1, 1] = -inf
    found = csrc.linked_conv2d([x], weight, None, None, "relu").flatten().tolist()
    assert found[0] == -inf and all(value != value for value in found[1:])  # inf - inf


def test_nan_passes_the_activation_and_stays_with_itspixels():
    x = torch.ones(2, 3, 1, 3).contiguous(memory_format=LAST)
    x[1, 0, 0, 0] = float("nan")
    weight = torch.ones(4, 3, 3, 3).contiguous(memory_format=LAST)
    for given in ({"affine": (torch.ones(3), torch.zeros(3))}, {"bias": torch.zeros(4)}):
        found = csrc.linked_conv2d([x], weight, given.get("affine"), given.get("bias"), "relu6")
        assert torch.equal(found.isnan()[1, :, 0], torch.tensor([[True, True, False]] * 4))
        assert not found[0].isnan().any()


def test_sums_do_not_depend_on_the_number_of_threads():
    x, weight = pixels(4, 70, 2, 2, dtype=torch.float32), pixels(333, 70, 3, 3, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [csrc.linked_conv2d([x[:, :31], x[:, 31:]], weight, None, None, "relu") for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("instructions", ["avx2", "baseline"])
def test_older_instructions(instructions):
    older.assert_passes(__file__, instructions, "convolution or added")


@pytest.mark.parametrize("unit", ["conv_bn_relu", "bottleneck"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 3)])
def test_blocks_run_on_it_and_gather_nothing(size, unit, monkeypatch):
    ran = []
    true = csrc.linked_conv2d
    monkeypatch.setattr(csrc, "linked_conv2d", lambda *given: (ran.append(len(given[0])), true(*given))[1])
    monkeypatch.setattr(native.Verbs, "_gathered", None)
    torch.manual_seed(0)
    plain = ThresholdBlock(9, links.threshold_ab(5, 2), 6, unit=unit, dtype=F64).eval()
    fused = copy.deepcopy(plain).fuse(True, "native")
    x = torch.randn(1, 9, *size, dtype=F64)
    with torch.no_grad():
        assert_close(fused(x), plain(x))
    read = [len(sources) for sources in plain.links]
    assert sorted(ran) == sorted(read if unit == "conv_bn_relu" else [*read, *[1] * 5])


def test_what_goes_to_the_library():
    weight = torch.zeros(160, 400, 3, 3)
    assert csrc.convolves(torch.zeros(4, 400, 2, 2), weight)
    assert not csrc.convolves(torch.zeros(1, 400, 5, 5), weight), "measured: the library's is faster"
    assert csrc.convolves(torch.zeros(1, 128, 7, 7), weight[:32, :128])
    assert not csrc.convolves(torch.zeros(1, 128, 9, 8), weight[:32, :128])
    assert not csrc.convolves(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16), weight[:, :4])
    assert not csrc.convolves(torch.zeros(0, 400, 2, 2), weight)
    assert not csrc.convolves(torch.zeros(4, 400, 2, 2, device="meta"), weight.to("meta"))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sources": []}, "sources must be tensors of pixels, got none"),
        ({"scale": None}, "scale and shift must come together"),
        ({"activation": 3}, "activation must be 0 (none), 1 (ReLU), 2 (ReLU6) or a slope between 0 and 1, got 3"),
        ({"sources": [pixels(2, 6, 4, 4), pixels(2, 6, 4, 5)]}, "tensor 1 must have shape [2, C, 4, 4]"),
        ({"sources": [pixels(0, 6, 4, 4)]}, "must have pixels, as many channels and odd kernels, got 6 channels"),
        ({"weight": pixels(3, 6, 2, 2)}, "odd kernels, got 6 channels and weight [3, 6, 2, 2]"),
        ({"weight": pixels(3, 5, 3, 3)}, "as many channels and odd kernels, got 6 channels and weight [3, 5, 3, 3]"),
        ({"weight": pixels(3, 6, 3, 2)}, "odd kernels, got 6 channels and weight [3, 6, 3, 2]"),
        ({"weight": torch.zeros(3, 6, 3, 3, dtype=F64)}, "weight must be channels_last"),
        ({"weight": pixels(3, 9, 3, 3)[:, :6]}, "weight must be channels_last, got a slice of channels"),
        ({"weight": pixels(3, 6, 3, 3, dtype=torch.float32)}, "weight must have the dtype of the other tensors"),
        ({"bias": torch.zeros(4, dtype=F64)}, "bias must be a contiguous vector of 3 elements"),
        ({"bias": torch.zeros(3)}, "bias must be a contiguous vector of 3 elements"),
    ],
)
def test_wrong_arguments_are_one_sentence(change, said):
    vector = torch.ones(6, dtype=F64)
    given = dict(sources=[pixels(2, 6, 4, 4)], scale=vector, shift=vector, activation=1, weight=pixels(3, 6, 3, 3))
    with pytest.raises(RuntimeError) as error:
        torch.ops.thresholdnet_csrc.linked_conv2d(**{**given, "bias": None, **change})
    assert said in str(error.value) and str(error.value).startswith("linked_conv2d: ")
