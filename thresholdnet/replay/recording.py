"""A recorded call as steps over numbered memories, and its replay.

A memory is a tensor that the call takes, a constant or something that it makes; views say how other tensors lie in it.
Compiled kernels take addresses, so that most views are never made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..constants import hold
from ..packing import forms_of


class View(NamedTuple):
    """A tensor as it lies in a memory of a recording.

    Attributes:
        memory: the memory's number.
        whole: it is the tensor that stands for the memory; the rest says how any other one lies there.
        offset: elements behind the first of the memory's tensor.
        behind: the same in bytes.
    """

    memory: int
    whole: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    behind: int


class Allocation(NamedTuple):
    """torch.empty."""

    makes: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    size: int  # bytes

    reads: tuple[int, ...] = ()
    writes: bool = False

    def run(self, call: Call) -> None:
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        call.put(self.makes[0], tensor)


class Operation(NamedTuple):
    """A torch operation whose results are memories of their own, or that writes where its arguments lie.

    `single`: it returns a tensor, and no list or tuple.
    """

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    writes: bool
    single: bool


class Launch(NamedTuple):
    """A compiled Triton kernel on one grid.

    Attributes:
        start: takes all parameters in order, addresses in the place of tensors, and the stream.
        values: picks them out of the call's words, None in the place of a tuple.
        groups: positions of tuples among them, and what picks those.
    """

    start: Callable[[Sequence[Any], int], None]
    values: Callable[[list[Any]], tuple[Any, ...]]
    groups: tuple[tuple[int, Callable[[list[Any]], tuple[Any, ...]]], ...]
    reads: tuple[int, ...]

    makes: tuple[int, ...] = ()
    writes: bool = True

    def run(self, call: Call) -> None:
        values: Any = self.values(call.words)
        if self.groups:
            values = list(values)
            for position, group in self.groups:
                values[position] = group(call.words)
        self.start(values, call.stream)


class Interpreted(NamedTuple):
    """A Triton kernel in the interpreter, which takes tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: tuple[int, ...]

    makes: tuple[int, ...] = ()
    writes: bool = True

    def run(self, call: Call) -> None:
        self.kernel[self.grid](*[filled(value, call.memory) for value in self.arguments], **self.options)


Step = Allocation | Operation | Launch | Interpreted


class Late(NamedTuple):
    """A form that a call reads of a weight whose owner asked for `prepack`; it is asked for at every replay.

    Attributes:
        weight, sources: positions among the call's tensors.
        form: see `packing.Forms`.
        makes: numbers of the form's tensors.
    """

    weight: int
    form: Hashable
    sources: tuple[int, ...]
    makes: tuple[int, ...]

    def found(self, tensors: Sequence[Tensor]) -> Any:
        """The form; None where its weight is not declared any more, or was written since it was made."""
        forms = forms_of(tensors[self.weight])
        return None if forms is None else forms.find(self.form, [tensors[source] for source in self.sources])


class Call:
    """One replay: its memories, the words of its launches, and whether those are submitted together."""

    def __init__(self, recording: Recording, device: torch.device, stream: int, together: bool):
        self.memory: list[Any] = [None] * recording.size
        self.words = list(recording.words)
        self.device, self.stream = device, stream
        self.together = together
        self._addresses = recording.addresses

    def put(self, number: int, tensor: Tensor) -> None:
        """A memory is there from now on."""
        self.memory[number] = tensor
        if number in self._addresses:
            start = tensor.data_ptr()
            for place, behind in self._addresses[number]:
                self.words[place] = start + behind


class Pool(NamedTuple):
    """Memories that steps allocate and end, side by side in one allocation, or one after the other in a place.

    Attributes:
        size: bytes in all.
        words: place of each of their addresses among the call's words, and bytes from the pool's beginning.
        tensors: of those that operations read: number, bytes from the beginning, shape, strides, dtype.
    """

    size: int
    words: list[tuple[int, int]]
    tensors: list[tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]]

    def allocate(self, call: Call) -> Tensor:
        """The allocation for one call, which keeps it to its end."""
        pool = torch.empty(self.size, dtype=torch.uint8, device=call.device)
        base = pool.data_ptr()
        for place, behind in self.words:
            call.words[place] = base + behind
        typed = {dtype: pool.view(dtype) for dtype in {dtype for *_, dtype in self.tensors}}
        for number, start, shape, strides, dtype in self.tensors:
            call.memory[number] = typed[dtype].as_strided(shape, strides, start // dtype.itemsize)
        return pool


class Recording(NamedTuple):
    """A call as steps over numbered memories: first those of its tensors, then constants and what the call makes.

    Attributes:
        size: how many memories.
        words, addresses: see `_Words`; the places of a memory's addresses, and bytes behind its first element.
        constants: tables of `device_constant`, by number.
        tables: what holds them, as `holding` yields it.
        late: forms of weights that are declared constant.
        pool: the small memories that end within the call.
        steps: each with the memories that nothing behind it needs; see `together`.
        run: those steps.
        result: what the call returns, views in the place of tensors.
    """

    size: int
    words: list[Any]
    addresses: dict[int, list[tuple[int, int]]]
    constants: dict[int, Tensor]
    tables: dict[int, Any]
    late: list[Late]
    pool: Pool
    steps: Sequence[tuple[Any, tuple[int, ...]]]
    run: Callable[[Call], None]
    result: Any

    def forms(self, tensors: Sequence[Tensor]) -> dict[int, Tensor] | None:
        """The tensors of all forms that the call on these tensors reads, by number; None where one must be made."""
        tensors_of: dict[int, Tensor] = {}
        for late in self.late:
            form = late.found(tensors)
            if form is None:
                return None
            tensors_of.update(zip(late.makes, tensors_in(form), strict=True))
        return tensors_of

    def replay(self, tensors: Sequence[Tensor], forms: dict[int, Tensor], together: bool = False) -> Any:
        """The call on other tensors of the same kind, with their `forms`; `together`: its launches as graphs."""
        hold(self.tables)
        device = tensors[0].device
        if device.type != "cuda":
            return self._run(tensors, forms, Call(self, device, 0, together))
        with torch.cuda.device(device):
            return self._run(tensors, forms, Call(self, device, torch.cuda.current_stream().cuda_stream, together))

    def _run(self, tensors: Sequence[Tensor], forms: dict[int, Tensor], call: Call) -> Any:
        call.memory[: len(tensors)] = tensors
        for number, tensor in (*self.constants.items(), *forms.items()):
            call.memory[number] = tensor
        for number in self.addresses:
            if (tensor := call.memory[number]) is not None:  # the others are made by steps
                call.put(number, tensor)
        pool = self.pool.allocate(call)
        self.run(call)
        del pool  # whose memory is taken again behind the last kernel of this stream
        return filled(self.result, call.memory)


def filled(value: Any, memory: Sequence[Any]) -> Any:
    """A value with tensors in the place of views."""
    kind = type(value)
    if kind is View:
        tensor = memory[value.memory]
        if value.whole:
            return tensor
        return tensor.as_strided(value.shape, value.strides, tensor.storage_offset() + value.offset)
    if kind is list or kind is tuple:
        return kind([filled(each, memory) for each in value])
    return value


def views_in(value: Any) -> Iterator[View]:
    """The views in lists and tuples, in order."""
    if type(value) is View:
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from views_in(each)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
