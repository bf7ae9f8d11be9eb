"""The frame that all our classifiers share: stem, stages, head; and its pyramid form for detection and segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import chain
from ..checks import integer, number
from ..linked import check_pixels, symbolic, traced
from ..pixels import KINDS, LAYOUTS

POOL: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
STRIDED: Any = tuple(kind for kinds in KINDS.values() for kind in kinds if kind is not kinds.norm)
"""Modules that may take steps of more than a pixel."""


class FeatureInfo(TypedDict):
    """One pyramid level: its place in the output list, its channels, and its reduction (input side / level side)."""

    index: int
    channels: int
    reduction: int


class Stage(nn.Sequential):
    """Named modules run in order, with the channels and the reduction (input side / output side) that they end at."""

    def __init__(self, modules: Mapping[str, nn.Module], out_channels: int, reduction: int):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.out_channels = out_channels
        self.reduction = reduction


class Network(nn.Module):
    """Stem, stages, global average pool, dropout, linear head.

    Args:
        stem, stages: the feature extractor, in order.
        num_classes: outputs of the head; 0 leaves the head out and returns pooled features.
        in_chans: channels of the images.
        drop_rate: dropout before the head, 0 to 1.
        spatial_dims: 2 for images, 3 for volumes [N, in_chans, D, H, W], 1 for signals [N, in_chans, L].
        device, dtype: of the head's parameters (the stages bring theirs).

    Shapes: images [N, in_chans, H, W] with H, W (and D) >= `min_size` -> logits [N, num_classes].

    With `fused` set, stem and transitions run in `thresholdnet.chain`, which keeps less for backward.
    """

    fused = False

    def __init__(
        self,
        stem: Stage,
        stages: Iterable[Stage],
        num_classes: int,
        in_chans: int,
        drop_rate: float = 0.0,
        spatial_dims: int = 2,
        **factory: Any,
    ):
        super().__init__()
        self.spatial_dims = spatial_dims
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.in_chans = in_chans
        self.num_classes = integer("num_classes", num_classes, 0)
        last = self.stages[-1]
        assert isinstance(last, Stage)
        self.num_features = last.out_channels
        self.min_size = min_size([stem, *self.stages])
        self.drop = nn.Dropout(number("drop_rate", drop_rate, 0, 1))
        self.head = _head(self.num_features, self.num_classes, **factory)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> the last stage's map [N, num_features, h, w]."""
        check_input(x, self.in_chans, self.min_size, self.spatial_dims)
        return _run([self.stem, *self.stages], x, self.fused)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [N, num_features, h, w] -> logits [N, num_classes], or pooled features where `pre_logits` is set."""
        x = self.drop(torch.flatten(POOL[self.spatial_dims](x, 1), 1))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for `num_classes` classes, on the same device and in the same dtype."""
        weight = next(self.stages.parameters())
        self.num_classes = integer("num_classes", num_classes, 0)
        self.head = _head(self.num_features, self.num_classes, device=weight.device, dtype=weight.dtype)


class FeaturePyramid(nn.Module):
    """The stages of a network as a backbone: images -> one map per reduction, the last before each downsampling.

    State-dict keys are those of the classifier without its head.

    Args:
        network: the classifier whose stem and stages are taken over.
        out_indices: which levels to return, by index in `feature_info` of all levels; None returns all.
    """

    fused = False

    def __init__(self, network: Network, out_indices: Sequence[int] | None = None):
        super().__init__()
        self.stem = network.stem
        self.stages = network.stages
        self.fused = network.fused
        self.in_chans = network.in_chans
        self.min_size = network.min_size
        self.spatial_dims = network.spatial_dims
        levels = pyramid_levels(network)
        chosen = range(len(levels)) if out_indices is None else out_indices
        picked = [integer("out_indices entry", i, 0, len(levels) - 1) for i in chosen]
        if not picked or picked != sorted(set(picked)):
            raise ValueError(f"out_indices must be ascending level numbers without repeats, got {tuple(chosen)}")
        self._emit = [levels[i][0] for i in picked]  # number of stages run when the level is complete
        self.feature_info: list[FeatureInfo] = [
            {"index": i, "channels": levels[i][1].out_channels, "reduction": levels[i][1].reduction} for i in picked
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [N, in_chans, H, W] -> maps [N, channels, ~H / reduction, ~W / reduction] as `feature_info` lists."""
        check_input(x, self.in_chans, self.min_size, self.spatial_dims)
        return run_levels([self.stem, *self.stages], self._emit, x, self.fused)


def run_levels(stages: Sequence[nn.Module], ends: Iterable[int], x: Tensor, fused: bool) -> list[Tensor]:
    """The maps behind the stages at these positions, ascending; what follows the last of them does not run."""
    maps, start = [], 0
    for last in ends:
        x = _run(stages[start : last + 1], x, fused)
        maps.append(x)
        start = last + 1
    return maps


def _run(stages: Iterable[nn.Module], x: Tensor, fused: bool) -> Tensor:
    if fused:
        return chain.run(stages, x)
    for stage in stages:
        x = stage(x)
    return x


def check_input(x: Tensor, channels: int, min_size: int, spatial_dims: int = 2) -> None:
    """Raise TypeError or ValueError unless `x` is a batch of images, volumes or signals that the network can take."""
    if symbolic(x):
        return
    what, _ = LAYOUTS[spatial_dims]
    check_pixels(what, x, channels, spatial_dims)
    if not traced() and min(x.shape[2:]) < min_size:
        least, given = ("x".join(map(str, sides)) for sides in ([min_size] * spatial_dims, x.shape[2:]))
        unit = {1: "samples", 2: "pixels", 3: "voxels"}[spatial_dims]
        raise ValueError(f"{what} must be at least {least} {unit} for this network, got {given}")


def _head(features: int, num_classes: int, **factory: Any) -> nn.Module:
    return nn.Linear(features, num_classes, **factory) if num_classes else nn.Identity()


def pyramid_levels(network: Network) -> list[tuple[int, Stage]]:
    """(position behind the images, the stem's being 0; stage) of the last stage at every reduction."""
    chained: list[Any] = [network.stem, *network.stages]
    following = [*chained[1:], None]
    return [
        (position, stage)
        for position, (stage, after) in enumerate(zip(chained, following, strict=True))
        if after is None or after.reduction > stage.reduction
    ]


def min_size(stages: Iterable[nn.Module]) -> int:
    """Smallest image side that leaves at least one pixel after every strided convolution and pool."""
    strided = [
        (_first(module.kernel_size), _first(module.stride), _first(module.padding))
        for stage in stages
        for module in stage.modules()
        if isinstance(module, STRIDED) and _first(module.stride) > 1
    ]
    side = 1
    while True:
        left = side
        for kernel, stride, padding in strided:
            left = (left + 2 * padding - kernel) // stride + 1
            if left < 1:
                break
        else:
            return side
        side += 1


def _first(value: Any) -> int:
    return value[0] if isinstance(value, tuple) else int(value)
