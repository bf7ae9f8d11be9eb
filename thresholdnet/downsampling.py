"""Poolings behind a BatchNorm and its activation, forward and backward, from the values in front of all three.

Averages of volumes whose windows lie behind each other in depth are those of slices, as images, and then of slices:
they need no order of memory but channels_last, and on a GPU no activated values in between. So are the largest
values, of any windows. Other averages are the library's.

Letters: y = act(z * scale + shift), out = pool(y).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import elementwise
from .backends.native import Verbs
from .batchnorm import Norm
from .pixels import Volume, as_images, as_slices, as_volumes

aten = torch.ops.aten

PIECE = 1 << 19
"""Activated values that lie between a BatchNorm and a max pooling at a time, on a CPU: they stay in its cache."""

Sums = tuple[Tensor, Tensor, Tensor]
"""The gradient of y behind the activation's mask, its sum and that of its product with xhat."""


class Pool(NamedTuple):
    """A pooling, as nn.MaxPool2d (dilation 1) or nn.AvgPool2d has it, or of volumes nn.MaxPool3d or nn.AvgPool3d.

    Attributes:
        kind: "max" or "avg".
        window: kernel, stride and padding, each (height, width) or (depth, height, width), in pixels.
        ceil_mode, count_include_pad: as in nn.AvgPool2d.
    """

    kind: str
    window: Sequence[int]
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """The pooled x."""
        if x.dim() == 5:
            average = self.kind == "avg"
            return aten.avg_pool3d(x, *self.averages) if average else aten.max_pool3d_with_indices(x, *self.largest)[0]
        if self.kind == "max":
            return elementwise.max_pool2d(x, *self.sides, self.ceil_mode)
        return elementwise.avg_pool2d(x, self.averages)

    @property
    def sides(self) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding."""
        return thirds(self.window)

    @property
    def averages(self) -> elementwise.Averages:
        """Everything about an average."""
        return *self.sides, self.ceil_mode, self.count_include_pad

    @property
    def largest(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """Everything about the largest of volumes."""
        return *self.sides, [1, 1, 1], self.ceil_mode

    def of_slices(self, z: Tensor, volume: Volume | None) -> tuple[Tensor, elementwise.Averages, int] | None:
        """Images whose averages are asked for, of what windows, and in volumes then of how many slices.

        None where the library pools activated values: half formats of volumes would round twice.
        """
        if self.kind == "max":
            return None
        if volume is None:
            return z, self.averages, 1
        kernel, stride, padding = self.sides
        behind = (stride[0], padding[0], self.ceil_mode) == (kernel[0], 0, False) and volume[0] >= kernel[0]
        if not behind or z.dtype not in (torch.float32, torch.float64):
            return None
        return as_slices(z, volume), (kernel[1:], stride[1:], padding[1:], False, self.count_include_pad), kernel[0]


def activated(
    pool: Pool | None, verbs: Verbs, z: Tensor, affine: elementwise.Affine, activation: str, volume: Volume | None
) -> Tensor:
    """The activated and pooled values of z [N, C, H, W], or of volumes that lie so: then [N, C, D, H, W].

    Averages do without the values in between; the largest have some of them at a time.
    """
    averages = None if pool is None else pool.of_slices(z, volume)
    if averages is not None:
        slices, window, deep = averages
        made: Tensor = verbs.passes.avg_pool2d(slices, window, affine, activation)
        return made if volume is None else _depth_average(made, volume[0], deep)
    if pool is not None and pool.kind == "max":
        return _largest(pool, verbs, z, affine, activation, volume)
    y = verbs.normalise(z, affine, activation, into=("scratch", 0))
    if volume is not None:
        y = as_volumes(y, volume)
    return y if pool is None else pool(y)


def masked(
    pool: Pool | None, verbs: Verbs, grad: Tensor, z: Tensor, norm: Norm, activation: str, volume: Volume | None
) -> Sums:
    """What the gradient of `activated` is to y, behind its mask; of images."""
    mask = (z, norm.affine, norm.mean, norm.rstd)
    averages = None if pool is None else pool.of_slices(z, volume)
    if averages is not None:
        slices, window, deep = averages
        arriving = grad if volume is None else _to_slices(grad, volume[0], deep)
        g, *sums = verbs.passes.avg_mask_sums(arriving, window, slices, *mask[1:], activation)
        return g if volume is None else _of_volumes(g, volume[0]), *sums
    if pool is not None:
        y = verbs.normalise(z, norm.affine, activation, into=("scratch", 0))
        grad = _unpooled(pool, verbs, grad, y, volume)
    grad = as_images(grad).contiguous(memory_format=torch.channels_last)
    return verbs.gradient([], [], grad, into=("gradient", 0), masked=mask, activation=activation)


def thirds(window: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The sides of three things, of images or of volumes."""
    dims = len(window) // 3
    return list(window[:dims]), list(window[dims : 2 * dims]), list(window[2 * dims :])


