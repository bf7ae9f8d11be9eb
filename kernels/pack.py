"""The convolutions' weights as their products read them: any number of packed matrices in one launch.

    packed_j[n, k] = w[offset_pk + c step_w]   with w the weight of (j, p, k), where it has one and c is a channel of j,
                     else 0

and in front of a convolution that normalises what it reads, its BatchNorm in the order of K:

    affine[0, k], affine[1, k] = scale[channel_k], shift[channel_k], 0 where K is padded

Letters: j matrix, one for each convolution; n column, (p, c): pixel of the output group and output channel; k position
in K, see tables.py; w number of the weight. Weights are read where they lie, a data gradient's slices as parts of their
layers' weights: `offset` and `step`, in elements, say how.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .dependent import wait_for_predecessor


@triton.jit(do_not_specialize=["tiles", "affine_length"], do_not_specialize_on_alignment=["weights"])
def pack_weights(
    weights, programs, matrices, k_weight, k_offset, steps, packed,
    scale, shift, channel, affine, tiles, affine_length,
    TILE_COLUMNS: tl.constexpr, TILE_K: tl.constexpr, AFFINE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One tile of one matrix; grid (tiles), with AFFINE (tiles + tiles of the affine).

    weights: a tuple, of one dtype. programs [tiles]: each one's matrix. matrices [matrices, 8]: its first program, K,
    where it begins in k_weight and k_offset [pixels of the group, K], where in `packed` / 8, its channels, the columns
    of a pixel, in whole tiles where there are several pixels, and the pixels. k_weight: -1 for none. steps [weights].
    packed: each matrix [columns, K], in whole tiles of columns. AFFINE: affine [2, affine_length] and channel
    [affine_length] as KTable.channel; scale and shift lie in the order of channels.
    """
    program = tl.program_id(0)
    if AFFINE:  # noqa: SIM102  # the compiler's choice, around one of the program's
        if program >= tiles:
            at = (program - tiles) * TILE_K + tl.arange(0, TILE_K)
            c = tl.load(channel + at, mask=at < affine_length, other=-1)
            wait_for_predecessor(PDL)
            a = tl.load(scale + c, mask=c >= 0, other=0.0)
            b = tl.load(shift + c, mask=c >= 0, other=0.0)
            tl.store(affine + at, a.to(affine.dtype.element_ty), mask=at < affine_length)
            tl.store(affine + affine_length + at, b.to(affine.dtype.element_ty), mask=at < affine_length)
    if program < tiles:
        matrix = matrices + tl.load(programs + program) * 8
        tile = program - tl.load(matrix)
        all_k = tl.load(matrix + 1)
        across = tl.cdiv(all_k, TILE_K)
        first = tile // across * TILE_COLUMNS
        k = tile % across * TILE_K + tl.arange(0, TILE_K)
        inside = k < all_k
        of_pixel, pixels = tl.load(matrix + 5), tl.load(matrix + 6)
        pixel = first // of_pixel
        c = first % of_pixel + tl.arange(0, TILE_COLUMNS)
        at = tl.load(matrix + 2) + tl.minimum(pixel, pixels - 1) * all_k + k
        w = tl.load(k_weight + at, mask=inside, other=-1)
        offset = tl.load(k_offset + at, mask=inside, other=0)
        step = tl.load(steps + w, mask=w >= 0, other=0)
        channels = tl.where(pixel < pixels, tl.load(matrix + 4), 0)
        start = tl.load(matrix + 3).to(tl.int64) * 8
        wait_for_predecessor(PDL)
        weight = tl.broadcast_to(weights[0], (TILE_K,))
        for i in tl.static_range(1, len(weights)):
            weight = tl.where(w == i, weights[i], weight)
        real = (c < channels)[:, None] & (w >= 0)[None, :]
        value = tl.load(weight[None, :] + (offset[None, :] + c[:, None] * step[None, :]), mask=real, other=0.0)
        column = first + tl.arange(0, TILE_COLUMNS)
        to = packed + start + (column[:, None] * all_k + k[None, :])
        tl.store(to, value.to(packed.dtype.element_ty), mask=inside[None, :])
