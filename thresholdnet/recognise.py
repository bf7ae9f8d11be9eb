"""Other people's blocks, recognised by structure and not by import: what links they have and where their modules lie.

A rule looks at a module's children and attributes alone. It answers None where the module is nothing of its kind,
raises `Unlike` with the reason where it is but computes something that the engine has no form for, and else returns
what it found. Known: DenseNet-BC blocks as torchvision and timm lay them out; HarDNet's blocks as in
Pytorch-HarDNet, FC-HarDNet, HarDNet-MSEG and ThreshNet, and ThreshNet's dense layers, which stand alone; VoVNet's
one-shot aggregation as in timm and vovnet-detectron2.

Of what no rule knows a copy is run once, and it is recognised by what that did (`dataflow.py`): blocks of linked layers
in all other layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import links
from .activations import CLASSES
from .dataflow import Flow, Function, flow_of
from .layers import (
    Unlike,
    activation_behind,
    batch_norm,
    channels_read,
    convolution,
    dilation_of,
    forms_inside,
    hooked,
    idle,
    kernel_of,
    spatial_dims,
)
from .linked import LinkedBlock
from .links import Links
from .pixels import CONVOLUTIONS, KINDS
from .plan import BlockPlan, dilations_of

_DENSE = ("norm1", "conv1", "norm2", "conv2")


@dataclass(frozen=True)
class Found:
    """A recognised block.

    Attributes:
        kind: what it is, for people.
        plan: its structure.
        units: paths of the convolutions and BatchNorms of every layer below the block, in forward order.
        activation: as in `activations`.
        drop_rate: of every layer's output in training; drop_channels: whole channels of an image at once.
        before: paths of the modules, and functions, that run in front of it, in order.
        tail: path of a 1x1 convolution over the block's output, "" for none.
        behind: the same of those that run after it.
        residual: where the block's input is added at the end, the factor of what it is added to; 0 where it is not.
        forms: see `layers.forms_inside`, of a block that was recognised by what it did; empty for others.
    """

    kind: str
    plan: BlockPlan
    units: tuple[tuple[str, ...], ...]
    activation: str
    drop_rate: float = 0.0
    drop_channels: bool = False
    before: tuple[str | Function, ...] = ()
    tail: str = ""
    behind: tuple[str | Function, ...] = ()
    residual: float = 0.0
    forms: tuple[Any, ...] = ()


def recognise(block: nn.Module, accept: Callable[[Found], Any] = lambda found: found) -> Any:
    """What `accept` makes of what the block is, by default that itself; None where it is nothing known.

    A rule may have looked at names that mean something else here: what it, or `accept` behind it, refuses is run.

    Raises:
        Unlike: it is, but the engine has no form for it, or `accept` refuses it; the message is the first reason.
    """
    reason = None
    for way in (by_rules, by_running):
        try:
            if found := way(block):
                return accept(found)
        except Unlike as unlike:
            reason = reason or unlike
    if reason is not None:
        raise reason
    return None


def by_rules(block: nn.Module) -> Found | None:
    """The same by the rules alone, which run nothing."""
    if isinstance(block, torch.jit.ScriptModule):  # its modules are run by its own code
        return None
    if type(block).forward is nn.Module.forward:  # nn.ModuleList's and nn.ModuleDict's: they run nothing
        return None
    for rule in RULES:
        if found := rule(block):
            if patched := [name for name, module in block.named_modules() if "forward" in vars(module)]:
                raise Unlike(f"{patched[0] or 'it'} has had its forward replaced")
            return found
    return None


def dense_block(block: nn.Module) -> Found | None:
    """DenseNet-BC's block: children norm1, conv1, norm2, conv2 in every layer, in torchvision's or timm's manner."""
    layers: list[tuple[str, Any]] = list(block.named_children())
    if not layers or not all(all(hasattr(layer, part) for part in _DENSE) for _, layer in layers):
        return None
    return _dense("DenseNet block", [(f"{name}.", layer) for name, layer in layers])


def dense_layer(layer: nn.Module) -> Found | None:
    """ThreshNet's dense layer: norm1 to conv2 in a row, in a module that puts its input in front of what it made."""
    parts = [name for name, child in layer.named_children() if not isinstance(child, nn.ReLU | nn.ReLU6)]
    runs_alone = isinstance(layer, nn.Sequential) and type(layer).forward is not nn.Sequential.forward
    return _dense("dense layer", [("", layer)]) if runs_alone and parts == list(_DENSE) else None


