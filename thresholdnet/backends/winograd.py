"""The native backend with Winograd's F(4x4, 3x3) for wide 3x3 layers: float32 on CPUs, in C++.

In conv_bn_relu blocks a tensor is transformed once for all its readers and kept in a workspace until the last of them
has run; a layer is then a matrix product at each of 36 positions over its sources' transforms (csrc/cpu/winograd.h),
and no links are gathered. Likewise one transform of a layer's dz serves the gradients of all its sources. In bottleneck
blocks the 3x3 convolution of a layer reads one tensor that nobody else reads. What is kept for backward is what
`native.py` keeps; workspaces take 2.25 times the bytes of the tensors that they transform, more where 4 does not divide
height or width.

Off unless THRESHOLDNET_WINOGRAD=1 is set or `use(True)` was called, because it is less exact: errors are 1e-6 to 3e-5
of the largest value, where the library's convolution has 1e-7 to 1e-6.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import number
from ..plan import BlockPlan
from . import csrc, native
from .elementwise import Affine
from .native import Moments, Packed, Place, kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "enabled", "kept_like", "needs_input", "output_holds_features", "pays", "use"]

TILES = 24
"""Tiles a block, as in csrc/cpu/winograd.h."""

GRADIENT_PAD = 16
"""Channels of a gradient that is transformed for a weight's gradient are padded to this, as there."""

_state = {"on": os.environ.get("THRESHOLDNET_WINOGRAD", "0") not in ("", "0")}


ALONE = {"bn_relu_conv": 48, "bottleneck": 32}
"""By unit, channels that a 3x3 convolution must read and write at least where no other one shares its transforms.

Measured on AVX-512: dense blocks of six layers forward and backward on 16 images of 32 x 32, against the library's.
bn_relu_conv, growth 12: 0.7 times as fast; 32: 0.87; 48: 1.11. bottleneck, growth 12: 0.96; 24: 0.93; 32: 1.11.
"""


def use(on: bool) -> None:
    """Let fused blocks on the native backend take Winograd convolutions where they pay, or not."""
    _state["on"] = bool(on)


def enabled() -> bool:
    """Whether they do."""
    return _state["on"]


def pays(read: int, written: int, batch: int, height: int, width: int) -> bool:
    """Whether a 3x3 convolution, data gradient or weight gradient is faster this way than in the library.

    The limits are where whole blocks, forward and backward, stopped being faster than the library's on AVX2:
    8 channels, 1.8 times as fast (thinner ones were not measured); 49 tiles, 1.5, but 32 tiles, 0.9 to 1.3, for the
    weights' transforms cost the same however few the pixels; 9/16 of the tiles' pixels inside the image (6 x 6 pixels),
    1.2, but 25/64 (5 x 5), 1.0.

    Args:
        read: channels that are read, of all sources together (of all readers, for a data gradient).
        written: channels that are written.
        batch, height, width: of the images, in pixels.
    """
    tiles = _parts(height, 4) * _parts(width, 4)
    return min(read, written) >= 8 and batch * tiles >= 48 and 2 * height * width >= 16 * tiles


