"""tn.convert: other people's models with the same state dict, outputs, gradients and statistics, and less kept."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torchvision
from foreign import Aggregation, Encoder, FCHarDNet, HarDBlock, HarDMSEG, HarDNet68, ThreshLayer, ThreshNet79
from released import threshnet_forward, threshnet_shapes
from torch import nn

import thresholdnet as tn
from thresholdnet.convert import ConvertedBlock

F64 = torch.float64


def quiet(model, **options):
    return tn.convert(model, report=None, **options)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, ConvertedBlock)]


def randomise(model):
    """Weights, statistics and eps away from their neutral starts."""
    torch.manual_seed(0)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        norm.eps = (1e-5, 1e-3)[i % 2]
    return model


def run(model, x, train):
    """Output, gradients of x and of all parameters."""
    model.train(train)
    x = x.clone().requires_grad_()
    y = model(x)
    cotangent = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [x, *model.parameters()])]


def assert_equal_in_all(converted, original, x):
    assert list(converted.state_dict()) == list(original.state_dict())
    for train in (False, True):
        results = [run(model, x, train) for model in (converted, original)]
        names = ["output", "x", *(name for name, _ in original.named_parameters())]
        largest = max(g.abs().max().item() for g in results[1][1:])
        for name, ours, theirs in zip(names, *results, strict=True):
            assert ours.shape == theirs.shape, name
            # a gradient that is 0 but for rounding is held against the largest of all
            limit = 1e-9 * max(theirs.abs().max().item(), 1e-3 * largest)
            assert (ours - theirs).abs().max().item() <= limit, name
    for (name, ours), theirs in zip(converted.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["densenet121", "densenet169", "densenet201", "densenet161"])
def test_torchvision_densenets(name):
    original = randomise(torchvision.models.get_model(name, num_classes=4)).double()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 4
    assert_equal_in_all(converted, original, torch.randn(2, 3, 64, 64, dtype=F64))


def test_torchvision_memory_efficient_densenet():
    settings = {"growth_rate": 8, "block_config": (3, 4), "num_init_features": 12, "bn_size": 2, "num_classes": 4}
    frugal = torchvision.models.DenseNet(**settings, memory_efficient=True)
    original = randomise(torchvision.models.DenseNet(**settings)).double()
    frugal.load_state_dict(original.state_dict())
    for norm, other in zip(frugal.modules(), original.modules(), strict=True):
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = other.eps
    converted = quiet(frugal.double(), recompute="bottleneck")
    # not against itself: its checkpoints update running statistics twice a step
    assert_equal_in_all(converted, original, torch.randn(2, 3, 40, 33, dtype=F64))


def test_timm_densenet():
    timm = pytest.importorskip("timm")
    original = randomise(timm.create_model("densenet121", num_classes=4)).double()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 4
    assert_equal_in_all(converted, original, torch.randn(2, 3, 64, 64, dtype=F64))


def test_timm_features():
    timm = pytest.importorskip("timm")
    original = randomise(timm.create_model("densenet121", features_only=True)).double().eval()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 4
    x = torch.randn(1, 3, 64, 64, dtype=F64)
    for ours, theirs in zip(converted(x), original(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_hardnet68_of_its_authors():
    original = randomise(HarDNet68()).double()
    converted = quiet(copy.deepcopy(original))
    assert [block.plan.num_layers for block in blocks(converted)] == [8, 16, 16, 16, 4]
    assert all(block.activation == "relu6" for block in blocks(converted))
    assert_equal_in_all(converted, original, torch.randn(3, 3, 64, 64, dtype=F64))


def test_threshnet79_of_its_authors():
    """Dense layers stand alone in its flat list, so each is fused by itself; harmonic blocks as HarDNet's."""
    original = randomise(ThreshNet79()).double()
    assert {k: tuple(v.shape) for k, v in original.state_dict().items()} == threshnet_shapes("thresholdnet_v1")
    converted = quiet(copy.deepcopy(original))
    assert [block.plan.num_layers for block in blocks(converted)] == [1] * 26 + [16, 4]
    x = torch.randn(2, 3, 64, 64, dtype=F64)
    assert_equal_in_all(converted, original, x)
    for norm in (m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 1e-5  # as in the network that is written out from the released keys
    expected = threshnet_forward("thresholdnet_v1", converted.state_dict(), x)
    torch.testing.assert_close(converted.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_a_list_of_dense_layers_is_no_block():
    """Nobody says what runs them, and in which order: a list has no forward."""
    model = nn.Module()
    model.layers = nn.ModuleList([ThreshLayer(12, 8), ThreshLayer(20, 8)])
    model.blocks = nn.ModuleDict(torchvision.models.DenseNet(8, (3,), 12).features.denseblock1.items())
    lines = []
    assert len(blocks(tn.convert(model, report=lines.append))) == 2
    assert [line.partition(":")[0] for line in lines] == ["fused layers.0", "fused layers.1"]


def test_a_dense_layer_keeps_its_place():
    """What else looks like one computes something else, and stays."""

    class Residual(ThreshLayer):
        def forward(self, x):
            return x + nn.Sequential.forward(self, x)

    lines = []
    model = nn.Sequential(ThreshLayer(8, 4), Residual(12, 12), nn.Sequential(*ThreshLayer(12, 4)))
    tn.convert(model, report=lines.append)
    assert [isinstance(child, ConvertedBlock) for child in model] == [True, False, False]
    assert lines[0] == "fused 0: dense layer, 1 layers, 1 links"
    assert lines[1] == "left 1: its forward must return a tensor of shape (2, 24, 6, 5), got (2, 12, 6, 5)"


def test_fc_hardnet():
    original = randomise(FCHarDNet()).double()
    converted = quiet(copy.deepcopy(original))
    assert [block.plan.num_layers for block in blocks(converted)] == [4, 4, 8, 8, 8, 8, 8, 4, 4]
    assert_equal_in_all(converted, original, torch.randn(2, 3, 70, 66, dtype=F64))


def test_hardnet_mseg():
    original = randomise(HarDMSEG()).double()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 5
    headless = nn.ModuleList(original.base[:-1]), nn.ModuleList(converted.base[:-1])
    for model, base in zip((original, converted), headless, strict=True):
        model.base = nn.ModuleList([*base, nn.Identity()])  # the head has no gradient there
    assert_equal_in_all(converted, original, torch.randn(2, 3, 64, 64, dtype=F64))


def test_a_segmentation_network():
    original = randomise(Encoder()).double()
    converted = quiet(copy.deepcopy(original))
    assert [block.plan.outputs[0] for block in blocks(converted)] == [0, 1]  # keepBase: node 0 among the outputs
    assert converted.down.keepBase  # what else its class has can be read still
    with pytest.raises(AttributeError, match="'HarDBlock' object has no attribute 'missing'"):
        _ = converted.down.missing
    assert_equal_in_all(converted, original, torch.randn(2, 3, 22, 26, dtype=F64))


@pytest.mark.parametrize("identity", [False, True])
def test_one_shot_aggregation(identity):
    original = randomise(nn.Sequential(Aggregation(12, 8, 12, 5, identity), nn.Conv2d(12, 3, 1, bias=False))).double()
    converted = quiet(copy.deepcopy(original))
    assert blocks(converted)[0].out_channels == 12
    assert_equal_in_all(converted, original, torch.randn(2, 12, 7, 6, dtype=F64))


def test_timm_vovnet():
    timm = pytest.importorskip("timm")
    original = randomise(timm.create_model("ese_vovnet19b_slim", num_classes=4)).double()
    converted = quiet(copy.deepcopy(original))
    assert len(blocks(converted)) == 4
    assert_equal_in_all(converted, original, torch.randn(2, 3, 64, 64, dtype=F64))


def test_our_own_plain_model():
    model = tn.create_model("thresholdnet_bc", num_classes=3, width_mult=0.25)
    assert quiet(model) is model
    assert all(block.fused for block in model.modules() if isinstance(block, tn.ThresholdBlock))
    assert not any(b.fused for b in tn.to_reference(model).modules() if isinstance(b, tn.ThresholdBlock))


def test_a_block_alone_comes_back_as_another_module():
    block = torchvision.models.DenseNet(8, (3,), 12, num_classes=2).features.denseblock1
    converted = quiet(block)
    assert isinstance(converted, ConvertedBlock)
    assert tn.to_reference(converted) is block


def test_it_can_be_undone():
    original = randomise(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4)).double()
    model = copy.deepcopy(original)
    kinds = [type(module) for module in model.modules()]
    tn.to_reference(quiet(model).train(False))
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    x = torch.randn(2, 3, 40, 40, dtype=F64)
    assert torch.equal(model(x), original.eval()(x))


def test_twice_is_once():
    model = quiet(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4))
    before = [id(module) for module in model.modules()]
    lines = []
    tn.convert(model, recompute="bottleneck", report=lines.append)
    assert [id(module) for module in model.modules()] == before
    assert all(block.recompute == "bottleneck" for block in blocks(model))
    assert not lines


