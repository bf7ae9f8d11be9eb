"""The tables of `tables.py` on the device: built and copied at their first use, then kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..constants import device_constant  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from .tables import Group, Source, column_table, k_table, pixel_table


class DeviceTable(NamedTuple):
    """`tables.KTable` on a device."""

    entries: Tensor
    row8: Tensor
    weight_index: Tensor
    channel: Tensor
    k_of_weight: Tensor
    k_of_tap: Tensor  # the same for weights in channels_last memory
    chunks: int


@device_constant(maxsize=4096)
def device_table(
    sources: tuple[Source, ...],
    width: int,
    kernel_size: int,
    chunk: int,
    group: Group,
    transposed: bool,
    device: torch.device,
    dilation: int = 1,
) -> DeviceTable:
    """`tables.k_table` there."""
    table = k_table(sources, width, kernel_size, chunk, group, transposed, dilation)
    return DeviceTable(
        upload(table.entries, device),
        upload(table.row8, device),
        upload(table.weight_index, device),
        upload(table.channel, device),
        upload(table.k_of_weight, device),
        upload(table.k_of_weight.reshape(-1, kernel_size**2).T.reshape(-1), device),
        table.chunks,
    )


@device_constant(maxsize=4096)
def device_halo_table(
    sources: tuple[Source, ...], width: int, chunk: int, transposed: bool, device: torch.device
) -> DeviceTable:
    """The table of a 3x3 kernel that keeps a tile's border in shared memory: entries as of a 1x1 kernel, without taps.

    K runs over (chunk of channels, tap, channel of the chunk), so `weight_index` has 9 rows for each row of `channel`,
    and `chunks` counts chunks of channels; there is no `k_of_weight`.
    """
    table = k_table(sources, width, 1, chunk)
    channel = table.channel[: table.chunks * chunk].reshape(-1, 1, chunk)
    tap = np.arange(9)[::-1, None] if transposed else np.arange(9)[:, None]
    weight_index = np.where(channel >= 0, channel * 9 + tap, -1).astype(np.int32)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    return DeviceTable(
        upload(table.entries, device),
        upload(table.row8, device),
        upload(weight_index.reshape(1, -1), device),
        upload(table.channel, device),
        nothing,
        nothing,
        table.chunks,
    )


@device_constant(maxsize=256)
def device_pixels(
    batch: int, height: int, width: int, group: Group, device: torch.device, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """(taps_inside, first_pixel) of `tables.pixel_table` there."""
    table = pixel_table(batch, height, width, group, dilation)
    return upload(table.taps_inside, device), upload(table.first_pixel, device)


@device_constant(maxsize=4096)
def device_columns(
    outs: tuple[Source, ...], features: tuple[Source, ...], multiple: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`tables.column_table` there."""
    out_at8, feature_at8, column_channel = column_table(outs, features, multiple)
    return upload(out_at8, device), upload(feature_at8, device), upload(column_channel, device)


@device_constant(maxsize=4096)
def device_offsets(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [offsets] there."""
    return upload(np.array(offsets, np.int32), device)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device."""
    return torch.from_numpy(array.copy()).to(device)
