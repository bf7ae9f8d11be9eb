"""Pixels of images [N, C, H, W], of volumes [N, C, D, H, W] and of signals [N, C, L].

Every pass but a convolution takes all of them for images. In channels_last order a volume's memory is that of an image
of D * H rows, a signal's that of one row: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kinds(NamedTuple):
    """The modules that pixels of so many spatial dimensions take."""

    conv: Any
    norm: Any
    max_pool: Any
    avg_pool: Any


KINDS = {
    1: Kinds(nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d),
    2: Kinds(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    3: Kinds(nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d),
}
"""By spatial dimensions."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
"""torch's functions, by spatial dimensions."""

LAYOUTS = {1: ("signals", "[N, C, L]"), 2: ("images", "[N, C, H, W]"), 3: ("volumes", "[N, C, D, H, W]")}
"""What they are called and how they are shaped, by spatial dimensions."""

Volume = tuple[int, int]
"""Depth and height of volumes that lie as images of depth * height rows."""


def count(x: Tensor) -> int:
    """Pixels of all images, voxels of all volumes, samples of all signals."""
    return x.shape[0] * prod(x.shape[2:])


def channels_last(x: Tensor) -> torch.memory_format:
    """The memory format of that name for tensors of x's rank; signals have none of their own."""
    if x.dim() == 3:
        return torch.contiguous_format
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def volume_of(x: Tensor) -> Volume | None:
    """Depth and height of volumes; None for images."""
    return (x.shape[2], x.shape[3]) if x.dim() == 5 else None


def as_images(x: Tensor) -> Tensor:
    """Volumes as images of D * H rows, in the same memory where that can be; images as they are."""
    return x.flatten(2, 3) if x.dim() == 5 else x


def as_slices(x: Tensor, volume: Volume) -> Tensor:
    """Images of D * H rows, in channels_last order, as N * D images of H rows, in the same memory."""
    return x.unflatten(2, volume).transpose(1, 2).flatten(0, 1)


def as_volumes(x: Tensor, volume: Volume) -> Tensor:
    """Images of D * H rows, in channels_last order, as volumes in the same memory."""
    made = x.unflatten(2, volume)
    return made.contiguous(memory_format=torch.channels_last_3d)  # an empty tensor has lost its order
