"""Devices and dtypes as arguments of public functions: one sentence for what they cannot be."""

from __future__ import annotations

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


def floating_dtype(value: torch.dtype | None, optional: bool = False) -> torch.dtype | None:
    """The dtype; TypeError for one that is not of floating-point numbers, as None is but where it is `optional`."""
    if value is None and optional:
        return None
    if not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {value!r}")
    return value
