"""BN - act - Conv3x3 layers, forward and backward: DenseNet's before it had bottlenecks.

f_r = W_r a_r with a_r as in `features.py`. Backward needs nothing but the features, which the output holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batchnorm import NodeStatistics, Norm
from .features import Features, Reader


class BNReLUConv(Features):
    """BN - act - Conv3x3; parameters a layer: gamma, beta, weight."""

    per_layer, norms = 3, (0,)

    def forward_weights(self) -> list[Any]:
        """All weights: for a pass that backward follows as `verbs.conv` takes them."""
        weights = [self.weight(i, 2) for i in range(1, self.plan.num_layers + 1)]
        return self.prepared_behind_norms(weights) if self.spec.save else weights

    def layer_forward(
        self, i: int, read: list[Tensor], weights: Any, statistics: NodeStatistics, running: Sequence[Tensor],
        wanted: bool, inners: list[Tensor],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """See `Features.layer_forward`."""
        affine = self.outer_affine(i, weights[i - 1], statistics, running)
        weight = weights[i - 1] if self.spec.save else self.constant(weights[i - 1], i)[0]
        feature: Tensor
        feature, found = self.verbs.conv(
            read, weight, into=("node", i), affine=affine, activation=self.act, statistics=wanted,
            moments=statistics.room(i), dilation=self.plan.dilation(i),
        )  # fmt: skip
        return feature, found

    def begin_backward(self, saved: Sequence[Tensor], reached: Sequence[int]) -> None:
        """Nothing was saved beside the features."""

    def layer_backward(
        self, i: int, dfeature: Tensor, read: list[Tensor], norms: Sequence[Norm], needs: Sequence[bool],
        grads: list[Tensor | None],
    ) -> Reader:  # fmt: skip
        """See `Features.layer_backward`: the convolution that reads is the one that made the feature."""
        outer, own, place = norms[self.place(i, 0)], self.weight(i, 2), 1 + (i - 1) * self.per_layer + 2
        if needs[place]:
            grads[place] = self.verbs.weight_gradient(
                read, dfeature, self.plan.kernel_size, affine=outer.affine, activation=self.act, like=own,
                dilation=self.plan.dilation(i),
            )  # fmt: skip
        return Reader(i, dfeature, own, outer, [], self.plan.dilation(i))
