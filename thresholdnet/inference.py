"""Use a trained network: accuracy on a data set, classes of image files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from . import checks, figures, places
from .checkpoint import LoadedCheckpoint, load_checkpoint
from .data import IMAGE_SUFFIXES, ImageData, find_images, load_data, read_square
from .loaders import make_loader

T = TypeVar("T")


def evaluate(
    checkpoint: str | Path | LoadedCheckpoint,
    data: str | None = None,
    root: str | Path | None = None,
    *,
    download: bool = False,
    batch_size: int = 100,
    limit: int | None = None,
    device: str | torch.device | None = None,
    workers: int = 2,
    progress: bool = True,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a checkpoint on the test images of a data set.

    Args:
        checkpoint: a file, or what `load_checkpoint` returned.
        data: data set; None takes the one it was trained on.
        root, download, limit: as in `thresholdnet.data.load_data`.
        device: None takes the GPU when there is one.
        figure: write the confusion matrix as a PNG there; its folder is made first.

    Returns:
        `accuracy`, `loss` (cross entropy), `classes` (a list of dicts: name, precision, recall,
        support; the first two None where undefined), `confusion` (rows true, columns predicted),
        `images`, `seconds`, `images_per_second`.

    Raises:
        TypeError, ValueError: bad checkpoint or data; classes that do not match; no place for `figure`.
    """
    loaded = checkpoint if isinstance(checkpoint, LoadedCheckpoint) else load_checkpoint(checkpoint)
    if figure is not None:
        checks.output_file("figure", figure)
    images = load_data(data or loaded.info["data"], root, download=download, image_size=loaded.image_size, limit=limit)
    report = evaluate_data(loaded, images, batch_size=batch_size, device=device, workers=workers, progress=progress)
    if figure is not None:
        figures.confusion(report["confusion"], loaded.classes, figure)
    return report


@torch.no_grad()
def evaluate_data(
    loaded: LoadedCheckpoint,
    data: ImageData,
    *,
    batch_size: int = 100,
    device: str | torch.device | None = None,
    workers: int = 0,
    progress: bool = False,
    keep: int = 0,
) -> dict[str, Any]:
    """`evaluate` on data that is loaded already.

    With `keep` the result also has `samples`: the first so many test images (uint8 [n, 3, H, W]) with
    their labels, predicted classes and probabilities.
    """
    checks.integer("batch_size", batch_size, 1)
    if tuple(data.classes) != loaded.classes:
        raise ValueError(
            f"the checkpoint and the data set must have the same classes: the checkpoint knows "
            f"{len(loaded.classes)} ({', '.join(loaded.classes[:3])}, ...), data set {data.name} has "
            f"{len(data.classes)} ({', '.join(data.classes[:3])}, ...)"
        )
    where = pick_device(device)
    model = loaded.model.to(where).eval()
    loader = make_loader(
        data,
        train=False,
        batch_size=batch_size,
        mean=loaded.mean,
        std=loaded.std,
        device=where,
        workers=workers,
    )
    count = len(loaded.classes)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    loss, kept = 0.0, _Kept(keep, loaded)
    started = time.perf_counter()
    for images, labels in _tracked(loader, "evaluating", progress):
        logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        predicted = logits.argmax(1)
        pairs = labels * count + predicted
        confusion += torch.bincount(pairs, minlength=count**2).view(count, count).cpu()
        kept.add(images, labels, logits)
    seconds = time.perf_counter() - started
    total = int(confusion.sum())
    report = {
        "data": data.name,
        "images": total,
        "accuracy": int(confusion.diagonal().sum()) / total,
        "loss": loss / total,
        "classes": _class_table(confusion, loaded.classes),
        "confusion": confusion.tolist(),
        "seconds": seconds,
        "images_per_second": total / seconds,
    }
    return report | ({"samples": kept.result()} if keep else {})


