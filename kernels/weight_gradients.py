"""The weight gradient's launcher, and sums of its splits: of several layers in one launch, as each is a small one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..activations import number as activation_number  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..constants import device_constant  # type: ignore[import-not-found]  # likewise
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import weight_gradient as device_weight_gradient
from .configs import WeightGradientConfig, weight_gradient_config, weight_gradient_splits
from .device import capability_of, check_device, on_device_of
from .device_tables import device_pixels, device_table, upload
from .operands import (
    MAX_ELEMENTS,
    accumulator_of,
    copy_elements,
    dtype_name,
    lay_out,
    per_channel,
    uses_tf32,
)
from .tiles import cdiv, power_of_2, reduce_tile
from .tuned import Shape, choice

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


def weight_gradient(
    sources: Sequence[Tensor],
    dz: Tensor,
    kernel_size: int,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "relu",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    later: list[Splits] | None = None,
    dilation: int = 1,
    config: WeightGradientConfig | None = None,
) -> Tensor:
    """The gradient of `launch.conv` by its weight: [O, sum C_i, k, k], fp32 (fp64 for fp64 slots) or `dtype`.

    Args:
        sources: the slots that it read, in its order.
        dz: slot [N, O, H, W], the gradient of its raw output.
        kernel_size: k, 1 or 3.
        affine, activation: as there.
        dtype: of the result.
        channels_last: its memory format; contiguous otherwise.
        later: the result is filled when `reduce_splits` is given this list, to which it is added.
        dilation: pixels between two taps.
        config: tile sizes instead of the chosen ones.

    Raises:
        TypeError, ValueError, RuntimeError: see `launch`.
    """
    check_device("dz", dz)
    layout = lay_out("sources", sources, dz, out_name="dz")
    if kernel_size not in (1, 3):
        raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size}")
    if not sources:
        raise ValueError("sources must hold at least one slot, got none")
    channels, out_channels, accumulator = sum(s.width for s in layout.sources), dz.shape[1], accumulator_of(dz)
    shape = (out_channels, channels, kernel_size, kernel_size)
    channels_last = channels_last and kernel_size > 1  # of a 1x1 kernel both are one
    result = torch.empty(
        shape, dtype=dtype or accumulator, device=dz.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    if layout.pixels == 0:
        return result.zero_()
    if affine is not None:
        affine = (per_channel("affine[0]", affine[0], channels, dz), per_channel("affine[1]", affine[1], channels, dz))
    capability, weights = capability_of(dz.device), channels * kernel_size**2
    if config is None:
        rule = weight_gradient_config(capability, dtype_name(dz), out_channels, weights, affine is not None)
        form = "weight", dtype_name(dz), kernel_size, affine is not None
        tuned = choice(dz.device, Shape(*form, channels, out_channels, *layout.images)).tile if dilation == 1 else None
        config = tuned if isinstance(tuned, WeightGradientConfig) else rule
    table = device_table(layout.sources, layout.width, kernel_size, config.chunk, (1, 1), False, dz.device, dilation)
    columns = cdiv(out_channels, config.columns) * config.columns
    all_k = table.chunks * config.chunk
    splits = weight_gradient_splits(capability, config, table.chunks * columns // config.columns, layout.pixels)
    splits = max(1, min(splits, (MAX_ELEMENTS - 1) // (all_k * columns)))
    split_rows = cdiv(cdiv(layout.pixels, splits), config.rows) * config.rows
    splits = cdiv(layout.pixels, split_rows)
    partial = torch.empty(splits, all_k, columns, dtype=accumulator, device=dz.device)
    scale, shift = (partial, partial) if affine is None else affine
    inside = device_pixels(*layout.images, (1, 1), dz.device, dilation)[0] if kernel_size == 3 else table.entries
    with on_device_of(dz):
        start(
            device_weight_gradient.weight_gradient, (table.chunks, columns // config.columns, splits),
            layout.base, dz, partial, table.entries, table.row8, scale, shift, table.channel, inside,
            layout.pixels, layout.row8, layout.out_row8, all_k, out_channels, split_rows,
            TILE_ROWS=config.rows, TILE_K=config.chunk, TILE_COLUMNS=config.columns, TAPS=kernel_size == 3,
            SLOT_ROWS=layout.slot_rows, AFFINE=affine is not None,
            ACTIVATION=activation_number(activation) if affine is not None else 0,
            SWAPPED=config.swapped, TF32=uses_tf32(dz), VECTOR=copy_elements(dz),
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers or None,
        )  # fmt: skip
    unsummed = Splits(partial, table.k_of_tap if channels_last else table.k_of_weight, result)
    if later is None:
        reduce_splits([unsummed])
    else:
        later.append(unsummed)
    return result


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