def _dense(kind: str, layers: Sequence[tuple[str, Any]]) -> Found:
    """A block of these layers, each with the prefix of its modules' paths; a layer alone is its own block."""
    units: list[tuple[str, ...]] = []
    widths: list[int] = []
    inner: list[int] = []
    activations, drops = set(), set()
    read = getattr(layers[0][1].conv1, "in_channels", 0)  # what is no convolution is refused below
    for prefix, layer in layers:
        known = {*_DENSE, "relu1", "relu2"}
        if extra := [child for child, module in layer.named_children() if child not in known and not idle(module)]:
            raise Unlike(f"{prefix.rstrip('.')} has a module {extra[0]!r} of its own")
        inner.append(convolution(f"{prefix}conv1", layer.conv1, 1, read + sum(widths), bias=True))
        widths.append(_longer(f"{prefix}conv2", layer.conv2, inner[-1]))
        for i, norm in enumerate((layer.norm1, layer.norm2), start=1):
            activations.add(activation_behind(f"{prefix}norm{i}", norm, getattr(layer, f"relu{i}", None)))
        drops.add(float(getattr(layer, "drop_rate", 0.0)))
        units.append(tuple(f"{prefix}{part}" for part in _DENSE))
    plan = BlockPlan(
        links.dense(len(layers)), (read, *widths), tuple(range(len(layers) + 1)), "bottleneck", tuple(inner),
        **_form_of([[layer.conv1, layer.conv2] for _, layer in layers]),
    )  # fmt: skip
    return Found(kind, plan, tuple(units), _the("activation", activations), _the("drop_rate", drops))


def harmonic_block(block: nn.Module) -> Found | None:
    """HarDNet's block: `layers` of Conv-BN-act, and `links`, the sources of each; `keepBase` returns the input too."""
    sources, layers = getattr(block, "links", None), getattr(block, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(sources, Sequence) or len(sources) != len(layers):
        return None
    if not layers or [name for name, _ in block.named_children()] != ["layers"]:
        return None
    try:
        pattern = Links([list(row) for row in sources])
    except (TypeError, ValueError):  # something else of this name
        return None
    last = len(layers)
    kept = [0] if getattr(block, "keepBase", False) else []
    outputs = (*kept, *(i for i in range(1, last + 1) if i % 2 or i == last))
    return Found("HarDNet block", *_layers(block, "layers", pattern, outputs))


def one_shot_aggregation(block: nn.Module) -> Found | None:
    """VoVNet's block: a chain of layers, and a 1x1 convolution over its input and all of them."""
    names = next((pair for pair in (("conv_mid", "conv_concat"), ("layers", "concat")) if _has(block, *pair)), None)
    layers: Any = getattr(block, names[0]) if names else None
    if names is None or not isinstance(layers, nn.ModuleList | nn.Sequential) or not len(layers):
        return None
    pattern = Links([[i] for i in range(len(layers))])
    plan, units, activation = _layers(block, names[0], pattern, tuple(range(len(layers) + 1)))
    joint: list[tuple[str, Any]] = list(block.get_submodule(names[1]).named_children())
    (tail, conv), *rest = joint or [("", None)]
    convolution(f"{names[1]}.{tail}", conv, 1, plan.out_channels)
    others = [name for name, module in block.named_children() if name not in names and not idle(module)]
    if unknown := [name for name in others if name not in ("attn", "ese", "drop_path")]:
        raise Unlike(f"it has a module {unknown[0]!r} of its own")
    behind = (*(f"{names[1]}.{name}" for name, _ in rest), *others)
    residual = float(bool(getattr(block, "residual", False) or getattr(block, "identity", False)))
    return Found(
        "one-shot aggregation", plan, units, activation,
        tail=f"{names[1]}.{tail}", behind=behind, residual=residual,
    )  # fmt: skip


def by_running(block: nn.Module) -> Found | None:
    """A block of linked layers in any layout, by what a copy of it does with a few pixels in eval mode.

    It must hold modules of `_PARTS` alone, which nobody waits for with hooks, and want nothing but the pixels. No
    module inside may hold all of its layers: that would be the block.
    """
    inside = [*block.modules()]
    parts = [module for module in inside if not module._modules]
    if isinstance(block, torch.jit.ScriptModule) or not all(isinstance(part, _PARTS) for part in parts):
        return None
    convolutions = [part for part in parts if isinstance(part, CONVOLUTIONS)]
    if not convolutions or not _wants_pixels_alone(block):
        return None
    if any(hooked(module) or isinstance(module, LinkedBlock) for module in inside[1:]):
        return None
    read = channels_read(next(part for part in parts if isinstance(part, (*CONVOLUTIONS, _BatchNorm))))
    shape = few_pixels(read, spatial_dims(convolutions[0]))
    flow = flow_of(block, torch.empty(shape, dtype=convolutions[0].weight.dtype, device="meta"))
    if flow is None or not flow.layers or _alone_inside(block, flow):
        return None
    return _linked(block, flow)


def _wants_pixels_alone(block: nn.Module) -> bool:
    """Whether a forward runs when it is given one argument; with others a `ConvertedBlock` calls it."""
    try:
        first, *others = signature(block.forward).parameters.values()
    except (TypeError, ValueError):  # of no function of Python's, or of none at all
        return False
    optional = all(each.default is not Parameter.empty or each.kind in _REST for each in others)
    return optional and first.kind in _PLACED and all(each.name != "tail" for each in others)


_PLACED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.POSITIONAL_ONLY)
_REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _alone_inside(block: nn.Module, flow: Flow) -> bool:
    """Whether a module inside the block is one with the same layers: the less is replaced, the better."""
    first, *others = [path for layer in flow.layers for path in layer.modules]
    for end in [i for i, letter in enumerate(first) if letter == "."]:
        if all(path.startswith(first[: end + 1]) for path in others):
            try:
                found = recognise(block.get_submodule(first[:end]))
            except Unlike:
                continue
            if found is not None and found.plan.num_layers == len(flow.layers):
                return True
    return False


