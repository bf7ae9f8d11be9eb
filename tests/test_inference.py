"""Evaluation, prediction and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from thresholdnet import figures
from thresholdnet.checkpoint import LoadedCheckpoint
from thresholdnet.data import load_data
from thresholdnet.inference import evaluate, evaluate_data, list_images, predict


class Brightness(nn.Module):
    """Says which of ten grey levels an image has; a network whose answers are known."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.mean((1, 2, 3), keepdim=False)[:, None]
        return -((level * 10 - 0.5 - torch.arange(10)) ** 2)


@pytest.fixture
def loaded() -> LoadedCheckpoint:
    info = {"data": "digits"}
    return LoadedCheckpoint(Brightness(), tuple("0123456789"), 32, (0.0,) * 3, (1.0,) * 3, info)


def grey_files(folder: Path, levels: tuple[int, ...]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{level}.png" for level in levels]
    for path, level in zip(paths, levels, strict=True):
        Image.new("L", (50, 40), level * 25 + 13).save(path)
    return paths


def test_evaluate_equals_a_direct_count(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    report = evaluate(loaded, batch_size=37, limit=150, figure=tmp_path / "confusion.png", progress=False)
    test = load_data("digits", limit=150).test
    assert test.images is not None
    logits = Brightness()(test.images.float() / 255)
    predicted = logits.argmax(1)
    assert report["images"] == 150
    assert report["accuracy"] == pytest.approx((predicted == test.labels).float().mean().item())
    assert report["loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (test.labels.numpy(), predicted.numpy()), 1)
    assert report["confusion"] == confusion.tolist()
    for i, row in enumerate(report["classes"]):
        assert row["name"] == str(i) and row["support"] == confusion[i].sum()
        assert row["recall"] == pytest.approx(confusion[i, i] / confusion[i].sum())
        claimed = confusion[:, i].sum()
        assert row["precision"] == (pytest.approx(confusion[i, i] / claimed) if claimed else None)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_kept_samples_are_the_test_images(loaded: LoadedCheckpoint) -> None:
    data = load_data("digits", limit=20)
    samples = evaluate_data(loaded, data, batch_size=8, keep=12)["samples"]
    assert data.test.images is not None
    assert torch.equal(samples["images"], data.test.images[:12])
    assert samples["labels"] == data.test.labels[:12].tolist() and len(samples["predicted"]) == 12


def test_predict_files_and_folders(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    grey_files(tmp_path / "a" / "deep", (0, 4, 9))
    (single,) = grey_files(tmp_path / "b", (7,))
    results = predict(loaded, [tmp_path / "a", single], 3, batch_size=2, figure=tmp_path / "s.png", progress=False)
    assert [result["class"] for result in results] == ["0", "4", "9", "7"]
    assert results[3]["path"] == str(single)
    for result in results:
        values = [entry["probability"] for entry in result["top"]]
        assert len(values) == 3 and values == sorted(values, reverse=True) and sum(values) <= 1 + 1e-6
        assert result["top"][0]["class"] == result["class"] and result["probability"] == values[0]
    assert len(predict(loaded, single, 99, progress=False)[0]["top"]) == 10
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_bad_input_gets_one_sentence(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    (path,) = grey_files(tmp_path / "a", (3,))
    with pytest.raises(ValueError, match=r"image .*nothing\.png does not exist"):
        predict(loaded, tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="at least one image file or folder, got none"):
        list_images([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder .*empty is empty"):
        predict(loaded, tmp_path / "empty")
    (tmp_path / "bad.png").write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"bad\.png is no readable image"):
        predict(loaded, [path, tmp_path / "bad.png"])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        predict(loaded, path, 0)
    with pytest.raises(ValueError, match="device must be a torch device"):
        predict(loaded, path, device="toaster")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        predict(tmp_path / "none.ckpt", path)
    other = LoadedCheckpoint(Brightness(), ("cat", "dog"), 32, (0.0,) * 3, (1.0,) * 3, {"data": "digits"})
    with pytest.raises(ValueError, match=r"must have the same classes: the checkpoint knows 2 .* has 10"):
        evaluate(other)


def test_a_folder_that_cannot_be_written_is_said_first(
    loaded: LoadedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresholdnet.checks.os.access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr("thresholdnet.inference.evaluate_data", None)
    with pytest.raises(ValueError, match=f"figure must lead to a folder that can be written, got {tmp_path}"):
        evaluate(loaded, figure=tmp_path / "new" / "c.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_figure(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, (classes, classes)) + 60 * np.eye(classes, dtype=int)
    figures.confusion(counts.tolist(), [f"a long class name {i}" for i in range(classes)], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 300
    with pytest.raises(ValueError, match="counts for 3 classes"):
        figures.confusion(counts.tolist(), ["a"] * 3, tmp_path / "c.png")


@pytest.mark.parametrize("number", [1, 3, 100])
def test_contact_sheet(tmp_path: Path, number: int) -> None:
    images = torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8)
    names = ["airplane"] * number
    figures.contact_sheet(images, names, [0.5] * number, tmp_path / "s.png", truth=["ship", *names[1:]])
    with Image.open(tmp_path / "s.png") as image:
        assert image.size[0] > 200
    with pytest.raises(ValueError, match="needs images and one label for each"):
        figures.contact_sheet(images, names[1:], [0.5] * number, tmp_path / "s.png")


def test_curve_figure(tmp_path: Path) -> None:
    row = {"train_loss": 1.0, "test_loss": 1.2, "train_accuracy": 0.5, "test_accuracy": 0.4}
    figures.curve([row | {"epoch": 1}], tmp_path / "one.png")
    figures.curve([row | {"epoch": i} for i in range(1, 201)], tmp_path / "many.png", title="a run")
    assert (tmp_path / "many.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least one epoch"):
        figures.curve([], tmp_path / "none.png")
