"""Blocks in layouts that no rule knows, recognised by what they do: the same results, and what must be left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from foreign import (
    Aggregation,
    DropsByRate,
    HarDBlock,
    HarDUnit,
    InOneRow,
    NewFirst,
    PlainLayer,
    PowersOfTwoBack,
    ResidualActivated,
    ResidualDense,
    ResidualFused,
    Stage,
    dense_row,
)
from test_convert import assert_equal_in_all, blocks, kept_bytes, quiet, randomise
from torch import nn

import thresholdnet as tn
from thresholdnet.dataflow import flow_of
from thresholdnet.layers import Unlike
from thresholdnet.links import dense, harmonic
from thresholdnet.recognise import by_rules, by_running

F64 = torch.float64

FOREIGN = {
    "new first": lambda: dense_row(NewFirst, 12, 5, 4),
    "in one row": lambda: dense_row(InOneRow, 12, 5, 4),
    "one activation": lambda: dense_row(DropsByRate, 12, 5, 4),
    "sparse bottlenecks": lambda: PowersOfTwoBack(12, 5, 6),
    "sparse layers": lambda: PowersOfTwoBack(12, 5, 6, bottleneck=False),
    "one layer": lambda: NewFirst(12, 5),
    "no bottlenecks": lambda: dense_row(PlainLayer, 12, 5, 4),
    "a transition in front": lambda: Stage(6, 5, 3),
    "no bottlenecks behind a transition": lambda: Stage(6, 5, 3, PlainLayer),
    "a layer and a pooling behind": lambda: HarDUnit(12, 6, 1.7, 8),
    "residual": lambda: ResidualDense(12, 5),
    "residual, one layer behind": lambda: ResidualFused(12, 5, 3),
    "residual, a layer and a function behind": lambda: ResidualActivated(12, 5, 3),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_layout_that_no_rule_knows(name):
    torch.manual_seed(0)
    original = nn.Sequential(FOREIGN[name](), nn.AvgPool2d(2))
    assert by_rules(original[0]) is None
    original = randomise(original).double()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 1 and type(converted[0].original()) is type(original[0])
    assert_equal_in_all(converted, original, torch.randn(3, 12, 6, 7, dtype=F64))
    twin = pickle.loads(pickle.dumps(converted))
    x = torch.randn(1, 12, 6, 7, dtype=F64)
    assert torch.equal(twin.eval()(x), converted.eval()(x)) and twin[0].backend == "native"


def test_links_and_outputs_are_those_of_the_forward():
    block = quiet(dense_row(NewFirst, 12, 5, 3))
    assert block.links == ((0,), (1, 0), (2, 1, 0)) and block.plan.outputs == (3, 2, 1, 0)
    block = quiet(dense_row(InOneRow, 12, 5, 3))
    assert block.links == dense(3) and block.plan.outputs == (0, 1, 2, 3) and block.plan.bottleneck_widths == (20,) * 3
    block = quiet(PowersOfTwoBack(12, 5, 6, bottleneck=False))
    assert block.links == tuple(tuple(PowersOfTwoBack.sources(i)) for i in range(1, 7))
    assert block.plan.outputs == (2, 3, 4, 5, 6, 0) and block.activation == "relu6"


def test_running_finds_what_the_rules_find():
    """The two ways are held against each other."""
    for module in (
        torchvision.models.DenseNet(8, (4,), 12, drop_rate=0.25).features.denseblock1,
        HarDBlock(12, 8, 1.6, 8),
        HarDBlock(12, 8, 1.6, 8, keep_base=True),
    ):
        by_name, by_flow = by_rules(module), by_running(module)
        assert (by_name.plan, by_name.units, by_name.activation) == (by_flow.plan, by_flow.units, by_flow.activation)
        assert (by_name.drop_rate, by_name.drop_channels) == (by_flow.drop_rate, by_flow.drop_channels)
    assert by_running(HarDBlock(12, 8, 1.6, 8)).plan.links == harmonic(8)
    assert by_running(Aggregation(12, 8, 12, 5, True)) is None  # its end is no join


def test_what_runs_around_the_layers():
    stage = quiet(Stage(6, 5, 3))
    assert (stage.in_channels, stage.plan.in_channels, stage.out_channels) == (12, 6, 21)
    assert stage._found.before == ("trans.0", "trans.1", "trans.2", "trans.3") and stage.links == dense(3)
    with pytest.raises(ValueError, match="input of the block must have 12 channels, got 6"):
        stage(torch.randn(2, 6, 4, 4))
    unit = quiet(HarDUnit(12, 6, 1.7, 8))
    assert (unit.in_channels, unit.out_channels, unit.links) == (12, 18, harmonic(8))
    assert unit._found.tail == "conv.conv" and unit._found.behind == ("conv.norm", "conv.relu", "downsample")
    assert not unit.takes_tail and not stage.takes_tail
    # where a module inside is the block, it alone is one
    for around in (
        nn.Sequential(nn.MaxPool2d(2), dense_row(InOneRow, 12, 5, 3)),
        nn.Sequential(HarDUnit(12, 6, 1.7, 4)),
    ):
        model = quiet(nn.Sequential(around, nn.AvgPool2d(2)))
        assert [name for name, module in model.named_modules() if module in blocks(model)] in (["0.1"], ["0.0"])


def test_memory_is_that_of_a_block():
    """One block keeps each feature once, whichever end it grows at; layer by layer each join would be kept."""
    x = torch.randn(2, 24, 28, 28).contiguous(memory_format=torch.channels_last)
    for layer in (NewFirst, InOneRow, PlainLayer):
        original = dense_row(layer, 24, 12, 12)
        whole = kept_bytes(quiet(copy.deepcopy(original)), x) / kept_bytes(original, x)
        each = nn.Sequential(*(quiet(copy.deepcopy(child)) for child in original))
        assert whole < 0.3 < kept_bytes(each, x) / kept_bytes(original, x)


@pytest.mark.parametrize("layer", [InOneRow, DropsByRate, PlainLayer])
def test_dropout(layer):
    block = quiet(dense_row(layer, 12, 5, 3, **{"droprate" if layer is DropsByRate else "drop": 0.5})).train()
    assert block.drop_rate == 0.5
    features = block(torch.randn(4, 12, 6, 6))[:, 12:]
    assert block.backend == "native" and 0.3 < (features == 0).float().mean() < 0.7
    block.eval()
    assert (block(torch.randn(4, 12, 6, 6)) != 0).float().mean() > 0.9 and block.backend == "native"


def test_whole_channels_are_dropped():
    row = dense_row(PlainLayer, 12, 5, 3)
    for layer in row:
        layer.drop = nn.Dropout2d(0.5)
    block = quiet(row).train()
    features = block(torch.randn(16, 12, 4, 4, requires_grad=True))[:, 12:]
    assert block.backend == "native" and block.drop_rate == 0.5
    dropped = (features == 0).float().mean((2, 3))
    assert set(dropped.unique().tolist()) == {0, 1} and 0.3 < dropped.mean() < 0.7
    features.sum().backward()
    assert not (block.eval()(torch.randn(16, 12, 4, 4)) == 0).any()


def test_a_rate_that_changes_is_seen():
    block = quiet(dense_row(DropsByRate, 12, 5, 3)).train()
    x = torch.randn(4, 12, 6, 6)
    block(x)
    assert block.backend == "native"
    for layer in block.children():
        layer.droprate = 0.5
    assert (block(x) == 0).float().mean() > 0.2 and block.backend == "reference"
    assert quiet(block.original()).drop_rate == 0.5  # converted anew


def test_what_changes_later_runs_as_it_is():
    x = torch.randn(2, 12, 6, 6)
    for change in (
        lambda block: setattr(block[1], "conv2", nn.Conv2d(20, 5, 3, padding=2, dilation=2, bias=False)),
        lambda block: setattr(block[1], "bn2", nn.Identity()),
        lambda block: block[1].bn1.register_forward_hook(lambda *_: None),
        lambda block: setattr(block[1], "forward", lambda y: torch.cat([y[:, :5] * 0, y], 1)),
    ):
        block = quiet(dense_row(NewFirst, 12, 5, 3)).eval()
        before = block(x)
        assert block.backend == "native"
        change(block)
        after = block(x)
        assert block.backend == "reference"
        torch.testing.assert_close(after, block.original()(x))
        assert after.shape == before.shape
    block = quiet(dense_row(NewFirst, 12, 5, 3)).eval()
    block[1].conv2 = nn.Conv2d(20, 5, 3, padding=1, bias=False)  # of the same form
    after = block(x)
    assert block.backend == "native"
    torch.testing.assert_close(after, block.original()(x))


class Gate(nn.Module):
    """A dense layer that scales what it made by its mean, as squeeze-and-excitation does."""

    def __init__(self):
        super().__init__()
        self.row = InOneRow(12, 5).bottle_neck

    def forward(self, x):
        made = self.row(x)
        return torch.cat([x, made * made.mean((2, 3), keepdim=True).sigmoid()], 1)


class Twice(nn.Module):
    """One layer's modules in two places."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        first = F.relu(self.bn(self.conv(x)))
        return torch.cat([first, F.relu(self.bn(self.conv(first)))], 1)


