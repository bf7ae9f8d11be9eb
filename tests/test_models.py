"""The zoo: parameter counts of SPEC, shapes, pyramids, arguments; SPEC sections 3, 4 and 5."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thresholdnet as tn
from thresholdnet.models import Network, _registry, model_arguments

PARAMETERS = {
    "thresholdnet_v1": 15_323_248,
    "thresholdnet_v2": 17_140_592,
    "thresholdnet_ab": 10_451_148,  # these two with the defaults of SPEC section 4, counted by hand from its rules
    "thresholdnet_bc": 10_327_560,
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet161": 28_681_000,
    "densenet40": 1_464_232,
    "log_densenet121": 5_229_096,
    "sparse_densenet121": 7_338_216,
    "hardnet68": 17_565_348,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
BASELINES = {
    "resnet18", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
}  # fmt: skip
OURS = sorted(set(tn.list_models()) - BASELINES)


def reductions(name):
    """Of the levels of a model's pyramid."""
    return [1, 2, 4] if name == "densenet40" else [2, 4, 8, 16, 32]


def _count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters_with_1000_classes(name, count):
    assert _count(tn.create_model(name, device="meta")) == count


def test_parameters_with_10_classes():
    assert _count(tn.create_model("thresholdnet_v1", 10, device="meta")) == 14_371_858
    assert _count(tn.create_model("thresholdnet_v2", 10, device="meta")) == 16_189_202
    assert _count(tn.create_model("densenet40", 10, device="meta")) == 1_019_722


def test_hardnet85_has_36_67_million():
    assert round(_count(tn.create_model("hardnet85", device="meta")) / 1e6, 2) == 36.67


def test_every_model_of_the_design_is_listed():
    assert set(tn.list_models()) == BASELINES | {
        "thresholdnet_v1", "thresholdnet_v2", "thresholdnet_ab", "thresholdnet_bc", "hardnet68", "hardnet85",
        "hardnet39ds", "hardnet68ds", "densenet121", "densenet169", "densenet201", "densenet161", "densenet40",
        "log_densenet121", "sparse_densenet121",
    }  # fmt: skip
    assert tn.list_models("hardnet*") == ["hardnet39ds", "hardnet68", "hardnet68ds", "hardnet85"]


@pytest.mark.parametrize(
    ("name", "block_outputs", "transitions", "convolutions"),
    [
        ("thresholdnet_v1", [256, 384, 576, 654, 782], [128, 192, 288, 480, 960], 79),
        ("thresholdnet_v2", [256, 512, 768, 654, 782], [128, 256, 384, 480, 960], 95),
    ],
)
def test_structure_of_v1_and_v2(name, block_outputs, transitions, convolutions):
    model = tn.create_model(name, device="meta")
    assert [stage.block.out_channels for stage in model.stages] == block_outputs
    assert [stage.out_channels for stage in model.stages] == transitions
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    sides = [stage.reduction for stage in model.stages]
    assert [224 // r for r in sides] == [56, 28, 14, 14, 7]
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}


