"""The fused block over a plan: forward, backward, and what is kept between them. Knows verbs, no device.

Kept for backward: the input, each layer's raw convolution output once, per-channel statistics. Activated values live in
a workspace; backward makes them again. No concatenation is kept, and with `recompute` no bottleneck output either. A
bottleneck block that returns all its nodes keeps its output, which whoever reads it keeps as well: once in all.

Letters: y_i = act(z_i * scale_i + shift_i) is node i of a conv_bn_relu block, z_i its raw convolution output. In a
bottleneck block node i is the raw feature f_i; its readers r normalise it each with an affine of their own over
statistics that all of them share: a_r = act(f * s_r + t_r), z_r = W1_r a_r, f_r = W2_r act(z_r * scale_r + shift_r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import packing, sync
from .backends import load
from .batchnorm import (
    Columns,
    NodeStatistics,
    Norm,
    SharedTerms,
    backward_norms,
    batch_norm,
    collected,
    folded,
    paired,
    shared_statistics,
)
from .gradients import own_gradients
from .plan import BlockPlan


class Spec(NamedTuple):
    """Everything about a call but its tensors.

    Attributes:
        plan: the block's structure.
        eps: one a BatchNorm, in forward order.
        fixed: per BatchNorm, True where it normalises with given statistics (eval mode) and not with the batch's.
        activation: "relu" or "relu6".
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
    def keeps_input(self) -> bool:
        """Whether backward needs the block's input, beyond its shape."""
        return not self.keeps_output and load(self.backend).needs_input(self.plan)

    @property
    def kinds_kept(self) -> list[str]:
        """Which tensors of the layers the call keeps for backward, see `native.Verbs`."""
        if self.plan.unit == "conv_bn_relu":
            return ["raw"]
        return [*([] if self.keeps_output else ["node"]), *([] if self.recompute else ["inner"])]


class Extras(NamedTuple):
    """Tensors of a call that most calls do without.

    Attributes:
        masks: per layer a bool mask [N, C, H, W] of the features that dropout leaves (bottleneck blocks); or none.
        counts: pixels of every rank of `Spec.group`, [ranks]; None where statistics are not shared.
    """

    masks: Sequence[Tensor] = ()
    counts: Tensor | None = None


NO_EXTRAS = Extras()


