"""Key maps: a converted model gives the same outputs as the other side's structure, both ways."""

import re

import pytest
import torch
from released import (
    HARDNETS,
    THRESHNETS,
    fill,
    hardnet_forward,
    hardnet_shapes,
    threshnet_forward,
    threshnet_shapes,
)
from safetensors.torch import save_file

from thresholdnet import create_model
from thresholdnet.weights import load_released, to_released

F64 = torch.float64


def _images(side=40, batch=2):
    return torch.randn(batch, 3, side, side, dtype=F64, generator=torch.Generator().manual_seed(1))


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", HARDNETS)
def test_hardnet_files(name, training):
    """Also the direct construction asked for: one torch.cat per layer, written out in released.py, 1e-6 in fp64."""
    state = fill(hardnet_shapes(name, classes=12))
    model = _without_dropout(create_model(name, num_classes=12, dtype=F64)).train(training)
    load_released(model, state)
    x = _images(64)
    torch.testing.assert_close(model(x), hardnet_forward(name, state, x, training), rtol=1e-6, atol=1e-6)
    model.eval()
    load_released(model, state)
    assert all(torch.equal(v, state[k]) for k, v in to_released(model).items())
    assert set(to_released(model)) == set(state)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", THRESHNETS)
def test_threshnet_files(name, training):
    state = fill(threshnet_shapes(name))
    model = create_model(name, num_classes=10, dtype=F64).train(training)
    load_released(model, state)
    x = _images(32, batch=3)
    torch.testing.assert_close(model(x), threshnet_forward(name, state, x, training), rtol=1e-6, atol=1e-6)
    assert set(to_released(model)) == set(state)


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_torchvision_densenets(name):
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, name)(weights=None, num_classes=7).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    ours = load_released(create_model(name, num_classes=7, dtype=F64), theirs.state_dict())
    x = _images(64)
    for training in (False, True):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(to_released(ours))


def test_oldest_torchvision_key_names():
    model = create_model("densenet121", num_classes=3)
    state = to_released(model)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v
        for k, v in state.items()
        if not k.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    fresh = load_released(create_model("densenet121", num_classes=3), old)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_wrappers_and_prefixes(tmp_path, suffix):
    state = fill(threshnet_shapes("thresholdnet_v1"), dtype=torch.float32)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    model = load_released(create_model("thresholdnet_v1", num_classes=10), path)
    assert all(torch.equal(v, state[k]) for k, v in to_released(model).items())


def test_fine_tuning_keeps_a_fresh_head():
    state = fill(threshnet_shapes("thresholdnet_v1", classes=10), dtype=torch.float32)
    model = create_model("thresholdnet_v1", num_classes=3)
    head = model.head.weight.clone()
    load_released(model, state, head=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.stem.conv1.conv.weight, state["base.0.conv.weight"])


def test_bad_files(tmp_path):
    model = create_model("thresholdnet_v1", num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = fill(threshnet_shapes("thresholdnet_v1"), dtype=torch.float32)
    whole = tmp_path / "whole.pth"
    torch.save(state, whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.pth"
    text.write_text("hello")
    array = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], array)
    missing = {k: v for k, v in state.items() if k != "base.0.conv.weight"}
    wide = state | {"base.0.conv.weight": torch.zeros(48, 3, 3, 3)}
    cases = [
        (tmp_path / "none.pth", FileNotFoundError, "weights must be an existing file"),
        (cut, ValueError, "weights must be a whole file of tensors"),
        (text, ValueError, "weights must be a whole file of tensors"),
        (array, ValueError, "weights must be a state dict, got list"),
        (missing, ValueError, "weights must hold 'base.0.conv.weight'"),
        (wide, ValueError, "'base.0.conv.weight' must have shape (32, 3, 3, 3)"),
        (state | {"extra": torch.zeros(1)}, ValueError, "got 1 unknown keys such as 'extra'"),
        (fill(threshnet_shapes("thresholdnet_v1", 7)), ValueError, "num_classes must be the file's 7"),
        (create_model("densenet121").state_dict(), ValueError, "weights must hold 'base.0.conv.weight'"),
    ]
    for source, error, message in cases:
        with pytest.raises(error) as caught:
            load_released(model, source)
        assert message in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match="network must be one of our own models, got Linear"):
        load_released(torch.nn.Linear(1, 1), state)
