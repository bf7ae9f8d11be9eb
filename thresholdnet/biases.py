"""Biases of a block's convolutions, of which the engine knows nothing: shifts of BatchNorms and of the output.

BatchNorm of z + b is that of z where the batch's statistics count, whose mean alone is b more. With given statistics

    gamma (z + b - mean) rstd + beta = gamma (z - mean) rstd + (beta + gamma rstd b)

A bias of a raw feature stands in front of the BatchNorm of everyone who reads it, and in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plan import BlockPlan


def has_biases(units: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether a convolution of these layers has one."""
    return any(module._parameters.get("bias") is not None for unit in units for module in unit if _convolves(module))


class Biases:
    """What the biases of a call's layers do.

    Attributes:
        of_norms: per BatchNorm in forward order what was added to what it reads, [C]; None for nothing.
        of_output: the same for the block's output.
        betas: of the BatchNorms, as the engine is to take them.
    """

    def __init__(
        self, plan: BlockPlan, units: Sequence[Sequence[nn.Module]], norms: Sequence[Any], fixed: Sequence[bool],
        betas: Sequence[Tensor],
    ):  # fmt: skip
        """fixed: per BatchNorm, whether it has given statistics; betas: of the BatchNorms."""
        own = [[module._parameters.get("bias") for module in unit if _convolves(module)] for unit in units]
        self.of_norms: list[Tensor | None] = []
        self.of_output: Tensor | None = None
        if plan.pre_activation:
            features = [None, *(biases[-1] for biases in own)]  # of every node
            for sources, biases in zip(plan.links, own, strict=True):
                self.of_norms += [_joined(plan, features, sources), *biases[:-1]]
            self.of_output = _joined(plan, features, plan.outputs)
        else:
            self.of_norms = [bias for (bias,) in own]
        self.betas = [
            beta if bias is None else _shifted(norm, given, beta, bias)
            for norm, given, beta, bias in zip(norms, fixed, betas, self.of_norms, strict=True)
        ]

    def noted(self, statistics: Sequence[Tensor]) -> list[Tensor]:
        """The statistics [2, C] that the BatchNorms had, from those that the engine saw."""
        return [
            used if bias is None else torch.stack([used[0] + bias.detach(), used[1]])
            for used, bias in zip(statistics, self.of_norms, strict=True)
        ]

    def output(self, y: Tensor) -> Tensor:
        """The block's output."""
        return y if self.of_output is None else y + self.of_output.to(y.dtype)[:, None, None]


def _shifted(norm: Any, given: bool, beta: Tensor, bias: Tensor) -> Tensor:
    if not given:
        return beta + 0 * bias  # which has a gradient, of zeros
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    return (beta + scale * bias).to(beta.dtype)


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _joined(plan: BlockPlan, features: Sequence[Tensor | None], nodes: Sequence[int]) -> Tensor | None:
    """The nodes' biases side by side, zeros for one that has none; None where all are so."""
    like = next((bias for node in nodes if (bias := features[node]) is not None), None)
    if like is None:
        return None
    parts = [(node, features[node]) for node in nodes]
    return torch.cat([like.new_zeros(plan.node_widths[node]) if bias is None else bias for node, bias in parts])