@torch.no_grad()
def predict(
    checkpoint: str | Path | LoadedCheckpoint,
    paths: str | Path | Sequence[str | Path],
    top_k: int = 5,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
    figure: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Classes of image files.

    Args:
        checkpoint: a file, or what `load_checkpoint` returned.
        paths: image files and folders (searched recursively).
        top_k: how many classes to list per image, at most all.
        figure: write a contact sheet of the first images there; its folder is made first.

    Returns:
        Per image: `path`, `class`, `probability`, and `top`, a list of {class, index, probability}
            with the
        likeliest first.

    Raises:
        TypeError, ValueError: bad checkpoint, a missing path, an empty folder, a corrupt image (names it); no place
            for `figure`.
    """
    checks.integer("top_k", top_k, 1)
    checks.integer("batch_size", batch_size, 1)
    files = list_images(paths)
    loaded = checkpoint if isinstance(checkpoint, LoadedCheckpoint) else load_checkpoint(checkpoint)
    if figure is not None:
        checks.output_file("figure", figure)
    where = pick_device(device)
    model = loaded.model.to(where).eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(where) for values in (loaded.mean, loaded.std))
    results: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    chunks = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    for chunk in _tracked(chunks, "predicting", progress):
        pixels = torch.stack([read_square(path, loaded.image_size) for path in chunk])
        if figure is not None and len(results) < figures.SHEET_LIMIT:
            kept.append(pixels)
        scores = F.softmax(model((pixels.to(where).float() / 255 - mean) / std).float(), 1)
        top = scores.topk(min(top_k, len(loaded.classes)), 1)
        for path, values, indices in zip(chunk, top.values.tolist(), top.indices.tolist(), strict=True):
            ranked = [
                {"class": loaded.classes[i], "index": i, "probability": value}
                for value, i in zip(values, indices, strict=True)
            ]
            best = ranked[0]
            results.append(
                {"path": str(path), "class": best["class"], "probability": best["probability"], "top": ranked}
            )
    if figure is not None:
        images = torch.cat(kept)
        shown = results[: len(images)]
        figures.contact_sheet(
            images,
            [r["class"] for r in shown],
            [r["probability"] for r in shown],
            figure,
            captions=[Path(r["path"]).name for r in shown],
        )
    return results


def list_images(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Image files among `paths`, folders searched recursively; ValueError for missing and empty ones."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ValueError("paths must name at least one image file or folder, got none")
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found = find_images(path)
            if not found:
                raise ValueError(f"folder {path} is empty: it holds no image ({', '.join(IMAGE_SUFFIXES)})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"image {path} does not exist")
    return files


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or the GPU when there is one, or the CPU."""
    return places.device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Kept:
    """Collects the first test images with what the network says of them."""

    def __init__(self, count: int, loaded: LoadedCheckpoint) -> None:
        self.count = count
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (loaded.mean, loaded.std))
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        self.predicted: list[int] = []
        self.probability: list[float] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        room = self.count - len(self.labels)
        if room <= 0:
            return
        pixels = (images[:room].cpu() * self.std + self.mean) * 255
        self.images.append(pixels.round().clamp(0, 255).to(torch.uint8))
        best = F.softmax(logits[:room], 1).max(1)
        self.labels += labels[:room].tolist()
        self.predicted += best.indices.tolist()
        self.probability += best.values.tolist()

    def result(self) -> dict[str, Any]:
        return {
            "images": torch.cat(self.images),
            "labels": self.labels,
            "predicted": self.predicted,
            "probability": self.probability,
        }


def _class_table(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    hits = confusion.diagonal().tolist()
    support, claimed = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    return [
        {
            "name": name,
            "precision": hits[i] / claimed[i] if claimed[i] else None,
            "recall": hits[i] / support[i] if support[i] else None,
            "support": support[i],
        }
        for i, name in enumerate(classes)
    ]


def _tracked(items: Iterable[T], text: str, progress: bool) -> Iterator[T]:
    """`items` with a bar on stderr, for terminals only."""
    quiet = not (progress and sys.stderr.isatty())
    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, text, total=total, console=Console(stderr=True), transient=True, disable=quiet)
