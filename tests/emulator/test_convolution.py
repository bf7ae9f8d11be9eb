"""The tensor-core convolution in the emulator, against torch in fp32 on the same rounded operands.

Every source lies between slots full of NaN, and so does the written slot: what is read beyond the links, or written
beyond the slot, shows.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from activated import FUNCTIONS, NAMES, derivative
from thresholdnet.kernels.slots import allocate, whole, write

from thresholdnet.backends import cuda_launch

HALF = (torch.bfloat16, torch.float16)
# One rounding to the slot's format: half a unit in the last place, 2^-9 and 2^-12 of the element; sums are fp32.
RELATIVE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMS = ("gemm", "wide", "upright")
NAN = float("nan")


@pytest.fixture(autouse=True)
def launched(emulated, monkeypatch):
    monkeypatch.setattr(cuda_launch, "operators", lambda: emulated)
    torch.manual_seed(0)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Each kernel in turn, whatever would be chosen; 1x1 kernels have one."""
    monkeypatch.setattr(
        cuda_launch, "_form", lambda kind, kernel_size, *_: request.param if kernel_size == 3 else "gemm"
    )
    return request.param


def laid_out(batch, height, width, widths, dtype, layout):
    """Slots of these widths, with one of 8 channels before each and after the last; all of them NaN."""
    spread = [8, *itertools.chain.from_iterable((w, 8) for w in widths)]
    slots = allocate(batch, spread, height, width, dtype=dtype, device="cpu", layout=layout)
    memory = slots[0].as_strided((slots[0].untyped_storage().nbytes() // slots[0].element_size(),), (1,), 0)
    memory.fill_(NAN)
    return memory, slots[1::2]


def filled(slot, integers=False):
    shape = tuple(slot.shape)
    write(slot, torch.randint(-2, 3, shape).to(slot.dtype) if integers else torch.randn(shape))
    return slot


def outside(memory, slot):
    """The allocation but for this slot, as bits."""
    kept = memory.clone()
    inside = whole(kept.as_strided(slot.shape, slot.stride(), slot.storage_offset()))
    inside.zero_()
    return kept.view(torch.int16)


def near(got, expected, factor=1.0):
    expected = expected.float()
    relative = RELATIVE[got.dtype] * factor
    torch.testing.assert_close(got.float(), expected, rtol=relative, atol=relative * expected.abs().max().item() / 8)


def moments(z):
    variance, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    return mean.float(), variance.float()


# batch, height, width; source widths; output channels; layout. No width is a multiple of the tiles.
CASES = (
    ((2, 7, 5), (24, 14, 20), 14, "arena"),
    ((1, 18, 19), (8,), 30, "rows"),
    ((3, 9, 1), (3, 40), 48, "arena"),
    ((1, 1, 13), (16, 8, 1), 70, "rows"),
    ((2, 1, 1), (5, 33), 8, "arena"),
    ((1, 1, 1), (9,), 3, "rows"),
    ((1, 3, 4), tuple(range(1, 17)), 17, "arena"),
)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("size", "widths", "channels", "layout"), CASES)
def test_plain(size, widths, channels, layout, dtype, form):
    memory, (*sources, out) = laid_out(*size, (*widths, channels), dtype, layout)
    for source in sources:
        filled(source)
    for kernel_size in (3, 1):
        weight = (torch.randn(channels, sum(widths), kernel_size, kernel_size) / kernel_size).to(dtype)
        before = outside(memory, out)
        assert cuda_launch.conv(sources, weight, out) is None
        near(out, F.conv2d(torch.cat(sources, 1).float(), weight.float(), padding=kernel_size // 2))
        assert torch.equal(outside(memory, out), before)
        assert not whole(out)[:, channels:].any()


@pytest.mark.parametrize("dtype", HALF)
def test_integer_operands_give_exact_equality(dtype, form):
    _, (a, b, out) = laid_out(2, 9, 17, (24, 14, 30), dtype, "arena")
    filled(a, integers=True), filled(b, integers=True)
    weight = torch.randint(-1, 2, (30, 38, 3, 3)).to(dtype)
    cuda_launch.conv([a, b], weight, out, statistics=True)
    expected = F.conv2d(torch.cat([a, b], 1).float(), weight.float(), padding=1)
    assert expected.abs().max() < 256  # bf16 holds it
    assert torch.equal(out.float(), expected)
    add = filled(out, integers=True).float()
    cuda_launch.gradient([a], [weight[:24, :30].contiguous()], out, add=True)
    assert torch.equal(out.float(), add + F.conv_transpose2d(a.float(), weight[:24, :30].float(), padding=1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("size", "widths", "channels", "layout"), CASES[:4])
def test_statistics_are_those_of_the_rounded_values(size, widths, channels, layout, dtype, form, emulated):
    _, (*sources, out) = laid_out(*size, (*widths, channels), dtype, layout)
    for source in sources:
        filled(source)
    weight = torch.randn(channels, sum(widths), 3, 3).to(dtype)
    found = cuda_launch.conv(sources, weight, out, statistics=True)
    for got, expected in zip(found, moments(out), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * out.float().abs().max().item())
    first = out.clone()
    emulated.reverse_order(True)  # of threads and blocks: a race would show
    again = cuda_launch.conv(sources, weight, out, statistics=True)
    emulated.reverse_order(False)
    assert torch.equal(out, first) and all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_variance_of_values_far_from_zero():
    """Sums of squares would lose it all: mean 100, deviation 1 / 4."""
    _, (source, out) = laid_out(2, 20, 20, (8, 8), torch.float16, "rows")
    write(source, 100 + torch.randn(2, 8, 20, 20) / 4)
    weight = torch.eye(8).view(8, 8, 1, 1)
    found = cuda_launch.conv([source], weight, out, statistics=True)
    for got, expected in zip(found, moments(out), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tiles", [100, 300, 1030])  # merged by few threads, by more, by all of them in several rounds
def test_sums_of_many_tiles(tiles):
    size = 1, tiles, 128
    _, (source, out) = laid_out(*size, (8, 9), torch.bfloat16, "rows")
    weight, norm = torch.randn(9, 8, 1, 1).bfloat16(), [torch.rand(9) + 0.5 for _ in range(4)]
    found = cuda_launch.conv([filled(source)], weight, out, statistics=True)
    for got, expected in zip(found, moments(out), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    z, back = out.clone(), torch.randn(8, 9, 1, 1).bfloat16()
    _, (raw,) = laid_out(*size, (9,), torch.bfloat16, "rows")
    write(raw, z)
    sum_g, sum_gx = cuda_launch.gradient([source], [back], out, mask=(raw, *norm), activation="relu")
    g, xhat = out.double(), (z.double() - norm[2].view(1, -1, 1, 1)) * norm[3].view(1, -1, 1, 1)
    largest = g.abs().sum((0, 2, 3)).max().item()
    torch.testing.assert_close(sum_g, g.sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-6 * largest)
    torch.testing.assert_close(sum_gx, (g * xhat).sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("activation", [*NAMES, None])
def test_bias(activation, form):
    for channels in (14, 48):
        _, (source, out) = laid_out(2, 6, 11, (20, channels), torch.bfloat16, "arena")
        weight, bias = torch.randn(channels, 20, 3, 3).bfloat16(), 4 * torch.randn(channels)
        cuda_launch.conv([filled(source)], weight, out, bias=bias, activation=activation)
        expected = F.conv2d(source.float(), weight.float(), padding=1) + bias.view(1, -1, 1, 1)
        near(out, FUNCTIONS[activation](expected))
        assert not whole(out)[:, channels:].any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("channels", [12, 30, 72])
def test_affine_in_front_of_a_1x1_kernel(channels, activation, dtype):
    for layout in ("rows", "arena"):
        _, (a, b, out) = laid_out(2, 9, 8, (24, 13, channels), dtype, layout)
        filled(a), filled(b)
        weight = torch.randn(channels, 37, 1, 1).to(dtype)
        scale, shift = 4 * torch.randn(37), torch.randn(37)
        found = cuda_launch.conv([a, b], weight, out, affine=(scale, shift), activation=activation, statistics=True)
        read = torch.cat([a, b], 1).float() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        read = FUNCTIONS[activation](read).to(dtype).float()  # rounded before it is multiplied, as a stored one is
        near(out, F.conv2d(read, weight.float()), 2)  # an affine may round to a neighbour in either computation
        for got, expected in zip(found, moments(out), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_nan_passes_an_activation_as_in_torch_and_stays_out_of_the_padding():
    _, (source, out) = laid_out(1, 1, 3, (8, 5), torch.bfloat16, "rows")
    write(source, torch.tensor([NAN, -1.0, 7.0]).expand(1, 8, 1, 3))
    ones, zeros, weight = torch.ones(8), torch.zeros(8), torch.eye(8)[:5].view(5, 8, 1, 1)
    cuda_launch.conv([source], weight, out, affine=(ones, zeros), activation="relu6")
    torch.testing.assert_close(out[0, 0, 0].float(), torch.tensor([NAN, 0.0, 6.0]), equal_nan=True)
    cuda_launch.conv([source], weight, out, bias=zeros[:5])
    torch.testing.assert_close(out[0, 0, 0].float(), torch.tensor([NAN, 0.0, 7.0]), equal_nan=True)
    assert not whole(out)[:, 5:].any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_gradient_of_a_node(readers, kernel_size, dtype, form):
    widths = (14, 24, 3, 40)[:readers]
    memory, (*dz, out) = laid_out(2, 6, 9, (*widths, 20), dtype, "arena")
    weights = [(torch.randn(w, 32, kernel_size, kernel_size) / 3).to(dtype)[:, 5:25] for w in widths]
    inside = zip(dz, weights, strict=True)
    expected = sum(F.conv_transpose2d(filled(d).float(), w.float(), padding=kernel_size // 2) for d, w in inside)
    assert cuda_launch.gradient(dz, weights, out) is None
    near(out, expected)
    before, others = filled(out).float(), outside(memory, out)
    cuda_launch.gradient(dz, weights, out, add=True)
    near(out, expected + before)
    assert torch.equal(outside(memory, out), others)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("add", [False, True])
def test_mask_and_sums(add, activation, dtype, form):
    for channels, layout in ((20, "arena"), (32, "rows"), (70, "arena")):
        _, (a, b, z, out) = laid_out(2, 5, 17, (14, 24, channels, channels), dtype, layout)
        weights = [(torch.randn(w, channels, 3, 3) / 3).to(dtype) for w in (14, 24)]
        scale, shift, mean = 3 * torch.randn(channels), 1 + torch.randn(channels), torch.randn(channels)
        rstd = torch.rand(channels) + 0.5
        inside = zip((a, b), weights, strict=True)
        g = sum(F.conv_transpose2d(filled(d).float(), w.float(), padding=1) for d, w in inside)
        if add:
            g = g + filled(out).float()
        normal = filled(z).float() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        g = g * derivative(normal, activation)
        mask = (z, scale, shift, mean, rstd)
        sum_g, sum_gx = cuda_launch.gradient([a, b], weights, out, add=add, mask=mask, activation=activation)
        near(out, g)
        xhat = (z.double() - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1)
        wide = out.double()
        size = wide.abs().sum((0, 2, 3)).max().item()
        torch.testing.assert_close(sum_g, wide.sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-6 * size)
        torch.testing.assert_close(sum_gx, (wide * xhat).sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-5 * size)
        assert not whole(out)[:, channels:].any()


def test_a_node_that_only_the_output_reads(form):
    _, (z, out) = laid_out(2, 5, 4, (20, 20), torch.bfloat16, "arena")
    before = filled(out).clone()
    ones, zeros = torch.ones(20), torch.zeros(20)
    sum_g, _ = cuda_launch.gradient([], [], out, add=True, mask=(filled(z), ones, zeros, zeros, ones))
    assert torch.equal(out, torch.where(z > 0, before, 0))
    torch.testing.assert_close(sum_g, out.double().sum((0, 2, 3)).float())


def test_the_choice():
    choose = cuda_launch.convolution_form
    assert choose(1, 512, 14, 14) == "gemm"  # 1x1: never gathered
    assert choose(3, 49, 56, 56) == "library" and choose(3, 48, 56, 56) == "gemm"
    assert choose(3, 32, 56, 56) in ("wide", "upright")
    assert choose(3, 32, 32, 8) == "upright" and choose(3, 16, 8, 32) == "wide"
    assert choose(3, 32, 7, 7) == "gemm"  # half of a tile would lie outside
    assert choose(3, 200, 56, 56, "own") == "gemm" and choose(1, 8, 4, 4, "library") == "library"
    with pytest.raises(ValueError, match="THRESHOLDNET_CONV must be 'own' or 'library', got 'both'"):
        choose(3, 8, 4, 4, "both")


def test_the_choice_can_be_forced(monkeypatch):
    """Both ways give the same convolution, gradient and sums."""
    _, (a, b, z, first, second) = laid_out(2, 6, 5, (14, 24, 20, 20, 20), torch.bfloat16, "arena")
    weight, mask = torch.randn(20, 38, 3, 3).bfloat16(), (filled(z), *torch.rand(4, 20).unbind())
    filled(a), filled(b)
    found = {}
    for forced, out in (("own", first), ("library", second)):
        monkeypatch.setenv("THRESHOLDNET_CONV", forced)
        moments = cuda_launch.conv([a, b], weight, out, statistics=True)
        z_out = out.clone()
        sums = cuda_launch.gradient([a], [weight[:14, :20]], out, add=True, mask=mask)
        found[forced] = (z_out.float(), *moments, out.float(), *sums)
        assert not whole(out)[:, 20:].any()
    for own, library in zip(*found.values(), strict=True):
        torch.testing.assert_close(own, library, rtol=2**-6, atol=2**-6 * library.abs().max().item())


@pytest.mark.parametrize(("size", "dilation"), (((2, 16, 16), 2), ((1, 7, 9), 3), ((2, 4, 6), 5)))
@pytest.mark.parametrize("forced", ("own", "library"))
def test_dilation(size, dilation, forced, monkeypatch):
    """The tables alone know of it; 16 x 16 pixels would else be those of a tile with its border."""
    monkeypatch.setenv("THRESHOLDNET_CONV", forced)
    memory, (a, b, out, dx) = laid_out(*size, (14, 24, 20, 14), torch.bfloat16, "arena")
    weight = (torch.randn(20, 38, 3, 3) / 6).bfloat16()
    filled(a), filled(b)
    x, exact = torch.cat([a, b], 1).float().requires_grad_(), weight.float().requires_grad_()
    wanted = F.conv2d(x, exact, padding=dilation, dilation=dilation)
    before = outside(memory, out)
    cuda_launch.conv([a, b], weight, out, dilation=dilation)
    near(out, wanted.detach())
    assert torch.equal(outside(memory, out), before)
    of_x, of_weight = torch.autograd.grad(wanted, [x, exact], out.float())
    cuda_launch.gradient([out], [weight[:, :14]], dx, dilation=dilation)
    near(dx, of_x[:, :14])
    near(cuda_launch.weight_gradient([a, b], out, 3, dilation=dilation), of_weight, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"weight": torch.ones(7, 72).bfloat16()}, r"convolution: weight must be contiguous, \[8, n\]"),
        ({"entries": torch.zeros(3, dtype=torch.int32)}, "entries must hold a spare chunk"),
        ({"row8": torch.zeros(3, dtype=torch.int32)}, "row8 must be 16 contiguous int32"),
        ({"taps_inside": torch.zeros(3, dtype=torch.int32)}, "taps_inside must be 20 contiguous int32"),
        ({"form": 3}, "form must be 0 to 2, got 3"),
        ({"vectors": [torch.ones(8)]}, "vectors must be 0 for this epilogue, got 1"),
        ({"scale": torch.ones(8)}, "scale and shift must come together"),
        ({"source": torch.ones(1)}, "source must have the dtype of out"),
        ({"out": torch.ones(1, 8, 4, 5).bfloat16()}, "out must be a slot"),
        ({"out": torch.ones(1, 8, 4, 5)}, "out must be bfloat16 or float16"),
    ),
)
def test_bad_input(change, words, emulated):
    _, (source, out) = laid_out(1, 4, 5, (8, 8), torch.bfloat16, "arena")
    names = (
        "source", "weight", "entries", "row8", "weight_index", "taps_inside", "form", "scale", "shift", "channel",
        "vectors", "raw", "epilogue", "activation", "add", "out",
    )  # fmt: skip
    table = cuda_launch.device_table(
        (cuda_launch.lay_out("sources", [source], out)).sources, 5, 3, 32, (1, 1), False, out.device
    )
    inside = cuda_launch.device_pixels(1, 4, 5, (1, 1), out.device)[0]
    given = (
        source, torch.ones(8, 72).bfloat16(), table.entries, table.row8, table.weight_index, inside, 0, None, None,
        table.channel, [], None, 0, 0, False, out,
    )  # fmt: skip
    arguments = dict(zip(names, given, strict=True))
    emulated.convolution(*arguments.values())
    with pytest.raises(RuntimeError, match=words) as caught:
        emulated.convolution(*(arguments | change).values())
    assert "convolution: " in str(caught.value)
