"""Bottleneck layers, forward and backward: BN - act - Conv1x1 - BN - act - Conv3x3.

z_r = W1_r a_r with a_r as in `features.py`, f_r = W2_r act(z_r * scale_r + shift_r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batchnorm import NodeStatistics, Norm, paired
from .features import Features, Reader


class Bottleneck(Features):
    """BN - act - Conv1x1 - BN - act - Conv3x3; parameters a layer: gamma1, beta1, W1, gamma2, beta2, W2."""

    per_layer, norms = 6, (0, 3)

    def forward_weights(self) -> list[Any]:
        """All first weights, then all second ones: for a pass that backward follows as `verbs.conv` takes them."""
        first, second = ([self.weight(i, at) for i in range(1, self.plan.num_layers + 1)] for at in (2, 5))
        return self.prepared_behind_norms(first, second) if self.spec.save else [*first, *second]

    def layer_forward(
        self, i: int, read: list[Tensor], weights: Any, statistics: NodeStatistics, running: Sequence[Tensor],
        wanted: bool, inners: list[Tensor],
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """See `Features.layer_forward`."""
        verbs, save = self.verbs, self.spec.save
        first, second = weights[i - 1], weights[self.plan.num_layers + i - 1]
        affine, batch = self.outer_affine(i, first, statistics, running), not self.fixed(i, 1)
        into = ("scratch", self.plan.bottleneck_widths[i - 1])
        if batch or save or not self.folds(self.weight(i, 2)):
            inner, found = self._inner(i, read, first, affine, statistics=batch)
            mean, variance = self.shared(found) if batch else self.given(running, i, 1)
            normed = self.affine(self.weight(i, 2), i, 1, mean, variance, running)
            activated = verbs.normalise(inner, normed, self.act, into=into)
            if save:
                inners.append(inner)
        else:  # inference: the second BatchNorm folded into the first weight
            mean, variance = self.given(running, i, 1)
            weight, bias = self.constant(first, i, 1, running)
            activated, _ = verbs.conv(read, weight, into=into, affine=affine, bias=bias, activation=self.act)
        self.note(mean, variance)
        weight = second if save else self.constant(second, i)[0]
        feature: Tensor
        feature, found = verbs.conv(
            [activated], weight, into=("node", i), statistics=wanted, moments=statistics.room(i),
            dilation=self.plan.dilation(i),
        )  # fmt: skip
        return feature, found

    def _inner(self, layer: int, read: list[Tensor], weight: Any, affine: Any, statistics: bool = False) -> Any:
        """The bottleneck output of a layer, and its moments."""
        kept = self.spec.save and not self.spec.recompute
        into = ("inner", layer) if kept else ("scratch inner", self.plan.bottleneck_widths[layer - 1])
        return self.verbs.conv(read, weight, into=into, affine=affine, activation=self.act, statistics=statistics)

    def begin_backward(self, saved: Sequence[Tensor], reached: Sequence[int]) -> None:
        """See `Features.begin_backward`."""
        verbs = self.verbs
        self._inners, _ = ([], saved) if self.spec.recompute else verbs.kept("inner", saved)
        second = verbs.prepared(
            [[self.weight(i, 5)] for i in reached], dilations=[self.plan.dilation(i) for i in reached]
        )
        self._second = dict(zip(reached, second, strict=True))  # the 3x3 weights, as `verbs.gradient` takes them

    def layer_backward(
        self, i: int, dfeature: Tensor, read: list[Tensor], norms: Sequence[Norm], needs: Sequence[bool],
        grads: list[Tensor | None],
    ) -> Reader:  # fmt: skip
        """See `Features.layer_backward`: to the gradient of the bottleneck output."""
        verbs = self.verbs
        outer, norm = (norms[self.place(i, which)] for which in (0, 1))
        inner = self._inner(i, read, self.weight(i, 2), outer.affine)[0] if self.spec.recompute else self._inners[i - 1]
        first = 1 + (i - 1) * self.per_layer
        if needs[first + 5]:
            grads[first + 5] = verbs.weight_gradient(
                [inner], dfeature, self.plan.kernel_size, affine=norm.affine, activation=self.act,
                like=self.weight(i, 5), dilation=self.plan.dilation(i),
            )  # fmt: skip
        masked = (inner, norm.affine, norm.mean, norm.rstd)
        into = ("waiting", i % self.readers_at_once())
        g, sum_g, sum_gx = verbs.gradient(
            [dfeature], self._second[i], None, into=into, masked=masked, activation=self.act,
            dilation=self.plan.dilation(i),
        )  # fmt: skip
        terms = norm.backward_terms(self.summed(norm, paired(sum_g, sum_gx)))
        dinner = verbs.linear(g, inner, *terms)
        grads[first + 3], grads[first + 4] = sum_gx, sum_g
        if needs[first + 2]:
            grads[first + 2] = verbs.weight_gradient(
                read, dinner, 1, affine=outer.affine, activation=self.act, like=self.weight(i, 2)
            )
        return Reader(i, dinner, self.weight(i, 2), outer, [])