def _linked(block: nn.Module, flow: Flow) -> Found:
    """The block of which this is the flow."""
    if patched := [name for name, module in block.named_modules() if "forward" in vars(module)]:
        raise Unlike(f"{patched[0] or 'it'} has had its forward replaced")
    unit = _the("order of convolution, BatchNorm and activation", {layer.unit for layer in flow.layers})
    drop = _the("dropout", {layer.drop for layer in flow.layers})
    if drop.rate and unit in ("conv_bn_relu", "conv_relu"):
        raise Unlike("its layers drop something behind their activation")
    paths = [path for layer in flow.layers for path in layer.modules]
    if len({*paths}) < len(paths):
        raise Unlike("a module runs in it more than once")
    nodes: list[int] = []
    inner = []
    every = []
    for layer in flow.layers:
        modules = {path: block.get_submodule(path) for path in layer.modules}
        nodes = nodes or [channels_read(modules[layer.modules[0]])]  # the first layer to run reads the input alone
        channels = sum(nodes[node] for node in layer.sources)
        for path, module in modules.items():
            if isinstance(module, _BatchNorm):
                batch_norm(path, module)
        convolutions = [(path, module) for path, module in modules.items() if isinstance(module, CONVOLUTIONS)]
        if unit == "bn_relu_conv" and {*convolutions[-1][1].kernel_size} == {1}:
            raise Unlike(f"{convolutions[-1][0]} must be followed by BatchNorm, activation and a 3x3 convolution alone")
        for path, conv in convolutions[:-1]:
            channels = convolution(path, conv, 1, channels, bias=True)
            inner.append(channels)
        nodes.append(_longer(*convolutions[-1], channels))
        every.append([conv for _, conv in convolutions])
    try:
        pattern = Links([layer.sources for layer in flow.layers])
    except ValueError as error:
        raise Unlike(str(error)) from error
    if len({*flow.outputs}) < len(flow.outputs):
        raise Unlike("it joins a layer's output twice")
    form, behind = _form_of(every), flow.behind
    plan = BlockPlan(pattern, tuple(nodes), flow.outputs, unit, tuple(inner), **form)
    first = behind[0] if behind and unit == "conv_bn_relu" else None
    tail = first if isinstance(first, str) and _reads_all(plan, block.get_submodule(first)) else ""
    return Found(
        "dense block" if pattern == links.dense(len(pattern)) else "linked block",
        plan,
        tuple(layer.modules for layer in flow.layers),
        _the("activation", {name for layer in flow.layers for name in layer.activations}),
        drop.rate,
        drop.channels and drop.rate > 0,
        flow.before,
        tail,
        behind[1:] if tail else behind,
        flow.residual,
        forms=forms_inside(block),
    )


