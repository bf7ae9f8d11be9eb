"""Bottleneck layers, forward and backward: BN - act - Conv1x1 - BN - act - Conv3x3.

Node i is the raw feature f_i; its readers r normalise it each with an affine of their own over statistics that all of
them share: a_r = act(f * s_r + t_r), z_r = W1_r a_r, f_r = W2_r act(z_r * scale_r + shift_r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batchnorm import Columns, NodeStatistics, Norm, SharedTerms, collected, paired, shared_statistics
from .call import Block, live


class Bottleneck(Block):
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
            read = live(nodes, sources)
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
        return verbs.leave(live(nodes, plan.outputs)), self.used, saved

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
        waiting: list[Reader] = []  # layers of the current group whose gradient has not yet left for earlier nodes
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
    ) -> Reader:
        """From the gradient of layer i's feature to that of its bottleneck output, with all weights on the way.

        second: the 3x3 weight, as `verbs.gradient` takes it.
        """
        verbs, sources = self.verbs, self.plan.links[i - 1]
        read = live(nodes, sources)
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
        return Reader(i, dinner, self.weight(i, 2), outer, [])

    def _readers_at_once(self) -> int:
        """Readers whose gradients one launch gathers: they must agree on the statistics of what they read."""
        fixed = any(self.fixed(i, 0) for i in range(1, self.plan.num_layers + 1))
        alike = len(set(self.spec.eps[::2])) == 1 and len(set(self.plan.bottleneck_widths)) == 1
        return self.verbs.readers_at_once if alike and not fixed else 1

    def _send(
        self,
        waiting: Sequence[Reader],
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
            to, live(nodes, to), norms, shared_statistics(over, norms), [arriving.get(node) for node in to], self.act,
            terms,
        )  # fmt: skip
        arriving.update(zip(to, sent, strict=True))
        for r, columns, norm, *found in zip(readers, over, norms, sum_g, sum_gx, strict=True):
            sums = paired(*found)
            r.sums.append((columns, sums))
            if not norm.fixed and terms is None:
                shares.add(to, norm, self.summed(norm, sums))


class Reader(NamedTuple):
    """A layer's 1x1 convolution on its way back: the gradient of its output, its weight, the BatchNorm before it.

    sums: of g and g xhat over the channels that it has sent to so far.
    """

    layer: int
    dz: Tensor
    weight: Tensor
    norm: Norm
    sums: list[tuple[Columns, Tensor]]
