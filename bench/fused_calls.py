"""What a network asks of its fused blocks, recorded from their operators on the meta device, and asked again."""

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


def activation_of(model: str) -> str:
    """A network's activation."""
    return "relu6" if "hardnet" in model else "relu"


def training_of(call: tuple[Any, list[Any], str], activation: str, dtype: Any, of_parameters: Any) -> tuple[Any, ...]:
    """(spec, x, parameters) of one of `fused_calls` in training, on Triton's kernels, with zeros for its tensors."""
    import torch

    from thresholdnet import engine
    from thresholdnet.plan import BlockPlan

    shape, sizes, text = call
    plan = BlockPlan.from_text(text)
    norms = plan.num_layers * (2 if plan.unit == "bottleneck" else 1)
    spec = engine.Spec(plan, (1e-5,) * norms, (False,) * norms, activation, "triton", True)
    x = torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)
    return spec, x, [torch.zeros(size, dtype=of_parameters) for size in sizes]


def train(spec: Any, x: Any, parameters: list[Any]) -> None:
    """Forward and backward through the engine, as its operators call it."""
    import torch

    from thresholdnet import engine, replay

    out, used, saved = replay.call(engine.forward, spec, x, parameters, [], engine.NO_EXTRAS)
    kept, needs = [out, *saved] if spec.keeps_output else saved, [True] * (1 + len(parameters))
    replay.call(engine.backward, spec, torch.empty_like(out), x, parameters, used, kept, needs, engine.NO_EXTRAS)
