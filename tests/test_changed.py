"""What people do to the modules inside a fused block, before and after: it computes what they say, fused or not."""

import copy
import pickle

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links

torchvision = pytest.importorskip("torchvision")


class LoRA(nn.Conv2d):
    """A convolution with a branch of its own, which starts as zero."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.down = nn.Parameter(torch.randn(2, self.in_channels, *self.kernel_size, dtype=self.weight.dtype))
        self.up = nn.Parameter(torch.zeros(self.out_channels, 2, 1, 1, dtype=self.weight.dtype))

    def forward(self, x):
        branch = nn.functional.conv2d(x, self.down, stride=self.stride, padding=self.padding)
        return super().forward(x) + nn.functional.conv2d(branch, self.up)


class Wrapped(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return 3 * self.inside(x)


class GhostNorm(nn.BatchNorm2d):
    """Differs in training alone."""

    def forward(self, x):
        return torch.cat([super(GhostNorm, self).forward(part) for part in x.split(2 if self.training else len(x))])


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


def densenet():
    torch.manual_seed(0)
    return torchvision.models.DenseNet(4, (2, 2), 8, 2, num_classes=5).double()


def filled(model):
    """Statistics and affines away from where BatchNorms start."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model


def own_block(unit, **options):
    torch.manual_seed(0)
    return ThresholdBlock(8, links.dense(3), 4, unit=unit, fused=True, backend="native", dtype=torch.float64, **options)


BLOCKS = {
    "own bottleneck": lambda: own_block("bottleneck"),
    "own conv_bn_relu": lambda: own_block("conv_bn_relu"),
    "converted": lambda: tn.convert(densenet().features.denseblock1, report=None),
}


def convolution(block):
    """(the module around it, its name, the last convolution)"""
    path = [name for name, module in block.named_modules() if isinstance(module, nn.Conv2d)][-1]
    around, _, name = path.rpartition(".")
    return block.get_submodule(around), name, block.get_submodule(path)


def norm_of(block):
    path = [name for name, module in block.named_modules() if isinstance(module, nn.BatchNorm2d)][-1]
    around, _, name = path.rpartition(".")
    return block.get_submodule(around), name, block.get_submodule(path)


def put_convolution(kind=nn.Conv2d, **options):
    def change(block):
        around, name, old = convolution(block)
        new = kind(old.in_channels, old.out_channels, old.kernel_size, 1, old.padding, **{"bias": False} | options)
        new.double().load_state_dict(old.state_dict(), strict=False)
        setattr(around, name, new)

    return change


def activations(block):
    for module in list(block.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(0.2))


def lora(block):
    put_convolution(LoRA)(block)
    convolution(block)[2].up.data.fill_(0.5)


def dilation(block):
    conv = convolution(block)[2]
    conv.dilation, conv.padding = (2, 2), (2, 2)


def padding_mode(block):
    put_convolution(padding_mode="reflect")(block)


def patched(block):
    conv = convolution(block)[2]
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


def wrapped(block):
    around, name, conv = convolution(block)
    setattr(around, name, Wrapped(conv))


def wrapped_first(block):
    path = next(name for name, module in block.named_modules() if isinstance(module, nn.Conv2d))
    block.set_submodule(path, Wrapped(block.get_submodule(path)))


def put_norm(make):
    def change(block):
        around, name, old = norm_of(block)
        setattr(around, name, make(old.num_features).double())

    return change


def pruned(block):
    conv = convolution(block)[2]
    prune.l1_unstructured(conv, "weight", 0.5)
    conv.weight_orig.data *= 3  # `weight` is made of it when the module is called


CHANGES = {
    "leaky": activations, "bias": put_convolution(bias=True), "dilation": dilation, "padding": padding_mode,
    "patched": patched, "wrapped": wrapped, "first": wrapped_first, "lora": lora, "ghost": put_norm(GhostNorm),
    "group norm": put_norm(lambda width: nn.GroupNorm(2, width)), "identity": put_norm(lambda width: nn.Identity()),
    "pruned": pruned,
}  # fmt: skip


