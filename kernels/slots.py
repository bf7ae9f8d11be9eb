"""Slots for the launchers: allocate them side by side, and copy ordinary tensors in.

    rows    one NHWC buffer, a pixel's channels of all slots side by side
    arena   one allocation with a dense NHWC tensor for every slot, one after the other

Every kernel writes zeros into a slot's padding, so fresh slots need no clearing; what is written here is cleared too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import row_of  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from .tables import LANES

LAYOUTS = ("rows", "arena")


def allocate(
    batch: int,
    widths: Sequence[int],
    height: int,
    width: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: str = "rows",
    memory: Tensor | None = None,
) -> list[Tensor]:
    """One slot [batch, C, height, width] for each C of `widths`, all in one allocation.

    Args:
        memory: take this allocation, made for the same arguments, in place of a new and uninitialised one.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    taken = padded(widths)
    starts = [sum(taken[:i]) for i in range(len(taken))]
    pixels = batch * height * width
    total = row_of(widths)
    if memory is None:
        memory = torch.empty(pixels * total, dtype=dtype, device=device)
    slots = []
    for channels, start, own in zip(widths, starts, taken, strict=True):
        row, offset = (total, start) if layout == "rows" else (own, start * pixels)
        strides = (height * width * row, 1, width * row, row)
        slots.append(memory.as_strided((batch, channels, height, width), strides, offset))
    return slots


def side_by_side(slots: Sequence[Tensor]) -> Tensor:
    """Slots of the "rows" layout without padding, all of them in order: one NHWC tensor over the same memory."""
    first = slots[0]
    batch, _, height, width = first.shape
    channels = sum(slot.shape[1] for slot in slots)
    return first.as_strided((batch, channels, height, width), first.stride(), first.storage_offset())


def padded(widths: Sequence[int]) -> list[int]:
    """Channels that slots of these widths take: rounded up to multiples of 8."""
    return [-(-channels // LANES) * LANES for channels in widths]


def whole(slot: Tensor) -> Tensor:
    """The slot with its padding: a view of the channels rounded up to a multiple of 8."""
    batch, channels, height, width = slot.shape
    padded = -(-channels // LANES) * LANES
    return slot.as_strided((batch, padded, height, width), slot.stride(), slot.storage_offset())


def write(slot: Tensor, values: Tensor) -> Tensor:
    """Copy `values` (any strides and floating dtype) into the slot, zeros into its padding; returns the slot."""
    channels = slot.shape[1]
    if channels % LANES:
        whole(slot)[:, channels:].zero_()
    return slot.copy_(values)