def test_copies_pickles_and_saved_models():
    model = quiet(randomise(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4)).double()).eval()
    x = torch.randn(2, 3, 40, 40, dtype=F64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert len(blocks(twin)) == 2
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():  # and it is a copy: the original's modules are its own
            twin.features.denseblock1.denselayer1.conv1.weight.zero_()
        assert torch.equal(tn.to_reference(twin)(x), twin(x))
    assert model.features.denseblock1.denselayer1.conv1.weight.any()


def test_a_module_put_in_later_is_used():
    model = quiet(torchvision.models.DenseNet(8, (3,), 12, num_classes=4)).eval()
    layer = copy.deepcopy(model.features.denseblock1.denselayer2)
    nn.init.zeros_(layer.conv2.weight)
    model.features.denseblock1.denselayer2 = layer
    x = torch.randn(1, 3, 40, 40)
    fused = model(x)
    torch.testing.assert_close(fused, tn.to_reference(model)(x))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_block_is_read_as_the_container_that_it_was(library):
    if library == "torchvision":
        model = torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4)
    else:
        model = pytest.importorskip("timm").create_model("densenet121", num_classes=4)
    original = dict(model.features.denseblock1.items())
    block = quiet(model).features.denseblock1
    assert isinstance(block, ConvertedBlock) and isinstance(block, nn.ModuleDict)
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert len(twin) == len(original) and list(twin) == list(twin.keys()) == list(original)
        assert "denselayer2" in twin and "denselayer99" not in twin and bool(twin)
        assert [*twin.items()] == [(name, getattr(twin, name)) for name in original]
    assert dict(block.items()) == original and list(block.values()) == list(original.values())
    with pytest.raises(KeyError):
        block["denselayer99"]
    layer = copy.deepcopy(block.denselayer2)
    for put in (lambda: setattr(block, "denselayer2", layer), lambda: block.__setitem__("denselayer2", layer)):
        block.denselayer2 = nn.Identity()
        put()  # what is put in later is what is read
        assert block["denselayer2"] is layer and dict(block.items())["denselayer2"] is layer
        assert block.original()["denselayer2"] is layer
    seen = []
    block["denselayer2"].register_forward_hook(lambda *_: seen.append(1))
    block(torch.randn(2, block.in_channels, 6, 6))
    assert seen == [1]
    assert tn.to_reference(model).features.denseblock1["denselayer2"] is layer


