"""Where the Triton kernels can run: a GPU, or the CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
import triton
from torch import Tensor

from . import conv as device_conv
from .configs import Capability

INTERPRETED = not isinstance(device_conv.convolution, triton.JITFunction)


def check_device(name: str, tensor: Tensor) -> None:
    """RuntimeError for a device that cannot run the kernels."""
    if not isinstance(tensor, Tensor):
        return  # the checks of slots name it
    if tensor.device.type == "cuda":
        if not INTERPRETED and capability_of(tensor.device) < (8, 0):  # type: ignore[operator]  # None in the interpreter only
            raise RuntimeError(f"{name} must be on a GPU of compute capability 8.0 or newer, got {tensor.device}")
    elif not INTERPRETED or tensor.device.type != "cpu":
        raise RuntimeError(
            f"{name} must be on a CUDA device, or on the CPU with TRITON_INTERPRET=1 in the environment, "
            f"got {tensor.device}"
        )


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> Capability:
    """Of a GPU; None in the interpreter, whose tiles are its own."""
    return None if INTERPRETED else torch.cuda.get_device_capability(device)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
