"""What a fused operator asks of its device, recorded at one call and replayed at later ones without the Python between.

A call of the engine is a fixed sequence of allocations, torch operations and kernel launches: shapes and options decide
it, no value does. The first call of a kind runs as it is written (tables are made, and kernels compiled: `ahead.py`),
the second is recorded while it runs, the rest replay: the same operations on the same shapes in the same order, so the
same bits. Unlike a CUDA graph's, a replay's memory comes from torch's allocator at every call, and inputs may lie
anywhere.

On GPUs, where a step would wait for Python; THRESHOLDNET_REPLAY=0 turns it off, 1 turns it on for CPU tensors too, and
graph submits the launches of a replay together (`together.py`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import overlap
from .ahead import Ahead, compiled
from .constants import holding
from .recorder import Recorder
from .recording import Recording, tensors_in
from .together import wanted

CALLS = 3  # of a kind, of which the last one is a replay

MOST = 256  # kinds kept, the last used ones: those of DenseNet121's blocks take 0.4 MB of host memory each

PLAIN = {Tensor, nn.Parameter}  # subclasses may mean something else by an operation

SEEN = "seen once"  # of a kind; any other string says why its calls are not replayed

_known: OrderedDict[Hashable, Recording | str] = OrderedDict()
_lock = threading.Lock()
_here = threading.local()  # `launcher`: of the call that this thread records, or runs for the first time


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, from its third call of a kind on without running it.

    Args:
        function: of tensors and hashable values, on one device. What it does must depend on no tensor's values, only on
            shapes, strides and options; the tensors that it takes from elsewhere must be `constants.device_constant`s.
        arguments: tensors, hashable values, and lists and tuples of them.
    """
    if _launcher() is not None or not _wanted(arguments):
        return function(*arguments)
    tensors: list[Tensor] = []
    kind = _described(arguments, tensors, {})
    if not PLAIN.issuperset(map(type, tensors)):
        return function(*arguments)
    key = (function, kind, _surroundings(tensors[0].device))
    found = _look_up(key)
    if isinstance(found, Recording):
        return found.replay(tensors, wanted(tensors[0].device))
    if found is SEEN:
        made, recording = _recorded(function, arguments, tensors)
        _keep(key, recording)
        return made
    if found is not None:
        return function(*arguments)
    made = compiled(lambda ahead: _launched_by(ahead, function, arguments))
    _keep(key, SEEN)
    return made


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
    with _lock:
        _known.clear()


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
    with holding() as recorder.tables, recorder:
        result = _launched_by(recorder, function, arguments)
    return result, recorder.recording(result)


def _look_up(key: Hashable) -> Recording | str | None:
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
        return found


def _keep(key: Hashable, what: Recording | str) -> None:
    with _lock:
        _known[key] = what
        if len(_known) > MOST:
            _known.popitem(last=False)


def _wanted(arguments: tuple[Any, ...]) -> bool:
    switch = os.environ.get("THRESHOLDNET_REPLAY", "")
    first = next(tensors_in(arguments), None) if switch != "0" else None
    return first is not None and (first.is_cuda or (switch == "1" and first.is_cpu))


def _surroundings(device: torch.device) -> Hashable:
    """What else decides what a call does."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch hides it from mypy
    return autocast, precision, os.environ.get("THRESHOLDNET_CONV"), overlap.wanted()


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
