"""A BatchNorm over linked nodes as the convolution behind it reads it: from the nodes' statistics in one launch.

Readers of a node share its statistics, which lie once for all of them, node after node; each reader picks its channels
in the order of its own K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..constants import device_constant  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import affine as device_affine
from .device import on_device_of
from .device_tables import upload
from .operands import accumulator_of
from .packed_weights import Matrix, PackedWeight
from .tiles import cdiv

BLOCK = 256


class PackedAffine(NamedTuple):
    """scale and shift in the order of K of one packed weight: `values` is [2, K + chunk], fp32 (fp64 for fp64)."""

    values: Tensor
    matrix: Matrix


def pack_affine(
    weight: PackedWeight, gamma: Tensor, beta: Tensor, statistics: Tensor, starts: Sequence[int], eps: float
) -> tuple[PackedAffine, Tensor]:
    """The affine of a BatchNorm, packed for `launch.conv` with the packed weight behind it.

    Args:
        weight: as `launch.pack` made it for a convolution.
        gamma, beta: [C], C the summed channels of the convolution's sources; any floating dtype and stride.
        statistics: mean and biased variance of every channel of every node, [2, channels], fp32 (fp64 for fp64 slots).
        starts: for each source its first channel among those.
        eps: of the BatchNorm.

    Returns:
        The packed affine, and the statistics of the sources' channels, [2, C].

    Raises:
        TypeError: statistics of another dtype.
        ValueError: a weight that is a data gradient's, or a shape or start that is not as above.
    """
    matrix = weight.matrix
    if matrix.transposed:
        raise ValueError(f"weight must be packed for a convolution, got {matrix}")
    accumulator = accumulator_of(weight.values)
    if statistics.dtype != accumulator:
        raise TypeError(f"statistics must be {accumulator}, got {statistics.dtype}")
    channels = sum(matrix.widths)
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != (channels,):
            raise ValueError(f"{name} must have the shape ({channels},), got {tuple(vector.shape)}")
    if statistics.dim() != 2 or statistics.shape[0] != 2 or not statistics.is_contiguous():
        raise ValueError(f"statistics must be dense and have the shape [2, channels], got {tuple(statistics.shape)}")
    if len(starts) != len(matrix.widths):
        raise ValueError(f"starts must hold one number for each of the {len(matrix.widths)} sources, got {len(starts)}")
    columns = statistics.shape[1]
    ends = [start + width for start, width in zip(starts, matrix.widths, strict=True)]
    if min(starts) < 0 or max(ends) > columns:
        raise ValueError(f"starts must leave each source's channels within {columns}, got {tuple(starts)}")
    tables = _tables(matrix, tuple(starts), statistics.device)
    length = len(tables[0])
    made = torch.empty(2, length, dtype=accumulator, device=statistics.device)
    used = torch.empty(2, channels, dtype=accumulator, device=statistics.device)
    with on_device_of(statistics):
        start(
            device_affine.pack_affine, (cdiv(length, BLOCK),),
            gamma.contiguous(), beta.contiguous(), statistics, *tables, made, used, length, channels, columns,
            EPS=eps, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return PackedAffine(made, matrix), used


@device_constant(maxsize=4096)
def _tables(matrix: Matrix, starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every position of K, and of the chunk that the convolution loads ahead: its channel, -1 for none, where that
    channel's statistics lie, and whether it is the channel's first position."""
    channel = matrix.k_channels
    of_channel = np.concatenate([np.arange(width) + first for width, first in zip(matrix.widths, starts, strict=True)])
    column = np.where(channel >= 0, of_channel[channel], 0).astype(np.int32)
    noted = np.zeros(len(channel), np.int32)
    noted[np.unique(channel, return_index=True)[1][-sum(matrix.widths) :]] = 1  # the number before them is none
    return upload(channel, device), upload(column, device), upload(noted, device)
