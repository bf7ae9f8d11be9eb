"""Signals [N, C, L]: blocks of Conv1d and BatchNorm1d, transitions and other people's models, in the engine."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from on_gpu import needs_gpu
from saved import saved_tensors, storage_bytes
from test_blocks import PATTERNS, UNITS
from test_chain import Chained, _calls
from test_engine import _block as _any_block
from test_volumes import (
    SMALL,
    DenseNet,
    Harmonic,
    Residual,
    _assert_same,
    _step,
    assert_casts,
    assert_converted,
    assert_converted_on_a_gpu,
    assert_drops_channels,
    assert_gradients,
    assert_network,
    assert_nothing_is_kept_in_front_of_a_convolution,
    assert_one_operator,
    assert_passes_opcheck,
    assert_repeats,
    assert_rounds_no_more_than_plain_torch,
    passes,
)
from tolerances import PASS_RELATIVE, RELATIVE, assert_close, largest_error
from torch import nn
from torch.nn.grad import conv1d_input, conv1d_weight

import thresholdnet as tn
from thresholdnet import ThresholdBlock, chain, links
from thresholdnet.backends import signals
from thresholdnet.convert import ConvertedBlock
from thresholdnet.models import fuse_blocks
from thresholdnet.reference import block_forward

__all__ = ["passes"]  # a fixture

F64 = torch.float64
_block = partial(_any_block, spatial_dims=1)
SIZES = [(2, 33), (1, 6), (3, 1), (1, 2)]  # N, L


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_plain_block(pattern, unit, passes):
    for n, length in SIZES:
        plain = _block(PATTERNS[pattern], unit)
        fused = copy.deepcopy(plain).fuse(True, "native")
        x = torch.randn(n, 7, length, dtype=F64)
        _assert_same(_step(fused, x), _step(plain, x))
        assert fused.backend == "native"
        for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def _taps(x, weight, dilation=1):
    """conv1d as a product a tap."""
    reach, padded = weight.shape[2] // 2 * dilation, F.pad(x, [weight.shape[2] // 2 * dilation] * 2)
    assert padded.shape[2] == x.shape[2] + 2 * reach
    return sum(
        torch.einsum("oc,ncl->nol", weight[:, :, tap], padded[:, :, tap * dilation : tap * dilation + x.shape[2]])
        for tap in range(weight.shape[2])
    )


@pytest.mark.parametrize("dilation", [1, 3])
def test_reference_equals_what_is_written_out(dilation):
    """Of layers of two convolutions, of one, and without BatchNorm."""
    x = torch.randn(2, 7, 9, dtype=F64)

    def normed(y, gamma, beta):
        return F.relu(F.batch_norm(y, None, None, gamma, beta, training=True))

    for unit in UNITS:
        block = _block(links.harmonic(4), unit, dilation=dilation, outputs="all")
        nodes, parameters = [x], iter(block.parameters())
        for sources in block.links:
            y = torch.cat([nodes[source] for source in sources], 1)
            if unit in ("bn_relu_conv", "bottleneck"):
                y = normed(y, next(parameters), next(parameters))
            if unit == "bottleneck":
                y = normed(_taps(y, next(parameters)), next(parameters), next(parameters))
            y = _taps(y, next(parameters), dilation)
            if unit == "conv_relu":
                y = F.relu(y + next(parameters)[:, None])
            nodes.append(normed(y, next(parameters), next(parameters)) if unit == "conv_bn_relu" else y)
        expected, _ = block_forward(block.plan, x, list(block.parameters()))
        torch.testing.assert_close(expected, torch.cat(nodes, 1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [5, 15, 33])
@pytest.mark.parametrize("unit", UNITS)
def test_longer_kernels(unit, kernel_size, passes):
    """Also such as reach beyond the signal, and than which C++ takes no longer ones."""
    for n, length, dilation in ((2, 40, 1), (3, 9, 2), (1, 2, 1)):
        plain = _block(PATTERNS["threshold_ab"], unit, kernel_size=kernel_size, dilation=dilation)
        assert plain.plan.from_text(plain.plan.to_text()) == plain.plan and f"kernel_size={kernel_size}" in repr(plain)
        fused = copy.deepcopy(plain).fuse(True, "native")
        x = torch.randn(n, 7, length, dtype=F64)
        _assert_same(_step(fused, x), _step(plain, x))
        assert fused.backend == "native"
        expected, _ = block_forward(plain.plan, x, list(plain.parameters()))
        torch.testing.assert_close(copy.deepcopy(plain)(x), expected, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            plain.eval(), fused.eval()
            assert_close(tn.prepack(fused)(x), plain(x))


@pytest.mark.parametrize("unit", UNITS)
def test_a_signal_is_an_image_of_one_row(unit):
    """Of a 3x3 kernel the middle row alone meets it."""
    ours = _block(PATTERNS["threshold_ab"], unit).fuse(True, "native")
    images = ThresholdBlock(7, PATTERNS["threshold_ab"], 5, unit=unit, dtype=F64, fused=True, backend="native")
    for row, square in zip(ours.parameters(), images.parameters(), strict=True):
        row.data.copy_(square[:, :, square.shape[2] // 2] if square.dim() == 4 else square)
    x = torch.randn(2, 7, 11, dtype=F64)
    assert_close(ours(x), images(x.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("mode", ["frozen", "inference"])
@pytest.mark.parametrize("size", [(2, 9), (6, 70)])  # normalised behind the convolution, and folded into it
@pytest.mark.parametrize("unit", UNITS)
def test_given_statistics(unit, size, mode, passes):
    plain = _block(PATTERNS["threshold_ab"], unit, activation="leaky_relu(0.1)")
    x = torch.randn(size[0], 7, size[1], dtype=F64)
    plain(4 * x + 1)  # running statistics away from 0 and 1
    plain.eval()
    fused = copy.deepcopy(plain).fuse(True, "native")
    if mode == "frozen":
        _assert_same(_step(fused, x), _step(plain, x))
        return
    with torch.no_grad():
        expected = plain(x)
        assert_close(fused(x), expected)
        tn.prepack(fused)
        for _ in range(12):  # the last ones are replayed
            assert_close(fused(x), expected)
        with torch.no_grad():
            for parameter in (*plain.parameters(), *fused.parameters()):
                parameter.mul_(0.5)
        assert_close(fused(x), plain(x))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("kernel", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_of_signals_and_their_gradients(dtype, kernel, dilation, packed):
    """Of two sources among other channels, which are NaN."""
    if kernel == 1 and dilation > 1:
        return  # no such convolution
    torch.manual_seed(0)
    form = {"padding": kernel // 2 * dilation, "dilation": dilation}
    for n, length in ((1, 1), (1, 4), (2, 19), (3, 130)):
        whole = torch.full((n, 40, 1, length), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
        whole[:, 3:26], whole[:, 30:37] = torch.randn(n, 23, 1, length), torch.randn(n, 7, 1, length)
        read = torch.cat([whole[:, 3:26], whole[:, 30:37]], 1).double().squeeze(2)
        weight, bias = torch.randn(12, 30, kernel).to(dtype), torch.randn(12)
        dz = torch.randn(n, 12, 1, length).to(dtype).contiguous(memory_format=torch.channels_last)
        verbs, sources = signals.Verbs(None, whole), [whole[:, 3:26], whole[:, 30:37]]
        taken = verbs.packed(verbs.way(1, weight, dilation), weight, dilation) if packed else weight
        wanted = F.conv1d(read, weight.double(), **form)
        found = {
            wanted: verbs.conv(sources, taken, into=("node", 1), dilation=dilation)[0].squeeze(2),
            F.leaky_relu(wanted + bias.double()[:, None], 0.1): verbs.conv(
                sources, taken, into=("node", 1), bias=bias, activation="leaky_relu(0.1)", dilation=dilation
            )[0].squeeze(2),
            conv1d_input(read.shape, weight.double(), dz.squeeze(2).double(), **form): verbs._data_gradient(
                dz, weight, dilation
            ).squeeze(2),
            conv1d_weight(read, weight.shape, dz.squeeze(2).double(), **form): verbs.weight_gradient(
                sources, dz, kernel, like=weight, dilation=dilation
            ),
        }  # fmt: skip
        bound = RELATIVE[dtype] if dtype == torch.float32 else PASS_RELATIVE[dtype]
        for expected, made in found.items():
            assert made.dtype == dtype and made.shape == expected.shape
            assert largest_error(made, expected) <= bound


@pytest.mark.parametrize("order", ["NCL", "NLC", "strided", "repeated"])
@pytest.mark.parametrize("unit", UNITS)
def test_layouts_replays_and_recomputation(unit, order, monkeypatch):
    """The same whatever the input's memory is like, at every call; of the output a sample's channels are neighbours."""
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    plain = _block(PATTERNS["threshold_ab"], unit)
    fused = copy.deepcopy(plain).fuse(True, "native", "bottleneck")
    x = torch.randn(2, 7, 9, dtype=F64)
    if order == "repeated":
        x = x[:, :, :1].expand(-1, -1, 9)
    expected = _step(plain, x)
    laid = {
        "NCL": lambda: x.contiguous(), "NLC": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda: torch.stack([x, x + 1], 3)[..., 0], "repeated": lambda: x,
    }[order]()  # fmt: skip
    y = assert_repeats(fused, laid, expected)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("channels", [False, True])
def test_dropout(channels):
    block = _block(links.dense(3), "bottleneck", drop_rate=0.5).fuse(True, "native")
    block.drop_channels = channels
    torch.manual_seed(0)
    dropped = (block(torch.randn(2, 7, 40, dtype=F64))[:, 7:] == 0).double()
    assert 0.3 < dropped.mean() < 0.7
    by_channel = dropped.mean(2)
    assert bool(((by_channel == 0) | (by_channel == 1)).all()) == channels


@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit):
    assert_gradients(unit, (5,))


@pytest.mark.parametrize("unit", UNITS)
def test_opcheck_and_compile(unit):
    block = _block(links.threshold_ab(3, 2), unit, dtype=torch.float32).fuse(True, "native")
    x = torch.randn(2, 7, 6)
    assert_passes_opcheck(block, x.unsqueeze(2))
    net = nn.Sequential(block, nn.BatchNorm1d(block.out_channels), nn.ReLU(), nn.AvgPool1d(2))
    compiled = torch.compile(Chained(*copy.deepcopy(net)), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(_step(compiled, x), _step(net, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_half_formats_round_no_more_than_plain_torch(unit, dtype):
    assert_rounds_no_more_than_plain_torch(unit, dtype, (4, 16, 40))


def test_autocast():
    assert_casts((12,))


def test_a_convolution_behind_the_block():
    assert_nothing_is_kept_in_front_of_a_convolution((30,))


TRANSITIONS = {
    "norm act": lambda: [nn.BatchNorm1d(6), nn.ReLU()],
    "max pool": lambda: [nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.MaxPool1d(3, 2, 1)],
    "ceil": lambda: [nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, ceil_mode=True)],
    "average": lambda: [nn.BatchNorm1d(6), nn.ReLU6(), nn.AvgPool1d(2)],
    "padded average": lambda: [nn.BatchNorm1d(6), nn.ReLU(), nn.AvgPool1d(3, 2, 1, count_include_pad=False)],
    "densenet": lambda: [nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1, bias=False), nn.AvgPool1d(2, 2)],
    "strided": lambda: [nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 5, 7, 2, 3, 2, bias=False)],
    "depth-wise": lambda: [nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, 1, 1, groups=6, bias=False)],
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions_equal_the_modules(name, train):
    assert_one_operator(TRANSITIONS[name](), train, (41,))


def test_images_without_a_batch_are_no_signals():
    """A convolution of images takes [C, H, W] as well, and BatchNorm1d vectors [N, C]: torch's own run."""
    block = ThresholdBlock(7, links.dense(2), 4, fused=True, backend="native")
    with pytest.raises(ValueError, match=r"input of the block must have 4 dimensions \[N, C, H, W\], got 3"):
        block(torch.randn(7, 5, 5))
    x = torch.randn(6, 6, 8)
    net = [nn.BatchNorm1d(6).eval(), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)]
    assert _calls(lambda: chain.run(net, x)) == ["transition"]  # without the convolution
    torch.testing.assert_close(chain.run(net, x), nn.Sequential(*net)(x))
    vectors = torch.randn(5, 6)
    assert torch.equal(chain.run(net[:2], vectors), nn.Sequential(*net[:2])(vectors))


