"""What the engine takes of the modules inside a block: their tensors and options, in forward order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import packing
from .pixels import CONVOLUTIONS

_STATISTICS = ("running_mean", "running_var")


class Operands:
    """Of the units of a block, see `LinkedBlock._units`.

    Attributes:
        norms: the BatchNorms.
        fixed: per BatchNorm, whether it normalises with given statistics.
        eps: of the BatchNorms.
        running: mean and variance of every BatchNorm, None where it has none.
        weights: of the convolutions.
        own: the modules hold all of it, as parameters, buffers and attributes: nothing is made or computed for a call.
    """

    def __init__(self, units: Sequence[Sequence[nn.Module]]):
        modules = [module for unit in units for module in unit]
        convolutions: list[Any] = [module for module in modules if isinstance(module, CONVOLUTIONS)]
        self.norms: list[Any] = [module for module in modules if isinstance(module, _BatchNorm)]
        self.fixed = [not norm.training and norm.running_mean is not None for norm in self.norms]
        self.eps = [norm.eps for norm in self.norms]
        self.running = [tensor for norm in self.norms for tensor in (norm.running_mean, norm.running_var)]
        self._units = units
        self._weights = {id(conv): conv.weight for conv in convolutions}  # once: a parametrization computes it
        self.weights: list[Tensor] = [*self._weights.values()]
        self._as_they_are = self._in_order(self._weights, None)
        self.own = _held(units, self.norms, self._as_they_are)

    def parameters(self, dtype: torch.dtype | None, betas: Sequence[Tensor] | None = None) -> list[Tensor]:
        """All parameters as the engine takes them, ones and zeros for an affine or a bias that is not there.

        Args:
            dtype: of the weights; None for what they have.
            betas: in the place of the BatchNorms' biases.
        """
        weights = self._weights
        if dtype is not None and any(weight.dtype != dtype for weight in self.weights):
            weights = {number: packing.cast(weight, dtype) for number, weight in self._weights.items()}
        elif betas is None:
            return self._as_they_are
        return self._in_order(weights, betas)

    def _in_order(self, weights: dict[int, Tensor], betas: Sequence[Tensor] | None) -> list[Tensor]:
        shifts = iter([norm.bias for norm in self.norms] if betas is None else betas)
        like = next(iter(weights.values()))
        made: list[Tensor] = []
        for unit in self._units:
            for module in unit:
                if isinstance(module, CONVOLUTIONS):
                    made.append(weights[id(module)])
                    if len(unit) == 1:  # no BatchNorm is there to take the bias in
                        bias = module.bias
                        made.append(like.new_zeros(module.out_channels) if bias is None else bias)
                elif isinstance(module, _BatchNorm):
                    scale, shift = module.weight, next(shifts)
                    made.append(like.new_ones(module.num_features) if scale is None else scale)
                    made.append(or_zeros(module, like) if shift is None else shift)
        return made


def _held(units: Sequence[Sequence[nn.Module]], norms: Sequence[Any], parameters: Sequence[Tensor]) -> bool:
    """Whether modules hold what was read of them: another class may make it."""
    held = [
        module._parameters.get(name)
        for unit in units
        for module in unit
        for name in ("weight", "bias")
        if name == "weight" or len(unit) == 1 or isinstance(module, _BatchNorm)
    ]
    return (
        all(isinstance(own, nn.Parameter) and own is read for own, read in zip(held, parameters, strict=True))
        and all("eps" in vars(norm) for norm in norms)
        and all(norm._buffers.get(name) is getattr(norm, name) for norm in norms for name in _STATISTICS)
    )


def or_zeros(norm: _BatchNorm, like: Tensor) -> Tensor:
    """A BatchNorm's beta, zeros where it has none."""
    return like.new_zeros(norm.num_features) if norm.bias is None else norm.bias
