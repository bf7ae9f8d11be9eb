"""Sums of weight gradients' splits: of several layers in one launch, each of which alone is too small to fill a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..constants import device_constant  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import weight_gradient as device_weight_gradient
from .device import on_device_of
from .device_tables import upload
from .tiles import cdiv, power_of_2, reduce_tile

MOST_GRADIENTS = 16  # of one launch: each is compiled into it, and three parameters


class Splits(NamedTuple):
    """A weight gradient that has yet to be summed.

    Attributes:
        partial: [splits, K, columns], fp32 (fp64 for fp64 slots).
        k_of_weight: [input channels * taps], where each weight stands in K, in the order of `result`'s memory.
        result: [O, C, k, k], dense, O outermost.
    """

    partial: Tensor
    k_of_weight: Tensor
    result: Tensor


def reduce_splits(several: Sequence[Splits]) -> None:
    """Fill every result with its sum over splits; a launch for MOST_GRADIENTS of one dtype."""
    for _, alike in groupby(several, lambda each: (each.result.dtype, each.partial.dtype)):
        each = list(alike)
        for first in range(0, len(each), MOST_GRADIENTS):
            _reduce(each[first : first + MOST_GRADIENTS])


def _reduce(several: Sequence[Splits]) -> None:
    """One launch."""
    shapes = tuple((*each.partial.shape, each.result.shape[0], len(each.k_of_weight)) for each in several)
    elements = sum(each.result.numel() for each in several)
    common = 32 if all(columns % 32 == 0 for _, _, columns, _, _ in shapes) else 16
    at_once, block, part, warps = reduce_tile(elements, common, max(splits for splits, *_ in shapes))
    like = several[0].partial
    programs, gradients = _tables(shapes, block, part, like.device)
    # few numbers of gradients, for each of which the kernel is compiled
    read = [*several, *[several[0]] * (power_of_2(len(several)) - len(several))]
    partials, tables, results = zip(*read, strict=True)
    with on_device_of(like):
        start(
            device_weight_gradient.reduce_splits, (len(programs),),
            partials, tables, results, programs, gradients,
            SPLITS=at_once, WEIGHTS=block, COLUMNS=part, num_warps=warps,
        )  # fmt: skip


@device_constant(maxsize=4096)
def _tables(
    shapes: tuple[tuple[int, int, int, int, int], ...], block: int, part: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`programs` and `gradients` of the kernel; shapes: splits, K, columns, output channels, weights of each."""
    programs, rows, first = [], [], 0
    for number, (splits, all_k, columns, channels, weights) in enumerate(shapes):
        tiles = cdiv(weights, block) * cdiv(channels, part)
        programs.append(np.full(tiles, number, np.int32))
        rows.append((first, splits, all_k, columns // 16, weights, channels, cdiv(weights, block), 0))
        first += tiles
    return upload(np.concatenate(programs), device), upload(np.array(rows, np.int32), device)
