"""Data sets: small ones as uint8 tensors in memory, large image folders as lists of files.

Shape letters: N images of a split, H = W pixels.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks

DATASETS: dict[str, str] = {
    "digits": "8x8 grey digits of scikit-learn at 32x32, 10 classes, 1437 + 360 images; embedded",
    "cifar10": "CIFAR-10, 32x32, 10 classes, 50000 + 10000 images",
    "stl10": "STL-10 (labelled part), 96x96, 10 classes, 5000 + 8000 images",
    "imagefolder": "any folder with train/<class>/*.png and val/ or test/ alike",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IN_MEMORY_BYTES = 2 << 30  # decoded image folders up to here live on the training device as uint8
FOLDER_SIZE = 224  # pixels, image folders without an image_size
# ImageNet statistics (red, green, blue; images scaled to 0..1): the usual constants where ours are not
# measured.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """Images with labels, either in memory or as files.

    Attributes:
        labels: int64[N], class numbers.
        images: uint8 [N, 3, H, W], or None for a split of files.
        files: one path per image, or None for a split in memory without files.
    """

    labels: Tensor
    images: Tensor | None = None
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training.

    Attributes:
        name: a key of `DATASETS`.
        train, test: the two splits.
        classes: class names; label i is `classes[i]`.
        image_size: side in pixels of the images that the network gets.
        mean, std: per channel, of the training images scaled to 0..1.
        flip: whether a mirrored image keeps its class (a mirrored digit does not).
        resized_crop: training crops are random resized crops (image folders) rather than padded ones.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    resized_crop: bool = False


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    limit: int | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> ImageData:
    """Load a data set by name.

    Args:
        name: a key of `DATASETS`.
        root: folder with the real files; unused by digits. CIFAR-10 and STL-10 use torchvision's layout.
        download: let torchvision fetch missing files of CIFAR-10 and STL-10 into `root`.
        image_size: side in pixels; None keeps the native size (32, 32, 96; 224 for image folders).
        limit: keep at most this many images of each split, the same ones on every run.
        in_memory_bytes: image folders that take no more than this when decoded are kept in memory.

    Raises:
        TypeError, ValueError: unknown name, missing root or files, empty folder, folders without train/ and
            val/ or test/, classes that differ between the two, a corrupt image; one sentence each.
        RuntimeError: a library of the `train` extra is not installed.
    """
    checks.one_of("data", name, DATASETS)
    if image_size is not None:
        checks.integer("image_size", image_size, 1)
    if limit is not None:
        checks.integer("limit", limit, 1)
    checks.integer("in_memory_bytes", in_memory_bytes, 0)
    if name == "digits":
        data = _load_digits()
    else:
        path = _need_root(name, root, download)
        if name == "imagefolder":
            return _load_folders(path, image_size or FOLDER_SIZE, limit, in_memory_bytes)
        data = _load_torchvision(name, path, download)
    mean, std = channel_stats(_in_memory(data.train))
    data = replace(data, mean=mean, std=std)
    data = replace(data, train=_limited(data.train, limit), test=_limited(data.test, limit))
    if image_size and image_size != data.image_size:
        train, test = _rescaled(data.train, image_size), _rescaled(data.test, image_size)
        data = replace(data, image_size=image_size, train=train, test=test)
    return data


def channel_stats(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W], scaled to 0..1; exact integer sums."""
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in images.split(1024):
        wide = chunk.to(torch.int32)
        total += wide.sum((0, 2, 3), dtype=torch.int64)
        squares += (wide * wide).sum((0, 2, 3), dtype=torch.int64)
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    # A constant channel has deviation 0; one grey level keeps the division finite.
    std = (squares.double() / count - mean**2).clamp(min=0).sqrt().clamp(min=1.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 [3, H, W]; grey, palette, 16-bit and transparent images become RGB.

    Raises:
        ValueError: the file is no readable image (names the file).
    """
    return torch.from_numpy(np.array(_open_rgb(path))).permute(2, 0, 1)


def read_square(path: str | Path, size: int) -> Tensor:
    """Decode, scale the short side to `size` pixels and take the middle: uint8 [3, size, size]."""
    image = _open_rgb(path)
    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((wide, high), resample=2)  # 2 = bilinear with antialiasing
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def find_images(folder: str | Path) -> list[Path]:
    """All image files below `folder`, by suffix, sorted; hidden files and folders are left out."""
    found: list[Path] = []
    for where, inside, names in os.walk(folder):  # unlike is_dir(), asks a file system once a folder
        inside[:] = [name for name in inside if not name.startswith(".")]
        shown = (Path(where, name) for name in names if not name.startswith("."))
        found += (path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(found)


def missing_extra(library: str) -> RuntimeError:
    """The error for a library of the `train` extra that is not installed."""
    return RuntimeError(f"{library} is not installed; run: pip install 'thresholdnet[train]'")


def _open_rgb(path: str | Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow") from error
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 and 32 bit grey: PIL would clip these at 255
                deep = np.asarray(image, dtype=np.float64)
                top = 65535 if image.mode.startswith("I") else max(float(deep.max()), 1.0)
                image = Image.fromarray((deep * (255 / top)).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    # Pillow raises any of these for broken files, depending on the format (SyntaxError for broken PNG
    # chunks).
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        if str(path) in reason:
            reason = "not a known image format" if Path(path).exists() else "no such file"
        raise ValueError(f"{path} is no readable image: {reason}") from error


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise missing_extra("scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)
    # One split for ever, whatever the training seed: results of different seeds stay comparable.
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    targets = torch.from_numpy(labels).long()
    return ImageData(
        "digits",
        Split(targets[train], images[train]),
        Split(targets[test], images[test]),
        tuple("0123456789"),
        32,
        (0.0,) * 3,
        (1.0,) * 3,
        flip=False,
    )


def _load_torchvision(name: str, root: Path, download: bool) -> ImageData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise missing_extra("torchvision") from error
    try:
        if name == "cifar10":
            parts = [datasets.CIFAR10(str(root), train=train, download=download) for train in (True, False)]
            splits = [Split(torch.tensor(part.targets), _from_nhwc(part.data)) for part in parts]
        else:
            parts = [datasets.STL10(str(root), split=split, download=download) for split in ("train", "test")]
            splits = [Split(torch.from_numpy(p.labels).long(), torch.from_numpy(p.data).contiguous()) for p in parts]
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        if "not found or corrupted" in str(error):
            raise ValueError(
                f"no complete {name} files below root {root}; pass --download to fetch them, "
                "or --root for another folder"
            ) from error
        raise ValueError(f"{name} files below root {root} cannot be read: {error}") from error
    train, test = splits
    size = _in_memory(train).shape[-1]
    return ImageData(name, train, test, tuple(parts[0].classes), size, (0.0,) * 3, (1.0,) * 3)


def _from_nhwc(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _need_root(name: str, root: str | Path | None, download: bool) -> Path:
    if root is None:
        hint = "" if name == "imagefolder" else " (and --download to fetch them)"
        raise ValueError(f"data set {name} needs a root folder with its files: --root DIR{hint}")
    path = Path(root)
    if name != "imagefolder" and download:
        path.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        hint = "" if name == "imagefolder" else ", or pass --download to fetch the files there"
        raise ValueError(f"root {path} is no folder; give the folder of the {name} files with --root{hint}")
    return path


def _load_folders(root: Path, size: int, limit: int | None, in_memory_bytes: int) -> ImageData:
    test_dir = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_dir is None:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise ValueError(f"root {root} must hold train/ and val/ (or test/) with a folder per class, it has {have}")
    classes = _class_names(root / "train")
    other = _class_names(test_dir)
    if classes != other:
        odd = sorted(set(classes) ^ set(other))
        raise ValueError(
            f"train/ and {test_dir.name}/ below {root} must have the same class folders; "
            f"only one of them has {', '.join(odd[:5])}"
        )
    train, test = _list_split(root / "train", classes), _list_split(test_dir, classes)
    train, test = _limited(train, limit), _limited(test, limit)
    stored = size + size // 7  # training images keep a margin for random crops, as 256 to 224
    if 3 * (len(train) * stored**2 + len(test) * size**2) > in_memory_bytes:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        return ImageData("imagefolder", train, test, classes, size, mean, std, resized_crop=True)
    train, test = _decoded(train, stored), _decoded(test, size)
    mean_, std_ = channel_stats(_in_memory(train))
    return ImageData("imagefolder", train, test, classes, size, mean_, std_, resized_crop=True)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise ValueError(f"{folder} is empty: it must hold one folder of images per class")
    return names


def _list_split(folder: Path, classes: Sequence[str]) -> Split:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = find_images(folder / name)
        if not found:
            raise ValueError(f"{folder / name} is empty: it holds no image ({', '.join(IMAGE_SUFFIXES)})")
        files += map(str, found)
        labels += [label] * len(found)
    return Split(torch.tensor(labels), files=tuple(files))


def _decoded(split: Split, size: int) -> Split:
    files = split.files or ()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        images: Iterable[Tensor] = pool.map(lambda path: read_square(path, size), files)
        return replace(split, images=torch.stack(list(images)))


def _limited(split: Split, limit: int | None) -> Split:
    if limit is None or limit >= len(split):
        return split
    # A fixed shuffle: folders list their images class by class, and the first few would be of one class.
    keep = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:limit]
    files = tuple(split.files[i] for i in keep.tolist()) if split.files else None
    return Split(split.labels[keep], None if split.images is None else split.images[keep], files)


def _rescaled(split: Split, size: int) -> Split:
    chunks = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for chunk in _in_memory(split).split(1024)
    ]
    return replace(split, images=torch.cat(chunks))


def _in_memory(split: Split) -> Tensor:
    if split.images is None:
        raise ValueError("this split holds file names; its images are not in memory")
    return split.images
