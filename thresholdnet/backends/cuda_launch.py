"""The functions of `kernels.launch` on the CUDA operators of csrc/, for bfloat16 and float16 slots.

A convolution either runs in the library's own tensor-core kernel, which reads the linked slots where they lie, or
gathers them into a scratch for torch's convolution: `convolution_form` says which. Weight gradients, and what
pre-activation readers send back, always gather. Passes over pixels take slots with their padding: zeros in, zeros out.

Arguments, results and errors as in `kernels.launch`; tables and workspaces as there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..activations import number as activation_number
from ..batchnorm import linear_terms
from ..constants import device_constant
from ..kernels.device_tables import device_halo_table, device_pixels, device_table
from ..kernels.operands import (
    Layout,
    check_same_images,
    check_slots,
    check_weight,
    check_weights,
    dtype_name,
    lay_out,
    padded_width,
    per_channel,
)
from ..kernels.slots import padded, whole
from ..kernels.tuned import Shape, choice
from . import csrc

FORMS = {"gemm": 0, "wide": 1, "upright": 2}
"""The own kernels, as csrc/cuda/conv.h numbers them: implicit product, or tiles of 8 x 16 and 16 x 8 pixels."""

TILES = {"wide": (8, 16), "upright": (16, 8)}
CHUNK = 32  # K rows of a pipeline stage
PLAIN, STATISTICS, BIAS, MASK = 0, 1, 2, 3


def convolution_form(kernel_size: int, out_channels: int, height: int, width: int, forced: str | None = None) -> str:
    """Which kernel convolves: "gemm", "wide" or "upright" of our own, or "library": gather, then torch's convolution.

    What a GPU measured goes before this (`kernels.tuned`). The rules are predictions from a model of memory and
    tensor-core traffic:

    - 1x1: our own. It is bound by memory, and the gather would move every source twice more.
    - 3x3 of up to 48 channels: our own. The gather's time against the product's is 36 / channels; a product as thin
      leaves the tensor cores idle on either side. Wider layers gain more from the library's better use of the tensor
      cores than the gather costs.
    - 3x3 of up to 32 channels: a tile with its border in shared memory, which reads a pixel 1.4 times instead of 9,
      where at least three quarters of the tiles' pixels lie inside the image. More channels would need more shared
      memory for the weights of nine taps than two blocks a multiprocessor leave.

    Args:
        kernel_size: 1 or 3.
        out_channels: channels written.
        height, width: of the image.
        forced: "own" or "library" where the choice is not to be made here: to measure one against the other. The
            launchers pass the environment variable THRESHOLDNET_CONV.

    Raises:
        ValueError: another value of `forced`.
    """
    if forced not in (None, "own", "library"):
        raise ValueError(f"THRESHOLDNET_CONV must be 'own' or 'library', got {forced!r}")
    if forced == "library" or (forced is None and kernel_size == 3 and out_channels > 48):
        return "library"
    if kernel_size == 1 or out_channels > 32:
        return "gemm"
    used = {form: _share_inside(height, tile[0]) * _share_inside(width, tile[1]) for form, tile in TILES.items()}
    best = max(used, key=lambda form: used[form])
    return best if used[best] >= 0.75 else "gemm"


def _share_inside(length: int, tile: int) -> float:
    """Of tiles that cover `length`, the share that is covered by it."""
    return length / (-(-length // tile) * tile)


def operators() -> Any:
    """The library's operators."""
    return torch.ops.thresholdnet_csrc


