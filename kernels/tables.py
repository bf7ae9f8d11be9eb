"""Where every operand of a convolution lies: K tables, pixel tables, weight maps. Pure numpy, cached and checked.

A convolution over linked slots is a matrix product whose inner dimension K runs over (8-channel group, tap) pairs:

    out[p, o] = sum over k of A[p, k] W[o, k],    A[p, k] = base[p * row + delta(k)], or 0 where tap(k) leaves the image

One int32 a group of 8 K rows says it all: entry = ((delta / 8) << 5) | tap, delta = (dy * width + dx) * row + offset
in elements. The taps of one chunk of channels lie side by side, so that their rows are still in the cache. Groups that
only fill the last chunk repeat a valid entry and have zero weights: nothing outside the linked slots is ever read.

Letters: p pixel, o output channel, k position in K; row: elements between two pixels of a slot; offset: first element
of a slot behind `base`; (dy, dx) a tap's shift. With output grouping a row of the product is a group of gh x gw
pixels, K has (gh + 2)(gw + 2) taps, and W has one band of columns for each pixel of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int32]
Group = tuple[int, int]

LANES = 8  # channels of one entry: 16 bytes of bf16
TAP_BITS = 5
MAX_TAPS = 31  # bit 31 of a pixel's mask is the sign
MAX_DELTA = 1 << 29  # elements: delta / 8 shifted by TAP_BITS has to fit an int32


class Source(NamedTuple):
    """A slot as the kernels see it: `width` channels, `offset` elements behind the base, `row` elements a pixel."""

    offset: int
    width: int
    row: int

    @property
    def padded(self) -> int:
        """Channels that the slot takes: a multiple of 8, zeros behind `width`."""
        return -(-self.width // LANES) * LANES


class KTable(NamedTuple):
    """One convolution's K dimension.

    Attributes:
        entries: int32 [(chunks + 1) * chunk / 8]; the spare chunk serves the kernel's prefetch.
        row8: int32, of the same length: elements between two pixels of the entry's slot, divided by 8.
        weight_index: int32 [positions, K], K = chunks * chunk: which element of an output channel's weights
            (input channel * taps + tap) belongs to this K row, -1 for none; one row for each pixel of the output group.
        channel: int32 [K + chunk]: input channel of each K row, -1 in padding; orders per-channel vectors.
        k_of_weight: int32 [input channels * taps]: the K row of each weight element. Empty with output grouping.
        chunks: length of the kernel's loop.
    """

    entries: Array
    row8: Array
    weight_index: Array
    channel: Array
    k_of_weight: Array
    chunks: int


def tap_shifts(kernel_size: int, group: Group = (1, 1), dilation: int = 1) -> list[tuple[int, int]]:
    """(dy, dx) of every tap seen from the first pixel of an output group, row by row; one (0, 0) for a 1x1 kernel.

    Only taps side by side (dilation 1) are shared by the pixels of a group.
    """
    if kernel_size == 1:
        return [(0, 0)]
    return [((y - 1) * dilation, (x - 1) * dilation) for y in range(group[0] + 2) for x in range(group[1] + 2)]


@lru_cache(maxsize=4096)
def k_table(
    sources: tuple[Source, ...],
    image_width: int,
    kernel_size: int,
    chunk: int,
    group: Group = (1, 1),
    transposed: bool = False,
    dilation: int = 1,
) -> KTable:
    """Build and check the K table of a convolution.

    Args:
        sources: slots in the order of the weight's input channels; none at all gives a table without chunks.
        image_width: pixels of an image row.
        kernel_size: 1 or 3.
        chunk: K rows that the kernel takes at a time (16 or more, a power of two).
        group: pixels (height, width) that one row of the product computes; (1, 1) for a 1x1 kernel.
        transposed: mirror the taps, as the data gradient needs them.
        dilation: pixels between two taps.

    Raises:
        ValueError: a source that is not aligned to 8, an offset that an entry cannot hold, or a dilated group.
    """
    if dilation > 1 and group != (1, 1):
        raise ValueError(f"group must be (1, 1) with dilation {dilation}, got {group}")
    taps = kernel_size * kernel_size
    shifts = tap_shifts(kernel_size, group, dilation)
    widths = tuple(source.width for source in sources)
    offset = [source.offset + start for source in sources for start in range(0, source.width, LANES)]
    row = [source.row for source in sources for _ in range(0, source.width, LANES)]
    per_chunk = chunk // LANES
    order = _k_order(len(offset), len(shifts), per_chunk)
    chunks = -(-len(order) // per_chunk)
    weight_index = weight_rows(widths, kernel_size, chunk, group, transposed)
    if not order:
        none = np.zeros(0, np.int32)
        empty = np.zeros(per_chunk, np.int32)
        return _frozen(
            KTable(empty, empty.copy(), weight_index, k_channels(widths, kernel_size, chunk, group), none, 0)
        )
    spare = (chunks + 1) * per_chunk - len(order)
    center = shifts.index((0, 0))
    g, t = np.array([*order, *[(0, center)] * spare]).T
    dy, dx = np.array(shifts).T
    delta = (dy[t] * image_width + dx[t]) * np.array(row)[g] + np.array(offset)[g]
    if np.abs(delta).max() >= MAX_DELTA:
        raise ValueError(f"slots must lie within {MAX_DELTA} elements of each other, got {int(np.abs(delta).max())}")
    k_of_weight = np.full(sum(widths) * taps if group == (1, 1) else 0, -1, np.int32)
    if group == (1, 1):
        real = np.flatnonzero(weight_index[0] >= 0)
        k_of_weight[weight_index[0][real]] = real
    table = KTable(
        (delta // LANES << TAP_BITS | t).astype(np.int32),
        (np.array(row)[g] // LANES).astype(np.int32),
        weight_index,
        k_channels(widths, kernel_size, chunk, group),
        k_of_weight,
        chunks,
    )
    check_k_table(table, sources, image_width, kernel_size, group, dilation)
    return _frozen(table)


@lru_cache(maxsize=4096)
def weight_rows(
    widths: tuple[int, ...], kernel_size: int, chunk: int, group: Group = (1, 1), transposed: bool = False
) -> Array:
    """`KTable.weight_index` of sources of these widths: it does not depend on where they lie. Arguments as there."""
    shifts, channel = tap_shifts(kernel_size, group), k_channels(widths, kernel_size, chunk, group)[:-chunk]
    t = np.zeros(len(channel) // LANES, np.int32)  # of padding any
    order = _k_order(len(_group_channels(widths)), len(shifts), chunk // LANES)
    t[: len(order)] = [tap for _, tap in order]
    dy, dx = np.array(shifts)[t].repeat(LANES, 0).T
    taps, positions = kernel_size * kernel_size, group[0] * group[1]
    index = np.array([_weight_index(channel, dy, dx, taps, *divmod(at, group[1])) for at in range(positions)], np.int32)
    if transposed:
        index = np.where(index >= 0, index // taps * taps + taps - 1 - index % taps, -1).astype(np.int32)
    index.setflags(write=False)
    return index


@lru_cache(maxsize=4096)
def k_channels(widths: tuple[int, ...], kernel_size: int, chunk: int, group: Group = (1, 1)) -> Array:
    """`KTable.channel` of sources of these widths. Arguments as there."""
    channel, per_chunk = _group_channels(widths), chunk // LANES
    order = _k_order(len(channel), len(tap_shifts(kernel_size, group)), per_chunk)
    made = np.full((-(-len(order) // per_chunk) + 1) * chunk, -1, np.int32)
    made[: len(order) * LANES] = channel[[g for g, _ in order]].reshape(-1)
    made.setflags(write=False)
    return made


def _group_channels(widths: Sequence[int]) -> Array:
    """Input channel of each lane of each 8-channel group, -1 in padding; [groups, 8]."""
    channel, first = [np.zeros((0, LANES), np.int32)], 0
    for width in widths:
        lane = np.arange(-(-width // LANES) * LANES, dtype=np.int32)
        channel.append(np.where(lane < width, first + lane, -1).reshape(-1, LANES))
        first += width
    return np.concatenate(channel)


@lru_cache(maxsize=4096)
def _k_order(groups: int, taps: int, per_chunk: int) -> tuple[tuple[int, int], ...]:
    """(group, tap) along K: chunk of channels outermost, then taps, then the groups of the chunk."""
    return tuple(
        (g, t)
        for start in range(0, groups, per_chunk)
        for t in range(taps)
        for g in range(start, min(start + per_chunk, groups))
    )


def _weight_index(channel: Array, dy: Array, dx: Array, taps: int, y: int, x: int) -> Array:
    """Weight element of each K row for the pixel (y, x) of the group; -1 where the tap is not one of that pixel's."""
    if taps == 1:
        return channel
    tap_y, tap_x = dy - y + 1, dx - x + 1
    inside = (channel >= 0) & (tap_y >= 0) & (tap_y < 3) & (tap_x >= 0) & (tap_x < 3)
    return np.where(inside, channel * taps + tap_y * 3 + tap_x, -1)


