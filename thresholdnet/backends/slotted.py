"""The engine's verbs on kernels that read the linked slots where they lie: nothing is concatenated.

All tensors of one kind lie in one allocation, each in a slot padded to 8 channels (`kernels.slots`): side by side in
pixel rows in pre-activation blocks and where every width is a multiple of 32, else one dense slot after the other. What
backward needs is such an allocation as a whole. The kernels come as a launcher, a module with the functions of
`kernels.launch`; an engine is a subclass of `Verbs` that names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batchnorm import NodeStatistics, batch_norm_vectors
from ..kernels import slots
from ..kernels.operands import MAX_ELEMENTS
from ..kernels.tables import MAX_DELTA
from ..pixels import count
from ..plan import BlockPlan, row_of
from .elementwise import Affine
from .native import Moments, Place, ReaderNorm

UNSUMMED = 16 << 20
"""Bytes of weight gradients' splits that wait to be summed in one launch, in a GPU's L2 cache: an A100's has 40 MB."""


class Verbs:
    """See `native.Verbs`; results lie in the slots that `into` names."""

    launch: ModuleType

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        self.plan, self.like = plan, x
        self.readers_at_once = 2 if plan is None else readers_at_once(plan)
        self._single = tuple(x.shape[2:]) == (1, 1)
        self.arenas: dict[str, list[Tensor]] = {}
        self.memory: dict[str, Tensor] = {}  # the allocation behind each kind's slots
        self.unsummed: list[Any] = []  # weight gradients that the launcher has yet to reduce

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
        moments: Tensor | None = None,
        dilation: int = 1,
    ) -> tuple[Tensor, Moments | None]:
        if self.plan is None:  # sources from anywhere: bring them into one allocation first
            sources = self._packed(sources)
        out = self._slot(into, weight.shape[0])
        return out, self.launch.conv(
            sources, self._met(weight), out, affine=affine, activation=activation, bias=bias, statistics=statistics,
            moments=moments, dilation=dilation,
        )  # fmt: skip

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        return ""

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor:
        return weight

    def prepared(
        self, weights: Sequence[Any], read: Sequence[Sequence[int]] | None = None, affine: Sequence[bool] | None = None,
        dilations: Sequence[int] = (),
    ) -> Sequence[Any]:  # fmt: skip
        return weights

    def affine(self, gamma: Tensor, beta: Tensor, moments: Moments, eps: float) -> Affine:
        return self.launch.batch_norm_affine(gamma, beta, *moments, eps)

    def batch_norm_vectors(
        self, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float | Tensor, pixels: int | Tensor
    ) -> Tensor:
        if isinstance(eps, Tensor) or isinstance(pixels, Tensor):
            return batch_norm_vectors(gamma, beta, mean, variance, eps, pixels)
        return self.launch.batch_norm_vectors(gamma, beta, mean, variance, eps, pixels)

    def affine_of_nodes(
        self, weight: Any, gamma: Tensor, beta: Tensor, statistics: NodeStatistics, nodes: tuple[int, ...], eps: float
    ) -> tuple[Any, Tensor]:
        mean, variance = used = statistics.of(nodes)
        return self.affine(gamma, beta, (mean, variance), eps), used

    def moments(self, z: Tensor) -> Moments:
        return self.launch.slot_statistics(z)

    def normalise(self, z: Tensor, affine: Affine, activation: str, *, into: Place) -> Tensor:
        out = self._slot(into, z.shape[1])
        self.launch.normalise(z, *affine, out, activation)
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
        dilation: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = weights[0].shape[1] if weights else add.shape[1]  # type: ignore[union-attr]  # one of both is given
        out = self._slot(into, channels)
        if add is not None and add is not out:
            slots.write(out, add)
        mask = None if masked is None else (masked[0], *masked[1], masked[2], masked[3])
        weights = [self._met(weight) for weight in weights]
        sums = self.launch.gradient(
            readers, weights, out, add=add is not None, mask=mask, activation=activation, dilation=dilation
        )
        return (out, *sums) if sums is not None else (out, out.new_empty(0), out.new_empty(0))

    def arrive(self, grad: Tensor, place: Place) -> Tensor:
        return slots.write(self._slot(place, grad.shape[1]), grad)

    def arrive_output(self, grad: Tensor, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        assert self.plan is not None
        if not output_holds_features(self.plan):
            return {node: self.arrive(part, ("gradient", node)) for node, part in parts.items()}
        self._slot(("gradient", 0), self.plan.in_channels)
        grads = self.arenas["gradient"]
        slots.side_by_side(grads).copy_(grad)  # rows of all nodes, as grad has them: one copy of whole lines
        return dict(enumerate(grads))

    def send(
        self,
        dz: Sequence[Tensor],
        weights: Sequence[Tensor],
        nodes: Sequence[int],
        features: Sequence[Tensor],
        norms: Sequence[ReaderNorm],
        statistics: tuple[Tensor, Tensor],
        arriving: Sequence[Tensor | None],
        activation: str,
        terms: tuple[Tensor, Sequence[Tensor]] | None = None,
        dilation: int = 1,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        outs = [self._slot(("gradient", node), f.shape[1]) for node, f in zip(nodes, features, strict=True)]
        add = any(before is not None for before in arriving)
        for out, before in zip(outs, arriving, strict=True):
            if add and before is None:
                slots.whole(out).zero_()
        sum_g, sum_gx = self.launch.gradient_of_readers(
            dz, [self._met(weight) for weight in weights], outs, features,
            [norm.gamma for norm in norms], [norm.beta for norm in norms], *statistics,
            add=add, activation=activation, terms=terms, dilation=dilation,
        )  # fmt: skip
        return outs, list(sum_g), list(sum_gx)

    def linear(
        self, g: Tensor, z: Tensor, a: Tensor | None, q: Tensor, r: Tensor, mean: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.launch.bn_backward(g, z, a, q, r, mean, share)
        return g

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
        if self.plan is None:
            sources = self._packed(sources)
        if affine is not None and kernel_size > 1 and len(sources) == 1:  # once, where the kernel would for every tap
            into = ("scratch", sources[0].shape[1])
            sources, affine = [self.normalise(sources[0], affine, activation, into=into)], None
        point = kernel_size == 3 and self._single
        made: Tensor = self.launch.weight_gradient(
            sources, dz, 1 if point else kernel_size, affine=affine, activation=activation,
            dtype=(dz if like is None else like).dtype, channels_last=like is not None and not like.is_contiguous(),
            later=self.unsummed, dilation=dilation,
        )  # fmt: skip
        if point or sum(each.partial.nbytes for each in self.unsummed) > UNSUMMED:
            self.settle()
        return F.pad(made, (1, 1, 1, 1)) if point else made

    def settle(self) -> None:
        if self.unsummed:
            self.launch.reduce_splits(self.unsummed)
            self.unsummed.clear()

    def leave(self, nodes: Sequence[Tensor]) -> Tensor:
        if self.plan is not None and len(nodes) == len(self.plan.node_widths) and output_holds_features(self.plan):
            return slots.side_by_side(nodes)  # the rows of all nodes are the output
        batch, _, height, width = nodes[0].shape
        out = torch.empty(
            (batch, sum(node.shape[1] for node in nodes), height, width),
            dtype=nodes[0].dtype, device=nodes[0].device, memory_format=torch.channels_last,
        )  # fmt: skip
        for part, node in zip(out.split([node.shape[1] for node in nodes], dim=1), nodes, strict=True):
            part.copy_(node)
        return out

    def nodes_of(self, output: Tensor) -> list[Tensor]:
        assert self.plan is not None
        self.arenas["node"] = list(output.split(self.plan.node_widths, dim=1))
        return self.arenas["node"]

    def keep(self, kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.memory[kind]]

    def kept(self, kind: str, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        assert self.plan is not None
        self.arenas[kind] = self._views(widths_of(self.plan, kind), saved[0])
        return self.arenas[kind], saved[1:]

    def kept_nodes(self, x: Tensor, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        return self.kept("node", saved)

    def _met(self, weight: Tensor) -> Tensor:
        """The taps that meet pixels: of a 3x3 kernel on a single pixel one of nine."""
        return weight[:, :, 1:2, 1:2] if self._single and weight.shape[2] == 3 else weight

    def _slot(self, place: Place, channels: int) -> Tensor:
        kind, index = place
        if kind == "waiting":  # gradients of readers that are sent together lie in one allocation
            name = f"{kind} {channels}"
            if name not in self.arenas:
                self.arenas[name] = self._views([channels] * self.readers_at_once, layout="arena")
            return self.arenas[name][index]
        if self.plan is None or kind in ("scratch", "scratch inner", "tail"):
            name = f"{kind} {index} {channels}"
            if name not in self.arenas:
                self.arenas[name] = self._views([channels])
            return self.arenas[name][0]
        if kind not in self.arenas:
            widths = widths_of(self.plan, kind)
            # Elements behind the last slot are never written: zeros there make what an operator returns repeatable.
            slack = row_of(widths) > sum(slots.padded(widths))
            make = self.like.new_zeros if slack else self.like.new_empty
            self.memory[kind] = make(elements_of(self.like, widths))
            self.arenas[kind] = self._views(widths, self.memory[kind])
        return self.arenas[kind][index - (kind in ("raw", "inner"))]  # layers count from 1, nodes from 0

    def _packed(self, sources: Sequence[Tensor]) -> list[Tensor]:
        packed = self._views([source.shape[1] for source in sources])
        return [slots.write(slot, source) for slot, source in zip(packed, sources, strict=True)]

    def _views(self, widths: Sequence[int], memory: Tensor | None = None, layout: str = "") -> list[Tensor]:
        batch, _, height, width = self.like.shape
        elements = elements_of(self.like, widths)
        if elements >= MAX_ELEMENTS:
            raise ValueError(
                f"input of the block must give fewer than 2^31 elements for all layers together, got {elements} from "
                f"shape {tuple(self.like.shape)}: use a smaller batch or backend='native'"
            )
        dense = all(width % 32 == 0 for width in widths) or (self.plan is not None and self.plan.reads_nodes_back)
        rows = dense or elements >= MAX_DELTA  # entries of a K table reach across one allocation
        return slots.allocate(
            batch, widths, height, width, dtype=self.like.dtype, device=self.like.device,
            layout=layout or ("rows" if rows else "arena"), memory=memory,
        )  # fmt: skip


def readers_at_once(plan: BlockPlan) -> int:
    """How many readers one read-modify-write of the gradient serves.

    Predicted, not measured: 4 from a dozen layers on, 2 for the shallow blocks, whose time does not fall beyond.
    """
    return 4 if plan.num_layers >= 12 else 2


def output_holds_features(plan: BlockPlan) -> bool:
    """Whether the rows of all nodes are the output itself: no slot is padded, and no row, and each in its place."""
    ascending = plan.outputs == tuple(range(len(plan.node_widths)))
    return plan.returns_features and ascending and row_of(plan.node_widths) == plan.out_channels


def needs_input(plan: BlockPlan) -> bool:
    """Whether backward needs the block's input, where it is not in the rows of the nodes that were kept."""
    return not plan.reads_nodes_back


def kept_like(plan: BlockPlan, x: Tensor, kinds: Sequence[str]) -> list[Tensor]:
    """Empty tensors of the shapes that `Verbs.keep` returns for tensors of these kinds, for fake tensors."""
    return [x.new_empty(elements_of(x, widths_of(plan, kind))) for kind in kinds]


def widths_of(plan: BlockPlan, kind: str) -> Sequence[int]:
    """Channels of every slot of a kind."""
    return {"raw": plan.widths, "inner": plan.bottleneck_widths}.get(kind, plan.node_widths)


def elements_of(x: Tensor, widths: Sequence[int]) -> int:
    """Elements of an allocation for slots of these widths, with the pixels of `x`."""
    return count(x) * row_of(widths)
