"""What stands between blocks, fused: BatchNorm - activation [- convolution] [- pooling], keeping its raw input alone.

Eager autograd keeps z, y, whatever the convolution and the pooling read, and max-pooling's 8-byte indices. Here y, the
pooled values and the maxima are made again in backward. z is mostly kept anyway, by or for what made it.

Letters: y = act(z * scale + shift); out = pool(y), or pool(conv(y)). Average pooling and a 1x1 convolution commute, so
the convolution runs on the pooled, fewer pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sync
from .backends import csrc
from .backends.native import Verbs
from .batchnorm import backward_norms, paired
from .downsampling import Pool, activated, masked, thirds
from .pixels import as_images, as_volumes, channels_last, count, volume_of

aten = torch.ops.aten


class Spec(NamedTuple):
    """Everything about a call but its tensors.

    Attributes:
        eps: of the BatchNorm.
        fixed: True where it normalises with given statistics.
        activation: as in `activations`.
        conv: stride, padding and dilation of the convolution, each (height, width) or (depth, height, width); its
            groups are in its weight.
        pool: behind the activation, or behind a 1x1 convolution and then an average; None for none.
        group: name of the process group that shares batch statistics, "" for none.
    """

    eps: float
    fixed: bool
    activation: str
    conv: Sequence[int]
    pool: Pool | None
    group: str = ""


def forward(
    spec: Spec, z: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, running: Sequence[Tensor],
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a transition.

    Args:
        spec: see `Spec`.
        z: [N, C, H, W] or [N, C, D, H, W].
        gamma, beta: [C].
        weight: [O, C / groups, k, k] (or k, k, k), or None without a convolution.
        running: mean and variance [C], read only where they are fixed.
        counts: pixels of every rank of `Spec.group`, or None.

    Returns:
        The output (channels_last) and the statistics used, [2, C] (mean, biased variance).
    """
    wide, volume, z = _wide(z), volume_of(z), as_images(z)
    verbs = Verbs(None, z)
    z = verbs.enter(z)
    if spec.fixed:
        moments = running[0].to(wide), running[1].to(wide)
    else:
        moments = sync.merge(verbs.moments(z), counts, spec.group)
    affine = verbs.affine(gamma, beta, moments, spec.eps)
    read = activated(spec.pool, verbs, z, affine, spec.activation, volume)
    if weight is not None and _few(spec, read, weight):
        out = csrc.linked_conv2d([read], weight.contiguous(memory_format=channels_last(weight)), None, None, "relu")
    else:
        out = _convolved(spec, read, weight)
    return out.contiguous(memory_format=channels_last(out)), paired(*moments)


def backward(
    spec: Spec, grad: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, statistics: Tensor,
    counts: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of z, gamma, beta and weight; None for z and weight where `needs` is False."""
    volume, z = volume_of(z), as_images(z)
    verbs = Verbs(None, z)
    z, grad = verbs.enter(z), grad.contiguous(memory_format=channels_last(grad))
    pixels = sync.total(counts, count(z))
    (norm,) = backward_norms([(gamma, beta)], [statistics], [spec.eps], [spec.fixed], pixels, verbs.batch_norm_vectors)
    needs_z, dweight = any(needs[:3]), None
    if weight is not None:
        read = activated(spec.pool, verbs, z, norm.affine, spec.activation, volume)
        grad, dweight, _ = aten.convolution_backward(
            grad, read, weight, None, *_how(spec, z, weight), [needs_z, needs[3], False]
        )
    if not needs_z:
        return [None, None, None, dweight]
    g, sum_g, sum_gx = masked(spec.pool, verbs, grad, z, norm, spec.activation, volume)
    dz = None
    if needs[0]:
        sums = paired(sum_g, sum_gx)
        dz = verbs.linear(g, z, *norm.backward_terms(sums if spec.fixed else sync.add(sums, spec.group)))
        dz = dz if volume is None else as_volumes(dz, volume)
    return [dz, sum_gx, sum_g, dweight]


def behind(spec: Spec, y: Tensor, weight: Tensor | None) -> Tensor:
    """Pooling and convolution of the activated values, shaped as z, in torch's operations: for fake tensors."""
    return _convolved(spec, y if spec.pool is None else spec.pool(y), weight)


def _convolved(spec: Spec, read: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return read
    return aten.convolution(read, weight, None, *_how(spec, read, weight))


def _few(spec: Spec, read: Tensor, weight: Tensor) -> bool:
    """Whether the convolution is one as in layers, of so few pixels that the library is slower."""
    kernel, *how = weight.shape[2], *spec.conv
    alike = kernel in (1, 3) and weight.shape[2:] == (kernel, kernel) and how == [1, 1, kernel // 2, kernel // 2, 1, 1]
    return alike and read.shape[1] == weight.shape[1] and csrc.convolves(read, weight)


def _how(spec: Spec, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """What torch's convolution of x with the weight takes behind the bias: stride to groups."""
    stride, padding, dilation = thirds(spec.conv)
    return stride, padding, dilation, False, [0] * len(stride), x.shape[1] // weight.shape[1]


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32