def check_k_table(
    table: KTable,
    sources: Sequence[Source],
    image_width: int,
    kernel_size: int,
    group: Group = (1, 1),
    dilation: int = 1,
) -> None:
    """Raise ValueError unless every entry reads 8 channels of a linked slot and every weight has its place.

    Decodes the table as the kernel does: on a GPU a wrong entry would be garbage or a fault, in the interpreter
    nothing.
    """
    for source in sources:
        if source.offset % LANES or source.row % LANES or source.row < source.padded or source.width < 1:
            raise ValueError(
                f"slots must start and step by multiples of {LANES} channels and fit into a pixel's row, got {source}"
            )
    if not sources:
        return
    shifts = np.array(tap_shifts(kernel_size, group, dilation))
    tap = table.entries & (1 << TAP_BITS) - 1
    if len(shifts) > MAX_TAPS or tap.max() >= len(shifts):
        raise ValueError(f"K table must name taps below {len(shifts)}, got {tap.max()}")
    row = table.row8.astype(np.int64) * LANES
    start = (table.entries.astype(np.int64) >> TAP_BITS) * LANES - (shifts[tap] @ [image_width, 1]) * row
    inside = np.zeros(len(start), bool)
    for source in sources:
        inside |= (row == source.row) & (start >= source.offset) & (start + LANES <= source.offset + source.padded)
    if not inside.all():
        raise ValueError(f"K table must stay inside the linked slots, got entry {int(np.argmin(inside))} outside")
    weights = sum(source.width for source in sources) * kernel_size * kernel_size
    for index in table.weight_index:
        real = np.sort(index[index >= 0])
        if len(real) != weights or not np.array_equal(real, np.arange(weights)):
            raise ValueError(f"K table must hold each of the {weights} weights once, got {len(real)}")


