"""Devices, dtypes and paths as arguments of public functions: one sentence for what they cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def device(value: str | torch.device | None) -> torch.device | None:
    """The device; None as it is.

    Raises:
        TypeError, ValueError: no device that torch knows.
    """
    if value is None or isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"device must be a torch device such as cpu or cuda:0, got {value!r} ({type(value).__name__})")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as cpu or cuda:0, got {value!r}") from error


def floating_dtype(value: torch.dtype | None) -> torch.dtype | None:
    """The dtype; None as it is; TypeError for one that is not of floating-point numbers."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {value!r}")
    return value


def path(name: str, value: str | os.PathLike[str]) -> Path:
    """The path of an argument; TypeError for what is none."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {value!r} ({type(value).__name__})")
    return Path(value)
