"""What a fused operator asks of its device, recorded at one call and replayed at later ones without the Python between.

A call of the engine is a fixed sequence of allocations, torch operations and kernel launches: shapes and options decide
it, no value does. The first call of a kind runs as it is written (tables are made, kernels compiled), the second is
recorded while it runs, the rest replay: the same operations on the same shapes in the same order, so the same bits.
Unlike a CUDA graph's, a replay's memory comes from torch's allocator at every call, and inputs may lie anywhere.

On GPUs, where a step would wait for Python; THRESHOLDNET_REPLAY=0 turns it off, 1 turns it on for CPU tensors too.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .constants import hold, holding

MOST = 256  # recordings kept, the last used ones: a recording of a large block takes some 300 kB of host memory

PLAIN = {Tensor, nn.Parameter}  # subclasses may mean something else by an operation

SEEN, REFUSED = "seen", "refused"

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip

_known: OrderedDict[Hashable, Recording | str] = OrderedDict()
_lock = threading.Lock()
_here = threading.local()  # `recorder`: of the call that this thread records


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, from its third call of a kind on without running it.

    Args:
        function: of tensors and hashable values, on one device. What it does must depend on no tensor's values, only on
            shapes, strides and options; the tensors that it takes from elsewhere must be `constants.device_constant`s.
        arguments: tensors, hashable values, and lists and tuples of them.
    """
    tensors: list[Tensor] = []
    kind = (function, _described(arguments, tensors, {}))
    if not tensors or not _wanted(tensors):
        return function(*arguments)
    key = (kind, _surroundings(tensors[0].device))
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
    if isinstance(found, Recording):
        return found.replay(tensors)
    if found is None:
        made = function(*arguments)
        _keep(key, SEEN)
    elif found is SEEN and getattr(_here, "recorder", None) is None:
        made, recording = _recorded(function, arguments, tensors)
        _keep(key, recording or REFUSED)
    else:
        made = function(*arguments)
    return made


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel, `kernel[grid](*arguments, **options)`, noted where the call is being recorded."""
    recorder = getattr(_here, "recorder", None)
    if recorder is None:
        kernel[grid](*arguments, **options)
    else:
        recorder.launch(kernel, grid, arguments, options)


def forget() -> None:
    """Let go of every recording: for tests, and whoever replaced a kernel or a table."""
    with _lock:
        _known.clear()


class _View(NamedTuple):
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


class _Allocation(NamedTuple):
    """torch.empty."""

    makes: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    reads: tuple[int, ...] = ()
    writes: bool = False

    def run(self, memory: list[Any], addresses: list[int], stream: int | None) -> None:
        tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        number = self.makes[0]
        memory[number], addresses[number] = tensor, tensor.data_ptr()


class _Operation(NamedTuple):
    """A torch operation whose results are memories of their own, or that writes where its arguments lie."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    writes: bool

    def run(self, memory: list[Any], addresses: list[int], stream: int | None) -> None:
        result = self.function(
            *[_filled(value, memory) for value in self.arguments],
            **{name: _filled(value, memory) for name, value in self.options.items()},
        )
        for number, tensor in zip(self.makes, _tensors_in(result), strict=False):  # made in place: no number
            memory[number], addresses[number] = tensor, tensor.data_ptr()


class _Launch(NamedTuple):
    """A compiled Triton kernel on one grid.

    Attributes:
        start: the kernel's runner, which takes all parameters in order, addresses for tensors.
        pointers: where an address stands among them, its memory, and bytes behind that.
        groups: likewise for a tuple of addresses.
    """

    start: Callable[..., None]
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    reads: tuple[int, ...]

    makes: tuple[int, ...] = ()
    writes: bool = True

    def run(self, memory: list[Any], addresses: list[int], stream: int | None) -> None:
        values = list(self.arguments)
        for position, number, behind in self.pointers:
            values[position] = addresses[number] + behind
        for position, group in self.groups:
            values[position] = tuple([addresses[number] + behind for number, behind in group])
        self.start(*values, stream=stream)


