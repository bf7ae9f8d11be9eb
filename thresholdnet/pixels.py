"""Pixels of images [N, C, H, W] and of volumes [N, C, D, H, W], which every pass but a convolution takes for images.

In channels_last order a volume's memory is that of an image of D * H rows: nothing is copied.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kinds(NamedTuple):
    """The modules that images take, or volumes."""

    conv: Any
    norm: Any
    max_pool: Any
    avg_pool: Any


KINDS = {
    2: Kinds(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    3: Kinds(nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d),
}
"""By spatial dimensions."""

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)

Volume = tuple[int, int]
"""Depth and height of volumes that lie as images of depth * height rows."""


def count(x: Tensor) -> int:
    """Pixels of all images, or voxels of all volumes."""
    return x.shape[0] * prod(x.shape[2:])


def channels_last(x: Tensor) -> torch.memory_format:
    """The memory format of that name for tensors of x's rank."""
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
