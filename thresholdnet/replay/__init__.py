"""What a fused operator asks of its device, recorded at one call and replayed at later ones without the Python between.

A call of the engine is a fixed sequence of allocations, torch operations and kernel launches: shapes and options decide
it, no value does. The first call of a kind runs as it is written (tables are made, and kernels compiled: `ahead.py`),
the second is recorded while it runs, the rest replay: the same operations on the same shapes in the same order, so the
same bits. On a CPU, where less is saved, the tenth is recorded. Unlike a CUDA graph's, a replay's memory comes from
torch's allocator at every call, and inputs may lie anywhere.

THRESHOLDNET_REPLAY=0 turns it off, with 1 the third call is a replay on every device, and graph submits the launches
of a replay together (`together.py`). Triton's interpreter, which is there to see kernels run, replays with 1 alone.

Weights that their owner declared constant (`../packing.py`) are asked for at every replay: where one was written since,
the call runs, and packs it again.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..constants import holding
from ..packing import declared, noting
from . import overlap, steady
from .ahead import Ahead, compiled
from .recorder import Recorder
from .recording import Recording
from .together import wanted

FIRST = {"cuda": 3, "cpu": 11}
"""Which call of a kind is the first replay. On a CPU, recording a network costs what ten to thirty replays save."""

MOST = 256  # kinds kept, the last used ones: those of DenseNet121's blocks take 0.6 MB of host memory each

PLAIN = {Tensor, nn.Parameter}
"""Classes whose operations are torch's: a subclass may mean something else by one."""

SIMPLE = {bool, int, float, str}  # what most lists without tensors hold

_known: OrderedDict[Hashable, Recording | int | str] = OrderedDict()  # calls so far; or why they are not replayed
_lock = threading.Lock()
_here = threading.local()  # `launcher`: of the call that this thread records, or runs for the first time


def described(tensors: Sequence[Tensor]) -> tuple[Hashable, bool]:
    """What decides how a call runs on these tensors beside their values, and whether two begin in one memory."""
    forms, memories = [], set()
    for tensor in tensors:
        address = tensor.data_ptr()
        aligned = address % 16  # Triton compiles loads of 16 bytes where it is 0
        forms.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device, aligned))
        memories.add(address - int(tensor.storage_offset()) * tensor.element_size())
    return tuple(forms), len(memories) < len(tensors)


def call(
    function: Callable[..., Any],
    *arguments: Any,
    describe: Callable[[Sequence[Tensor]], tuple[Hashable, bool]] = described,
    serves: bool = False,
) -> Any:
    """`function(*arguments)`, without running it once a call of its kind was recorded.

    Args:
        function: of tensors and hashable values, on one device. What it does must depend on no tensor's values, only on
            shapes, strides and options; the tensors that it takes from elsewhere must be `constants.device_constant`s.
        arguments: tensors, hashable values, and lists and tuples of them.
        describe: what stands for `described`.
        serves: it is a block's inference: all tensors but the first are the block's. See `steady.py`.
    """
    if _launcher() is not None:
        return function(*arguments)
    tensors: list[Tensor] = []
    outline = _outline(arguments, tensors)
    device = tensors[0].device if tensors else None
    first = None if device is None else first_replay(device)
    if device is None or first is None or not PLAIN.issuperset(map(type, tensors)):
        return function(*arguments)
    around, own = _surroundings(device), tensors[1:] if serves else []
    short = (function, outline, around, describe(tensors[:1]), id(own[0])) if own else None
    if short and (again := steady.find(short, own)):
        return again[0].replay(tensors, again[1], wanted(device))
    forms, shared = describe(tensors)
    sharing = _sharing(tensors) if shared else None
    key = (function, outline, forms, sharing, declared(tensors), around)
    found = _look_up(key)
    if isinstance(found, Recording):
        packed = found.forms(tensors)
        if packed is None:
            return function(*arguments)
        if packed and short and (sharing is None or all(leader for leader, _ in sharing[1:])):
            steady.keep(short, own, found, packed)
        return found.replay(tensors, packed, wanted(device))
    if isinstance(found, str):
        return function(*arguments)
    number = (found or 0) + 1
    if number + 1 >= first:
        made, recording = _recorded(function, arguments, tensors)
        _keep(key, recording)
        return made
    made = compiled(lambda ahead: _launched_by(ahead, function, arguments)) if number == 1 else function(*arguments)
    _keep(key, number)
    return made


def first_replay(device: torch.device) -> int | None:
    """Which call of a kind is the first replay on this device; None where none is."""
    switch = os.environ.get("THRESHOLDNET_REPLAY", "")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if switch == "0" or device.type not in FIRST or (interpreted and switch != "1"):
        return None
    return 3 if switch == "1" else FIRST[device.type]


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel, `kernel[grid](*arguments, **options)`, as the call around wants it."""
    options |= overlap.launch_options(arguments)
    launcher = _launcher()
    if launcher is None:
        kernel[grid](*arguments, **options)
    else:
        launcher.launch(kernel, grid, arguments, options)


def forget() -> None:
    """Let go of every recording: for tests, and for whoever replaced a kernel or a table."""
    steady.forget()
    with _lock:
        _known.clear()


@contextmanager
def no_collection() -> Iterator[None]:
    """No cycles are collected within: of a recording, what their finalisers do would be taken for the call's own."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _launcher() -> Recorder | Ahead | None:
    return getattr(_here, "launcher", None)


def _launched_by(launcher: Recorder | Ahead | None, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    _here.launcher = launcher
    try:
        return function(*arguments)
    finally:
        _here.launcher = None


def _recorded(
    function: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[Any, Recording | str]:
    recorder = Recorder(tensors)
    with no_collection(), holding() as recorder.tables, noting() as recorder.uses, recorder:
        result = _launched_by(recorder, function, arguments)
    return result, recorder.recording(result)


def _look_up(key: Hashable) -> Recording | int | str | None:
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
        return found


def _keep(key: Hashable, what: Recording | int | str) -> None:
    with _lock:
        _known[key] = what
        if len(_known) > MOST:
            _known.popitem(last=False)


def _surroundings(device: torch.device) -> Hashable:
    """What else decides what a call does."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    cudnn: Any = torch.backends.cudnn
    precision = cudnn.conv.fp32_precision if kind == "cuda" else None
    return autocast, precision, os.environ.get("THRESHOLDNET_CONV"), overlap.wanted()


def _outline(value: Any, tensors: list[Tensor]) -> Hashable:
    """Arguments with None in the place of tensors, which are collected in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return None
    if not isinstance(value, list | tuple):
        return (value,)
    kinds = set(map(type, value))
    if kinds <= PLAIN:
        tensors += value
        return len(value)
    if kinds <= SIMPLE:
        return (list, *value)
    return tuple([_outline(each, tensors) for each in value])


def _sharing(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Which tensors lie in one memory, and how: per tensor the first of its memory, and bytes behind that."""
    found: dict[int, tuple[int, int]] = {}
    places = []
    for number, tensor in enumerate(tensors):
        start = int(tensor.storage_offset()) * tensor.element_size()
        leader, first = found.setdefault(tensor.untyped_storage()._cdata, (number, start))
        places.append((leader, start - first))
    return tuple(places)