class _Interpreted(NamedTuple):
    """A Triton kernel in the interpreter, which takes tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: tuple[int, ...]

    makes: tuple[int, ...] = ()
    writes: bool = True

    def run(self, memory: list[Any], addresses: list[int], stream: int | None) -> None:
        self.kernel[self.grid](*[_filled(value, memory) for value in self.arguments], **self.options)


Step = _Allocation | _Operation | _Launch | _Interpreted


class Recording(NamedTuple):
    """A call as steps over numbered memories: first those of its tensors, then constants and what the call makes.

    Attributes:
        size: how many memories.
        constants: tables of `device_constant`, by number.
        tables: what holds them, as `holding` yields it.
        steps: each with the memories that nothing behind it needs.
        result: what the call returns, views in the place of tensors.
    """

    size: int
    constants: dict[int, Tensor]
    tables: dict[int, Any]
    steps: list[tuple[Step, tuple[int, ...]]]
    result: Any

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        """The call on other tensors of the same kind."""
        memory: list[Any] = [*tensors, *[None] * (self.size - len(tensors))]
        for number, constant in self.constants.items():
            memory[number] = constant
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in memory]
        hold(self.tables)
        device = tensors[0].device
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._run(memory, addresses, torch.cuda.current_stream().cuda_stream)
        else:
            self._run(memory, addresses, None)
        return _filled(self.result, memory)

    def _run(self, memory: list[Any], addresses: list[int], stream: int | None) -> None:
        for step, ended in self.steps:
            step.run(memory, addresses, stream)
            for number in ended:
                memory[number] = None


class _UnknownError(Exception):
    """What a recording can't tell how to repeat."""


class _Recorder(TorchDispatchMode):
    """Notes what a call does while it does it; `refused` says why that can't be replayed, if so."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.refused = ""
        self.size = 0
        self.steps: list[Step] = []
        self.constants: dict[int, Tensor] = {}
        self.tables: dict[int, Any] = {}
        self._launching = False
        self._numbers: dict[tuple[int, torch.dtype], tuple[int, tuple[Any, ...]]] = {}
        self._storages: dict[int, StorageWeakRef] = {}  # while this is held, no other storage takes its number
        for tensor in tensors:  # of several over one storage the first stands for it: how they lie is part of the kind
            self._number(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.refused and not self._launching:
            try:
                self._note(function, args, kwargs or {}, list(_tensors_in(result)))
            except _UnknownError as error:
                self.refused = str(error)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch a Triton kernel, and note it."""
        self._launching = True  # the interpreter copies tensors with torch's operations
        try:
            compiled = kernel[grid](*arguments, **options)
        finally:
            self._launching = False
        if not self.refused:
            try:
                self.steps.append(self._launch(kernel, grid, arguments, options, compiled))
            except _UnknownError as error:
                self.refused = str(error)

    def recording(self, result: Any) -> Recording | None:
        """The call that returned `result`; None if it can't be replayed."""
        try:
            returned = self._described(result)
        except _UnknownError as error:
            self.refused = self.refused or str(error)
        if self.refused:
            return None
        kept = {view.memory for view in _views_in(returned)}
        return Recording(self.size, self.constants, self.tables, _lean(self.steps, kept), returned)

    def _number(self, tensor: Tensor) -> int:
        """The number of a memory that the call meets for the first time."""
        storage, number = tensor.untyped_storage(), self.size
        self.size += 1
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        self._numbers.setdefault((storage._cdata, tensor.dtype), (number, _lie(tensor)))
        return number

    def _view(self, tensor: Tensor) -> _View:
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        if key not in self._numbers:
            for constant in _tensors_in(list(self.tables.values())):
                if (constant.untyped_storage()._cdata, constant.dtype) == key:
                    self.constants[self._number(constant)] = constant
                    break
            else:
                raise _UnknownError(f"a tensor from elsewhere, {tensor.dtype} {tuple(tensor.shape)}")
        number, whole = self._numbers[key]
        shape, strides, start = _lie(tensor)
        offset = start - whole[2]
        return _View(number, (shape, strides, start) == whole, shape, strides, offset, offset * tensor.element_size())

    def _described(self, value: Any) -> Any:
        """A value with views in the place of tensors."""
        if isinstance(value, Tensor):
            return self._view(value)
        if type(value) in (list, tuple):
            return type(value)([self._described(each) for each in value])
        return value

    def _note(self, function: Any, args: Any, options: Any, results: list[Tensor]) -> None:
        writes = function._schema.is_mutable
        known = [each.untyped_storage()._cdata in self._storages for each in results]
        if not writes and not results:
            raise _UnknownError(f"{function}, whose result is no tensor")
        if not writes and all(known):
            return  # a view: where it lies is asked when it is read
        if any(known) and not all(known):
            raise _UnknownError(f"{function}, whose results lie in old and new memory")
        if function in ALLOCATIONS:
            (made,) = results
            self.steps.append(_Allocation((self._number(made),), *_lie(made)[:2], made.dtype, made.device))
            return
        arguments = tuple(self._described(value) for value in args)
        named = {name: self._described(value) for name, value in options.items()}
        reads = tuple({view.memory for view in _views_in([*arguments, *named.values()])})
        makes = () if all(known) else tuple(self._number(each) for each in results)
        self.steps.append(_Operation(function, arguments, named, makes, reads, writes))

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], compiled: Any
    ) -> Step:
        described = tuple(self._described(value) for value in arguments)
        reads = tuple({view.memory for view in _views_in(described)})
        if compiled is None:
            return _Interpreted(kernel, grid, described, options, reads)
        named = {**dict(zip(kernel.arg_names, described, strict=False)), **options}
        values = [named[name] for name in kernel.arg_names]
        pointers, groups = [], []
        for position, value in enumerate(values):
            if isinstance(value, _View):
                pointers.append((position, value.memory, value.behind))
            elif any(True for _ in _views_in(value)):
                groups.append((position, tuple((view.memory, view.behind) for view in value)))
        return _Launch(compiled[(*grid, 1, 1)[:3]], tuple(values), tuple(pointers), tuple(groups), reads)


