"""The blocks as nn.Modules: fused through the engine, or in plain torch (concatenate the links, run the unit)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import links as link_patterns
from . import ops, sync
from .backends import CHOICES, candidates, pick
from .checks import number, one_of
from .links import Links
from .plan import BlockPlan, plan_block

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class ConvBNAct(nn.Sequential):
    """Conv (no bias, padding kernel // 2) - BatchNorm - activation: the `conv_bn_relu` unit, stems and transitions.

    Args:
        in_channels, out_channels: channels of the convolution.
        kernel_size, stride: in pixels.
        activation: "relu" or "relu6".
        norm: `eps` and `momentum` of the BatchNorm, as in nn.BatchNorm2d.
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
        **factory: Any,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **factory)
        self.norm = nn.BatchNorm2d(out_channels, **(norm or {}), **factory)
        self.act = ACTIVATIONS[activation](inplace=True)


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
        **factory: Any,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels, **(norm or {}), **factory)
        self.act1 = ACTIVATIONS[activation](inplace=True)
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 1, bias=False, **factory)
        self.norm2 = nn.BatchNorm2d(inner_channels, **(norm or {}), **factory)
        self.act2 = ACTIVATIONS[activation](inplace=True)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, 3, padding=1, bias=False, **factory)
        if drop_rate:
            self.drop = nn.Dropout(drop_rate)


