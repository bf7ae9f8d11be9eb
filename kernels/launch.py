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

from ..activations import number as activation_number  # type: ignore[import-not-found]  # mypy sees kernels/ under its own name
from ..replay import start  # type: ignore[import-not-found]  # likewise
from . import affine as device_affine
from . import conv as device_conv
from . import norm as device_norm
from .configs import DTYPES, MOST_SPLITS, ConvolutionConfig, convolution_config
from .device import capability_of, check_device, on_device_of
from .device_tables import DeviceTable, device_pixels, device_table
from .gathered_readers import gradient_of_readers
from .operands import (
    MAX_ELEMENTS,
    Layout,
    accumulator_of,
    check_rows,
    check_same_images,
    check_slots,
    check_weight,
    check_weights,
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
from .tiles import cdiv, elementwise_tile, finish_tile, merge_tile
from .tuned import Shape, choice
from .weight_gradients import reduce_splits, weight_gradient

__all__ = [
    "Mask", "batch_norm_affine", "batch_norm_vectors", "bn_backward", "conv", "gradient", "gradient_of_readers",
    "normalise", "pack", "reduce_splits", "slot_statistics", "weight_gradient",
]  # fmt: skip

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
    dilation: int = 1,
    config: ConvolutionConfig | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Convolve the sources, concatenated, into a slot: out = conv2d(cat(sources), weight, padding=dilation (k // 2)).

    Args:
        sources: slots [N, C_i, H, W] in the order of the weight's input channels.
        weight: [O, sum C_i, k, k], k 1 or 3, any floating dtype; it is rounded to the slots' dtype. Or what `pack` made
            of it.
        out: slot [N, O, H, W], apart from the sources.
        affine: (scale, shift), each [sum C_i]: convolve act(source * scale + shift) instead.
            With a packed weight, what `pack_affine` made for it.
        activation: "relu", "relu6", "leaky_relu(SLOPE)" or None; used after `affine` and after `bias`.
        bias: [O]: out = act(result + bias), for folded inference.
        statistics: return (mean, biased variance) of the written values, each [O], fp32 (fp64 for fp64).
        moments: [2, O], with dense rows of that dtype: where those are written; elsewhere without.
        dilation: pixels between two taps; that of a packed weight.
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
        activation=activation_number(activation), affine=scale_shift, vectors=vectors, dilation=dilation,
        config=config,
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
    dilation: int = 1,
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
        activation: as there, not None with `mask`.
        dilation: of all readers, as there.
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
        kernel_size = check_weights("weights", read, channels, [d.shape[1] for d in dz])
    vectors: tuple[Tensor, ...] = ()
    if mask is not None:
        if activation_number(activation) == 0:
            raise ValueError("activation must not be None with a mask, got None")
        check_same_images("mask.z", mask[0], out)
        vectors = tuple(per_channel(f"mask[{i}]", v, channels, out) for i, v in enumerate(mask[1:], start=1))
    if layout.pixels == 0:
        return (torch.zeros(channels, dtype=accumulator, device=out.device),) * 2 if mask is not None else None
    partial, _, group = _convolve(
        layout, read, kernel_size, out,
        epilogue=PLAIN if mask is None else MASK,
        activation=activation_number(activation) if mask is not None else 0,
        raw=None if mask is None else mask[0], vectors=vectors, add=add, transposed=True, dilation=dilation,
        config=config,
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
    dilations: Sequence[int] = (),
) -> list[PackedWeight]:
    """Pack the weights of several calls of `conv`, or of several of `gradient`, at once, as those would one by one.

    Args:
        weights: without `widths` each gradient's weights, as there; with them each convolution's, alone: [weight].
        like: any tensor [N, C, H, W] with the pixels, dtype and device of the calls' slots.
        widths: channels of each convolution's sources, in order.
        affine: for each convolution whether it takes one, which `pack_affine` packs; None where none does.
        dilations: of each call; none where all are 1.

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
    matrices, normalised, spread = [], affine or [False] * len(weights), dilations or [1] * len(weights)
    for i, (own, normal, dilation) in enumerate(zip(weights, normalised, spread, strict=True)):
        if widths is None:
            read, channels = tuple(weight.shape[0] for weight in own), own[0].shape[1] if own else 1
            kernel_size = check_weights(f"weights[{i}]", own, channels, read)
        else:
            read, channels = tuple(widths[i]), own[0].shape[0]
            kernel_size = check_weight(f"weights[{i}][0]", own[0], channels, sum(read))
        config = _chosen_config(like, images, sum(read), channels, kernel_size, normal, widths is None, dilation)
        matrices.append(Matrix(read, channels, kernel_size, widths is None, config))
    return pack_matrices(matrices, weights, like)


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


def batch_norm_vectors(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, pixels: int) -> Tensor:
    """What a BatchNorm is to its backward, [7, C] in the statistics' dtype; all tensors [C], on one device.

    Rows: gamma, beta, scale, shift, rstd, -scale / pixels and -scale rstd / pixels.
    """
    channels = mean.shape[0]
    vectors = [vector if vector.is_contiguous() else vector.contiguous() for vector in (gamma, beta, mean, variance)]
    made = torch.empty(7, channels, dtype=mean.dtype, device=mean.device)
    with on_device_of(made):
        start(
            device_affine.batch_norm_vectors, (cdiv(channels, 256),),
            *vectors, made, channels, pixels, EPS=eps, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return made


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
            EPS=eps, ACTIVATION=activation_number(activation), TILE_ROWS=rows, BLOCK=block, num_warps=4,
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
    dilation: int = 1,
    config: ConvolutionConfig | None = None,
) -> tuple[Tensor, int, Group]:
    """Launch, with the epilogue on its own behind it where K is split.

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
            form = sum(widths), channels, kernel_size, affine is not None, transposed, dilation
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
    table = device_table(layout.sources, width, kernel_size, config.chunk, group, transposed, device, dilation)
    matrix = Matrix(widths, channels, kernel_size, transposed, config)
    packed, packed_affine = _packed(weights, affine, matrix, table, out)
    columns = matrix.columns
    column_tiles = columns // config.all_columns
    split_rows = tiles * config.rows
    splits = max(1, min(config.splits, table.chunks, (MAX_ELEMENTS - 1) // (split_rows * columns)))
    held, tile_rows, tile_columns = finish_tile(splits, config.rows, columns)
    sums = epilogue in (STATISTICS, MASK)
    partial = torch.empty((cdiv(rows, tile_rows), 2, columns) if sums else 1, dtype=accumulator, device=device)
    products = partial.new_empty(splits, split_rows, columns) if splits > 1 else partial
    if kernel_size == 3:
        taps_inside, first_pixel = device_pixels(batch, height, width, group, device, dilation)
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


def _packed(
    weights: Sequence[Tensor] | PackedWeight,
    affine: tuple[Tensor, ...] | PackedAffine | None,
    matrix: Matrix,
    table: DeviceTable,
    out: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(weights, affine) in the order of K: as they are where they are packed for it, else by a launch for both."""
    scale_shift, packed_affine = None, None
    if isinstance(affine, PackedAffine):
        if affine.matrix != matrix or affine.values.dtype != accumulator_of(out):
            raise ValueError(f"affine must be packed for {matrix} in {accumulator_of(out)}, got {affine.matrix}")
        packed_affine = affine.values
    elif affine is not None:
        packed_affine = torch.empty(2, len(table.channel), dtype=accumulator_of(out), device=out.device)
        scale_shift = Affine(affine[0], affine[1], table.channel, packed_affine)
    if isinstance(weights, PackedWeight):
        if weights.matrix != matrix or weights.values.dtype != out.dtype:
            raise ValueError(f"weight must be packed for {matrix} in {out.dtype}, got {weights.matrix}")
        return weights.values, packed_affine
    ((packed, _),) = pack_matrices([matrix], [weights], out, scale_shift)
    return packed, packed_affine


def _chosen_config(
    like: Tensor,
    images: tuple[int, int, int],
    read: int,
    channels: int,
    kernel_size: int,
    affine: bool,
    transposed: bool,
    dilation: int = 1,
) -> ConvolutionConfig:
    """The tile of this GPU's table, or the rule's, for `images` in the dtype and on the device of `like`."""
    dtype, kind = dtype_name(like), "gradient" if transposed else "forward"
    tuned = choice(like.device, Shape(kind, dtype, kernel_size, affine, read, channels, *images)).tile
    if isinstance(tuned, ConvolutionConfig) and (dilation == 1 or kernel_size == 1):
        return tuned
    capability = capability_of(like.device)
    form = affine, transposed, read, dilation
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
            tile_rows, positions, padded_width(channels) // LANES,
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
            partial, first, second, tiles, channels, partial.shape[2] // LANES, positions,
            padded_width(channels) // LANES,
            BANDS=bands, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return first, second


def _nan(length: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.full((length,), math.nan, dtype=dtype, device=like.device)
