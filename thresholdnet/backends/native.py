"""The engine's verbs in torch's own operations, for every device: gather the links into a scratch, call the library.

Letters: N batch, C channels, H x W pixels; M = N H W; z raw convolution output, y = act(z * scale + shift), g gradient
of y, dz gradient of z. Tensors of pixels are [N, C, H, W] in channels_last order. Per-channel vectors are float32
(float64 for float64 tensors). Sources are lists: what a layer reads, in link order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Affine = tuple[Tensor, Tensor]
"""scale and shift per channel."""
Moments = tuple[Tensor, Tensor]
"""mean and biased variance per channel."""

_PIXELS = (0, 2, 3)


def conv(
    sources: Sequence[Tensor],
    weight: Tensor,
    *,
    affine: Affine | None = None,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """conv2d over the concatenated sources, padding kernel // 2.

    `affine` normalises and activates what is read (pre-activation units); `bias` adds to the result and activates it
    (BatchNorm folded into the weight, inference).
    """
    read = _gather(sources, affine, activation)
    z = F.conv2d(read, weight, None if bias is None else bias.to(weight.dtype), padding=weight.shape[2] // 2)
    return z if bias is None else _activate_(z, activation)


def moments(z: Tensor) -> Moments:
    """Mean and biased variance over all pixels."""
    variance, mean = torch.var_mean(_wide(z), _PIXELS, correction=0)
    return mean, variance


def normalise(z: Tensor, affine: Affine, activation: str) -> Tensor:
    """act(z * scale + shift), rounded once."""
    return _activate_(_affine(z, affine), activation).to(z.dtype)


def gradient(
    readers: Sequence[Tensor],
    weights: Sequence[Tensor],
    add: Tensor | None,
    *,
    masked: tuple[Tensor, Affine, Tensor, Tensor] | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of one node, gathered from all its readers with the transposed link table.

    Args:
        readers: dz of every layer that reads the node.
        weights: of each of them, the slice of its weight that reads the node, [O, C, k, k].
        add: gradient of the node as a block output, or None; with no readers it must be given.
        masked: (z, affine, mean, rstd) of the node: apply its activation's mask and return BatchNorm's sums.

    Returns:
        The gradient g of the node's activated value behind the mask (or of the value itself), sum(g) and sum(g * xhat)
        (None without `masked`).
    """
    if readers:
        transposed = torch.cat([w.flip(2, 3).transpose(0, 1) for w in weights], dim=1)
        g = F.conv2d(_join(readers), transposed, padding=transposed.shape[2] // 2)
        if add is not None:
            g += add
    else:
        assert add is not None
        g = add.clone(memory_format=torch.channels_last)
    if masked is None:
        return g, None, None
    z, affine, mean, rstd = masked
    g *= _open(_affine(z, affine), activation)
    return g, *_sums(g, z, mean, rstd)


def reader_gradient(
    dz: Tensor, weight: Tensor, sources: Sequence[Tensor], affine: Affine, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradient that one pre-activation reader (BN - act - 1x1 convolution) sends to each of its sources.

    Returns:
        Per source scale * g, the part of the gradient that does not pass through the batch statistics; sum(g) and
        sum(g * xhat) per concatenated channel.
    """
    joined = _join(sources)
    g = F.conv2d(dz, weight.transpose(0, 1))
    g *= _open(_affine(joined, affine), activation)
    sum_g, sum_gx = _sums(g, joined, mean, rstd)
    parts = (g * _per_channel(affine[0])).to(g.dtype).split([s.shape[1] for s in sources], dim=1)
    return list(parts), sum_g, sum_gx


def linear(g: Tensor, z: Tensor, a: Tensor | None, b: Tensor, c: Tensor) -> Tensor:
    """a * g + b * z + c per channel (a = 1 where None): the affine part of BatchNorm's backward."""
    first = _wide(g) if a is None else _wide(g) * _per_channel(a)
    return torch.addcmul(first, _wide(z), _per_channel(b)).add_(_per_channel(c)).to(g.dtype)


def weight_gradient(
    sources: Sequence[Tensor],
    dz: Tensor,
    kernel_size: int,
    *,
    affine: Affine | None = None,
    activation: str = "relu",
) -> Tensor:
    """[O, C, k, k]: the weight's gradient over the concatenated (and, with `affine`, activated) sources."""
    read = _gather(sources, affine, activation)
    shape = [dz.shape[1], read.shape[1], kernel_size, kernel_size]
    return conv2d_weight(read, shape, dz, padding=kernel_size // 2)


def collect(nodes: Sequence[Tensor]) -> Tensor:
    """The block's output: the nodes side by side, in memory of its own."""
    return _join(nodes) if len(nodes) > 1 else nodes[0].clone(memory_format=torch.channels_last)


def _gather(sources: Sequence[Tensor], affine: Affine | None, activation: str) -> Tensor:
    read = _join(sources)
    return read if affine is None else normalise(read, affine, activation)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(tensors), dim=1) if len(tensors) > 1 else tensors[0]
    return joined.contiguous(memory_format=torch.channels_last)


def _wide(x: Tensor) -> Tensor:
    """At least float32: half formats carry pixels, never sums."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _affine(z: Tensor, affine: Affine) -> Tensor:
    scale, shift = affine
    return torch.addcmul(_per_channel(shift), _wide(z), _per_channel(scale))


def _activate_(x: Tensor, activation: str) -> Tensor:
    return x.clamp_(0, 6) if activation == "relu6" else x.relu_()


def _open(x: Tensor, activation: str) -> Tensor:
    """Where the activation passes a gradient on."""
    return (x > 0) & (x < 6) if activation == "relu6" else x > 0


def _sums(g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(g)
    normal = (_wide(z) - _per_channel(mean)) * _per_channel(rstd)
    return wide.sum(_PIXELS), (wide * normal).sum(_PIXELS)
