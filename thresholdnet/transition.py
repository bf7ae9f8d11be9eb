"""What stands between blocks, fused: BatchNorm - activation [- convolution] [- pooling], keeping its raw input alone.

Eager autograd keeps z, y, whatever the convolution and the pooling read, and max-pooling's 8-byte indices. Here y, the
pooled values and the maxima are made again in backward. z is mostly kept anyway, by or for what made it.

Letters: y = act(z * scale + shift); out = pool(y), or pool(conv(y)). Average pooling and a 1x1 convolution commute, so
the convolution runs on the pooled, fewer pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import sync
from .backends import elementwise
from .backends.native import Verbs
from .batchnorm import Norm, backward_norms, paired

aten = torch.ops.aten


class Pool(NamedTuple):
    """A pooling, as nn.MaxPool2d (dilation 1) or nn.AvgPool2d has it.

    Attributes:
        kind: "max" or "avg".
        window: kernel, stride and padding, each (height, width), in pixels.
        ceil_mode, count_include_pad: as in nn.AvgPool2d.
    """

    kind: str
    window: Sequence[int]
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """The pooled x."""
        if self.kind == "max":
            return elementwise.max_pool2d(x, *self.sides, self.ceil_mode)
        return elementwise.avg_pool2d(x, self.averages)

    @property
    def sides(self) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding."""
        return _pairs(self.window)

    @property
    def averages(self) -> elementwise.Averages:
        """Everything about an average."""
        return *self.sides, self.ceil_mode, self.count_include_pad


class Spec(NamedTuple):
    """Everything about a call but its tensors.

    Attributes:
        eps: of the BatchNorm.
        fixed: True where it normalises with given statistics.
        activation: as in `activations`.
        conv: stride, padding and dilation of the convolution, each (height, width); its groups are in its weight.
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
        z: [N, C, H, W].
        gamma, beta: [C].
        weight: [O, C / groups, k, k], or None without a convolution.
        running: mean and variance [C], read only where they are fixed.
        counts: pixels of every rank of `Spec.group`, or None.

    Returns:
        The output (channels_last) and the statistics used, [2, C] (mean, biased variance).
    """
    verbs = Verbs(None, z)
    wide = _wide(z)
    z = verbs.enter(z)
    if spec.fixed:
        moments = running[0].to(wide), running[1].to(wide)
    else:
        moments = sync.merge(verbs.moments(z), counts, spec.group)
    affine = verbs.affine(gamma, beta, moments, spec.eps)
    out = _convolved(spec, _activated(spec, verbs, z, affine), weight)
    return out.contiguous(memory_format=torch.channels_last), paired(*moments)


def backward(
    spec: Spec, grad: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, statistics: Tensor,
    counts: Tensor | None, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of z, gamma, beta and weight; None for z and weight where `needs` is False."""
    verbs = Verbs(None, z)
    z, grad = verbs.enter(z), grad.contiguous(memory_format=torch.channels_last)
    pixels = sync.total(counts, z.shape[0] * z.shape[2] * z.shape[3])
    (norm,) = backward_norms([(gamma, beta)], [statistics], [spec.eps], [spec.fixed], pixels, verbs.batch_norm_vectors)
    needs_z, dweight = any(needs[:3]), None
    if weight is not None:
        read = _activated(spec, verbs, z, norm.affine)
        grad, dweight, _ = aten.convolution_backward(
            grad, read, weight, None, *_pairs(spec.conv), False, [0, 0], _groups(z, weight), [needs_z, needs[3], False]
        )
    if not needs_z:
        return [None, None, None, dweight]
    g, sum_g, sum_gx = _masked(spec, verbs, grad, z, norm)
    dz = None
    if needs[0]:
        sums = paired(sum_g, sum_gx)
        dz = verbs.linear(g, z, *norm.backward_terms(sums if spec.fixed else sync.add(sums, spec.group)))
    return [dz, sum_gx, sum_g, dweight]


def behind(spec: Spec, y: Tensor, weight: Tensor | None) -> Tensor:
    """Pooling and convolution of the activated values [N, C, H, W], in torch's operations: for fake tensors."""
    return _convolved(spec, y if spec.pool is None else spec.pool(y), weight)


def _activated(spec: Spec, verbs: Verbs, z: Tensor, affine: elementwise.Affine) -> Tensor:
    """The activated and pooled values; averages alone do without the values in between."""
    if spec.pool is not None and spec.pool.kind == "avg":
        made: Tensor = verbs.passes.avg_pool2d(z, spec.pool.averages, affine, spec.activation)
        return made
    y = verbs.normalise(z, affine, spec.activation, into=("scratch", 0))
    if spec.pool is not None:
        y = verbs.passes.max_pool2d(y, *spec.pool.sides, spec.pool.ceil_mode)
    return y


def _masked(spec: Spec, verbs: Verbs, grad: Tensor, z: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of y behind the activation's mask, its sum and that of its product with xhat."""
    masked = (z, norm.affine, norm.mean, norm.rstd)
    if spec.pool is not None and spec.pool.kind == "avg":
        found: tuple[Tensor, Tensor, Tensor] = verbs.passes.avg_mask_sums(
            grad, spec.pool.averages, *masked, spec.activation
        )
        return found
    if spec.pool is not None:
        y = verbs.normalise(z, norm.affine, spec.activation, into=("scratch", 0))
        grad = verbs.passes.max_pool2d_backward(grad, y, *spec.pool.sides, spec.pool.ceil_mode)
    return verbs.gradient([], [], grad, into=("gradient", 0), masked=masked, activation=spec.activation)


def _convolved(spec: Spec, read: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return read
    return aten.convolution(read, weight, None, *_pairs(spec.conv), False, [0, 0], _groups(read, weight))


def _groups(x: Tensor, weight: Tensor) -> int:
    return x.shape[1] // weight.shape[1]


def _pairs(window: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    return list(window[0:2]), list(window[2:4]), list(window[4:6])


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32
