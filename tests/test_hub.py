"""save_pretrained and from_pretrained through a folder; nothing here needs a network."""

import json

import pytest
import torch
from safetensors.torch import load_file

import thresholdnet as tn
from thresholdnet.models import _hub


def blocks(model):
    return [module for module in model.modules() if isinstance(module, tn.ThresholdBlock)]


def _small():
    return tn.create_model("thresholdnet_bc", num_classes=4, in_chans=1, threshold=4, width_mult=0.25)


def test_round_trip(tmp_path):
    model = _small().eval()
    tn.save_pretrained(model, tmp_path / "new" / "folder")
    other = tn.from_pretrained(tmp_path / "new" / "folder")
    x = torch.randn(2, 1, 32, 32)
    assert not other.training and torch.equal(other(x), model(x))
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config == {
        "model": "thresholdnet_bc",
        "num_classes": 4,
        "in_chans": 1,
        "arguments": {"threshold": 4, "width_mult": 0.25},
        "dtype": "float32",
        "fused": False,
        "recompute": None,
    }
    assert set(load_file(tmp_path / "new" / "folder" / "model.safetensors")) == set(model.state_dict())


def test_baselines_and_replaced_heads(tmp_path):
    model = tn.create_model("resnet18", num_classes=3)
    tn.save_pretrained(model, tmp_path / "a")
    assert tn.from_pretrained(tmp_path / "a").fc.out_features == 3
    ours = _small()
    ours.reset_classifier(7)
    tn.save_pretrained(ours, tmp_path / "b")
    assert tn.from_pretrained(tmp_path / "b").num_classes == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_fused_and_recompute_come_back(dtype, tmp_path):
    model = tn.create_model("thresholdnet_v1", 3, dtype=dtype, fused=True, recompute="bottleneck").eval()
    tn.save_pretrained(model, tmp_path)
    other = tn.from_pretrained(tmp_path)
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert all(block.fused and block.recompute == "bottleneck" for block in blocks(other)) and other.fused
    plain = tn.from_pretrained(tmp_path, fused=False, recompute=None, dtype=torch.float32)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert not any(block.fused or block.recompute for block in blocks(plain)) and not plain.fused
    assert not any(block.fused or block.recompute for block in blocks(tn.from_pretrained(tmp_path, fused=False)))
    with pytest.raises(ValueError, match="recompute needs fused=True, got recompute='bottleneck' without it"):
        tn.from_pretrained(tmp_path, fused=False, recompute="bottleneck")
    by_name = tn.from_pretrained(tmp_path, backend="native", dtype=torch.float32)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(by_name(x), plain(x), rtol=1e-3, atol=1e-3)
    assert {block.backend for block in blocks(by_name)} == {"native"}


def test_what_the_loaded_model_shall_be(tmp_path):
    tn.save_pretrained(_small(), tmp_path)
    assert not any(block.fused for block in blocks(tn.from_pretrained(tmp_path)))
    assert all(block.fused for block in blocks(tn.from_pretrained(tmp_path, fused=True)))
    for options, error, message in (
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a floating-point torch.dtype, got 'bfloat16'"),
        ({"fused": "no"}, TypeError, "fused must be True or False, got 'no'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' is unknown"),
        (
            {"recompute": "bottleneck"},
            ValueError,
            "recompute must be None for thresholdnet_bc, which has no bottleneck",
        ),
    ):
        with pytest.raises(error, match=message):
            tn.from_pretrained(tmp_path, **options)
    if tn.backends()["triton"] is not None:
        with pytest.raises(RuntimeError, match="backend 'triton'"):
            tn.from_pretrained(tmp_path, fused=True, backend="triton")


def test_mixed_dtypes_keep_their_values(tmp_path):
    model = _small().bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.float()
    tn.save_pretrained(model, tmp_path)
    other = tn.from_pretrained(tmp_path)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert all(torch.equal(value, model.state_dict()[key].to(value)) for key, value in other.state_dict().items())


def test_configurations_of_earlier_versions(tmp_path):
    model = _small().eval()
    tn.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "fused", "recompute"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = tn.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(other(x), model(x)) and not other.fused


def test_a_changed_model_is_not_saved(tmp_path):
    """What could never be loaded: a head of other classes or kind, a layer more."""
    model = _small()
    width = model.num_features
    message = rf"with num_classes=4 as it was created, got \(7, {width}\) in place of \(4, {width}\) for head.weight"
    model.head = torch.nn.Linear(width, 7)
    with pytest.raises(ValueError, match=message):
        tn.save_pretrained(model, tmp_path / "a")
    model.head = torch.nn.Sequential(torch.nn.Linear(width, 4))
    with pytest.raises(ValueError, match=r"got nothing in place of \(4, .* for head.weight"):
        tn.save_pretrained(model, tmp_path / "a")
    model = _small()
    model.more = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got \(2, 2\) in place of nothing for more.weight"):
        tn.save_pretrained(model, tmp_path / "a")
    resnet = tn.create_model("resnet18", num_classes=3)
    resnet.fc = torch.nn.Linear(512, 4)
    with pytest.raises(ValueError, match="model must have the weights of resnet18 with num_classes=3"):
        tn.save_pretrained(resnet, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_models_of_timm(tmp_path):
    """Their averages are ours; any other pooling would be lost."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("thresholdnet.timm")
    model = timm.create_model("thresholdnet_bc", num_classes=3, width_mult=0.25).eval()
    tn.save_pretrained(model, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(tn.from_pretrained(tmp_path)(x), model(x))
    model = timm.create_model("thresholdnet_bc", num_classes=3, width_mult=0.25, global_pool="max")
    with pytest.raises(ValueError, match="model must pool averages to be saved, got global_pool='max'"):
        tn.save_pretrained(model, tmp_path)


def test_a_failed_write_leaves_the_previous_files_whole(tmp_path, monkeypatch):
    model = _small().eval()
    tn.save_pretrained(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_hub.HubModel, "_save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tn.save_pretrained(_small(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_bad_sources(tmp_path):
    tn.save_pretrained(_small(), tmp_path / "whole")

    def copy(name, edit):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((tmp_path / "whole" / file).read_bytes())
        edit(folder)
        return folder

    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])

    def unknown(folder):
        (folder / "config.json").write_text(json.dumps({"model": "thresholdnet_v9"}))

    def other(folder):
        (folder / "config.json").write_text(json.dumps({"model": "thresholdnet_v1"}))

    cases = [
        tmp_path / "nowhere",
        copy("cut", cut),
        copy("unknown", unknown),
        copy("other", other),
        copy("without config", lambda folder: (folder / "config.json").unlink()),
        copy("without weights", lambda folder: (folder / "model.safetensors").unlink()),
    ]
    said = []
    for folder in cases:
        with pytest.raises(ValueError, match="source must be a folder with config") as caught:
            tn.from_pretrained(folder, local_files_only=True)
        said.append(str(caught.value))
        assert "\n" not in said[-1] and len(said[-1]) < 1000
    assert "size mismatch for stem.conv1.conv.weight" in said[3]


def test_the_reason_names_key_and_shapes(tmp_path):
    tn.save_pretrained(_small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 5}))
    with pytest.raises(ValueError, match=r"size mismatch for head.weight: .*\[4, .*\[5, ") as caught:
        tn.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_models(tmp_path):
    with pytest.raises(ValueError, match="model must be a classifier made by create_model, got Linear"):
        tn.save_pretrained(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="model must be a classifier made by create_model"):
        tn.save_pretrained(tn.create_model("resnet18", features_only=True), tmp_path)
