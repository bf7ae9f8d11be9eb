"""HarDNet (arXiv 1909.00948): harmonic links all the way; the released variants, ReLU6 throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .. import links
from ..blocks import ConvBNAct, ThresholdBlock
from ._frame import DepthwiseConvBN, build_frame
from ._network import Network
from ._registry import register


class DepthwiseHarmonicBlock(ThresholdBlock):
    """A harmonic block of light layers: Conv1x1-BN-act, then a depth-wise Conv3x3-BN (the "ds" networks)."""

    can_fuse = False

    def _layer(self, index: int, norm: dict[str, Any], **factory: Any) -> nn.Module:
        width, factory["spatial_dims"] = self.plan.widths[index], self.plan.spatial_dims
        layer = nn.Sequential()
        layer.add_module(
            "point", ConvBNAct(self.plan.link_widths[index], width, 1, 1, self.activation, norm, **factory)
        )
        layer.add_module("depth", DepthwiseConvBN(width, **factory))
        return layer


@register
def hardnet68(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.1, **factory: Any) -> Network:
    """HarDNet68: 17,565,348 parameters with 1000 classes (Table VIII)."""
    return _hardnet68(num_classes, in_chans, drop_rate, depthwise=False, **factory)


@register
def hardnet68ds(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.05, **factory: Any) -> Network:
    """HarDNet68ds: the depth-wise separable form of HarDNet68."""
    return _hardnet68(num_classes, in_chans, drop_rate, depthwise=True, **factory)


@register
def hardnet39ds(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.05, **factory: Any) -> Network:
    """HarDNet39ds: the smallest released network, depth-wise separable."""
    return _hardnet(
        (24, 48), (16, 20, 64, 160), (4, 16, 8, 4), (96, 320, 640, 1024), (True, True, True, False), 1.6,
        num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, depthwise=True, **factory,
    )  # fmt: skip


@register
def hardnet85(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.2, **factory: Any) -> Network:
    """HarDNet85: 36.67 M parameters; dropout 0.1 between the last block and its transition, as released."""
    return _hardnet(
        (48, 96), (24, 24, 28, 36, 48, 256), (8, 16, 16, 16, 16, 4), (192, 256, 320, 480, 720, 1280),
        (True, False, True, False, True, False), 1.7,
        num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, last_block_drop=0.1, **factory,
    )  # fmt: skip


def _hardnet68(num_classes: int, in_chans: int, drop_rate: float, depthwise: bool, **factory: Any) -> Network:
    return _hardnet(
        (32, 64), (14, 16, 20, 40, 160), (8, 16, 16, 16, 4), (128, 256, 320, 640, 1024),
        (True, False, True, True, False), 1.7,
        num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, depthwise=depthwise, **factory,
    )  # fmt: skip


def _hardnet(
    stem: tuple[int, int],
    growth_rates: Sequence[int],
    layers: Sequence[int],
    transitions: Sequence[int],
    pool_after: Sequence[bool],
    m: float,
    *,
    depthwise: bool = False,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    last_block_drop: float = 0.0,
    **factory: Any,
) -> Network:
    kind = DepthwiseHarmonicBlock if depthwise else ThresholdBlock

    def block(depth: int, k: int) -> Callable[[int], ThresholdBlock]:
        return lambda width: kind(width, links.harmonic(depth), k, m, activation="relu6", **factory)

    return build_frame(
        [block(depth, k) for depth, k in zip(layers, growth_rates, strict=True)], transitions, pool_after,
        stem=stem, num_classes=num_classes, in_chans=in_chans, activation="relu6", depthwise=depthwise,
        drop_rate=drop_rate, last_block_drop=last_block_drop, **factory,
    )  # fmt: skip