def _recorded(
    function: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[Any, Recording | None]:
    recorder = _Recorder(tensors)
    _here.recorder = recorder
    try:
        with holding() as recorder.tables, recorder:
            result = function(*arguments)
    finally:
        _here.recorder = None
    return result, recorder.recording(result)


def _lean(steps: Sequence[Step], kept: set[int]) -> list[tuple[Step, tuple[int, ...]]]:
    """The steps that something comes of, each with the memories that end with it; `kept` do not end."""
    made = {number for step in steps for number in step.makes} - kept
    lean: list[tuple[Step, tuple[int, ...]]] = []
    needed = set(kept)
    for step in reversed(steps):
        if not step.writes and needed.isdisjoint(step.makes):
            continue
        ended = {*step.reads, *step.makes} & made - needed
        lean.append((step, tuple(ended)))
        needed |= {*step.reads, *step.makes}
    return lean[::-1]


def _keep(key: Hashable, what: Recording | str) -> None:
    with _lock:
        _known[key] = what
        if len(_known) > MOST:
            _known.popitem(last=False)


def _wanted(tensors: Sequence[Tensor]) -> bool:
    switch = os.environ.get("THRESHOLDNET_REPLAY", "")
    return switch != "0" and (tensors[0].is_cuda or switch == "1") and all(type(tensor) in PLAIN for tensor in tensors)


def _surroundings(device: torch.device) -> Hashable:
    """What else decides what a call does."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch hides it from mypy
    return autocast, precision, os.environ.get("THRESHOLDNET_CONV")


def _described(value: Any, tensors: list[Tensor], storages: dict[int, tuple[int, int]]) -> Hashable:
    """A hashable value that two arguments share if a call does the same with both; collects the tensors in order."""
    if isinstance(value, Tensor):
        start = int(value.storage_offset()) * value.element_size()
        number, first = storages.setdefault(value.untyped_storage()._cdata, (len(tensors), start))
        tensors.append(value)
        aligned = value.data_ptr() % 16  # Triton compiles loads of 16 bytes where it is 0
        return value.dtype, value.shape, value.stride(), value.device, aligned, number, start - first
    if isinstance(value, list | tuple):
        return tuple([_described(each, tensors, storages) for each in value])
    return value


def _lie(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _filled(value: Any, memory: Sequence[Any]) -> Any:
    """A value with tensors in the place of views."""
    kind = type(value)
    if kind is _View:
        tensor = memory[value.memory]
        if value.whole:
            return tensor
        return tensor.as_strided(value.shape, value.strides, tensor.storage_offset() + value.offset)
    if kind is list or kind is tuple:
        return kind([_filled(each, memory) for each in value])
    return value


def _views_in(value: Any) -> Iterator[_View]:
    if type(value) is _View:
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _views_in(each)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)
