"""The fused block over a plan: forward, backward, and what is kept between them. Knows verbs, no device.

Kept for backward: the input, each layer's raw convolution output once, per-channel statistics. Activated values live in
a workspace; backward makes them again. Of layers without BatchNorm the activated values are all that is kept. No
concatenation is kept, and with `recompute` no bottleneck output either. A block of pre-activation layers, or of layers
without BatchNorm, that returns all its nodes keeps its output, which whoever reads it keeps as well: once in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import own_gradients
from ..pixels import as_images, as_volumes, volume_of
from ..plan import BlockPlan
from .bn_relu_conv import BNReLUConv
from .bottleneck import Bottleneck
from .call import NO_EXTRAS, Extras, Spec
from .conv_bn_relu import ConvBNReLU
from .conv_relu import ConvReLU
from .features import Features

__all__ = ["NO_EXTRAS", "Extras", "Spec", "backward", "forward", "parameters_a_layer"]


def forward(
    spec: Spec, x: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], extras: Extras = NO_EXTRAS
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a block.

    Args:
        spec: see `Spec`.
        x: [N, C, H, W], or volumes [N, C, D, H, W].
        parameters: as in `reference.block_forward`. A conv_bn_relu block takes one more at the end: the weight
            [O, out_channels, 1, 1] of a 1x1 convolution of the output, which is then returned in the output's place.
            Pre-activation blocks may take L more: a bias for each layer's feature.
        running: mean and variance of every BatchNorm in forward order; read only where it is fixed.
        extras: see `Extras`.

    Returns:
        The output (channels_last), the statistics used by each BatchNorm as [2, C] (mean, biased variance; empty unless
        spec.reports), and what backward needs beyond inputs, output and statistics (empty unless spec.save).
    """
    y, used, saved = _block(spec, x, parameters, extras).forward(running)
    volume = volume_of(x)
    return y if volume is None else as_volumes(y, volume), used, saved


def backward(
    spec: Spec,
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    extras: Extras = NO_EXTRAS,
) -> list[Tensor]:
    """Gradients of x and of every parameter, in order; an empty tensor where `needs` is False.

    Args:
        grad: gradient of the output.
        statistics, saved: as `forward` returned them; the output itself is the first of `saved` where the call
            `Spec.keeps_output`.
        needs: for x and each parameter.
    """
    block = _block(spec, x, parameters, extras)
    arriving = as_images(grad).contiguous(memory_format=torch.channels_last)
    grads = block.backward(arriving, statistics, [as_images(tensor) for tensor in saved], needs)
    block.verbs.settle()
    volume = volume_of(x)
    if volume is not None and grads[0] is not None:
        grads[0] = as_volumes(grads[0], volume)
    return own_gradients((x, *parameters), grads, needs, grad)


def parameters_a_layer(plan: BlockPlan) -> int:
    """How many parameters each layer has."""
    return _unit(plan).per_layer


def _block(spec: Spec, x: Tensor, parameters: Sequence[Tensor], extras: Extras) -> ConvBNReLU | ConvReLU | Features:
    """One call of a block, its pixels as images."""
    if extras.masks:
        extras = extras._replace(masks=[as_images(mask) for mask in extras.masks])
    return _unit(spec.plan)(spec, as_images(x), parameters, extras, volume_of(x))


def _unit(plan: BlockPlan) -> type[ConvBNReLU] | type[ConvReLU] | type[Features]:
    return _UNITS[plan.unit]


_UNITS: dict[str, type[ConvBNReLU] | type[ConvReLU] | type[Features]] = {
    "conv_bn_relu": ConvBNReLU, "conv_relu": ConvReLU, "bn_relu_conv": BNReLUConv, "bottleneck": Bottleneck,
}  # fmt: skip
