"""save_pretrained and from_pretrained through a folder; nothing here needs a network."""

import json

import pytest
import torch
from safetensors.torch import load_file

import thresholdnet as tn
from thresholdnet.models import _hub


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
    for folder in cases:
        with pytest.raises(ValueError, match="source must be a folder with config"):
            tn.from_pretrained(folder, local_files_only=True)
    with pytest.raises(ValueError, match="model must be a classifier made by create_model, got Linear"):
        tn.save_pretrained(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="model must be a classifier made by create_model"):
        tn.save_pretrained(tn.create_model("resnet18", features_only=True), tmp_path)
