"""Makes Triton's interpreter trustworthy for bf16; import before a kernel runs.

Triton 3.8 keeps bf16 as uint16 in numpy and gets two things wrong: `tl.dot` multiplies the bit patterns as integers,
and casts from fp32 truncate where a GPU rounds to nearest even. Arithmetic on bf16 itself is wrong too, and stays so:
kernels must cast before they compute.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as machine


def _float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(values):
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def install():
    """Replace the two methods; a second call changes nothing."""
    builder = machine.InterpreterBuilder
    if getattr(builder, "bf16_is_right", False):
        return
    builder.bf16_is_right = True
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(_float32(a), _float32(b), dtype=np.float32)
        return machine.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return machine.TensorHandle(_rounded(src.data), dst_type.scalar)
        return cast(self, src, dst_type)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):  # lambdas of the class: they look cast_impl up on self
        assert hasattr(builder, name)
