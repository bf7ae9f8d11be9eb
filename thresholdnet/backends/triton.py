"""The engine's verbs on Triton kernels: convolutions read the linked slots where they lie, nothing is concatenated.

All tensors of one kind lie in one allocation, each in a slot padded to 8 channels (`kernels.slots`): side by side in
pixel rows in bottleneck blocks and where every width is a multiple of 32, else one dense slot after the other. What
backward needs is such an allocation as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import launch, slots
from ..plan import BlockPlan
from .native import Affine, Moments, Place, ReaderNorm


class Verbs:
    """See `native.Verbs`; results lie in the slots that `into` names."""

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        self.plan, self.like = plan, x
        self.arenas: dict[str, list[Tensor]] = {}
        self.memory: dict[str, Tensor] = {}  # the allocation behind each kind's slots

    def enter(self, x: Tensor) -> Tensor:
        slot = self._slot(("node", 0), x.shape[1])
        return slots.write(slot, x)

    def conv(
        self,
        sources: Sequence[Tensor],
        weight: Tensor,
        *,
        into: Place,
        affine: Affine | None = None,
        bias: Tensor | None = None,
        activation: str = "relu",
        statistics: bool = False,
    ) -> tuple[Tensor, Moments | None]:
        if self.plan is None:  # sources from anywhere: bring them into one allocation first
            sources = self._packed(sources)
        out = self._slot(into, weight.shape[0])
        return out, launch.conv(
            sources, weight, out, affine=affine, activation=activation, bias=bias, statistics=statistics
        )

    def moments(self, z: Tensor) -> Moments:
        return launch.slot_statistics(z)

    def normalise(self, z: Tensor, affine: Affine, activation: str, *, into: Place) -> Tensor:
        out = self._slot(into, z.shape[1])
        launch.normalise(z, *affine, out, activation)
        return out

    def gradient(
        self,
        readers: Sequence[Tensor],
        weights: Sequence[Tensor],
        add: Tensor | None,
        *,
        into: Place,
        masked: tuple[Tensor, Affine, Tensor, Tensor] | None = None,
        activation: str = "relu",
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = weights[0].shape[1] if weights else add.shape[1]  # type: ignore[union-attr]  # one of both is given
        out = self._slot(into, channels)
        if add is not None:
            slots.write(out, add)
        mask = None if masked is None else launch.Mask(masked[0], *masked[1], masked[2], masked[3])
        sums = launch.gradient(readers, weights, out, add=add is not None, mask=mask, activation=activation)
        return (out, *sums) if sums is not None else (out, out.new_empty(0), out.new_empty(0))

    def arrive(self, grad: Tensor, node: int) -> Tensor:
        return slots.write(self._slot(("gradient", node), grad.shape[1]), grad)

    def reader_gradient(
        self,
        dz: Tensor,
        weight: Tensor,
        sources: Sequence[Tensor],
        nodes: Sequence[int],
        norm: ReaderNorm,
        arriving: Sequence[Tensor | None],
        activation: str,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        outs = [self._slot(("gradient", node), s.shape[1]) for node, s in zip(nodes, sources, strict=True)]
        add = any(before is not None for before in arriving)
        for out, before in zip(outs, arriving, strict=True):
            if add and before is None:
                slots.whole(out).zero_()
        sum_g, sum_gx = launch.gradient_of_readers(
            [dz], [weight], outs, sources, [norm.gamma], [norm.beta], norm.mean, norm.rstd, add=add,
            activation=activation,
        )  # fmt: skip
        return outs, sum_g[0], sum_gx[0]

    def linear(self, g: Tensor, z: Tensor, a: Tensor | None, b: Tensor, c: Tensor) -> Tensor:
        launch.bn_backward(g, z, a, b, c)
        return g

    def weight_gradient(
        self,
        sources: Sequence[Tensor],
        dz: Tensor,
        kernel_size: int,
        *,
        affine: Affine | None = None,
        activation: str = "relu",
    ) -> Tensor:
        if self.plan is None:
            sources = self._packed(sources)
        return launch.weight_gradient(sources, dz, kernel_size, affine=affine, activation=activation)

    def leave(self, nodes: Sequence[Tensor]) -> Tensor:
        batch, _, height, width = nodes[0].shape
        out = torch.empty(
            (batch, sum(node.shape[1] for node in nodes), height, width),
            dtype=nodes[0].dtype, device=nodes[0].device, memory_format=torch.channels_last,
        )  # fmt: skip
        for part, node in zip(out.split([node.shape[1] for node in nodes], dim=1), nodes, strict=True):
            part.copy_(node)
        return out

    def keep(self, kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.memory[kind]]

    def kept(self, kind: str, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        self.arenas[kind] = self._views(self._widths(kind), saved[0])
        return self.arenas[kind][1 if kind == "node" else 0 :], saved[1:]

    def _slot(self, place: Place, channels: int) -> Tensor:
        kind, index = place
        if self.plan is None or kind.startswith("scratch"):
            name = f"{kind} {index} {channels}"
            if name not in self.arenas:
                self.arenas[name] = self._views([channels])
            return self.arenas[name][0]
        if kind not in self.arenas:
            widths = self._widths(kind)
            # Elements behind the last slot are never written: zeros there make what an operator returns repeatable.
            slack = slots.row_of(widths) > sum(slots.padded(widths))
            make = self.like.new_zeros if slack else self.like.new_empty
            self.memory[kind] = make(_elements(self.like, widths))
            self.arenas[kind] = self._views(widths, self.memory[kind])
        return self.arenas[kind][index - (kind in ("raw", "inner"))]  # layers count from 1, nodes from 0

    def _widths(self, kind: str) -> Sequence[int]:
        assert self.plan is not None
        by_kind = {"raw": self.plan.widths, "inner": self.plan.bottleneck_widths}
        return by_kind.get(kind, self.plan.node_widths)

    def _packed(self, sources: Sequence[Tensor]) -> list[Tensor]:
        packed = self._views([source.shape[1] for source in sources])
        return [slots.write(slot, source) for slot, source in zip(packed, sources, strict=True)]

    def _views(self, widths: Sequence[int], memory: Tensor | None = None) -> list[Tensor]:
        dense = all(width % 32 == 0 for width in widths) or (self.plan is not None and self.plan.unit == "bottleneck")
        batch, _, height, width = self.like.shape
        return slots.allocate(
            batch, widths, height, width, dtype=self.like.dtype, device=self.like.device,
            layout="rows" if dense else "arena", memory=memory,
        )  # fmt: skip


def kept_like(plan: BlockPlan, x: Tensor, recompute: bool) -> list[Tensor]:
    """Empty tensors of the shapes that `Verbs.keep` returns for a block, for fake tensors."""
    verbs = Verbs(plan, x)
    kinds = ["node"] if plan.unit == "bottleneck" else ["raw"]
    if plan.unit == "bottleneck" and not recompute:
        kinds.append("inner")
    return [x.new_empty(_elements(x, verbs._widths(kind))) for kind in kinds]


def _elements(x: Tensor, widths: Sequence[int]) -> int:
    """Elements of an allocation for slots of these widths, with the pixels of `x`."""
    return x.shape[0] * x.shape[2] * x.shape[3] * slots.row_of(widths)