def test_bad_input():
    block = _block(links.dense(2), "bottleneck", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"input of the block must have 3 dimensions \[N, C, L\], got 4"):
        block(torch.randn(2, 7, 4, 5))
    with pytest.raises(ValueError, match="must have 7 channels, got 6"):
        block(torch.randn(2, 6, 3))
    with pytest.raises(ValueError, match=r"more than one value per channel when training, got \(1, 7, 1\)"):
        block.fuse(True, "native")(torch.randn(1, 7, 1))
    block._candidates, block._choice = ("triton",), "triton"
    with pytest.raises(RuntimeError, match=r"it takes images \[N, C, H, W\], got signals of shape \(2, 7, 9\)"):
        block(torch.randn(2, 7, 9))
    for arguments in ({"kernel_size": 4, "spatial_dims": 1}, {"kernel_size": 5}, {"kernel_size": 5, "spatial_dims": 3}):
        with pytest.raises(ValueError, match="kernel_size must be 3, or odd where spatial_dims is 1, got"):
            ThresholdBlock(7, links.dense(2), 4, **arguments)


FOREIGN = {
    "MONAI's DenseNet": (partial(DenseNet, dims=1), (2, 1, 90), 2),
    "HarDNet's block": (partial(Harmonic, 6, 4, 4, dims=1), (2, 6, 17), 1),
    "residual dense block": (partial(Residual, dims=1), (2, 6, 17), 1),
    "of longer kernels": (partial(DenseNet, dims=1, taps=7), (2, 1, 90), 2),
    "residual, of longer kernels": (partial(Residual, dims=1, taps=5), (2, 6, 17), 1),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_convert(name):
    assert_converted(*FOREIGN[name], dims=1)


def test_of_a_block_whose_kernels_differ_each_layer_is_one():
    model, lines = DenseNet(dims=1), []
    layer = model.features.denseblock1[1].layers
    layer.conv2 = nn.Conv1d(layer.conv2.in_channels, layer.conv2.out_channels, 5, padding=2, bias=False)
    original = copy.deepcopy(model.double())
    converted = tn.convert(model, report=lines.append)
    assert any("all layers must have one kernel size, got 3, 5" in line for line in lines), lines
    found = [m.plan.num_layers for m in converted.modules() if isinstance(m, ConvertedBlock)]
    assert found == [1, 1, 1, 2]
    x = torch.randn(2, 1, 90, dtype=F64)
    _assert_same(_step(converted, x), _step(original, x))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FOREIGN if not name.startswith("residual")])
