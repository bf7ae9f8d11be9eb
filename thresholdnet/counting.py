"""What a network costs: parameters, multiply-accumulates, and the two figures of the paper's Table VIII.

`count` runs a copy of the model on the meta device, so nothing is computed and no memory is needed, and adds
up what the modules would do. Work that is not done by a module (a functional ReLU, an addition, a
concatenation) counts nothing, which is also how the paper's counter saw it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checks import integer
from .layers import meta_copy
from .pixels import CONVOLUTIONS, KINDS

Cost = tuple[int, int, int]  # multiply-accumulates, #FLOPS, #MAdds of one call

MAX_POOLS: Any = tuple(kinds.max_pool for kinds in KINDS.values())
AVERAGE_POOLS: Any = tuple(kinds.avg_pool for kinds in KINDS.values())


@dataclass(frozen=True)
class Count:
    """The cost of one forward pass of one image, in inference mode.

    Attributes:
        parameters: elements of all parameters.
        macs: multiply-accumulates of all convolutions and linear layers; what most papers call FLOPs.
        flops: Table VIII's "#FLOPS" (see `count`).
        madds: Table VIII's "#MAdds" (see `count`).
    """

    parameters: int
    macs: int
    flops: int
    madds: int


def count(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> Count:
    """Count a model's parameters and operations without computing anything.

    The rule behind the paper's Table VIII is torchstat's, per element and per image:

    - #FLOPS: n per convolution or linear output that sums n products, 1 more with a convolution's bias; 2 per
      BatchNorm element (1 without affine); 1 per ReLU or ReLU6 element; 1 per input element of a pooling.
    - #MAdds: 2n - 1 per convolution or linear output, 1 more with a convolution's bias; 4 per BatchNorm element;
      1 per ReLU or ReLU6 element; k*k - 1 (max) or k*k (average) per output of a k x k pooling.
    - A linear layer's bias, adaptive pooling and everything outside the modules is free.
    - A module that runs several times counts once, by its last run: the one ReLU of a ResNet unit, which serves
      three convolutions, counts behind the last of them. In `macs` every run counts.

    With it all 13 rows of Table VIII come out to the printed digit, save the paper's own slips.

    Args:
        model: any module that takes one tensor; neither moved nor changed; it may lie on the meta device.
        input_shape: shape of its input, batch first, such as (1, 3, 224, 224); the batch size has no effect.

    Raises:
        TypeError: `model` is not a module or `input_shape` not a sequence of integers.
        ValueError: `input_shape` is empty or holds an integer below 1; or the model itself refuses the shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    shape = checked_shape(input_shape)
    twin = meta_copy(model).eval()
    macs = 0
    last: dict[nn.Module, Cost] = {}  # a later run of the same module overwrites the earlier one

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal macs
        last[module] = _cost(module, inputs[0], output)
        macs += last[module][0]

    for module in twin.modules():
        if _rule(module) is not None:
            module.register_forward_hook(record)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        twin(torch.empty(1, *shape[1:], dtype=dtype, device="meta"))
    return Count(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs,
        flops=sum(cost[1] for cost in last.values()),
        madds=sum(cost[2] for cost in last.values()),
    )


def checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of positive integers, or TypeError / ValueError."""
    if isinstance(input_shape, str) or not isinstance(input_shape, Sequence):
        raise TypeError(f"input_shape must be a sequence of integers, batch first, got {input_shape!r}")
    if not input_shape:
        raise ValueError("input_shape must hold at least the batch size, got an empty one")
    return tuple(integer("input_shape entry", side, 1) for side in input_shape)


def _rule(module: nn.Module) -> Callable[[Any, Tensor, Tensor], Cost] | None:
    """The function that costs a module of this kind; None for what is free."""
    return next((rule for kinds, rule in _RULES if isinstance(module, kinds)), None)


def _cost(module: nn.Module, x: Tensor, y: Tensor) -> Cost:
    rule = _rule(module)
    return (0, 0, 0) if rule is None else rule(module, x, y)


def _convolution(module: Any, x: Tensor, y: Tensor) -> Cost:
    outputs = y.numel()
    macs = module.weight[0].numel() * outputs  # a row of [out, in / groups, *kernel]: the products of one output
    bias = outputs if module.bias is not None else 0
    return macs, macs + bias, 2 * macs - outputs + bias


def _linear(module: Any, x: Tensor, y: Tensor) -> Cost:
    macs = module.in_features * y.numel()
    return macs, macs, 2 * macs - y.numel()


def _batch_norm(module: Any, x: Tensor, y: Tensor) -> Cost:
    return 0, x.numel() * (2 if module.affine else 1), 4 * x.numel()


def _activation(module: Any, x: Tensor, y: Tensor) -> Cost:
    return 0, x.numel(), x.numel()


def _max_pool(module: Any, x: Tensor, y: Tensor) -> Cost:
    return 0, x.numel(), (_window(module, x) - 1) * y.numel()


def _average_pool(module: Any, x: Tensor, y: Tensor) -> Cost:
    return 0, x.numel(), _window(module, x) * y.numel()


def _window(module: Any, x: Tensor) -> int:
    """Elements under a pooling window; `kernel_size` may be one side for all dimensions."""
    kernel = module.kernel_size
    return math.prod(kernel) if isinstance(kernel, tuple) else int(kernel) ** (x.dim() - 2)


_RULES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any, Tensor, Tensor], Cost]], ...] = (
    (CONVOLUTIONS, _convolution),
    ((nn.Linear,), _linear),
    ((_BatchNorm,), _batch_norm),
    ((nn.ReLU, nn.ReLU6), _activation),
    (MAX_POOLS, _max_pool),
    (AVERAGE_POOLS, _average_pool),
)
