"""Exported files give what the model gives, in other runtimes and at other batch sizes."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch._inductor.config
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


def test_torchscript_without_the_package(tmp_path):
    """The file loads and gives the model's outputs where thresholdnet cannot be imported."""
    model = NETWORKS["threshold"]
    images = [torch.randn(batch, 3, 40, 40) for batch in (1, 5)]
    path = export(model, tmp_path / "model.pt", image_size=40)
    torch.save(images, tmp_path / "images")
    code = (
        "import sys, warnings; sys.modules['thresholdnet'] = None; warnings.simplefilter('ignore')\n"
        "import torch; model = torch.jit.load('model.pt')\n"
        "with torch.no_grad(): torch.save([model(x) for x in torch.load('images')], 'logits')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and path == tmp_path / "model.pt", done.stderr
    for x, logits in zip(images, torch.load(tmp_path / "logits"), strict=True):
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_of_a_fused_model(name):
    """torch.jit.trace by the user's own hand: plain operations, any batch, and no warning but torch's of its end."""
    model, x = NETWORKS[name], torch.randn(2, 3, 40, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        traced = torch.jit.trace(model, x)
    assert "thresholdnet::" not in str(traced.inlined_graph)
    for images in (x, torch.randn(5, 3, 40, 40)):
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_own_onnx_export_of_a_fused_model(name, tmp_path):
    model, x = NETWORKS[name], torch.randn(2, 3, 40, 40)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(logits, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_own_export_of_a_fused_model(name, tmp_path):
    """The package's operators are in the program, which is saved, and loaded where they are known."""
    model = NETWORKS[name]
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(2, 3, 40, 40),), dynamic_shapes=({0: batch},))
    assert "thresholdnet.block" in str(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(5, 3, 40, 40)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_scripting():
    """Of models of the zoo it is refused, in plain torch too: docs/tools.md says so."""
    x = torch.randn(2, 3, 40, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(tn.to_reference(copy.deepcopy(NETWORKS["converted"])))
        with pytest.raises(ValueError, match="BlockPlan"):
            torch.jit.script(tn.to_reference(copy.deepcopy(NETWORKS["threshold"])))
    torch.testing.assert_close(scripted(x), NETWORKS["converted"](x), rtol=1e-4, atol=1e-4)


def test_aotinductor_package(tmp_path):
    model = nn.Sequential(tn.ThresholdBlock(3, tn.links.dense(2), 8, fused=True), nn.Conv2d(16, 4, 1)).eval()
    package = torch._inductor.aoti_load_package(str(export(model, tmp_path / "a.pt2", "aoti", image_size=9)))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(package(x), model(x), rtol=1e-4, atol=1e-4)


def test_aotinductor_without_a_compiler(tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(RuntimeError, match="an AOTInductor package needs a C\\+\\+ compiler, which CXX may name"),
    ):
        export(nn.Conv2d(3, 4, 1), tmp_path / "a.pt2", "aoti", image_size=4)
    assert not (tmp_path / "a.pt2").exists()


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
    with pytest.raises(ValueError, match=r"path must end in \.onnx or \.pt2 or \.pt where .*, got '.*a\.tflite'"):
        export(model, tmp_path / "a.tflite")
    with pytest.raises(ValueError, match="to 'tflite' is unknown; known: onnx, pt2, torchscript, aoti"):
        export(model, tmp_path / "a.onnx", "tflite")
    with pytest.raises(ValueError, match=r"path must end in \.pt2 for an AOTInductor package, got '.*a\.so'"):
        export(model, tmp_path / "a.so", "aoti")
    with pytest.raises(ValueError, match="height"):
        export(model, tmp_path / "a.onnx", image_size=0)


def test_command(tmp_path):
    tn.save_pretrained(NETWORKS["threshold"], tmp_path / "saved")
    stdout, _ = run("export", tmp_path / "model.onnx", "--pretrained", tmp_path / "saved", "--image-size", 40)
    assert "images [N, 3, 40, 40]" in stdout
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].name == "images"
    _, stderr = run("export", tmp_path / "model.onnx", code=2)
    assert "one of --checkpoint, --pretrained, --model must be given, got none" in stderr