def plain_of(block):
    """The same modules in plain torch."""
    return block.fuse(False) if isinstance(block, ThresholdBlock) else tn.to_reference(block)


def step(block, x):
    own = x.clone().requires_grad_()
    block.zero_grad()
    y = block(own)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    named = [*block.named_parameters(), *block.named_buffers()]
    return {"y": y.detach(), "x": own.grad} | {
        name: (tensor.grad if isinstance(tensor, nn.Parameter) else tensor).clone()
        for name, tensor in named
        if not isinstance(tensor, nn.Parameter) or tensor.grad is not None
    }


def assert_steps_equal(found, expected):
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        if tensor.abs().max() < 1e-12 * largest:  # truly 0, as of a bias in front of a BatchNorm: mere rounding
            assert found[name].abs().max() < 1e-12 * largest, name
            continue
        assert_close(found[name].double(), tensor.double(), torch.float64, name)


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_changed_block_computes_what_its_modules_say(kind, change, training):
    torch.manual_seed(2)
    block, x = filled(BLOCKS[kind]()).train(training), torch.randn(3, 8, 6, 7, dtype=torch.float64)
    block(x)
    assert block.backend == "native"
    if kind == "own conv_bn_relu" and change == "identity":
        pytest.skip("an own convolution's BatchNorm that is gone leaves no name in the state")
    torch.manual_seed(3)
    CHANGES[change](block)
    if change in ("pruned", "patched"):  # which refuses to be copied, or would still call the original
        found = block.eval()(x).detach()
        assert_close(found, plain_of(block)(x).detach(), torch.float64)
        return
    twin = plain_of(copy.deepcopy(block))
    found, expected = step(block, x), step(twin, x)
    assert block.backend == ("native" if change == "bias" else "reference")
    assert_steps_equal(found, expected)


@pytest.mark.parametrize("before", (True, False), ids=("compiled before", "compiled after"))
@pytest.mark.parametrize("change", ("leaky", "bias", "wrapped", "lora"))
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_changed_block_is_compiled_as_its_modules_say(kind, change, before):
    """No call in between: the compiler asks for the forms, and again where a module has become another."""
    torch.compiler.reset()
    block, x = filled(BLOCKS[kind]()).eval(), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    if before:
        compiled(x)
    CHANGES[change](block)
    assert_close(compiled(x).detach(), plain_of(copy.deepcopy(block))(x).detach(), torch.float64)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_fused_again_when_the_change_is_undone(kind):
    block, x = BLOCKS[kind](), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    around, name, conv = convolution(block)
    for wrong, backend in ((Wrapped(conv), "reference"), (conv, "native")):
        setattr(around, name, wrong)
        block(x)
        assert block.backend == backend
    handle = conv.register_forward_hook(lambda *given: None)
    block(x)
    assert block.backend == "reference"
    handle.remove()
    for same in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        same(x)
        assert same.backend == "native"


@pytest.mark.parametrize("kind", BLOCKS)
def test_equal_modules_in_their_places_are_fused(kind):
    block, x = filled(BLOCKS[kind]()), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    put_convolution()(block)
    put_norm(nn.BatchNorm2d)(block)
    twin = plain_of(copy.deepcopy(block))
    assert_steps_equal(step(block, x), step(twin, x))
    assert block.backend == "native"


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_parametrization_runs_once_a_forward(kind):
    """Of spectral_norm a second run would be another power iteration."""
    block, x = BLOCKS[kind](), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    for conv in [module for module in block.modules() if isinstance(module, nn.Conv2d)]:
        parametrizations.spectral_norm(conv)
    twin = plain_of(copy.deepcopy(block))
    assert_steps_equal(step(block, x), step(twin, x))
    assert block.backend == "native"


