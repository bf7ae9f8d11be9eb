"""Pixels of images [N, C, H, W] and of volumes [N, C, D, H, W], which every pass but a convolution takes for images.

In channels_last order a volume's memory is that of an image of D * H rows: nothing is copied.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
"""Of images and of volumes."""

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
    """Images of D * H rows as volumes, in the same memory."""
    return x.unflatten(2, volume)