def _largest(
    pool: Pool, verbs: Verbs, z: Tensor, affine: elementwise.Affine, activation: str, volume: Volume | None
) -> Tensor:
    """`activated`, of some images after the others; in volumes of some slices, and then of neighbouring slices."""
    images = z if volume is None else as_slices(z, volume)
    (*deep, _, _), (*step, _, _), (*behind, _, _) = pool.sides
    flat = [sides[-2:] for sides in pool.sides]
    some = PIECE // max(1, prod(images.shape[1:])) if z.device.type == "cpu" else len(images)
    made = []
    for piece in images.split(max(1, some)):
        y = verbs.normalise(piece, affine, activation, into=("scratch", 0))
        made.append(verbs.passes.max_pool2d(y, *flat, pool.ceil_mode))
    pooled = torch.cat(made) if len(made) > 1 else made[0]
    if volume is None:
        return pooled
    volumes = pooled.unflatten(0, (len(z), volume[0])).transpose(1, 2)
    sides = [*deep, 1, 1], [*step, 1, 1], [*behind, 0, 0], [1, 1, 1]
    found: Tensor = aten.max_pool3d_with_indices(volumes, *sides, pool.ceil_mode)[0]
    return found


def _unpooled(pool: Pool, verbs: Verbs, grad: Tensor, y: Tensor, volume: Volume | None) -> Tensor:
    """The gradient of activated values; the maxima are found again."""
    if volume is None:
        made: Tensor = verbs.passes.max_pool2d_backward(grad, y, *pool.sides, pool.ceil_mode)
        return made
    y = as_volumes(y, volume)
    if pool.kind == "avg":
        return aten.avg_pool3d_backward(grad, y, *pool.averages, None)
    indices = aten.max_pool3d_with_indices(y, *pool.largest)[1]
    return aten.max_pool3d_with_indices_backward(grad, y, *pool.largest, indices)


def _of_volumes(slices: Tensor, depth: int) -> Tensor:
    """Slices as images of depth * H rows, in the same memory."""
    return as_images(slices.unflatten(0, (-1, depth)).transpose(1, 2))


def _depth_average(slices: Tensor, depth: int, kernel: int) -> Tensor:
    """Averages over `kernel` neighbouring slices [N * depth, C, h, w]: volumes."""
    whole = depth // kernel
    of_volumes = slices.unflatten(0, (-1, depth))[:, : whole * kernel]
    return of_volumes.unflatten(1, (whole, kernel)).mean(2).transpose(1, 2)


def _to_slices(grad: Tensor, depth: int, kernel: int) -> Tensor:
    """The gradient of slices from that of their `_depth_average`."""
    batch, channels, whole, height, width = grad.shape
    make = grad.new_zeros if depth % kernel else grad.new_empty  # the last slices are in no window
    made = make((batch, depth, height, width, channels)).permute(0, 1, 4, 2, 3)
    shares = made[:, : whole * kernel].unflatten(1, (whole, kernel))
    shares.copy_((grad / kernel).transpose(1, 2).unsqueeze(2))
    return made.flatten(0, 1)
