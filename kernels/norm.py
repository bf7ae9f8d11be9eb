"""BatchNorm around the convolutions: merge of statistics, normalise + activation, backward's elementwise part.

    mean = sum_t s_t / n,   variance = sum_t (M2_t + n_t (s_t / n_t - mean)^2) / n        (Chan: no cancellation)
    y  = act(z scale + shift),   scale = gamma rstd,   shift = beta - mean scale,   rstd = 1 / sqrt(variance + eps)
    dz = a g + b z + c,   a = gamma rstd,   b = -a rstd sum(g xhat) / n,   c = -a sum(g) / n - b mean

Letters: t tile of pixels with sum s_t, squared deviations M2_t around its own mean and n_t pixels; n pixels in all
(times the pixels of an output group); z raw convolution output; y activated value; g gradient behind the activation; a
program merges its channels' tiles in ascending order, so two runs are equal to the bit.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .conv import activate


@triton.jit(do_not_specialize=["tiles", "rows", "channels", "columns"])
def merge_statistics(
    partial, mean, variance, tiles, rows, channels, columns,
    TILE_ROWS: tl.constexpr, POSITIONS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [tiles, 2, columns] (sum, M2) -> mean, biased variance [channels]; grid (blocks of channels,).

    A tile holds TILE_ROWS rows, the last one what is left of `rows`; a channel has POSITIONS columns.
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    pixels = (rows * POSITIONS).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & real[None, :]
        for position in tl.static_range(POSITIONS):
            at = tile[:, None] * 2 * columns + (position * GROUP_CHANNELS + channel)[None, :]
            total += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
    center = total / pixels
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & real[None, :]
        count = tl.maximum(tl.minimum(rows - tile * TILE_ROWS, TILE_ROWS), 1).to(ACC)
        for position in tl.static_range(POSITIONS):
            at = tile[:, None] * 2 * columns + (position * GROUP_CHANNELS + channel)[None, :]
            away = tl.load(partial + at, mask=mask, other=0.0) / count[:, None] - center[None, :]
            inner = tl.load(partial + at + columns, mask=mask, other=0.0)
            squares += tl.sum(tl.where(mask, inner + away * away * count[:, None], 0.0), 0)
    tl.store(mean + channel, center, mask=real)
    tl.store(variance + channel, squares / pixels, mask=real)


@triton.jit(do_not_specialize=["tiles", "channels", "columns"])
def merge_sums(
    partial, first, second, tiles, channels, columns,
    POSITIONS: tl.constexpr, GROUP_CHANNELS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [tiles, 2, columns] -> two sums [channels] over tiles and positions; grid (channel blocks,)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    total = tl.zeros((BLOCK,), ACC)
    total2 = tl.zeros((BLOCK,), ACC)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & real[None, :]
        for position in tl.static_range(POSITIONS):
            at = tile[:, None] * 2 * columns + (position * GROUP_CHANNELS + channel)[None, :]
            total += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
            total2 += tl.sum(tl.load(partial + at + columns, mask=mask, other=0.0), 0)
    tl.store(first + channel, total, mask=real)
    tl.store(second + channel, total2, mask=real)


@triton.jit(do_not_specialize=["rows", "row8", "channels"])
def slot_statistics(source, partial, rows, row8, channels, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Per tile sum and M2 of a slot, the partials of a convolution's epilogue; grid (channel blocks, row tiles)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    columns = tl.num_programs(0) * BLOCK
    tile = tl.program_id(1)
    pixel = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    value = tl.load(source + pixel[:, None] * (row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    total = tl.sum(value, 0)
    count = tl.minimum(rows - tile * TILE_ROWS, TILE_ROWS).to(ACC)
    centered = tl.where(mask, value - (total / count)[None, :], 0.0)
    tl.store(partial + tile * 2 * columns + channel, total)
    tl.store(partial + (tile * 2 + 1) * columns + channel, tl.sum(centered * centered, 0))


@triton.jit(do_not_specialize=["rows", "z_row8", "out_row8", "channels"])
def normalise(
    z, scale, shift, out, rows, z_row8, out_row8, channels,
    ACTIVATION: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = act(z scale + shift), zeros in the slot's padding; grid (row tiles, channel blocks)."""
    ACC: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    pixel = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    a = tl.load(scale + channel, mask=real, other=0.0).to(ACC)
    b = tl.load(shift + channel, mask=real, other=0.0).to(ACC)
    value = tl.load(z + pixel[:, None] * (z_row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    value = tl.where(real[None, :], activate(value * a[None, :] + b[None, :], ACTIVATION), 0.0)
    to = out + pixel[:, None] * (out_row8 * 8) + channel[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "g_row8", "z_row8", "channels"])
def bn_backward(
    g, z, a, b, c, rows, g_row8, z_row8, channels,
    HAS_A: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g = a g + b z + c in place (a = 1 without HAS_A), zeros in the padding; grid (row tiles, channel blocks)."""
    ACC: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    pixel = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    g_at = g + pixel[:, None] * (g_row8 * 8) + channel[None, :]
    z_value = tl.load(z + pixel[:, None] * (z_row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    value = tl.load(g_at, mask=mask, other=0.0).to(ACC)
    if HAS_A:
        value = value * tl.load(a + channel, mask=real, other=0.0).to(ACC)[None, :]
    value += z_value * tl.load(b + channel, mask=real, other=0.0).to(ACC)[None, :]
    value += tl.load(c + channel, mask=real, other=0.0).to(ACC)[None, :]
    tl.store(g_at, tl.where(real[None, :], value, 0.0).to(g.dtype.element_ty), mask=mask)