def _reads_all(plan: BlockPlan, module: nn.Module) -> bool:
    """Whether a module is a convolution that the engine runs as one with the block in front of it."""
    try:
        return convolution("", module, 1, plan.out_channels) > 0
    except Unlike:
        return False


RULES: tuple[Callable[[nn.Module], Found | None], ...] = (
    dense_block, dense_layer, harmonic_block, one_shot_aggregation,
)  # fmt: skip

_PARTS = (
    _BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity,
    *(module for kinds in KINDS.values() for module in kinds), *CLASSES,
)  # fmt: skip
"""Modules without others inside that a block of linked layers may hold."""


def few_pixels(channels: int, dims: int) -> tuple[int, ...]:
    """The shape of a small batch of images, volumes or signals, whose sides differ."""
    return 2, channels, *{1: (11,), 2: (6, 5), 3: (4, 3, 5)}[dims]


def _longer(path: str, conv: Any, channels: int) -> int:
    """The channels that a layer's last convolution writes, the one whose taps and dilation may differ."""
    return convolution(path, conv, kernel_of(conv), channels, dilation_of(conv), bias=True)


def _form_of(layers: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What a plan says of the convolutions of every layer: all fields but their channels."""
    dims = {spatial_dims(conv) for convolutions in layers for conv in convolutions}
    spread = dilations_of(dilation_of(convolutions[-1]) for convolutions in layers)  # the last one is 3x3
    kernels = {kernel_of(convolutions[-1]) for convolutions in layers}
    return {
        "spatial_dims": _the("number of spatial dimensions", dims),
        "dilations": spread,
        "kernel_size": _the("kernel size", kernels),
    }


def _has(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in names)


def _layers(
    block: nn.Module, path: str, pattern: Links, outputs: tuple[int, ...]
) -> tuple[BlockPlan, tuple[tuple[str, ...], ...], str]:
    """Of layers at this path, 3x3 convolution, BatchNorm and activation with these sources: plan, units, activation."""
    layers: Any = block.get_submodule(path)
    units: list[tuple[str, ...]] = []
    nodes: list[int] = []
    convolutions: list[list[Any]] = []
    activations = set()
    for i, (row, layer) in enumerate(zip(pattern, layers, strict=True)):
        unit, conv, act = _conv_norm_act(f"{path}.{i}", layer)
        nodes = nodes or [conv.in_channels]  # layer 1 reads the input alone
        nodes.append(_longer(unit[0], conv, sum(nodes[k] for k in row)))
        convolutions.append([conv])
        activations.add(act)
        units.append(unit)
    plan = BlockPlan(pattern, tuple(nodes), outputs, "conv_bn_relu", **_form_of(convolutions))
    return plan, tuple(units), _the("activation", activations)


def _conv_norm_act(path: str, layer: Any) -> tuple[tuple[str, str], Any, str]:
    """Paths of a layer's convolution and BatchNorm, the convolution, and the activation."""
    parts = [(name, module) for name, module in layer.named_children() if not idle(module)]
    if not 2 <= len(parts) <= 3 or not isinstance(parts[0][1], CONVOLUTIONS):
        raise Unlike(f"{path} must be a convolution, a BatchNorm and an activation")
    (conv_name, conv), (norm_name, norm), *act = parts
    norm_path = f"{path}.{norm_name}"
    return (f"{path}.{conv_name}", norm_path), conv, activation_behind(norm_path, norm, act[0][1] if act else None)


def _the(name: str, values: set[Any]) -> Any:
    """The one value that all layers share."""
    if len(values) != 1:
        raise Unlike(f"all layers must have one {name}, got {', '.join(map(str, sorted(values)))}")
    return values.pop()
