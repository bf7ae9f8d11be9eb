"""One block in plain torch: the truth that every engine is tested against. Slow, obvious, differentiable.

Letters: N batch, C channels, H x W pixels; z raw convolution output, y activated value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import number
from .pixels import CONVOLVE
from .plan import BlockPlan


class Statistics(NamedTuple):
    """Per-channel mean and biased variance of one BatchNorm, each of shape [C]."""

    mean: Tensor
    variance: Tensor


_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}


def block_forward(
    plan: BlockPlan,
    x: Tensor,
    parameters: Sequence[Tensor],
    statistics: Sequence[Statistics] | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
) -> tuple[Tensor, list[Statistics]]:
    """Run a block; the caller keeps running statistics.

    Args:
        plan: the block's structure.
        x: [N, C, H, W], C = plan.in_channels; [N, C, D, H, W] for a plan of volumes, [N, C, L] for one of signals.
        parameters: per layer in forward order: convolution weight, BN weight, BN bias for conv_bn_relu; convolution
            weight, its bias for conv_relu; BN weight, BN bias, convolution weight for bn_relu_conv; BN weight, BN bias,
            1x1 weight, BN weight, BN bias, 3x3 weight for bottleneck.
        statistics: fixed statistics to normalise with (inference), one per BatchNorm in forward order; None normalises
            with the batch's own (training).
        eps: added to the variance.
        activation: "relu", "relu6" or "leaky_relu(SLOPE)".

    Returns:
        The output [N, plan.out_channels, ..], as large as x, and the statistics that were used, in forward order.
    """
    act = _ACTIVATIONS.get(activation) or partial(F.leaky_relu, negative_slope=number(activation))
    conv = CONVOLVE[plan.spatial_dims]
    weights, given, used = iter(parameters), iter(statistics or ()), []
    pixels = (0, *range(2, x.dim()))

    def normalise(z: Tensor) -> Tensor:
        gamma, beta = next(weights), next(weights)
        if statistics is None:
            used.append(Statistics(z.mean(pixels), z.var(pixels, unbiased=False)))
        else:
            used.append(next(given))
        scale = gamma * torch.rsqrt(used[-1].variance + eps)
        shift = beta - used[-1].mean * scale
        return z * _per_channel(scale, z) + _per_channel(shift, z)

    nodes = [x]
    for layer, sources in enumerate(plan.links, start=1):
        joined = torch.cat([nodes[k] for k in sources], dim=1)
        dilation = plan.dilation(layer)
        conv3x3 = partial(conv, padding=dilation * (plan.kernel_size // 2), dilation=dilation)
        if plan.unit == "conv_bn_relu":
            nodes.append(act(normalise(conv3x3(joined, next(weights)))))
        elif plan.unit == "conv_relu":
            nodes.append(act(conv3x3(joined, next(weights), next(weights))))
        elif plan.unit == "bn_relu_conv":
            nodes.append(conv3x3(act(normalise(joined)), next(weights)))
        else:
            inner = conv(act(normalise(joined)), next(weights))
            nodes.append(conv3x3(act(normalise(inner)), next(weights)))
    return torch.cat([nodes[k] for k in plan.outputs], dim=1), used


def _per_channel(vector: Tensor, z: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (z.dim() - 2))
