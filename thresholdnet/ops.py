"""Fused blocks and transitions as torch.library operators: functional, opaque to the compiler, differentiable once.

The block owns its buffers inside one operator, because writing slices of a tensor that an earlier layer saved would
trip autograd's version counter. Running statistics stay with the module: the operator returns what the batch had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import downsampling, engine, replay, transforms
from . import transition as between
from .backends import csrc, engine_for, load
from .constants import compiler_constant
from .gradients import fake_gradients, own_gradients
from .pixels import as_images, channels_last
from .plan import BlockPlan


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts operands of a convolution to on this device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


@compiler_constant  # torch 2.11's compiler cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _block_spec(
    x: Tensor, plan: str, eps: list[float], fixed: list[bool], activation: str, backend: str, save: bool,
    recompute: bool, drop: float, group: str,
) -> engine.Spec:  # fmt: skip
    """A call of a block on x, with the engine behind its backend."""
    structure = BlockPlan.from_text(plan)
    engine_name = engine_for(backend, structure, x)
    return engine.Spec(structure, eps, fixed, activation, engine_name, save, recompute, drop, group)


def _run(function: Callable[..., Any], group: str, *arguments: Any, serves: bool = False) -> Any:
    """`function(*arguments)`, replayed where it may be: not what talks to other processes."""
    if group:
        return function(*arguments)
    return replay.call(function, *arguments, describe=csrc.described, serves=serves)


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
    masks: list[Tensor],
    counts: Tensor | None,
    drop: float,
    group: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`engine.forward`: the output, the statistics used per BatchNorm [2, C], and what is kept for backward."""
    spec = _block_spec(x, plan, eps, fixed, activation, backend, save, recompute, drop, group)
    extras = engine.Extras(masks, counts)
    return _run(engine.forward, group, spec, x, parameters, running, extras, serves=not spec.reports)


block = transforms.operator("block", run_block)


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
    masks: list[Tensor],
    counts: Tensor | None,
    drop: float,
    group: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    spec = _block_spec(x, plan, eps, fixed, activation, backend, save, recompute, drop, group)
    structure = spec.plan
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    norms: list[int] = []
    for i, width in enumerate(structure.widths if spec.reports and structure.normalises else ()):
        norms.append(structure.link_widths[i] if structure.pre_activation else width)
        norms += structure.bottleneck_widths[i : i + 1]
    statistics = [x.new_empty((2, width), dtype=wide) for width in norms]
    more = len(parameters) > engine.parameters_a_layer(structure) * structure.num_layers
    tail = more and not structure.pre_activation  # of which those are biases
    channels = parameters[-1].shape[0] if tail else structure.out_channels
    y = torch.empty(
        (x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=channels_last(x)
    )
    return y, statistics, load(spec.backend).kept_like(structure, as_images(x), spec.kinds_kept) if save else []


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
    masks: list[Tensor],
    counts: Tensor | None,
    drop: float,
    group: str,
    needs: list[bool],
) -> list[Tensor]:
    """`engine.backward`: gradients of x and of every parameter; empty tensors where `needs` is False."""
    spec = _block_spec(x, plan, eps, fixed, activation, backend, True, recompute, drop, group)
    extras = engine.Extras(masks, counts)
    return _run(engine.backward, group, spec, grad, x, parameters, statistics, saved, needs, extras)


block_backward = transforms.operator("block_backward", run_block_backward)


