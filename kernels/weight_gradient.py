"""The weight gradient over the same K tables as the convolution, deterministic.

    partial[s, k, o] = sum over the pixels p of split s of A[p, k] dz[p, o]
    dW[o, w]         = sum over s, in one fixed order, of partial[s, k of weight element w, o]

A[p, k] as in conv.py, with the same affine and activation on load.

Letters: p pixel, o output channel, k position in K, s split: a range of SPLIT pixels; w = input channel * taps + tap.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .conv import activate
from .dependent import wait_for_predecessor


@triton.jit(do_not_specialize=["rows", "source_row8", "dz_row8", "all_k", "out_channels", "split_rows"])
def weight_gradient(
    source, dz, partial, entries, entry_row8, scale, shift, channel, taps_inside,
    rows, source_row8, dz_row8, all_k, out_channels, split_rows,
    TILE_ROWS: tl.constexpr, TILE_K: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TAPS: tl.constexpr, SLOT_ROWS: tl.constexpr, AFFINE: tl.constexpr, ACTIVATION: tl.constexpr,
    SWAPPED: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of one split's partial sum; grid (chunks of K, column tiles, splits).

    partial: fp32 [splits, K, columns]; scale, shift [input channels], which `channel` (KTable.channel) brings in the
    order of K. SWAPPED computes the transposed tile, dz^T A: with AFFINE this keeps the copies of A asynchronous on
    sm_90. TAPS, SLOT_ROWS, VECTOR as in conv.convolution.
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    all_columns = tl.num_programs(1) * TILE_COLUMNS
    split = tl.program_id(2)
    k = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    entry = tl.load(entries + k // 8)
    at = tl.max_contiguous(tl.multiple_of((entry >> 5) * 8 + k % 8, VECTOR), VECTOR)
    tap = entry & 31
    if SLOT_ROWS:
        row = tl.max_constancy(tl.load(entry_row8 + k // 8) * 8, VECTOR)
    if AFFINE:
        of_k = tl.load(channel + k)
    wait_for_predecessor(PDL)
    if AFFINE:
        a_scale = tl.load(scale + of_k, mask=of_k >= 0, other=0.0)
        a_shift = tl.load(shift + of_k, mask=of_k >= 0, other=0.0)
    stored = columns < (out_channels + 7) // 8 * 8
    acc = tl.zeros((TILE_COLUMNS, TILE_K), ACC) if SWAPPED else tl.zeros((TILE_K, TILE_COLUMNS), ACC)
    start = split * split_rows
    end = tl.minimum(start + split_rows, rows)
    if TAPS:  # loaded one iteration ahead of their use, as the entries in conv.py
        pixel = start + tl.arange(0, TILE_ROWS)
        next_inside = tl.load(taps_inside + pixel, mask=pixel < end, other=0)
    for base in range(start, end, TILE_ROWS):
        pixel = base + tl.arange(0, TILE_ROWS)
        row_valid = pixel < end
        if TAPS:
            inside = next_inside
            next_inside = tl.load(taps_inside + pixel + TILE_ROWS, mask=pixel + TILE_ROWS < end, other=0)
            valid = tl.max_constancy(((inside[:, None] >> tap[None, :]) & 1) != 0, [1, VECTOR])
        else:
            valid = row_valid[:, None]
        if SLOT_ROWS:
            where = pixel[:, None] * row[None, :] + at[None, :]
            where = tl.max_contiguous(tl.multiple_of(where, [1, VECTOR]), [1, VECTOR])
        else:
            where = (pixel * (source_row8 * 8))[:, None] + at[None, :]
        a = tl.load(source + where, mask=valid, other=0.0)
        dz_at = (pixel * (dz_row8 * 8))[:, None] + columns[None, :]
        d = tl.load(dz + dz_at, mask=row_valid[:, None] & stored[None, :], other=0.0)
        if AFFINE:
            a = activate(a.to(ACC) * a_scale[None, :] + a_shift[None, :], ACTIVATION).to(source.dtype.element_ty)
            if TAPS:
                a = tl.where(valid, a, 0.0)
        if SWAPPED:
            acc = tl.dot(d.T, a, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a.T, d, acc, input_precision=PRECISION, out_dtype=ACC)
    to = partial + split * all_k * all_columns
    if SWAPPED:
        tl.store(to + k[None, :] * all_columns + columns[:, None], acc)
    else:
        tl.store(to + k[:, None] * all_columns + columns[None, :], acc)


@triton.jit
def reduce_splits(
    partials, tables, results, programs, gradients,
    SPLITS: tl.constexpr, WEIGHTS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of one of several dW [out_channels, weights], the first three being a pointer for each; grid (tiles,).

    programs [tiles]: each one's gradient. gradients [.., 8]: its first program, splits, K, columns / 16, weights,
    output channels, and tiles along its weights. tables: k of each weight, in the order of dW.

    SPLITS splits are in flight at once, for WEIGHTS x COLUMNS elements. o runs fastest, as it does in `partials`
    [splits, K, columns]: a K row of COLUMNS is one piece of memory, wherever the table puts it.
    """
    program = tl.program_id(0)
    which = tl.load(programs + program)
    partial, k_of_weight, result = partials[0], tables[0], results[0]
    for i in tl.static_range(1, len(partials)):
        partial = tl.where(which == i, partials[i], partial)
        k_of_weight = tl.where(which == i, tables[i], k_of_weight)
        result = tl.where(which == i, results[i], result)
    gradient = gradients + which * 8
    tile = program - tl.load(gradient)
    splits, all_k, all_columns = tl.load(gradient + 1), tl.load(gradient + 2), tl.load(gradient + 3) * 16
    weights, out_channels, across = tl.load(gradient + 4), tl.load(gradient + 5), tl.load(gradient + 6)
    w = tile % across * WEIGHTS + tl.arange(0, WEIGHTS)
    o = tile // across * COLUMNS + tl.arange(0, COLUMNS)
    real = (w < weights)[:, None] & (o < out_channels)[None, :]
    k = tl.load(k_of_weight + w, mask=w < weights, other=0)
    at = k[:, None] * all_columns + o[None, :]
    split = tl.arange(0, SPLITS)
    wait_for_predecessor(PDL)
    acc = tl.zeros((SPLITS, WEIGHTS, COLUMNS), partial.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        to = (start + split) * all_k * all_columns
        inside = (start + split < splits)[:, None, None]  # of the tile whole rows: a mask an element would split copies
        acc += tl.load(partial + (to[:, None, None] + at[None, :, :]), mask=inside, other=0.0)
    summed = tl.sum(acc, 0).to(result.dtype.element_ty)
    tl.store(result + o[None, :] * weights + w[:, None], summed, mask=real)