class Verbs(native.Verbs):
    """`native.Verbs`, with Winograd's form for the convolutions of which `pays` holds."""

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        super().__init__(plan, x)
        fits = x.device.type == "cpu" and x.dtype == torch.float32 and csrc.takes(x)
        self.chosen = _choose(plan, *self.images) if plan is not None and fits else _NOTHING
        self.least = ALONE.get(plan.unit) if plan is not None and fits else None
        self.transforms = _Transforms()
        self.layer = 0  # whose gradient was asked for last: the one whose weight's gradient comes next

    def conv(
        self,
        sources: Sequence[Tensor],
        weight: Tensor | Packed,
        *,
        into: Place,
        affine: Affine | None = None,
        bias: Tensor | None = None,
        activation: str = "relu",
        statistics: bool = False,
        moments: Tensor | None = None,
        dilation: int = 1,
    ) -> tuple[Tensor, Moments | None]:
        """See `native.Verbs.conv`."""
        kind, layer = into
        shared = self.chosen.forward.get(layer) if kind in ("node", "raw") else None
        readers = self._readers(shared, weight.shape[1], weight.shape[0], weight.shape[2], dilation)
        if readers is None:
            return super().conv(
                sources, weight, into=into, affine=affine, bias=bias, activation=activation, statistics=statistics,
                moments=moments, dilation=dilation,
            )  # fmt: skip
        if affine is not None:
            sources = [self.passes.gather(sources, affine, activation)]
        z = self._convolve(sources, readers, [weight], bias=bias, activation=None if bias is None else activation)
        return z, self.moments(z) if statistics else None

    def gradient(
        self,
        readers: Sequence[Tensor],
        weights: Sequence[Tensor],
        add: Tensor | None,
        *,
        into: Place,
        masked: tuple[Tensor, Affine, Tensor, Tensor] | None = None,
        activation: str = "relu",
        dilation: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `native.Verbs.gradient`."""
        kind, self.layer = into
        behind_block = bool(weights) and weights[0].shape[2] == 1  # a 1x1 convolution of the output, see the engine
        of_each = self.chosen.gradient.get(self.layer) if kind == "gradient" and not behind_block else None
        if weights:
            of_each = self._readers(of_each, weights[0].shape[0], weights[0].shape[1], weights[0].shape[2], dilation)
        if of_each is None:
            return super().gradient(
                readers, weights, add, into=into, masked=masked, activation=activation, dilation=dilation
            )
        g = self._convolve(readers, of_each, weights, transposed=True, add=add)
        return self._masked(g, None, masked, activation, own=True)

    def weight_gradient(
        self,
        sources: Sequence[Tensor],
        dz: Tensor,
        kernel_size: int,
        *,
        affine: Affine | None = None,
        activation: str = "relu",
        like: Tensor | None = None,
        dilation: int = 1,
    ) -> Tensor:
        """See `native.Verbs.weight_gradient`."""
        shared = self.chosen.weight.get(self.layer) if kernel_size == 3 else None
        read = sum(source.shape[1] for source in sources)
        readers = self._readers(shared, read, dz.shape[1], kernel_size, dilation)
        if readers is None:
            return super().weight_gradient(
                sources, dz, kernel_size, affine=affine, activation=activation, dilation=dilation
            )
        if affine is not None:  # of pre-activation units: nobody else reads it
            sources = [self.passes.gather(sources, affine, activation)]
        transforms = self.transforms.of(sources, readers)
        arriving = self.transforms.make(dz, gradient=True)
        made: Tensor = _operators().winograd_weight_gradient(transforms, arriving, dz.shape[1])
        self.transforms.recycle(arriving)
        self.transforms.done(sources)
        return made

    def _data_gradient(self, dz: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
        """See `native.Verbs._data_gradient`."""
        readers = self._readers(None, weight.shape[0], weight.shape[1], weight.shape[2], dilation)
        if readers is None:
            return super()._data_gradient(dz, weight, dilation)
        return self._convolve([dz], readers, [weight], transposed=True)

    def _readers(
        self, shared: Sequence[int] | None, read: int, written: int, kernel_size: int, dilation: int
    ) -> Sequence[int] | None:
        """How many Winograd convolutions read each operand of this one; None: it is the library's.

        Of layers that read nodes as they are it is `shared`; of pre-activation layers alone with what it reads.
        """
        if dilation > 1:
            return None
        if self.least is None or kernel_size == 1 or min(read, written) < self.least:
            return shared
        return [1] if pays(read, written, *self.images) else shared

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        """See `native.Verbs.way`."""
        shape = weight.shape[1], weight.shape[0], weight.shape[2], dilation
        its = self._readers(self.chosen.forward.get(layer), *shape) is not None
        return "winograd" if its else super().way(layer, weight, dilation)

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor | Packed:
        """See `native.Verbs.packed`."""
        if way != "winograd":
            return super().packed(way, weight, dilation)
        return Packed(_operators().winograd_weights([weight], False), weight.shape)

    def _convolve(
        self,
        tensors: Sequence[Tensor],
        readers: Sequence[int],
        weights: Sequence[Tensor | Packed],
        *,
        transposed: bool = False,
        bias: Tensor | None = None,
        add: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """The convolution of the tensors side by side, or with `transposed` the gradient that readers send.

        `readers`: how many Winograd convolutions of this pass read each tensor in all.
        """
        sources = self.transforms.of(tensors, readers)
        first = weights[0]
        packed = first.tensor if isinstance(first, Packed) else _operators().winograd_weights(list(weights), transposed)
        batch, _, height, width = tensors[0].shape
        shape = (batch, first.shape[1 if transposed else 0], height, width)
        out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        _operators().winograd_conv(sources, packed, bias, add, number(activation), out)
        self.transforms.done(tensors)
        return out


class _Chosen(NamedTuple):
    """Winograd convolutions of a block: layer (for `gradient` node) -> for each tensor read, its readers among them."""

    forward: Mapping[int, Sequence[int]]
    gradient: Mapping[int, Sequence[int]]
    weight: Mapping[int, Sequence[int]]


_NOTHING = _Chosen({}, {}, {})


@lru_cache(maxsize=256)
def _choose(plan: BlockPlan, batch: int, height: int, width: int) -> _Chosen:
    if plan.pre_activation or plan.dilations:  # layers that read one node share its transforms, dilated ones do not
        return _NOTHING
    live: set[int] = set()  # layers that a gradient reaches
    for layer in range(plan.num_layers, 0, -1):
        if layer in plan.outputs or live.intersection(plan.readers[layer]):
            live.add(layer)
    readers = [[layer for layer in layers if layer in live] for layers in plan.readers]
    layers = {
        layer
        for layer, (read, written) in enumerate(zip(plan.link_widths, plan.widths, strict=True), start=1)
        if pays(read, written, batch, height, width)
    }
    nodes = {
        node
        for node, written in enumerate(plan.node_widths)
        if pays(sum(plan.node_widths[layer] for layer in readers[node]), written, batch, height, width)
    }

    def of_nodes(chosen: set[int]) -> dict[int, list[int]]:
        return {i: [len(chosen.intersection(plan.readers[node])) for node in plan.links[i - 1]] for i in chosen}

    return _Chosen(
        forward=of_nodes(layers),
        gradient={node: [len(nodes.intersection(plan.links[i - 1])) for i in readers[node]] for node in nodes},
        weight=of_nodes(layers & live),
    )


class _Transforms:
    """Transformed tensors of a call: each made when first read, its memory handed on after its last reader."""

    def __init__(self) -> None:
        self.made: dict[int, _Entry] = {}
        self.free: list[torch.UntypedStorage] = []

    def of(self, tensors: Sequence[Tensor], readers: Sequence[int]) -> list[Tensor]:
        """The transforms of these tensors, each of which has so many readers in all; call `done` behind each."""
        for tensor, count in zip(tensors, readers, strict=True):
            if id(tensor) not in self.made:
                self.made[id(tensor)] = _Entry(tensor, self.make(tensor), count)
        return [self.made[id(tensor)].transform for tensor in tensors]

    def done(self, tensors: Sequence[Tensor]) -> None:
        """One reader of each has run."""
        for tensor in tensors:
            entry = self.made[id(tensor)]
            entry.readers -= 1
            if entry.readers == 0:
                self.recycle(self.made.pop(id(tensor)).transform)

    def make(self, x: Tensor, gradient: bool = False) -> Tensor:
        """One transform; with `gradient` as the weight's gradient reads dz."""
        batch, channels, height, width = x.shape
        blocks = _parts(batch * _parts(height, 4) * _parts(width, 4), TILES)
        held = GRADIENT_PAD * _parts(channels, GRADIENT_PAD) if gradient else channels
        out = self._room((blocks, 36, TILES, held))
        _operators().winograd_transform(x, gradient, out)
        return out

    def recycle(self, transform: Tensor) -> None:
        """Its memory may be written again."""
        self.free.append(transform.untyped_storage())

    def _room(self, shape: Sequence[int]) -> Tensor:
        """In the smallest free memory that fits and is not twice too large; if there is none, all of it goes back."""
        size = 4 * prod(shape)
        fits = [storage for storage in self.free if size <= storage.nbytes() <= 2 * size]
        if not fits:
            self.free.clear()
            return torch.empty(shape, dtype=torch.float32)
        found = min(fits, key=lambda storage: storage.nbytes())
        self.free = [storage for storage in self.free if storage is not found]
        return torch.empty(0, dtype=torch.float32).set_(found)[: prod(shape)].view(tuple(shape))


@dataclass
class _Entry:
    tensor: Tensor  # held, so that its id stays its own
    transform: Tensor
    readers: int  # that have not run yet


def _parts(value: int, parts: int) -> int:
    return -(-value // parts)


def _operators() -> Any:
    return torch.ops.thresholdnet_csrc
