"""Checkpoint files: written whole or not at all, read without running any code from them.

A checkpoint is what Lightning saves (weights, optimiser, loop positions) plus one entry, `"thresholdnet"`,
with all
that is needed to use the network: model name and arguments, class names, image size, normalisation.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import create_model

INFO_KEY = "thresholdnet"
FORMAT = 1  # raised when the meaning of an entry changes
_REQUIRED = ("model", "model_args", "num_classes", "in_chans", "classes", "image_size", "mean", "std", "ema")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network ready for evaluation.

    Attributes:
        model: in eval mode on the CPU; the averaged weights when the run kept them (`info["ema"]`).
        classes: class names; output i is `classes[i]`.
        image_size: side in pixels of the training images.
        mean, std: per channel; the network expects (image / 255 - mean) / std.
        info: everything else stored by the run: model, model_args, data, recipe, seed, epoch, step, history,
            ...
    """

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    info: dict[str, Any]


def load_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Read a checkpoint written by `thresholdnet train`.

    Raises:
        ValueError: missing, empty, cut off or foreign file, or weights that do not fit the model it names.
    """
    content = read_checkpoint(path)
    info = dict(content[INFO_KEY])
    model = create_model(
        info["model"], num_classes=info["num_classes"], in_chans=info["in_chans"], **info["model_args"]
    )
    prefix = "ema." if info["ema"] else "model."
    state = content["state_dict"]
    weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    _check_weights(path, info["model"], model.state_dict(), weights)
    if len(info["classes"]) != info["num_classes"]:
        raise ValueError(f"{path} names {len(info['classes'])} classes for a model of {info['num_classes']}")
    model.load_state_dict(weights)
    model.eval()
    return LoadedCheckpoint(
        model, tuple(info["classes"]), info["image_size"], tuple(info["mean"]), tuple(info["std"]), info
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The whole content of a checkpoint on the CPU, checked to be one of ours. Raises ValueError as above."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; give the .ckpt file inside")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise ValueError(f"checkpoint {path} is empty")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            cut = file.read(4) == b"PK\x03\x04"
        reason = "is cut off: its end is missing" if cut else "is no checkpoint of thresholdnet"
        raise ValueError(f"checkpoint {path} {reason}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error
    info = content.get(INFO_KEY) if isinstance(content, dict) else None
    if not isinstance(info, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"checkpoint {path} is no checkpoint of thresholdnet: no '{INFO_KEY}' entry")
    if info.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {info.get('format')}, this version reads {FORMAT}")
    missing = [key for key in _REQUIRED if key not in info]
    if missing:
        raise ValueError(f"checkpoint {path} lacks {', '.join(missing)}")
    return content


def write_atomic(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: to a neighbour first, flushed to disk, then moved over the old one.

    Raises:
        OSError: the write failed (full disk, no permission); a file that was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kept = "; the previous file is whole" if path.exists() else ""
            raise OSError(error.errno, f"cannot write {path} ({error.strerror}){kept}") from error
        raise


def save_atomic(content: Any, path: str | Path) -> None:
    """`torch.save` through `write_atomic`."""
    # Through memory: torch's own file writer reports a full disk as an internal error without a reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())


def link_atomic(source: str | Path, path: str | Path) -> None:
    """Make `path` a second name of `source`, in one step; a copy where the file system has no hard links.

    Safe for files that are only ever replaced, never changed in place.
    """
    source, path = Path(source), Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomic(path, source.read_bytes())
    else:
        temporary.replace(path)


def _check_weights(path: str | Path, model: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or extra:
        what = f"lacks {min(missing)}" if missing else f"has {min(extra)}, which the model lacks"
        more = len(missing | extra) - 1
        raise ValueError(f"checkpoint {path} does not fit model {model}: it {what} (and {more} more)")
    for key, value in wanted.items():
        if value.shape != found[key].shape:
            raise ValueError(
                f"checkpoint {path} does not fit model {model}: {key} has shape {list(found[key].shape)}, "
                f"the model needs {list(value.shape)}"
            )
