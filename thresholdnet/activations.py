"""Activations: their names, their modules, and the one number that tells kernels which it is.

    0 none    1 ReLU    2 ReLU6    between 0 and 1 LeakyReLU: the slope below zero

Names are "relu", "relu6" and "leaky_relu(SLOPE)", as "leaky_relu(0.2)".
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of

CLASSES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
"""The modules whose activations the engine has."""

_NUMBERS: dict[str | None, int] = {None: 0, "relu": 1, "relu6": 2}
_LEAKY = re.compile(r"leaky_relu\((.+)\)")


@lru_cache(maxsize=256)
def number(name: str | None) -> int | float:
    """Which it is; ValueError for an unknown name."""
    if name in _NUMBERS:
        return _NUMBERS[name]
    leaky = _LEAKY.fullmatch(name) if isinstance(name, str) else None
    try:
        slope = float(leaky[1]) if leaky else 0.0
    except ValueError:
        slope = 0.0
    if not 0 < slope < 1:
        raise ValueError(
            f"activation must be 'relu', 'relu6', 'leaky_relu(SLOPE)' with 0 < SLOPE < 1, or None, got {name!r}"
        )
    return slope


def checked(argument: str, name: object) -> str:
    """The name as the engine has it: "leaky_relu" alone has torch's slope of 0.01. TypeError, ValueError for others."""
    if isinstance(name, str) and name.startswith("leaky_relu"):
        try:
            return leaky_relu(number(name if "(" in name else f"{name}(0.01)"))
        except ValueError:
            raise ValueError(f"{argument} must be leaky_relu(SLOPE) with 0 < SLOPE < 1, got {name!r}") from None
    return one_of(argument, name, ("relu", "relu6", "leaky_relu"))


def leaky_relu(slope: float) -> str:
    """The name of LeakyReLU with this slope."""
    return f"leaky_relu({slope!r})"


def module(name: str) -> nn.Module:
    """A module that computes it, in place."""
    if name in _NUMBERS:
        return nn.ReLU6(inplace=True) if name == "relu6" else nn.ReLU(inplace=True)
    return nn.LeakyReLU(number(name), inplace=True)


def name_of(module: object) -> str | None:
    """The name of what a module computes; None where the engine has no such activation."""
    if type(module) is nn.LeakyReLU:
        slope = module.negative_slope
        return leaky_relu(float(slope)) if 0 < slope < 1 else None
    return "relu" if type(module) is nn.ReLU else "relu6" if type(module) is nn.ReLU6 else None


def activate_(x: Tensor, name: str) -> Tensor:
    """act(x), in place."""
    if name in _NUMBERS:
        return x.clamp_(0, 6) if name == "relu6" else x.relu_()
    return F.leaky_relu_(x, number(name))


def masked(g: Tensor, x: Tensor, name: str, owned: bool) -> Tensor:
    """g times act'(x), open on both sides as in torch; `owned`: g may be written into."""
    if name not in _NUMBERS:
        return torch.where(x > 0, g, g * number(name))
    closed = ~((x > 0) & (x < 6)) if name == "relu6" else ~(x > 0)
    return g.masked_fill_(closed, 0) if owned else g.masked_fill(closed, 0)  # not a product: inf * 0 is NaN
