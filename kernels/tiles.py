"""What one program of the small kernels takes, behind and between the convolutions: pure functions of sizes.

The convolutions' own tiles are a choice by GPU and are in `configs.py`.
"""

from __future__ import annotations

import math

import torch

from .device import INTERPRETED


def cdiv(number: int, part: int) -> int:
    """Parts that hold a number; triton.cdiv takes 5 microseconds, and a step asks a thousand times."""
    return -(-number // part)


def power_of_2(number: int) -> int:
    """The next one, from `number` on."""
    return 1 << (number - 1).bit_length()


def merge_tile(bands: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(bands, channels) that a merging program takes at a time, and warps.

    A program's time is that of its loads one after the other: all of them at once, where the registers hold them.
    """
    if INTERPRETED:
        return 16, 8, 4
    if bands <= 256:
        return 256, 4, 4
    return (1024, 4, 8) if bands <= 1024 or dtype == torch.float64 else (4096, 4, 32)


def readers_tile(tiles: int) -> tuple[int, int]:
    """Tiles that a program of `merge_readers` takes at a time, and warps; see `merge_tile`."""
    if INTERPRETED:
        return 16, 4
    return (256, 4) if tiles <= 256 else (1024, 8)


def reduce_tile(elements: int, columns: int, splits: int) -> tuple[int, int, int, int]:
    """(splits, weights, columns) of a program of `reduce_splits`, and warps, for a gradient of so many elements.

    Small gradients have many splits (see `weight_gradient_splits`): their time is that of loads which wait for each
    other. So a program has 8192 elements in flight, and takes few weights where there are few. Where splits are few,
    too, a program has as few elements as there are.
    """
    if INTERPRETED:
        return 2, 64, 16, 4
    if splits <= 4 and elements < 264 * 2048:
        return power_of_2(splits), 16, 16, 4
    if elements < 96 * 256:
        return 256, 2, 16, 8
    if elements < 264 * 2048:
        return 32, 16, 16, 8
    return 4, 64, 32 if columns % 32 == 0 else 16, 8


def finish_tile(splits: int, rows: int, columns: int) -> tuple[int, int, int]:
    """(splits, rows, columns) of a program that runs the epilogue: of `convolution`'s own, or of `finish_splits`.

    The latter has 4096 products in flight, more only where 8 rows have more. Its tiles divide the former's rows and all
    columns, so that no row or column of the products is masked.
    """
    if splits == 1:
        return 1, rows, columns
    held, block = power_of_2(splits), math.gcd(columns, 32)
    return held, min(rows, max(8, 4096 // (held * block))), block


def elementwise_tile(channels: int) -> tuple[int, int]:
    """(pixels, channels) of a program that runs over a slot."""
    if INTERPRETED:
        return 64, 64
    block = min(64, power_of_2(max(8, channels)))
    return 4096 // block, block