def conv(
    sources: Sequence[Tensor],
    weight: Tensor,
    out: Tensor,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "relu",
    bias: Tensor | None = None,
    statistics: bool = False,
    moments: Tensor | None = None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor] | None:
    """See `kernels.launch.conv`; an affine in front of a 3x3 kernel always takes the library's convolution.

    The statistics are not written into `moments`, but returned.
    """
    if bias is not None and statistics:
        raise ValueError("statistics must be False with a bias, got True: they are the raw convolution's")
    layout = lay_out("sources", sources, out)
    if not sources:
        raise ValueError("sources must hold at least one slot, got none")
    channels, widths = out.shape[1], [source.width for source in layout.sources]
    kernel_size = check_weight("weight", weight, channels, sum(widths))
    if affine is not None:
        affine = _affine(affine, sum(widths), out)
    vectors = [] if bias is None else [per_channel("bias", bias, channels, out)]
    code = activation_number(activation)
    form = _form("forward", kernel_size, sum(widths), out, affine is not None, dilation)
    if form != "library" and (affine is None or kernel_size == 1):
        epilogue = STATISTICS if statistics else PLAIN if bias is None else BIAS
        found = _convolve(layout, weight, out, form, epilogue, code, affine=affine, vectors=vectors, dilation=dilation)
        return (found[0], found[1]) if statistics else None
    read = _gathered(sources, affine, code)
    z = _convolved(read, weight, widths, dilation)
    scale, shift = (None, None) if bias is None else _fitted([torch.ones_like(vectors[0]), *vectors], channels)
    operators().gather([z], scale, shift, 0 if bias is None else code, whole(out))
    return slot_statistics(out) if statistics else None


def gradient(
    dz: Sequence[Tensor],
    weights: Sequence[Tensor],
    out: Tensor,
    *,
    add: bool = False,
    mask: tuple[Tensor, ...] | None = None,
    activation: str | None = "relu",
    dilation: int = 1,
) -> tuple[Tensor, Tensor] | None:
    """See `kernels.launch.gradient`."""
    layout = lay_out("dz", dz, out, *([] if mask is None else [mask[0]]))
    if len(weights) != len(dz):
        raise ValueError(f"weights must hold one weight for each of the {len(dz)} readers, got {len(weights)}")
    channels = out.shape[1]
    kernel_size = check_weights("weights", weights, channels, [d.shape[1] for d in dz])
    vectors: list[Tensor] = []
    if mask is not None:
        if activation_number(activation) == 0:
            raise ValueError("activation must not be None with a mask, got None")
        check_same_images("mask.z", mask[0], out)
        vectors = [per_channel(f"mask[{i}]", v, channels, out) for i, v in enumerate(mask[1:], start=1)]
    code = activation_number(activation) if mask is not None else 0
    transposed = [weight.detach().transpose(0, 1) for weight in weights]
    joined = torch.cat(transposed, 1) if transposed else out.new_empty(channels, 0, 1, 1)
    form = _form("gradient", kernel_size, joined.shape[1], out, False, dilation) if dz else "gemm"
    if form != "library":
        raw = None if mask is None else mask[0]
        epilogue = PLAIN if mask is None else MASK
        found = _convolve(
            layout, joined, out, form, epilogue, code, raw=raw, vectors=vectors, add=add, transposed=True,
            dilation=dilation,
        )  # fmt: skip
        return None if mask is None else (found[0], found[1])
    g = _convolved(_gathered(dz, None, 0), _mirrored(joined), [d.shape[1] for d in dz], dilation)
    to = whole(out)
    if mask is None:
        if add:
            to += g
        else:
            to.copy_(g)
        return None
    fitted = _fitted(vectors, channels)
    sum_g, sum_gx = operators().mask_sums(g, to if add else None, whole(mask[0]), *fitted, code, to)
    return sum_g[:channels], sum_gx[:channels]


