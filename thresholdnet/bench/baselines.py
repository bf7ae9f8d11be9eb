"""Plain rivals that need another model than eager's: checkpointed, widths padded to 8, BatchNorm folded into weights.

Each takes a plain network of the zoo with its weights and gives one that computes the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from ..blocks import ThresholdBlock
from ..weights import to_released

PADDED_TO = 8  # channels: what tensor cores and vector loads of half formats are fed with


class Unavailable(Exception):
    """Why a provider cannot run a case here, in one sentence."""


def blocks(model: nn.Module) -> Iterator[ThresholdBlock]:
    """The linked blocks of a model."""
    return (module for module in model.modules() if isinstance(module, ThresholdBlock))


# ---------------------------------------------------------------- checkpoints


_RELEASED = ("densenet121", "densenet161", "densenet169", "densenet201")


def checkpointed(model: nn.Module, name: str, classes: int) -> nn.Module:
    """A network whose backward computes parts of its layers again.

    A DenseNet of torchvision's becomes that with memory_efficient=True, which repeats concatenation, BatchNorm, ReLU
    and 1x1 convolution of each layer. Other networks, and single blocks, do the same in their bottleneck layers, and
    repeat a whole layer of other units; recomputed BatchNorms see the batch twice, as in torchvision's.

    Raises:
        Unavailable: no linked blocks, or torchvision is missing.
    """
    if name in _RELEASED and not isinstance(model, ThresholdBlock):
        return _memory_efficient(model, name, classes)
    if not any(blocks(model)):
        raise Unavailable("the model has no blocks of ours to checkpoint")
    for block in blocks(model):
        block.forward = functools.partial(_forward_in_checkpoints, block)  # type: ignore[method-assign]  # this copy only
    return model


def _memory_efficient(model: nn.Module, name: str, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise Unavailable(f"torchvision's memory_efficient DenseNet needs torchvision: {error}") from error
    like = next(model.parameters())
    with torch.device(like.device):
        theirs: nn.Module = getattr(models, name)(weights=None, num_classes=classes, memory_efficient=True)
    theirs = theirs.to(like.dtype)
    theirs.load_state_dict(to_released(model))
    return theirs


def _forward_in_checkpoints(block: ThresholdBlock, x: Tensor) -> Tensor:
    nodes = [x]
    for sources, layer in zip(block.links, block.layers, strict=True):
        assert isinstance(layer, nn.Sequential)  # both units are
        parts = list(layer)  # a slice of a unit would call the unit's own constructor
        first = 3 if block.plan.unit == "bottleneck" else len(parts)
        repeated, kept = nn.Sequential(*parts[:first]), nn.Sequential(*parts[first:])
        run = functools.partial(_joined, repeated)
        made = checkpoint(run, *(nodes[k] for k in sources), use_reentrant=False, preserve_rng_state=False)
        nodes.append(kept(made))
    return _join([nodes[k] for k in block.plan.outputs])


def _joined(layers: nn.Sequential, *read: Tensor) -> Tensor:
    made: Tensor = layers(_join(list(read)))
    return made


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]


# ---------------------------------------------------------------- padded widths


def padded(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with every width inside its blocks rounded up to 8; what was added is zero and stays zero.

    Returns:
        The network, changed in place, and per changed parameter a mask of what was there before.

    Raises:
        Unavailable: no linked blocks, widths that need no padding, or a block with no 1x1 convolution behind it.
    """
    real: dict[str, Tensor] = {}
    odd = [block for block in blocks(model) if any(width % PADDED_TO for width in block.widths)]
    if not odd:
        raise Unavailable(f"the model's blocks have no width that {PADDED_TO} does not divide")
    for name, stage in [(name, module) for name, module in model.named_modules() if hasattr(module, "block")]:
        old = stage.get_submodule("block")
        assert isinstance(old, ThresholdBlock)
        if old not in odd:
            continue
        if old.plan.unit != "conv_bn_relu" or not hasattr(stage, "transition"):
            raise Unavailable("only Conv-BN-ReLU blocks with a 1x1 transition behind them can be padded")
        stage.block = _padded_block(old, f"{name}.block", real)
        conv = stage.get_submodule("transition.conv")
        assert isinstance(conv, nn.Conv2d)
        kept = _positions(old, old.plan.outputs)
        key = f"{name}.transition.conv.weight"
        conv.weight, real[key] = _spread(conv.weight, None, kept)
        conv.in_channels = len(kept)
    if not real:
        raise Unavailable("a block alone has no 1x1 transition behind it, which would read the padded widths")
    return model, real


def _padded_block(old: ThresholdBlock, name: str, real: dict[str, Tensor]) -> ThresholdBlock:
    like = next(old.parameters())
    new = ThresholdBlock(
        old.in_channels, old.links, [_up(width) for width in old.widths], unit="conv_bn_relu",
        outputs=old.plan.outputs, activation=old.activation, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    for index, (before, after) in enumerate(zip(old.layers, new.layers, strict=True)):
        out = _positions(old, [index + 1])
        read = _positions(old, old.links[index])
        for leaf, places in (("conv.weight", (out, read)), ("norm.weight", (out, None)), ("norm.bias", (out, None))):
            owner, _, parameter = leaf.partition(".")
            grown, mask = _spread(before.get_parameter(leaf), *places)
            setattr(after.get_submodule(owner), parameter, grown)
            real[f"{name}.layers.{index}.{leaf}"] = mask
        for buffer in ("running_mean", "running_var"):
            theirs = before.get_buffer(f"norm.{buffer}")
            after.get_buffer(f"norm.{buffer}")[torch.tensor(out, device=theirs.device)] = theirs
    return new


def _positions(block: ThresholdBlock, nodes: tuple[int, ...] | list[int]) -> list[bool]:
    """Over the padded channels of these nodes side by side: which of them hold true ones."""
    widths = block.plan.node_widths
    return [
        channel < widths[node] for node in nodes for channel in range(_up(widths[node]) if node else widths[0])
    ]  # the block's input keeps its width


def _spread(weight: Tensor, out: list[bool] | None, read: list[bool] | None) -> tuple[nn.Parameter, Tensor]:
    """The weight in a larger one of zeros, and where it lies there."""
    keep = [weight.shape[0] * [True] if out is None else out]
    if weight.dim() > 1:
        keep.append(weight.shape[1] * [True] if read is None else read)
    shape = [len(places) for places in keep] + list(weight.shape[2:])
    mask = torch.ones(shape, dtype=torch.bool)
    for dimension, places in enumerate(keep):
        mask &= torch.tensor(places).view([-1 if d == dimension else 1 for d in range(len(shape))])
    grown = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    grown.masked_scatter_(mask.to(weight.device), weight.detach())
    return nn.Parameter(grown), mask.to(weight.device)


def _up(width: int) -> int:
    return -(-width // PADDED_TO) * PADDED_TO


# ---------------------------------------------------------------- folded BatchNorm


def folded(model: nn.Module) -> nn.Module:
    """The network in eval mode with each BatchNorm that stands directly behind a convolution folded into it, in place.

    A BatchNorm in front of a convolution, as DenseNet's first of a layer, stays. Models without linked blocks are left
    to torch.fx.

    Raises:
        Unavailable: nothing to fold.
    """
    model.eval()
    if not any(blocks(model)):
        from torch.fx.experimental.optimization import fuse

        return fuse(model)
    found = 0
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        names = [name for name, _ in module.named_children()]
        for first, second in itertools.pairwise(names):
            conv, norm = getattr(module, first), getattr(module, second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
                found += 1
    if not found:
        raise Unavailable("no BatchNorm of the model stands directly behind a convolution")
    return model