class ThresholdBlock(nn.Module):
    """A block of linked layers: dense or sparse-dense up to a threshold, harmonic above it, or any other link pattern.

    Give the links themselves, or `num_layers` with `threshold`, `below` and `above`.

    Args:
        in_channels: channels of the input.
        links: a pattern of `thresholdnet.links`, or any tuple of source tuples (entry i-1: sources of layer i).
        growth_rate: k, or one width a layer.
        compression, unit, width_rule, outputs, bottleneck_factor: see `thresholdnet.plan.plan_block`.
        num_layers, threshold: depth L and the last layer on the dense side, when `links` is not given.
        below: "dense" (ThresholdNet-ab) or "sparse_dense" (-bc) up to the threshold.
        above: "even_log" (Tables I to III of the paper) or "harmonic" (HarDNet) after it.
        activation: "relu" or "relu6".
        norm_eps, norm_momentum: as in nn.BatchNorm2d.
        drop_rate: dropout of every layer's output while training, as DenseNet's `drop_rate`; bottleneck units alone.
        fused: run in the engine: no concatenation is kept for backward. Same parameters, state-dict keys and results;
            hooks on the modules inside are not called, and gradients of gradients raise.
        backend: "auto" (the best that can run here and takes the input; where none does, plain torch, with one warning
            that says why), or a name of `tn.backends()`, which works or raises.
        recompute: None, or "bottleneck": backward makes the bottleneck outputs again instead of keeping them.
        device, dtype: of the parameters.

    Shapes: x [N, in_channels, H, W] -> [N, out_channels, H, W], in node order; channels_last when fused, in plain torch
    x's own memory format.

    Parameters, per layer in forward order: convolution weight [out, sum of linked widths, 3, 3], BN weight, BN bias
    (bottleneck: BN, 1x1 convolution, BN, 3x3 convolution); input channels lie in link order.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; an input of wrong rank, width or dtype.
        RuntimeError: a backend asked for by name that cannot run here, or does not take the input.
    """

    can_fuse = True  # a subclass with other units has no fused form

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
        activation: str = "relu",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        drop_rate: float = 0.0,
        fused: bool = False,
        backend: str = "auto",
        recompute: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.plan: BlockPlan = plan_block(
            in_channels,
            _choose_links(links, num_layers, threshold, below, above),
            growth_rate,
            compression=compression,
            unit=unit,
            width_rule=width_rule,
            outputs=outputs,
            bottleneck_factor=bottleneck_factor,
        )
        self.activation = one_of("activation", activation, ACTIVATIONS)
        momentum = None if norm_momentum is None else number("norm_momentum", norm_momentum, 0, 1)
        norm = {"eps": number("norm_eps", norm_eps, 0), "momentum": momentum}
        self.drop_rate = number("drop_rate", drop_rate, 0, 1)
        if self.drop_rate and unit != "bottleneck":
            raise ValueError(f"drop_rate must be 0 for unit {unit!r}, got {drop_rate!r}")
        self.layers = nn.ModuleList(
            self._layer(index, norm, device=device, dtype=dtype) for index in range(self.plan.num_layers)
        )
        self.fuse(fused, backend, recompute)

    def fuse(self, fused: bool = True, backend: str = "auto", recompute: str | None = None) -> ThresholdBlock:
        """Switch the engine on or off; returns the block itself. Arguments and errors as in the class."""
        one_of("backend", backend, CHOICES)
        if recompute is not None:
            one_of("recompute", recompute, ("bottleneck",))
        self.fused, self.recompute = bool(fused) and self.can_fuse, recompute
        self._choice = backend if self.fused else "reference"
        self._candidates = candidates(self._choice)
        self._plan_text = self.plan.to_text()
        self._ran = "reference"
        return self

    def _layer(self, index: int, norm: dict[str, Any], **factory: Any) -> nn.Module:
        plan, activation = self.plan, self.activation
        read, width = plan.link_widths[index], plan.widths[index]
        if plan.unit == "bottleneck":
            inner = plan.bottleneck_widths[index]
            return Bottleneck(read, inner, width, activation, norm, self.drop_rate, **factory)
        return ConvBNAct(read, width, 3, 1, activation, norm, **factory)

    @property
    def links(self) -> Links:
        """Sources of every layer."""
        return self.plan.links

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of layers 1..L."""
        return self.plan.widths

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.plan.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.plan.out_channels

    @property
    def backend(self) -> str:
        """The backend that ran last: "triton", "native" or "reference" (plain torch, or not run yet)."""
        return self._ran

    def forward(self, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W].

        `tail` is the weight [O, out_channels, 1, 1] of a convolution behind a Conv-BN-ReLU block: its result
        [N, O, H, W] is returned in place of the block's output, which nobody keeps then when fused.
        """
        check_images("input of the block", x, self.in_channels)
        if tail is not None and self.plan.unit != "conv_bn_relu":
            raise ValueError(
                f"tail must be None for unit {self.plan.unit!r}, got a weight of shape {tuple(tail.shape)}"
            )
        backend = pick(self._candidates, self._choice, x)
        if self._ran != backend:  # an assignment at each call would be a side effect for the compiler to trace
            self._ran = backend
        if backend != "reference":
            return self._fused_forward(x, backend, tail)
        y = self._plain_forward(x)
        return y if tail is None else nn.functional.conv2d(y, tail)

    def _fused_forward(self, x: Tensor, backend: str, tail: Tensor | None) -> Tensor:
        norms = list(self._norms())
        convolutions = [m for m in self.layers.modules() if isinstance(m, nn.Conv2d)]
        fixed = [not norm.training and norm.running_mean is not None for norm in norms]
        group = _shared_group([norm for norm, given in zip(norms, fixed, strict=True) if not given])
        if x.shape[0] * x.shape[2] * x.shape[3] == 1 and not all(fixed) and group is None:
            raise ValueError(
                f"input of the block must hold more than one value per channel when training, got {tuple(x.shape)}"
            )
        first = convolutions[0].weight
        if first.device != x.device:
            raise ValueError(f"input of the block must lie on the weights' device {first.device}, got {x.device}")
        dtype = ops.autocast_dtype(x.device)
        if dtype is not None:  # as conv2d: operands cast, norm parameters left alone
            x = x.to(dtype)
        elif first.dtype != x.dtype:
            raise TypeError(f"input of the block must have the weights' dtype {first.dtype}, got {x.dtype}")
        weights = {id(conv): conv.weight.to(x.dtype) for conv in convolutions}
        parameters = [tensor for layer in self.layers for tensor in _in_forward_order(layer, weights)]
        if tail is not None:
            parameters.append(tail.to(x.dtype))
        running = [_or_empty(t, x) for norm in norms for t in (norm.running_mean, norm.running_var)]
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
        eps = [norm.eps for norm in norms]
        recompute = self.recompute == "bottleneck"
        counts = None if group is None else sync.counts(x, group)
        y, statistics, _ = ops.block(
            x, parameters, running, self._plan_text, eps, fixed, self.activation, backend, save, recompute,
            self._masks(x), counts, self.drop_rate, "" if group is None else group.group_name,
        )  # fmt: skip
        _update_running(norms, statistics, sync.total(counts, x.shape[0] * x.shape[2] * x.shape[3]))
        return y

    def _masks(self, x: Tensor) -> list[Tensor]:
        """What dropout leaves of every layer's output."""
        if not self.training or not self.drop_rate:
            return []
        masks = []
        for width in self.plan.widths:
            shape = (x.shape[0], width, x.shape[2], x.shape[3])
            mask = torch.empty(shape, dtype=torch.bool, device=x.device, memory_format=torch.channels_last)
            masks.append(mask.bernoulli_(1 - self.drop_rate))
        return masks

    def _norms(self) -> Iterator[_BatchNorm]:
        return (module for module in self.layers.modules() if isinstance(module, _BatchNorm))

    def _plain_forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for sources, layer in zip(self.links, self.layers, strict=True):
            nodes.append(layer(_join([nodes[k] for k in sources])))
        return _join([nodes[k] for k in self.plan.outputs])

    def extra_repr(self) -> str:
        """The structure in one line, for print(model)."""
        plan = self.plan
        return (
            f"{plan.in_channels} -> {plan.out_channels}, {self.links!r}, unit={plan.unit}, "
            f"widths={plan.widths}, outputs={plan.outputs}"
        )


