"""Modules run one after the other, with what stands between fused blocks fused as well: the transitions.

Recognised by structure, at every call: a fused Conv-BN-ReLU block with a 1x1 convolution behind it; and BatchNorm -
activation [- convolution without bias [- average pooling behind a 1x1 one]], or BatchNorm - activation - pooling. Each
becomes one operator that keeps its input alone, of images, volumes and signals. A module with hooks runs as itself, and
so does all that is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from . import ops, packing, pixels, sync, transforms
from .activations import name_of
from .layers import hooked, spatial_dims, torchs_convolution, torchs_norm
from .linked import LinkedBlock, or_empty, shared_group, symbolic, traced, update_running
from .pixels import KINDS


def run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run the modules in order on x [N, C, ...]; containers of class nn.Sequential are taken apart.

    Results, gradients and running statistics are those of the modules themselves, to rounding.
    """
    if traced() or transforms.counted() or symbolic(x):
        for module in modules:
            x = module(x)
        return x
    waiting = list(_leaves(modules))
    while waiting:
        taken, x = _step(waiting, x)
        del waiting[:taken]
    return x


class Chain(nn.Sequential):
    """nn.Sequential that runs through `run`; `fused`: or not."""

    fused = True

    def forward(self, x: Tensor) -> Tensor:
        """The modules one after the other."""
        return run(self, x) if self.fused else super().forward(x)


def _leaves(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if plain and not hooked(module):
            yield from _leaves(module.children())
        else:
            yield module


def _step(waiting: Sequence[nn.Module], x: Tensor) -> tuple[int, Tensor]:
    """How many of the modules in front ran, and what they gave."""
    first, behind = waiting[0], waiting[1:]
    if isinstance(first, LinkedBlock):
        pointwise = behind[0] if behind else None
        if first.fused and first.takes_tail and _free(first) and _pointwise(pointwise):
            return 2, first(x, tail=pointwise.weight)
        return 1, first(x)
    if not (behind and _fits(first, x) and torchs_norm(first)):
        return 1, first(x)
    activation = name_of(behind[0])
    if activation is None or not _free(first, behind[0]):
        return 1, first(x)
    conv = behind[1] if len(behind) > 1 and _plain_convolution(behind[1], x) else None
    position = 1 if conv is None else 2
    pool = _pooling(behind[position], x.dim() - 2) if len(behind) > position else None
    if conv is not None and pool is not None and (pool[0] != "avg" or not _pointwise(conv)):
        pool = None
    taken = 1 + position + (pool is not None)
    return taken, _transition(first, activation, conv, pool, x)


def _transition(norm: Any, activation: str, conv: Any, pool: tuple[str, list[int]] | None, x: Tensor) -> Tensor:
    fixed = not norm.training and norm.running_mean is not None
    group = None if fixed else shared_group([norm])
    counts = None if group is None else sync.counts(x, group)
    weight = None if conv is None else conv.weight
    dtype = ops.autocast_dtype(x.device)
    if weight is not None and dtype is not None:
        x, weight = x.to(dtype), packing.cast(weight, dtype)
    how = [1, 1, 0, 0, 1, 1] if conv is None else [*conv.stride, *conv.padding, *conv.dilation]
    kind, window = pool or ("", [0] * 8)
    signals = x.dim() == 3
    if signals:  # which are images of one row
        x, weight = x.unsqueeze(2), None if weight is None else weight.unsqueeze(2)
        how = how if conv is None else _of_rows(how, (1, 0, 1))
        window = window if pool is None else [*_of_rows(window[:3], (1, 1, 0)), *window[3:]]
    like = norm.weight if norm.weight is not None else x.new_ones(x.shape[1])
    y, statistics = transforms.call(
        ops.transition, x, like, torch.zeros_like(like) if norm.bias is None else norm.bias, weight,
        [or_empty(norm.running_mean, x), or_empty(norm.running_var, x)], counts, norm.eps, fixed, activation,
        how, kind, window, "" if group is None else group.group_name,
    )  # fmt: skip
    update_running([norm], [statistics], sync.total(counts, pixels.count(x)))
    return y.squeeze(2) if signals else y


def _of_rows(along: Sequence[int], across: Sequence[int]) -> list[int]:
    """Stride, padding and dilation, or kernel, stride and padding, of images from those of signals."""
    return [side for sides in zip(across, along, strict=True) for side in sides]


def _fits(norm: Any, x: Tensor) -> bool:
    """Whether the operator takes this BatchNorm with this input.

    What torch refuses, and an empty batch of its own, are left to torch.
    """
    kinds = KINDS.get(x.dim() - 2)
    if kinds is None or not isinstance(norm, (kinds.norm, nn.SyncBatchNorm)):
        return False
    shared = isinstance(norm, nn.SyncBatchNorm) and sync.active(norm.process_group) is not None
    several = shared or x.numel() > norm.num_features
    return x.is_floating_point() and x.shape[1] == norm.num_features and several


def _free(*modules: nn.Module) -> bool:
    """Whether nobody waits for these modules to run, and none had its forward replaced."""
    return not any(hooked(module) or "forward" in module.__dict__ for module in modules)


def _plain_convolution(module: nn.Module, x: Tensor) -> bool:
    return (
        torchs_convolution(module)
        and spatial_dims(module) == x.dim() - 2
        and module.bias is None
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and (next(module.parameters(), x).dtype == x.dtype or ops.autocast_dtype(x.device) is not None)
        and _free(module)
    )


def _pointwise(module: Any) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module is a 1x1 (1x1x1) convolution of all channels and pixels, without bias or hooks."""
    return (
        torchs_convolution(module)
        and (module.bias, module.groups) == (None, 1)
        and ({*module.kernel_size}, {*module.stride}, {*module.padding}) == ({1}, {1}, {0})
        and _free(module)
    )


def _pooling(module: Any, dims: int) -> tuple[str, list[int]] | None:
    """Kind, and kernel, stride, padding, ceil_mode, count_include_pad, of a pooling over so many sides."""
    if not _free(module):
        return None
    *_, largest, average = KINDS[dims]
    if type(module) is largest and not module.return_indices and {*_sides(module.dilation, dims)} == {1}:
        include = True
    elif type(module) is average and getattr(module, "divisor_override", None) is None:
        include = module.count_include_pad
    else:
        return None
    window = [side for own in (module.kernel_size, module.stride, module.padding) for side in _sides(own, dims)]
    return "max" if type(module) is largest else "avg", [*window, int(module.ceil_mode), int(include)]


def _sides(value: Any, dims: int) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * dims
