"""Our networks through timm's registry and through torch.hub."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import thresholdnet as tn

timm = pytest.importorskip("timm")
import thresholdnet.timm  # noqa: E402  # only where timm is

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"width_mult": 0.25}


def test_names():
    assert "thresholdnet_v1" in timm.list_models("thresholdnet*")
    assert timm.list_models("hardnet*") == ["hardnet39ds", "hardnet68", "hardnet68ds", "hardnet85"]
    assert timm.create_model("densenet121").__class__.__module__.startswith("timm")  # timm's own stays


def test_state_dict_and_outputs_are_ours():
    model = timm.create_model("thresholdnet_bc", num_classes=5, **SMALL).eval()
    plain = tn.create_model("thresholdnet_bc", num_classes=5, **SMALL).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert any(block.fused for block in model.modules() if isinstance(block, tn.ThresholdBlock))
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


@pytest.mark.parametrize(("pool", "times"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2)])
def test_global_pool_and_another_classifier(pool, times):
    model = timm.create_model("thresholdnet_ab", num_classes=5, global_pool=pool, drop_rate=0.25, **SMALL).eval()
    assert model.get_classifier().in_features == times * model.num_features
    assert model.drop.p == 0.25
    x = torch.randn(2, 3, 40, 40)
    assert model(x).shape == (2, 5)
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, 2 * model.num_features)


def test_features_only():
    backbone = timm.create_model("hardnet68", features_only=True, out_indices=(1, 3)).eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == backbone.feature_info.reduction()


def test_data_config():
    config = timm.data.resolve_data_config(model=timm.create_model("thresholdnet_ab", **SMALL))
    assert config["input_size"] == (3, 224, 224)


def test_no_weights_are_promised():
    with pytest.raises(RuntimeError, match="pretrained must be False for hardnet68, got True"):
        timm.create_model("hardnet68", pretrained=True)


def test_torch_hub():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entries == set(tn.list_models())
    model = torch.hub.load(str(ROOT), "thresholdnet_ab", source="local", trust_repo=True, num_classes=3, **SMALL)
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 3)
