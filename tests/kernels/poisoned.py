"""Poisoned slots for the tests."""

import torch
from thresholdnet.kernels.slots import allocate, whole, write

NAN = float("nan")


def rows(batch, height, width, widths, dtype, layout="rows"):
    """(buffer with all slots, full of NaN; one slot [N, C, H, W] a width) in NHWC rows."""
    slots = allocate(batch, widths, height, width, dtype=dtype, device="cpu", layout=layout)
    buffer = slots[0].as_strided((slots[0].untyped_storage().nbytes() // slots[0].element_size(),), (1,), 0)
    return buffer.fill_(NAN), slots


def arena(batch, height, width, widths, dtype):
    """The same with a dense tensor a slot."""
    return rows(batch, height, width, widths, dtype, "arena")


def padding(slot):
    """The channels behind the slot's own."""
    return whole(slot)[:, slot.shape[1] :]


def fill(slot, integers=False):
    """Random values, or small integers that every dtype holds."""
    shape = tuple(slot.shape)
    return write(slot, torch.randint(-2, 3, shape).to(slot.dtype) if integers else torch.randn(shape))
