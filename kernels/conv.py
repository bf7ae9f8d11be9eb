"""The table-driven convolution: forward and data gradient, 1x1 and 3x3, any list of linked slots.

    acc[m, n] = sum over k of A[m, k] W[n, k]
    A[m, k]   = source[pixel_m * row_k + delta_k] where tap_k of pixel_m lies inside the image, else 0
    with AFFINE, A[m, k] = act(that * scale_k + shift_k): BatchNorm and activation on load, anew for every tap

and one of these epilogues writes the slot `out`:

    PLAIN       out = acc                               (with ADD: out += acc)
    STATISTICS  z = round(acc); out = z; partial[tile] = sum of z, and M2 = sum of (z - tile mean)^2, per channel
    BIAS        out = act(acc + bias)
    MASK        g = acc act'(z scale + shift) (with ADD: out + acc in acc's place); out = round(g);
                partial[tile] = sum of round(g), and sum of round(g) xhat, xhat = (z - mean) rstd

Where few programs would each walk a long K, splits of it do so at once, and another kernel ends them all the same way:

    PARTIAL     partial[s] = sum over the k of split s
    then        acc = sum over s, in one fixed order, of partial[s], and one of the above

Everything is accumulated in fp32 (fp64 for fp64 slots) and each output element is written once, by one program.

Letters: m row of the product: one pixel, or a group of GROUP_H x GROUP_W of them; n column: output channel, or (pixel
of the group, channel); k position in K, see tables.py; tile: TILE_ROWS rows of one program; s split: a range of K's
chunks. Two column parts, TILE_COLUMNS + TILE_COLUMNS2, share a tile of A: widths such as 40 or 144 are no power of two.
Names in 8: a number of 8-channel units, so that the compiler knows the alignment.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .dependent import wait_for_predecessor

PLAIN = tl.constexpr(0)
STATISTICS = tl.constexpr(1)
BIAS = tl.constexpr(2)
MASK = tl.constexpr(3)
PARTIAL = tl.constexpr(4)

IDENTITY = tl.constexpr(0)
RELU6 = tl.constexpr(2)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The activation, by its number in `thresholdnet.activations`; NaN stays NaN, as in torch."""
    if (ACTIVATION > 0) & (ACTIVATION < 1):  # LeakyReLU's slope
        value = tl.where(value < 0.0, value * ACTIVATION, value)
    elif ACTIVATION != IDENTITY:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == RELU6:
        value = tl.minimum(value, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def behind_activation(g, value, ACTIVATION: tl.constexpr):
    """g act'(value): the gradient in front of the activation (torch: its derivative is 1 open on both sides)."""
    if (ACTIVATION > 0) & (ACTIVATION < 1):
        return tl.where(value > 0.0, g, g * ACTIVATION)
    elif ACTIVATION == RELU6:
        return tl.where((value > 0.0) & (value < 6.0), g, 0.0)
    else:
        return tl.where(value > 0.0, g, 0.0)


@triton.jit
def _epilogue(
    acc, columns, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
    first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
    TILE_ROWS: tl.constexpr, GROUP_H: tl.constexpr, GROUP_W: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    if GROUP_H * GROUP_W > 1:
        position = columns // GROUP_CHANNELS
        pixel = (position // GROUP_W) * image_width + position % GROUP_W
        channel = columns % GROUP_CHANNELS
        stored = columns < GROUP_H * GROUP_W * GROUP_CHANNELS
        at = pixel * (out_row8 * 8) + channel
    else:
        channel = columns
        stored = columns < (out_channels + 7) // 8 * 8
        at = columns
    at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
    to = first[:, None] * (out_row8 * 8) + at[None, :]
    mask = row_valid[:, None] & stored[None, :]
    real = channel < out_channels  # of the slot's padded channels: the others are written as zeros
    dtype = out.dtype.element_ty
    if ADD:
        before = tl.load(out + to, mask=mask, other=0.0).to(acc.dtype)
        acc += tl.where(real[None, :], before, 0.0)
    if EPILOGUE == PLAIN:
        tl.store(out + to, acc.to(dtype), mask=mask)
    elif EPILOGUE == PARTIAL:  # whole tiles: `finish_splits` reads no row that was not written
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        tl.store(partial + row[:, None] * all_columns + columns[None, :], acc)
    elif EPILOGUE == BIAS:
        bias = tl.load(vector0 + channel, mask=stored & real, other=0.0).to(acc.dtype)
        tl.store(out + to, activate(acc + bias[None, :], ACTIVATION).to(dtype), mask=mask)
    elif EPILOGUE == STATISTICS:
        z = acc.to(dtype)
        tl.store(out + to, z, mask=mask)
        z = tl.where(row_valid[:, None], z.to(acc.dtype), 0.0)  # with AFFINE, rows past the end hold act(shift) W
        total = tl.sum(z, 0)
        count = tl.minimum(num_rows - tile * TILE_ROWS, TILE_ROWS).to(acc.dtype)
        centered = tl.where(row_valid[:, None], z - (total / count)[None, :], 0.0)
        tl.store(partial + tile * 2 * all_columns + columns, total)
        tl.store(partial + (tile * 2 + 1) * all_columns + columns, tl.sum(centered * centered, 0))
    else:
        raw_at = pixel * (raw_row8 * 8) + channel if GROUP_H * GROUP_W > 1 else columns
        raw_at = tl.max_contiguous(tl.multiple_of(raw_at, 8), 8)
        z = tl.load(raw + first[:, None] * (raw_row8 * 8) + raw_at[None, :], mask=mask, other=0.0).to(acc.dtype)
        scale = tl.load(vector0 + channel, mask=stored & real, other=0.0).to(acc.dtype)
        shift = tl.load(vector1 + channel, mask=stored & real, other=0.0).to(acc.dtype)
        mean = tl.load(vector2 + channel, mask=stored & real, other=0.0).to(acc.dtype)
        rstd = tl.load(vector3 + channel, mask=stored & real, other=0.0).to(acc.dtype)
        g = behind_activation(acc, z * scale[None, :] + shift[None, :], ACTIVATION)
        g = g.to(dtype)  # rows past the end have read zeros: theirs is 0
        tl.store(out + to, g, mask=mask)
        g = g.to(acc.dtype)
        tl.store(partial + tile * 2 * all_columns + columns, tl.sum(g, 0))
        tl.store(partial + (tile * 2 + 1) * all_columns + columns, tl.sum(g * (z - mean[None, :]), 0) * rstd)


@triton.jit(
    do_not_specialize=[
        "num_rows", "image_width", "source_row8", "out_row8", "raw_row8", "num_chunks", "out_channels",
    ]
)  # fmt: skip
def convolution(
    source, weight, out, raw, entries, entry_row8, affine, taps_inside, first_pixel,
    vector0, vector1, vector2, vector3, partial,
    num_rows, image_width, source_row8, out_row8, raw_row8, num_chunks, out_channels,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_COLUMNS2: tl.constexpr, TILE_K: tl.constexpr,
    GROUP_H: tl.constexpr, GROUP_W: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, SLOT_ROWS: tl.constexpr, AFFINE: tl.constexpr, ACTIVATION: tl.constexpr,
    EPILOGUE: tl.constexpr, ADD: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of the convolution; grid (column tiles, row tiles), with PARTIAL (column tiles, row tiles, splits).

    source, out, raw point at the first channel of the base slot, the written slot and the raw slot of MASK; weight is
    packed [columns, K] with K contiguous (every dtype reaches the tensor cores with 16-byte copies). affine: fp32
    [2, K + TILE_K]. vector0..3: bias, or scale, shift, mean, rstd, each [out_channels]. partial: [tiles, 2, columns],
    with PARTIAL [splits, tiles * TILE_ROWS, columns], and no slot is written.
    TAPS: the kernel is 3x3 and reads taps_inside. SLOT_ROWS: the slots differ in their rows, and entry_row8 holds them.
    VECTOR: elements of one asynchronous copy.
    """
    column_tile = tl.program_id(0)
    tile = tl.program_id(1)
    all_columns = tl.num_programs(0) * (TILE_COLUMNS + TILE_COLUMNS2)
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    row_valid = rows < num_rows
    first = tl.load(first_pixel + rows, mask=row_valid, other=0) if GROUP_H * GROUP_W > 1 else rows
    if TAPS:
        inside = tl.load(taps_inside + rows, mask=row_valid, other=0)
    k = tl.arange(0, TILE_K)
    all_k = num_chunks * TILE_K
    if EPILOGUE == PARTIAL:  # no split is a chunk longer than another
        split, splits = tl.program_id(2), tl.num_programs(2)
        first_chunk = split * num_chunks // splits
        num_chunks = (split + 1) * num_chunks // splits - first_chunk
        entries += first_chunk * (TILE_K // 8)
        entry_row8 += first_chunk * (TILE_K // 8)
        weight += first_chunk * TILE_K
        affine += first_chunk * TILE_K
        tile += split * tl.num_programs(1)
    columns = column_tile * (TILE_COLUMNS + TILE_COLUMNS2) + tl.arange(0, TILE_COLUMNS)
    weight_at = weight + columns[:, None] * all_k + k[None, :]
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), ACC)
    if TILE_COLUMNS2 > 0:
        columns2 = column_tile * (TILE_COLUMNS + TILE_COLUMNS2) + TILE_COLUMNS + tl.arange(0, TILE_COLUMNS2)
        weight2_at = weight + columns2[:, None] * all_k + k[None, :]
        acc2 = tl.zeros((TILE_ROWS, TILE_COLUMNS2), ACC)
    # The next chunk's entries are loaded one iteration ahead of their use: an indirect load inside the iteration would
    # cost the pipeline one of its buffers.
    next_entry = tl.load(entries + k // 8)
    if SLOT_ROWS:
        next_row8 = tl.load(entry_row8 + k // 8)
    wait_for_predecessor(PDL)
    if AFFINE:
        next_scale = tl.load(affine + k)
        next_shift = tl.load(affine + all_k + TILE_K + k)
    for chunk in range(0, num_chunks):
        entry = next_entry
        next_entry = tl.load(entries + (chunk + 1) * (TILE_K // 8) + k // 8)
        at = tl.max_contiguous(tl.multiple_of((entry >> 5) * 8 + k % 8, VECTOR), VECTOR)
        if TAPS:
            valid = tl.max_constancy(((inside[:, None] >> (entry & 31)[None, :]) & 1) != 0, [1, VECTOR])
        else:
            valid = row_valid[:, None]
        if SLOT_ROWS:
            row = tl.max_constancy(next_row8 * 8, VECTOR)
            next_row8 = tl.load(entry_row8 + (chunk + 1) * (TILE_K // 8) + k // 8)
            where = first[:, None] * row[None, :] + at[None, :]
            where = tl.max_contiguous(tl.multiple_of(where, [1, VECTOR]), [1, VECTOR])
        else:
            where = (first * (source_row8 * 8))[:, None] + at[None, :]
        a = tl.load(source + where, mask=valid, other=0.0)
        if AFFINE:
            scale = next_scale
            shift = next_shift
            next_scale = tl.load(affine + (chunk + 1) * TILE_K + k)
            next_shift = tl.load(affine + all_k + TILE_K + (chunk + 1) * TILE_K + k)
            a = activate(a.to(ACC) * scale[None, :] + shift[None, :], ACTIVATION).to(source.dtype.element_ty)
            if TAPS:
                a = tl.where(valid, a, 0.0)  # the border is zero after the activation, not before it
        acc = tl.dot(a, tl.load(weight_at).T, acc, input_precision=PRECISION, out_dtype=ACC)
        weight_at += TILE_K
        if TILE_COLUMNS2 > 0:
            acc2 = tl.dot(a, tl.load(weight2_at).T, acc2, input_precision=PRECISION, out_dtype=ACC)
            weight2_at += TILE_K
    if EPILOGUE == MASK and TILE_COLUMNS >= 64:  # one half after the other: both at once would take twice the registers
        HALF: tl.constexpr = TILE_COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (TILE_ROWS, 2, HALF)), (0, 2, 1)))
        start = column_tile * (TILE_COLUMNS + TILE_COLUMNS2) + tl.arange(0, HALF)
        _epilogue(
            left, start, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
            first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
            TILE_ROWS, GROUP_H, GROUP_W, GROUP_CHANNELS, EPILOGUE, ACTIVATION, ADD,
        )  # fmt: skip
        _epilogue(
            right, start + HALF, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
            first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
            TILE_ROWS, GROUP_H, GROUP_W, GROUP_CHANNELS, EPILOGUE, ACTIVATION, ADD,
        )  # fmt: skip
    else:
        _epilogue(
            acc, columns, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
            first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
            TILE_ROWS, GROUP_H, GROUP_W, GROUP_CHANNELS, EPILOGUE, ACTIVATION, ADD,
        )  # fmt: skip
    if TILE_COLUMNS2 > 0:
        _epilogue(
            acc2, columns2, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
            first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
            TILE_ROWS, GROUP_H, GROUP_W, GROUP_CHANNELS, EPILOGUE, ACTIVATION, ADD,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["splits", "split_rows", "num_rows", "image_width", "out_row8", "raw_row8", "out_channels"]
)
def finish_splits(
    products, out, raw, first_pixel, vector0, vector1, vector2, vector3, partial,
    splits, split_rows, num_rows, image_width, out_row8, raw_row8, out_channels,
    SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    GROUP_H: tl.constexpr, GROUP_W: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of the sum over splits, with the convolution's epilogue; grid (column tiles, row tiles).

    products: what PARTIAL left, [splits, split_rows, columns]; those of all splits, at most SPLITS, are in flight at
    once. Tiles are smaller than the convolution's, so that there are many. The other operands as there.
    """
    tile = tl.program_id(1)
    all_columns = tl.num_programs(0) * TILE_COLUMNS
    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    split = tl.arange(0, SPLITS)
    row = split[:, None] * split_rows + rows[None, :]
    at = row[:, :, None] * all_columns + columns[None, None, :]
    row_valid = rows < num_rows
    first = tl.load(first_pixel + rows, mask=row_valid, other=0) if GROUP_H * GROUP_W > 1 else rows
    wait_for_predecessor(PDL)
    product = tl.load(products + at, mask=(split < splits)[:, None, None], other=0.0)
    _epilogue(
        tl.sum(product, 0), columns, all_columns, out, raw, vector0, vector1, vector2, vector3, partial,
        first, row_valid, tile, num_rows, image_width, out_row8, raw_row8, out_channels,
        TILE_ROWS, GROUP_H, GROUP_W, GROUP_CHANNELS, EPILOGUE, ACTIVATION, ADD,
    )  # fmt: skip
