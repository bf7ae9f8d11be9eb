"""BatchNorm around the convolutions: merge of statistics, normalise + activation, backward's elementwise part.

    mean = sum_t s_t / n,   variance = sum_t (M2_t + n_t (s_t / n_t - mean)^2) / n        (Chan: no cancellation)
    y  = act(z scale + shift),   scale = gamma rstd,   shift = beta - mean scale,   rstd = 1 / sqrt(variance + eps)
    dz = a g + q (z - mean) + r,   a = gamma rstd,   q = -a rstd sum(g xhat) / n,   r = -a sum(g) / n

Letters: t tile of pixels with sum s_t, squared deviations M2_t around its own mean and n_t pixels; n pixels in all
(times the pixels of an output group); z raw convolution output; y activated value; g gradient behind the activation;
band: one tile's columns of one pixel of an output group. One program sums all bands of its channels in one order, so
two runs are equal to the bit.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .affine import affine_of
from .conv import activate
from .dependent import wait_for_predecessor


@triton.jit
def _band(first, bands, columns8, positions, group_channels8, BANDS: tl.constexpr):
    """(band's tile, where its columns start, whether there is such a band) of BANDS bands from `first` on."""
    band = first + tl.arange(0, BANDS)
    tile = band // positions
    return tile, tile * (16 * columns8) + band % positions * (group_channels8 * 8), band < bands


@triton.jit(  # one form for all shapes; mean and variance may be parts of longer rows, of any alignment
    do_not_specialize=["tiles", "rows", "channels", "columns8", "tile_rows", "positions", "group_channels8"],
    do_not_specialize_on_alignment=["mean", "variance"],
)
def merge_statistics(
    partial, mean, variance, tiles, rows, channels, columns8, tile_rows, positions, group_channels8,
    BANDS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """partial [tiles, 2, columns8 * 8] (sum, M2) -> mean, biased variance [channels]; grid (blocks of channels,).

    A tile holds tile_rows rows, the last one what is left of `rows`; a channel has a column for each of the positions
    of an output group, its bands, 8 group_channels8 apart. ONCE: BANDS are all there are, and stay in registers between
    the two sums. A block of 4 or 8 channels lies within the padded ones, so nothing is masked along it and its loads
    stay whole.
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bands = tiles * positions
    pixels = (rows * positions).to(ACC)
    total = tl.zeros((BANDS, BLOCK), ACC)
    squares = tl.zeros((BANDS, BLOCK), ACC)
    wait_for_predecessor(PDL)
    if ONCE:
        tile, at, inside = _band(0, bands, columns8, positions, group_channels8, BANDS)
        total = tl.load(partial + (at[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
        squares = tl.load(partial + ((at + columns8 * 8)[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
        center = tl.sum(total, 0) / pixels
        count = tl.where(inside, tl.minimum(rows - tile * tile_rows, tile_rows), 0).to(ACC)
        away = total / tl.maximum(count, 1)[:, None] - center[None, :]
        squares += away * away * count[:, None]
    else:
        for first in range(0, bands, BANDS):
            tile, at, inside = _band(first, bands, columns8, positions, group_channels8, BANDS)
            total += tl.load(partial + (at[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
        center = tl.sum(total, 0) / pixels
        for first in range(0, bands, BANDS):
            tile, at, inside = _band(first, bands, columns8, positions, group_channels8, BANDS)
            sums = tl.load(partial + (at[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
            inner = tl.load(
                partial + ((at + columns8 * 8)[:, None] + channel[None, :]), mask=inside[:, None], other=0.0
            )
            count = tl.where(inside, tl.minimum(rows - tile * tile_rows, tile_rows), 0).to(ACC)
            away = sums / tl.maximum(count, 1)[:, None] - center[None, :]
            squares += inner + away * away * count[:, None]
    tl.store(mean + channel, center, mask=channel < channels)
    tl.store(variance + channel, tl.sum(squares, 0) / pixels, mask=channel < channels)


@triton.jit(do_not_specialize=["tiles", "channels", "columns8", "positions", "group_channels8"])
def merge_sums(
    partial, first, second, tiles, channels, columns8, positions, group_channels8,
    BANDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """partial [tiles, 2, columns8 * 8] -> two sums [channels] over tiles and positions; grid (blocks of channels,).

    Bands and blocks as in `merge_statistics`.
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bands = tiles * positions
    total = tl.zeros((BANDS, BLOCK), ACC)
    total2 = tl.zeros((BANDS, BLOCK), ACC)
    wait_for_predecessor(PDL)
    for start in range(0, bands, BANDS):
        _, at, inside = _band(start, bands, columns8, positions, group_channels8, BANDS)
        total += tl.load(partial + (at[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
        total2 += tl.load(partial + ((at + columns8 * 8)[:, None] + channel[None, :]), mask=inside[:, None], other=0.0)
    tl.store(first + channel, tl.sum(total, 0), mask=channel < channels)
    tl.store(second + channel, tl.sum(total2, 0), mask=channel < channels)


@triton.jit(do_not_specialize=["rows", "row8", "channels"])
def slot_statistics(
    source, partial, rows, row8, channels, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Per tile sum and M2 of a slot, the partials of a convolution's epilogue; grid (channel blocks, row tiles)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    columns = tl.num_programs(0) * BLOCK
    tile = tl.program_id(1)
    pixel = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    wait_for_predecessor(PDL)
    value = tl.load(source + pixel[:, None] * (row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    total = tl.sum(value, 0)
    count = tl.minimum(rows - tile * TILE_ROWS, TILE_ROWS).to(ACC)
    centered = tl.where(mask, value - (total / count)[None, :], 0.0)
    tl.store(partial + tile * 2 * columns + channel, total)
    tl.store(partial + (tile * 2 + 1) * columns + channel, tl.sum(centered * centered, 0))


@triton.jit(do_not_specialize=["rows", "z_row8", "out_row8", "channels"])
def normalise(
    z, scale, shift, mean, variance, out, rows, z_row8, out_row8, channels,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = act(z scale + shift), zeros in the slot's padding; grid (row tiles, channel blocks).

    With an EPS, scale and shift are gamma and beta (of any dtype), and mean and variance make the affine of them.
    """
    ACC: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    pixel = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    wait_for_predecessor(PDL)
    a = tl.load(scale + channel, mask=real, other=0.0).to(ACC)
    b = tl.load(shift + channel, mask=real, other=0.0).to(ACC)
    if EPS is not None:
        center = tl.load(mean + channel, mask=real, other=0.0).to(a.dtype)
        spread = tl.load(variance + channel, mask=real, other=1.0).to(a.dtype)
        a, b = affine_of(a, b, center, spread, EPS)
    value = tl.load(z + pixel[:, None] * (z_row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    value = tl.where(real[None, :], activate(value * a[None, :] + b[None, :], ACTIVATION), 0.0)
    to = out + pixel[:, None] * (out_row8 * 8) + channel[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "g_row8", "z_row8", "channels"])
def bn_backward(
    g, z, a, q, r, mean, q_share, r_share, rows, g_row8, z_row8, channels,
    HAS_A: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_SHARE: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """g = a g + q (z - mean) + r in place, zeros in the padding; grid (row tiles, channel blocks).

    All per channel. HAS_SHARE: q and r are sums, to be multiplied by q_share and r_share. Without HAS_A a is 1, without
    HAS_MEAN mean is 0.
    """
    ACC: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    pixel = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    mask = (pixel < rows)[:, None] & (channel < (channels + 7) // 8 * 8)[None, :]
    g_at = g + pixel[:, None] * (g_row8 * 8) + channel[None, :]
    wait_for_predecessor(PDL)
    z_value = tl.load(z + pixel[:, None] * (z_row8 * 8) + channel[None, :], mask=mask, other=0.0).to(ACC)
    value = tl.load(g_at, mask=mask, other=0.0).to(ACC)
    if HAS_A:
        value = value * tl.load(a + channel, mask=real, other=0.0).to(ACC)[None, :]
    linear = tl.load(q + channel, mask=real, other=0.0).to(ACC)
    constant = tl.load(r + channel, mask=real, other=0.0).to(ACC)
    if HAS_SHARE:
        linear *= tl.load(q_share + channel, mask=real, other=0.0).to(ACC)
        constant *= tl.load(r_share + channel, mask=real, other=0.0).to(ACC)
    if HAS_MEAN:  # not out of the constant: where the mean is many deviations, z and q mean would cancel
        z_value -= tl.load(mean + channel, mask=real, other=0.0).to(ACC)[None, :]
    value += z_value * linear[None, :] + constant[None, :]
    tl.store(g_at, tl.where(real[None, :], value, 0.0).to(g.dtype.element_ty), mask=mask)
