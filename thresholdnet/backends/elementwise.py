"""The native backend's passes over pixels, in torch's own operations: for every device and dtype.

`csrc.py` has the same functions in C++ for CPUs. Letters as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import activate_, masked
from ..batchnorm import batch_norm
from ..batchnorm import batch_norm_vectors as batch_norm_vectors

Affine = tuple[Tensor, Tensor]
"""scale and shift per channel."""

Averages = tuple[Sequence[int], Sequence[int], Sequence[int], bool, bool]
"""kernel, stride, padding, ceil_mode and count_include_pad of an average pooling."""

_PIXELS = (0, 2, 3)

aten = torch.ops.aten


def gather(sources: Sequence[Tensor], affine: Affine | None, activation: str, scratch: Tensor | None = None) -> Tensor:
    """The sources side by side, or act(sources * scale + shift); a single source may come back itself.

    `scratch`: memory that the result may lie in, for C++; these operations make their own.
    """
    joined = torch.cat(list(sources), dim=1) if len(sources) > 1 else sources[0]
    joined = joined.contiguous(memory_format=torch.channels_last)
    if affine is None:
        return joined
    y = _normal(joined, affine)
    return activate_(y, activation).to(joined.dtype)


def batch_norm_affine(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Affine:
    """scale and shift [C] of a BatchNorm with these statistics, in their dtype."""
    return batch_norm(gamma, beta, mean, variance, eps, False).affine


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all pixels."""
    variance, mean = torch.var_mean(_wide(z), _PIXELS, correction=0)
    return mean, variance


def mask_sums(
    g: Tensor,
    add: Tensor | None,
    z: Tensor,
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    owned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """g (+ add) where the activation of z * scale + shift passes it on; its sum and that of its product with xhat.

    `owned`: g may be written into.
    """
    if add is not None:
        g, owned = (g.add_(add) if owned else g + add), True
    g = masked(g, _normal(z, affine), activation, owned)
    return g, *_sums(g, z, mean, rstd)


def send(
    g: Tensor,
    features: Sequence[Tensor],
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    before: Sequence[Tensor | None],
    owned: Sequence[bool],
    activation: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """A pre-activation reader's gradient on its way to its features: mask, sums, and before + scale * g.

    `owned`: which of `before` may be written into.
    """
    joined = gather(features, None, activation)
    g, sum_g, sum_gx = mask_sums(g, None, joined, affine, mean, rstd, activation, owned=True)
    parts = (g * _per_channel(affine[0])).to(g.dtype).split([f.shape[1] for f in features], dim=1)
    sent = [part if so_far is None else so_far + part for part, so_far in zip(parts, before, strict=True)]
    return sent, sum_g, sum_gx


def linear(g: Tensor, z: Tensor, a: Tensor | None, b: Tensor, c: Tensor, mean: Tensor | None, owned: bool) -> Tensor:
    """a * g + b * (z - mean) + c per channel (a = 1, mean = 0 where None); `owned`: g may be written into."""
    first = _wide(g) if a is None else _wide(g) * _per_channel(a)
    raw = _wide(z) if mean is None else _wide(z) - _per_channel(mean)
    return torch.addcmul(first, raw, _per_channel(b)).add_(_per_channel(c)).to(g.dtype)


def max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool) -> Tensor:
    """As torch.nn.functional.max_pool2d."""
    return aten.max_pool2d_with_indices(x, kernel, stride, padding, [1, 1], ceil)[0]


def max_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool
) -> Tensor:
    """Gradient of x; the maxima are found again."""
    _, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, [1, 1], ceil)
    return aten.max_pool2d_with_indices_backward(grad, x, kernel, stride, padding, [1, 1], ceil, indices)


def avg_pool2d(x: Tensor, window: Averages, affine: Affine | None = None, activation: str = "relu") -> Tensor:
    """As torch.nn.functional.avg_pool2d of x, or of act(x * scale + shift)."""
    return aten.avg_pool2d(x if affine is None else gather([x], affine, activation), *window)


def avg_mask_sums(
    grad: Tensor,
    window: Averages,
    z: Tensor,
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mask_sums` of what the gradient of averages sends to their pixels."""
    g = aten.avg_pool2d_backward(grad, z, *window, None)
    return mask_sums(g, None, z, affine, mean, rstd, activation, owned=True)


def _wide(x: Tensor) -> Tensor:
    """At least float32: half formats carry pixels, never sums."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _normal(z: Tensor, affine: Affine) -> Tensor:
    scale, shift = affine
    return torch.addcmul(_per_channel(shift), _wide(z), _per_channel(scale))


def _sums(g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(g)
    normal = (_wide(z) - _per_channel(mean)) * _per_channel(rstd)
    return wide.sum(_PIXELS), (wide * normal).sum(_PIXELS)
