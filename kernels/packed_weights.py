"""Packing of weights for the convolution: which matrices one launch makes, and the tables that say of what.

A matrix is what one convolution or data gradient reads, [columns, K] (see conv.py). Weights change at every step, what
is packed of them only with the shapes, and no activation matters: a block's matrices are made at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..constants import device_constant  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import pack as device_pack
from .configs import ConvolutionConfig
from .device import INTERPRETED, on_device_of
from .device_tables import upload
from .operands import MAX_ELEMENTS, padded_width, with_even_taps
from .tables import LANES, k_channels, weight_rows
from .tiles import cdiv, power_of_2

MOST_WEIGHTS = 64  # that one launch reads: each is compiled into it, and a parameter

_Key = tuple[torch.dtype, int, tuple[int, ...], int]


class Matrix(NamedTuple):
    """Everything about a packed matrix but its weights.

    Attributes:
        widths: channels of the slots that the convolution reads, in order.
        channels: that it writes.
        kernel_size: 1 or 3.
        transposed: it is a data gradient.
        config: its tile.
    """

    widths: tuple[int, ...]
    channels: int
    kernel_size: int
    transposed: bool
    config: ConvolutionConfig

    @property
    def pixels(self) -> int:
        """Pixels that one row of the product computes."""
        return self.config.group[0] * self.config.group[1]

    @property
    def of_pixel(self) -> int:
        """Columns of each of them."""
        return padded_width(self.channels)

    @property
    def columns(self) -> int:
        """Columns in whole tiles."""
        return cdiv(self.of_pixel * self.pixels, self.config.all_columns) * self.config.all_columns

    @property
    def rows(self) -> np.ndarray:
        """`KTable.weight_index`, [pixels, K]."""
        return weight_rows(self.widths, self.kernel_size, self.config.chunk, self.config.group, self.transposed)

    @property
    def k_channels(self) -> np.ndarray:
        """`KTable.channel`, [K + chunk]."""
        return k_channels(self.widths, self.kernel_size, self.config.chunk, self.config.group)


class PackedWeight(NamedTuple):
    """A convolution's weights, packed: `values` is [columns, K], K contiguous, in the slots' dtype."""

    values: Tensor
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight, or of a data gradient's weights one behind the other."""
        written, read = self.matrix.channels, sum(self.matrix.widths)
        sides = self.matrix.kernel_size, self.matrix.kernel_size
        return (read, written, *sides) if self.matrix.transposed else (written, read, *sides)


class Part(NamedTuple):
    """A weight among those that a launch reads: its number, and in elements where it begins, and steps in it.

    length: its channels along K; those and its taps lie `channel` and `tap` elements apart.
    """

    number: int
    offset: int
    length: int
    channel: int
    tap: int


class Affine(NamedTuple):
    """A BatchNorm to be packed beside a weight: `made` [2, K + chunk] of scale and shift in the order of `channel`."""

    scale: Tensor
    shift: Tensor
    channel: Tensor
    made: Tensor


def pack(
    matrices: Sequence[Matrix], weights: Sequence[Sequence[Tensor]], like: Tensor, affine: Affine | None = None
) -> list[PackedWeight]:
    """Pack matrices, all of them transposed or none; a launch for every MOST_WEIGHTS tensors that they read.

    Args:
        matrices: what to make.
        weights: of each one [channels, sum of widths, k, k] alone, or of a transposed one [width, channels, k, k] for
            each width; any floating dtype and strides. Slices of one tensor count once.
        like: a tensor of the dtype and device of what is made.
        affine: filled as well; with one matrix.
    """
    read = [_readable(own) for own in weights]
    made: list[Tensor] = []
    for some in _launches(matrices, read):
        made += _pack(matrices[some], read[some], like, affine)
    return [PackedWeight(values, matrix) for values, matrix in zip(made, matrices, strict=True)]