class PixelTable(NamedTuple):
    """Per row of the product: which taps lie inside the image, and the row's first pixel.

    Attributes:
        taps_inside: int32 [rows], bit t set where tap t lies inside the image.
        first_pixel: int32 [rows].
    """

    taps_inside: Array
    first_pixel: Array


@lru_cache(maxsize=256)
def pixel_table(batch: int, height: int, width: int, group: Group = (1, 1), dilation: int = 1) -> PixelTable:
    """The pixel table of a 3x3 convolution; `height` and `width` are multiples of `group`.

    All layers of one dilation share it.
    """
    y = np.arange(0, height, group[0])[:, None]
    x = np.arange(0, width, group[1])[None, :]
    bits = np.zeros((len(y), x.shape[1]), np.int32)
    for t, (dy, dx) in enumerate(tap_shifts(3, group, dilation)):
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        bits |= inside.astype(np.int32) << np.int32(t)
    first = np.arange(batch)[:, None, None] * (height * width) + y * width + x
    return _frozen(PixelTable(np.tile(bits.reshape(-1), batch), first.reshape(-1).astype(np.int32)))


def column_table(outs: tuple[Source, ...], features: tuple[Source, ...], multiple: int) -> tuple[Array, Array, Array]:
    """Where the columns of the gathered data gradient lie: each slot's padded channels, one slot after the other.

    Args:
        outs, features: matching slots of the gradient and of the raw features.
        multiple: the number of columns is rounded up to it.

    Returns:
        Offset / 8 of every 8 columns in `outs` and in `features` (without the rounding), and the channel of each column
        (-1 in padding).
    """
    at = [
        [source.offset // LANES + i for source in sources for i in range(source.padded // LANES)]
        for sources in (outs, features)
    ]
    channel, first = [], 0
    for source in outs:
        channel += [first + i if i < source.width else -1 for i in range(source.padded)]
        first += source.width
    channel += [-1] * (-len(channel) % multiple)
    return np.array(at[0], np.int32), np.array(at[1], np.int32), np.array(channel, np.int32)


def _frozen(table):  # type: ignore[no-untyped-def]  # any array in, the same out
    """Cached arrays are shared: make writing to one an error."""
    for part in table:
        if isinstance(part, np.ndarray):
            part.setflags(write=False)
    return table