def test_on_a_gpu(name, dtype):
    assert_converted_on_a_gpu(*FOREIGN[name][:2], dtype)


def test_a_converted_model_keeps_less():
    original = DenseNet(depths=(6, 8), k=8, dims=1)
    converted = tn.convert(copy.deepcopy(original), report=None)
    x = torch.randn(2, 1, 4096)
    ours, theirs = (storage_bytes(saved_tensors(model, x)) for model in (converted, original))
    assert ours < 0.4 * theirs
    account = tn.memory.account(converted, x.shape, torch.float32)
    assert account["fused"].kept < 0.4 * account["eager"].kept
    assert account["fused, recompute"].kept < account["fused"].kept


def test_a_dropout_of_channels_is_found():
    assert_drops_channels(DenseNet(drop=0.5, dims=1), (60,))


@pytest.mark.parametrize("name", ["thresholdnet_ab", "thresholdnet_bc", "densenet40", "hardnet39ds"])
def test_networks_of_the_zoo(name):
    plain, x = assert_network(name, (70,))
    with pytest.raises(ValueError, match=r"signals must have 3 dimensions \[N, C, L\], got 4"):
        plain(x[..., None])
    if plain.min_size > 1:
        with pytest.raises(ValueError, match=rf"signals must be at least {plain.min_size} samples .*, got 2"):
            plain(x[:, :, :2])


def test_densenet121_of_signals_has_monais_parameters():
    model = tn.create_model("densenet121", 2, 1, spatial_dims=1, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 5_521_538  # monai.networks.nets.DenseNet121(1, 1, 2)


def test_a_pyramid_of_signals():
    pyramid = tn.create_model("thresholdnet_ab", features_only=True, spatial_dims=1, fused=True, **SMALL)
    x = torch.randn(1, 3, 96)
    for level, found in zip(pyramid.feature_info, pyramid(x), strict=True):
        assert found.shape[1:] == (level["channels"], 96 // level["reduction"])


def test_dilation_in_the_place_of_downsampling():
    """The same weights, and the longer output's samples are those of every offset."""
    model = tn.create_model("densenet121", 2, 1, spatial_dims=1, output_stride=16, fused=True).eval()
    assert model.stages[-1].reduction == 16
    plain = copy.deepcopy(model)
    fuse_blocks(plain, False)
    x = torch.randn(2, 1, 200)
    with torch.no_grad():
        assert_close(model(x), plain(x), torch.float32)
