"""Packing ahead: any number of convolutions' weights in few launches, to the bit what one by one gives."""

import numpy as np
import pytest
import torch
from poisoned import fill, rows
from thresholdnet.kernels import launch, packed_weights
from thresholdnet.kernels.configs import ConvolutionConfig
from thresholdnet.kernels.packed_weights import Matrix, pack

from thresholdnet import ThresholdBlock

GROUPED = ConvolutionConfig(32, 64, 0, 16, group=(2, 2))
TILES = (ConvolutionConfig(32, 32, 0, 32), GROUPED, ConvolutionConfig(32, 16, 16, 64))


@pytest.fixture
def launches(monkeypatch):
    """The number of weights that each packing launch read."""
    found, start = [], packed_weights.start

    def counted(kernel, grid, weights, *rest, **options):
        found.append(len(weights))
        start(kernel, grid, weights, *rest, **options)

    monkeypatch.setattr(packed_weights, "start", counted)
    return found


def expected(matrix, weights):
    """packed[columns, K] by its definition, the readers' weights one behind the other."""
    whole = torch.cat([w.transpose(0, 1) for w in weights], 1) if matrix.transposed else weights[0]
    flat = whole.reshape(matrix.channels, -1)
    made = torch.zeros(matrix.columns, matrix.rows.shape[1], dtype=whole.dtype)
    for pixel, index in enumerate(matrix.rows):
        real = torch.from_numpy(np.flatnonzero(index >= 0))
        to = pixel * matrix.of_pixel
        made[to : to + matrix.channels, real] = flat[:, torch.from_numpy(index.copy()).long()[real]]
    return made


def several(transposed, dtype=torch.float32):
    """Matrices and weights of one pass: slices of shared weights, in every order of strides."""
    shared = [torch.randn(width, 26, 3, 3) for width in (5, 12, 8)]
    shared[1] = shared[1].to(memory_format=torch.channels_last)
    shared[2] = torch.randn(8, 26, 6, 3)[:, :, ::2]  # its taps are no line
    shared = [weight.to(dtype) for weight in shared]
    matrices, weights = [], []
    for tile in TILES:
        for first, width in ((0, 9), (9, 17)):
            own = [w[:, first : first + width] for w in shared]
            if transposed:
                matrices.append(Matrix((5, 12, 8), width, 3, True, tile))
                weights.append(own)
            else:
                matrices.append(Matrix((3, width - 3), 12, 3, False, tile))
                weights.append([own[1]])
    return matrices, weights


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_one_launch_is_what_one_by_one_is(transposed, dtype, launches):
    matrices, weights = several(transposed)
    like = torch.empty(0, dtype=dtype)
    together = pack(matrices, weights, like)
    # of the readers two are read where they lie, all slices as one; the six of the third are copied
    assert launches == [8 if transposed else 1]
    for made, matrix, own in zip(together, matrices, weights, strict=True):
        (alone,) = pack([matrix], [own], like)
        assert made.matrix == matrix and made.values.dtype == dtype
        assert torch.equal(made.values, alone.values)
        assert torch.equal(made.values, expected(matrix, own).to(dtype))


def test_a_launch_has_one_dtype_and_few_weights(launches, monkeypatch):
    monkeypatch.setattr(packed_weights, "MOST_WEIGHTS", 3)
    tile = TILES[0]
    weights = [[torch.randn(4, 5, 1, 1, dtype=kind)] for kind in (*[torch.float32] * 4, torch.bfloat16)]
    readers = [torch.randn(4, 5, 1, 1) for _ in range(4)]
    mixed = [readers[0], readers[1].half()]
    made = pack([Matrix((5,), 4, 1, False, tile)] * 5, weights, torch.empty(0))
    assert launches == [3, 1, 1]
    for each, own in zip(made, weights, strict=True):
        assert torch.equal(each.values, expected(each.matrix, [own[0].float()]))
    for own in (readers, mixed):
        launches.clear()
        (each,) = pack([Matrix((4,) * len(own), 5, 1, True, tile)], [own], torch.empty(0))
        assert launches == [1] and torch.equal(each.values, expected(each.matrix, own))


