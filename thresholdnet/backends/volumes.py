"""The native backend for volumes: 3x3x3 convolutions in the library, all else as for images of D * H rows.

Weights are [O, C, k, k, k]; letters and verbs as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate_
from ..pixels import Volume, as_images, as_volumes
from ..plan import BlockPlan
from . import native
from .elementwise import Affine
from .native import Moments, Packed, Place, kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]

LAST = torch.channels_last_3d
SIDES = [1, 1, 1]
"""Stride, padding and dilation of a 3x3x3 convolution."""


class Verbs(native.Verbs):
    """`native.Verbs` for volumes of this depth and height."""

    def __init__(self, plan: BlockPlan | None, x: Tensor, volume: Volume):
        super().__init__(plan, x)
        self.volume = volume

    def conv(
        self,
        sources: Sequence[Tensor],
        weight: Tensor | Packed,
        *,
        into: Place,
        affine: Affine | None = None,
        bias: Tensor | None = None,
        activation: str = "relu",
        statistics: bool = False,
        moments: Tensor | None = None,
    ) -> tuple[Tensor, Moments | None]:
        """See `native.Verbs.conv`."""
        if isinstance(weight, Packed) or weight.shape[2] == 1:
            flat = weight if isinstance(weight, Packed) else _of_images(weight)
            return super().conv(
                sources, flat, into=into, affine=affine, bias=bias, activation=activation,
                statistics=statistics, moments=moments,
            )  # fmt: skip
        read = as_volumes(self._gathered(sources, affine, activation), self.volume)
        own = None if bias is None else bias.to(weight.dtype)
        z = _rows(F.conv3d(read, weight, own, padding=1))  # the library lays a weight out sooner than torch would
        if bias is not None:
            z = activate_(z, activation)
        return z, self.moments(z) if statistics else None

    def way(self, layer: int, weight: Tensor) -> str:
        """See `native.Verbs.way`."""
        return super().way(layer, _of_images(weight)) if weight.shape[2] == 1 else ""

    def packed(self, way: str, weight: Tensor) -> Tensor | Packed:
        """See `native.Verbs.packed`; a 3x3x3 weight stays as it is."""
        if weight.shape[2] == 1:
            return super().packed(way, _of_images(weight))
        return weight.contiguous(memory_format=LAST)

    def _data_gradient(self, dz: Tensor, weight: Tensor) -> Tensor:
        """See `native.Verbs._data_gradient`."""
        if weight.shape[2] == 1:
            return super()._data_gradient(dz, _of_images(weight))
        arriving = as_volumes(dz, self.volume)
        like = torch.empty(  # for its shape and order; never touched
            (dz.shape[0], weight.shape[1], *arriving.shape[2:]), dtype=dz.dtype, device=dz.device, memory_format=LAST
        )
        return _rows(self._library_gradients(arriving, like, weight, 0))

    def weight_gradient(
        self,
        sources: Sequence[Tensor],
        dz: Tensor,
        kernel_size: int,
        *,
        affine: Affine | None = None,
        activation: str = "relu",
        like: Tensor | None = None,
    ) -> Tensor:
        """See `native.Verbs.weight_gradient`: [O, C, k, k, k]."""
        if kernel_size == 1:
            made = super().weight_gradient(sources, dz, 1, affine=affine, activation=activation)
            return made.unsqueeze(-1)
        read = as_volumes(self._gathered(sources, affine, activation), self.volume)
        arriving, dtype = as_volumes(dz, self.volume), dz.dtype
        shape = (dz.shape[1], read.shape[1], 3, 3, 3)
        weight = read.new_empty(shape) if like is None else like  # for its shape and order
        if _left_unwritten(read):
            arriving, read, weight = arriving.float(), read.float(), weight.float()
        return self._library_gradients(arriving, read, weight, 1).to(dtype)

    def _library_gradients(self, dz: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        """The gradient of a 3x3x3 convolution's input (0) or weight (1)."""
        found: Tensor = torch.ops.aten.convolution_backward(
            dz, x, weight, None, SIDES, SIDES, SIDES, False, [0, 0, 0], 1, [which == 0, which == 1, False]
        )[which]
        return found


def _left_unwritten(x: Tensor) -> bool:
    """Whether the library would leave elements of a weight's gradient as the memory was.

    oneDNN does, of volumes of two slices in bf16, in any order of memory (tests/test_volumes.py): seen with torch 2.14.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[2] == 2


def _rows(x: Tensor) -> Tensor:
    """Volumes as images, in channels_last order in which not every library returns them."""
    return as_images(x).contiguous(memory_format=torch.channels_last)


def _of_images(weight: Tensor) -> Tensor:
    """A 1x1x1 weight as a 1x1 one, in the same memory."""
    return weight.flatten(2, 3) if weight.dim() == 5 else weight
