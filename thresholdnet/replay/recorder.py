"""Notes what a call does while it does it: torch's operations by a dispatch mode, kernels by `replay.start`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..packing import Use
from .pooling import pooled
from .recording import Allocation, Interpreted, Late, Launch, Operation, Recording, Step, View, tensors_in, views_in
from .straight import straight
from .together import together

SMALL = 1 << 20  # bytes of a memory that may lie in a call's pool; larger ones are better left to torch's allocator

LAUNCHERS = ("3.6.", "3.8.", "3.9.")  # versions of Triton whose launchers take the same, as bench/host_time.py saw

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


class _UnknownError(Exception):
    """What a recording can't tell how to repeat."""


class Recorder(TorchDispatchMode):
    """Notes what a call does while it does it; `refused` says why that can't be replayed, if so."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.refused = ""
        self.size = 0
        self.steps: list[Step] = []
        self.constants: dict[int, Tensor] = {}
        self.tables: dict[int, Any] = {}
        self.uses: list[Use] = []  # forms of declared weights, noted while the call runs
        self._late: list[Late] = []
        self._places = {id(tensor): at for at, tensor in enumerate(tensors)}
        self._launching = False
        self._words = _Words()
        self._numbers: dict[Hashable, tuple[int, tuple[Any, ...]]] = {}
        self._storages: dict[int, StorageWeakRef] = {}  # while this is held, no other storage takes its number
        for tensor in tensors:  # of several over one storage the first stands for it: how they lie is part of the kind
            self._number(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: where it does, the first recording of a process imports torch's compiler, for a second."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._launching and not self.refused:
            with self._noting():
                self._note(function, args, kwargs or {}, result)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch a Triton kernel, and note it."""
        self._launching = True  # the interpreter copies tensors with torch's operations
        try:
            compiled = kernel[grid](*arguments, **options)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled  # of two forms that are one
        finally:
            self._launching = False
        if not self.refused:
            with self._noting():
                self.steps.append(self._launch(kernel, grid, arguments, options, compiled))

    def recording(self, result: Any) -> Recording | str:
        """The call that returned `result`, or why it can't be replayed."""
        with self._noting():
            returned = self._described(result)
        if self.refused:
            return self.refused
        steps = _lean(self.steps, {view.memory for view in views_in(returned)})
        addresses = {
            number: [(place, behind) for behind, place in found.items()]
            for number, found in self._words.addresses.items()
        }
        pool, left = pooled(steps, addresses, SMALL)
        parts = together(left, addresses)
        return Recording(
            self.size,
            self._words.values,
            addresses,
            self.constants,
            self.tables,
            self._late,
            pool,
            parts,
            straight(parts, addresses),
            returned,
        )

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """What is unknown ends the recording, not the call; the first of it is the reason."""
        try:
            yield
        except _UnknownError as error:
            self.refused = self.refused or str(error)

    def _number(self, tensor: Tensor) -> int:
        """The number of a memory that the call meets for the first time."""
        number = self.size
        self.size += 1
        if not _is_opaque(tensor):
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        self._numbers.setdefault(_memory(tensor), (number, _lie(tensor)))
        return number

    def _view(self, tensor: Tensor) -> View:
        key = _memory(tensor)
        if key not in self._numbers:
            self._note_forms()
        if key not in self._numbers:
            for constant in tensors_in(list(self.tables.values())):
                if _memory(constant) == key:
                    self.constants[self._number(constant)] = constant
                    break
            else:
                raise _UnknownError(f"a tensor from elsewhere, {tensor.dtype} {tuple(tensor.shape)}")
        number, whole = self._numbers[key]
        shape, strides, start = _lie(tensor)
        offset = start - whole[2]
        return View(number, (shape, strides, start) == whole, shape, strides, offset, offset * tensor.element_size())

    def _note_forms(self) -> None:
        """Number the tensors of the forms that the call has asked for."""
        for use in self.uses[len(self._late) :]:
            places = [self._places.get(id(tensor)) for tensor in (use.forms.weight(), *use.sources)]
            weight, *sources = [place for place in places if place is not None]
            if len(sources) < len(use.sources):
                raise _UnknownError("a packed weight made of a tensor from elsewhere")
            makes = tuple(self._number(tensor) for tensor in tensors_in(use.result))
            self._late.append(Late(weight, use.form, tuple(sources), makes))

    def _described(self, value: Any) -> Any:
        """A value with views in the place of tensors."""
        if isinstance(value, Tensor):
            return self._view(value)
        if type(value) in (list, tuple):
            return type(value)([self._described(each) for each in value])
        return value

    def _note(self, function: Any, args: Any, options: Any, result: Any) -> None:
        results = list(tensors_in(result))
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
            size = made.untyped_storage().nbytes()
            self.steps.append(Allocation((self._number(made),), *_lie(made)[:2], made.dtype, made.device, size))
            return
        arguments = tuple(self._described(value) for value in args)
        named = {name: self._described(value) for name, value in options.items()}
        reads = tuple({view.memory for view in views_in([*arguments, *named.values()])})
        makes = () if all(known) else tuple(self._number(each) for each in results)
        single = isinstance(result, Tensor)
        self.steps.append(Operation(function, arguments, named, makes, reads, writes, single))

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], compiled: Any
    ) -> Step:
        described = tuple(self._described(value) for value in arguments)
        reads = tuple({view.memory for view in views_in(described)})
        if compiled is None:
            return Interpreted(kernel, grid, described, options, reads)
        defaults = {each.name: each.default for each in kernel.params if each.has_default}
        named = {**defaults, **dict(zip(kernel.arg_names, described, strict=False)), **options}
        values = [named[name] for name in kernel.arg_names]
        groups = tuple((at, self._words.picked(value)) for at, value in enumerate(values) if type(value) is tuple)
        flat = [None if type(value) is tuple else value for value in values]
        return Launch(_starter(compiled, (*grid, 1, 1)[:3]), self._words.picked(flat), groups, reads)