class Joined(nn.Module):
    """Conv-BN-ReLU behind a join along another dimension, or of a slice."""

    def __init__(self, of):
        super().__init__()
        self.conv, self.bn, self.of = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), of
        self.second, self.norm = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        first = F.relu(self.bn(self.conv(x)))
        if self.of == "rows":
            return torch.cat([first, F.relu(self.bn(self.conv(first)))], 2)
        if self.of == "slice":
            return torch.cat([first[:, :4], x], 1)
        if self.of == "in place":
            read = torch.cat([first, x], 1)
            made = F.relu(self.norm(self.second(read)))
            return torch.cat([first.mul_(2), made], 1)
        if self.of == "steep":
            return torch.cat([x, F.leaky_relu(self.bn(self.conv(x)), 1.5)], 1)
        if self.of == "smooth":
            return torch.cat([x, F.silu(self.bn(self.conv(x)))], 1)
        return torch.cat([x, F.hardtanh(self.bn(self.conv(x)), -1, 6)], 1)


@pytest.mark.parametrize(
    "make",
    [
        Gate, Twice, *(lambda of=of: Joined(of) for of in ("rows", "slice", "in place", "steep", "smooth", "clamped")),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: torchvision.models.resnet18().layer1,
        lambda: torchvision.models.googlenet(init_weights=False).inception3a,
    ],
)  # fmt: skip
def test_what_does_something_else_is_left(make):
    torch.manual_seed(0)
    original = randomise(nn.ModuleList([make()])).double().eval()[0]
    converted = quiet(copy.deepcopy(original))
    assert not blocks(converted)
    first = next(module for module in original.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(2, first.in_channels, 6, 6, dtype=F64)
    assert torch.equal(converted(x), original(x))


def test_residual_dense_blocks():
    """Layers without BatchNorm, as super-resolution has them: what is kept is every feature once."""
    block = quiet(ResidualDense(12, 5))
    assert block.plan.unit == "conv_relu" and block.activation == "leaky_relu(0.2)" and block._found.residual == 0.2
    assert block.links == dense(4) and block.plan.outputs == (0, 1, 2, 3, 4) and block._found.behind == ("conv5",)
    assert block.out_channels == 12
    block = quiet(ResidualFused(12, 5, 3))
    assert block.links == dense(3) and block.activation == "relu" and block._found.residual == 1
    x = torch.randn(2, 32, 28, 28).contiguous(memory_format=torch.channels_last)
    for original in (ResidualDense(32, 16), ResidualFused(32, 16, 6)):
        assert kept_bytes(quiet(copy.deepcopy(original)), x) < 0.35 * kept_bytes(original, x)


def test_residuals_that_are_no_sum_of_the_input_and_the_layers():
    """Twice the input, a difference, and a sum with what another convolution made of it."""
    x = torch.randn(2, 12, 6, 7)
    for name, end in {
        "both": lambda block, x, y: x + x,
        "less": lambda block, x, y: torch.add(y, x, alpha=-1),
        "other": lambda block, x, y: y + block.conv1(x)[:, :1],
        "scaled input": lambda block, x, y: y + x * 0.5,
    }.items():
        original = nn.ModuleList([type("Other", (ResidualDense,), {"end": end})(12, 5)])
        converted = quiet(copy.deepcopy(original))
        assert not blocks(converted), name
        assert torch.equal(converted[0](x), original[0](x))


def test_arguments_beside_the_pixels_call_the_original():
    """One that has a default is not needed to run; who gives it gets what the forward makes of it."""

    class Scaled(ResidualFused):
        def forward(self, x, factor=1.0, *rest, shift=0.0):
            return super().forward(x) * factor + shift

    original = nn.Sequential(Scaled(12, 5, 3))
    converted, x = quiet(copy.deepcopy(original)), torch.randn(2, 12, 6, 7)
    assert not blocks(converted)  # it scales

    class Masked(ResidualFused):
        def forward(self, x, mask=None, *rest, shift=None):
            y = super().forward(x if mask is None else x * mask)
            return y if shift is None else y + shift

    original = nn.Sequential(Masked(12, 5, 3))
    converted, mask = quiet(copy.deepcopy(original)), torch.rand(2, 1, 6, 7)
    (block,) = blocks(converted)
    torch.testing.assert_close(converted(x), original(x))
    assert block.backend == "native"
    assert torch.equal(block(x, mask), original[0](x, mask)) and block.backend == "reference"
    assert torch.equal(block(x, shift=2.0), original[0](x, shift=2.0))
    torch.testing.assert_close(torch.compile(converted, backend="eager", fullgraph=True)(x), original(x))


@pytest.mark.parametrize("name", ["two inputs", "tail"])
def test_forwards_that_want_more_are_left(name):
    class Two(ResidualFused):
        def forward(self, x, y):
            return super().forward(x) + y

    class Tail(ResidualFused):
        def forward(self, x, tail=None):
            return super().forward(x)

    assert not blocks(quiet(nn.ModuleList([{"two inputs": Two, "tail": Tail}[name](12, 5, 3)])))


def test_a_slope_that_changes_is_seen():
    x = torch.randn(2, 12, 6, 7)
    block = quiet(ResidualDense(12, 5))
    block(x)
    assert block.backend == "native"
    block.act.negative_slope = 0.3
    after = block(x)
    assert block.backend == "reference"
    assert torch.equal(after, block.original()(x))


def test_dropout_behind_an_activation_is_left():
    block = PowersOfTwoBack(12, 5, 3, bottleneck=False)
    for unit in block.units:
        unit.add_module("drop", nn.Dropout(0.5))
    lines = []
    assert not blocks(tn.convert(nn.ModuleList([block]), report=lines.append))
    assert lines[0] == "left 0: its layers drop something behind their activation"


@pytest.mark.parametrize("layer", [InOneRow, DropsByRate])
def test_what_a_layer_with_dropout_does_in_training_is_checked(layer):
    class Louder(layer):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([y[:, : x.shape[1]], y[:, x.shape[1] :] * (1 + self.training)], 1) if self.training else y

    row, lines = dense_row(Louder, 12, 5, 2, **{"droprate" if layer is DropsByRate else "drop": 0.5}), []
    assert not blocks(tn.convert(nn.ModuleList([row]), report=lines.append))
    assert "computes something else than its structure says, in training" in lines[0]


def test_why_a_block_was_left_is_said_once():
    strided = dense_row(InOneRow, 12, 5, 3)
    strided[1].bottle_neck[5] = nn.Conv2d(20, 5, 3, padding=1, groups=5, bias=False)
    model, lines = nn.Sequential(Twice(), nn.Sequential(strided)), []
    tn.convert(model, report=lines.append)
    assert lines[0] == "left 0: a module runs in it more than once"
    assert lines[1] == "left 1: 0.1.bottle_neck.5 must be a 3x3 convolution of stride 1, padding 1, one group"
    assert lines[2:] == [f"fused 1.0.{i}: dense block, 1 layers, 1 links" for i in (0, 2)] + [
        "fused 1.0: transitions between its blocks"
    ]


def test_names_of_a_rule_with_another_meaning():
    """norm1 to conv2, but the dropout has a name: no rule's, and still a block."""
    row = nn.ModuleDict(torchvision.models.DenseNet(8, (3,), 12).features.denseblock1.items())

    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in row.items():
                layer.extra = nn.Dropout(0.0)
                self.add_module(name, layer)

        def forward(self, x):
            features = [x]
            for layer in self.children():
                y = torch.cat(features, 1)
                y = layer.conv2(layer.relu2(layer.norm2(layer.conv1(layer.relu1(layer.norm1(y))))))
                features.append(layer.extra(y))
            return torch.cat(features, 1)

    with pytest.raises(Unlike, match="denselayer1 has a module 'extra' of its own"):
        by_rules(Row())
    assert quiet(nn.ModuleList([Row()]))[0].links == dense(3)


class NamedAsTorchvisions(nn.Module):
    """Layers with torchvision's names in a Sequential, but what a layer made stands in front."""

    def __init__(self, read, k):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(read), nn.Conv2d(read, 2 * k, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * k), nn.Conv2d(2 * k, k, 3, padding=1, bias=False)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([self.conv2(self.relu2(self.norm2(y))), x], 1)


def test_a_block_of_a_rule_that_does_something_else_is_run():
    """The rule names what its modules are called; what the check refuses may be a block all the same."""
    torch.manual_seed(0)
    original = randomise(nn.Sequential(dense_row(NamedAsTorchvisions, 12, 5, 3), nn.AvgPool2d(2))).double()
    assert by_rules(original[0]).plan.outputs == (0, 1, 2, 3)
    converted = quiet(copy.deepcopy(original))
    assert [block.plan.outputs for block in blocks(converted)] == [(3, 2, 1, 0)]
    assert_equal_in_all(converted, original, torch.randn(3, 12, 6, 7, dtype=F64))


def test_running_a_module_changes_nothing():
    """It runs once, in eval mode, without gradients, and whatever it raises is its own affair."""
    seen = []

    class Watched(InOneRow):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), x.shape[1]))
            return super().forward(x)

    block = nn.Sequential(Watched(12, 5), Watched(17, 5)).train()
    state = copy.deepcopy(block.state_dict())
    assert by_running(block).plan.links == dense(2)
    assert seen == [(False, False, 12), (False, False, 17)]
    assert all(module.training for module in block.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), block.state_dict().values(), strict=True))

    class Two(InOneRow):
        def forward(self, x, other):
            return super().forward(x + other)

    class Perhaps(InOneRow):
        def forward(self, x, other=None):
            return super().forward(x if other is None else x + other)

    assert by_running(Two(12, 5)) is None and by_running(Perhaps(12, 5)) is not None

    class Pruning(InOneRow):
        def forward(self, x):
            self.bottle_neck[2].weight.data.zero_()
            return super().forward(x)

    pruned = Pruning(12, 5)
    assert by_running(pruned) is not None and pruned.bottle_neck[2].weight.any()
    hooked = dense_row(InOneRow, 12, 5, 2)
    hooked[0].bottle_neck.register_forward_hook(lambda *_: pytest.fail("ran"))
    assert by_running(hooked) is None
    assert by_running(nn.Linear(3, 3)) is None and by_running(nn.Sequential()) is None
    patched = dense_row(InOneRow, 12, 5, 2)
    patched[0].forward = patched[0].forward
    with pytest.raises(Unlike, match="0 has had its forward replaced"):
        by_running(patched)


