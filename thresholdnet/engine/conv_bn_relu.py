"""Layers of one convolution, forward and backward: Conv3x3 - BN - act.

y_i = act(z_i * scale_i + shift_i) is node i, z_i its raw convolution output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batchnorm import paired
from .call import Block, live


class ConvBNReLU(Block):
    """Conv3x3 - BN - act; parameters a layer: weight, gamma, beta."""

    per_layer, norms = 3, (1,)

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs = self.plan, self.verbs
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        raw: list[Tensor] = []
        whole = self._whole_weights()
        for i, sources in enumerate(plan.links, start=1):
            read, weight, fixed = live(nodes, sources), self.weight(i, 0), self.fixed(i, 0)
            dilation = plan.dilation(i)
            if i not in whole:  # inference: BatchNorm folded into the weight
                mean, variance = self.given(running, i, 0)
                weight, bias = self.constant(weight, i, 0, running)
                y, _ = verbs.conv(read, weight, into=("node", i), bias=bias, activation=self.act, dilation=dilation)
            else:
                z, moments = verbs.conv(read, whole[i], into=("raw", i), statistics=not fixed, dilation=dilation)
                mean, variance = self.given(running, i, 0) if fixed else self.shared(moments)
                y = verbs.normalise(z, self.affine(weight, i, 0, mean, variance, running), self.act, into=("node", i))
                if self.spec.save:
                    raw.append(z)
            self.note(mean, variance)
            nodes.append(y)
            self.release(nodes, i)
        out = live(nodes, plan.outputs)
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
        dilations = [plan.dilation(i) if i else 1 for i in layers]
        return dict(zip(layers, self.verbs.prepared(weights, read, dilations=dilations), strict=True))

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
            return live(nodes, wanted)

        grads: list[Tensor | None] = [None] * len(needs)
        reached = self.reached(self.lowest_needed(needs))
        readers, parts = self.readers_of(
            reached, [] if self.tail is None else self.tail.split(plan.output_widths, dim=1)
        )
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
        for node, those in zip(reached, readers, strict=True):
            add, into = incoming.pop(node, None), ("gradient", node)
            if node == 0:
                dx, _, _ = self.gradient(those, dz, add, into=into)
                grads[0] = verbs.leave([dx])
                break
            z, norm = raw[node - 1], norms[node - 1]
            masked = (z, norm.affine, norm.mean, norm.rstd)
            g, sum_g, sum_gx = self.gradient(those, dz, add, into=into, masked=masked)
            terms = norm.backward_terms(self.summed(norm, paired(sum_g, sum_gx)))
            dz[node] = verbs.linear(g, z, *terms)
            first = 1 + (node - 1) * self.per_layer
            if needs[first]:
                own_weight = self.weight(node, 0)
                grads[first] = verbs.weight_gradient(
                    read(plan.links[node - 1]), dz[node], plan.kernel_size, like=own_weight,
                    dilation=plan.dilation(node),
                )  # fmt: skip
            grads[first + 1], grads[first + 2] = sum_gx, sum_g
            for source in plan.links[node - 1]:
                if plan.readers[source][0] == node:  # the last one on the way back
                    nodes[source] = None
            for reader in plan.readers[node]:
                if min(plan.links[reader - 1]) == node:
                    dz[reader] = None
        return grads
