"""Biases of a block's convolutions: those of features go to the engine, the others shift the BatchNorms behind them.

BatchNorm of z + b is that of z where the batch's statistics count, whose mean alone is b more. With given statistics

    gamma (z + b - mean) rstd + beta = gamma (z - mean) rstd + (beta + gamma rstd b)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pixels import CONVOLUTIONS
from .plan import BlockPlan


def has_biases(units: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether a convolution of these layers has one."""
    return any(module._parameters.get("bias") is not None for unit in units for module in unit if _convolves(module))


class Biases:
    """What the biases of a call's layers do.

    Attributes:
        of_norms: per BatchNorm in forward order what was added to what it reads, [C]; None for nothing that the engine
            does not add itself.
        of_features: of every layer's feature, as the engine takes them, zeros where it has none; empty for none at all.
        betas: of the BatchNorms, as the engine is to take them.
    """

    def __init__(
        self, plan: BlockPlan, units: Sequence[Sequence[nn.Module]], norms: Sequence[Any], fixed: Sequence[bool],
        betas: Sequence[Tensor],
    ):  # fmt: skip
        """fixed: per BatchNorm, whether it has given statistics; betas: of the BatchNorms."""
        own = [[module._parameters.get("bias") for module in unit if _convolves(module)] for unit in units]
        self.of_norms: list[Tensor | None] = []
        self.of_features: list[Tensor] = []
        if plan.pre_activation:
            for inner in own:
                self.of_norms += [None, *inner[:-1]]
            if any(inner[-1] is not None for inner in own):
                like = betas[0]
                self.of_features = [
                    like.new_zeros(width) if bias is None else bias
                    for width, (*_, bias) in zip(plan.widths, own, strict=True)
                ]
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


def _shifted(norm: Any, given: bool, beta: Tensor, bias: Tensor) -> Tensor:
    if not given:
        return beta + 0 * bias  # which has a gradient, of zeros
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    return (beta + scale * bias).to(beta.dtype)


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS)
