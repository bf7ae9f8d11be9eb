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
from .native import Packed, kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]

LAST = torch.channels_last_3d


class Verbs(native.Verbs):
    """`native.Verbs` for volumes of this depth and height."""

    def __init__(self, plan: BlockPlan | None, x: Tensor, volume: Volume):
        super().__init__(plan, x)
        self.volume = volume

    def _linked_conv(
        self, sources: Sequence[Tensor], weight: Tensor | Packed, affine: Affine | None, bias: Tensor | None,
        activation: str, dilation: int,
    ) -> Tensor:  # fmt: skip
        if isinstance(weight, Packed):
            return super()._linked_conv(sources, weight, affine, bias, activation, dilation)
        if weight.shape[2] == 1:
            return super()._linked_conv(sources, as_images(weight), affine, bias, activation, dilation)
        read, kernel = _taken(as_volumes(self._gathered(sources, affine, activation), self.volume), weight)
        own = None if bias is None else bias.to(kernel.dtype)
        # the library lays a weight out sooner than torch would
        z = _rows(F.conv3d(read, kernel, own, padding=dilation, dilation=dilation)).to(weight.dtype)
        return z if bias is None else activate_(z, activation)

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        """See `native.Verbs.way`."""
        return super().way(layer, as_images(weight)) if weight.shape[2] == 1 else ""

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor | Packed:
        """See `native.Verbs.packed`; a 3x3x3 weight stays as it is."""
        if weight.shape[2] == 1:
            return super().packed(way, as_images(weight))
        return weight.contiguous(memory_format=LAST)

    def _data_gradient(self, dz: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
        if weight.shape[2] == 1:
            return super()._data_gradient(dz, as_images(weight), dilation)
        arriving, kernel = _taken(as_volumes(dz, self.volume), weight)
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
        read = as_volumes(self._gathered(sources, affine, activation), self.volume)
        shape = (dz.shape[1], read.shape[1], 3, 3, 3)
        weight = read.new_empty(shape) if like is None else like  # for its shape and order
        arriving, read, weight = _taken(as_volumes(dz, self.volume), read, weight)
        return self._library_gradients(arriving, read, weight, dilation, 1).to(dz.dtype)

    def _library_gradients(self, dz: Tensor, x: Tensor, weight: Tensor, dilation: int, which: int) -> Tensor:
        """The gradient of a 3x3x3 convolution's input (0) or weight (1)."""
        spread = [dilation] * 3  # which is the padding as well
        found: Tensor = torch.ops.aten.convolution_backward(
            dz, x, weight, None, [1, 1, 1], spread, spread, False, [0, 0, 0], 1, [which == 0, which == 1, False]
        )[which]
        return found


def _taken(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Operands as the library takes them: bf16 volumes of one or two slices on a CPU in fp32.

    Of those oneDNN leaves elements as the memory was: of a weight's gradient where there are two, in any order of
    memory, and of the result where one is read of one channel (seen with torch 2.11 to 2.15; tests/test_volumes.py).
    """
    thin = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[2] <= 2
    return tuple(tensor.float() for tensor in (x, *others)) if thin else (x, *others)


def _rows(x: Tensor) -> Tensor:
    """Volumes as images, in channels_last order in which not every library returns them."""
    return as_images(x).contiguous(memory_format=torch.channels_last)
