"""What timm's users expect of a DenseNet: maps without a pooling, intermediates, checkpointing, layer decay."""

import copy

import pytest
import torch
from saved import saved_tensors, storage_bytes
from torch import nn

timm = pytest.importorskip("timm")
from timm.optim import param_groups_layer_decay  # noqa: E402  # only where timm is

import thresholdnet.timm  # noqa: E402, F401  # registers; only where timm is

NAMES = ["thresholdnet_ab", "hardnet39ds", "log_densenet121"]


def create(name, **arguments):
    small = {"layers": (2, 3, 2), "growth_rates": (4, 6, 8), "transitions": (8, 12, 16)} if name.endswith("_ab") else {}
    return timm.create_model(name, **small, **arguments).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 96, 64)


@pytest.mark.parametrize("name", NAMES)
def test_maps_without_a_pooling(name, x):
    """As timm.create_model("densenet121", num_classes=0, global_pool="") does."""
    model = create(name, num_classes=0, global_pool="")
    features = model.forward_features(x)
    assert features.dim() == 4 and torch.equal(model(x), features)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


def test_output_stride(x):
    """timm's argument of that name reaches our networks."""
    pyramid = create("hardnet68", features_only=True, output_stride=8)
    assert pyramid.feature_info.reduction() == [2, 4, 8]
    assert tuple(pyramid(x)[-1].shape[2:]) == tuple(side // 8 for side in x.shape[2:])


def test_a_classifier_needs_a_pooling(x):
    message = "global_pool must name a pooling for a model with a classifier, got '' with num_classes=3"
    with pytest.raises(ValueError, match=message):
        create("thresholdnet_ab", num_classes=3, global_pool="")
    model = create("thresholdnet_ab", num_classes=2)
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(3, "")
    assert model(x).shape == (2, 2)  # as it was
    with pytest.raises(ValueError, match="global_pool 'average' is unknown; did you mean avg"):
        create("thresholdnet_ab", global_pool="average")


@pytest.mark.parametrize("name", NAMES)
def test_intermediates(name, x):
    model = create(name, num_classes=3)
    pyramid = create(name, features_only=True)
    pyramid.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, maps[-1])
    torch.testing.assert_close(last, model.forward_features(x))
    for got, expected, info in zip(maps, pyramid(x), model.feature_info, strict=True):
        torch.testing.assert_close(got, expected)
        assert got.shape == (2, info["num_chs"], 96 // info["reduction"], 64 // info["reduction"])
        assert isinstance(model.get_submodule(info["module"]), nn.Module)
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [m.shape for m in only] == [m.shape for m in maps[-2:]]
    early, (first, third) = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert early is third and third.shape == maps[2].shape and first.shape == maps[0].shape
    (negative,) = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
    assert negative.shape == last.shape
    for bad, error, message in (
        ({"indices": 9}, ValueError, "indices must be from 1 to"),
        ({"indices": [7]}, ValueError, "indices entry must be from"),
        ({"indices": []}, ValueError, "indices must name at least one map, got none"),
        ({"output_fmt": "NLC"}, ValueError, "output_fmt 'NLC' is unknown"),
    ):
        with pytest.raises(error, match=message):
            model.forward_intermediates(x, **bad)


@pytest.mark.parametrize("indices", [[1], [0], 1])
def test_pruned_to_an_intermediate(indices, x):
    model = create("thresholdnet_ab", num_classes=3)
    (expected,) = model.forward_intermediates(x, indices, intermediates_only=True)
    getter = timm.models._features.FeatureGetterNet(copy.deepcopy(model), indices)
    (got,) = getter(x)
    torch.testing.assert_close(got, expected)
    assert getter.feature_info.channels() == [expected.shape[1]]
    taken = model.prune_intermediate_layers(indices)
    assert len(taken) == 1 and model.num_features == expected.shape[1] and isinstance(model.head, nn.Identity)
    torch.testing.assert_close(model(x), expected)


def kept(model, x):
    return storage_bytes(saved_tensors(model, x))


def test_gradient_checkpointing(x):
    """Recomputed bottlenecks, as in timm's DenseNet: less is kept, the same is computed."""
    model = create("log_densenet121", num_classes=3).train()
    twin = copy.deepcopy(model)
    model.set_grad_checkpointing()
    assert kept(model, x) < 0.8 * kept(twin, x)
    for each in (model, twin):
        each(x).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * theirs.grad.abs().max().item())
    model.set_grad_checkpointing(False)
    assert kept(model, x) == kept(twin, x)


@pytest.mark.parametrize(
    ("name", "fused"), [("hardnet39ds", True), ("thresholdnet_ab", True), ("thresholdnet_v1", False)]
)
def test_checkpointing_without_bottlenecks(name, fused):
    model = create(name, fused=fused)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match=f"enable must be False for {name}, got True: .* fused=True, .* has none"):
        model.set_grad_checkpointing()


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay(name):
    model = create(name, num_classes=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = model.stages[0].block.layers
    depth = [next(part.parameters()) for part in (model.stem, layers[0], layers[1], model.stages[1].block, model.head)]
    scales = [scale[id(p)] for p in depth]
    assert scales == sorted(set(scales)) and scales[-1] == 1
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 2 + len(model.stages)  # stem, stages, head