@block_backward.register_fake
def _(
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
    masks: list[Tensor],
    counts: Tensor | None,
    drop: float,
    group: str,
    needs: list[bool],
) -> list[Tensor]:
    return fake_gradients([x, *parameters], needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, parameters, running, *call, save, recompute, masks, counts, drop, group = inputs
    y, statistics, saved = output
    ctx.call, ctx.end = (*call, recompute), (drop, group)
    ctx.set_materialize_grads(False)
    if not save:
        return
    plan, eps, fixed, activation, backend = call
    spec = _block_spec(x, plan, eps, fixed, activation, backend, save, recompute, drop, group)
    if not spec.keeps_input:
        x = x.new_empty(()).expand(x.shape)  # backward asks it for its shape alone
    if spec.keeps_output:
        saved = [y, *saved]
    ctx.counts = (len(parameters), len(statistics), len(saved), len(masks), len(running))
    ctx.save_for_backward(x, counts, *parameters, *statistics, *saved, *masks)


def _backward(ctx: Any, grad: Tensor | None, grad_statistics: Any, grad_saved: Any) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    *_, masked, buffers = ctx.counts
    lists: list[Any] = [
        None if numbers else [] for numbers in ctx.call[1:3]
    ]  # torch takes an empty list for one of tensors
    nothing = (None, *lists, *[None] * 4, [None] * masked, None, None, None)
    if grad is None:
        return None, [None] * (len(needs) - 1), [None] * buffers, *nothing
    x, counts, *tensors = ctx.saved_tensors
    parts, start = [], 0
    for length in ctx.counts[:4]:
        parts.append(tensors[start : start + length])
        start += length
    parameters, statistics, saved, masks = parts
    grads = transforms.call(
        block_backward, grad, x, parameters, statistics, saved, *ctx.call, masks, counts, *ctx.end, needs
    )
    found = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    return found[0], found[1:], [None] * buffers, *nothing


transforms.differentiable(block, _setup, _backward)


def _transition_spec(
    eps: float, fixed: bool, activation: str, conv: list[int], pool: str, window: list[int], group: str
) -> between.Spec:
    *sides, ceil_mode, count_include_pad = window
    pooling = downsampling.Pool(pool, sides, bool(ceil_mode), bool(count_include_pad)) if pool else None
    return between.Spec(eps, fixed, activation, conv, pooling, group)


def run_transition(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    running: list[Tensor],
    counts: Tensor | None,
    eps: float,
    fixed: bool,
    activation: str,
    conv: list[int],
    pool: str,
    window: list[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """`transition.forward`; `window` is the pooling's kernel, stride and padding, ceil_mode and count_include_pad."""
    spec = _transition_spec(eps, fixed, activation, conv, pool, window, group)
    return _run(between.forward, group, spec, z, gamma, beta, weight, running, counts)


transition = transforms.operator("transition", run_transition)


@transition.register_fake
def _(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    running: list[Tensor],
    counts: Tensor | None,
    eps: float,
    fixed: bool,
    activation: str,
    conv: list[int],
    pool: str,
    window: list[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    spec = _transition_spec(eps, fixed, activation, conv, pool, window, group)
    y = between.behind(spec, z.new_empty(z.shape), weight)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=channels_last(y))
    return out, z.new_empty((2, z.shape[1]), dtype=wide)


def run_transition_backward(
    grad: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    counts: Tensor | None,
    eps: float,
    fixed: bool,
    activation: str,
    conv: list[int],
    pool: str,
    window: list[int],
    group: str,
    needs: list[bool],
) -> list[Tensor]:
    """`transition.backward`: gradients of z, gamma, beta, weight; empty tensors where `needs` is False."""
    spec = _transition_spec(eps, fixed, activation, conv, pool, window, group)
    return _run(_transition_gradients, group, spec, grad, z, gamma, beta, weight, statistics, counts, needs)


def _transition_gradients(
    spec: between.Spec, grad: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, statistics: Tensor,
    counts: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    grads = between.backward(spec, grad, z, gamma, beta, weight, statistics, counts, needs)
    inputs = [z, gamma, beta, z.new_empty(0) if weight is None else weight]
    return own_gradients(inputs, grads, needs, grad)


transition_backward = transforms.operator("transition_backward", run_transition_backward)


@transition_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    counts: Tensor | None,
    eps: float,
    fixed: bool,
    activation: str,
    conv: list[int],
    pool: str,
    window: list[int],
    group: str,
    needs: list[bool],
) -> list[Tensor]:
    return fake_gradients([z, gamma, beta, z if weight is None else weight], needs)


def _setup_transition(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, gamma, beta, weight, running, counts, *ctx.call = inputs
    ctx.buffers = len(running)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, gamma, beta, weight, output[1], counts)


def _backward_transition(ctx: Any, grad: Tensor | None, grad_statistics: Any) -> tuple[Any, ...]:
    nothing = ([None] * ctx.buffers, None, *[None] * 7)
    if grad is None:
        return (*[None] * 4, *nothing)
    needs = list(ctx.needs_input_grad[:4])
    grads = transforms.call(transition_backward, grad, *ctx.saved_tensors, *ctx.call, needs)
    return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), *nothing)


transforms.differentiable(transition, _setup_transition, _backward_transition)


def run_linked_conv2d(sources: list[Tensor], weight: Tensor, backend: str, dilation: int = 1) -> Tensor:
    """conv2d of the concatenated sources, padding dilation * (kernel // 2)."""
    return _run(_linked_forward, "", sources, weight, backend, dilation)


linked_conv2d = transforms.operator("linked_conv2d", run_linked_conv2d)


def _linked_forward(sources: list[Tensor], weight: Tensor, backend: str, dilation: int) -> Tensor:
    verbs = load(backend).Verbs(None, sources[0])
    return verbs.leave([verbs.conv(sources, weight, into=("raw", 0), dilation=dilation)[0]])


@linked_conv2d.register_fake
def _(sources: list[Tensor], weight: Tensor, backend: str, dilation: int = 1) -> Tensor:
    n, _, h, w = sources[0].shape
    out: Tensor = sources[0].new_empty((n, weight.shape[0], h, w))
    return torch.empty_like(out, memory_format=torch.channels_last)


def run_linked_conv2d_backward(
    grad: Tensor, sources: list[Tensor], weight: Tensor, backend: str, dilation: int, needs: list[bool]
) -> list[Tensor]:
    """Gradients of every source and of the weight; empty tensors where `needs` is False."""
    return _run(_linked_gradients, "", grad, sources, weight, backend, dilation, needs)


linked_conv2d_backward = transforms.operator("linked_conv2d_backward", run_linked_conv2d_backward)


def _linked_gradients(
    grad: Tensor, sources: list[Tensor], weight: Tensor, backend: str, dilation: int, needs: list[bool]
) -> list[Tensor]:
    verbs = load(backend).Verbs(None, sources[0])
    dz = verbs.enter(grad)
    made, start = [], 0
    for source, needed in zip(sources, needs[:-1], strict=True):
        part = weight[:, start : start + source.shape[1]]
        if needed:
            g, _, _ = verbs.gradient([dz], [part], None, into=("gradient", 0), dilation=dilation)
            made.append(verbs.leave([g]))
        else:
            made.append(source.new_empty(0))
        start += source.shape[1]
    if needs[-1]:
        made.append(verbs.weight_gradient(sources, dz, weight.shape[2], dilation=dilation))
    else:
        made.append(weight.new_empty(0))
    verbs.settle()
    return made


@linked_conv2d_backward.register_fake
def _(
    grad: Tensor, sources: list[Tensor], weight: Tensor, backend: str, dilation: int, needs: list[bool]
) -> list[Tensor]:
    made = [
        torch.empty_like(source, memory_format=torch.channels_last) if needed else source.new_empty(0)
        for source, needed in zip(sources, needs[:-1], strict=True)
    ]
    made.append(torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[-1] else weight.new_empty(0))
    return made


def _setup_linked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, weight, *ctx.call = inputs
    ctx.save_for_backward(weight, *sources)


def _backward_linked(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], Tensor | None, None, None]:
    weight, *sources = ctx.saved_tensors
    needs_sources, needs_weight = ctx.needs_input_grad[:2]
    needs = [*needs_sources, needs_weight]
    grads = transforms.call(linked_conv2d_backward, grad, sources, weight, *ctx.call, needs)
    found = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    return found[:-1], found[-1], None, None


transforms.differentiable(linked_conv2d, _setup_linked, _backward_linked)


def _once_only(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "a fused block can be differentiated once: for gradients of gradients (create_graph=True) use fused=False "
        "or tn.to_reference(model)"
    )


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    pass


for _operator in (block_backward, linked_conv2d_backward, transition_backward):
    transforms.differentiable(_operator, _setup_nothing, _once_only)
