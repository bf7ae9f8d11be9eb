"""DenseNet (arXiv 1608.06993), and its frame with log-dense (arXiv 1711.00002) or sparse links (1804.05340)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .. import links
from ..blocks import ThresholdBlock
from ..checks import boolean
from ..pixels import CONVOLUTIONS, KINDS, Kinds
from ._network import Network, Stage
from ._registry import register

Pattern = Callable[[int], links.Links]


@register
def densenet121(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, small_stem: bool = False, **factory: Any
) -> Network:
    """DenseNet121: 7,978,856 parameters with 1000 classes; weights interchangeable with torchvision's."""
    return _densenet((6, 12, 24, 16), 32, 64, links.dense, num_classes, in_chans, drop_rate, small_stem, **factory)


@register
def densenet169(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, small_stem: bool = False, **factory: Any
) -> Network:
    """DenseNet169: 14,149,480 parameters with 1000 classes; weights interchangeable with torchvision's."""
    return _densenet((6, 12, 32, 32), 32, 64, links.dense, num_classes, in_chans, drop_rate, small_stem, **factory)


@register
def densenet201(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, small_stem: bool = False, **factory: Any
) -> Network:
    """DenseNet201: 20,013,928 parameters with 1000 classes; weights interchangeable with torchvision's."""
    return _densenet((6, 12, 48, 32), 32, 64, links.dense, num_classes, in_chans, drop_rate, small_stem, **factory)


@register
def densenet161(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, small_stem: bool = False, **factory: Any
) -> Network:
    """DenseNet161: 28,681,000 parameters with 1000 classes; weights interchangeable with torchvision's."""
    return _densenet((6, 12, 36, 24), 48, 96, links.dense, num_classes, in_chans, drop_rate, small_stem, **factory)


@register
def densenet40(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, **factory: Any) -> Network:
    """DenseNet of 40 layers and growth rate 12, without bottlenecks and compression, for images of 32 pixels.

    1,019,722 parameters with 10 classes ("DenseNet", 1.0M, in table 2 of the reference).
    """
    kinds, place = _kinds(**factory)
    stem = Stage({"conv": kinds.conv(in_chans, 16, 3, 1, 1, bias=False, **place)}, 16, reduction=1)

    def block(width: int, depth: int) -> ThresholdBlock:
        return ThresholdBlock(width, links.dense(depth), 12, unit="bn_relu_conv", width_rule="constant", **factory)

    return _assembled(stem, (12, 12, 12), block, 1, False, num_classes, in_chans, drop_rate, **factory)


@register
def log_densenet121(
    num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, small_stem: bool = False, **factory: Any
) -> Network:
    """DenseNet121's frame with log-dense links."""
    return _densenet((6, 12, 24, 16), 32, 64, links.log_dense, num_classes, in_chans, drop_rate, small_stem, **factory)


@register
def sparse_densenet121(
    num_classes: int = 1000,
    in_chans: int = 3,
    n: int = 4,
    drop_rate: float = 0.0,
    small_stem: bool = False,
    **factory: Any,
) -> Network:
    """DenseNet121's frame with sparse-dense links: the nodes up to n and the n nearest (n = 4 is our choice)."""

    def sparse(depth: int) -> links.Links:
        return links.sparse_dense(depth, n)

    return _densenet((6, 12, 24, 16), 32, 64, sparse, num_classes, in_chans, drop_rate, small_stem, **factory)


def _densenet(
    layers: Sequence[int],
    k: int,
    stem_width: int,
    pattern: Pattern,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    small_stem: bool,
    **factory: Any,
) -> Network:
    """`small_stem`: a 3x3 convolution of stride 1 without a pool, for images of 32 pixels, in place of ImageNet's."""
    kernel, stride = (3, 1) if boolean("small_stem", small_stem) else (7, 2)
    kinds, place = _kinds(**factory)
    stem = Stage(
        {
            "conv": kinds.conv(in_chans, stem_width, kernel, stride, kernel // 2, bias=False, **place),
            "norm": kinds.norm(stem_width, **place),
            "act": nn.ReLU(inplace=True),
        },
        stem_width,
        reduction=stride,
    )

    def block(width: int, depth: int) -> ThresholdBlock:
        return ThresholdBlock(width, pattern(depth), k, unit="bottleneck", width_rule="constant", **factory)

    return _assembled(stem, layers, block, 2, not small_stem, num_classes, in_chans, drop_rate, **factory)


def _assembled(
    stem: Stage,
    layers: Sequence[int],
    make_block: Callable[[int, int], ThresholdBlock],
    compression: int,
    pool: bool,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    **factory: Any,
) -> Network:
    """make_block: from channels and layers. compression: what transitions divide channels by. pool: behind the stem."""
    kinds, place = _kinds(**factory)
    stages: list[Stage] = []
    width, reduction = stem.out_channels, stem.reduction * (2 if pool else 1)
    for index, depth in enumerate(layers):
        modules: dict[str, nn.Module]
        if index:
            modules = _transition(width, width // compression, **factory)
            width, reduction = width // compression, reduction * 2
        else:
            modules = {"pool": kinds.max_pool(3, 2, 1)} if pool else {}
        block = make_block(width, depth)
        modules["block"] = block
        width = block.out_channels
        if index == len(layers) - 1:
            modules |= {"last_norm": kinds.norm(width, **place), "last_act": nn.ReLU(inplace=True)}
        stages.append(Stage(modules, width, reduction))
    network = Network(stem, stages, num_classes, in_chans, drop_rate, **factory)
    _initialise(network)
    return network


def _transition(in_channels: int, out_channels: int, **factory: Any) -> dict[str, nn.Module]:
    """BN - ReLU - Conv1x1 - average pool, at the entry of the next stage."""
    kinds, place = _kinds(**factory)
    return {
        "norm": kinds.norm(in_channels, **place),
        "act": nn.ReLU(inplace=True),
        "conv": kinds.conv(in_channels, out_channels, 1, bias=False, **place),
        "pool": kinds.avg_pool(2, 2),
    }


def _kinds(spatial_dims: int = 2, **place: Any) -> tuple[Kinds, dict[str, Any]]:
    """The modules of so many spatial dimensions, and where their parameters lie."""
    return KINDS[spatial_dims], place


def _initialise(network: Network) -> None:
    """torchvision's initialisation of DenseNet."""
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
