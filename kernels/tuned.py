"""Measured launch choices: one JSON file a GPU, read once, that goes before the rules of `configs.py`.

`bench/tune.py` writes the files. {"gpu": name, "capability": [major, minor], "rows": [...]}; a row is a shape (the
fields of `Shape`) with a "tile" for the Triton kernels (fields of a config of `configs.py`), a "form" for the CUDA ones
(see `cuda_launch.convolution_form`), or both; what else it says (times) is not read here. A shape without a row gets
the rule. A damaged file is ignored with a warning.

Environment: THRESHOLDNET_TUNED=0 switches the tables off, another value names the folder that holds them.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .configs import DTYPES, MOST_SPLITS, ConvolutionConfig, ReadersConfig, WeightGradientConfig
from .tables import MAX_TAPS

FOLDER = Path(__file__).parent / "tuned"
FORMS = ("gemm", "wide", "upright", "library")

Tile = ConvolutionConfig | WeightGradientConfig | ReadersConfig
TILES: dict[str, type[Tile]] = {
    "forward": ConvolutionConfig, "gradient": ConvolutionConfig, "weight": WeightGradientConfig,
    "readers": ReadersConfig,
}  # fmt: skip
"""The tile of each kind of shape."""


class Shape(NamedTuple):
    """What a choice is made for: a convolution of in_channels to out_channels over batch x height x width pixels.

    kind: "forward"; "gradient", the data gradient of a slot of out_channels, gathered from in_channels of its readers;
    "weight", the weight gradient of that forward convolution; or "readers", what a group of readers behind
    BatchNorm send to slots of out_channels together, from in_channels of all readers together. affine: an affine and an
    activation on load.
    """

    kind: str
    dtype: str
    kernel_size: int
    affine: bool
    in_channels: int
    out_channels: int
    batch: int
    height: int
    width: int


class Choice(NamedTuple):
    """What a row says; None where it says nothing."""

    tile: Tile | None = None
    form: str | None = None


def choice(device: torch.device, shape: Shape) -> Choice:
    """The row of this shape in the device's table; an empty choice where there is none."""
    return table_of(device).get(shape, NOTHING)


NOTHING = Choice()


@lru_cache(maxsize=64)
def table_of(device: torch.device) -> Mapping[Shape, Choice]:
    """A device's table, read at the first call; empty where there is none, or none that can be used."""
    place = folder()
    if place is None:
        return {}
    gpu, capability = identity(device)
    path = place / file_name(gpu, capability)
    if not path.is_file():
        return {}
    try:
        return read(path, gpu, capability)
    except (OSError, ValueError) as error:
        warnings.warn(f"launch table ignored: {error}", RuntimeWarning, stacklevel=2)
        return {}


def folder() -> Path | None:
    """Where tables lie; None where they are switched off."""
    where = os.environ.get("THRESHOLDNET_TUNED", "")
    return None if where == "0" else Path(where or FOLDER)


def identity(device: torch.device) -> tuple[str, tuple[int, int]]:
    """A GPU's name and compute capability; "cpu" and (0, 0) in Triton's interpreter and the emulator."""
    if device.type != "cuda":
        return device.type, (0, 0)
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def file_name(gpu: str, capability: tuple[int, int]) -> str:
    """("NVIDIA H200", (9, 0)) -> "nvidia-h200-sm90.json"."""
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-sm{capability[0]}{capability[1]}.json"


def read(path: Path, gpu: str, capability: tuple[int, int]) -> dict[Shape, Choice]:
    """A file's rows.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table of this GPU, or a row is none that the kernels can run.
    """
    try:
        found = json.loads(path.read_text())
        there, rows = (found["gpu"], tuple(found["capability"])), found["rows"]
        if there != (gpu, capability):
            raise ValueError(f"it is of {there}, the GPU is {(gpu, capability)}")
        return dict(_row(row) for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} must be a launch table of {gpu}, got {type(error).__name__}: {error}") from error


def as_row(shape: Shape, chosen: Choice) -> dict[str, Any]:
    """A row as JSON has it, which `read` turns back."""
    row: dict[str, Any] = shape._asdict()
    if chosen.tile is not None:
        row["tile"] = asdict(chosen.tile)
    if chosen.form is not None:
        row["form"] = chosen.form
    return row


def check(shape: Shape, chosen: Choice) -> None:
    """Raise ValueError for a choice that the kernels cannot run on this shape."""
    for name, value in shape._asdict().items():
        kind = {"kind": str, "dtype": str, "affine": bool}.get(name, int)
        if type(value) is not kind or (type(value) is int and value < 1):
            raise ValueError(f"{name} of a row must be {'at least 1' if kind is int else kind.__name__}, got {value!r}")
    for name, allowed in (("kind", tuple(TILES)), ("dtype", DTYPES), ("kernel_size", (1, 3))):
        if getattr(shape, name) not in allowed:
            raise ValueError(f"{name} of a row must be one of {allowed}, got {getattr(shape, name)!r}")
    if chosen.form is not None:
        thin = shape.kernel_size == 3 and shape.out_channels <= 32
        forms = FORMS if thin else tuple(form for form in FORMS if form not in ("wide", "upright"))
        if shape.kind in ("weight", "readers") or chosen.form not in forms:
            raise ValueError(f"form of a {shape.kind} row must be one of {forms}, got {chosen.form!r}")
    if chosen.tile is not None:
        _check_tile(shape, chosen.tile)


def _row(row: Mapping[str, Any]) -> tuple[Shape, Choice]:
    shape = Shape(**{name: row[name] for name in Shape._fields})
    tile: Tile | None = None
    if "tile" in row:
        fields = dict(row["tile"])
        if "group" in fields:
            fields["group"] = tuple(fields["group"])
        tile = TILES.get(shape.kind, ConvolutionConfig)(**fields)  # `check` names an unknown kind
    chosen = Choice(tile, row.get("form"))
    check(shape, chosen)
    return shape, chosen


def _check_tile(shape: Shape, tile: Tile) -> None:
    limits = {"rows": (16, 256), "columns": (16, 256), "warps": (1, 16)}
    if not isinstance(tile, ReadersConfig):
        limits["chunk"] = (16, 128)
    if isinstance(tile, ConvolutionConfig):
        limits |= {"vector": (4, 8)} | ({"columns2": (16, 256)} if tile.columns2 != 0 else {})
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        if type(value) is not int or not least <= value <= most or value & (value - 1):
            raise ValueError(f"{name} of a tile must be a power of two from {least} to {most}, got {value!r}")
    for name, most in (("stages", 8), ("programs", 8), ("splits", MOST_SPLITS)):
        value = getattr(tile, name, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} of a tile must be 1 to {most}, got {value!r}")
    if type(tile.registers) is not int or tile.registers not in (0, *range(32, 256, 8)):
        raise ValueError(f"registers of a tile must be 0, or a multiple of 8 from 32 to 248, got {tile.registers!r}")
    if isinstance(tile, WeightGradientConfig) and type(tile.swapped) is not bool:
        raise ValueError(f"swapped of a tile must be true or false, got {tile.swapped!r}")
    if not isinstance(tile, ConvolutionConfig) or tile.group == (1, 1):
        return
    high, wide = tile.group
    fits = shape.kernel_size == 3 and shape.height % high == 0 and shape.width % wide == 0
    if min(high, wide) < 1 or not fits or (high + 2) * (wide + 2) > MAX_TAPS:
        raise ValueError(f"group of a tile must divide the image of a 3x3 kernel, got {tile.group!r}")
