"""`prepack`: results as without it, whatever is written into weights and statistics; what is made, and when."""

import copy
import gc
import itertools
import pickle
import re
import sys
import weakref

import pytest
import torch
from strategies import fill
from tolerances import PASS_RELATIVE, RELATIVE, largest_error, rms_error
from torch import nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links, packing
from thresholdnet.backends import csrc, native, winograd

UNITS = ("conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck")


def _block(unit="conv_bn_relu", width=16, activation="relu", **options):
    block = ThresholdBlock(
        24, links.threshold_ab(5, 3), width, unit=unit, activation=activation, fused=True, backend="native", **options
    )
    fill(block, 0)
    return block.eval()


@torch.no_grad()
def _same(block, x, bound=RELATIVE[torch.float32]):
    """Whether the block computes what its copy does, which is not prepacked."""
    plain = copy.deepcopy(block)
    assert not any(packing.forms_of(parameter) is not None for parameter in plain.parameters())
    return largest_error(block(x), plain(x)) <= bound


@pytest.fixture
def packs(monkeypatch):
    """How each weight was laid out, in order."""
    made = []

    def noted(kind):
        packed = kind.packed

        def note(self, way, *of):
            if type(self) is kind:
                made.append(way)
            return packed(self, way, *of)

        monkeypatch.setattr(kind, "packed", note)

    noted(native.Verbs), noted(winograd.Verbs)
    return made


SIZES = [(2, 9, 11), (1, 16, 16), (3, 2, 2), (2, 1, 1), (1, 1, 1), (0, 4, 4)]
EITHER = itertools.product(SIZES, ("relu", "relu6"))  # every way that a weight may go


