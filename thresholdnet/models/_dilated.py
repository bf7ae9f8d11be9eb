"""Dilation in the place of downsampling: backbones whose maps stay large, with the same weights (arXiv 1606.00915)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..blocks import ThresholdBlock
from ..checks import integer
from ..pixels import CONVOLUTIONS, KINDS
from ._frame import DepthwiseConvBN
from ._network import Network, Stage, min_size

POOLS: Any = tuple(pool for kinds in KINDS.values() for pool in (kinds.max_pool, kinds.avg_pool))


def limit_stride(name: str, network: Network, output_stride: int) -> None:
    """Let no stage reduce its maps beyond `output_stride`: change a network of blocks that are not fused yet.

    A stage that would does not downsample, and its blocks' 3x3 convolutions have taps as far apart as they would have
    been on the map before.

    Raises:
        TypeError, ValueError: `output_stride` is none of the network's reductions.
    """
    stages: list[Any] = [*network.stages]
    reductions = sorted({stage.reduction for stage in stages})
    if integer("output_stride", output_stride) not in reductions:
        raise ValueError(
            f"output_stride must be one of {', '.join(map(str, reductions))} for {name}, got {output_stride}"
        )
    before = 1
    for stage in stages:
        dilation = max(stage.reduction // output_stride, 1)
        if dilation > 1:
            _dilate(stage, dilation, before)
            stage.reduction = output_stride
        before = dilation
    network.min_size = min_size([network.stem, *stages])


def _dilate(stage: Stage, dilation: int, before: int) -> None:
    """`before`: the dilation of the stage in front, which a downsampling convolution reads."""
    for name, module in [*stage.named_children()]:
        if isinstance(module, POOLS):
            setattr(stage, name, nn.Identity())
        elif isinstance(module, DepthwiseConvBN):
            module.dwconv.stride = (1,) * len(module.dwconv.stride)
            _widen(module, before)
        elif isinstance(module, ThresholdBlock):
            _widen(module, dilation)
            module.plan = replace(module.plan, dilations=(dilation,) * module.plan.num_layers)


def _widen(module: nn.Module, dilation: int) -> None:
    """Let the taps of every 3x3 convolution inside lie so many pixels apart."""
    for conv in module.modules():
        if isinstance(conv, CONVOLUTIONS) and max(conv.kernel_size) > 1:
            conv.dilation = conv.padding = (dilation,) * len(conv.kernel_size)
