"""The launchers: torch tensors in the engine's form in, tables, packing and tile choice hidden.

A slot is a view [N, C, H, W] with stride(1) == 1 whose pixels lie `row` elements apart (row a multiple of 8): a range
of channels of an NHWC buffer, or a dense NHWC tensor of its own. Its channels are padded to a multiple of 8: the
elements behind C belong to it, hold zeros when it is read, and are written as zeros. All slots of one list lie in one
allocation.

Every verb is deterministic, runs on the current stream without a host synchronisation, allocates its own workspaces and
knows no autograd. Tensors live on a CUDA device, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1). Tables are
built and copied to the device at a shape's first call: run each shape once before capturing a CUDA graph.

Common errors: TypeError for a dtype that is not float32, bfloat16, float16 or float64, or differs from the others;
ValueError for a shape, stride or alignment that is not as above, or a buffer of 2^31 elements or more; RuntimeError
for a device that cannot run the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..replay import start  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from . import affine as device_affine
from . import conv as device_conv
from . import norm as device_norm
from . import readers as device_readers
from . import weight_gradient as device_weight_gradient
from .configs import (
    DTYPES,
    MOST_SPLITS,
    ConvolutionConfig,
    ReadersConfig,
    WeightGradientConfig,
    convolution_config,
    readers_config,
    weight_gradient_config,
    weight_gradient_splits,
)
from .device import capability_of, check_device, on_device_of
from .device_tables import device_columns, device_offsets, device_pixels, device_table
from .operands import (
    MAX_ELEMENTS,
    Layout,
    accumulator_of,
    activation_code,
    check_rows,
    check_same_images,
    check_slots,
    check_weight,
    copy_elements,
    dtype_name,
    lay_out,
    padded_width,
    per_channel,
    uses_tf32,
)
from .packed_affine import PackedAffine
from .packed_weights import Affine, Matrix, PackedWeight
from .packed_weights import pack as pack_matrices
from .tables import LANES, Group
from .tiles import cdiv, elementwise_tile, finish_tile, merge_tile, power_of_2, readers_tile
from .tuned import Shape, choice
from .weight_splits import Splits, reduce_splits

PLAIN, STATISTICS, BIAS, MASK, PARTIAL = 0, 1, 2, 3, 4


class Mask(NamedTuple):
    """What the gradient of act(BatchNorm(z)) needs: the raw slot and per-channel vectors [C] of its BatchNorm."""

    z: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


def conv(
    sources: Sequence[Tensor],
    weight: Tensor | PackedWeight,
    out: Tensor,
    *,
    affine: tuple[Tensor, Tensor] | PackedAffine | None = None,
    activation: str | None = "relu",
    bias: Tensor | None = None,
    statistics: bool = False,
    moments: Tensor | None = None,
    config: ConvolutionConfig | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Convolve the sources, concatenated, into a slot: out = conv2d(cat(sources), weight, padding=kernel // 2).

    Args:
        sources: slots [N, C_i, H, W] in the order of the weight's input channels.
        weight: [O, sum C_i, k, k], k 1 or 3, any floating dtype; it is rounded to the slots' dtype. Or what `pack` made
            of it.
        out: slot [N, O, H, W], apart from the sources.
        affine: (scale, shift), each [sum C_i]: convolve act(source * scale + shift) instead. Meant for 1x1 kernels.
            With a packed weight, what `pack_affine` made for it.
        activation: "relu", "relu6" or None; used after `affine` and after `bias`, wherever one is given.
        bias: [O]: out = act(result + bias), for folded inference.
        statistics: return (mean, biased variance) of the written values, each [O], fp32 (fp64 for fp64).
        moments: [2, O], with dense rows of that dtype: where those are written; elsewhere without.
        config: tile sizes instead of the chosen ones; those of a packed weight are its own.

    Raises:
        TypeError, ValueError, RuntimeError: see the module; `bias` together with `statistics`; a weight that is packed
            for another convolution.
    """
    if bias is not None and statistics:
        raise ValueError("statistics must be False with a bias, got True: they are the raw convolution's")
    if affine is not None and isinstance(affine, PackedAffine) != isinstance(weight, PackedWeight):
        raise ValueError("affine must be packed where the weight is, and only there: what is not is packed beside it")
    check_device("out", out)
    layout = lay_out("sources", sources, out)
    channels = sum(source.width for source in layout.sources)
    read: list[Tensor] | PackedWeight
    if isinstance(weight, PackedWeight):
        read, kernel_size = weight, weight.matrix.kernel_size
    else:
        read, kernel_size = [weight], check_weight("weight", weight, out.shape[1], channels)
    if not sources:
        raise ValueError("sources must hold at least one slot, got none")
    accumulator = accumulator_of(out)
    if moments is not None:
        check_rows("moments", moments, out.shape[1], out)
    if layout.pixels == 0:
        return (_nan(out.shape[1], accumulator, out),) * 2 if statistics else None
    scale_shift: tuple[Tensor, ...] | PackedAffine | None = affine
    if affine is not None and not isinstance(affine, PackedAffine):
        scale_shift = tuple(per_channel(f"affine[{i}]", v, channels, out) for i, v in enumerate(affine))
    vectors = () if bias is None else (per_channel("bias", bias, out.shape[1], out),)
    partial, tile_rows, group = _convolve(
        layout, read, kernel_size, out,
        epilogue=STATISTICS if statistics else PLAIN if bias is None else BIAS,
        activation=activation_code(activation), affine=scale_shift, vectors=vectors, config=config,
    )  # fmt: skip
    if not statistics:
        return None
    return _merge_statistics(partial, len(partial), tile_rows, group, layout, out.shape[1], moments)