def _starter(compiled: Any, grid: tuple[int, ...]) -> Callable[[Sequence[Any], int], None]:
    """What starts a compiled kernel again.

    A kernel's own runner looks for profilers' hooks, which takes longer than the launch. Without them its launcher is
    called as the runner calls it in LAUNCHERS; in other versions of Triton the runner is.
    """
    runner = compiled[grid]  # loads the kernel
    version = getattr(sys.modules.get("triton"), "__version__", "")
    if not version.startswith(LAUNCHERS) or not hasattr(compiled, "packed_metadata"):
        return lambda values, stream: runner(*values, stream=stream)
    launch, metadata = compiled.run, compiled.packed_metadata
    nothing = None, None, None  # what hooks are told, and they
    # `compiled` unloads its function when nobody holds it, as Triton's cache may not
    return lambda values, stream: launch(*grid, stream, compiled.function, metadata, *nothing, *values)


class _Words:
    """What launches hand over, each once: numbers and options as they are, and addresses by (memory, bytes behind)."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.addresses: dict[int, dict[int, int]] = {}  # memory -> bytes behind its first element -> place
        self._constants: dict[tuple[type, Any], int] = {}

    def place(self, value: Any) -> int:
        """Where a parameter's word stands."""
        found: dict[Any, int] = self._constants
        key: Any = (type(value), value)  # True and 1 are equal
        if isinstance(value, View):
            found, key = self.addresses.setdefault(value.memory, {}), value.behind
        if key not in found:
            found[key] = len(self.values)
            self.values.append(0 if isinstance(value, View) else value)
        return found[key]

    def picked(self, values: Sequence[Any]) -> Callable[[list[Any]], tuple[Any, ...]]:
        """What makes the tuple of these parameters out of a call's words."""
        places = [self.place(value) for value in values]
        return itemgetter(*places) if len(places) > 1 else lambda words: tuple([words[place] for place in places])


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


def _is_opaque(tensor: Tensor) -> bool:
    """Whether its memory is in oneDNN's own order, which nothing else can read."""
    return tensor.layout == torch._mkldnn  # type: ignore[attr-defined]  # torch hides it from mypy


def _memory(tensor: Tensor) -> Hashable:
    """The same for two tensors that one may be a view of."""
    return id(tensor) if _is_opaque(tensor) else (tensor.untyped_storage()._cdata, tensor.dtype)


def _lie(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    if _is_opaque(tensor):
        return tuple(tensor.shape), (), 0
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
