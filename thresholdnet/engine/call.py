"""One call of a fused block: what it is given, and what the layers of every unit take from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import packing, sync
from ..backends import load
from ..backends.elementwise import Affine
from ..backends.native import Place
from ..batchnorm import Norm, affines, backward_norms, folded, paired
from ..pixels import Volume, count
from ..plan import BlockPlan


class Spec(NamedTuple):
    """Everything about a call but its tensors.

    Attributes:
        plan: the block's structure.
        eps: one a BatchNorm, in forward order.
        fixed: per BatchNorm, True where it normalises with given statistics (eval mode) and not with the batch's.
        activation: as in `activations`.
        backend: a name that `backends.engine_for` returned.
        save: keep what backward needs.
        recompute: do not keep bottleneck outputs; backward makes them again.
        drop: the probability behind the dropout masks, where a call has any.
        group: name of the process group that shares batch statistics (SyncBatchNorm), "" for none.
    """

    plan: BlockPlan
    eps: Sequence[float]
    fixed: Sequence[bool]
    activation: str
    backend: str
    save: bool
    recompute: bool = False
    drop: float = 0.0
    group: str = ""

    @property
    def keeps_output(self) -> bool:
        """Whether backward reads the features out of the block's output instead of a copy of its own."""
        return self.plan.returns_features and load(self.backend).output_holds_features(self.plan)

    @property
    def reports(self) -> bool:
        """Whether a call returns the statistics that it used: backward and running statistics alone ask for them."""
        return self.save or not all(self.fixed)

    @property
    def keeps_input(self) -> bool:
        """Whether backward needs the block's input, beyond its shape."""
        return not self.keeps_output and load(self.backend).needs_input(self.plan)

    @property
    def kinds_kept(self) -> list[str]:
        """Which tensors of the layers the call keeps for backward, see `native.Verbs`."""
        if not self.plan.reads_nodes_back:
            return ["raw"]
        inner = self.plan.unit == "bottleneck" and not self.recompute
        return [*([] if self.keeps_output else ["node"]), *(["inner"] if inner else [])]


class Extras(NamedTuple):
    """Tensors of a call that most calls do without.

    Attributes:
        masks: per layer a bool mask [N, C, H, W] or [N, C, 1, 1] of the features that dropout leaves (pre-activation
            layers); or none.
        counts: pixels of every rank of `Spec.group`, [ranks]; None where statistics are not shared.
    """

    masks: Sequence[Tensor] = ()
    counts: Tensor | None = None


NO_EXTRAS = Extras()


class Readers(NamedTuple):
    """Layers of one dilation that read a node, and the part of each one's weight that does."""

    dilation: int
    layers: Sequence[int]
    weights: Sequence[Any]


