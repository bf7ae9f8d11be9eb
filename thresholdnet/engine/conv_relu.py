"""Layers of one convolution without BatchNorm, forward and backward: Conv3x3 + bias - act.

y_i = act(z_i + b_i) is node i. Backward needs nothing but the nodes: where the activation passes a gradient on can be
seen in y as well as in z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..constants import device_constant
from .call import Block, live


class ConvReLU(Block):
    """Conv3x3 + bias - act; parameters a layer: weight, bias."""

    per_layer, norms = 2, ()

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs, save = self.plan, self.verbs, self.spec.save
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        made: list[Tensor] = []
        whole = self._whole_weights() if save else []
        for i, sources in enumerate(plan.links, start=1):
            weight = whole[i - 1] if save else self.constant(self.weight(i, 0), i)[0]
            bias = self.weight(i, 1).to(self.wide)
            y, _ = verbs.conv(
                live(nodes, sources), weight, into=("node", i), bias=bias, activation=self.act,
                dilation=plan.dilation(i),
            )  # fmt: skip
            if save:
                made.append(y)
            nodes.append(y)
            self.release(nodes, i)
        saved = [t for kind in self.spec.kinds_kept for t in verbs.keep(kind, made)] if save else []
        return verbs.leave(live(nodes, plan.outputs)), [], saved

    def _whole_weights(self) -> Sequence[Tensor]:
        """All weights as `verbs.conv` takes them."""
        plan = self.plan
        weights = [self.weight(i, 0) for i in range(1, plan.num_layers + 1)]
        made: Sequence[Tensor] = self.verbs.prepared(
            weights, [[plan.node_widths[node] for node in read] for read in plan.links], dilations=plan.dilations
        )
        return made

    def backward(
        self, grad: Tensor, statistics: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan, verbs = self.plan, self.verbs
        nodes, _ = (verbs.nodes_of(saved[0]), ()) if self.spec.keeps_output else verbs.kept_nodes(self.x, saved)
        grads: list[Tensor | None] = [None] * len(needs)
        reached = self.reached(self.lowest_needed(needs))
        readers, _ = self.readers_of(reached)
        incoming = verbs.arrive_output(grad, self.output_gradients(grad))
        ones, zeros = _ones_and_zeros(max(plan.widths), self.wide, self.x.device)
        dz: list[Tensor | None] = [None] * (plan.num_layers + 1)
        for node, those in zip(reached, readers, strict=True):
            add, into = incoming.pop(node, None), ("gradient", node)
            if node == 0:
                dx, _, _ = self.gradient(those, dz, add, into=into)
                grads[0] = verbs.leave([dx])
                break
            one, zero = ones[: plan.node_widths[node]], zeros[: plan.node_widths[node]]
            masked = (nodes[node], (one, zero), zero, one)  # the mask of y itself: no BatchNorm in front of it
            dz[node], sums, _ = self.gradient(those, dz, add, into=into, masked=masked)
            first = 1 + (node - 1) * self.per_layer
            if needs[first]:
                read = live(nodes, plan.links[node - 1])
                grads[first] = verbs.weight_gradient(
                    read, dz[node], plan.kernel_size, like=self.weight(node, 0), dilation=plan.dilation(node)
                )
            grads[first + 1] = sums
            for reader in plan.readers[node]:
                if min(plan.links[reader - 1]) == node:
                    dz[reader] = None
        return grads


@device_constant(maxsize=64)
def _ones_and_zeros(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An affine that leaves values as they are, [2, C]."""
    return torch.tensor([[1.0] * channels, [0.0] * channels], dtype=dtype, device=device)
