"""The paper's baselines, built by torchvision under their own names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import boolean, integer
from ._network import FeatureInfo
from ._registry import register

baseline = partial(register, baseline=True)

LEVELS = (
    "relu",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
)  # the ResNet family's last node at reductions 2 to 32


@baseline
def resnet18(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """ResNet18, the paper's ResNet on STL-10."""
    return _build("resnet18", num_classes, in_chans, small_stem, **factory)


@baseline
def resnet50(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """ResNet50: 25,557,032 parameters with 1000 classes."""
    return _build("resnet50", num_classes, in_chans, small_stem, **factory)


@baseline
def resnet101(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """ResNet101: 44,549,160 parameters with 1000 classes."""
    return _build("resnet101", num_classes, in_chans, small_stem, **factory)


@baseline
def resnext50_32x4d(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """ResNeXt50 32x4d: 25,028,904 parameters with 1000 classes."""
    return _build("resnext50_32x4d", num_classes, in_chans, small_stem, **factory)


@baseline
def resnext101_32x8d(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """ResNeXt101 32x8d: 88,791,336 parameters with 1000 classes."""
    return _build("resnext101_32x8d", num_classes, in_chans, small_stem, **factory)


@baseline
def wide_resnet50_2(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """WideResNet50-2: 68,883,240 parameters with 1000 classes."""
    return _build("wide_resnet50_2", num_classes, in_chans, small_stem, **factory)


@baseline
def wide_resnet101_2(num_classes: int = 1000, in_chans: int = 3, small_stem: bool = False, **factory: Any) -> nn.Module:
    """WideResNet101-2: 126,886,696 parameters with 1000 classes."""
    return _build("wide_resnet101_2", num_classes, in_chans, small_stem, **factory)


def _build(
    name: str,
    num_classes: int,
    in_chans: int,
    small_stem: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """`small_stem`: a 3x3 convolution of stride 1 without a pool, for images of 32 pixels, in place of ImageNet's."""
    models = _torchvision_models(name)
    kernel, stride = (3, 1) if boolean("small_stem", small_stem) else (7, 2)
    with torch.device(device or torch.get_default_device()):
        model = getattr(models, name)(weights=None, num_classes=max(num_classes, 1))
        if small_stem:
            model.maxpool = nn.Identity()
        if in_chans != 3 or small_stem:
            model.conv1 = nn.Conv2d(in_chans, 64, kernel, stride, kernel // 2, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if num_classes == 0:
            model.fc = nn.Identity()
    return model.to(dtype) if dtype is not None else model


def _torchvision_models(name: str) -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise RuntimeError(
            f"model {name} is torchvision's and needs it installed: pip install torchvision ({error})"
        ) from error
    return models


class _Pyramid(nn.Module):
    """torchvision's feature extractor with the list output and `feature_info` of our own backbones."""

    def __init__(self, extractor: nn.Module, info: list[FeatureInfo]):
        super().__init__()
        self.extractor = extractor
        self.feature_info = info

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.extractor(x).values())


def feature_pyramid(model: nn.Module, out_indices: Sequence[int] | None) -> nn.Module:
    """A ResNet-family model as a backbone: images -> maps at reductions 2, 4, 8, 16, 32 (or `out_indices` of them).

    With the small stem: 1, 2, 4, 8.
    """
    from torchvision.models.feature_extraction import create_feature_extractor

    small = isinstance(model.maxpool, nn.Identity)  # the stem's map then has the reduction of layer1's
    names = LEVELS[small:]
    picked = range(len(names)) if out_indices is None else out_indices
    indices = [integer("out_indices entry", i, 0, len(names) - 1) for i in picked]
    extractor = create_feature_extractor(model, return_nodes={names[i]: str(i) for i in indices})
    width = next(model.parameters()).shape[0]
    layers = [model.get_submodule(name)[-1] for name in LEVELS[1:]]  # type: ignore[index]  # they are Sequential
    ends = [getattr(block, "bn3", None) or block.bn2 for block in layers]
    channels = [width, *(end.num_features for end in ends)][small:]
    first = 1 if small else 2
    return _Pyramid(extractor, [{"index": i, "channels": channels[i], "reduction": first << i} for i in indices])
