"""Tensors as they were, to see later whether they still are: the same objects, where they lay, and not written."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

_version = attrgetter("_version")


def stamp_of(tensors: Sequence[Tensor]) -> Stamp | None:
    """Some tensors as they are now; None where one was made in inference mode: nothing counts the writes to it."""
    return None if any(map(Tensor.is_inference, tensors)) else Stamp(tensors)


class Stamp:
    """What `stamp_of` makes; it holds none of the tensors.

    A write through `.data`, or through memory shared with numpy, is not noticed.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._references = [weakref.ref(tensor) for tensor in tensors]
        self._state = _state(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and as they were."""
        return (
            len(tensors) == len(self._references)
            and all(map(is_, [reference() for reference in self._references], tensors))
            and _state(tensors) == self._state
        )

    def has(self, numbers: Collection[int]) -> bool:
        """Whether one of the tensors has one of these ids."""
        return any(id(reference()) in numbers for reference in self._references)


def _state(tensors: Sequence[Tensor]) -> list[Any]:
    return [*map(_version, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]
