"""What a network asks of its fused blocks, recorded from their operators on the meta device."""

from __future__ import annotations

from typing import Any


def fused_calls(network: Any, image: tuple[int, ...]) -> list[tuple[Any, list[Any], str]]:
    """Input shape, parameter shapes and the plan as text of every fused block, in the order of a training step.

    Args:
        network: a module on the meta device, its blocks fused; put into training mode.
        image: the shape of its input.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, list[Any], str]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.thresholdnet.block.default:
                calls.append((args[0].shape, [parameter.shape for parameter in args[1]], args[3]))
            return func(*args, **(kwargs or {}))

    with Record():
        network.train()(torch.empty(image, device="meta"))
    return calls
