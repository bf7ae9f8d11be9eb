"""ThresholdNet (arXiv 2108.12604): v1 and v2 with the threshold between blocks, -ab and -bc with it inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import links
from ..blocks import ThresholdBlock
from ..checks import integer, number
from ._frame import build_frame, per_stage
from ._network import Network
from ._registry import register

STEM = (32, 64)
POOL_AFTER = (True, True, False, True, False)
V1_LAYERS = (6, 8, 12, 16, 4)
V1_TRANSITIONS = (128, 192, 288, 480, 960)


@register
def thresholdnet_v1(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, **factory: Any) -> Network:
    """ThresholdNet v1, released as ThreshNet79: 15,323,248 parameters with 1000 classes (Table VIII)."""
    return _second_method(V1_LAYERS, V1_TRANSITIONS, num_classes, in_chans, drop_rate, **factory)


@register
def thresholdnet_v2(num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0, **factory: Any) -> Network:
    """ThresholdNet v2, released as ThreshNet95: 17,140,592 parameters with 1000 classes (Table VIII)."""
    return _second_method((6, 12, 16, 16, 4), (128, 256, 384, 480, 960), num_classes, in_chans, drop_rate, **factory)


@register
def thresholdnet_ab(
    num_classes: int = 1000,
    in_chans: int = 3,
    threshold: int = 8,
    above: str = "even_log",
    width_rule: str = "harmonic",
    growth_rates: Sequence[int] = (14, 16, 20, 40, 160),
    compression: float = 1.7,
    layers: Sequence[int] = V1_LAYERS,
    transitions: Sequence[int] = V1_TRANSITIONS,
    width_mult: float = 1.0,
    drop_rate: float = 0.0,
    **factory: Any,
) -> Network:
    """ThresholdNet-ab: dense links up to the threshold, harmonic ones above it, inside every block (equation 2).

    The authors never trained it as a network; this one has v1's frame. `width_mult` scales stem, growth rates and
    transitions.
    """
    return _first_method(
        links.threshold_ab, num_classes, in_chans, threshold, above, width_rule, growth_rates, compression, layers,
        transitions, width_mult, drop_rate, **factory,
    )  # fmt: skip


@register
def thresholdnet_bc(
    num_classes: int = 1000,
    in_chans: int = 3,
    threshold: int = 8,
    above: str = "even_log",
    width_rule: str = "harmonic",
    growth_rates: Sequence[int] = (14, 16, 20, 40, 160),
    compression: float = 1.7,
    layers: Sequence[int] = V1_LAYERS,
    transitions: Sequence[int] = V1_TRANSITIONS,
    width_mult: float = 1.0,
    drop_rate: float = 0.0,
    **factory: Any,
) -> Network:
    """ThresholdNet-bc: sparse-dense links up to the threshold, harmonic ones above it (equation 3); see -ab."""
    return _first_method(
        links.threshold_bc, num_classes, in_chans, threshold, above, width_rule, growth_rates, compression, layers,
        transitions, width_mult, drop_rate, **factory,
    )  # fmt: skip


def _second_method(
    layers: Sequence[int],
    transitions: Sequence[int],
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    **factory: Any,
) -> Network:
    """Blocks 1 to 3 dense bottleneck units, k = 32; blocks 4 and 5 harmonic, k = 40 and 160, m = 1.7."""

    def dense(depth: int) -> Callable[[int], ThresholdBlock]:
        return lambda width: ThresholdBlock(width, links.dense(depth), 32, unit="bottleneck", **factory)

    def harmonic(depth: int, k: int) -> Callable[[int], ThresholdBlock]:
        return lambda width: ThresholdBlock(width, links.harmonic(depth), k, 1.7, **factory)

    blocks = [*map(dense, layers[:3]), harmonic(layers[3], 40), harmonic(layers[4], 160)]
    return build_frame(
        blocks, transitions, POOL_AFTER, stem=STEM, num_classes=num_classes, in_chans=in_chans,
        drop_rate=drop_rate, **factory,
    )  # fmt: skip


def _first_method(
    pattern: Callable[[int, int, str], links.Links],
    num_classes: int,
    in_chans: int,
    threshold: int,
    above: str,
    width_rule: str,
    growth_rates: Sequence[int],
    compression: float,
    layers: Sequence[int],
    transitions: Sequence[int],
    width_mult: float,
    drop_rate: float,
    **factory: Any,
) -> Network:
    scale = number("width_mult", width_mult, 0.05, 16)
    threshold = integer("threshold", threshold, 0)
    depths = per_stage("layers", layers, 1)
    stages = len(depths)
    if stages > len(POOL_AFTER):
        raise ValueError(f"layers must hold at most {len(POOL_AFTER)} entries, one a stage, got {stages}")
    growths = [_scaled(k, scale, 2) for k in per_stage("growth_rates", growth_rates, 1, stages)]
    widths = [_scaled(width, scale, 8) for width in per_stage("transitions", transitions, 1, stages)]

    def block(depth: int, k: int) -> Callable[[int], ThresholdBlock]:
        rows = pattern(depth, threshold, above)
        return lambda width: ThresholdBlock(width, rows, k, compression, width_rule=width_rule, **factory)

    return build_frame(
        [block(depth, k) for depth, k in zip(depths, growths, strict=True)],
        widths,
        POOL_AFTER,
        stem=(_scaled(STEM[0], scale, 8), _scaled(STEM[1], scale, 8)),
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        **factory,
    )


def _scaled(width: int, scale: float, multiple: int) -> int:
    """`width` itself at scale 1; else rounded to a multiple, at least one."""
    return width if scale == 1 else max(multiple, round(width * scale / multiple) * multiple)
