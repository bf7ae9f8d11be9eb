"""What blocks of pre-activation layers share, whose BatchNorm stands in front of their convolutions.

Node i is the raw feature f_i; its readers r normalise it each with an affine of their own over statistics that all of
them share: a_r = act(f * s_r + t_r). What they do with a_r is a subclass's; a bias b_r is added to f_r, which may be
dropped then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batchnorm import Columns, NodeStatistics, Norm, SharedTerms, collected, paired, shared_statistics
from .call import Block, live


class Features(Block):
    """A block whose nodes are raw features; the first parameters of every layer are gamma and beta over what it reads.

    A subclass makes the features of a layer (`layer_forward`), and on the way back what their readers send
    (`layer_backward`), behind `begin_backward`. Behind the parameters of all layers may stand a bias [C] for each one's
    feature.
    """

    @property
    def biases(self) -> Sequence[Tensor]:
        """Of every layer's feature, or none."""
        return self.parameters[self.per_layer * self.plan.num_layers :]

    def layer_of(self, place: int) -> int:
        """See `Block.layer_of`: a bias belongs to its layer."""
        bias = place - self.per_layer * self.plan.num_layers
        return super().layer_of(place) if bias < 0 else bias + 1

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs, save = self.plan, self.verbs, self.spec.save
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        statistics = NodeStatistics(plan, self.x.device, self.wide)  # of each feature, once for all its readers
        if self._read_by_batch_norm(0):
            statistics.set(0, *self.shared(verbs.moments(nodes[0])))
        made: dict[str, list[Tensor]] = {"node": [], "inner": []}
        weights = self.forward_weights()
        for i, sources in enumerate(plan.links, start=1):
            wanted, drop = self._read_by_batch_norm(i), bool(self.extras.masks)
            feature, found = self.layer_forward(
                i, live(nodes, sources), weights, statistics, running, wanted and not drop, made["inner"]
            )
            if self.biases:
                bias = self.biases[i - 1].to(self.wide)
                feature.add_(bias.to(feature.dtype)[:, None, None])
                found = found and (found[0] + bias, found[1])
            if drop:
                self.drop(i, feature)
                found = verbs.moments(feature) if wanted else None
            if wanted:
                statistics.set(i, *self.shared(found))
            if save:
                made["node"].append(feature)
            nodes.append(feature)
            self.release(nodes, i)
        saved = [t for kind in self.spec.kinds_kept for t in verbs.keep(kind, made[kind])] if save else []
        return verbs.leave(live(nodes, plan.outputs)), self.used, saved

    def forward_weights(self) -> Any:
        """What `layer_forward` takes of all layers' weights."""
        raise NotImplementedError

    def layer_forward(
        self, i: int, read: list[Tensor], weights: Any, statistics: NodeStatistics, running: Sequence[Tensor],
        wanted: bool, inners: list[Tensor],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The feature of layer i, and its moments where they are `wanted`; adds to `inners` what backward needs too."""
        raise NotImplementedError

    def prepared_behind_norms(self, first: Sequence[Any], others: Sequence[Any] = ()) -> list[Any]:
        """`verbs.prepared` weights behind each layer's first BatchNorm, and `others` that read a bottleneck.

        Of the former only one behind a BatchNorm over the batch's statistics: it comes from `affine_of_nodes`.
        """
        plan = self.plan
        batch = [i for i in range(plan.num_layers) if not self.fixed(i + 1, 0)]
        read = [[plan.node_widths[node] for node in plan.links[i]] for i in batch]
        made = self.verbs.prepared(
            [*(first[i] for i in batch), *others], [*read, *([width] for width in plan.bottleneck_widths)],
            [True] * len(batch) + [False] * len(others),
            [plan.dilation(i + 1) for i in (*batch, *range(len(others)))],
        )  # fmt: skip
        whole = [*first, *made[len(batch) :]]
        for i, weight in zip(batch, made, strict=False):
            whole[i] = weight
        return whole

    def outer_affine(self, layer: int, weight: Any, statistics: NodeStatistics, running: Sequence[Tensor]) -> Any:
        """The affine of a layer's first BatchNorm, in front of the convolution with `weight`; notes its statistics."""
        if self.fixed(layer, 0):
            mean, variance = self.given(running, layer, 0)
            self.note(mean, variance)
            return self.affine(weight, layer, 0, mean, variance, running)
        gamma, beta, eps = self.weight(layer, 0), self.weight(layer, 1), self.spec.eps[self.place(layer, 0)]
        affine, used = self.verbs.affine_of_nodes(weight, gamma, beta, statistics, self.plan.links[layer - 1], eps)
        self.used.append(used)
        return affine

    def drop(self, layer: int, pixels: Tensor) -> None:
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
        arriving = verbs.arrive_output(grad, self.output_gradients(grad))
        norms = self.norms_of(statistics)
        outer = {layer: norms[self.place(layer, 0)] for layer in range(1, plan.num_layers + 1)}
        batch = {layer: norm for layer, norm in outer.items() if not norm.fixed}
        shares = SharedTerms(plan, batch, self.x.device, self.wide)
        grads: list[Tensor | None] = [None] * len(needs)
        lowest = max(self.lowest_needed(needs), 1)
        at_once = self.readers_at_once()
        self.begin_backward(saved, self.reached(lowest))
        sums: list[tuple[int, list[tuple[Columns, Tensor]]]] = []  # of layers
        waiting: list[Reader] = []  # layers of the current group whose gradient has not yet left for earlier nodes
        for i in range(plan.num_layers, lowest - 1, -1):
            self._send(waiting, (i,), nodes, arriving, shares)
            if i in arriving:  # else a dead end
                dfeature = shares.applied(verbs, i, arriving.pop(i), nodes[i])
                self.drop(i, dfeature)
                if self.biases and needs[bias := 1 + self.per_layer * plan.num_layers + i - 1]:
                    grads[bias] = dfeature.sum((0, 2, 3), dtype=self.wide)
                waiting.append(self.layer_backward(i, dfeature, live(nodes, plan.links[i - 1]), norms, needs, grads))
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

    def begin_backward(self, saved: Sequence[Tensor], reached: Sequence[int]) -> None:
        """Take up what was saved beside the features; `reached`: layers that a gradient reaches."""
        raise NotImplementedError

    def layer_backward(
        self, i: int, dfeature: Tensor, read: list[Tensor], norms: Sequence[Norm], needs: Sequence[bool],
        grads: list[Tensor | None],
    ) -> Reader:  # fmt: skip
        """From the gradient of layer i's feature to that of the convolution that reads, and of the weights between."""
        raise NotImplementedError

    def readers_at_once(self) -> int:
        """Readers whose gradients one launch gathers: they must agree on the statistics of what they read."""
        fixed = any(self.fixed(i, 0) for i in range(1, self.plan.num_layers + 1))
        sent = self.plan.bottleneck_widths or self.plan.widths
        dilations = {1} if self.plan.unit == "bottleneck" else {*self.plan.dilations}  # of what reads
        alike = len(set(self.spec.eps[:: len(self.norms)])) == 1 and len(set(sent)) == 1 and len(dilations) <= 1
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
            terms, readers[0].dilation,
        )  # fmt: skip
        arriving.update(zip(to, sent, strict=True))
        for r, columns, norm, *found in zip(readers, over, norms, sum_g, sum_gx, strict=True):
            sums = paired(*found)
            r.sums.append((columns, sums))
            if not norm.fixed and terms is None:
                shares.add(to, norm, self.summed(norm, sums))


class Reader(NamedTuple):
    """A convolution that reads features, on its way back: the gradient of its output, its weight, the BatchNorm before.

    sums: of g and g xhat over the channels that it has sent to so far. dilation: that of all readers sent together.
    """

    layer: int
    dz: Tensor
    weight: Tensor
    norm: Norm
    sums: list[tuple[Columns, Tensor]]
    dilation: int = 1
