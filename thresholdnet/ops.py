"""The fused block as torch.library operators: functional from outside, opaque to the compiler, differentiable once.

The block owns its buffers inside one operator, because writing slices of a tensor that an earlier layer saved would
trip autograd's version counter. Running statistics stay with the module: the operator returns what the batch had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import engine
from .backends import load
from .plan import BlockPlan


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts operands of a convolution to on this device; None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def run_block(
    x: Tensor,
    parameters: list[Tensor],
    running: list[Tensor],
    plan: str,
    eps: list[float],
    fixed: list[bool],
    activation: str,
    backend: str,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`engine.forward`: the output, the statistics used per BatchNorm [2, C], and what is kept for backward."""
    spec = engine.Spec(BlockPlan.from_text(plan), eps, fixed, activation, backend, save, recompute)
    return engine.forward(spec, x, parameters, running)


block = torch.library.custom_op("thresholdnet::block", run_block, mutates_args=())


@block.register_fake
def _(
    x: Tensor,
    parameters: list[Tensor],
    running: list[Tensor],
    plan: str,
    eps: list[float],
    fixed: list[bool],
    activation: str,
    backend: str,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    structure = BlockPlan.from_text(plan)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    norms: list[int] = []
    for i, width in enumerate(structure.widths):
        bottleneck = structure.unit == "bottleneck"
        norms += [structure.link_widths[i], structure.bottleneck_widths[i]] if bottleneck else [width]
    statistics = [x.new_empty((2, width), dtype=wide) for width in norms]
    shape = (x.shape[0], structure.out_channels, x.shape[2], x.shape[3])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, statistics, load(backend).kept_like(structure, x, recompute) if save else []


def run_block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    statistics: list[Tensor],
    saved: list[Tensor],
    plan: str,
    eps: list[float],
    fixed: list[bool],
    activation: str,
    backend: str,
    recompute: bool,
    needs: list[bool],
) -> list[Tensor]:
    """`engine.backward`: gradients of x and of every parameter; empty tensors where `needs` is False."""
    spec = engine.Spec(BlockPlan.from_text(plan), eps, fixed, activation, backend, True, recompute)
    return engine.backward(spec, grad, x, parameters, statistics, saved, needs)


block_backward = torch.library.custom_op("thresholdnet::block_backward", run_block_backward, mutates_args=())


@block_backward.register_fake
def _(grad: Tensor, x: Tensor, parameters: list[Tensor], *unused: Any, needs: list[bool] | None = None) -> list[Tensor]:
    needed_each = unused[-1] if needs is None else needs
    made = []
    for position, (like, needed) in enumerate(zip((x, *parameters), needed_each, strict=True)):
        if not needed:
            made.append(x.new_empty(0))
        elif position == 0:
            made.append(torch.empty_like(like, memory_format=torch.channels_last))
        else:
            made.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, parameters, running, *call = inputs
    _, statistics, saved = output
    *ctx.call, _save, ctx.recompute = call
    ctx.counts = (len(parameters), len(statistics), len(running))
    ctx.save_for_backward(x, *parameters, *statistics, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_statistics: Any, grad_saved: Any) -> tuple[Any, ...]:
    needs_x, needs_parameters = ctx.needs_input_grad[:2]
    needs = [needs_x, *needs_parameters]
    count, norms, buffers = ctx.counts
    nothing = [None] * 7
    if grad is None:
        return None, [None] * count, [None] * buffers, *nothing
    x, *rest = ctx.saved_tensors
    parameters, statistics, saved = rest[:count], rest[count : count + norms], rest[count + norms :]
    grads = block_backward(grad, x, parameters, statistics, saved, *ctx.call, ctx.recompute, needs)
    found = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    return found[0], found[1:], [None] * buffers, *nothing


block.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("thresholdnet::linked_conv2d", mutates_args=())
def linked_conv2d(sources: list[Tensor], weight: Tensor, backend: str) -> Tensor:
    """conv2d of the concatenated sources, padding kernel // 2."""
    verbs = load(backend).Verbs(None, sources[0])
    return verbs.leave([verbs.conv(sources, weight, into=("raw", 0))[0]])


@linked_conv2d.register_fake
def _(sources: list[Tensor], weight: Tensor, backend: str) -> Tensor:
    n, _, h, w = sources[0].shape
    out: Tensor = sources[0].new_empty((n, weight.shape[0], h, w))
    return torch.empty_like(out, memory_format=torch.channels_last)


@torch.library.custom_op("thresholdnet::linked_conv2d_backward", mutates_args=())
def linked_conv2d_backward(
    grad: Tensor, sources: list[Tensor], weight: Tensor, backend: str, needs: list[bool]
) -> list[Tensor]:
    """Gradients of every source and of the weight; empty tensors where `needs` is False."""
    verbs = load(backend).Verbs(None, sources[0])
    dz = verbs.enter(grad)
    made, start = [], 0
    for source, needed in zip(sources, needs[:-1], strict=True):
        part = weight[:, start : start + source.shape[1]]
        if needed:
            made.append(verbs.leave([verbs.gradient([dz], [part], None, into=("gradient", 0))[0]]))
        else:
            made.append(source.new_empty(0))
        start += source.shape[1]
    made.append(verbs.weight_gradient(sources, dz, weight.shape[2]) if needs[-1] else weight.new_empty(0))
    return made


@linked_conv2d_backward.register_fake
def _(grad: Tensor, sources: list[Tensor], weight: Tensor, backend: str, needs: list[bool]) -> list[Tensor]:
    made = [
        torch.empty_like(source, memory_format=torch.channels_last) if needed else source.new_empty(0)
        for source, needed in zip(sources, needs[:-1], strict=True)
    ]
    made.append(torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[-1] else weight.new_empty(0))
    return made


def _setup_linked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, weight, ctx.backend = inputs
    ctx.save_for_backward(weight, *sources)


def _backward_linked(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], Tensor | None, None]:
    weight, *sources = ctx.saved_tensors
    needs_sources, needs_weight = ctx.needs_input_grad[:2]
    needs = [*needs_sources, needs_weight]
    grads = linked_conv2d_backward(grad, sources, weight, ctx.backend, needs)
    found = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    return found[:-1], found[-1], None


linked_conv2d.register_autograd(_backward_linked, setup_context=_setup_linked)


def _once_only(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "a fused block can be differentiated once: for gradients of gradients (create_graph=True) use fused=False"
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    pass


for _operator in (block_backward, linked_conv2d_backward):
    _operator.register_autograd(_once_only, setup_context=_setup_nothing)
