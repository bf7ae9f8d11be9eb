"""Training where users go wrong: settings, folders that are in use, data that is not the run's, odd files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from thresholdnet import cli, figures
from thresholdnet.checkpoint import INFO_KEY, read_checkpoint
from thresholdnet.data import find_images, load_data
from thresholdnet.loaders import make_loader, share_sizes
from thresholdnet.models import create_model
from thresholdnet.train import TrainConfig, make_recipe, train

TINY: dict[str, Any] = {
    "model": "thresholdnet_ab",
    "model_args": {"width_mult": 0.25},
    "data": "digits",
    "limit": 24,
    "epochs": 1,
    "batch_size": 8,
    "recipe": "released",
    "quiet": True,
    "accelerator": "cpu",
}


def tiny(out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**(TINY | changes), out_dir=str(out))


def folders(root: Path, classes: tuple[str, ...], count: int = 2) -> Path:
    """An image folder of random pixels, the same for the same classes."""
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("flip", "no", "flip must be True or False, got 'no'"),
        ("normalize", "off", "normalize must be True or False, got 'off'"),
        ("milestones", 5, "milestones must be a list of epochs, got 5"),
        ("milestones", "ab", "milestones must be a list of epochs, got 'ab'"),
        ("milestones", [1.5], "milestones entry must be an integer"),
        ("milestones", [-1], "milestones entry must be at least 0"),
        ("base", "modern", "recipe field 'base' is unknown"),
    ],
)
def test_recipe_fields_are_checked(field: str, value: object, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence.replace("[", r"\[")):
        make_recipe("modern", **{field: value})


def test_recipe_args_may_name_any_field() -> None:
    assert TrainConfig(recipe_args={"epochs": 7, "lr": 0.5}).full_recipe().epochs == 7
    assert TrainConfig(recipe_args={"epochs": 7}, epochs=3).full_recipe().epochs == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 2**64}, "seed must be from 0 to"),
        ({"model_args": {"features_only": True}}, "model thresholdnet_ab takes .*, got 'features_only'"),
        ({"model_args": {"num_classes": 5}}, "model thresholdnet_ab takes .*, got 'num_classes'"),
        ({"model_args": {"fused": True}}, "model thresholdnet_ab takes .*, got 'fused'"),
        ({"limit": 1}, "more than one image for BatchNorm at 32x32 pixels, got batches of 1 from 1 images"),
        ({"limit": 3, "batch_size": 2}, "got batches of 1 from 3 images at batch_size 2"),
    ],
)
def test_settings_are_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        train(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_one_network_on_the_meta_device_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock(side_effect=create_model)
    monkeypatch.setattr("thresholdnet.train.run.create_model", made)
    sizes = share_sizes(17, 4, 1)
    train(tiny(tmp_path, limit=17, batch_size=4, fused=True, backend="native"))
    assert [call.kwargs.get("device") for call in made.call_args_list] == ["meta", None] and min(sizes) == 3
    monkeypatch.setattr("thresholdnet.train.run.share_sizes", lambda *_: [17, 1])
    with pytest.raises(ValueError, match="got batches of 1 from 17 images at batch_size 4"):
        train(tiny(tmp_path / "other", limit=17, batch_size=4))


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a machine without")
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_accelerators_that_are_not_here(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"accelerator must be one that this machine has, got {name}"):
        train(tiny(tmp_path, accelerator=name))


@pytest.mark.parametrize(
    ("recipe", "changes", "flip", "crop"), [("released", {}, True, 0), ("modern", {"flip": False}, False, 4)]
)
def test_a_run_augments_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, changes: dict[str, Any], flip: bool, crop: int
) -> None:
    made = mock.Mock(side_effect=make_loader)
    monkeypatch.setattr("thresholdnet.train.run.make_loader", made)
    train(tiny(tmp_path, recipe=recipe, recipe_args=changes))
    assert {(call.kwargs["flip"], call.kwargs["crop_padding"]) for call in made.call_args_list} == {(flip, crop)}


def test_the_rate_is_that_of_the_images_in_a_step(tmp_path: Path) -> None:
    result = train(tiny(tmp_path, recipe="modern", batch_size=10_000, recipe_args={"schedule": "constant"}))
    assert result["history"][0]["lr"] == pytest.approx(0.02 * 24 / 100)


@pytest.mark.parametrize("classes", [("x", "y"), ("a", "b", "c")])
def test_other_classes_are_not_taken_up(tmp_path: Path, classes: tuple[str, ...]) -> None:
    settings: dict[str, Any] = {"data": "imagefolder", "image_size": 32, "limit": None, "batch_size": 4}
    out = tmp_path / "run"
    train(tiny(out, **settings, root=folders(tmp_path / "one", ("a", "b"))))
    before = {name: (out / name).read_bytes() for name in ("config.json", "checkpoints/last.ckpt")}
    other = folders(tmp_path / "two", classes)
    more = folders(tmp_path / "more", ("a", "b"), 5)
    for root, given in ((other, "4 of x, y" if len(classes) == 2 else "6 of a, b, c"), (more, "10 of a, b")):
        with pytest.raises(ValueError, match=f"was trained on 4 images of a, b, given {given}"):
            train(tiny(out, **settings | {"root": root, "epochs": 2, "resume": True}))
    assert before == {name: (out / name).read_bytes() for name in before}


def test_best_alone_is_gone_on_from(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(tmp_path))
    first = (tmp_path / "metrics.csv").read_text()
    train(tiny(tmp_path, epochs=2, resume=True))
    assert (tmp_path / "metrics.csv").read_text().startswith(first)  # the first epoch's times too


def test_one_run_a_folder_and_no_leftovers(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    left = tmp_path / "checkpoints" / ".last.ckpt.1.tmp"
    left.touch()
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run works in"):
            train(tiny(tmp_path))
        assert left.exists() and not (tmp_path / "config.json").exists()
        other.kill()
    train(tiny(tmp_path))
    assert not left.exists()


def test_a_run_that_fits_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(tmp_path))
    size = (tmp_path / "checkpoints" / "last.ckpt").stat().st_size
    usage = shutil._ntuple_diskusage(10 * size, 0, int(2.5 * size))  # type: ignore[attr-defined]  # the tuple that disk_usage returns
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    train(tiny(tmp_path, epochs=2, resume=True))
    with pytest.raises(OSError, match="too little room"):
        train(tiny(tmp_path / "new"))


def test_a_checkpoint_is_checked_at_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(tmp_path))
    read = mock.Mock(side_effect=read_checkpoint)
    monkeypatch.setattr("thresholdnet.train.config.read_checkpoint", read)
    assert train(tiny(tmp_path, epochs=2, resume=True))["epochs"] == 2
    read.assert_called_once_with(tmp_path / "checkpoints" / "last.ckpt")


def test_resume_with_the_recipe_named_again_keeps_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(tmp_path, recipe="modern"))
    command = ["thresholdnet", "train", "--out", str(tmp_path), "--resume", "--recipe", "modern", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")[INFO_KEY]["epoch"] == 1


def test_a_torch_without_the_device_gets_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def application(prog_name: str) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.delenv("THRESHOLDNET_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(application)  # type: ignore[arg-type]  # all that main does is call it
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: Torch not compiled with CUDA enabled\n"


def test_export_refuses_images_of_no_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["thresholdnet", "export", str(tmp_path / "x.pt"), "--model", "thresholdnet_ab", "--image-size", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "at least 1, got 0" in capsys.readouterr().err


def test_hidden_folders_and_folders_named_as_images(tmp_path: Path) -> None:
    root = folders(tmp_path / ".data", ("a", "b"))  # a hidden folder above is the user's own choice
    (root / "train" / "a" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "a" / ".ipynb_checkpoints" / "0.png").write_bytes(b"broken")
    (root / "train" / "a" / "album.png").mkdir()
    (root / "train" / "a" / "album.png" / "inside.png").write_bytes((root / "train" / "a" / "0.png").read_bytes())
    assert [str(p.relative_to(root / "train" / "a")) for p in find_images(root / "train" / "a")] == [
        "0.png",
        "1.png",
        "album.png/inside.png",
    ]


def test_figures_take_any_class_name(tmp_path: Path) -> None:
    names = ["$5$ off_{", "x^$^$", os.fsdecode(b"\xff\xfe"), "plain"]
    figures.confusion(np.eye(4, dtype=int).tolist(), names, tmp_path / "c.png")
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    figures.contact_sheet(images, names, [0.5] * 4, tmp_path / "s.png", truth=names[::-1])
    figures.contact_sheet(images, names, [0.5] * 4, tmp_path / "p.png", captions=names)
    assert all((tmp_path / f"{name}.png").stat().st_size for name in "csp")


def test_uncropped_training_images_are_the_same_in_memory_and_on_disk(tmp_path: Path) -> None:
    root = tmp_path / "data"
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
        Image.fromarray(np.broadcast_to(ramp, (96, 96)).copy()).save(root / part / "a" / "0.png")
    batches = []
    for budget in (1 << 30, 0):
        data = load_data("imagefolder", root, image_size=32, in_memory_bytes=budget)
        loader = make_loader(data, train=True, batch_size=1, std=(1.0,) * 3)
        batches.append(next(iter(loader))[0])
    torch.testing.assert_close(*batches, atol=2 / 255, rtol=0)


def test_images_of_a_run_are_noted(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")[INFO_KEY]["train_images"] == 24
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["batch_size"] == 8