def batch_norm_affine(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.launch.batch_norm_affine`."""
    return csrc.batch_norm_affine(gamma, beta, mean, variance, eps)


def batch_norm_vectors(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, pixels: int) -> Tensor:
    """See `kernels.launch.batch_norm_vectors`."""
    return csrc.batch_norm_vectors(gamma, beta, mean, variance, eps, pixels)


def normalise(z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, activation: str | None = "relu") -> None:
    """See `kernels.launch.normalise`."""
    check_slots([("z", z), ("out", out)])
    check_same_images("z", z, out)
    channels = out.shape[1]
    affine = _fitted(_affine((scale, shift), channels, out), channels)
    operators().gather([whole(z)], *affine, activation_number(activation), whole(out))


def bn_backward(
    g: Tensor, z: Tensor, a: Tensor | None, q: Tensor, r: Tensor, mean: Tensor | None = None,
    share: Tensor | None = None,
) -> None:  # fmt: skip
    """See `kernels.launch.bn_backward`."""
    check_slots([("g", g), ("z", z)])
    check_same_images("z", z, g)
    channels = g.shape[1]
    b, c = linear_terms(q, r, share)
    given = {name: v for name, v in (("b", b), ("c", c), ("a", a), ("mean", mean)) if v is not None}
    fitted = _fitted([per_channel(name, v, channels, g) for name, v in given.items()], channels)
    found = dict(zip(given, fitted, strict=True))
    operators().linear(whole(g), whole(z), found.get("a"), found["b"], found["c"], found.get("mean"), whole(g))


def slot_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.launch.slot_statistics`."""
    check_slots([("x", x)])
    mean, variance = operators().moments(whole(x))
    return mean[: x.shape[1]], variance[: x.shape[1]]


def weight_gradient(
    sources: Sequence[Tensor],
    dz: Tensor,
    kernel_size: int,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "relu",
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    later: list[Any] | None = None,
    dilation: int = 1,
) -> Tensor:
    """See `kernels.launch.weight_gradient`; without `dtype` the result has the slots', and is always contiguous.

    Nothing is left for `later`.
    """
    layout = lay_out("sources", sources, dz, out_name="dz")
    if kernel_size not in (1, 3):
        raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size}")
    if not sources:
        raise ValueError("sources must hold at least one slot, got none")
    widths = [source.width for source in layout.sources]
    if affine is not None:
        affine = _affine(affine, sum(widths), dz)
    read, grad = _gathered(sources, affine, activation_number(activation)), _gathered([dz], None, 0)
    shape = [grad.shape[1], read.shape[1], kernel_size, kernel_size]
    found = conv2d_weight(read, shape, grad, padding=dilation * (kernel_size // 2), dilation=dilation)[: dz.shape[1]]
    places = _places(tuple(widths), dz.device)
    return (found if places is None else found.index_select(1, places.of_channel)).to(dtype or found.dtype)


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
) -> tuple[Tensor, Tensor]:
    """See `kernels.launch.gradient_of_readers`; one reader after the other, each over all features."""
    widths = tuple(out.shape[1] for out in outs)
    channels, first = sum(widths), outs[0]
    code = activation_number(activation)
    places = _places(widths, first.device)
    mean, rstd = per_channel("mean", mean, channels, first), per_channel("rstd", rstd, channels, first)
    to, raw, sums = [whole(out) for out in outs], [whole(feature) for feature in features], []
    nothing = first.new_empty(0)
    check_weights("weights", weights, channels, [d.shape[1] for d in dz])
    for i, (d, weight, gamma, beta) in enumerate(zip(dz, weights, gammas, betas, strict=True)):
        scale = per_channel(f"gammas[{i}]", gamma, channels, first) * rstd
        shift = per_channel(f"betas[{i}]", beta, channels, first) - mean * scale
        vectors = [v if places is None else _spread(v, 0, places.of_padded) for v in (scale, shift, mean, rstd)]
        transposed = _mirrored(weight.detach().transpose(0, 1))
        if places is not None:
            transposed = _spread(transposed, 0, places.of_padded)
        g = _convolved(_gathered([d], None, 0), transposed, [d.shape[1]], dilation)
        before = to if add or i else [nothing] * len(to)
        found = operators().send(g, raw, *vectors, before, code, to)
        sums.append(found if places is None else found.index_select(1, places.of_channel))
    both = torch.stack(sums)
    if terms is not None:
        for share, found in zip(terms[1], both, strict=True):
            terms[0].addcmul_(share, found)
    return both[:, 0], both[:, 1]


def _form(kind: str, kernel_size: int, read: int, out: Tensor, affine: bool, dilation: int = 1) -> str:
    """THRESHOLDNET_CONV's, else that of this GPU's table, else the rule's; dilated tiles have wider borders."""
    batch, channels, height, width = out.shape
    forced = os.environ.get("THRESHOLDNET_CONV")
    shape = Shape(kind, dtype_name(out), kernel_size, affine, read, channels, batch, height, width)
    tuned = None if forced else choice(out.device, shape).form
    form = tuned or convolution_form(kernel_size, channels, height, width, forced)
    return "gemm" if form in TILES and dilation > 1 else form


def _convolve(
    layout: Layout,
    weight: Tensor,
    out: Tensor,
    form: str,
    epilogue: int,
    activation: float,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    raw: Tensor | None = None,
    vectors: Sequence[Tensor] = (),
    add: bool = False,
    transposed: bool = False,
    dilation: int = 1,
) -> Tensor:
    """The own kernel; returns [2, channels]: mean and variance, or the mask's two sums, or nothing."""
    kernel_size, inside = weight.shape[2], None
    if form == "gemm":
        table = device_table(layout.sources, layout.width, kernel_size, CHUNK, (1, 1), transposed, out.device, dilation)
        if kernel_size == 3:
            inside = device_pixels(*layout.images, (1, 1), out.device, dilation)[0]
    else:
        table = device_halo_table(layout.sources, layout.width, CHUNK, transposed, out.device)
    scale, shift = (None, None) if affine is None else affine
    found: Tensor = operators().convolution(
        layout.base, weight.detach().to(out.dtype).reshape(out.shape[1], -1).contiguous(), table.entries, table.row8,
        table.weight_index, inside, FORMS[form], scale, shift, table.channel, list(vectors), raw, epilogue, activation,
        add, out,
    )  # fmt: skip
    return found


def _gathered(sources: Sequence[Tensor], affine: tuple[Tensor, Tensor] | None, activation: float) -> Tensor:
    """The slots with their padding side by side in one channels_last tensor, activated with `affine`."""
    first, parts = sources[0], [whole(source) for source in sources]
    if affine is None and len(parts) == 1 and parts[0].is_contiguous(memory_format=torch.channels_last):
        return parts[0]
    widths = tuple(source.shape[1] for source in sources)
    batch, _, height, width = first.shape
    scratch = torch.empty(
        (batch, sum(padded(widths)), height, width), dtype=first.dtype, device=first.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    places = _places(widths, first.device)
    scale, shift = (None, None) if affine is None else affine
    if scale is not None and shift is not None and places is not None:
        scale, shift = _spread(scale, 0, places.of_padded), _spread(shift, 0, places.of_padded)
    operators().gather(parts, scale, shift, 0 if affine is None else activation, scratch)
    return scratch


def _convolved(read: Tensor, weight: Tensor, widths: Sequence[int], dilation: int) -> Tensor:
    """torch's convolution of gathered slots; output channels are padded as a slot's are."""
    places = _places(tuple(widths), read.device)
    weight = weight.detach().to(read.dtype)
    if places is not None:
        weight = _spread(weight, 1, places.of_padded)
    if weight.shape[0] % 8:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -weight.shape[0] % 8))
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(read, weight.contiguous(memory_format=torch.channels_last), padding=padding, dilation=dilation)