def test_convolutions_of_packed_weights_are_the_same():
    _, (a, b, out, dx) = rows(1, 4, 4, (10, 14, 20, 14), torch.float32)
    fill(a), fill(b)
    weight = torch.randn(20, 24, 3, 3) / 15
    packed, tail = launch.pack([[weight], [weight[:3, :14, :1, :1]]], a, widths=[(10, 14), (14,)])
    (turned,) = launch.pack([[weight[:, 10:]]], a)
    assert packed.shape == weight.shape and turned.shape == (20, 14, 3, 3) and tail.shape == (3, 14, 1, 1)
    found = []
    for forward, backward in ((weight, [weight[:, 10:]]), (packed, [turned])):
        sums = launch.conv([a, b], forward, out, statistics=True)
        launch.gradient([out], backward, dx)
        found.append([out.clone(), *sums, dx.clone()])
    assert all(map(torch.equal, *found))


def test_a_weight_packed_for_another_convolution():
    _, (a, b, out) = rows(1, 4, 4, (10, 14, 20), torch.float32)
    fill(a), fill(b)
    packed, turned = launch.pack([[torch.randn(20, 24, 3, 3)], [torch.randn(20, 24, 1, 1)]], a, widths=[(10, 14)] * 2)
    with pytest.raises(ValueError, match="packed for"):
        launch.conv([b, a], packed, out)
    with pytest.raises(ValueError, match="packed for"):
        launch.conv([a, b], packed, out, config=TILES[2])
    with pytest.raises(ValueError, match="packed for"):
        launch.gradient([a, b], [turned], out)
    with pytest.raises(ValueError, match="packed for"):
        launch.conv([a, b], packed._replace(values=packed.values.half()), out)
    with pytest.raises(ValueError, match="affine must be packed where the weight is"):
        launch.conv([a, b], packed, out, affine=(torch.ones(24), torch.zeros(24)))


def test_what_cannot_be_packed():
    like = torch.zeros(1, 8, 4, 4)
    weight = torch.randn(20, 24, 3, 3)
    for error, words, weights, shaped, widths in (
        (TypeError, "like must be float32", [[weight]], like.int(), [(24,)]),
        (ValueError, "and pixels", [[weight]], like[:0], [(24,)]),
        (ValueError, "one weight for each of the 1 convolutions", [[weight, weight]], like, [(24,)]),
        (ValueError, r"weights\[0\]\[0\] must have the shape", [[weight]], like, [(8, 8)]),
        (ValueError, r"weights\[0\] must have one kernel size", [[weight, weight[:, :, :1, :1]]], like, None),
    ):
        with pytest.raises(error, match=words):
            launch.pack(weights, shaped, widths=widths)


@pytest.mark.parametrize("unit", ("conv_bn_relu", "bottleneck"))
def test_a_block_packs_once_a_pass(unit, launches):
    block = ThresholdBlock(7, None, 5, unit=unit, num_layers=4, threshold=2, fused=True, backend="triton")
    x = torch.randn(1, 7, 4, 4, requires_grad=True)
    y = block(x)
    assert launches == ([4] if unit == "conv_bn_relu" else [8])
    launches.clear()
    y.sum().backward()
    assert launches == [4]


def test_an_affine_of_given_statistics_is_packed_beside_its_weight(launches):
    block = ThresholdBlock(7, None, 5, unit="bottleneck", num_layers=4, threshold=2, fused=True, backend="triton")
    block(torch.randn(1, 7, 4, 4))
    block.eval()
    launches.clear()
    block(torch.randn(1, 7, 4, 4, requires_grad=True))
    assert launches == [4, 1, 1, 1, 1]
