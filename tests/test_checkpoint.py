"""Checkpoint files: whole or not at all, and clear about what is wrong with them."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from thresholdnet.checkpoint import FORMAT, INFO_KEY, link_atomic, load_checkpoint, save_atomic, write_atomic
from thresholdnet.models import create_model

MODEL, ARGS = "thresholdnet_ab", {"width_mult": 0.25}


def content(ema: bool = False, classes: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    prefix = "ema." if ema else "model."
    state = create_model(MODEL, num_classes=classes, **ARGS).state_dict()
    return {
        "state_dict": {prefix + key: value for key, value in state.items()},
        INFO_KEY: {
            "format": FORMAT,
            "model": MODEL,
            "model_args": ARGS,
            "num_classes": classes,
            "in_chans": 3,
            "classes": [f"c{i}" for i in range(classes)],
            "image_size": 32,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
            "ema": ema,
        },
    }


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip(tmp_path: Path, ema: bool) -> None:
    saved = content(ema)
    saved["state_dict"]["model.other" if ema else "ema.other"] = torch.zeros(1)
    save_atomic(saved, tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    assert loaded.classes == ("c0", "c1", "c2", "c3") and loaded.image_size == 32
    assert loaded.mean == (0.5, 0.5, 0.5) and loaded.std == (0.2, 0.2, 0.2)
    assert not loaded.model.training
    prefix = "ema." if ema else "model."
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, saved["state_dict"][prefix + key])


def test_bad_files_get_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read: No such file"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"is a folder; give the \.ckpt file inside"):
        load_checkpoint(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.ckpt is empty"):
        load_checkpoint(path)
    path.write_bytes(b"hello world")
    with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint of thresholdnet"):
        load_checkpoint(path)
    torch.save({"state_dict": {"x": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint of thresholdnet: no 'thresholdnet' entry"):
        load_checkpoint(path)
    torch.save(torch.nn.Linear(2, 2), path)  # holds code: must not be unpickled
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    newer = content()
    newer[INFO_KEY]["format"] = FORMAT + 1
    torch.save(newer, path)
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, this version reads {FORMAT}"):
        load_checkpoint(path)
    lacking = content()
    del lacking[INFO_KEY]["classes"], lacking[INFO_KEY]["mean"]
    torch.save(lacking, path)
    with pytest.raises(ValueError, match="lacks classes, mean"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_cut_file(tmp_path: Path, part: float) -> None:
    path = tmp_path / "a.ckpt"
    save_atomic(content(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"a\.ckpt is cut off"):
        load_checkpoint(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    wrong = content()
    wrong[INFO_KEY] |= {"num_classes": 5, "classes": list("abcde")}
    torch.save(wrong, path)
    with pytest.raises(ValueError, match=r"does not fit model thresholdnet_ab: .* has shape \[4.*needs \[5"):
        load_checkpoint(path)
    wrong = content()
    wrong[INFO_KEY]["classes"] = ["a"]
    torch.save(wrong, path)
    with pytest.raises(ValueError, match="names 1 classes for a model of 4"):
        load_checkpoint(path)
    wrong = content()
    del wrong["state_dict"][next(iter(wrong["state_dict"]))]
    torch.save(wrong, path)
    with pytest.raises(ValueError, match=r"does not fit model thresholdnet_ab: it lacks .* \(and 0 more\)"):
        load_checkpoint(path)
    wrong = content()
    wrong[INFO_KEY]["model"] = "thresholdnet_av"
    torch.save(wrong, path)
    with pytest.raises(ValueError, match="thresholdnet_av"):
        load_checkpoint(path)


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """The system itself refuses to write more than 64 KiB."""
    path = tmp_path / "a.ckpt"
    save_atomic({"old": torch.arange(4)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.ckpt .*; the previous file is whole"):
            save_atomic({"new": torch.zeros(1 << 18)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path, weights_only=True)["old"].tolist() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["a.ckpt"], "nothing half-written is left"


def test_killed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """A process that dies between writing and moving leaves the old file in place."""
    path = tmp_path / "a"
    write_atomic(path, b"old")
    if (child := os.fork()) == 0:
        os.fsync = lambda _: os._exit(9)
        write_atomic(path, b"new content")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == b"old"


def test_link_is_independent_of_later_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"one")
    link_atomic(tmp_path / "a", tmp_path / "b")
    write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "b").read_bytes() == b"one"

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    link_atomic(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"two"
