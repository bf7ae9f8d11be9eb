"""Launch choice: tile sizes, warps, stages as pure functions of shapes, element type and GPU generation. No autotune.

The tables come from offline compilation (registers, spills, loop instructions; bench/compile_report.py repeats it), for
half formats on sm_90 from an H100 (bench/results/h100/2026-11-26-profile/tune.json). What a GPU has measured at a shape
itself goes before either (`tuned.py`). `capability` is (major, minor), or None in Triton's interpreter, which gets
small tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from .tables import Group

Capability = tuple[int, int] | None

SHARED = 200 * 1024  # bytes of Hopper's shared memory that a tile's pipeline may take
MULTIPROCESSORS = {8: 108, 9: 132, 10: 148}  # of A100, H100 / H200, B200; others count as the first
DTYPES = ("float32", "bfloat16", "float16", "float64")
HALF = ("bfloat16", "float16")
MOST_SPLITS = 32  # of K, which the kernel that joins them holds at once
LEAST_CHUNKS = 4  # of a split
SAVED_CHUNKS = 8  # that a program must have fewer than without splits


@dataclass(frozen=True)
class ConvolutionConfig:
    """Tile of one program: `rows` x (`columns` + `columns2`), K in steps of `chunk`.

    registers: at most so many a thread, 0 for the compiler's choice; fewer let more programs share a multiprocessor.
    group: pixels (height, width) of a row. vector: elements of one asynchronous copy, if 16 bytes hold as many; smaller
    copies pass through the L1 cache. splits: ranges of K, each with programs of its own, joined by another launch.
    """

    rows: int
    columns: int
    columns2: int = 0
    chunk: int = 64
    warps: int = 4
    stages: int = 3
    group: Group = (1, 1)
    vector: int = 8
    registers: int = 0
    splits: int = 1

    @property
    def all_columns(self) -> int:
        """Columns of one program."""
        return self.columns + self.columns2


@dataclass(frozen=True)
class WeightGradientConfig:
    """Tile of one program: `chunk` K rows x `columns` output channels, pixels in steps of `rows`.

    programs: into how many for each multiprocessor the pixels are split. registers: as in `ConvolutionConfig`.
    """

    rows: int
    chunk: int
    columns: int
    warps: int = 4
    stages: int = 3
    swapped: bool = False
    programs: int = 3
    registers: int = 0


@dataclass(frozen=True)
class ReadersConfig:
    """Tile of the gathered data gradient: `rows` pixels x `columns` channels; registers as above."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    registers: int = 0


# (largest padded width, columns, columns2); a width beyond the last one takes several column tiles
COLUMN_PARTS = (
    (16, 16, 0), (32, 32, 0), (48, 32, 16), (64, 64, 0), (80, 64, 16), (96, 64, 32), (128, 128, 0),
    (144, 128, 16), (160, 128, 32), (192, 128, 64),
)  # fmt: skip
# padded width -> (rows, columns, columns2, warps) of a 3x3 kernel that computes 2 x 2 pixels in one row
GROUPED = {8: (128, 32, 0, 4), 16: (128, 64, 0, 4), 24: (128, 64, 32, 4), 32: (128, 128, 0, 8)}


