"""Exported files give what the model gives, in other runtimes and at other batch sizes."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from test_cli import run
from test_convert import randomise
from torch import nn

import thresholdnet as tn
from thresholdnet.export import export, plain

onnxruntime = pytest.importorskip("onnxruntime")


def networks():
    """Name -> a small fused or converted network with random statistics."""
    torch.manual_seed(0)
    yield "converted", tn.convert(torchvision.models.DenseNet(8, (3, 2), 12, num_classes=7), report=None)
    yield "threshold", tn.create_model("thresholdnet_bc", num_classes=7, width_mult=0.25, fused=True)


NETWORKS = {name: randomise(model).eval() for name, model in networks()}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_outputs(name):
    model = copy.deepcopy(NETWORKS[name]).double()
    folded = plain(model)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (model, folded))
    behind_convolutions = {"converted": 6, "threshold": before}  # the other BatchNorms stand before an activation
    assert before - after == behind_convolutions[name]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_in_onnxruntime(name, batch, tmp_path):
    model = NETWORKS[name]
    path = export(model, tmp_path / "model.onnx", image_size=(40, 33))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(batch, 3, 40, 33)
    (logits,) = session.run(None, {"images": x.numpy()})
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert (np.argsort(logits, 1)[:, ::-1][:, :5] == np.argsort(expected, 1)[:, ::-1][:, :5]).all()


@pytest.mark.parametrize("batch", [1, 5])
def test_torch_export(batch, tmp_path):
    model = NETWORKS["threshold"]
    program = torch.export.load(export(model, tmp_path / "model.pt2", image_size=40))
    x = torch.randn(batch, 3, 40, 40)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_alone():
    model = NETWORKS["threshold"].train()
    state = copy.deepcopy(model.state_dict())
    plain(model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert model.training
    assert any(block.fused for block in model.modules() if isinstance(block, tn.ThresholdBlock))
    model.eval()


def test_bad_arguments(tmp_path):
    model = NETWORKS["threshold"]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        export("thresholdnet_v1", tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"path must end in \.onnx or \.pt2 .*, got '.*a\.tflite'"):
        export(model, tmp_path / "a.tflite")
    with pytest.raises(ValueError, match="to 'tflite' is unknown; known: onnx, pt2"):
        export(model, tmp_path / "a.onnx", "tflite")
    with pytest.raises(ValueError, match="height"):
        export(model, tmp_path / "a.onnx", image_size=0)


def test_command(tmp_path):
    tn.save_pretrained(NETWORKS["threshold"], tmp_path / "saved")
    stdout, _ = run("export", tmp_path / "model.onnx", "--pretrained", tmp_path / "saved", "--image-size", 40)
    assert "images [N, 3, 40, 40]" in stdout
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].name == "images"
    _, stderr = run("export", tmp_path / "model.onnx", code=2)
    assert "one of --checkpoint, --pretrained, --model must be given, got none" in stderr