def check_images(name: str, x: Tensor, channels: int) -> None:
    """Raise TypeError or ValueError unless `x` is a floating-point tensor [N, channels, H, W]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [N, C, H, W], got {x.dim()} with shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]} with shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")


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


def _in_forward_order(layer: nn.Module, weights: dict[int, Tensor]) -> Iterator[Tensor]:
    """A unit's parameters as the engine takes them; ones and zeros stand for an affine that is switched off."""
    for module in layer.children():
        if isinstance(module, nn.Conv2d):
            yield weights[id(module)]
        elif isinstance(module, _BatchNorm):
            like = next(iter(weights.values()))
            yield like.new_ones(module.num_features) if module.weight is None else module.weight
            yield like.new_zeros(module.num_features) if module.bias is None else module.bias


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _shared_group(norms: Sequence[_BatchNorm]) -> Any:
    """The process group over which the BatchNorms share the batch's statistics, None where they do not."""
    shared = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm) and norm.training]
    group = sync.active(shared[0].process_group) if shared else None
    if group is not None and (
        len(shared) < len(norms) or any(n.process_group is not shared[0].process_group for n in shared)
    ):
        raise ValueError(
            "a fused block's BatchNorms must all be nn.SyncBatchNorm of one process group, "
            f"or none of them, got {len(shared)} of {len(norms)}"
        )
    return group


@torch.no_grad()
def _update_running(norms: Sequence[_BatchNorm], statistics: Sequence[Tensor], pixels: int | Tensor) -> None:
    """What nn.BatchNorm2d does to its buffers in training, once per call."""
    unbiased = pixels / (pixels - 1).clamp(min=1) if isinstance(pixels, Tensor) else pixels / max(pixels - 1, 1)
    for norm, used in zip(norms, statistics, strict=True):
        if not norm.training or norm.running_mean is None or norm.running_var is None:
            continue
        assert norm.num_batches_tracked is not None  # kept together with the running statistics
        norm.num_batches_tracked.add_(1)
        rate: float | Tensor = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        mean, variance = used  # float32 at least: half buffers are rounded once
        norm.running_mean.copy_((1 - rate) * norm.running_mean.to(mean.dtype) + rate * mean)
        norm.running_var.copy_((1 - rate) * norm.running_var.to(mean.dtype) + rate * (variance * unbiased))


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