def test_ways_into_other_blocks():
    block = quiet(nn.ModuleList([HarDBlock(12, 8, 1.6, 4)]))[0]
    layers = block.layers
    assert isinstance(block, ConvertedBlock) and layers[3] is block.get_submodule("layers.3") and len(layers) == 4
    assert block  # where the class has no length
    for wrong in (len, iter, lambda module: module[0]):
        with pytest.raises(TypeError):
            wrong(block)
    layer = quiet(nn.ModuleList([ThreshLayer(12, 8)]))[0]
    assert isinstance(layer, ConvertedBlock) and len(layer) == 6 and [*layer] == [*layer.children()]
    assert layer[0] is layer.norm1 and layer[-1] is layer.conv2


def test_it_is_of_the_class_that_it_was():
    """Forwards of networks ask for it: torchvision's and OccamDenseNet's users do."""
    kinds = torchvision.models.densenet._DenseBlock, HarDBlock, ThreshLayer
    for kind, make in zip(kinds, (lambda: kinds[0](2, 8, 2, 4, 0.0), lambda: HarDBlock(8, 6, 1.7, 4),
                                  lambda: ThreshLayer(12, 8)), strict=True):  # fmt: skip
        block = quiet(make())
        for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert isinstance(twin, kind) and isinstance(twin, ConvertedBlock) and type(twin) is type(block)
            assert type(twin.original()) is kind


def test_a_block_in_two_places_is_one():
    block = torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)
    model = quiet(nn.ModuleDict({"a": block, "b": nn.ModuleList([block])}))
    assert model["a"] is model["b"][0] and isinstance(model["a"], ConvertedBlock)


class Holder(nn.Module):
    """Keeps its blocks in a list and a tuple of its own beside their registration, and runs them from there."""

    def __init__(self):
        super().__init__()
        self.held = [torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.5), None]
        self.kept = (self.held[0],)
        self.add_module("block", self.held[0])

    def forward(self, x, kept=False):
        return (self.kept if kept else self.held)[0](x) * 2