@lru_cache(maxsize=4096)
def convolution_config(
    capability: Capability,
    dtype: str,
    out_channels: int,
    kernel_size: int,
    pixels: int,
    height: int,
    width: int,
    affine: bool = False,
    gradient: bool = False,
    in_channels: int = 0,
    dilation: int = 1,
) -> ConvolutionConfig:
    """Choose the tile of a convolution or data gradient.

    Args:
        capability: (major, minor) of the GPU, None in the interpreter.
        dtype: "float32", "bfloat16", "float16" or "float64".
        out_channels: channels written.
        kernel_size: 1 or 3.
        pixels: batch x height x width.
        height, width: of the image; output grouping needs both even.
        affine: an affine and an activation are applied on load.
        gradient: it is a data gradient, whose mask needs registers behind the product.
        in_channels: channels read; 0 leaves K whole, and only half formats split it.
        dilation: pixels between two taps; output grouping needs 1.
    """
    padded = -(-out_channels // 8) * 8
    even = height % 2 == 0 and width % 2 == 0
    grouped = kernel_size == 3 and dilation == 1 and even and padded in GROUPED
    tile = _convolution_tile(capability, dtype, padded, kernel_size, pixels, grouped, affine, gradient)
    if capability is None or dtype not in HALF:
        return tile
    if affine and capability[0] == 10:  # Triton 3.6 reloads a spilled register in the main loop of 64 + 32 columns
        return tile
    high, wide = tile.group
    down, multiprocessors = -(-pixels // (high * wide * tile.rows)), MULTIPROCESSORS.get(capability[0], 108)
    taps = 1 if kernel_size == 1 else (high + 2) * (wide + 2)
    chunks = -(-(-(-in_channels // 8) * 8 * taps) // tile.chunk)
    splits = _splits(multiprocessors, down * -(-padded * high * wide // tile.all_columns), chunks)
    if splits > 1 or capability[0] != 9:
        return replace(tile, splits=splits)
    return _narrowed(tile, down, padded, multiprocessors)


def _narrowed(tile: ConvolutionConfig, down: int, padded: int, multiprocessors: int) -> ConvolutionConfig:
    """Fewer columns where multiprocessors are idle: a program's time is then its own loads, product and epilogue.

    Predicted: an H100 took 7.6 us for 5 chunks of 64 x 128 with a mask behind them, of which the chunks were a third.
    """
    while tile.rows == 64 and tile.columns > 32 and not tile.columns2:
        if 2 * down * -(-padded // tile.columns) > multiprocessors:
            break
        tile = replace(tile, columns=tile.columns // 2)
    return tile


def _splits(multiprocessors: int, programs: int, chunks: int) -> int:
    """Into how many splits K goes: as many as run beside each other, where that shortens a program's way by enough.

    An H100 took 0.4 to 0.7 us a chunk of bf16 where multiprocessors were idle (docs/kernels.md). Joining is predicted
    to take 2 to 3 us with its launch, as some 5 chunks do: splits must save SAVED_CHUNKS.
    """
    splits = min(multiprocessors // programs, chunks // LEAST_CHUNKS, MOST_SPLITS)
    longest = -(-chunks // max(1, splits))
    return -(-chunks // longest) if chunks - longest >= SAVED_CHUNKS else 1


def _convolution_tile(
    capability: Capability, dtype: str, padded: int, kernel_size: int, pixels: int, grouped: bool, affine: bool,
    gradient: bool,
) -> ConvolutionConfig:  # fmt: skip
    if capability is None:
        columns = 64 if grouped else 16 if padded <= 16 else 32
        return ConvolutionConfig(32, columns, 16 if padded == 48 else 0, 32, group=(2, 2) if grouped else (1, 1))
    if dtype == "float64":
        return ConvolutionConfig(32, 32, 0, 16, 4, 2)
    chunk = 32 if dtype == "float32" else 64
    if capability[0] == 9 and dtype in HALF:
        return _hopper_convolution(padded, kernel_size, pixels, grouped, affine, gradient)
    if grouped:
        rows, columns, columns2, warps = GROUPED[padded]
        warps = 8 if affine and columns2 and capability[0] == 8 else warps  # with 4, an affine on load spills
        return ConvolutionConfig(rows, columns, columns2, chunk, warps, 3, (2, 2))
    columns, columns2 = _column_parts(padded, affine and capability[0] == 8)
    warps = 8 if columns + columns2 >= 96 else 4  # 64 + 32 columns spill on sm_80 with 4
    tiles = -(-pixels // 128) * -(-padded // (columns + columns2))
    if tiles < MULTIPROCESSORS.get(capability[0], 108) and columns2 == 0 and columns >= 64:
        return ConvolutionConfig(64, columns, 0, chunk, 4, 4 if columns == 64 else 3)
    stages = 4 if columns == 16 else 3
    if capability[0] == 8 and kernel_size == 3 and columns + columns2 == 192:
        stages = 2  # with 3, Triton 3.6 reloads spilled registers in the main loop of the masked data gradient
    return ConvolutionConfig(128, columns, columns2, chunk, warps, stages)


def _column_parts(padded: int, registers_are_short: bool) -> tuple[int, int]:
    if registers_are_short and padded > 128:  # an affine on load beside more than 128 columns spills on sm_80
        return 128, 0
    for widest, columns, columns2 in COLUMN_PARTS:
        if padded <= widest:
            return columns, columns2
    tiles = {(columns, columns2): -(-padded // (columns + columns2)) for _, columns, columns2 in COLUMN_PARTS[3:]}
    return min(tiles, key=lambda parts: (tiles[parts] * sum(parts), tiles[parts]))  # least padding, then fewest tiles


def _hopper_convolution(
    padded: int, kernel_size: int, pixels: int, grouped: bool, affine: bool, gradient: bool
) -> ConvolutionConfig:
    """As measured on an H100: 4 warps of up to 255 registers leave room for two programs, 8 warps mostly for one.

    Where the tiles do not fill the multiprocessors once, a long pipeline hides latency that no other program would.
    Registers are short with an affine, more so with taps, and with a gradient's mask.
    """
    wave = MULTIPROCESSORS[9]
    if grouped and pixels // 4 >= 128 * wave:
        rows, columns, columns2, warps = GROUPED[padded]
        return ConvolutionConfig(rows, columns, columns2, 64, warps, 3, (2, 2))
    if padded <= COLUMN_PARTS[-1][0]:
        columns, columns2 = _column_parts(padded, False)
    else:  # a column tile costs its own columns, and reading the pixels again: about as much as 64 columns
        cost = {part: -(-padded // sum(part[1:])) * (sum(part[1:]) + 64) for part in COLUMN_PARTS[3:]}
        _, columns, columns2 = min(cost, key=lambda part: cost[part])
    across = -(-padded // (columns + columns2))
    few = -(-pixels // 128) * across < (2 * wave if kernel_size == 1 else wave) and columns >= 64
    rows = 64 if few else 128
    stages = 4 if columns == 16 else 3
    if -(-pixels // rows) * across <= wave:
        stages = min(6, SHARED // (2 * 64 * (rows + columns + columns2)))
    most = 96 if affine and kernel_size == 3 else 128 if affine or gradient else 160
    spills = columns + columns2 > most and not few  # with 4 warps
    return ConvolutionConfig(rows, columns, columns2, 64, 8 if spills else 4, stages)


@lru_cache(maxsize=4096)
def weight_gradient_config(
    capability: Capability, dtype: str, out_channels: int, k_rows: int, affine: bool
) -> WeightGradientConfig:
    """Choose the tile of a weight gradient with `k_rows` = input channels x taps."""
    padded = -(-out_channels // 8) * 8
    if capability is None:
        return WeightGradientConfig(32, 32, 16 if padded <= 16 else 32, swapped=affine)
    if dtype == "float64":
        return WeightGradientConfig(16, 32, 32, 4, 2)
    if capability[0] == 9 and dtype in HALF:
        return _hopper_weight_gradient(padded, k_rows, affine)
    rows = 32 if dtype == "float32" else 64
    if padded <= 32:
        chunk, columns = 64, 16 if padded <= 16 else 32
    elif -(-padded // 64) % 2:  # columns in steps of 128 would pad more
        chunk, columns = 128 if k_rows >= 1024 else 64, 64
    else:
        chunk = columns = 128
    # sm_80, thin tiles: 189 -> 130 loop instructions and no spill; fp32: 16-byte copies of A. Later generations: A with
    # an affine stays asynchronous as the second operand, but fewer than 64 columns could not be the rows of wgmma.
    thin = capability[0] == 8 and (columns <= 32 or dtype == "float32")
    swapped = thin or (capability[0] > 8 and affine and columns >= 64)
    return WeightGradientConfig(rows, chunk, columns, 8 if columns == 128 else 4, 3, swapped)


def _hopper_weight_gradient(padded: int, k_rows: int, affine: bool) -> WeightGradientConfig:
    """As measured on an H100; a wide tile reads the pixels, nine taps of each, less often."""
    if affine and padded > 32:  # wgmma takes A with an affine from shared memory as the second operand
        return WeightGradientConfig(64, 64, 64, 4, 3, swapped=True)
    if padded <= 16:
        return WeightGradientConfig(64, 64, 16, 4, 3, programs=6)
    if padded <= 32:
        return WeightGradientConfig(64, 64, 32) if affine else WeightGradientConfig(64, 128, 32, 8)
    if padded <= 64:
        return WeightGradientConfig(64, 128, 64, 8) if k_rows >= 1024 else WeightGradientConfig(64, 64, 64)
    if padded <= 128:
        return WeightGradientConfig(64, 128, 128, 8, programs=2)
    return WeightGradientConfig(64, 128 if k_rows >= 1024 else 64, 256, 8)


@lru_cache(maxsize=4096)
def weight_gradient_splits(capability: Capability, config: WeightGradientConfig, tiles: int, pixels: int) -> int:
    """Into how many ranges of pixels a weight gradient of `tiles` tiles is split."""
    if capability is None:
        return min(config.programs, -(-pixels // config.rows))
    wanted = config.programs * MULTIPROCESSORS.get(capability[0], 108) // max(tiles, 1)
    return max(1, min(wanted, -(-pixels // (4 * config.rows))))


@lru_cache(maxsize=4096)
def readers_config(capability: Capability, dtype: str, channels: int, kernel_size: int = 1) -> ReadersConfig:
    """Choose the tile of the gathered data gradient of readers for slots of `channels` in all."""
    if kernel_size == 3 and capability is not None and dtype in HALF:
        # predicted: a step is a tap of few channels, whose few kB take longer from the L2 cache than their product does
        return replace(readers_config(capability, dtype, channels), stages=4)
    if capability is None:
        return ReadersConfig(32, 16)
    if dtype == "float64":
        return ReadersConfig(16, 16, 4, 1)
    if dtype == "float32":  # with 64 rows, Triton 3.6 spills on sm_80
        return ReadersConfig(32 if kernel_size == 3 and capability[0] == 8 else 64, 64, 4, 2)
    if capability[0] == 9:
        # 168 registers: three programs on a multiprocessor; the compiler would take 210 and leave room for two
        return ReadersConfig(128, 32, 4, 2) if channels <= 32 else ReadersConfig(64, 64, 4, 2, registers=168)
    return ReadersConfig(64, 64, 4, 3)


def shipped_convolutions(capability: Capability, dtype: str) -> Iterator[tuple[int, bool, bool, ConvolutionConfig]]:
    """(kernel size, affine, gradient, tile) of every choice of `convolution_config` on a GPU; for compile checks."""
    seen = set()
    for kernel_size, affine, gradient in (
        (3, False, False),
        (3, False, True),
        (1, False, False),
        (1, False, True),
        (1, True, False),
        (3, True, False),
    ):
        for padded in (8, 16, 24, 32, 48, 64, 80, 96, 128, 144, 160, 192):
            # the last one with K too short for splits
            for pixels, side, read in (
                (128 * 56 * 56, 56, 1024),
                (128 * 55 * 55, 55, 1024),
                (49, 7, 1024),
                (49, 7, 16),
            ):
                tile = convolution_config(
                    capability, dtype, padded, kernel_size, pixels, side, side, affine, gradient, read
                )
                item = kernel_size, affine, gradient, tile
                if item not in seen:
                    seen.add(item)
                    yield item


def shipped_weight_gradients(capability: Capability, dtype: str) -> Iterator[tuple[bool, bool, WeightGradientConfig]]:
    """(affine, 3x3, tile) of every weight gradient that `weight_gradient_config` can choose; for compile checks."""
    seen = set()
    for affine, taps in ((False, True), (True, False), (True, True)):
        for padded in (16, 32, 64, 128, 160):
            for k_rows in (512, 2048):
                item = affine, taps, weight_gradient_config(capability, dtype, padded, k_rows, affine)
                if item not in seen:
                    seen.add(item)
                    yield item
