"""What the engine takes of a layer's modules: their forms, and that they compute what torch's classes do.

A module may be of a subclass, have a forward of its own, or hooks that wait for it to run. The engine reads weights and
calls no module, so it must ask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .activations import name_of
from .pixels import CONVOLUTIONS

CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "_conv_forward")
RATES = ("p", "drop_rate", "droprate", "dropRate", "dropout", "dropout_rate", "dropout_prob")
"""Attributes that say how much a layer drops: nn.Dropout's, and other people's."""

_DROPS = frozenset(RATES)
_FORMS = (*CONVOLUTION, *RATES, "negative_slope")


class Unlike(Exception):
    """Why a block that looks like a known one cannot run in the engine."""


def convolution(
    name: str,
    conv: Any,
    kernel: int,
    channels: int,
    dilation: int = 1,
    bias: bool = False,
    dims: Sequence[int] = (1, 2, 3),
) -> int:
    """The channels that a convolution of the expected form writes; raises `Unlike` for any other.

    bias: whether it may have one; dims: spatial dimensions that it may have.
    """
    if not isinstance(conv, CONVOLUTIONS) or spatial_dims(conv) not in dims:
        raise Unlike(f"{name} must be a {' or a '.join(f'Conv{n}d' for n in dims)}, got {type(conv).__name__}")
    if not torchs_convolution(conv):
        raise Unlike(f"{name} must convolve as torch's class does, got {type(conv).__name__} with a forward of its own")
    padding = dilation * (kernel // 2)
    sides = [(side,) * spatial_dims(conv) for side in (kernel, 1, padding, dilation)]
    own = sides[2] if conv.padding == "same" else conv.padding
    form = [conv.kernel_size, conv.stride, own, conv.dilation, conv.groups, conv.padding_mode]
    if form != [*sides, 1, "zeros"] or (conv.bias is not None and not bias):
        size, ending = "x".join([str(kernel)] * spatial_dims(conv)), "one group" if bias else "one group, no bias"
        spread = f"dilation {dilation}, " if dilation > 1 else ""
        raise Unlike(f"{name} must be a {size} convolution of stride 1, padding {padding}, {spread}{ending}")
    if conv.in_channels != channels:
        raise Unlike(f"{name} must read {channels} channels, got {conv.in_channels}")
    return conv.out_channels


def channels_read(module: Any) -> int:
    """Of a convolution or a BatchNorm."""
    return int(module.in_channels if isinstance(module, CONVOLUTIONS) else module.num_features)


def dilation_of(conv: Any) -> int:
    """Of a convolution whose sides have one; that of the last side where they differ, or it is none."""
    found = getattr(conv, "dilation", None)
    return found[-1] if isinstance(found, tuple) else 1


def kernel_of(conv: Any) -> int:
    """Taps in a row that the engine may take in the longer convolution of a layer: 3, or a signals' one's own."""
    size: Sequence[int] = getattr(conv, "kernel_size", (3,))
    return size[0] if len(size) == 1 and size[0] > 3 and size[0] % 2 else 3


def spatial_dims(conv: Any) -> int:
    """1 for a convolution of signals, 2 for one of images, 3 of volumes."""
    return len(conv.kernel_size)


def batch_norm(name: str, norm: Any) -> None:
    """Raise `Unlike` for what is no BatchNorm, or normalises in a way of its own."""
    if not isinstance(norm, _BatchNorm):
        raise Unlike(f"{name} must be a BatchNorm, got {type(norm).__name__}")
    inside = getattr(norm, "act", None)
    if not torchs_norm(norm) and (inside is None or not type(norm).forward.__module__.startswith("timm.")):
        raise Unlike(
            f"{name} must normalise as nn.BatchNorm2d does, got {type(norm).__name__} with a forward of its own"
        )
    if not idle(getattr(norm, "drop", None)):
        raise Unlike(f"{name} has a drop layer inside")


def activation_behind(name: str, norm: Any, behind: nn.Module | None) -> str:
    """The activation behind a BatchNorm: a module of its own, or one inside (timm's BatchNormAct2d)."""
    batch_norm(name, norm)
    inside = getattr(norm, "act", None)
    act = behind if inside is None or idle(inside) else inside
    if act is inside and not idle(behind):
        raise Unlike(f"{name} must be followed by one activation, got {type(act).__name__} and {type(behind).__name__}")
    return activation(name, act)


def activation(name: str, act: nn.Module | None) -> str:
    """The engine's name of what stands behind a module; raises `Unlike` where it has none."""
    found = name_of(act)
    if found is None:
        raise Unlike(f"{name} must be followed by ReLU, ReLU6 or LeakyReLU, got {type(act).__name__}")
    return found


def idle(module: nn.Module | None) -> bool:
    """Whether a module leaves its input as it is."""
    return module is None or type(module) is nn.Identity


def torchs_convolution(module: Any) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module convolves as torch's class does, to which its own may only add: parametrizations do."""
    kind: Any = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    return (
        kind is not None
        and type(module).forward is kind.forward
        and type(module)._conv_forward is kind._conv_forward
        and "forward" not in module.__dict__
        and "_conv_forward" not in module.__dict__
    )


def torchs_norm(module: nn.Module) -> bool:
    """Whether a module normalises as torch's BatchNorms of 1 to 3 dimensions or nn.SyncBatchNorm do."""
    return (
        type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and "forward" not in module.__dict__
    )


def hooked(module: nn.Module) -> bool:
    """Whether somebody's hooks wait for this very module to run."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def states_inside(module: nn.Module) -> tuple[list[Any], list[Any]] | None:
    """What decides what the modules inside a module compute; None where one of them has hooks.

    While the first list is equal nobody has changed a module's form; while the second is, modules hold the same
    tensors, and BatchNorms have the same mode and eps. Asked at every call, so it looks where modules keep things.
    """
    forms: list[Any] = [module.training]  # layers that drop something compare theirs with it
    tensors: list[Any] = []
    inside = [*module._modules.values()]
    for each in inside:  # which grows
        if each is None:
            continue
        if hooked(each):
            return None
        own = each.__dict__
        inside += own["_modules"].values()
        forms += id(each), type(each), own.get("forward")
        parameters, buffers = own["_parameters"], own["_buffers"]
        if "kernel_size" in own:
            forms += parameters.get("bias") is None, *map(own.get, CONVOLUTION)
        elif not _DROPS.isdisjoint(own):
            forms += own.get("training"), *map(own.get, RATES)
        elif "negative_slope" in own:
            forms.append(own["negative_slope"])
        if parameters:
            tensors += map(id, parameters.values())
        if buffers:
            tensors += own.get("training"), own.get("eps"), *map(id, buffers.values())
    return forms, tensors


def forms_inside(module: nn.Module) -> tuple[Any, ...]:
    """Which modules of which forms stand where in a module: the same where others of these forms take their place."""
    forms: list[Any] = []
    for path, each in module.named_modules(remove_duplicate=False):
        own = each.__dict__
        forms.append((path, type(each), own.get("forward"), *map(own.get, _FORMS)))
    return tuple(forms)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers lie on the meta device; the weights themselves are never copied."""
    memo: dict[int, Any] = {}  # deepcopy takes what it finds here in place of copying
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
