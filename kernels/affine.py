"""BatchNorm as an affine of its channels, in one launch where torch's operations take five.

scale = gamma / sqrt(variance + eps),   shift = beta - mean scale
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def affine_of(gamma, beta, mean, variance, channel, real, EPS: tl.constexpr):
    """(scale, shift) of some channels, `real` where there are such; mean and variance are addresses."""
    rstd = tl.rsqrt(tl.load(variance + channel, mask=real, other=1.0).to(gamma.dtype) + EPS)
    scale = gamma * rstd
    return scale, beta - tl.load(mean + channel, mask=real, other=0.0).to(gamma.dtype) * scale


@triton.jit(do_not_specialize=["channels"])
def batch_norm_affine(gamma, beta, mean, variance, affine, channels, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """gamma, beta (of any dtype), mean, variance [channels] -> affine [2, channels] (scale, shift); grid (blocks,)."""
    ACC: tl.constexpr = affine.dtype.element_ty
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    scale = tl.load(gamma + channel, mask=real, other=0.0).to(ACC)
    shift = tl.load(beta + channel, mask=real, other=0.0).to(ACC)
    scale, shift = affine_of(scale, shift, mean, variance, channel, real, EPS)
    tl.store(affine + channel, scale, mask=real)
    tl.store(affine + channels + channel, shift, mask=real)