@pytest.mark.parametrize("kind", ("own bottleneck", "converted"))
def test_dropout_that_is_switched_by_its_layer(kind):
    """Its rate set to 0, or its mode alone changed, as for Monte Carlo dropout."""
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    if kind == "own bottleneck":
        block = own_block("bottleneck", drop_rate=0.5)
        drops = [layer.drop for layer in block.layers]
        name = "p"
    else:
        model = torchvision.models.DenseNet(4, (2, 2), 8, 2, drop_rate=0.5).double()
        block = tn.convert(model.features.denseblock1, report=None)
        drops, name = [block.denselayer1, block.denselayer2], "drop_rate"
    block(x)
    assert block.backend == "native"
    block.eval()
    for drop in drops:
        drop.training = True
    assert not torch.equal(block(x), block(x))
    block.train()
    for drop in drops:
        setattr(drop, name, 0.0)
    assert torch.equal(block(x), block(x))


def blocks_fused(model):
    lines = []
    tn.convert(model, report=lines.append)
    return [line for line in lines if line.startswith("fused") and "transitions" not in line], lines


@pytest.mark.parametrize(
    ("make", "reason"), ((put_convolution(LoRA), "LoRA with a forward of its own"), (put_norm(GhostNorm), "GhostNorm"))
)
def test_classes_with_a_forward_of_their_own_are_left(make, reason):
    model = densenet()
    make(model.features.denseblock1)
    fused, lines = blocks_fused(model)
    assert len(fused) == 1 and any(reason in line for line in lines)


class Scaled(torchvision.models.densenet._DenseBlock):
    """Whose scale does nothing while the last convolution is zero."""

    def forward(self, features):
        y = super().forward(features)
        return torch.cat([y[:, :8], 2 * y[:, 8:]], 1)


class Dropping(torchvision.models.densenet._DenseBlock):
    def forward(self, features):
        return nn.functional.dropout(super().forward(features), 0.5, self.training)


class Counting(torchvision.models.densenet._DenseBlock):
    """Scales in training alone."""

    def forward(self, features):
        return super().forward(features) * (2 if self.training else 1)


@pytest.mark.parametrize("kind", (Scaled, Dropping, Counting))
def test_what_todays_weights_or_eval_mode_hide_is_seen(kind):
    model = densenet()
    block = model.features.denseblock1
    block.__class__ = kind
    for layer in block.values():
        nn.init.zeros_(layer.conv2.weight)
    state = torch.get_rng_state()
    fused, lines = blocks_fused(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(fused) == 1 and sum(line.startswith("left") for line in lines) == 1, lines


def test_transitions_of_other_classes_run_as_they_are():
    model = filled(densenet())
    for name in ("norm0", "norm5"):
        old = model.features.get_submodule(name)
        model.features.set_submodule(name, ScaledNorm(old.num_features).double())
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tn.convert(model, report=None)
    for each in (model, plain):
        conv = each.features.transition1.conv
        conv.forward = lambda x, conv=conv: 5 * nn.Conv2d.forward(conv, x)
    assert_close(model(x).detach(), plain(x).detach(), torch.float64)


@pytest.mark.parametrize("fused", (True, False))
def test_fx_traces_plain_operations(fused):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = densenet().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model.features.denseblock1.denselayer2.conv2
    with torch.no_grad():
        wanted = {}
        handle = expected.register_forward_hook(lambda module, given, out: wanted.update(out=out))
        model(x)
        handle.remove()
        if fused:
            tn.convert(model, report=None)
        found = create_feature_extractor(model, ["features.denseblock1.denselayer2.conv2"])(x)
    assert_close(next(iter(found.values())), wanted["out"], torch.float64)
    own = tn.create_model("thresholdnet_ab", num_classes=3, width_mult=0.25, fused=fused).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.fx.symbolic_trace(own)(x), own(x), torch.float64)
