"""Data gradient of several readers' convolutions behind BatchNorm + activation, gathered into slots at once.

Reader r normalises feature c with the shared statistics and its own affine: a_rc = act(gamma_rc xhat_c + beta_rc), and
convolves a_r by W_r, 1x1 or 3x3. Backward, for one tile of pixels p and channels c:

    g_rc[p]  = act'(gamma_rc xhat_c + beta_rc) * sum over t, n of W_r[n, c, -t] dz_r[p + t, n]
    G_c[p]   = rstd_c * sum over r of gamma_rc g_rc[p]        (with ADD: added to what is there)
    sums     = per tile, reader and channel: sum of g_rc (beta's gradient) and of g_rc xhat_c (gamma's)

The statistics' own share, Q_c f_c + R_c, is linear in these sums and applied once a channel by norm.bn_backward. One
read-modify-write of G serves all readers. A reader that lacks a channel has zeros for it in W, gamma and beta. The
tile is computed transposed, [channels, pixels]: affine and sums then run along rows, without shuffles between threads.

Letters: n channel of a reader's dz, c feature channel, t shift of a tap, where p + t lies inside the image (one of no
shift in a 1x1 kernel), f raw feature, xhat = (f - mean) rstd.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .conv import behind_activation
from .dependent import wait_for_predecessor


@triton.jit(do_not_specialize=["depth"])
def pack_readers(
    weights, gammas, betas, layouts, column_channel, packed, affine, depth,
    TILE_COLUMNS: tl.constexpr, TILE_DEPTH: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """packed [readers, columns, taps, depths] = W_r[d, channel of the column, tap], the taps from last to first.

    affine [readers, 2, columns] = gamma, beta. 0 in padding; grid (column tiles, depth tiles of all taps, readers).
    layouts [readers, 3]: a weight's steps between two rows, two channels and two taps; depth: its rows.
    """
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    k = tl.program_id(1) * TILE_DEPTH + tl.arange(0, TILE_DEPTH)
    all_columns = tl.num_programs(0) * TILE_COLUMNS
    all_k = tl.num_programs(1) * TILE_DEPTH
    d = k % (all_k // TAPS)
    tap = TAPS - 1 - k // (all_k // TAPS)
    channel = tl.load(column_channel + columns)
    mask = (channel >= 0)[:, None] & (d < depth)[None, :]
    wait_for_predecessor(PDL)
    for reader in tl.static_range(len(weights)):  # a program does its own one
        if tl.program_id(2) == reader:
            row = d * tl.load(layouts + reader * 3) + tap * tl.load(layouts + reader * 3 + 2)
            at = channel[:, None] * tl.load(layouts + reader * 3 + 1) + row[None, :]
            value = tl.load(weights[reader] + at, mask=mask, other=0.0).to(packed.dtype.element_ty)
            tl.store(packed + ((reader * all_columns + columns)[:, None] * all_k + k[None, :]), value)
            if tl.program_id(1) == 0:
                gamma = tl.load(gammas[reader] + channel, mask=channel >= 0, other=0.0)
                beta = tl.load(betas[reader] + channel, mask=channel >= 0, other=0.0)
                tl.store(affine + reader * 2 * all_columns + columns, gamma.to(affine.dtype.element_ty))
                tl.store(affine + (reader * 2 + 1) * all_columns + columns, beta.to(affine.dtype.element_ty))


@triton.jit(  # terms and shares are parts of longer rows, of any alignment
    do_not_specialize=["tiles", "channels", "columns8", "terms_row"],
    do_not_specialize_on_alignment=["terms", "shares_g", "shares_gx"],
)
def merge_readers(
    partial, column_channel, sums, terms, shares_g, shares_gx, tiles, channels, columns8, terms_row,
    READERS: tl.constexpr, TERMS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """partial [tiles, readers, 2, columns8 * 8] -> sums [readers, 2, channels]; grid (column blocks, 2).

    TERMS: terms [2, channels], rows terms_row apart, get the sum over readers of share_r sum_r added; shares_g and
    shares_gx hold each reader's shares [channels], of sum g and of sum g xhat.
    """
    which = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.load(column_channel + columns)
    term = tl.zeros((BLOCK,), partial.dtype.element_ty)
    wait_for_predecessor(PDL)
    for reader in tl.static_range(READERS):
        acc = tl.zeros((TILES, BLOCK), partial.dtype.element_ty)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            at = (tile * (2 * READERS) + 2 * reader + which) * (columns8 * 8)
            acc += tl.load(partial + (at[:, None] + columns[None, :]), mask=(tile < tiles)[:, None], other=0.0)
        found = tl.sum(acc, 0)
        tl.store(sums + (2 * reader + which) * channels + channel, found, mask=channel >= 0)
        if TERMS:
            share = tl.where(which == 0, shares_g[reader], shares_gx[reader])
            term += tl.load(share + channel, mask=channel >= 0, other=0.0) * found
    if TERMS:
        to = terms + which * terms_row + channel
        tl.store(to, tl.load(to, mask=channel >= 0, other=0.0) + term, mask=channel >= 0)


@triton.jit(
    do_not_specialize=[
        "rows", "image_width", "dilation", "readers", "columns8", "depth8", "dz_row8", "out_row8", "feature_row8",
    ]
)  # fmt: skip
def gather_readers(
    dz, weight, out, feature, affine, mean, rstd, dz_at8, out_at8, feature_at8, column_channel, taps_inside, partial,
    rows, image_width, dilation, readers, columns8, depth8, dz_row8, out_row8, feature_row8,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr, TF32: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile; grid (column tiles, row tiles).

    dz_at8 [readers], out_at8 and feature_at8 [columns / 8]: where each reader's dz and each 8 columns lie, in units of
    8 elements; column_channel [columns]: the column's channel, -1 in padding. TAPS: 1, or 9 that read taps_inside
    [rows] and lie `dilation` pixels apart. weight [readers, columns, TAPS * PARTS * DEPTH]; depth8: padded channels of
    dz / 8; affine [readers, 2, columns]: gamma, beta; mean, rstd [channels]; partial [row tiles, readers, 2, columns].
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    READERS_STAGES: tl.constexpr = STAGES if TAPS == 1 else 1  # a pipeline serves the innermost loop
    all_columns = tl.num_programs(0) * TILE_COLUMNS
    tile = tl.program_id(1)
    pixel = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    row_valid = pixel < rows
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    stored = columns < columns8 * 8  # a column behind the last slot must not store: it has no place
    channel = tl.load(column_channel + columns, mask=stored, other=-1)
    real = channel >= 0
    k = tl.arange(0, DEPTH)
    if TAPS > 1:
        inside = tl.load(taps_inside + pixel, mask=row_valid, other=0)
    mask = row_valid[:, None] & stored[None, :]
    feature_at = tl.load(feature_at8 + columns // 8, mask=stored, other=0) * 8 + columns % 8
    feature_at = tl.max_contiguous(tl.multiple_of(feature_at, 8), 8)
    wait_for_predecessor(PDL)
    f = tl.load(feature + (pixel * (feature_row8 * 8))[:, None] + feature_at[None, :], mask=mask, other=0.0)
    center = tl.load(mean + channel, mask=real, other=0.0)
    width = tl.load(rstd + channel, mask=real, other=0.0)
    out_at = tl.load(out_at8 + columns // 8, mask=stored, other=0) * 8 + columns % 8
    out_at = tl.max_contiguous(tl.multiple_of(out_at, 8), 8)
    to = out + (pixel * (out_row8 * 8))[:, None] + out_at[None, :]
    if ADD:  # asked for with the features: behind the loop nothing would hide the time it takes to arrive
        before = tl.load(to, mask=mask, other=0.0)
    xhat = (tl.trans(f).to(ACC) - center[:, None]) * width[:, None]
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), ACC)
    for reader in tl.range(0, readers, num_stages=READERS_STAGES):
        dz_at = dz + tl.load(dz_at8 + reader) * 8 + (pixel * (dz_row8 * 8))[:, None] + k[None, :]
        weight_at = weight + (reader * all_columns + columns[:, None]) * (TAPS * PARTS * DEPTH) + k[None, :]
        scale = tl.load(affine + reader * 2 * all_columns + columns)
        shift = tl.load(affine + (reader * 2 + 1) * all_columns + columns)
        g = tl.zeros((TILE_COLUMNS, TILE_ROWS), ACC)
        if TAPS == 1:
            for part in tl.static_range(PARTS):
                d = tl.load(
                    dz_at + part * DEPTH,
                    mask=row_valid[:, None] & (part * DEPTH + k < depth8 * 8)[None, :],
                    other=0.0,
                )
                w = tl.load(weight_at + part * DEPTH)
                g = tl.dot(w, d.T, g, input_precision=PRECISION, out_dtype=ACC)
        else:
            for step in tl.range(0, TAPS * PARTS, num_stages=STAGES):
                tap = step // PARTS
                first = step % PARTS * DEPTH
                shifted = ((tap // 3 - 1) * image_width + tap % 3 - 1) * dilation * (dz_row8 * 8) + first
                valid = ((inside >> tap) & 1) != 0
                d = tl.load(dz_at + shifted, mask=valid[:, None] & (first + k < depth8 * 8)[None, :], other=0.0)
                w = tl.load(weight_at + step * DEPTH)
                g = tl.dot(w, d.T, g, input_precision=PRECISION, out_dtype=ACC)
        g = behind_activation(g, xhat * scale[:, None] + shift[:, None], ACTIVATION)
        total += g * scale[:, None]
        sums = partial + (tile * readers + reader) * 2 * all_columns + columns
        tl.store(sums, tl.sum(g, 1))
        tl.store(sums + all_columns, tl.sum(g * xhat, 1))
    result = tl.trans(total * width[:, None])
    if ADD:
        result += before.to(ACC)
    result = tl.where(real[None, :], result, 0.0)
    tl.store(to, result.to(out.dtype.element_ty), mask=mask)
