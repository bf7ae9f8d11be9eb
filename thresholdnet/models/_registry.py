"""Models by name."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import places
from ..backends import CHOICES
from ..chain import Chain
from ..checks import boolean, integer, one_of
from ..linked import LinkedBlock
from ._dilated import limit_stride
from ._network import FeaturePyramid, Network

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_BASELINES: set[str] = set()
_COMMON = ("num_classes", "in_chans", "device", "dtype")


def register(builder: Builder, baseline: bool = False) -> Builder:
    """Register a builder under its function name; a second model of that name is an error.

    baseline: it is torchvision's; others make a `Network` and take `spatial_dims`.
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"model name {name!r} must be unique, got a second builder for it")
    _BUILDERS[name] = builder
    if baseline:
        _BASELINES.add(name)
    return builder


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern such as "densenet*", sorted; TypeError for no string."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string, got {pattern!r} ({type(pattern).__name__})")
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments that model `name` takes beyond the common ones, with their defaults."""
    parameters = inspect.signature(_BUILDERS[one_of("model", name, list_models())]).parameters
    return {key: p.default for key, p in parameters.items() if key not in _COMMON and p.kind is not p.VAR_KEYWORD}


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    spatial_dims: int = 2,
    output_stride: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fused: bool = False,
    backend: str = "auto",
    recompute: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 leaves the head out.
        in_chans: channels of the images.
        spatial_dims: 2 for images; 3 for volumes: the same network of Conv3d, BatchNorm3d and pools with a third side;
            1 for signals: of Conv1d, BatchNorm1d and pools with one. Not of the baselines, which are torchvision's.
        output_stride: the largest reduction, one that the network has: stages beyond do not downsample, and their 3x3
            convolutions are dilated instead, for segmentation and detection; the weights are the same. Not of the
            baselines.
        features_only: return a backbone whose output is a list of maps, one per reduction (see `feature_info`).
        out_indices: which of those maps, ascending; None for all.
        device, dtype: of all parameters.
        fused, backend, recompute: run the blocks in the engine (see `ThresholdBlock`); same state dict either way.
            recompute="bottleneck" is for fused networks with bottleneck blocks.
        arguments: what `model_arguments(name)` lists, such as threshold=4 for thresholdnet_ab.

    Returns:
        An nn.Module: images [N, in_chans, H, W], volumes [N, in_chans, D, H, W] or signals [N, in_chans, L] -> logits
        [N, num_classes].

    Raises:
        ValueError: unknown model (the nearest names are given) or an argument out of range.
        TypeError: an argument that the model does not take, or of the wrong type.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    check_arguments(name, arguments)
    integer("num_classes", num_classes, 0)
    integer("in_chans", in_chans, 1)
    where = {"device": places.device(device), "dtype": places.floating_dtype(dtype, optional=True)}
    integer("spatial_dims", spatial_dims, 1, 3)
    for argument, given, plain in (("spatial_dims", spatial_dims, 2), ("output_stride", output_stride, None)):
        if given != plain and name in _BASELINES:
            raise ValueError(f"{argument} must be {plain} for {name}, which is torchvision's, got {given}")
    if spatial_dims != 2:
        arguments = {**arguments, "spatial_dims": spatial_dims}
    boolean("features_only", features_only)
    boolean("fused", fused)
    one_of("backend", backend, CHOICES)
    if out_indices is not None and (isinstance(out_indices, str) or not isinstance(out_indices, Sequence)):
        raise TypeError(f"out_indices must be a sequence of integers or None, got {out_indices!r}")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices needs features_only=True, got out_indices={tuple(out_indices)} without it")
    model = _BUILDERS[name](
        num_classes=0 if features_only else num_classes,
        in_chans=in_chans,
        **where,
        **arguments,
    )
    if output_stride is not None:
        assert isinstance(model, Network)  # all but the baselines are
        limit_stride(name, model, output_stride)
        arguments = {**arguments, "output_stride": output_stride}
    check_recompute(name, model, fused, recompute)
    fuse_blocks(model, fused, backend, recompute)
    config = {"model": name, "num_classes": num_classes, "in_chans": in_chans, "arguments": arguments}
    if features_only:
        model = _as_pyramid(model, out_indices)
        config["features_only"] = True
    model.config = config  # type: ignore[assignment]  # plain data beside the modules, for save_pretrained
    return model


def check_arguments(name: str, arguments: Iterable[str]) -> None:
    """Raise TypeError for one that is not among `model_arguments(name)`; `create_model`'s own are not."""
    own = model_arguments(name)
    for key in arguments:
        if key not in own:
            takes = ", ".join(own) or "no arguments of its own"
            raise TypeError(f"model {name} takes {takes}, got {key!r}")


def fuse_blocks(model: nn.Module, fused: bool = True, backend: str = "auto", recompute: str | None = None) -> int:
    """Switch the engine on or off in every block of a model, and in the transitions of our own networks, in place.

    Returns the number of blocks that now run in it.

    Raises:
        ValueError: unknown backend or recompute.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    blocks = [module for module in model.modules() if isinstance(module, LinkedBlock)]
    running = sum(block.fuse(fused, backend, recompute).fused for block in blocks)
    for module in model.modules():
        if isinstance(module, Network | FeaturePyramid | Chain):
            module.fused = running > 0
    return running


def check_recompute(name: str, model: nn.Module, fused: bool, recompute: str | None) -> None:
    """Raise TypeError or ValueError unless `recompute` is None, or "bottleneck" for such blocks, to be fused."""
    if recompute is None:
        return
    one_of("recompute", recompute, ("bottleneck",))
    if not any(isinstance(m, LinkedBlock) and m.plan.unit == "bottleneck" for m in model.modules()):
        raise ValueError(f"recompute must be None for {name}, which has no bottleneck blocks, got {recompute!r}")
    if not fused:
        raise ValueError(f"recompute needs fused=True, got recompute={recompute!r} without it")


def _as_pyramid(model: nn.Module, out_indices: Sequence[int] | None) -> nn.Module:
    if isinstance(model, Network):
        return FeaturePyramid(model, out_indices)
    from ._torchvision import feature_pyramid

    return feature_pyramid(model, out_indices)