def _mirrored(weight: Tensor) -> Tensor:
    """The taps from last to first, as a data gradient takes them; a single one stays where it is."""
    return weight if weight.shape[2] == 1 else weight.flip(2, 3)


class _Places(NamedTuple):
    """Between channels side by side and slots side by side with their padding.

    Attributes:
        of_padded: channel of each padded place; in padding one behind the last.
        of_channel: padded place of each channel.
    """

    of_padded: Tensor
    of_channel: Tensor


@device_constant(maxsize=4096)
def _places(widths: tuple[int, ...], device: torch.device) -> _Places | None:
    """None where no slot is padded."""
    if not any(width % 8 for width in widths):
        return None
    channels, first = sum(widths), 0
    of_padded: list[int] = []
    for width in widths:
        of_padded += [*range(first, first + width), *[channels] * (padded_width(width) - width)]
        first += width
    of_channel = [i for i, c in enumerate(of_padded) if c < channels]
    return _Places(torch.tensor(of_padded, device=device), torch.tensor(of_channel, device=device))


def _spread(values: Tensor, dim: int, of_padded: Tensor) -> Tensor:
    """Channels along `dim` to their padded places, zeros between them."""
    zero = values.new_zeros([1 if i == dim else size for i, size in enumerate(values.shape)])
    return torch.cat([values, zero], dim).index_select(dim, of_padded)


def _fitted(vectors: Sequence[Tensor], channels: int) -> Sequence[Tensor]:
    """Vectors of one slot's channels, with zeros for its padding: in two launches, however many they are."""
    if channels % 8 == 0:
        return vectors
    made = vectors[0].new_zeros(len(vectors), padded_width(channels)).unbind()
    torch._foreach_copy_([row[:channels] for row in made], list(vectors))
    return made


def _affine(affine: tuple[Tensor, Tensor], channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift = (per_channel(f"affine[{i}]", v, channels, like) for i, v in enumerate(affine))
    return scale, shift