def forward(
    spec: Spec, x: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], extras: Extras = NO_EXTRAS
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a block.

    Args:
        spec: see `Spec`.
        x: [N, C, H, W].
        parameters: as in `reference.block_forward`. A conv_bn_relu block takes one more at the end: the weight
            [O, out_channels, 1, 1] of a 1x1 convolution of the output, which is then returned in the output's place.
        running: mean and variance of every BatchNorm in forward order; read only where it is fixed.
        extras: see `Extras`.

    Returns:
        The output (channels_last), the statistics used by each BatchNorm as [2, C] (mean, biased variance), and what
        backward needs beyond inputs, output and statistics (empty unless spec.save).
    """
    return _unit(spec)(spec, x, parameters, extras).forward(running)


def backward(
    spec: Spec,
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    extras: Extras = NO_EXTRAS,
) -> list[Tensor]:
    """Gradients of x and of every parameter, in order; an empty tensor where `needs` is False.

    Args:
        grad: gradient of the output.
        statistics, saved: as `forward` returned them; the output itself is the first of `saved` where the call
            `Spec.keeps_output`.
        needs: for x and each parameter.
    """
    block = _unit(spec)(spec, x, parameters, extras)
    grads = block.backward(grad.contiguous(memory_format=torch.channels_last), statistics, saved, needs)
    block.verbs.settle()
    return own_gradients((x, *parameters), grads, needs, grad)


def parameters_a_layer(plan: BlockPlan) -> int:
    """How many parameters each layer has."""
    return (_Bottleneck if plan.unit == "bottleneck" else _ConvBNReLU).per_layer


def _unit(spec: Spec) -> type[_ConvBNReLU] | type[_Bottleneck]:
    return _Bottleneck if spec.plan.unit == "bottleneck" else _ConvBNReLU


class _Block:
    """What both units share: the tensors of one call, and statistics."""

    per_layer: int  # parameters a layer
    norms: tuple[int, ...]  # positions of the BatchNorm weights among them

    def __init__(self, spec: Spec, x: Tensor, parameters: Sequence[Tensor], extras: Extras):
        self.spec, self.plan, self.parameters, self.extras = spec, spec.plan, parameters, extras
        self.act = spec.activation
        self.verbs: Any = load(spec.backend).Verbs(spec.plan, x)
        self.x = x
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.pixels = sync.total(extras.counts, x.shape[0] * x.shape[2] * x.shape[3])
        self.used: list[Tensor] = []

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

    def norm(self, layer: int, which: int, mean: Tensor, variance: Tensor) -> Norm:
        """BatchNorm number `which` of a layer with these statistics."""
        position, index = self.norms[which], self.place(layer, which)
        gamma, beta = (self.weight(layer, position + i) for i in (0, 1))
        return batch_norm(gamma, beta, mean, variance, self.spec.eps[index], self.spec.fixed[index])

    def norms_of(self, statistics: Sequence[Tensor]) -> list[Norm]:
        """All BatchNorms in forward order, from the statistics that forward returned."""
        layers = range(1, self.plan.num_layers + 1)
        own = [(self.weight(i, at), self.weight(i, at + 1)) for i in layers for at in self.norms]
        return backward_norms(own, statistics, self.spec.eps, self.spec.fixed, self.pixels)

    def fixed(self, layer: int, which: int) -> bool:
        return self.spec.fixed[self.place(layer, which)]

    def folds(self, weight: Tensor) -> bool:
        """Whether scaling a convolution's weight touches fewer elements than scaling its result, or is done once."""
        few = weight[0].numel() <= self.x.shape[0] * self.x.shape[2] * self.x.shape[3]
        return few or packing.forms_of(weight) is not None

    def constant(
        self, weight: Tensor, layer: int = 0, behind: int | None = None, running: Sequence[Tensor] = ()
    ) -> tuple[Any, Tensor | None]:
        """A weight as `verbs.conv` takes it in inference, and its bias, the layer's BatchNorm `behind` it folded in.

        Made once where the weight's owner declared it constant. Layer 0: behind the block.
        """

        def whole() -> tuple[Tensor, Tensor | None]:
            if behind is None:
                return weight, None
            return folded(weight, self.norm(layer, behind, *self.given(running, layer, behind)))

        forms = packing.forms_of(weight)
        if forms is None:
            return whole()
        way = self.verbs.way(layer, weight)
        sources, eps = self.norm_sources(layer, behind, running)

        def packed() -> tuple[Any, Tensor | None]:
            made, bias = whole()
            return self.verbs.packed(way, made), bias

        return packing.once(forms, (way, eps), (weight, *sources), packed)

    def affine(
        self, weight: Tensor, layer: int, which: int, mean: Tensor, variance: Tensor, running: Sequence[Tensor]
    ) -> Any:
        """BatchNorm's affine with these statistics, for `conv` and `normalise`; made once where they are given and
        `weight` is declared."""

        def made() -> Any:
            gamma, beta = (self.weight(layer, self.norms[which] + i) for i in (0, 1))
            return self.verbs.affine(gamma, beta, (mean, variance), self.spec.eps[self.place(layer, which)])

        forms = packing.forms_of(weight) if self.fixed(layer, which) else None
        if forms is None:
            return made()
        sources, eps = self.norm_sources(layer, which, running)
        return packing.once(forms, ("affine", which, eps), sources, made)

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
        index = 2 * self.place(layer, which)
        return running[index].to(self.wide), running[index + 1].to(self.wide)

    def note(self, mean: Tensor, variance: Tensor) -> None:
        self.used.append(paired(mean, variance))

    def lowest_needed(self, needs: Sequence[bool]) -> int:
        """First node whose gradient somebody asked for: backward stops there."""
        if needs[0]:
            return 0
        first = next(i for i, needed in enumerate(needs[1:]) if needed) // self.per_layer + 1
        return min(first, self.plan.num_layers + 1)

    def reached(self, lowest: int) -> list[int]:
        """The nodes down to `lowest` that a gradient reaches, from the last one on: the others are dead ends."""
        plan, found = self.plan, set(self.plan.outputs)
        for node in range(plan.num_layers, lowest - 1, -1):
            if not found.isdisjoint(plan.readers[node]):
                found.add(node)
        return sorted((node for node in found if node >= lowest), reverse=True)

    def output_gradients(self, grad: Tensor) -> dict[int, Tensor]:
        return dict(zip(self.plan.outputs, grad.split(self.plan.output_widths, dim=1), strict=True))

    def release(self, nodes: list[Tensor | None], step: int) -> None:
        """Drop the nodes that no layer after `step` reads."""
        for node, (_, last) in enumerate(self.plan.lifetimes[: step + 1]):
            if last <= step:
                nodes[node] = None


