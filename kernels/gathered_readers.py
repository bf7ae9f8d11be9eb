"""The launcher of the data gradient that readers behind BatchNorm send to what they read; see readers.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import number as activation_number  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import readers as device_readers
from .configs import ReadersConfig, readers_config
from .device import capability_of, check_device, on_device_of
from .device_tables import device_columns, device_offsets, device_pixels
from .operands import (
    accumulator_of,
    check_rows,
    check_weights,
    dtype_name,
    lay_out,
    padded_width,
    per_channel,
    uses_tf32,
    with_even_taps,
)
from .tables import LANES
from .tiles import cdiv, power_of_2, readers_tile
from .tuned import Shape, choice


def gradient_of_readers(
    dz: Sequence[Tensor],
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    features: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    *,
    add: bool,
    activation: str | None = "relu",
    terms: tuple[Tensor, Sequence[Tensor]] | None = None,
    dilation: int = 1,
    config: ReadersConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the gradients of R readers, each act(BatchNorm(features)) and a convolution, into the features' slots.

    out_c = rstd_c * sum over readers of gamma_rc g_rc; the share of the statistics is left to `launch.bn_backward` (see
    readers.py), with q = -rstd^2 sum_r(gamma_r sum_g_xhat_r) / n and r = -rstd sum_r(gamma_r sum_g_r) / n.

    Args:
        dz: R slots [N, K, H, W] of one K and row, in one allocation: gradients of the readers' raw outputs.
        weights: R weights [K, C, k, k], k 1 or 3, C = the summed channels of `outs`; zeros where a reader lacks one.
        outs: slots [N, C_j, H, W] of the gradient, in one allocation, apart from the others.
        features: the matching slots of the raw features, in one allocation.
        gammas, betas: R affines [C]; zeros where a reader lacks a channel.
        mean, rstd: [C], the features' statistics.
        add: add to what `outs` hold instead of writing them for the first time.
        activation: "relu", "relu6" or "leaky_relu(SLOPE)".
        terms: [2, C], and R shares [2, C], with dense rows: adds every reader's share times its two sums to the former.
        dilation: pixels between two taps of all weights.
        config: tile sizes instead of the chosen ones.

    Returns:
        (sum g, sum g xhat), each [R, C], fp32 (fp64 for fp64): the gradients of beta and gamma.

    Raises:
        TypeError, ValueError, RuntimeError: see `launch`.
    """
    readers = len(dz)
    if not readers or not outs:
        raise ValueError(f"dz and outs must hold at least one slot each, got {readers} and {len(outs)}")
    if activation_number(activation) == 0:
        raise ValueError("activation must name one, got None")
    for name, items in (("weights", weights), ("gammas", gammas), ("betas", betas)):
        if len(items) != readers:
            raise ValueError(f"{name} must hold one tensor for each of the {readers} readers, got {len(items)}")
    if [out.shape for out in outs] != [feature.shape for feature in features]:
        raise ValueError(f"features must have the {len(outs)} shapes of outs, got {[tuple(f.shape) for f in features]}")
    first = outs[0]
    check_device("outs[0]", first)
    read, written, raw = (
        lay_out("dz", dz, first, out_name="outs[0]"),
        lay_out("outs", outs, first, out_name="outs[0]"),
        lay_out("features", features, first, out_name="outs[0]"),
    )
    depth, channels, accumulator = dz[0].shape[1], sum(out.shape[1] for out in outs), accumulator_of(first)
    for name, layout in (("dz", read), ("outs", written), ("features", raw)):
        if layout.slot_rows or (name == "dz" and any(d.shape[1] != depth for d in dz)):
            raise ValueError(
                f"{name} must be slots of one row{' and width' if name == 'dz' else ''}, got different ones"
            )
    kernel_size = check_weights("weights", weights, channels, [depth] * readers)
    scales = tuple(per_channel(f"gammas[{i}]", v, channels, first) for i, v in enumerate(gammas))
    shifts = tuple(per_channel(f"betas[{i}]", v, channels, first) for i, v in enumerate(betas))
    mean, rstd = per_channel("mean", mean, channels, first), per_channel("rstd", rstd, channels, first)
    room, shares = (None, ()) if terms is None else terms
    if room is not None:
        check_rows("terms[0]", room, channels, first)
        if len(shares) != readers:
            raise ValueError(f"terms must hold a share for each of the {readers} readers, got {len(shares)}")
        for i, share in enumerate(shares):
            check_rows(f"terms[1][{i}]", share, channels, first)
    if read.pixels == 0:
        return (torch.zeros(readers, channels, dtype=accumulator, device=first.device),) * 2
    if config is None:
        shape = Shape("readers", dtype_name(first), kernel_size, False, readers * depth, channels, *read.images)
        tuned = choice(first.device, shape).tile if dilation == 1 else None
        rule = readers_config(capability_of(first.device), dtype_name(first), channels, kernel_size)
        config = tuned if isinstance(tuned, ReadersConfig) else rule
    most = 256 if kernel_size == 1 else 32  # more for every tap would spill
    part = min(most, max(16, power_of_2(padded_width(depth))))
    parts = cdiv(padded_width(depth), part)
    out_at8, feature_at8, column_channel = device_columns(written.sources, raw.sources, config.columns, first.device)
    dz_at8 = device_offsets(tuple(source.offset // LANES for source in read.sources), first.device)
    columns = len(column_channel)
    tiles = cdiv(read.pixels, config.rows)
    taps = kernel_size**2
    weights = [with_even_taps(weight) for weight in weights]
    layouts = tuple(step for weight in weights for step in (*weight.stride()[:2], weight.stride(3)))
    inside = device_pixels(*read.images, (1, 1), first.device, dilation)[0] if taps > 1 else dz_at8
    packed = torch.empty(readers, columns, taps * parts * part, dtype=first.dtype, device=first.device)
    affine = torch.empty(readers, 2, columns, dtype=accumulator, device=first.device)
    partial = torch.empty(tiles, readers, 2, columns, dtype=accumulator, device=first.device)
    sums = torch.empty(readers, 2, channels, dtype=accumulator, device=first.device)
    deep = min(64, part)
    with on_device_of(first):
        start(
            device_readers.pack_readers, (columns // 16, taps * parts * part // deep, readers),
            tuple(weights), scales, shifts, device_offsets(layouts, first.device), column_channel, packed, affine,
            depth, TILE_COLUMNS=16, TILE_DEPTH=deep, TAPS=taps, num_warps=4,
        )  # fmt: skip
        start(
            device_readers.gather_readers, (columns // config.columns, tiles),
            read.base, packed, written.base, raw.base, affine, mean, rstd,
            dz_at8, out_at8, feature_at8, column_channel, inside, partial,
            read.pixels, read.width, dilation, readers, len(out_at8), padded_width(depth) // LANES,
            read.row8, written.row8, raw.row8,
            TILE_ROWS=config.rows, TILE_COLUMNS=config.columns, DEPTH=part, PARTS=parts, TAPS=taps,
            ACTIVATION=activation_number(activation), ADD=add, TF32=uses_tf32(first),
            STAGES=config.stages if (parts == 1 or taps > 1) and part <= 128 else 1, num_warps=config.warps,
            maxnreg=config.registers or None,
        )  # fmt: skip
        at_once, warps = readers_tile(tiles)
        start(
            device_readers.merge_readers, (columns // LANES, 2),
            partial, column_channel, sums, sums if room is None else room,
            *(tuple(share[i] for share in shares) or (sums,) * readers for i in (0, 1)),
            tiles, channels, columns // LANES, 0 if room is None else room.stride(0),
            READERS=readers, TERMS=room is not None,
            TILES=at_once, BLOCK=LANES, num_warps=warps,
        )  # fmt: skip
    return sums[:, 0], sums[:, 1]