class Block:
    """What all units share: the tensors of one call, and statistics.

    `volume`: of volumes, whose pixels come as images of depth * height rows.
    """

    per_layer: int  # parameters a layer
    norms: tuple[int, ...]  # positions of the BatchNorm weights among them

    def __init__(
        self, spec: Spec, x: Tensor, parameters: Sequence[Tensor], extras: Extras, volume: Volume | None = None
    ):
        self.spec, self.plan, self.parameters, self.extras = spec, spec.plan, parameters, extras
        self.act = spec.activation
        verbs: Any = load(spec.backend).Verbs
        self.verbs: Any = verbs(spec.plan, x) if volume is None else verbs(spec.plan, x, volume)
        self.x = x
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.pixels = sync.total(extras.counts, count(x))
        self.used: list[Tensor] = []
        self._given: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def shared(self, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance over all ranks."""
        return sync.merge(moments, self.extras.counts, self.spec.group)

    def summed(self, norm: Norm, sums: Tensor) -> Tensor:
        """BatchNorm's backward sums over all ranks; its parameters' gradients stay those of this rank."""
        return sums if norm.fixed else sync.add(sums, self.spec.group)

    def weight(self, layer: int, position: int) -> Tensor:
        """A parameter of layer 1..L."""
        return self.parameters[(layer - 1) * self.per_layer + position]

    def place(self, layer: int, which: int) -> int:
        """Where BatchNorm number `which` of a layer stands among all of the block, in forward order."""
        return (layer - 1) * len(self.norms) + which

    def given_affine(self, layer: int, which: int, running: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """scale and shift of a BatchNorm with given statistics; those of all that have some are made at once."""
        if not self._given:
            layers, norms = range(1, self.plan.num_layers + 1), range(len(self.norms))
            fixed = [(i, j) for i in layers for j in norms if self.fixed(i, j)]
            self._given = dict(zip(fixed, self._affines(fixed, running), strict=True))
        return self._given[layer, which]

    def _affines(self, norms: Sequence[tuple[int, int]], running: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """`batchnorm.affines` of BatchNorms by layer and number."""
        own = [(self.weight(i, self.norms[j]), self.weight(i, self.norms[j] + 1)) for i, j in norms]
        statistics = [self.given(running, i, j) for i, j in norms]
        eps = [self.spec.eps[self.place(i, j)] for i, j in norms]
        return affines(own, statistics, eps, self.verbs.batch_norm_vectors, self.wide)

    def norms_of(self, statistics: Sequence[Tensor]) -> list[Norm]:
        """All BatchNorms in forward order, from the statistics that forward returned."""
        layers = range(1, self.plan.num_layers + 1)
        own = [(self.weight(i, at), self.weight(i, at + 1)) for i in layers for at in self.norms]
        vectors = self.verbs.batch_norm_vectors
        return backward_norms(own, statistics, self.spec.eps, self.spec.fixed, self.pixels, vectors)

    def fixed(self, layer: int, which: int) -> bool:
        return self.spec.fixed[self.place(layer, which)]

    def folds(self, weight: Tensor) -> bool:
        """Whether scaling a convolution's weight touches fewer elements than scaling its result, or is done once."""
        few = weight[0].numel() <= count(self.x)
        return few or packing.forms_of(weight) is not None

    def constant(
        self, weight: Tensor, layer: int = 0, behind: int | None = None, running: Sequence[Tensor] = ()
    ) -> tuple[Any, Tensor | None]:
        """A weight as `verbs.conv` takes it in inference, and its bias, the layer's BatchNorm `behind` it folded in.

        Made once where the weight's owner declared it constant. Layer 0: behind the block.
        """

        forms = packing.forms_of(weight)
        if forms is None:
            return (weight, None) if behind is None else folded(weight, self.given_affine(layer, behind, running))
        dilation = self.plan.dilation(layer) if layer and weight.shape[2] > 1 else 1
        way = self.verbs.way(layer, weight, dilation)
        sources, eps = self.norm_sources(layer, behind, running)

        def packed() -> tuple[Any, Tensor | None]:
            made, bias = weight, None
            if behind is not None:
                made, bias = folded(weight, self._affines([(layer, behind)], running)[0])
            made = self.verbs.packed(way, made, dilation)
            return (made.detach() if made is weight else made), bias  # what is kept must not keep the weight alive

        return forms.once((way, eps, dilation), (weight, *sources), packed)

    def affine(
        self, weight: Tensor, layer: int, which: int, mean: Tensor, variance: Tensor, running: Sequence[Tensor]
    ) -> Any:
        """BatchNorm's affine with these statistics, for `conv` and `normalise`; made once where they are given and
        `weight` is declared."""
        if not self.fixed(layer, which):
            gamma, beta = (self.weight(layer, self.norms[which] + i) for i in (0, 1))
            return self.verbs.affine(gamma, beta, (mean, variance), self.spec.eps[self.place(layer, which)])
        forms = packing.forms_of(weight)
        if forms is None:
            return self.given_affine(layer, which, running)
        sources, eps = self.norm_sources(layer, which, running)
        return forms.once(("affine", which, eps), sources, lambda: self._affines([(layer, which)], running)[0])

    def norm_sources(
        self, layer: int, which: int | None, running: Sequence[Tensor]
    ) -> tuple[list[Tensor], float | None]:
        """All that a BatchNorm with given statistics is made of; nothing for None."""
        if which is None:
            return [], None
        index, position = self.place(layer, which), self.norms[which]
        vectors = [self.weight(layer, position), self.weight(layer, position + 1), *running[2 * index : 2 * index + 2]]
        return vectors, self.spec.eps[index]

    def given(self, running: Sequence[Tensor], layer: int, which: int) -> tuple[Tensor, Tensor]:
        """Mean and variance that a BatchNorm has from its module, in its dtype: not cast one by one."""
        index = 2 * self.place(layer, which)
        return running[index], running[index + 1]

    def note(self, mean: Tensor, variance: Tensor) -> None:
        if self.spec.reports:
            self.used.append(paired(mean.to(self.wide), variance.to(self.wide)))

    def lowest_needed(self, needs: Sequence[bool]) -> int:
        """First node whose gradient somebody asked for: backward stops there."""
        return 0 if needs[0] else min(self.layer_of(place) for place, needed in enumerate(needs[1:]) if needed)

    def layer_of(self, place: int) -> int:
        """Which layer a parameter belongs to; L + 1: to what stands behind the block."""
        return min(place // self.per_layer, self.plan.num_layers) + 1

    def reached(self, lowest: int) -> list[int]:
        """The nodes down to `lowest` that a gradient reaches, from the last one on: the others are dead ends."""
        plan, found = self.plan, set(self.plan.outputs)
        for node in range(plan.num_layers, lowest - 1, -1):
            if not found.isdisjoint(plan.readers[node]):
                found.add(node)
        return sorted((node for node in found if node >= lowest), reverse=True)

    def readers_of(self, reached: Sequence[int], others: Sequence[Tensor] = ()) -> tuple[list[list[Readers]], Any]:
        """Per node the layers that read it and send a gradient; and `others`, weights behind the block.

        Of layers that begin with their convolution. All weights are as `verbs.gradient` takes them.
        """
        groups: dict[tuple[int, int], list[int]] = {}  # by node and dilation
        for node in reached:
            for layer in self.plan.readers[node]:
                if layer in reached:
                    groups.setdefault((node, self.plan.dilation(layer)), []).append(layer)
        parts = [[self._slice(layer, node) for layer in layers] for (node, _), layers in groups.items()]
        dilations = [*(dilation for _, dilation in groups), *[1] * len(others)]
        made = self.verbs.prepared([*parts, *([other] for other in others)], dilations=dilations)
        found: dict[int, list[Readers]] = {node: [] for node in reached}
        for ((node, dilation), layers), weights in zip(groups.items(), made, strict=False):
            found[node].append(Readers(dilation, layers, weights))
        return [*found.values()], made[len(groups) :]

    def gradient(
        self,
        readers: Sequence[Readers],
        dz: Sequence[Tensor | None],
        add: Tensor | None,
        *,
        into: Place,
        masked: tuple[Tensor, Affine, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`verbs.gradient` of a node, those of one dilation after the other; dz: of layers 1..L, by number."""
        *others, last = readers or [Readers(1, [], [])]
        for some in others:
            add, _, _ = self.verbs.gradient(live(dz, some.layers), some.weights, add, into=into, dilation=some.dilation)
        made: tuple[Tensor, Tensor, Tensor] = self.verbs.gradient(
            live(dz, last.layers), last.weights, add, into=into, masked=masked, activation=self.act,
            dilation=last.dilation,
        )  # fmt: skip
        return made

    def _slice(self, layer: int, node: int) -> Tensor:
        """The part of a layer's weight that reads `node`."""
        sources, widths = self.plan.links[layer - 1], self.plan.node_widths
        start = sum(widths[k] for k in sources[: sources.index(node)])
        return self.weight(layer, 0)[:, start : start + widths[node]]

    def output_gradients(self, grad: Tensor) -> dict[int, Tensor]:
        return dict(zip(self.plan.outputs, grad.split(self.plan.output_widths, dim=1), strict=True))

    def release(self, nodes: list[Tensor | None], step: int) -> None:
        """Drop the nodes that no layer after `step` reads."""
        for node, (_, last) in enumerate(self.plan.lifetimes[: step + 1]):
            if last <= step:
                nodes[node] = None


def live(nodes: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
    """These nodes; all of them are alive, which only a type checker must be told."""
    return [tensor for node in wanted if (tensor := nodes[node]) is not None]