def _live(nodes: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
    return [tensor for node in wanted if (tensor := nodes[node]) is not None]


class _ConvBNReLU(_Block):
    """Conv3x3 - BN - act; parameters a layer: weight, gamma, beta."""

    per_layer, norms = 3, (1,)

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs = self.plan, self.verbs
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        raw: list[Tensor] = []
        whole = self._whole_weights()
        for i, sources in enumerate(plan.links, start=1):
            read, weight, fixed = _live(nodes, sources), self.weight(i, 0), self.fixed(i, 0)
            if i not in whole:  # inference: BatchNorm folded into the weight
                mean, variance = self.given(running, i, 0)
                weight, bias = self.constant(weight, i, 0, running)
                y, _ = verbs.conv(read, weight, into=("node", i), bias=bias, activation=self.act)
            else:
                z, moments = verbs.conv(read, whole[i], into=("raw", i), statistics=not fixed)
                mean, variance = self.given(running, i, 0) if fixed else self.shared(moments)
                y = verbs.normalise(z, self.affine(weight, i, 0, mean, variance, running), self.act, into=("node", i))
                if self.spec.save:
                    raw.append(z)
            self.note(mean, variance)
            nodes.append(y)
            self.release(nodes, i)
        out = _live(nodes, plan.outputs)
        if self.tail is not None:
            tail = whole[0] if self.spec.save else self.constant(self.tail)[0]
            out = [verbs.conv(out, tail, into=("tail", self.tail.shape[0]))[0]]
        return verbs.leave(out), self.used, verbs.keep("raw", raw) if self.spec.save else []

    def _whole_weights(self) -> dict[int, Any]:
        """The weights of layers that no BatchNorm is folded into, as `verbs.conv` takes them; 0: behind the block.

        Inference folds given statistics into the others: those weights are made one after the other.
        """
        plan, save = self.plan, self.spec.save
        every = range(1, plan.num_layers + 1)
        layers = [i for i in every if save or not self.fixed(i, 0) or not self.folds(self.weight(i, 0))]
        weights = [self.weight(i, 0) for i in layers]
        read = [[plan.node_widths[node] for node in plan.links[i - 1]] for i in layers]
        if self.tail is not None and save:
            layers, weights, read = [*layers, 0], [*weights, self.tail], [*read, [*plan.output_widths]]
        return dict(zip(layers, self.verbs.prepared(weights, read), strict=True))

    @property
    def tail(self) -> Tensor | None:
        """Weight of the 1x1 convolution behind the block, if it has one."""
        return self.parameters[-1] if len(self.parameters) > self.per_layer * self.plan.num_layers else None

    def backward(
        self, grad: Tensor, statistics: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan, verbs = self.plan, self.verbs
        raw, _ = verbs.kept("raw", saved)
        norms = self.norms_of(statistics)
        nodes: list[Tensor | None] = [verbs.enter(self.x), *[None] * plan.num_layers]

        def read(wanted: Sequence[int]) -> list[Tensor]:
            """These nodes, activated when the first weight gradient asks for them."""
            for node in wanted:
                if nodes[node] is None:
                    z, affine = raw[node - 1], norms[node - 1].affine
                    nodes[node] = verbs.normalise(z, affine, self.act, into=("node", node))
            return _live(nodes, wanted)

        grads: list[Tensor | None] = [None] * len(needs)
        reached = self.reached(self.lowest_needed(needs))
        readers = [[i for i in plan.readers[node] if i in reached] for node in reached]
        parts = [] if self.tail is None else self.tail.split(plan.output_widths, dim=1)
        weights = [[self._slice(i, node) for i in those] for node, those in zip(reached, readers, strict=True)]
        made = verbs.prepared([*weights, *([part] for part in parts)])
        weights, parts = made[: len(reached)], made[len(reached) :]
        if self.tail is None:
            incoming = self.output_gradients(grad)
        else:
            grad = verbs.arrive(grad, ("tail", grad.shape[1]))
            incoming = {
                node: verbs.gradient([grad], part, None, into=("gradient", node))[0]
                for node, part in zip(plan.outputs, parts, strict=True)
            }
            if needs[-1]:
                grads[-1] = verbs.weight_gradient(read(plan.outputs), grad, 1, like=self.tail)
        dz: list[Tensor | None] = [None] * (plan.num_layers + 1)
        for node, those, own in zip(reached, readers, weights, strict=True):
            add, into = incoming.pop(node, None), ("gradient", node)
            if node == 0:
                dx, _, _ = verbs.gradient(_live(dz, those), own, add, into=into)
                grads[0] = verbs.leave([dx])
                break
            z, norm = raw[node - 1], norms[node - 1]
            masked = (z, norm.affine, norm.mean, norm.rstd)
            g, sum_g, sum_gx = verbs.gradient(_live(dz, those), own, add, into=into, masked=masked, activation=self.act)
            terms = norm.backward_terms(self.summed(norm, paired(sum_g, sum_gx)))
            dz[node] = verbs.linear(g, z, *terms)
            first = 1 + (node - 1) * self.per_layer
            if needs[first]:
                own_weight = self.weight(node, 0)
                grads[first] = verbs.weight_gradient(read(plan.links[node - 1]), dz[node], 3, like=own_weight)
            grads[first + 1], grads[first + 2] = sum_gx, sum_g
            for source in plan.links[node - 1]:
                if plan.readers[source][0] == node:  # the last one on the way back
                    nodes[source] = None
            for reader in those:
                if min(plan.links[reader - 1]) == node:
                    dz[reader] = None
        return grads

    def _slice(self, layer: int, node: int) -> Tensor:
        """The part of a layer's weight that reads `node`."""
        sources, widths = self.plan.links[layer - 1], self.plan.node_widths
        start = sum(widths[k] for k in sources[: sources.index(node)])
        return self.weight(layer, 0)[:, start : start + widths[node]]


class _Bottleneck(_Block):
    """BN - act - Conv1x1 - BN - act - Conv3x3; parameters a layer: gamma1, beta1, W1, gamma2, beta2, W2."""

    per_layer, norms = 6, (0, 3)

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs, save = self.plan, self.verbs, self.spec.save
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        statistics = NodeStatistics(plan, self.x.device, self.wide)  # of each feature, once for all its readers
        if self._read_by_batch_norm(0):
            statistics.set(0, *self.shared(verbs.moments(nodes[0])))
        features: list[Tensor] = []
        inners: list[Tensor] = []
        first, second = self._weights()
        for i, sources in enumerate(plan.links, start=1):
            read = _live(nodes, sources)
            affine, batch = self._outer(i, first[i - 1], statistics, running), not self.fixed(i, 1)
            into = ("scratch", self.plan.bottleneck_widths[i - 1])
            if batch or save or not self.folds(self.weight(i, 2)):
                inner, found = self._inner(i, read, first[i - 1], affine, statistics=batch)
                mean, variance = self.shared(found) if batch else self.given(running, i, 1)
                normed = self.affine(self.weight(i, 2), i, 1, mean, variance, running)
                activated = verbs.normalise(inner, normed, self.act, into=into)
            else:  # inference: the second BatchNorm folded into the first weight
                inner, (mean, variance) = None, self.given(running, i, 1)
                weight, bias = self.constant(first[i - 1], i, 1, running)
                activated, _ = verbs.conv(read, weight, into=into, affine=affine, bias=bias, activation=self.act)
            self.note(mean, variance)
            wanted, drop = self._read_by_batch_norm(i), bool(self.extras.masks)
            weight = second[i - 1] if save else self.constant(second[i - 1], i)[0]
            feature, found = verbs.conv(
                [activated], weight, into=("node", i), statistics=wanted and not drop, moments=statistics.room(i)
            )
            if drop:
                self._drop(i, feature)
                found = verbs.moments(feature) if wanted else None
            if wanted:
                statistics.set(i, *self.shared(found))
            if save:
                features.append(feature)
                inners.append(inner)
            nodes.append(feature)
            self.release(nodes, i)
        made = {"node": features, "inner": inners}
        saved = [t for kind in self.spec.kinds_kept for t in verbs.keep(kind, made[kind])] if save else []
        return verbs.leave(_live(nodes, plan.outputs)), self.used, saved

    def _weights(self) -> tuple[list[Any], list[Any]]:
        """Each layer's two weights: for a pass that backward follows as `verbs.conv` takes them, else as they are.

        In front of the first stands a BatchNorm: only one over the batch's statistics comes from `affine_of_nodes`.
        """
        plan = self.plan
        first, second = ([self.weight(i, position) for i in range(1, plan.num_layers + 1)] for position in (2, 5))
        if not self.spec.save:
            return first, second
        batch = [i for i in range(plan.num_layers) if not self.fixed(i + 1, 0)]
        read = [[plan.node_widths[node] for node in plan.links[i]] for i in batch]
        made = self.verbs.prepared(
            [*(first[i] for i in batch), *second], [*read, *([width] for width in plan.bottleneck_widths)],
            [True] * len(batch) + [False] * len(second),
        )  # fmt: skip
        for i, weight in zip(batch, made, strict=False):
            first[i] = weight
        return first, list(made[len(batch) :])

    def _outer(self, layer: int, weight: Any, statistics: NodeStatistics, running: Sequence[Tensor]) -> Any:
        """The affine of a layer's first BatchNorm, in front of the convolution with `weight`; notes its statistics."""
        if self.fixed(layer, 0):
            mean, variance = self.given(running, layer, 0)
            self.note(mean, variance)
            return self.affine(weight, layer, 0, mean, variance, running)
        gamma, beta, eps = self.weight(layer, 0), self.weight(layer, 1), self.spec.eps[self.place(layer, 0)]
        affine, used = self.verbs.affine_of_nodes(weight, gamma, beta, statistics, self.plan.links[layer - 1], eps)
        self.used.append(used)
        return affine

    def _inner(self, layer: int, read: list[Tensor], weight: Any, affine: Any, statistics: bool = False) -> Any:
        """The bottleneck output of a layer, and its moments."""
        kept = self.spec.save and not self.spec.recompute
        into = ("inner", layer) if kept else ("scratch inner", self.plan.bottleneck_widths[layer - 1])
        return self.verbs.conv(read, weight, into=into, affine=affine, activation=self.act, statistics=statistics)

    def _drop(self, layer: int, pixels: Tensor) -> None:
        """Dropout of a feature, or of its gradient, in place."""
        if self.extras.masks:
            pixels.mul_(self.extras.masks[layer - 1]).mul_(1 / (1 - self.spec.drop) if self.spec.drop < 1 else 0.0)

    def _read_by_batch_norm(self, node: int) -> bool:
        return any(not self.fixed(reader, 0) for reader in self.plan.readers[node])

    def backward(
        self, grad: Tensor, statistics: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan, verbs = self.plan, self.verbs
        if self.spec.keeps_output:
            nodes, saved = verbs.nodes_of(saved[0]), saved[1:]
        else:
            nodes, saved = verbs.kept_nodes(self.x, saved)
        if self.extras.masks:
            grad = grad.clone(memory_format=torch.channels_last)  # masks apply in place, and autograd owns `grad`
        inners, _ = ([], saved) if self.spec.recompute else verbs.kept("inner", saved)
        arriving = verbs.arrive_output(grad, self.output_gradients(grad))
        norms = self.norms_of(statistics)
        outer = {layer: norms[self.place(layer, 0)] for layer in range(1, plan.num_layers + 1)}
        batch = {layer: norm for layer, norm in outer.items() if not norm.fixed}
        shares = SharedTerms(plan, batch, self.x.device, self.wide)
        grads: list[Tensor | None] = [None] * len(needs)
        lowest = max(self.lowest_needed(needs), 1)
        at_once = self._readers_at_once()
        reached = self.reached(lowest)
        second = dict(zip(reached, verbs.prepared([[self.weight(i, 5)] for i in reached]), strict=True))
        sums: list[tuple[int, list[tuple[Columns, Tensor]]]] = []  # of layers
        waiting: list[_Reader] = []  # layers of the current group whose gradient has not yet left for earlier nodes
        for i in range(plan.num_layers, lowest - 1, -1):
            self._send(waiting, (i,), nodes, arriving, shares)
            if i in arriving:  # else a dead end
                waiting.append(self._layer_backward(i, second[i], nodes, inners, arriving, shares, norms, needs, grads))
            if (plan.num_layers - i + 1) % at_once == 0 or i == lowest:
                self._send(waiting, tuple(range(i)), nodes, arriving, shares)
                sums += [(reader.layer, reader.sums) for reader in waiting]
                waiting = []
        if needs[0] and 0 in arriving:
            grads[0] = verbs.leave([shares.applied(verbs, 0, arriving[0], nodes[0])])
        for layer, parts in sums:  # small operations, behind all launches
            first = 1 + (layer - 1) * self.per_layer
            grads[first + 1], grads[first] = collected(plan, layer, parts)
        return grads

    def _layer_backward(
        self,
        i: int,
        second: Sequence[Any],
        nodes: Sequence[Tensor],
        inners: Sequence[Tensor],
        arriving: dict[int, Tensor],
        shares: SharedTerms,
        norms: Sequence[Norm],
        needs: Sequence[bool],
        grads: list[Tensor | None],
    ) -> _Reader:
        """From the gradient of layer i's feature to that of its bottleneck output, with all weights on the way.

        second: the 3x3 weight, as `verbs.gradient` takes it.
        """
        verbs, sources = self.verbs, self.plan.links[i - 1]
        read = _live(nodes, sources)
        outer, norm = (norms[self.place(i, which)] for which in (0, 1))
        dfeature = shares.applied(verbs, i, arriving.pop(i), nodes[i])
        self._drop(i, dfeature)
        inner = self._inner(i, read, self.weight(i, 2), outer.affine)[0] if self.spec.recompute else inners[i - 1]
        first = 1 + (i - 1) * self.per_layer
        if needs[first + 5]:
            grads[first + 5] = verbs.weight_gradient(
                [inner], dfeature, 3, affine=norm.affine, activation=self.act, like=self.weight(i, 5)
            )
        masked = (inner, norm.affine, norm.mean, norm.rstd)
        into = ("waiting", i % self._readers_at_once())
        g, sum_g, sum_gx = verbs.gradient([dfeature], second, None, into=into, masked=masked, activation=self.act)
        terms = norm.backward_terms(self.summed(norm, paired(sum_g, sum_gx)))
        dinner = verbs.linear(g, inner, *terms)
        grads[first + 3], grads[first + 4] = sum_gx, sum_g
        if needs[first + 2]:
            grads[first + 2] = verbs.weight_gradient(
                read, dinner, 1, affine=outer.affine, activation=self.act, like=self.weight(i, 2)
            )
        return _Reader(i, dinner, self.weight(i, 2), outer, [])

    def _readers_at_once(self) -> int:
        """Readers whose gradients one launch gathers: they must agree on the statistics of what they read."""
        fixed = any(self.fixed(i, 0) for i in range(1, self.plan.num_layers + 1))
        alike = len(set(self.spec.eps[::2])) == 1 and len(set(self.plan.bottleneck_widths)) == 1
        return self.verbs.readers_at_once if alike and not fixed else 1

    def _send(
        self,
        waiting: Sequence[_Reader],
        targets: Sequence[int],
        nodes: Sequence[Tensor],
        arriving: dict[int, Tensor],
        shares: SharedTerms,
    ) -> None:
        """Send the readers' gradients to those of the nodes `targets` that they read, and note BatchNorm's sums."""
        plan = self.plan
        readers = [r for r in waiting if not set(targets).isdisjoint(plan.links[r.layer - 1])]
        if not readers:
            return
        reached = set(targets).intersection(*[set().union(*(plan.links[r.layer - 1] for r in readers))])
        # a reader alone is served in its own order, which leaves its weight as it is
        order = plan.links[readers[0].layer - 1] if len(readers) == 1 else sorted(reached)
        to = tuple(node for node in order if node in reached)
        over = [Columns(plan, r.layer, to, self.x.device) for r in readers]
        norms = [columns.norm(r.norm) for r, columns in zip(readers, over, strict=True)]
        # the sums of other ranks come in between, and readers with given statistics go alone
        terms = None if self.spec.group else shares.terms(to, norms)
        sent, sum_g, sum_gx = self.verbs.send(
            [r.dz for r in readers], [c.weight(r.weight) for r, c in zip(readers, over, strict=True)],
            to, _live(nodes, to), norms, shared_statistics(over, norms), [arriving.get(node) for node in to], self.act,
            terms,
        )  # fmt: skip
        arriving.update(zip(to, sent, strict=True))
        for r, columns, norm, *found in zip(readers, over, norms, sum_g, sum_gx, strict=True):
            sums = paired(*found)
            r.sums.append((columns, sums))
            if not norm.fixed and terms is None:
                shares.add(to, norm, self.summed(norm, sums))


class _Reader(NamedTuple):
    """A layer's 1x1 convolution on its way back: the gradient of its output, its weight, the BatchNorm before it.

    sums: of g and g xhat over the channels that it has sent to so far.
    """

    layer: int
    dz: Tensor
    weight: Tensor
    norm: Norm
    sums: list[tuple[Columns, Tensor]]
