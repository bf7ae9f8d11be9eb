"""The native backend for volumes: 3x3x3 convolutions in the library, all else as for images of D * H rows.

Weights are [O, C, k, k, k]; letters and verbs as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate_
from ..pixels import Volume, as_images, as_slices, as_volumes
from ..plan import BlockPlan
from . import csrc, native
from .elementwise import Affine
from .native import Packed, activates_in_library, in_library, kept_like, laid_out, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]

LAST = torch.channels_last_3d
SMALL = 20480
"""Channels x depth x height up to which torch keeps single volumes to itself (aten/src/ATen/native/Convolution.cpp)."""


class Verbs(native.Verbs):
    """`native.Verbs` for volumes of this depth and height."""

    def __init__(self, plan: BlockPlan | None, x: Tensor, volume: Volume):
        super().__init__(plan, x)
        self.volume = volume

    def _linked_conv(
        self, sources: Sequence[Tensor], weight: Tensor | Packed, affine: Affine | None, bias: Tensor | None,
        activation: str, dilation: int,
    ) -> Tensor:  # fmt: skip
        if weight.shape[2] == 1:
            one = weight if isinstance(weight, Packed) else as_images(weight)
            return super()._linked_conv(sources, one, affine, bias, activation, dilation)
        read = as_volumes(self._gathered(sources, affine, activation), self.volume)
        read, kernel = _taken(read, weight.tensor if isinstance(weight, Packed) else weight)
        dtype = sources[0].dtype
        if activates_in_library(read):  # torch leaves a single small volume to slower loops of its own
            return _rows(in_library(read, kernel, bias, activation, [dilation] * 3, dilation)).to(dtype)
        own = None if bias is None else bias.to(kernel.dtype)
        # the library lays a weight out sooner than torch would
        z = _rows(F.conv3d(read, kernel, own, padding=dilation, dilation=dilation)).to(dtype)
        return z if bias is None else activate_(z, activation)

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        """See `native.Verbs.way`."""
        if weight.shape[2] == 1:
            return super().way(layer, as_images(weight))
        return "library" if activates_in_library(weight) and self.pixels and not _thin(weight, self.volume[0]) else ""

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor | Packed:
        """See `native.Verbs.packed`."""
        if weight.shape[2] == 1:
            return super().packed(way, as_images(weight))
        weight = weight.contiguous(memory_format=LAST)
        read = (self.images[0], weight.shape[1], *self.volume, self.images[2])
        return laid_out(weight, read, dilation) if way == "library" else weight

    def _data_gradient(self, dz: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
        if weight.shape[2] == 1:
            return super()._data_gradient(dz, as_images(weight), dilation)
        arriving, kernel = _taken(as_volumes(dz, self.volume), weight)
        if _loops_of_torch(arriving, weight.shape[1]):
            turned = kernel.flip(2, 3, 4).transpose(0, 1).contiguous(memory_format=LAST)
            return _rows(in_library(arriving, turned, None, "", [dilation] * 3, dilation)).to(dz.dtype)
        shape = (dz.shape[0], weight.shape[1], *arriving.shape[2:])
        like = torch.empty(shape, dtype=kernel.dtype, device=dz.device, memory_format=LAST)  # for its shape and order
        return _rows(self._library_gradients(arriving, like, kernel, dilation, 0)).to(dz.dtype)

    def _linked_weight_gradient(
        self, sources: Sequence[Tensor], dz: Tensor, kernel_size: int, affine: Affine | None, activation: str,
        like: Tensor | None, dilation: int,
    ) -> Tensor:  # fmt: skip
        """[O, C, k, k, k]."""
        if kernel_size == 1:
            return super()._linked_weight_gradient(sources, dz, 1, affine, activation, like, dilation).unsqueeze(-1)
        if self.passes is csrc and dz.shape[0] == 1 and csrc.correlates(as_slices(dz, self.volume), 3):
            return self._weight_gradient_of_slices(sources, dz, affine, activation, dilation)
        read = as_volumes(self._gathered(sources, affine, activation), self.volume)
        shape = (dz.shape[1], read.shape[1], 3, 3, 3)
        weight = read.new_empty(shape) if like is None else like  # for its shape and order
        arriving, read, weight = _taken(as_volumes(dz, self.volume), read, weight)
        return self._library_gradients(arriving, read, weight, dilation, 1).to(dz.dtype)

    def _weight_gradient_of_slices(
        self, sources: Sequence[Tensor], dz: Tensor, affine: Affine | None, activation: str, dilation: int
    ) -> Tensor:  # fmt: skip
        """[O, C, 3, 3, 3] of a single volume: of three, of its slices and those that lie so many deeper."""
        depth, height = self.volume
        found = []
        for deeper in (-dilation, 0, dilation):
            first, count = max(0, -deeper), depth - abs(deeper)
            if count <= 0:
                found.append(dz.new_zeros(dz.shape[1], sum(source.shape[1] for source in sources), 3, 3))
                continue
            read = [_some_slices(source, height, first + deeper, count) for source in sources]
            arriving = _some_slices(dz, height, first, count)
            found.append(csrc.weight_gradient(read, arriving, (3, 3), affine, activation, dilation))
        return torch.stack(found, 2)

    def _library_gradients(self, dz: Tensor, x: Tensor, weight: Tensor, dilation: int, which: int) -> Tensor:
        """The gradient of a 3x3x3 convolution's input (0) or weight (1)."""
        spread = [dilation] * 3  # which is the padding as well
        found: Tensor = torch.ops.aten.convolution_backward(
            dz, x, weight, None, [1, 1, 1], spread, spread, False, [0, 0, 0], 1, [which == 0, which == 1, False]
        )[which]
        return found


def _some_slices(x: Tensor, height: int, first: int, count: int) -> Tensor:
    """Slices of a single volume as images, in the same memory."""
    return as_slices(x.narrow(2, first * height, count * height), (count, height))


def _taken(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Operands as the library takes them: bf16 volumes of one or two slices on a CPU in fp32.

    Of those oneDNN leaves elements as the memory was: of a weight's gradient where there are two, in any order of
    memory, and of the result where one is read of one channel (seen with torch 2.11 to 2.15; tests/test_volumes.py).
    """
    return tuple(tensor.float() for tensor in (x, *others)) if _thin(x, x.shape[2]) else (x, *others)


def _loops_of_torch(x: Tensor, channels: int) -> bool:
    """Whether torch sends data through loops of its own, up to five times slower than oneDNN's, of a volume like x."""
    alone = x.shape[0] == 1 and x.dtype == torch.float32 and activates_in_library(x)
    return alone and channels * x.shape[2] * x.shape[3] <= SMALL


def _thin(x: Tensor, slices: int) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and slices <= 2


def _rows(x: Tensor) -> Tensor:
    """Volumes as images, in channels_last order in which not every library returns them."""
    return as_images(x).contiguous(memory_format=torch.channels_last)