def test_meta_and_half_weights():
    with torch.device("meta"):
        assert by_running(dense_row(NewFirst, 12, 5, 3)).plan.outputs == (3, 2, 1, 0)
    assert by_running(dense_row(NewFirst, 12, 5, 3).bfloat16()).plan.outputs == (3, 2, 1, 0)


def test_a_flow():
    """Steps between the layers' own are none of a block's, and an input that is read by nobody is no layer."""
    block = PowersOfTwoBack(12, 5, 3).eval()
    flow = flow_of(block, torch.empty(1, 12, 4, 4, device="meta"))
    assert [layer.modules for layer in flow.layers] == [
        tuple(f"units.{i}.{name}" for name in ("bn1", "conv1", "bn2", "conv2")) for i in range(3)
    ]
    assert [layer.unit for layer in flow.layers] == ["bottleneck"] * 3 and flow.outputs == (2, 3, 0)
    assert flow_of(nn.Identity(), torch.empty(1, 12, 4, 4, device="meta")) is None


@pytest.mark.parametrize(
    "make",
    [lambda: dense_row(NewFirst, 12, 5, 3), lambda: Stage(6, 5, 3, PlainLayer), lambda: ResidualDense(12, 5)],
)
def test_compiled_exported_and_moved(make):
    model = quiet(randomise(nn.Sequential(make(), nn.ReLU()))).eval()
    x = torch.randn(2, 12, 6, 6)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tn.prepack(copy.deepcopy(model))(x), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.float32 if model[0]._found.residual else torch.bfloat16  # x itself is added
        assert model(x).dtype == wanted and model[0].backend == "native"
    assert model.double()(x.double()).dtype == F64 and model[0].backend == "native"
    assert not blocks(tn.to_reference(model))
