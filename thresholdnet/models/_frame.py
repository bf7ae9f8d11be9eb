"""The frame of HarDNet and ThresholdNet: two-convolution stem, linked blocks, 1x1 transitions, pools between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..blocks import ConvBNAct, ThresholdBlock
from ..checks import integer
from ..pixels import KINDS
from ._network import Network, Stage


class DepthwiseConvBN(nn.Sequential):
    """Depth-wise Conv3x3 - BatchNorm, no activation: HarDNet's light layer and its downsampling."""

    def __init__(self, channels: int, stride: int = 1, spatial_dims: int = 2, **factory: Any):
        super().__init__()
        kinds = KINDS[spatial_dims]
        self.dwconv = kinds.conv(channels, channels, 3, stride, 1, groups=channels, bias=False, **factory)
        self.norm = kinds.norm(channels, **factory)


def build_frame(
    blocks: Sequence[Callable[[int], ThresholdBlock]],
    transitions: Sequence[int],
    pool_after: Sequence[bool],
    *,
    stem: tuple[int, int],
    num_classes: int,
    in_chans: int,
    activation: str = "relu",
    depthwise: bool = False,
    drop_rate: float = 0.0,
    last_block_drop: float = 0.0,
    **factory: Any,
) -> Network:
    """Assemble a network.

    Args:
        blocks: one function a stage, from input channels to the block.
        transitions: output channels of the 1x1 convolution behind each block.
        pool_after: whether a 2x2 downsampling follows each transition (the last entry has no effect in the frame).
        stem: widths of the two stem convolutions; the first has stride 2, a 3x3 stride-2 pool follows.
        depthwise: HarDNet's "ds" form: a 1x1 second stem convolution, depth-wise convolutions in place of max-pools.
        drop_rate: dropout before the head.
        last_block_drop: dropout between the last block and its transition.
        factory: `device` and `dtype` of the parameters, and `spatial_dims`.
    """
    first, second = stem
    stem_stage = Stage(
        {
            "conv1": ConvBNAct(in_chans, first, 3, 2, activation, **factory),
            "conv2": ConvBNAct(first, second, 1 if depthwise else 3, 1, activation, **factory),
        },
        second,
        reduction=2,
    )
    stages: list[Stage] = []
    width, reduction = second, 2
    for index, (make_block, transition) in enumerate(zip(blocks, transitions, strict=True)):
        modules: dict[str, nn.Module] = {}
        if index == 0 or pool_after[index - 1]:
            reduction *= 2
            if depthwise:
                modules["pool"] = DepthwiseConvBN(width, 2, **factory)
            else:
                max_pool = KINDS[factory.get("spatial_dims", 2)].max_pool
                modules["pool"] = max_pool(2, 2) if index else max_pool(3, 2, 1)
        block = make_block(width)
        modules["block"] = block
        if index == len(blocks) - 1 and last_block_drop:
            modules["drop"] = nn.Dropout(last_block_drop)
        modules["transition"] = ConvBNAct(block.out_channels, transition, 1, 1, activation, **factory)
        stages.append(Stage(modules, transition, reduction))
        width = transition
    return Network(stem_stage, stages, num_classes, in_chans, drop_rate, **factory)


def per_stage(name: str, values: Sequence[int], low: int, stages: int | None = None) -> tuple[int, ...]:
    """Check one integer a stage, or raise TypeError / ValueError naming the argument."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of integers, one a stage, got {values!r}")
    if not values or (stages is not None and len(values) != stages):
        raise ValueError(f"{name} must hold {stages or 'at least 1'} entries, one a stage, got {len(values)}")
    return tuple(integer(f"{name} entry", value, low) for value in values)
