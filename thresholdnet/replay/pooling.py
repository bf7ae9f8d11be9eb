"""One allocation for all that steps of a recording allocate and end; what is never there at once shares a place."""

from __future__ import annotations

from collections.abc import Sequence

from .recording import Allocation, Interpreted, Operation, Pool, Step

ALIGNMENT = 256  # bytes: where memories of a pool begin


def pooled(
    steps: Sequence[tuple[Step, tuple[int, ...]]], addresses: dict[int, list[tuple[int, int]]], largest: float
) -> tuple[Pool, list[tuple[Step, tuple[int, ...]]]]:
    """A pool for the memories of at most `largest` bytes that steps allocate and end, and the steps without those.

    Takes their entries out of `addresses`, which are those of `Recording`.
    """
    ends = {number: position for position, (_, ended) in enumerate(steps) for number in ended}
    rooms: list[tuple[int, int, int]] = []  # (start, end, last step) of those that are there, by start
    starts: dict[int, int] = {}
    words, tensors, left, size = [], [], [], 0
    for position, (step, ended) in enumerate(steps):
        if not isinstance(step, Allocation) or not 0 < step.size <= largest or step.makes[0] not in ends:
            left.append((step, ended))
            continue
        number = step.makes[0]
        rooms = [room for room in rooms if room[2] >= position]
        start = 0
        for begin, end, _ in rooms:
            if begin - start >= step.size:
                break
            start = end
        end = start + -(-step.size // ALIGNMENT) * ALIGNMENT
        rooms = sorted([*rooms, (start, end, ends[number])])
        starts[number], size = start, max(size, end)
        words += [(place, start + behind) for place, behind in addresses.pop(number, ())]
        tensors.append((number, start, step.shape, step.strides, step.dtype))
    read = {number for step, _ in left if isinstance(step, Operation | Interpreted) for number in step.reads}
    pool = Pool(size, words, [tensor for tensor in tensors if tensor[0] in read])
    return pool, [(step, tuple(number for number in ended if number not in starts)) for step, ended in left]