def test_who_holds_a_block_beside_its_registration():
    original = Holder()
    model = quiet(copy.deepcopy(original)).eval()
    x = torch.randn(2, 8, 6, 6)
    assert model.held[0] is model.block and isinstance(model.block, ConvertedBlock) and model.held[1] is None
    torch.testing.assert_close(model(x), original.eval()(x))
    assert model.block.backend == "native"
    torch.testing.assert_close(model(x, kept=True), model(x))  # the original, and nothing is dropped
    assert model.train().kept[0].training and (model(x, kept=True) == 0).any()
    block = model.block.original()
    assert tn.to_reference(model).held[0] is model.block is block


def test_a_replica_has_modules_of_its_own():
    """As nn.DataParallel makes them: where one runs in plain torch, it does so on its own device."""
    block = quiet(torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)).eval()
    replica = block._replicate_for_data_parallel()
    for name, child in [*replica._modules.items()]:
        replica._modules[name] = copy.deepcopy(child)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        next(replica._modules["denselayer1"].parameters()).mul_(2)
    plain = replica.original()
    assert plain.denselayer1 is replica._modules["denselayer1"] and block.original().denselayer1 is block.denselayer1
    torch.testing.assert_close(replica(x), plain(x))
    assert not torch.allclose(replica(x), block(x))


def test_a_method_that_adds_layers():
    class Growing(torchvision.models.densenet._DenseBlock):
        def grow(self):
            self.add_module("denselayer3", torchvision.models.densenet._DenseLayer(16, 4, 2, 0.0))

    original = Growing(2, 8, 2, 4, 0.0)
    block = quiet(original)
    block.grow()
    assert [name for name, _ in block.named_children()] == ["denselayer1", "denselayer2", "denselayer3"]
    x = torch.randn(2, 8, 6, 6)
    assert block.eval()(x).shape == (2, 20, 6, 6) and block.backend == "reference"
    torch.testing.assert_close(block(x), original(x))


class Odd(torchvision.models.densenet._DenseBlock):
    """Wants something else than pixels."""

    def forward(self, x, mask):
        return super().forward(x * mask)


class Fussy(torchvision.models.densenet._DenseBlock):
    """Wants pixels of a certain number."""

    def forward(self, x):
        assert x.shape[-1] == 8, "wrong side"
        return super().forward(x)


class Writing(torchvision.models.densenet._DenseBlock):
    """Keeps what it read, and prunes its weights while it runs."""

    def forward(self, x):
        self.seen = x
        for parameter in self.parameters():
            parameter.data.mul_(0.5)
        return super().forward(x)


def test_a_forward_that_cannot_be_checked_is_left():
    model, lines = nn.ModuleList([Odd(2, 8, 2, 4, 0.0), Fussy(2, 8, 2, 4, 0.0)]), []
    assert not blocks(tn.convert(model, report=lines.append))
    assert "left 0: its forward cannot be checked on a few random pixels (TypeError: " in lines[0]
    assert lines[1] == "left 1: its forward cannot be checked on a few random pixels (AssertionError: wrong side)"


def test_the_check_runs_a_copy():
    block = Writing(2, 8, 2, 4, 0.0)
    state = copy.deepcopy(block.state_dict())
    assert not isinstance(quiet(nn.ModuleList([block]))[0], ConvertedBlock)
    assert not hasattr(block, "seen")
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


def test_links_of_somebody_else():
    for links in ([[1]], [["a"]], "0"):
        block = nn.Module()
        block.links, block.layers = links, nn.ModuleList([nn.Conv2d(4, 4, 1)])
        block.forward = lambda x: x
        lines = []
        tn.convert(nn.ModuleList([block]), report=lines.append)
        assert lines[0].startswith("nothing to fuse")