def _readable(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights of one dtype whose taps lie one step apart, as many as a launch can read."""
    if len(weights) > MOST_WEIGHTS or len({weight.dtype for weight in weights}) > 1:
        weights = [torch.cat([weight.detach() for weight in weights])]
    return [with_even_taps(weight) for weight in weights]


def _launches(matrices: Sequence[Matrix], weights: Sequence[Sequence[Tensor]]) -> Iterator[slice]:
    """Which matrices one launch makes: few enough weights, of one dtype, and offsets that an int32 holds."""
    first, elements = 0, 0
    seen: set[_Key] = set()
    for at, (matrix, own) in enumerate(zip(matrices, weights, strict=True)):
        size, keys = matrix.columns * matrix.rows.shape[1], {_key(weight) for weight in own}
        together = seen | keys
        full = len(together) > MOST_WEIGHTS or len({dtype for dtype, *_ in together}) > 1
        if at > first and (full or elements + size >= MAX_ELEMENTS):
            yield slice(first, at)
            first, together, elements = at, keys, 0
        seen, elements = together, elements + size
    if matrices:
        yield slice(first, len(matrices))


def _key(weight: Tensor) -> _Key:
    """Equal for slices of one tensor whose elements an int32 tells apart."""
    far = int(weight.storage_offset()) // (MAX_ELEMENTS // 2)
    return weight.dtype, weight.untyped_storage()._cdata, weight.stride(), far


def _pack(
    matrices: Sequence[Matrix], weights: Sequence[Sequence[Tensor]], like: Tensor, affine: Affine | None
) -> Iterator[Tensor]:
    """One launch."""
    transposed = matrices[0].transposed
    numbers: dict[_Key, int] = {}
    read: list[Tensor] = []
    parts = []
    for own in weights:
        found = []
        for weight in own:
            number = numbers.setdefault(_key(weight), len(read))
            if number == len(read):
                read.append(weight)
            offset = int(weight.storage_offset()) - int(read[number].storage_offset())
            length, step = (weight.shape[0], weight.stride(0)) if transposed else (weight.shape[1], weight.stride(1))
            found.append(Part(number, offset, length, step, weight.stride(3)))
        parts.append(tuple(found))
    steps = tuple(weight.stride(1 if transposed else 0) for weight in read)
    block, at_once = LANES, 256
    if INTERPRETED:  # few programs, and large ones
        block = math.gcd(64, *(each.of_pixel if each.pixels > 1 else each.columns for each in matrices))
        at_once = 512
    else:  # few numbers of weights, for each of which the kernel is compiled
        read += read[:1] * (power_of_2(len(read)) - len(read))
    sizes = [matrix.columns * matrix.rows.shape[1] for matrix in matrices]
    packed = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    if packed.numel():
        tables = _tables(tuple(matrices), tuple(parts), steps, block, at_once, like.device)
        tiles, length = len(tables.programs), 0 if affine is None else len(affine.channel)
        scale, shift, channel, made = (packed, packed, tables.steps, packed) if affine is None else affine
        with on_device_of(like):
            start(
                device_pack.pack_weights, (tiles + cdiv(length, at_once),),
                tuple(read), *tables, packed, scale, shift, channel, made, tiles, length,
                TILE_COLUMNS=block, TILE_K=at_once, AFFINE=affine is not None, num_warps=4,
            )  # fmt: skip
    for matrix, values in zip(matrices, packed.split(sizes), strict=True):
        yield values.view(matrix.columns, -1) if len(values) else values.view(matrix.columns, 0)


class _Tables(NamedTuple):
    """The tables of `pack_weights`, int32, in its order."""

    programs: Tensor
    matrices: Tensor
    k_weight: Tensor
    k_offset: Tensor
    steps: Tensor


@device_constant(maxsize=4096)
def _tables(
    matrices: tuple[Matrix, ...],
    parts: tuple[tuple[Part, ...], ...],
    steps: tuple[int, ...],
    tile_columns: int,
    tile_k: int,
    device: torch.device,
) -> _Tables:
    programs, rows = [np.zeros(0, np.int32)], []
    k_weight, k_offset = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    first = begin = to = 0
    for number, (matrix, own) in enumerate(zip(matrices, parts, strict=True)):
        index = matrix.rows
        if not index.size:
            continue
        all_k, taps = index.shape[1], matrix.kernel_size**2
        rows.append((number, (first, all_k, begin, to // LANES, matrix.channels, matrix.of_pixel, matrix.pixels, 0)))
        programs.append(np.full(matrix.columns // tile_columns * cdiv(all_k, tile_k), number, np.int32))
        of_part = np.array(own).T
        ends = np.cumsum(of_part[2])
        channel = index // taps
        part = np.where(index >= 0, np.searchsorted(ends, channel, side="right"), 0)
        which, offset, _, channel_step, tap_step = of_part[:, part]
        offset = offset + (channel - (ends - of_part[2])[part]) * channel_step + index % taps * tap_step
        k_weight.append(np.where(index >= 0, which, -1).reshape(-1))
        k_offset.append(np.where(index >= 0, offset, 0).reshape(-1))
        first, begin, to = first + len(programs[-1]), begin + index.size, to + matrix.columns * all_k
    table = np.zeros((len(matrices), 8), np.int32)
    for number, row in rows:
        table[number] = row
    made = np.concatenate(programs), table, np.concatenate(k_weight), np.concatenate(k_offset), np.array(steps)
    return _Tables(*(upload(each.astype(np.int32), device) for each in made))
