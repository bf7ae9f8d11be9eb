"""Tables against a slow reading of what they mean; the checker against broken ones; the launch choice."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from thresholdnet.kernels import configs
from thresholdnet.kernels.tables import KTable, Source, check_k_table, k_table, pixel_table, tap_shifts

import thresholdnet

ROWS = (Source(0, 10, 64), Source(32, 8, 64), Source(48, 3, 64))
ARENA = (Source(0, 10, 16), Source(1600, 8, 8), Source(4000, 3, 8))


@pytest.mark.parametrize("sources", (ROWS, ARENA, ROWS[::-1], ROWS[1:2]), ids=("rows", "arena", "reversed", "one"))
@pytest.mark.parametrize(
    ("kernel_size", "group", "dilation"),
    ((1, (1, 1), 1), (3, (1, 1), 1), (3, (2, 2), 1), (3, (1, 2), 1), (3, (1, 1), 3)),
)
@pytest.mark.parametrize("chunk", (16, 32, 64))
@pytest.mark.parametrize("transposed", (False, True))
def test_every_weight_meets_its_element(sources, kernel_size, group, dilation, chunk, transposed):
    width = 6
    table = k_table(sources, width, kernel_size, chunk, group, transposed, dilation)
    assert len(table.entries) == (table.chunks + 1) * chunk // 8
    shifts, taps = tap_shifts(kernel_size, group, dilation), kernel_size**2
    first = np.cumsum([0] + [s.width for s in sources])
    met = 0
    for position, index in enumerate(table.weight_index):
        y, x = divmod(position, group[1])
        for k, weight in enumerate(index):
            if weight < 0:
                continue
            channel, tap = divmod(int(weight), taps)
            tap = taps - 1 - tap if transposed else tap
            dy, dx = (dilation * (tap // 3 - 1), dilation * (tap % 3 - 1)) if taps == 9 else (0, 0)
            source = int(np.searchsorted(first, channel, side="right")) - 1
            entry, row = int(table.entries[k // 8]), int(table.row8[k // 8]) * 8
            assert row == sources[source].row
            assert shifts[entry & 31] == (dy + y, dx + x)
            expected = sources[source].offset + channel - first[source] + ((dy + y) * width + dx + x) * row
            assert (entry >> 5) * 8 + k % 8 == expected
            assert table.channel[k] == channel
            if group == (1, 1):
                assert table.k_of_weight[weight] == k
            met += 1
    assert met == first[-1] * taps * group[0] * group[1]


def test_taps_of_a_chunk_lie_side_by_side():
    table = k_table((Source(0, 64, 64),), 8, 3, 32)
    taps = (table.entries & 31)[: 9 * 4].reshape(9, 4)
    assert (taps == np.arange(9)[:, None]).all()


@pytest.mark.parametrize(("group", "dilation"), (((1, 1), 1), ((2, 2), 1), ((1, 2), 1), ((1, 1), 2), ((1, 1), 5)))
@pytest.mark.parametrize("size", ((2, 4, 6), (1, 2, 2), (3, 2, 4)))
def test_pixel_table(size, group, dilation):
    batch, height, width = size
    table = pixel_table(batch, height, width, group, dilation)
    m = 0
    for n in range(batch):
        for y in range(0, height, group[0]):
            for x in range(0, width, group[1]):
                assert table.first_pixel[m] == (n * height + y) * width + x
                for t, (dy, dx) in enumerate(tap_shifts(3, group, dilation)):
                    inside = 0 <= y + dy < height and 0 <= x + dx < width
                    assert (int(table.taps_inside[m]) >> t & 1) == inside
                m += 1
    assert m == len(table.taps_inside)


@pytest.mark.parametrize(
    ("field", "index", "change", "words"),
    (
        ("entries", 0, 1 << 8, "inside the linked slots"),
        ("entries", -1, -(1 << 12), "inside the linked slots"),
        ("entries", 0, 20, "taps below 9"),
        ("row8", 2, 1, "inside the linked slots"),
        ("weight_index", (0, 0), 1, "each of the 189 weights once"),
    ),
)
def test_the_checker_finds_broken_tables(field, index, change, words):
    good = k_table(ROWS, 6, 3, 32)
    broken = KTable(*(np.array(part) if isinstance(part, np.ndarray) else part for part in good))
    getattr(broken, field)[index] += change
    check_k_table(good, ROWS, 6, 3)
    with pytest.raises(ValueError, match=words):
        check_k_table(broken, ROWS, 6, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    (
        (Source(4, 8, 64), "multiples of 8"),
        (Source(0, 8, 60), "multiples of 8"),
        (Source(0, 70, 64), "fit into a pixel's row"),
        (Source(1 << 29, 8, 64), "within 536870912 elements"),
    ),
)
def test_bad_sources(source, words):
    with pytest.raises(ValueError, match=words):
        k_table((Source(0, 8, 64), source), 6, 3, 32)


def test_cached_tables_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        k_table(ROWS, 6, 3, 32).entries[0] = 1
    assert k_table(ROWS, 6, 3, 32) is k_table(ROWS, 6, 3, 32)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "float64"))
@pytest.mark.parametrize("capability", ((8, 0), (9, 0), (10, 0), None))
def test_every_width_gets_a_tile(capability, dtype):
    for channels in (*range(1, 200), 334, 512, 1000):
        for kernel_size, side in ((1, 56), (3, 56), (3, 7)):
            config = configs.convolution_config(capability, dtype, channels, kernel_size, side * side, side, side)
            for size in (config.rows, config.columns, config.chunk):
                assert size >= 16 and size & (size - 1) == 0
            assert config.columns2 == 0 or (config.columns2 >= 16 and config.columns2 < config.columns)
            assert config.group == (1, 1) or (kernel_size == 3 and side % 2 == 0)
        config = configs.weight_gradient_config(capability, dtype, channels, 9 * channels, False)
        assert min(config.rows, config.chunk, config.columns) >= 16
        assert configs.weight_gradient_splits(capability, config, 4, 7 * 7) >= 1


def test_thin_layers_pad_little():
    config = configs.convolution_config((9, 0), "bfloat16", 40, 3, 128 * 55 * 55, 55, 55)
    assert (config.columns, config.columns2) == (32, 16)
    config = configs.convolution_config((9, 0), "bfloat16", 14, 3, 128 * 56 * 56, 56, 56)
    assert config.group == (2, 2)
    wide = configs.convolution_config((9, 0), "bfloat16", 334, 3, 128 * 7 * 7, 7, 7)
    assert -(-336 // wide.all_columns) * wide.all_columns == 384


@pytest.mark.parametrize("dtype", configs.HALF)
@pytest.mark.parametrize("capability", ((8, 0), (9, 0), (10, 0)))
def test_splits_fit_beside_each_other_and_have_work(capability, dtype):
    found = set()
    for batch, side, read, written, kernel in itertools.product(
        (1, 100, 128), (1, 2, 4, 7, 56), (32, 272, 912), (8, 32, 116, 464), (1, 3)
    ):
        tile = configs.convolution_config(
            capability, dtype, written, kernel, batch * side * side, side, side, in_channels=read
        )
        found.add(tile.splits)
        high, wide = tile.group
        programs = math.ceil(batch * side**2 / (high * wide * tile.rows))
        programs *= math.ceil(written * high * wide / tile.all_columns)
        taps = (high + 2) * (wide + 2) if kernel == 3 else 1
        assert tile.splits == 1 or programs * tile.splits <= configs.MULTIPROCESSORS[capability[0]]
        assert tile.splits == 1 or math.ceil(read * taps / tile.chunk) // tile.splits >= configs.LEAST_CHUNKS
    assert 1 in found and max(found) > 8


def test_a_long_K_of_few_programs_is_split():
    def splits(*shape, capability=(9, 0), dtype="bfloat16"):
        read, written, kernel, batch, side = shape
        pixels = batch * side * side
        return configs.convolution_config(
            capability, dtype, written, kernel, pixels, side, side, in_channels=read
        ).splits

    assert splits(912, 462, 3, 100, 1) == 22  # 6 programs of 129 chunks
    assert splits(128, 32, 3, 100, 2) == 4
    assert splits(128, 32, 3, 100, 8) == 2
    assert splits(128, 32, 3, 128, 56) == 1, "the multiprocessors have enough to do"
    assert splits(512, 128, 1, 100, 2) == 1, "8 chunks are over sooner than another launch"
    assert splits(912, 462, 3, 100, 1, dtype="float32") == 1, "its chunks were not measured"
    assert splits(912, 462, 3, 100, 1, capability=None) == 1


def test_the_folder_refuses_its_bare_name():
    root = Path(thresholdnet.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, capture_output=True, text=True)
    assert "ImportError: this folder must be imported as thresholdnet.kernels" in done.stderr