@pytest.mark.parametrize("name", OURS)
def test_forward_backward_features_and_round_trip(name):
    torch.manual_seed(0)
    model = tn.create_model(name, num_classes=5, in_chans=1)
    x = torch.randn(2, 1, 33, 47)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert features.shape == (
        2,
        model.num_features,
        -(-33 // 32) if model.min_size == 1 else 33 // reductions(name)[-1],
        features.shape[3],
    )
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    other = tn.create_model(name, num_classes=5, in_chans=1).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", [*OURS, "resnet18", "resnet50"])
def test_pyramids(name):
    classifier = tn.create_model(name, num_classes=3).eval()
    backbone = tn.create_model(name, features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    levels = backbone(x)
    assert [info["reduction"] for info in backbone.feature_info] == reductions(name)
    for info, level in zip(backbone.feature_info, levels, strict=True):
        assert level.shape == (1, info["channels"], 64 // info["reduction"], 96 // info["reduction"])
    if isinstance(classifier, Network):
        weights = {k: v for k, v in classifier.state_dict().items() if not k.startswith("head.")}
        backbone.load_state_dict(weights)
        torch.testing.assert_close(backbone(x)[-1], classifier.forward_features(x))
    chosen = range(len(levels))[1:4:2]
    some = tn.create_model(name, features_only=True, out_indices=chosen)
    assert [info["index"] for info in some.feature_info] == list(chosen)
    assert [level.shape[2] for level in some(x)] == [64 // reduction for reduction in reductions(name)[1:4:2]]


@pytest.mark.parametrize("name", OURS)
def test_smallest_image(name):
    model = tn.create_model(name, num_classes=2).eval()
    side = model.min_size
    assert model(torch.randn(1, 3, side, side)).shape == (1, 2)
    if side > 1:
        with pytest.raises(ValueError, match=f"images must be at least {side}x{side} pixels .* got {side}x{side - 1}"):
            model(torch.randn(1, 3, side, side - 1))


def test_device_and_dtype_reach_every_parameter():
    for name in tn.list_models():
        model = tn.create_model(name, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}, name


def test_torchvision_densenet_has_our_initialisation():
    torch.manual_seed(0)
    ours = tn.create_model("densenet121")
    assert torch.count_nonzero(ours.head.bias) == 0
    weight = ours.stages[2].block.layers[3].conv1.weight
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", ["thresholdnet_v1", "thresholdnet_ab"])
def test_thresholdnets_have_torchs_default_initialisation(name):
    """Convolutions uniform up to 1 / sqrt(fan in), BatchNorms the identity."""
    torch.manual_seed(0)
    for module in tn.create_model(name, 10).modules():
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max().item() <= 1.001 * bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_classifier_can_be_left_out_and_replaced():
    model = tn.create_model("thresholdnet_v1", num_classes=0)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 960)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert tn.create_model("resnet18", num_classes=0)(x).shape == (2, 512)


@pytest.mark.parametrize("name", ["thresholdnet_ab", "thresholdnet_bc"])
@pytest.mark.parametrize("above", ["even_log", "harmonic"])
def test_larger_thresholds_give_more_links_parameters_and_memory(name, above):
    counts = []
    for threshold in (0, 4, 8, 12, 16):
        model = tn.create_model(name, threshold=threshold, above=above, width_rule="constant", device="meta")
        plans = [stage.block.plan for stage in model.stages]
        counts.append(
            (
                sum(plan.links.total for plan in plans),
                _count(model),
                sum(p.kept_bytes(14, 14, 4, fused=False) for p in plans),
            )
        )
    if name == "thresholdnet_bc":  # up to T = 4 sparse-dense keeps every link that the sparse rule has, and few more
        counts = counts[1:]
    for less, more in pairwise(counts):
        assert all(a < b for a, b in zip(less, more, strict=True)), counts


def test_ab_and_bc_arguments():
    model = tn.create_model(
        "thresholdnet_ab",
        threshold=2,
        layers=[3, 4],
        growth_rates=[8, 12],
        transitions=[16, 24],
        width_mult=0.5,
    )
    blocks = [stage.block for stage in model.stages]
    assert [block.links for block in blocks] == [tn.links.threshold_ab(3, 2), tn.links.threshold_ab(4, 2)]
    assert blocks[0].widths[:2] == (4, 4) and [stage.out_channels for stage in model.stages] == [8, 16]
    assert tn.create_model("thresholdnet_bc", above="harmonic").stages[3].block.links == tn.links.threshold_bc(
        16, 8, "harmonic"
    )
    assert "threshold" in model_arguments("thresholdnet_ab") and "n" in model_arguments("sparse_densenet121")


def test_densenet40_is_the_network_of_its_paper():
    """Written out: a convolution, three blocks of BN - ReLU - Conv3x3 on all before, transitions, BN - ReLU, mean."""
    torch.manual_seed(0)
    model = tn.create_model("densenet40", 10, dtype=torch.float64).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(vector, 0.5, 1.5)
    state = model.state_dict()

    def relu_of_norm(x, name):
        norm = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *norm))

    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    x = F.conv2d(images, state["stem.conv.weight"], padding=1)
    for stage in range(3):
        if stage:
            x = F.conv2d(relu_of_norm(x, f"stages.{stage}.norm"), state[f"stages.{stage}.conv.weight"])
            x = F.avg_pool2d(x, 2)
        for layer in range(12):
            name = f"stages.{stage}.block.layers.{layer}"
            made = F.conv2d(relu_of_norm(x, f"{name}.norm"), state[f"{name}.conv.weight"], padding=1)
            x = torch.cat([x, made], 1)
    pooled = relu_of_norm(x, "stages.2.last_norm").mean((2, 3))
    torch.testing.assert_close(model(images), F.linear(pooled, state["head.weight"], state["head.bias"]))


def test_pruned_densenets():
    log = tn.create_model("log_densenet121", device="meta")
    sparse = tn.create_model("sparse_densenet121", n=2, device="meta")
    assert log.stages[2].block.links == tn.links.log_dense(24)
    assert sparse.stages[2].block.links == tn.links.sparse_dense(24, 2)
    assert _count(log) < _count(tn.create_model("sparse_densenet121", device="meta")) < PARAMETERS["densenet121"]


def test_hardnet_uses_relu6_and_dropout():
    model = tn.create_model("hardnet68")
    assert not any(type(m) is nn.ReLU for m in model.modules())
    assert model.drop.p == 0.1
    assert [m.p for m in tn.create_model("hardnet85").stages[-1].modules() if isinstance(m, nn.Dropout)] == [0.1]


def test_dropout_stands_before_the_head():
    """At a rate of 1 its bias alone is left in training, and all of it in eval mode."""
    model = tn.create_model("hardnet68", 5, drop_rate=1.0)
    features = torch.rand(2, model.num_features, 3, 2)
    assert torch.equal(model.forward_head(features), model.head.bias.expand(2, 5))
    torch.testing.assert_close(model.eval().forward_head(features), model.head(features.mean((2, 3))))


def test_copies_and_pickles():
    model = tn.create_model("thresholdnet_bc", 3, width_mult=0.25).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: tn.create_model("thresholdnet_v3"),
            ValueError,
            "did you mean thresholdnet_v2 or thresholdnet_v1",
        ),
        (lambda: tn.create_model(5), TypeError, "model must be a string"),
        (
            lambda: tn.create_model("thresholdnet_v1", threshold=4),
            TypeError,
            "model thresholdnet_v1 takes drop_rate, got 'threshold'",
        ),
        (
            lambda: tn.create_model("resnet18", drop_rate=0.1),
            TypeError,
            "model resnet18 takes small_stem, got 'drop_rate'",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1", -1),
            ValueError,
            "num_classes must be at least 0, got -1",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1", in_chans=0),
            ValueError,
            "in_chans must be at least 1, got 0",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", threshold=-2),
            ValueError,
            "threshold must be at least 0",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", layers=[]),
            ValueError,
            "layers must hold at least 1 entries",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", layers=[4] * 6),
            ValueError,
            "layers must hold at most 5 entries",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", layers=[4, 0, 4, 4, 4]),
            ValueError,
            "layers entry must be at",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", growth_rates=[8]),
            ValueError,
            "growth_rates must hold 5 entries",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", layers="44"),
            TypeError,
            "layers must be a sequence of integers",
        ),
        (
            lambda: tn.create_model("thresholdnet_ab", width_mult=0),
            ValueError,
            "width_mult must be from 0.05 to 16",
        ),
        (
            lambda: tn.create_model("hardnet68", drop_rate=1.5),
            ValueError,
            "drop_rate must be from 0 to 1, got 1.5",
        ),
        (
            lambda: tn.create_model("densenet121", out_indices=(0,)),
            ValueError,
            "out_indices needs features_only=True",
        ),
        (
            lambda: tn.create_model("densenet121", features_only=True, out_indices=(5,)),
            ValueError,
            "out_indices entry must be from 0 to 4, got 5",
        ),
        (
            lambda: tn.create_model("densenet121", features_only=True, out_indices=(2, 1)),
            ValueError,
            "out_indices must be ascending",
        ),
        (
            lambda: tn.create_model("densenet121", features_only=True, out_indices=3),
            TypeError,
            "out_indices must be a sequence of integers or None, got 3",
        ),
        (
            lambda: tn.create_model("resnet18", out_indices="13"),
            TypeError,
            "out_indices must be a sequence of integers or None, got '13'",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1", features_only="no"),
            TypeError,
            "features_only must be True or False, got 'no'",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1", fused="no"),
            TypeError,
            "fused must be True or False, got 'no'",
        ),
        (
            lambda: tn.create_model("resnet18", fused=True, backend="cuda"),
            ValueError,
            "backend 'cuda' is unknown",
        ),
        (
            lambda: tn.create_model("resnet18", recompute="bottlenecks"),
            ValueError,
            "recompute 'bottlenecks' is unknown; did you mean bottleneck?",
        ),
        (
            lambda: tn.create_model("hardnet68", fused=True, recompute="bottleneck"),
            ValueError,
            "recompute must be None for hardnet68, which has no bottleneck blocks, got 'bottleneck'",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1", recompute="bottleneck"),
            ValueError,
            "recompute needs fused=True, got recompute='bottleneck' without it",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1")(torch.zeros(1, 1, 32, 32)),
            ValueError,
            "images must have 3 channels, got 1",
        ),
        (
            lambda: tn.create_model("thresholdnet_v1")(torch.zeros(3, 32, 32)),
            ValueError,
            "images must have 4 dimensions",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_second_model_of_a_name_is_an_error():
    def densenet121():
        return None

    with pytest.raises(ValueError, match="model name 'densenet121' must be unique"):
        _registry.register(densenet121)


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
def test_small_stem(name):
    """3x3, stride 1, no pool: the same network from the first block on, at four times the side."""
    usual, small = (tn.create_model(name, num_classes=3, small_stem=value).eval() for value in (False, True))
    fewer = 3 * 64 * (7 * 7 - 3 * 3)
    assert _count(usual) - _count(small) == fewer
    backbone = tn.create_model(name, features_only=True, small_stem=True).eval()
    x = torch.randn(1, 3, 32, 48)
    reductions = [1, 2, 4, 8]
    assert [info["reduction"] for info in backbone.feature_info] == reductions
    for info, level in zip(backbone.feature_info, backbone(x), strict=True):
        assert level.shape == (1, info["channels"], 32 // info["reduction"], 48 // info["reduction"])
    fused = tn.create_model(name, num_classes=3, small_stem=True, fused=True, backend="native")
    fused.load_state_dict(small.state_dict())
    assert small(x).shape == (1, 3)
    torch.testing.assert_close(fused.eval()(x), small(x), atol=1e-4, rtol=1e-3)
    with pytest.raises(TypeError, match="small_stem must be True or False, got 1"):
        tn.create_model(name, small_stem=1)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: tn.create_model("densenet121", dtype="half"), TypeError, "dtype must be a floating-point torch.dtype"),
        (lambda: tn.create_model("densenet121", dtype=torch.int8), TypeError, "dtype must be a floating-point torch"),
        (
            lambda: tn.create_model("densenet121", device="nowhere"),
            ValueError,
            "device must be a torch device .*nowhere",
        ),
        (lambda: tn.create_model("densenet121", device=3.5), TypeError, "device must be a torch device .*3.5"),
        (lambda: tn.ThresholdBlock(4, tn.links.dense(2), dtype="half"), TypeError, "dtype must be a floating-point"),
        (
            lambda: tn.ThresholdBlock(4, tn.links.dense(2), device="nowhere"),
            ValueError,
            "device must be a torch device",
        ),
        (lambda: tn.list_models(3), TypeError, "pattern must be a string, got 3"),
        (lambda: tn.from_pretrained(3), TypeError, "source must be a path, got 3"),
        (lambda: tn.convert(nn.Linear(2, 2), backend="fast"), ValueError, "backend 'fast' is unknown"),
        (
            lambda: tn.weights.load_released(tn.create_model("densenet121", device="meta"), 3),
            TypeError,
            "source must be a path, got 3",
        ),
        (lambda: tn.weights.load_released(nn.Linear(2, 2), "no.pth"), TypeError, "Linear"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