def test_hooks_are_called():
    model = quiet(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4)).eval()
    seen = []
    x = torch.randn(1, 3, 40, 40)
    expected = model(x)
    for name in ("features.denseblock1", "features.denseblock1.denselayer2", "features.transition1.conv"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    torch.testing.assert_close(model(x), expected)
    assert sorted(seen) == ["features.denseblock1", "features.denseblock1.denselayer2", "features.transition1.conv"]


def test_hooks_of_a_block_move_with_it():
    model = torchvision.models.DenseNet(8, (3,), 12, num_classes=4)
    seen = []
    handle = model.features.denseblock1.register_forward_hook(lambda *args: seen.append(1))
    quiet(model)(torch.randn(2, 3, 40, 40))
    assert seen == [1]
    handle.remove()
    model(torch.randn(2, 3, 40, 40))
    assert seen == [1]


def test_hooks_with_keywords_and_of_the_state_dict():
    model = torchvision.models.DenseNet(8, (3,), 12, num_classes=4)
    block, seen = model.features.denseblock1, []
    block.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    block.register_state_dict_post_hook(lambda module, state, prefix, meta: seen.append(prefix))
    quiet(model)(torch.randn(2, 3, 40, 40))
    model.state_dict()
    assert seen == [{}, "features.denseblock1."]


def test_dropout_in_training():
    model = torchvision.models.DenseNet(8, (3,), 12, drop_rate=0.5, num_classes=4)
    converted = quiet(model)
    assert blocks(converted)[0].drop_rate == 0.5
    x = torch.randn(4, 12, 6, 6)
    block = blocks(converted)[0].train()
    features = block(x)[:, 12:]
    assert 0.3 < (features == 0).float().mean() < 0.7  # half of every layer's output
    assert not (block.eval()(x)[:, 12:] == 0).any()


def test_compile_autocast_and_half():
    model = quiet(randomise(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4))).eval()
    x = torch.randn(2, 3, 40, 40)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    compiled.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    expected = to_scale(model(x))
    original = tn.to_reference(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(model(x), original(x))]
    pairs.append((model.to(torch.bfloat16)(x.bfloat16()), original.to(torch.bfloat16)(x.bfloat16())))
    for ours, theirs in pairs:  # bf16's error from float32 is the original's own
        assert ours.dtype == theirs.dtype == torch.bfloat16
        limit = max(0.02, 2 * (to_scale(theirs) - expected).abs().max().item())
        assert (to_scale(ours) - expected).abs().max().item() <= limit


def to_scale(logits):
    """Logits in float32, the largest 1."""
    return logits.detach().float() / logits.detach().float().abs().max()


def test_dynamic_batch_does_not_recompile():
    model = quiet(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=4)).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 5):
            assert compiled(torch.randn(batch, 3, 40, 40)).shape == (batch, 4)
    assert counter.frame_count == 1


def test_it_says_what_it_did_and_why_not():
    class Odd(torchvision.models.densenet._DenseBlock):
        def forward(self, x):
            return super().forward(x) * 2

    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)
            self.odd = Odd(2, 8, 2, 4, 0.0)
            self.strided = torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)
            self.strided.denselayer2.conv2 = nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False)
            self.gelu = torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0)
            self.gelu.denselayer1.relu1 = nn.GELU()
            self.harmonic = HarDBlock(8, 6, 1.7, 4)

    lines = []
    model = tn.convert(Extra(), report=lines.append)
    assert [isinstance(child, ConvertedBlock) for child in model.children()] == [True, False, False, False, True]
    said = {line.split(":")[0]: line for line in lines}
    assert said.keys() == {"fused good", "fused harmonic", "left odd", "left strided", "left gelu"}
    assert "computes something else" in said["left odd"]
    assert "denselayer2.conv2 must be a 3x3 convolution" in said["left strided"]
    assert "GELU" in said["left gelu"]
    lines.clear()
    tn.convert(nn.Linear(2, 2), report=lines.append)
    assert lines == ["nothing to fuse: no block of linked layers (DenseNet's, HarDNet's, VoVNet's) was found"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_or_left():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(TypeError, match="model must not be TorchScript to be converted, got RecursiveScriptModule"):
        tn.convert(scripted, report=None)
    model, lines = nn.Sequential(scripted, *torchvision.models.DenseNet(4, (2,), 8).features), []
    tn.convert(model, report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["fused 5", "fused the model"]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 16, 8, 8)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        tn.convert(3)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        tn.to_reference(3)
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        quiet(torchvision.models.DenseNet(8, (3,), 12), backend="cuda")


def test_the_check_changes_nothing():
    model = torchvision.models.DenseNet(8, (3,), 12).train()
    model.features.denseblock1.denselayer1.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    quiet(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def kept_bytes(model, x):
    """What autograd keeps of a forward pass, beyond x, parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)  # held, so that no storage is freed and its place taken by another
    del y
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("make", "recompute", "most"),
    [
        (torchvision.models.densenet121, None, 0.27),
        (torchvision.models.densenet121, "bottleneck", 0.11),
        (ThreshNet79, None, 0.60),  # its dense layers alone: every one's output is kept
        (ThreshNet79, "bottleneck", 0.46),
    ],
)
def test_kept_bytes_at_224(make, recompute, most):
    """Bytes that autograd keeps of a training step's forward against the original."""
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    original = make().to(memory_format=torch.channels_last)
    converted = quiet(copy.deepcopy(original), recompute=recompute)
    theirs, ours = kept_bytes(original, x), kept_bytes(converted, x)
    print(f"kept {ours} of {theirs} bytes: {ours / theirs:.3f}")
    assert ours <= most * theirs
