"""Operands of the launchers: what a slot is, checked, and what the kernels need to know about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .configs import DTYPES
from .tables import LANES, Source

MAX_ELEMENTS = 1 << 31  # offsets are int32


class Layout(NamedTuple):
    """Checked slots: the base pointer, what the K table needs, and the rows of the written slots."""

    base: Tensor
    sources: tuple[Source, ...]
    row8: int
    slot_rows: bool
    out_row8: int
    raw_row8: int
    width: int
    pixels: int
    images: tuple[int, int, int] = (0, 0, 0)


def lay_out(name: str, sources: Sequence[Tensor], out: Tensor, *others: Tensor, out_name: str = "out") -> Layout:
    """Check the slots that a launcher reads, writes (`out`) and reads raw (`others`), and say where they lie.

    Raises:
        TypeError, ValueError: see `launch`; sources in several allocations, or of other images than `out`.
    """
    named = [(f"{name}[{i}]", source) for i, source in enumerate(sources)]
    slots, pixels = check_slots([(out_name, out), *named, *(("mask.z", other) for other in others)])
    batch, _, height, width = out.shape
    out_row8 = slots[0].row // LANES
    raw_row8 = slots[-1].row // LANES if others else out_row8
    images = (batch, height, width)
    read = slots[1 : len(named) + 1]
    for (key, _), slot in zip(named, read, strict=True):
        if slot.shape[0] != batch or slot.shape[2:] != out.shape[2:]:
            raise ValueError(
                f"{key} must have the batch and image size of {out_name}, {batch} x {height} x {width}, "
                f"got {tuple(slot.shape)}"
            )
    if not sources or not pixels:
        empty = tuple(Source(0, slot.shape[1], padded_width(slot.shape[1])) for slot in read)
        return Layout(out, empty, out_row8, False, out_row8, raw_row8, width, pixels, images)
    starts = [slot.start for slot in read]
    first, size = min(starts), out.element_size()
    for (key, _), slot in zip(named, read, strict=True):
        if slot.storage != read[0].storage:
            raise ValueError(f"{name} must lie in one allocation, got {key} in another one than {name}[0]")
    placed = tuple(Source((slot.start - first) // size, slot.shape[1], slot.row) for slot in read)
    end = max(source.offset + (pixels - 1) * source.row + source.padded for source in placed)
    if end >= MAX_ELEMENTS:
        raise ValueError(f"{name} must span fewer than 2^31 elements, got {end}")
    row = placed[0].row
    several = any(source.row != row for source in placed)
    base = sources[starts.index(first)]
    return Layout(base, placed, row // LANES, several, out_row8, raw_row8, width, pixels, images)


class _Slot(NamedTuple):
    """A checked slot: elements between two pixels, its address and that of its allocation, its shape."""

    row: int
    start: int
    storage: int
    shape: torch.Size


def check_slots(tensors: Sequence[tuple[str, Tensor]]) -> tuple[list[_Slot], int]:
    """Check that every tensor is a slot of one dtype and device; returns them and the first one's pixels."""
    first_name, first = tensors[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"{first_name} must be a torch.Tensor, got {type(first).__name__}")
    if dtype_name(first) not in DTYPES:
        raise TypeError(f"{first_name} must be float32, bfloat16, float16 or float64, got {first.dtype}")
    dtype, device, size = first.dtype, first.device, first.element_size()
    slots, rooms = [], {}
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype or tensor.device != device:
            raise TypeError(
                f"{name} must have the dtype and device of {first_name}, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        shape, start, behind = tensor.shape, tensor.data_ptr(), int(tensor.storage_offset())
        row, end = _row(shape, tensor.stride())
        storage = start - behind * size
        if storage not in rooms:  # asked once: it costs as much as all else here
            rooms[storage] = tensor.untyped_storage().nbytes() // size
        if row < 0 or start % 16 or end >= MAX_ELEMENTS or end > rooms[storage] - behind:
            _refuse(name, tensor, row, end)
        slots.append(_Slot(row, start, storage, shape))
    return slots, first.shape[0] * first.shape[2] * first.shape[3]


@lru_cache(maxsize=1 << 14)
def _row(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int]:
    """Elements between two pixels of a slot, and to its end; -1 for a tensor that is none."""
    if len(shape) != 4 or shape[1] < 1:
        return -1, 0
    batch, channels, height, width = shape
    padded = padded_width(channels)
    pixels = batch * height * width
    if pixels == 0:
        return padded, 0
    if width > 1:
        row = strides[3]
    elif height > 1:
        row = strides[2]
    elif batch > 1:
        row = strides[0]
    else:
        row = padded
    lined_up = (
        (channels == 1 or strides[1] == 1)
        and (height == 1 or strides[2] == width * row)
        and (batch == 1 or strides[0] == height * width * row)
    )
    if not lined_up or row % LANES or row < padded:
        return -1, 0
    return row, (pixels - 1) * row + padded


def _refuse(name: str, tensor: Tensor, row: int, end: int) -> None:
    """Say what of a slot is wrong, where something is."""
    if tensor.dim() != 4 or tensor.shape[1] < 1:
        raise ValueError(f"{name} must have the shape [N, C, H, W] with C at least 1, got {tuple(tensor.shape)}")
    channels = tensor.shape[1]
    padded = padded_width(channels)
    if row < 0:
        raise ValueError(
            f"{name} must be a slot: channels side by side, pixels a multiple of {LANES} elements and at least "
            f"{padded} apart, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if end == 0:  # no pixels: it may lie anywhere
        return
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}")
    if end >= MAX_ELEMENTS:
        raise ValueError(f"{name} must span fewer than 2^31 elements, got {end}")
    raise ValueError(f"{name} must have room for {padded} channels a pixel, got {channels} at its buffer's end")


def padded_width(channels: int) -> int:
    """Channels that a slot takes."""
    return -(-channels // LANES) * LANES


def check_weight(name: str, weight: Tensor, out_channels: int, channels: int) -> int:
    """The kernel size of a weight of the right shape."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {got}")
    shape = tuple(weight.shape)
    if shape not in ((out_channels, channels, 1, 1), (out_channels, channels, 3, 3)):
        raise ValueError(f"{name} must have the shape ({out_channels}, {channels}, k, k), k 1 or 3, got {shape}")
    return shape[2]


def check_weights(name: str, weights: Sequence[Tensor], channels: int, widths: Sequence[int]) -> int:
    """The kernel size of readers' weights of the right shapes."""
    kernel_size = 1
    for i, (width, weight) in enumerate(zip(widths, weights, strict=True)):
        size = check_weight(f"{name}[{i}]", weight, width, channels)
        if i and size != kernel_size:
            raise ValueError(f"{name} must have one kernel size, got {kernel_size} and {size}")
        kernel_size = size
    return kernel_size


def with_even_taps(weight: Tensor) -> Tensor:
    """A weight whose taps lie one step apart, that of its last side: itself, where they do."""
    uneven = weight.shape[2] > 1 and weight.stride(2) != weight.shape[2] * weight.stride(3)
    return weight.detach().contiguous() if uneven else weight


def check_same_images(name: str, tensor: Tensor, out: Tensor) -> None:
    """Raise ValueError unless both have one shape."""
    if tensor.shape != out.shape:
        raise ValueError(f"{name} must have the shape {tuple(out.shape)}, got {tuple(tensor.shape)}")


def per_channel(name: str, vector: Tensor, length: int, like: Tensor, cast: bool = True) -> Tensor:
    """A dense per-channel vector, in the accumulator's dtype unless its kernel casts what it loads."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(vector).__name__}")
    if vector.shape != (length,):
        raise ValueError(f"{name} must have the shape ({length},), got {tuple(vector.shape)}")
    if vector.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {vector.device}")
    wide = accumulator_of(like)
    if vector.requires_grad:  # not always: it costs as much as all else here
        vector = vector.detach()
    if (vector.dtype == wide or not cast) and vector.stride(0) == 1:  # mostly
        return vector
    return (vector.to(wide) if cast else vector).contiguous()


def check_rows(name: str, rows: Tensor, length: int, like: Tensor) -> None:
    """Two vectors of channels that a kernel takes or fills as they are."""
    wide = accumulator_of(like)
    if rows.shape != (2, length) or rows.stride(1) != 1:
        raise ValueError(f"{name} must have the shape (2, {length}) and dense rows, got {tuple(rows.shape)}")
    if rows.dtype != wide:
        raise TypeError(f"{name} must be {wide}, got {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {rows.device}")


def accumulator_of(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and of vectors of channels."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dtype_name(tensor: Tensor) -> str:
    """Without "torch."; asking torch takes longer."""
    return _name(tensor.dtype)


@lru_cache(maxsize=64)
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_elements(tensor: Tensor) -> int:
    """Elements of one 16-byte copy."""
    return 16 // max(2, tensor.element_size())


def uses_tf32(tensor: Tensor) -> bool:
    """TF32 where torch's own convolutions may use it."""
    if tensor.dtype != torch.float32:
        return False
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch hides it from mypy
    return bool(precision == "tf32")