def gradient(
    dz: Sequence[Tensor],
    weights: Sequence[Tensor | PackedWeight],
    out: Tensor,
    *,
    add: bool = False,
    mask: Mask | tuple[Tensor, ...] | None = None,
    activation: str | None = "relu",
    config: ConvolutionConfig | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Gather the data gradient of one slot: out = sum over its readers of conv2d's gradient by its input.

    Args:
        dz: slots [N, O_r, H, W], the gradients of the readers' raw outputs; none for a slot without readers.
        weights: each reader's weight for this slot, [O_r, C, k, k]; a slice of its input channels. Or, alone, what
            `pack` made of them all.
        out: slot [N, C, H, W], apart from dz.
        add: add to what `out` holds (the gradient that comes from the block's output).
        mask: of act(BatchNorm(z)) behind the slot: keep the gradient where the activation passes it, and return the
            sums that BatchNorm's backward needs. None leaves the plain gradient.
        activation: "relu" or "relu6", used with `mask`.
        config: tile sizes instead of the chosen ones; those of packed weights are their own.

    Returns:
        None, or with `mask` (sum g, sum g xhat), each [C], fp32 (fp64 for fp64): BatchNorm's bias and weight gradients.

    Raises:
        TypeError, ValueError, RuntimeError: see the module.
    """
    others = [] if mask is None else [mask[0]]
    check_device("out", out)
    layout = lay_out("dz", dz, out, *others)
    channels, accumulator = out.shape[1], accumulator_of(out)
    read: Any = weights[0] if len(weights) == 1 and isinstance(weights[0], PackedWeight) else weights
    if isinstance(read, PackedWeight):
        kernel_size = read.matrix.kernel_size
    else:
        if len(weights) != len(dz):
            raise ValueError(f"weights must hold one weight for each of the {len(dz)} readers, got {len(weights)}")
        kernel_size = _check_readers("weights", read, channels, [d.shape[1] for d in dz])
    vectors: tuple[Tensor, ...] = ()
    if mask is not None:
        if activation_code(activation) == 0:
            raise ValueError("activation must be 'relu' or 'relu6' with a mask, got None")
        check_same_images("mask.z", mask[0], out)
        vectors = tuple(per_channel(f"mask[{i}]", v, channels, out) for i, v in enumerate(mask[1:], start=1))
    if layout.pixels == 0:
        return (torch.zeros(channels, dtype=accumulator, device=out.device),) * 2 if mask is not None else None
    partial, _, group = _convolve(
        layout, read, kernel_size, out,
        epilogue=PLAIN if mask is None else MASK,
        activation=activation_code(activation) if mask is not None else 0,
        raw=None if mask is None else mask[0], vectors=vectors, add=add, transposed=True, config=config,
    )  # fmt: skip
    if mask is None:
        return None
    return _merge_sums(partial, len(partial), group, channels)


def pack(
    weights: Sequence[Sequence[Tensor]],
    like: Tensor,
    *,
    widths: Sequence[Sequence[int]] | None = None,
    affine: Sequence[bool] | None = None,
) -> list[PackedWeight]:
    """Pack the weights of several calls of `conv`, or of several of `gradient`, at once, as those would one by one.

    Args:
        weights: without `widths` each gradient's weights, as there; with them each convolution's, alone: [weight].
        like: any tensor [N, C, H, W] with the pixels, dtype and device of the calls' slots.
        widths: channels of each convolution's sources, in order.
        affine: for each convolution whether it takes one, which `pack_affine` packs; None where none does.

    Returns:
        A packed weight for each call: it must not be used once a weight has changed.

    Raises:
        TypeError, ValueError, RuntimeError: see the module; `like` without pixels.
    """
    check_device("like", like)
    if dtype_name(like) not in DTYPES:
        raise TypeError(f"like must be float32, bfloat16, float16 or float64, got {like.dtype}")
    if like.dim() != 4 or like.numel() == 0:
        raise ValueError(f"like must have the shape [N, C, H, W] and pixels, got {tuple(like.shape)}")
    if widths is not None and [len(own) for own in weights] != [1] * len(widths):
        raise ValueError(f"weights must hold one weight for each of the {len(widths)} convolutions, alone")
    images = (like.shape[0], like.shape[2], like.shape[3])
    matrices, normalised = [], affine or [False] * len(weights)
    for i, (own, normal) in enumerate(zip(weights, normalised, strict=True)):
        if widths is None:
            read, channels = tuple(weight.shape[0] for weight in own), own[0].shape[1] if own else 1
            kernel_size = _check_readers(f"weights[{i}]", own, channels, read)
        else:
            read, channels = tuple(widths[i]), own[0].shape[0]
            kernel_size = check_weight(f"weights[{i}][0]", own[0], channels, sum(read))
        config = _chosen_config(like, images, sum(read), channels, kernel_size, normal, widths is None)
        matrices.append(Matrix(read, channels, kernel_size, widths is None, config))
    return pack_matrices(matrices, weights, like)


def _check_readers(name: str, weights: Sequence[Tensor], channels: int, widths: Sequence[int]) -> int:
    """The kernel size of readers' weights of the right shapes."""
    kernel_size = 1
    for i, (width, weight) in enumerate(zip(widths, weights, strict=True)):
        size = check_weight(f"{name}[{i}]", weight, width, channels)
        if i and size != kernel_size:
            raise ValueError(f"{name} must have one kernel size, got {kernel_size} and {size}")
        kernel_size = size
    return kernel_size


def batch_norm_affine(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm, each [C] in the statistics' dtype; all arguments [C], on one device."""
    channels = mean.shape[0]
    vectors = [vector if vector.is_contiguous() else vector.contiguous() for vector in (gamma, beta, mean, variance)]
    out = torch.empty(2, channels, dtype=mean.dtype, device=mean.device)
    with on_device_of(out):
        start(
            device_affine.batch_norm_affine, (cdiv(channels, 256),),
            *vectors, out, channels, EPS=eps, BLOCK=256, num_warps=4,
        )  # fmt: skip
    scale, shift = out
    return scale, shift


def normalise(
    z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, activation: str | None = "relu",
    statistics: tuple[Tensor, Tensor, float] | None = None,
) -> None:  # fmt: skip
    """Write act(z * scale + shift) into a slot; z and out are slots [N, C, H, W], scale and shift [C].

    statistics: (mean, biased variance, eps) of a BatchNorm, whose gamma and beta then are in scale's and shift's place.
    """
    check_device("z", z)
    (z_slot, out_slot), pixels = check_slots([("z", z), ("out", out)])
    check_same_images("z", z, out)
    channels = out.shape[1]
    scale, shift = (per_channel(name, v, channels, out, False) for name, v in (("scale", scale), ("shift", shift)))
    mean, variance, eps = scale, scale, None
    if statistics is not None:
        mean, variance = (per_channel(f"statistics[{i}]", v, channels, out) for i, v in enumerate(statistics[:2]))
        eps = statistics[2]
    if pixels == 0:
        return
    rows, block = elementwise_tile(channels)
    with on_device_of(out):
        start(
            device_norm.normalise, (cdiv(pixels, rows), cdiv(channels, block)),
            z, scale, shift, mean, variance, out, pixels, z_slot.row // LANES, out_slot.row // LANES, channels,
            EPS=eps, ACTIVATION=activation_code(activation), TILE_ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip


def bn_backward(
    g: Tensor, z: Tensor, a: Tensor | None, q: Tensor, r: Tensor, mean: Tensor | None = None,
    share: Tensor | None = None,
) -> None:  # fmt: skip
    """g = a * g + q * (z - mean) + r in place.

    Args:
        g, z: slots [N, C, H, W].
        a: [C], None for 1.
        q, r: [C].
        mean: [C], None for 0.
        share: [2, C] where r and q are sums still, to be multiplied by its first and second row.
    """
    check_device("g", g)
    (g_slot, z_slot), pixels = check_slots([("g", g), ("z", z)])
    check_same_images("z", z, g)
    channels = g.shape[1]
    q, r = per_channel("q", q, channels, g), per_channel("r", r, channels, g)
    factor = q if a is None else per_channel("a", a, channels, g)
    center = q if mean is None else per_channel("mean", mean, channels, g)
    shares = (q, q) if share is None else [per_channel(f"share[{i}]", v, channels, g) for i, v in enumerate(share)]
    if pixels == 0:
        return
    rows, block = elementwise_tile(channels)
    with on_device_of(g):
        start(
            device_norm.bn_backward, (cdiv(pixels, rows), cdiv(channels, block)),
            g, z, factor, q, r, center, shares[1], shares[0],
            pixels, g_slot.row // LANES, z_slot.row // LANES, channels,
            HAS_A=a is not None, HAS_MEAN=mean is not None, HAS_SHARE=share is not None, TILE_ROWS=rows, BLOCK=block,
            num_warps=4,
        )  # fmt: skip


def slot_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of a slot [N, C, H, W], each [C], fp32 (fp64 for fp64)."""
    check_device("x", x)
    (slot,), pixels = check_slots([("x", x)])
    channels, accumulator = x.shape[1], accumulator_of(x)
    if pixels == 0:
        return (_nan(channels, accumulator, x),) * 2
    rows, block = elementwise_tile(channels)
    tiles, blocks = cdiv(pixels, rows), cdiv(channels, block)
    partial = torch.empty(tiles, 2, blocks * block, dtype=accumulator, device=x.device)
    with on_device_of(x):
        start(
            device_norm.slot_statistics, (blocks, tiles),
            x, partial, pixels, slot.row // LANES, channels, TILE_ROWS=rows, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return _merge_statistics(partial, tiles, rows, (1, 1), Layout(x, (), 0, False, 0, 0, 0, pixels), channels)


def weight_gradient(
    sources: Sequence[Tensor],
    dz: Tensor,
    kernel_size: int,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "relu",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    later: list[Splits] | None = None,
    config: WeightGradientConfig | None = None,
) -> Tensor:
    """The gradient of `conv` by its weight: [O, sum C_i, k, k], fp32 (fp64 for fp64 slots) or `dtype`.

    Args:
        sources: the slots that `conv` read, in its order.
        dz: slot [N, O, H, W], the gradient of its raw output.
        kernel_size: k, 1 or 3.
        affine, activation: as in `conv`.
        dtype: of the result.
        channels_last: its memory format; contiguous otherwise.
        later: the result is filled when `reduce_splits` is given this list, to which it is added.
        config: tile sizes instead of the chosen ones.

    Raises:
        TypeError, ValueError, RuntimeError: see the module.
    """
    check_device("dz", dz)
    layout = lay_out("sources", sources, dz, out_name="dz")
    if kernel_size not in (1, 3):
        raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size}")
    if not sources:
        raise ValueError("sources must hold at least one slot, got none")
    channels, out_channels, accumulator = sum(s.width for s in layout.sources), dz.shape[1], accumulator_of(dz)
    shape = (out_channels, channels, kernel_size, kernel_size)
    channels_last = channels_last and kernel_size > 1  # of a 1x1 kernel both are one
    result = torch.empty(
        shape, dtype=dtype or accumulator, device=dz.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip
    if layout.pixels == 0:
        return result.zero_()
    if affine is not None:
        affine = (per_channel("affine[0]", affine[0], channels, dz), per_channel("affine[1]", affine[1], channels, dz))
    capability, weights = capability_of(dz.device), channels * kernel_size**2
    if config is None:
        rule = weight_gradient_config(capability, dtype_name(dz), out_channels, weights, affine is not None)
        form = "weight", dtype_name(dz), kernel_size, affine is not None
        tuned = choice(dz.device, Shape(*form, channels, out_channels, *layout.images)).tile
        config = tuned if isinstance(tuned, WeightGradientConfig) else rule
    table = device_table(layout.sources, layout.width, kernel_size, config.chunk, (1, 1), False, dz.device)
    columns = cdiv(out_channels, config.columns) * config.columns
    all_k = table.chunks * config.chunk
    splits = weight_gradient_splits(capability, config, table.chunks * columns // config.columns, layout.pixels)
    splits = max(1, min(splits, (MAX_ELEMENTS - 1) // (all_k * columns)))
    split_rows = cdiv(cdiv(layout.pixels, splits), config.rows) * config.rows
    splits = cdiv(layout.pixels, split_rows)
    partial = torch.empty(splits, all_k, columns, dtype=accumulator, device=dz.device)
    scale, shift = (partial, partial) if affine is None else affine
    inside = device_pixels(*layout.images, (1, 1), dz.device)[0] if kernel_size == 3 else table.entries
    with on_device_of(dz):
        start(
            device_weight_gradient.weight_gradient, (table.chunks, columns // config.columns, splits),
            layout.base, dz, partial, table.entries, table.row8, scale, shift, table.channel, inside,
            layout.pixels, layout.row8, layout.out_row8, all_k, out_channels, split_rows,
            TILE_ROWS=config.rows, TILE_K=config.chunk, TILE_COLUMNS=config.columns, TAPS=kernel_size == 3,
            SLOT_ROWS=layout.slot_rows, AFFINE=affine is not None,
            ACTIVATION=activation_code(activation) if affine is not None else 0,
            SWAPPED=config.swapped, TF32=uses_tf32(dz), VECTOR=copy_elements(dz),
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers or None,
        )  # fmt: skip
    unsummed = Splits(partial, table.k_of_tap if channels_last else table.k_of_weight, result)
    if later is None:
        reduce_splits([unsummed])
    else:
        later.append(unsummed)
    return result


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
    config: ReadersConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the gradients of R readers, each act(BatchNorm(features)) and a 1x1 convolution, into the features' slots.

    out_c = rstd_c * sum over readers of gamma_rc g_rc; the share of the statistics is left to `bn_backward` (see
    readers.py), with q = -rstd^2 sum_r(gamma_r sum_g_xhat_r) / n and r = -rstd sum_r(gamma_r sum_g_r) / n.

    Args:
        dz: R slots [N, K, H, W] of one K and row, in one allocation: gradients of the readers' raw outputs.
        weights: R weights [K, C, 1, 1], C = the summed channels of `outs`; zeros where a reader lacks a channel.
        outs: slots [N, C_j, H, W] of the gradient, in one allocation, apart from the others.
        features: the matching slots of the raw features, in one allocation.
        gammas, betas: R affines [C]; zeros where a reader lacks a channel.
        mean, rstd: [C], the features' statistics.
        add: add to what `outs` hold instead of writing them for the first time.
        activation: "relu" or "relu6".
        terms: [2, C], and R shares [2, C], with dense rows: adds every reader's share times its two sums to the former.
        config: tile sizes instead of the chosen ones.

    Returns:
        (sum g, sum g xhat), each [R, C], fp32 (fp64 for fp64): the gradients of beta and gamma.

    Raises:
        TypeError, ValueError, RuntimeError: see the module.
    """
    readers = len(dz)
    if not readers or not outs:
        raise ValueError(f"dz and outs must hold at least one slot each, got {readers} and {len(outs)}")
    if activation_code(activation) == 0:
        raise ValueError("activation must be 'relu' or 'relu6', got None")
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
    for i, weight in enumerate(weights):
        if check_weight(f"weights[{i}]", weight, depth, channels) != 1:
            raise ValueError(f"weights[{i}] must be a 1x1 weight, got {tuple(weight.shape)}")
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
        shape = Shape("readers", dtype_name(first), 1, False, readers * depth, channels, *read.images)
        tuned = choice(first.device, shape).tile
        rule = readers_config(capability_of(first.device), dtype_name(first), channels)
        config = tuned if isinstance(tuned, ReadersConfig) else rule
    part = min(256, max(16, power_of_2(padded_width(depth))))
    parts = cdiv(padded_width(depth), part)
    out_at8, feature_at8, column_channel = device_columns(written.sources, raw.sources, config.columns, first.device)
    dz_at8 = device_offsets(tuple(source.offset // LANES for source in read.sources), first.device)
    columns = len(column_channel)
    tiles = cdiv(read.pixels, config.rows)
    layouts = tuple(step for weight in weights for step in weight.stride()[:2])
    packed = torch.empty(readers, columns, parts * part, dtype=first.dtype, device=first.device)
    affine = torch.empty(readers, 2, columns, dtype=accumulator, device=first.device)
    partial = torch.empty(tiles, readers, 2, columns, dtype=accumulator, device=first.device)
    sums = torch.empty(readers, 2, channels, dtype=accumulator, device=first.device)
    deep = min(64, part)
    with on_device_of(first):
        start(
            device_readers.pack_readers, (columns // 16, parts * part // deep, readers),
            tuple(weights), scales, shifts, device_offsets(layouts, first.device), column_channel, packed, affine,
            depth, TILE_COLUMNS=16, TILE_DEPTH=deep, num_warps=4,
        )  # fmt: skip
        start(
            device_readers.gather_readers, (columns // config.columns, tiles),
            read.base, packed, written.base, raw.base, affine, mean, rstd,
            dz_at8, out_at8, feature_at8, column_channel, partial,
            read.pixels, readers, len(out_at8), padded_width(depth) // LANES, read.row8, written.row8, raw.row8,
            TILE_ROWS=config.rows, TILE_COLUMNS=config.columns, DEPTH=part, PARTS=parts,
            ACTIVATION=activation_code(activation), ADD=add, TF32=uses_tf32(first),
            STAGES=config.stages if parts == 1 and part <= 128 else 1, num_warps=config.warps,
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


def _convolve(
    layout: Layout,
    weights: Sequence[Tensor] | PackedWeight,
    kernel_size: int,
    out: Tensor,
    *,
    epilogue: int,
    activation: int = 0,
    affine: tuple[Tensor, ...] | PackedAffine | None = None,
    raw: Tensor | None = None,
    vectors: tuple[Tensor, ...] = (),
    add: bool = False,
    transposed: bool = False,
    config: ConvolutionConfig | None = None,
) -> tuple[Tensor, int, Group]:
    """Pack the weights, unless they are, and launch.

    Returns the partials [tiles, 2, columns], the rows of such a tile, and their group.

    transposed: the weights are those of readers, whose output channels follow each other in K.
    """
    batch, height, width = layout.images
    channels, accumulator, device = out.shape[1], accumulator_of(out), out.device
    widths = tuple(source.width for source in layout.sources)
    if config is None:
        if isinstance(weights, PackedWeight):
            config = weights.matrix.config
        else:
            form = sum(widths), channels, kernel_size, affine is not None, transposed
            config = _chosen_config(out, layout.images, *form)
    group = config.group
    positions = group[0] * group[1]
    if positions > 1 and (kernel_size != 3 or height % group[0] or width % group[1]):
        raise ValueError(f"config.group {group} needs a 3x3 kernel and an image it divides, got {height} x {width}")
    if not 1 <= config.splits <= MOST_SPLITS:
        raise ValueError(f"config.splits must be 1 to {MOST_SPLITS}, got {config.splits}")
    padded = padded_width(channels)
    rows = layout.pixels // positions
    tiles = cdiv(rows, config.rows)
    table = device_table(layout.sources, width, kernel_size, config.chunk, group, transposed, device)
    matrix = Matrix(widths, channels, kernel_size, transposed, config)
    scale_shift, packed_affine = None, None
    if isinstance(affine, PackedAffine):
        if affine.matrix != matrix or affine.values.dtype != accumulator:
            raise ValueError(f"affine must be packed for {matrix} in {accumulator}, got {affine.matrix}")
        packed_affine = affine.values
    elif affine is not None:
        packed_affine = torch.empty(2, len(table.channel), dtype=accumulator, device=device)
        scale_shift = Affine(affine[0], affine[1], table.channel, packed_affine)
    if isinstance(weights, PackedWeight):
        if weights.matrix != matrix or weights.values.dtype != out.dtype:
            raise ValueError(f"weight must be packed for {matrix} in {out.dtype}, got {weights.matrix}")
        packed = weights.values
    else:
        ((packed, _),) = pack_matrices([matrix], [weights], out, scale_shift)
    columns = matrix.columns
    column_tiles = columns // config.all_columns
    split_rows = tiles * config.rows
    splits = max(1, min(config.splits, table.chunks, (MAX_ELEMENTS - 1) // (split_rows * columns)))
    held, tile_rows, tile_columns = finish_tile(splits, config.rows, columns)
    sums = epilogue in (STATISTICS, MASK)
    partial = torch.empty((cdiv(rows, tile_rows), 2, columns) if sums else 1, dtype=accumulator, device=device)
    products = partial.new_empty(splits, split_rows, columns) if splits > 1 else partial
    if kernel_size == 3:
        taps_inside, first_pixel = device_pixels(batch, height, width, group, device)
    else:
        taps_inside = first_pixel = table.entries
    four = (*vectors, *(partial,) * 4)[:4]
    of_group = {"GROUP_H": group[0], "GROUP_W": group[1], "GROUP_CHANNELS": padded if positions > 1 else 0}
    with on_device_of(out):
        start(
            device_conv.convolution, (column_tiles, tiles, splits),
            layout.base, packed, out, out if raw is None else raw, table.entries, table.row8,
            partial if packed_affine is None else packed_affine, taps_inside, first_pixel, *four, products,
            rows, width, layout.row8, layout.out_row8, layout.raw_row8, table.chunks, channels,
            TILE_ROWS=config.rows, TILE_COLUMNS=config.columns, TILE_COLUMNS2=config.columns2, TILE_K=config.chunk,
            **of_group, TAPS=kernel_size == 3, SLOT_ROWS=layout.slot_rows, AFFINE=affine is not None,
            ACTIVATION=activation, EPILOGUE=PARTIAL if splits > 1 else epilogue, ADD=add and splits == 1,
            TF32=uses_tf32(out), VECTOR=min(config.vector, copy_elements(out)),
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers or None,
        )  # fmt: skip
        if splits > 1:
            start(
                device_conv.finish_splits, (columns // tile_columns, cdiv(rows, tile_rows)),
                products, out, out if raw is None else raw, first_pixel, *four, partial,
                splits, split_rows, rows, width, layout.out_row8, layout.raw_row8, channels,
                SPLITS=held, TILE_ROWS=tile_rows, TILE_COLUMNS=tile_columns, **of_group,
                EPILOGUE=epilogue, ACTIVATION=activation, ADD=add, num_warps=4,
            )  # fmt: skip
    return partial, tile_rows, group


def _chosen_config(
    like: Tensor,
    images: tuple[int, int, int],
    read: int,
    channels: int,
    kernel_size: int,
    affine: bool,
    transposed: bool,
) -> ConvolutionConfig:
    """The tile of this GPU's table, or the rule's, for `images` in the dtype and on the device of `like`."""
    dtype, kind = dtype_name(like), "gradient" if transposed else "forward"
    tuned = choice(like.device, Shape(kind, dtype, kernel_size, affine, read, channels, *images)).tile
    if isinstance(tuned, ConvolutionConfig):
        return tuned
    capability = capability_of(like.device)
    form = affine, transposed, read
    return convolution_config(capability, dtype, channels, kernel_size, math.prod(images), *images[1:], *form)


def _merge_statistics(
    partial: Tensor, tiles: int, tile_rows: int, group: Group, layout: Layout, channels: int,
    made: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if made is None:
        made = torch.empty(2, channels, dtype=partial.dtype, device=partial.device)
    mean, variance = made
    positions = group[0] * group[1]
    bands, block, warps = merge_tile(tiles * positions, partial.dtype)
    with on_device_of(partial):
        start(
            device_norm.merge_statistics, (cdiv(channels, block),),
            partial, mean, variance, tiles, layout.pixels // positions, channels, partial.shape[2] // LANES,
            TILE_ROWS=tile_rows, POSITIONS=positions, GROUP_CHANNELS=padded_width(channels),
            BANDS=bands, BLOCK=block, ONCE=tiles * positions <= bands, num_warps=warps,
        )  # fmt: skip
    return mean, variance


def _merge_sums(partial: Tensor, tiles: int, group: Group, channels: int) -> tuple[Tensor, Tensor]:
    first, second = torch.empty(2, channels, dtype=partial.dtype, device=partial.device)
    positions = group[0] * group[1]
    bands, block, warps = merge_tile(tiles * positions, partial.dtype)
    with on_device_of(partial):
        start(
            device_norm.merge_sums, (cdiv(channels, block),),
            partial, first, second, tiles, channels, partial.shape[2] // LANES,
            POSITIONS=positions, GROUP_CHANNELS=padded_width(channels), BANDS=bands, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return first, second


def _nan(length: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.full((length,), math.nan, dtype=dtype, device=like.device)
