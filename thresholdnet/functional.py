"""Functions over lists of tensors: convolution of a concatenation that is never handed to autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, transforms
from .backends import choose
from .checks import integer
from .plan import row_of


def linked_conv2d(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    backend: str = "auto",
    dilation: int = 1,
) -> Tensor:
    """conv2d(torch.cat(sources, 1), weight, bias, padding=dilation * (k // 2), dilation=dilation).

    The concatenation is not kept for backward. Differentiable once in sources, weight and bias; under autocast the
    operands are cast as conv2d's are.

    Args:
        sources: [N, C_i, H, W] each, one dtype and device.
        weight: [O, sum of C_i, k, k] with k = 1 or 3.
        bias: [O] or None.
        backend: "auto" or a name of `tn.backends()`.
        dilation: pixels between two taps of a 3x3 kernel.

    Returns:
        [N, O, H, W], channels_last; in plain torch ("reference") in the sources' own memory format.

    Raises:
        TypeError, ValueError: operands that do not fit together, each named.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    if isinstance(sources, Tensor) or not isinstance(sources, Iterable):
        raise TypeError(f"sources must be a list of tensors, got {type(sources).__name__}")
    tensors = list(sources)
    _check(tensors, weight, bias)
    dilation = integer("dilation", dilation, 1)
    dtype = ops.autocast_dtype(weight.device)
    if dtype is not None:
        tensors, weight = [t.to(dtype) for t in tensors], weight.to(dtype)
    name = choose(backend, tensors[0], row_of([*(t.shape[1] for t in tensors), weight.shape[0]]))
    if name == "reference" or transforms.counted():
        z = F.conv2d(torch.cat(tensors, 1), weight, padding=dilation * (weight.shape[2] // 2), dilation=dilation)
    else:
        z = transforms.call(ops.linked_conv2d, tensors, weight, name, dilation)
    return z if bias is None else z + bias.to(z.dtype).view(1, -1, 1, 1)


def _check(sources: list[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    if not sources:
        raise ValueError("sources must hold at least one tensor, got none")
    for name, tensor in [(f"source {i}", source) for i, source in enumerate(sources)] + [("weight", weight)]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tensor.dim()} with shape {tuple(tensor.shape)}")
    first = sources[0]
    if not first.is_floating_point():
        raise TypeError(f"sources must have a floating-point dtype, got {first.dtype}")
    autocast = ops.autocast_dtype(weight.device) is not None
    for i, source in enumerate(sources):
        if (source.shape[0], *source.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ValueError(
                f"all sources must share batch and spatial size: source {i} has shape {tuple(source.shape)}, "
                f"source 0 has {tuple(first.shape)}"
            )
        if source.device != weight.device:
            raise ValueError(f"source {i} must lie on the weight's device {weight.device}, got {source.device}")
        if source.dtype != weight.dtype and not autocast:
            raise TypeError(f"source {i} must have the weight's dtype {weight.dtype}, got {source.dtype}")
    channels = sum(source.shape[1] for source in sources)
    if weight.shape[1] != channels or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight must have shape [O, {channels}, k, k] with k = 1 or 3, got {tuple(weight.shape)}")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor, got {type(bias).__name__}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must lie on the weight's device {weight.device}, got {bias.device}")