@pytest.mark.parametrize(("size", "activation"), [*EITHER, *((size, "leaky_relu(0.2)") for size in SIZES[:3])])
@pytest.mark.parametrize("unit", UNITS)
def test_results_are_those_without(unit, activation, size, packs):
    block = tn.prepack(_block(unit, activation=activation))
    x = torch.randn(size[0], 24, *size[1:])
    with torch.no_grad():
        if size[0] == 0:
            assert block(x).shape == (0, block.out_channels, *size[1:])
            return
    for _ in range(2):
        assert _same(block, x)
    convolutions = 5 * (1 + (unit == "bottleneck"))
    few = size[0] * size[1] * size[2] <= 16
    as_they_lie = (convolutions if csrc.reason() is None else 5) * few  # 3x3 layers without the C++ library: `taps.py`
    assert sorted(packs) == sorted([""] * as_they_lie + ["library"] * (convolutions - as_they_lie))  # in the first call
    assert _same(block, torch.randn(5, 24, 12, 7))  # another size reads the same layouts, or makes others
    assert len(packs) == convolutions + as_they_lie


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu(0.2)"])
@pytest.mark.parametrize("unit", UNITS)
def test_bfloat16(unit, activation, packs):
    """Packed where oneDNN takes bfloat16 here. Folded weights are rounded once more, and results once less."""
    block = _block(unit, activation=activation).bfloat16()
    exact, packed = copy.deepcopy(block).double(), tn.prepack(copy.deepcopy(block))
    x = torch.randn(2, 24, 9, 11).bfloat16()
    with torch.no_grad():
        wanted = exact(x.double())
        for _ in range(2):
            found = packed(x)
            assert found.dtype == torch.bfloat16
            assert rms_error(found, wanted) <= 1.2 * rms_error(block.fuse(False)(x), wanted)
    convolutions = 5 * (1 + (unit == "bottleneck"))
    assert packs == ["library" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""] * convolutions


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
@pytest.mark.parametrize("unit", UNITS)
def test_winograd_packs_its_own_form_beside(unit, packs, monkeypatch):
    block, x = tn.prepack(_block(unit, width=32)), torch.randn(4, 24, 16, 16)
    assert _same(block, x)
    with monkeypatch.context() as patch:
        patch.setitem(winograd._state, "on", True)
        patch.setattr(winograd, "ALONE", dict.fromkeys(winograd.ALONE, 1))
        for _ in range(2):
            assert _same(block, x)
    first = 5 * (1 + (unit == "bottleneck"))
    assert set(packs[:first]) == {"library"} and packs[first:].count("winograd") == 5
    assert len(packs) == 2 * first - (unit == "bottleneck") * 5  # its 1x1 convolutions are the library's either way
    assert _same(block, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autocast_casts_and_packs_once(mode, packs):
    """Weights in float32, calls in bfloat16: results as without, and a weight that is written is cast again."""
    block, x = tn.prepack(_block()), torch.randn(2, 24, 9, 11)
    plain = copy.deepcopy(block)
    for _ in range(2):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            found, wanted = block(x), plain(x)
        assert found.dtype == torch.bfloat16 and rms_error(found, wanted) <= PASS_RELATIVE[torch.bfloat16]
    assert len(packs) == 5
    with torch.no_grad():
        for same in (block, plain):
            same.layers[1].conv.weight.mul_(2)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(block(x), found)
        assert rms_error(block(x), plain(x)) <= PASS_RELATIVE[torch.bfloat16]
    assert len(packs) == 6
    with torch.autocast("cpu", torch.bfloat16):
        block(x).sum().backward()  # of the parameters themselves
    assert all(parameter.grad is not None for parameter in block.parameters())
    tn.prepack(block, False)
    gc.collect()
    assert not any(packing.forms_of(weight) for weight in block.parameters())
    assert {forms.weight().dtype for forms in packing._declared.values() if forms.weight() is not None} <= {
        torch.float32
    }


def _in_place(block):
    with torch.no_grad():
        block.layers[1].conv.weight.mul_(2)


def _optimizer(block):
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(block.parameters(), lr=0.1).step()


def _loaded(block):
    block.load_state_dict({k: v + 0.5 if v.is_floating_point() else v for k, v in block.state_dict().items()})


def _assigned(block):
    block.load_state_dict(
        {k: v * 1.5 if v.is_floating_point() else v for k, v in block.state_dict().items()}, assign=True
    )


def _statistics(block):
    block.layers[0].norm.running_mean.add_(1)


def _trained(block):
    block.train()(torch.randn(4, 24, 8, 8)).square().mean().backward()
    block.eval()


def _replaced(block):
    block.layers[2].norm = copy.deepcopy(block.layers[2].norm)
    block.layers[2].norm.running_var.mul_(3)


def _epsilon(block):
    block.layers[3].norm.eps = 0.5


def _data_and_again(block):
    block.layers[0].conv.weight.data.neg_()
    tn.prepack(block)


def _data_replaced(block):
    block.layers[0].conv.weight.data = block.layers[0].conv.weight.data * 2


CHANGES = (
    _data_replaced, _in_place, _optimizer, _loaded, _assigned, _statistics, _trained, _replaced, _epsilon,
    _data_and_again,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_is_seen(change):
    block, x = tn.prepack(_block()), torch.randn(2, 24, 8, 8)
    with torch.no_grad():
        before = block(x)
    change(block)
    assert _same(block, x)
    with torch.no_grad():
        assert largest_error(block(x), before) > 1e-3


def test_another_dtype_packs_again():
    block, x = tn.prepack(_block("bottleneck")), torch.randn(2, 24, 8, 8)
    with torch.no_grad():
        wanted = block(x)
        found = block.double()(x.double())
    assert found.dtype == torch.float64 and largest_error(found, wanted) <= RELATIVE[torch.float32]
    assert _same(block, x.double(), RELATIVE[torch.float64])


def test_training_is_as_before():
    plain, block = _block("bottleneck"), tn.prepack(_block("bottleneck"))
    x = torch.randn(3, 24, 8, 8)
    with torch.no_grad():
        block(x)
    for one in (plain, block):
        one.train()
        one(x).square().mean().backward()
    for a, b in zip(plain.parameters(), block.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_network_compiled_and_cast():
    torch.manual_seed(0)
    network = tn.create_model("thresholdnet_ab", num_classes=5, width_mult=0.25, fused=True, backend="native").eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        wanted = network(x)
        tn.prepack(network)
        assert largest_error(network(x), wanted) <= RELATIVE[torch.float32]
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert largest_error(compiled(x), wanted) <= RELATIVE[torch.float32]
        with torch.autocast("cpu", torch.bfloat16):
            cast = network(x)
            assert rms_error(cast, tn.prepack(network, False)(x)) <= PASS_RELATIVE[torch.bfloat16]
    with torch.inference_mode():
        assert largest_error(tn.prepack(network)(x), wanted) <= RELATIVE[torch.float32]
    with torch.no_grad():  # what inference mode made serves here, too
        assert largest_error(network(x), wanted) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad))
@pytest.mark.parametrize("fused", (True, False))
def test_weights_that_an_optimizer_has_written(optimizer, fused):
    """torch's fused optimizers write weights without counting it."""
    torch.manual_seed(0)
    block = ThresholdBlock(8, links.dense(3), 8, unit="bottleneck", fused=True, backend="native")
    x, untouched = torch.randn(2, 8, 6, 6), torch.nn.Linear(2, 2)
    tn.prepack(block)
    steps = optimizer(block.parameters(), lr=0.1, fused=fused)
    other = optimizer(untouched.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            block.eval()(x)
        block.train()(x).square().mean().backward()
        untouched(torch.ones(2)).sum().backward()
        steps.step()
        with torch.no_grad():
            found = block.eval()(x)
            wanted = tn.prepack(tn.prepack(block, False))(x)
        assert largest_error(found, wanted) <= RELATIVE[torch.float32]
        forms = {number: dict(known._made) for number, known in packing._declared.items()}
        other.step()
        assert forms == {number: dict(known._made) for number, known in packing._declared.items()}


def test_models_made_in_inference_mode():
    """Whose tensors count no writes."""
    with torch.inference_mode():
        block = ThresholdBlock(8, links.dense(3), 8, fused=True, backend="native")
    with pytest.raises(ValueError, match=r"made outside torch\.inference_mode to be"):
        tn.prepack(block)
    block = ThresholdBlock(8, links.dense(3), 8, fused=True, backend="native").eval()
    with torch.inference_mode():
        for norm in (module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.running_mean = norm.running_mean.clone()
        tn.prepack(block)
        x = torch.randn(2, 8, 6, 6)
        before = block(x)
        for norm in (module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.running_mean += 1
        after = block(x)
        assert not torch.equal(before, after)
        assert largest_error(after, tn.prepack(block, False)(x)) <= RELATIVE[torch.float32]


def test_a_converted_network(packs):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(8, (2, 3), 16, num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        found = tn.prepack(tn.convert(model, report=None))(x)
    assert largest_error(found, wanted) <= RELATIVE[torch.float32]
    assert packs.count("library") == 2 * (2 + 3)


def test_copies_are_plain_and_nothing_outlives_the_model():
    gc.collect()
    others = len(packing._declared)
    block, x = tn.prepack(_block()), torch.randn(1, 24, 4, 4)
    assert len(packing._declared) == others + 5
    with torch.no_grad():
        wanted = block(x)
        assert torch.equal(pickle.loads(pickle.dumps(block))(x), copy.deepcopy(block)(x))
        assert largest_error(copy.deepcopy(block)(x), wanted) <= RELATIVE[torch.float32]
    assert len(packing._declared) == others + 5
    weight = block.layers[0].conv.weight
    assert tn.prepack(block, False) is block and packing.forms_of(weight) is None
    assert len(packing._declared) == others
    tn.prepack(block)
    del block, weight
    gc.collect()
    assert len(packing._declared) == others


def test_a_weight_that_outlives_the_module(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    block = tn.prepack(_block())
    monkeypatch.setattr(packing, "_declared", None)  # as at the end of the interpreter
    del block
    gc.collect()
    assert not said


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model must be a torch.nn.Module, got int"),
        (
            nn.Conv2d(1, 1, 1),
            ValueError,
            "model must have fused blocks, got none in Conv2d: fused=True or tn.convert makes them",
        ),
        (
            ThresholdBlock(4, links.dense(1), 4, fused=True, device="meta"),
            ValueError,
            "model must lie on a CPU to be prepacked, got weights on meta",
        ),
    ],
)
def test_bad_input(model, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tn.prepack(model)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [(2, 9, 11), (1, 1, 1), (32, 6, 6)])
def test_a_model_that_is_gone_leaves_nothing(unit, size, memory_format):
    """A weight that is its own packed form, as a 1x1 convolution's without a BatchNorm to fold, kept itself alive."""
    gc.collect()
    before = list(packing._declared)
    block = tn.prepack(_block(unit).to(memory_format=memory_format))
    block(torch.randn(size[0], 24, *size[1:]))
    gone = [weakref.ref(parameter) for parameter in block.parameters()]
    del block
    gc.collect()
    assert not before and not packing._declared
    assert all(reference() is None for reference in gone)
