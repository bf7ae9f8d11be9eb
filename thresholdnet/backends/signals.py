"""The native backend for signals [N, C, L], which come as images of one row: kernels have a row of taps, not three.

Weights are [O, C, k]; letters and verbs as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import native
from .elementwise import Affine
from .native import Packed, kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]


class Verbs(native.Verbs):
    """`native.Verbs` with kernels of one row, [O, C, 1, k] to the library."""

    def _linked_conv(
        self, sources: Sequence[Tensor], weight: Tensor | Packed, affine: Affine | None, bias: Tensor | None,
        activation: str, dilation: int,
    ) -> Tensor:  # fmt: skip
        row = weight if isinstance(weight, Packed) else weight.unsqueeze(2)
        return super()._linked_conv(sources, row, affine, bias, activation, dilation)

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        """See `native.Verbs.way`."""
        return super().way(layer, weight.unsqueeze(2), dilation)

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor | Packed:
        """See `native.Verbs.packed`."""
        made = super().packed(way, weight.unsqueeze(2), dilation)
        return made if isinstance(made, Packed) else made.squeeze(2)

    def _data_gradient(self, dz: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
        return super()._data_gradient(dz, weight.unsqueeze(2), dilation)

    def _linked_weight_gradient(
        self, sources: Sequence[Tensor], dz: Tensor, kernel_size: int, affine: Affine | None, activation: str,
        like: Tensor | None, dilation: int,
    ) -> Tensor:  # fmt: skip
        """[O, C, k]."""
        row = super()._linked_weight_gradient(sources, dz, kernel_size, affine, activation, like, dilation)
        return row.squeeze(2)

    def _kernel(self, kernel_size: int) -> tuple[int, int]:
        return 1, kernel_size
