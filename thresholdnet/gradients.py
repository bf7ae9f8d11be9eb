"""Gradients as an operator may return them, and as its fake says they will be: one rule, stated twice.

The dtype is the input's. So is the layout, but for pixels, the first of the inputs, whose gradient is channels_last.
None of them is the incoming gradient or a part of another tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pixels import channels_last


def own_gradients(
    inputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor]:
    """The gradients that were found, copied where they are not by that rule.

    Args:
        inputs: of the operator, pixels first.
        grads: for each; that of the pixels is channels_last. None where nothing that leaves the operator depends on it.
        needs: for each; an empty tensor where it is False.
        grad: the incoming gradient.
    """
    made: list[Tensor] = []
    copies: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor]]] = {}
    taken = {grad.untyped_storage()._cdata}
    for position, (like, found, needed) in enumerate(zip(inputs, grads, needs, strict=True)):
        if not needed:
            result = like.new_empty(0)
        elif found is None:
            result = torch.zeros_like(like, memory_format=_format(position, like))
        else:
            storage = found.untyped_storage()
            alone = storage._cdata not in taken and storage.nbytes() == found.nbytes
            wanted = like if position else found
            result = found = _strided_as(found, wanted)
            laid = found.stride() == wanted.stride()
            if not (alone and laid and found.dtype == like.dtype):
                result = torch.empty_like(wanted, dtype=like.dtype)
                copies.setdefault((found.dtype, laid), []).append((result, found))
        taken.add(result.untyped_storage()._cdata)
        made.append(result)
    for some in copies.values():  # on a GPU a launch where sources have one dtype, and each pair one layout
        torch._foreach_copy_([to for to, _ in some], [found for _, found in some])
    return made


def fake_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Empty tensors of the shapes and layouts that `own_gradients` returns; arguments as there."""
    return [
        torch.empty_like(like, memory_format=_format(position, like)) if needed else like.new_empty(0)
        for position, (like, needed) in enumerate(zip(inputs, needs, strict=True))
    ]


def _format(position: int, like: Tensor) -> torch.memory_format:
    return torch.preserve_format if position else channels_last(like)


def _strided_as(found: Tensor, like: Tensor) -> Tensor:
    """The same elements with the strides of `like`, where those differ along sides of 1 alone."""
    if found.stride() == like.stride():
        return found
    sides = zip(found.shape, found.stride(), like.stride(), strict=True)
    return found.as_strided(like.shape, like.stride()) if all(n == 1 or a == b for n, a, b in sides) else found
