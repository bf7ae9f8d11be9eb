"""The native backend's passes over pixels in C++, for float32, float64 and bfloat16 on CPUs: as in `elementwise.py`.

The library is optional: `reason` says why it is missing. THRESHOLDNET_CSRC=0 leaves it unused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .elementwise import Affine

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ACTIVATIONS = {"relu": 1, "relu6": 2}


@lru_cache(maxsize=1)
def reason() -> str | None:
    """None where the library is loaded, else why it is not; the first call loads it."""
    if os.environ.get("THRESHOLDNET_CSRC") == "0":
        return "THRESHOLDNET_CSRC=0 is set"
    package = Path(__file__).resolve().parent.parent
    files = [file for pattern in ("_csrc*.so", "_csrc*.pyd") for file in package.glob(pattern)]
    if not files:
        return "it was not built: a C++ compiler was missing or failed when thresholdnet was installed"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return f"{files[0].name} does not load with torch {torch.__version__}: {str(error).strip().splitlines()[0]}"
    return None


def takes(x: Tensor) -> bool:
    """Whether the library computes on tensors like this one."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0 and reason() is None


def build_info() -> dict[str, str]:
    """Compiler, flags, headers, and the instructions in use; empty without the library."""
    if reason() is not None:
        return {}
    lines = torch.ops.thresholdnet_csrc.build_info().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def gather(sources: Sequence[Tensor], affine: Affine | None, activation: str) -> Tensor:
    """See `elementwise.gather`."""
    read = [_rows(source) for source in sources]
    first = read[0]
    if affine is None and len(read) == 1 and first.is_contiguous(memory_format=torch.channels_last):
        return first
    batch, _, height, width = first.shape
    out = _pixels((batch, sum(source.shape[1] for source in read), height, width), first)
    scale, shift = (None, None) if affine is None else affine
    _operators().gather(read, scale, shift, _ACTIVATIONS[activation], out)
    return out


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.moments`."""
    mean, variance = _operators().moments(_rows(z))
    return mean, variance


def mask_sums(
    g: Tensor, z: Tensor, affine: Affine, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elementwise.mask_sums`."""
    g = _rows(g)
    sums = _operators().mask_sums(g, None, _rows(z), *affine, mean, rstd, _ACTIVATIONS[activation], g)
    return g, *sums


def send(
    g: Tensor,
    features: Sequence[Tensor],
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    before: Sequence[Tensor | None],
    owned: Sequence[bool],
    activation: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `elementwise.send`."""
    nothing = g.new_empty(0)
    arrived = [nothing if so_far is None else _rows(so_far) for so_far in before]
    out = [
        so_far if mine and so_far.numel() else _pixels(feature.shape, feature)
        for feature, so_far, mine in zip(features, arrived, owned, strict=True)
    ]
    sums = _operators().send(
        _rows(g), [_rows(f) for f in features], *affine, mean, rstd, arrived, _ACTIVATIONS[activation], out
    )
    return out, *sums


def linear(g: Tensor, z: Tensor, a: Tensor | None, b: Tensor, c: Tensor, owned: bool) -> Tensor:
    """See `elementwise.linear`."""
    g = _rows(g)
    out = g if owned else _pixels(g.shape, g)
    _operators().linear(g, _rows(z), a, b, c, out)
    return out


def _operators() -> Any:
    return torch.ops.thresholdnet_csrc


def _pixels(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """x itself if its pixels lie in rows of channels, as in channels_last tensors and their channel slices."""
    batch, channels, height, width = x.shape
    n, c, h, w = x.stride()
    row = w if width > 1 else h if height > 1 else n if batch > 1 else channels
    lined_up = (
        (channels == 1 or c == 1) and (height == 1 or h == width * row) and (batch == 1 or n == height * width * row)
    )
    return x if lined_up and row >= channels else x.contiguous(memory_format=torch.channels_last)
