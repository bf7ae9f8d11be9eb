"""BatchNorm as an affine of its channels, in one launch where torch's operations take five.

    scale = gamma / sqrt(variance + eps),   shift = beta - mean scale

or, where a convolution over several nodes reads it, in the order of that convolution's K: see packed_affine.py.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .dependent import wait_for_predecessor


@triton.jit
def affine_of(gamma, beta, mean, variance, EPS: tl.constexpr):
    """(scale, shift) of some channels; all of one dtype."""
    scale = gamma * tl.rsqrt(variance + EPS)
    return scale, beta - mean * scale


@triton.jit(do_not_specialize=["channels"])
def batch_norm_affine(
    gamma, beta, mean, variance, affine, channels, EPS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """gamma, beta (of any dtype), mean, variance [channels] -> affine [2, channels] (scale, shift); grid (blocks,)."""
    ACC: tl.constexpr = affine.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    wait_for_predecessor(PDL)
    scale = tl.load(gamma + channel, mask=real, other=0.0).to(ACC)
    shift = tl.load(beta + channel, mask=real, other=0.0).to(ACC)
    center = tl.load(mean + channel, mask=real, other=0.0)
    spread = tl.load(variance + channel, mask=real, other=1.0)
    scale, shift = affine_of(scale, shift, center, spread, EPS)
    tl.store(affine + channel, scale, mask=real)
    tl.store(affine + channels + channel, shift, mask=real)


@triton.jit(  # parts of longer rows, of any alignment
    do_not_specialize=["channels", "pixels"], do_not_specialize_on_alignment=["mean", "variance"]
)
def batch_norm_vectors(
    gamma, beta, mean, variance, made, channels, pixels, EPS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """gamma, beta (of any dtype), mean, variance [channels] -> made [7, channels]; grid (blocks,).

    Rows: gamma, beta, scale, shift, rstd = 1 / sqrt(variance + eps), -scale / pixels, -scale rstd / pixels.
    """
    ACC: tl.constexpr = made.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    to = made + channel
    wait_for_predecessor(PDL)
    factor = tl.load(gamma + channel, mask=real, other=0.0).to(ACC)
    constant = tl.load(beta + channel, mask=real, other=0.0).to(ACC)
    center = tl.load(mean + channel, mask=real, other=0.0)
    spread = tl.load(variance + channel, mask=real, other=1.0)
    scale, shift = affine_of(factor, constant, center, spread, EPS)
    rstd = tl.rsqrt(spread + EPS)
    share = -scale / pixels.to(ACC)
    tl.store(to, factor, mask=real)
    tl.store(to + channels, constant, mask=real)
    tl.store(to + 2 * channels, scale, mask=real)
    tl.store(to + 3 * channels, shift, mask=real)
    tl.store(to + 4 * channels, rstd, mask=real)
    tl.store(to + 5 * channels, share, mask=real)
    tl.store(to + 6 * channels, share * rstd, mask=real)


@triton.jit(do_not_specialize=["length", "channels", "columns"])
def pack_affine(
    gamma, beta, statistics, channel, column, noted, affine, used, length, channels, columns,
    EPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """gamma, beta [channels] (of any dtype), statistics [2, columns] -> affine [2, length], used [2, channels].

    At position k of K stands channel[k], -1 for none, which has its mean and variance in column[k]; affine is (scale,
    shift) there, 0 for none. used: mean and variance in the order of channels, each from the position where noted[k] is
    1. Grid (blocks of positions,).
    """
    ACC: tl.constexpr = affine.dtype.element_ty
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < length
    c = tl.load(channel + k, mask=inside, other=-1)
    node_channel = tl.load(column + k, mask=inside, other=0)
    real = c >= 0
    first = tl.load(noted + k, mask=inside, other=0) != 0
    wait_for_predecessor(PDL)
    scale = tl.load(gamma + c, mask=real, other=0.0).to(ACC)
    shift = tl.load(beta + c, mask=real, other=0.0).to(ACC)
    mean = tl.load(statistics + node_channel, mask=real, other=0.0)
    variance = tl.load(statistics + columns + node_channel, mask=real, other=1.0)
    scale, shift = affine_of(scale, shift, mean, variance, EPS)
    tl.store(affine + k, scale, mask=inside)
    tl.store(affine + length + k, shift, mask=inside)
    tl.store(used + c, mean, mask=first)
    tl.store(used + channels + c, variance, mask=first)
