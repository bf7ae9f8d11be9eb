"""The blocks as nn.Modules: fused through the engine, or in plain torch (concatenate the links, run the unit)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import activations, places
from . import links as link_patterns
from .checks import number, one_of
from .layers import Unlike, activation, activation_behind, convolution
from .linked import LinkedBlock
from .pixels import CONVOLUTIONS, KINDS
from .plan import plan_block


class ConvBNAct(nn.Sequential):
    """Conv (no bias, padding kernel // 2) - BatchNorm - activation: the `conv_bn_relu` unit, stems and transitions.

    Args:
        in_channels, out_channels: channels of the convolution.
        kernel_size, stride: in pixels.
        activation: "relu", "relu6" or "leaky_relu(SLOPE)".
        norm: `eps` and `momentum` of the BatchNorm, as in nn.BatchNorm2d.
        spatial_dims: 2 for images, 3 for volumes, 1 for signals.
        dilation: of the kernel, which pads as much for each tap beside the middle one.
        factory: `device` and `dtype` of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "relu",
        norm: dict[str, Any] | None = None,
        spatial_dims: int = 2,
        dilation: int = 1,
        **factory: Any,
    ):
        super().__init__()
        kinds = KINDS[spatial_dims]
        padding = dilation * (kernel_size // 2)
        self.conv = kinds.conv(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False, **factory)
        self.norm = kinds.norm(out_channels, **(norm or {}), **factory)
        self.act = activations.module(activation)


class ConvAct(nn.Sequential):
    """Conv3x3 with bias - activation: the `conv_relu` unit, a layer of residual dense networks.

    Args as in `ConvBNAct`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: str = "relu",
        spatial_dims: int = 2,
        dilation: int = 1,
        kernel_size: int = 3,
        **factory: Any,
    ):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = KINDS[spatial_dims].conv(in_channels, out_channels, kernel_size, 1, padding, dilation, **factory)
        self.act = activations.module(activation)


class BNActConv(nn.Sequential):
    """BN - act - Conv3x3 [- dropout], no bias: the `bn_relu_conv` unit, DenseNet's pre-activation layer.

    Args as in `ConvBNAct`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: str = "relu",
        norm: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        spatial_dims: int = 2,
        dilation: int = 1,
        kernel_size: int = 3,
        **factory: Any,
    ):
        super().__init__()
        kinds = KINDS[spatial_dims]
        padding = dilation * (kernel_size // 2)
        self.norm = kinds.norm(in_channels, **(norm or {}), **factory)
        self.act = activations.module(activation)
        self.conv = kinds.conv(in_channels, out_channels, kernel_size, 1, padding, dilation, bias=False, **factory)
        if drop_rate:
            self.drop = nn.Dropout(drop_rate)


class Bottleneck(nn.Sequential):
    """BN - act - Conv1x1 - BN - act - Conv3x3 [- dropout], no biases: DenseNet-BC's pre-activation layer.

    Args as in `ConvBNAct`; `inner_channels` lie between the two convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int,
        out_channels: int,
        activation: str = "relu",
        norm: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        spatial_dims: int = 2,
        dilation: int = 1,
        kernel_size: int = 3,
        **factory: Any,
    ):
        super().__init__()
        kinds = KINDS[spatial_dims]
        padding = dilation * (kernel_size // 2)
        self.norm1 = kinds.norm(in_channels, **(norm or {}), **factory)
        self.act1 = activations.module(activation)
        self.conv1 = kinds.conv(in_channels, inner_channels, 1, bias=False, **factory)
        self.norm2 = kinds.norm(inner_channels, **(norm or {}), **factory)
        self.act2 = activations.module(activation)
        self.conv2 = kinds.conv(inner_channels, out_channels, kernel_size, 1, padding, dilation, bias=False, **factory)
        if drop_rate:
            self.drop = nn.Dropout(drop_rate)


class ThresholdBlock(LinkedBlock):
    """A block of linked layers: dense or sparse-dense up to a threshold, harmonic above it, or any other link pattern.

    Give the links themselves, or `num_layers` with `threshold`, `below` and `above`.

    Args:
        in_channels: channels of the input.
        links: a pattern of `thresholdnet.links`, or any tuple of source tuples (entry i-1: sources of layer i).
        growth_rate: k, or one width a layer.
        compression, unit, width_rule, outputs, bottleneck_factor, dilation, kernel_size: see
            `thresholdnet.plan.plan_block`.
        num_layers, threshold: depth L and the last layer on the dense side, when `links` is not given.
        below: "dense" (ThresholdNet-ab) or "sparse_dense" (-bc) up to the threshold.
        above: "even_log" (Tables I to III of the paper) or "harmonic" (HarDNet) after it.
        activation: "relu", "relu6" or "leaky_relu(SLOPE)", the slope below zero between 0 and 1 (0.01 where no slope is
            given).
        norm_eps, norm_momentum: as in nn.BatchNorm2d; not used by conv_relu.
        drop_rate: dropout of every layer's output while training, as DenseNet's `drop_rate`; of pre-activation
            units alone.
        spatial_dims: 2 for images; 3 for volumes, whose layers are Conv3d and BatchNorm3d; 1 for signals, whose are
            Conv1d and BatchNorm1d. Fused, the latter two run on "native".
        fused: run in the engine: no concatenation is kept for backward. Same parameters, state-dict keys and results;
            gradients of gradients raise. While a module inside has hooks, or has become another, the block runs in
            plain torch.
        backend: "auto" (the best that can run here and takes the input; where none does, plain torch, with one warning
            that says why), or a name of `tn.backends()`, which works or raises.
        recompute: None, or, where fused, "bottleneck": backward makes the bottleneck outputs again instead of keeping
            them.
        device, dtype: of the parameters.

    Shapes: x [N, in_channels, H, W] -> [N, out_channels, H, W], in node order; channels_last when fused, in plain torch
    x's own memory format. With spatial_dims=3 [N, C, D, H, W], and channels_last_3d;
    with 1 [N, C, L], fused with a sample's channels side by side in memory.

    Parameters, per layer in forward order: convolution weight [out, sum of linked widths, 3, 3], BN weight, BN bias
    (conv_relu: convolution weight, its bias; bn_relu_conv: BN, convolution; bottleneck: BN, 1x1 convolution, BN, 3x3
    convolution); input channels lie in link order.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; an input of wrong rank, width or dtype.
        RuntimeError: a backend asked for by name that cannot run here, or does not take the input.
    """

    def __init__(
        self,
        in_channels: int,
        links: Iterable[Iterable[int]] | None = None,
        growth_rate: int | Sequence[int] = 32,
        compression: float = 1.7,
        unit: str = "conv_bn_relu",
        *,
        num_layers: int | None = None,
        threshold: int | None = None,
        below: str = "dense",
        above: str = "even_log",
        width_rule: str = "harmonic",
        outputs: str | Iterable[int] = "auto",
        bottleneck_factor: int = 4,
        dilation: int | Sequence[int] = 1,
        kernel_size: int = 3,
        activation: str = "relu",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        drop_rate: float = 0.0,
        spatial_dims: int = 2,
        fused: bool = False,
        backend: str = "auto",
        recompute: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.plan = plan_block(
            in_channels,
            _choose_links(links, num_layers, threshold, below, above),
            growth_rate,
            compression=compression,
            unit=unit,
            width_rule=width_rule,
            outputs=outputs,
            bottleneck_factor=bottleneck_factor,
            spatial_dims=spatial_dims,
            dilation=dilation,
            kernel_size=kernel_size,
        )
        self.activation = activations.checked("activation", activation)
        factory = {"device": places.device(device), "dtype": places.floating_dtype(dtype, optional=True)}
        momentum = None if norm_momentum is None else number("norm_momentum", norm_momentum, 0, 1)
        norm = {"eps": number("norm_eps", norm_eps, 0), "momentum": momentum}
        self.drop_rate = number("drop_rate", drop_rate, 0, 1)
        if self.drop_rate and not self.plan.pre_activation:
            raise ValueError(f"drop_rate must be 0 for unit {unit!r}, got {drop_rate!r}")
        self.layers = nn.ModuleList(self._layer(index, norm, **factory) for index in range(self.plan.num_layers))
        self.fuse(fused, backend, recompute)
        if recompute is not None and not fused:
            raise ValueError(f"recompute needs fused=True, got recompute={recompute!r} without it")

    def _layer(self, index: int, norm: dict[str, Any], **factory: Any) -> nn.Module:
        plan, activation = self.plan, self.activation
        read, width = plan.link_widths[index], plan.widths[index]
        factory |= {"spatial_dims": plan.spatial_dims, "kernel_size": plan.kernel_size}
        factory["dilation"] = plan.dilation(index + 1)
        if plan.unit == "bottleneck":
            inner = plan.bottleneck_widths[index]
            return Bottleneck(read, inner, width, activation, norm, self.drop_rate, **factory)
        if plan.unit == "bn_relu_conv":
            return BNActConv(read, width, activation, norm, self.drop_rate, **factory)
        if plan.unit == "conv_relu":
            return ConvAct(read, width, activation, **factory)
        return ConvBNAct(read, width, activation=activation, norm=norm, **factory)

    def _units(self) -> list[list[nn.Module]]:
        return [[m for m in layer.modules() if isinstance(m, (*CONVOLUTIONS, _BatchNorm))] for layer in self.layers]

    def _fits(self) -> bool:
        try:
            for index, layer in enumerate(self.layers):
                self._check_layer(index, layer)
        except (Unlike, AttributeError):
            return False
        return True

    def _check_layer(self, index: int, layer: Any) -> None:
        """Raise `Unlike`, or AttributeError, unless a layer is as `_layer` made it."""
        plan = self.plan
        read, width = plan.link_widths[index], plan.widths[index]
        drops = ["drop"] if self.drop_rate else []
        form: dict[str, Any] = {"bias": True, "dims": (plan.spatial_dims,)}
        dilation = plan.dilation(index + 1)
        if plan.unit == "bottleneck":
            names = ["norm1", "act1", "conv1", "norm2", "act2", "conv2", *drops]
            inner = convolution("conv1", layer.conv1, 1, read, **form)
            found = convolution("conv2", layer.conv2, plan.kernel_size, inner, dilation, **form)
            same = inner == plan.bottleneck_widths[index]
            behind = [activation_behind("norm", getattr(layer, f"norm{i}"), getattr(layer, f"act{i}")) for i in (1, 2)]
        else:
            names = ["norm", "act", "conv", *drops] if plan.pre_activation else ["conv", "norm", "act"]
            found, same = convolution("conv", layer.conv, plan.kernel_size, read, dilation, **form), True
            if plan.unit == "conv_relu":
                names, behind = ["conv", "act"], [activation("conv", layer.act)]
            else:
                behind = [activation_behind("norm", layer.norm, layer.act)]
        alike = {*behind} == {self.activation} and found == width and same and [*layer._modules] == names
        drop = (layer.drop.p, layer.drop.training) if "drop" in names else (self.drop_rate, self.training)
        own = type(layer).forward is not nn.Sequential.forward or "forward" in vars(layer)
        if own or not alike or drop != (self.drop_rate, self.training):
            raise Unlike(f"layer {index + 1} has changed")

    def _plain_forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for sources, layer in zip(self.links, self.layers, strict=True):
            nodes.append(layer(_join([nodes[k] for k in sources])))
        return _join([nodes[k] for k in self.plan.outputs])


def _choose_links(
    links: Iterable[Iterable[int]] | None,
    num_layers: int | None,
    threshold: int | None,
    below: str,
    above: str,
) -> Iterable[Iterable[int]]:
    below = one_of("below", below, ("dense", "sparse_dense"))
    above = one_of("above", above, link_patterns.ABOVE)
    if links is not None:
        if num_layers is not None or threshold is not None:
            raise ValueError("links must be given alone, got num_layers or threshold with them")
        return links
    if num_layers is None or threshold is None:
        raise ValueError("links, or both num_layers and threshold, must be given, got neither in full")
    rule = link_patterns.threshold_ab if below == "dense" else link_patterns.threshold_bc
    return rule(num_layers, threshold, above)


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
