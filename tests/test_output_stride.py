"""Networks that dilate in the place of downsampling, against the same done by hand to other people's networks."""

import foreign
import pytest
import torch
import torchvision
from test_dilated import dilated
from test_memory import _really_kept
from test_models import OURS, reductions
from torch import nn

import thresholdnet as tn
from thresholdnet.models import fuse_blocks
from thresholdnet.weights import load_released

F64 = torch.float64


def densenet():
    """torchvision's: two averages left out, the blocks behind them dilated."""
    network = torchvision.models.densenet121(num_classes=7)
    features = network.features
    features.transition2.pool = features.transition3.pool = nn.Identity()
    dilated(features.denseblock3, 2)
    dilated(features.denseblock4, 4)
    return network


def flat(make):
    """A flat list of layers in its authors' layout: no maximum beyond a stride of 8."""
    network, stride, dilation = make(7), 1, 1
    for i, layer in enumerate(network.base):
        pools = isinstance(layer, nn.MaxPool2d)
        if pools and stride == 8:
            network.base[i], dilation = nn.Identity(), 2 * dilation
        elif pools or (isinstance(layer, foreign.ConvLayer) and layer.conv.stride == (2, 2)):
            stride *= 2
        else:
            dilated(layer, dilation)
    assert dilation == 4
    return network


THEIRS = {
    "densenet121": densenet,
    "hardnet68": lambda: flat(foreign.HarDNet68),
    "thresholdnet_v1": lambda: flat(foreign.ThreshNet79),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_same_done_by_hand(name):
    torch.manual_seed(0)
    theirs = THEIRS[name]().to(F64)
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
    ours = tn.create_model(name, 7, output_stride=8, fused=True, backend="native", dtype=F64, drop_rate=0.0)
    load_released(ours, theirs.state_dict())
    x = torch.randn(2, 3, 64, 48, dtype=F64)
    for training in (False, True):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-6, atol=1e-6)
    assert all(stage.block.backend == "native" for stage in ours.stages)


@pytest.mark.parametrize("name", OURS)
def test_pyramids(name):
    most = reductions(name)[-2]
    plain = tn.create_model(name, features_only=True).eval()
    model = tn.create_model(name, features_only=True, output_stride=most, fused=True).eval()
    model.load_state_dict(plain.state_dict())
    assert [info["reduction"] for info in model.feature_info] == reductions(name)[:-1]
    assert model.feature_info[-1]["channels"] == plain.feature_info[-1]["channels"]
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        levels, expected = model(x), tn.to_reference(model)(x)
    for info, level, plainly in zip(model.feature_info, levels, expected, strict=True):
        assert level.shape == (1, info["channels"], 64 // info["reduction"], 32 // info["reduction"])
        torch.testing.assert_close(level, plainly, rtol=1e-4, atol=1e-4 * plainly.abs().max().item())
    torch.testing.assert_close(expected[0], plain(x)[0])
    side = tn.create_model(name, 2, output_stride=most).min_size
    assert side <= plain.min_size
    assert tn.create_model(name, 2, output_stride=most).eval()(x[..., :side, :side]).shape == (1, 2)


def test_volumes():
    model = tn.create_model("densenet121", 2, 1, spatial_dims=3, output_stride=16, fused=True).eval()
    x = torch.randn(1, 1, 32, 16, 48)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, 1024, 2, 1, 3) and model.stages[-1].block.backend == "native"
        expected = tn.to_reference(model).forward_features(x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_it_is_saved_with_the_model(tmp_path):
    pytest.importorskip("safetensors"), pytest.importorskip("huggingface_hub")
    model = tn.create_model("thresholdnet_ab", 3, output_stride=16, width_mult=0.25).eval()
    tn.save_pretrained(model, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(tn.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("name", "stride", "error", "message"),
    [
        ("densenet121", 12, ValueError, "output_stride must be one of 4, 8, 16, 32 for densenet121, got 12"),
        ("densenet40", 8, ValueError, "output_stride must be one of 1, 2, 4 for densenet40, got 8"),
        ("hardnet68", 2, ValueError, "output_stride must be one of 4, 8, 16, 32 for hardnet68, got 2"),
        ("hardnet68", 8.0, TypeError, "output_stride must be an integer, got 8.0"),
        ("resnet50", 8, ValueError, "output_stride must be None for resnet50, which is torchvision's, got 8"),
    ],
)
def test_bad_input(name, stride, error, message):
    with pytest.raises(error) as caught:
        tn.create_model(name, output_stride=stride, device="meta")
    assert message in str(caught.value)


def test_account():
    """The memory account knows of the larger maps."""
    model = tn.create_model("thresholdnet_ab", 3, output_stride=8, width_mult=0.5)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    report = tn.memory.account(model, x.shape, torch.float32)
    assert report["eager"].kept == pytest.approx(_really_kept(model, x), rel=0.005)
    fuse_blocks(model, True, "native")
    assert report["fused"].kept == pytest.approx(_really_kept(model, x), rel=0.005)
