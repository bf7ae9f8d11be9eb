"""A replay's kernels handed to the driver together, as one CUDA graph.

Where each launch costs the processor more than its kernel costs the GPU, launching them one by one is what a step waits
for. Here the launches between two torch operations go to a stream that is being captured, which submits nothing; the
graph that comes of it is submitted instead, and kept. Memory comes from torch's allocator at every call, as in any
replay, and inputs lie anywhere: where all addresses are those of a call before, as they mostly are from one training
step to the next, its graph is submitted again; where not, the launches are captured anew, and a graph is updated.
What ends within the launches is held until the graph is submitted: before, nobody else may have its place. What they
allocate and end as well lies in one allocation for that.

THRESHOLDNET_REPLAY=graph turns it on. It was held against a driver that launches nothing (bench/host_time.py), and is
off until a GPU has measured it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from .pooling import pooled
from .recording import Allocation, Call, Launch, Step
from .straight import straight

SMALLEST = 8  # launches of a graph: fewer are submitted one by one
KEPT = 2  # graphs of the same launches: addresses may alternate, as where two steps accumulate gradients

RELAXED = 2  # capture: nothing that this or another thread asks of CUDA meanwhile is refused
NON_BLOCKING = 1  # stream: apart from the default one

Steps = Sequence[tuple[Step, tuple[int, ...]]]


class Together:
    """Launches of a recording without torch operations between them, and the graphs of their last calls."""

    def __init__(self, steps: Steps, addresses: Mapping[int, list[tuple[int, int]]]):
        self._one_by_one = straight(steps, addresses)  # for calls that are not submitted together
        self._pool, self._held = pooled(steps, dict(addresses), math.inf)
        self._graphs: list[tuple[list[Any], Any]] = []  # the words of a call, and its executable; the last used first
        self._lock = threading.Lock()
        self._refused = False  # the driver did: no graph is tried again

    def run(self, call: Call) -> None:
        """As one graph, or one by one where the call is not to or another thread has the graph."""
        if self._refused or not call.together or not self._lock.acquire(blocking=False):
            self._one_by_one(call)
            return
        try:
            pool = self._pool.allocate(call)
            for step, _ in self._held:
                if isinstance(step, Allocation):
                    step.run(call)
            self._submit(call)
            del pool  # its place is taken again behind these launches, as is that of what ends here
            for _, ended in self._held:
                for number in ended:
                    call.memory[number] = None
        finally:
            self._lock.release()

    def _submit(self, call: Call) -> None:
        """Submit the graph of the call's addresses; where the driver makes none, launch."""
        known = [number for number, (words, _) in enumerate(self._graphs) if words == call.words]
        try:
            made = self._graphs.pop(known[0]) if known else (list(call.words), self._captured(call))
        except (RuntimeError, OSError, AttributeError) as error:  # also: a driver too old, one of another name
            self._refused = True
            warnings.warn(f"launches of a replayed call are submitted one by one: {error}", stacklevel=2)
            self._launch(call)
            return
        self._graphs.insert(0, made)
        _check("cuGraphLaunch", made[1], call.stream)

    def _launch(self, call: Call) -> None:
        for step, _ in self._held:
            if isinstance(step, Launch):
                step.run(call)

    def _captured(self, call: Call) -> Any:
        """The executable graph of this call's launches: a new one, or the oldest updated."""
        free, stream = _free_streams.setdefault(call.device, []), call.stream
        own = free.pop() if free else _new_stream()
        try:
            _check("cuStreamBeginCapture_v2", own, RELAXED)
            try:
                call.stream = own
                self._launch(call)
            finally:  # a capture must end, whatever happened in it
                graph = _end(own)
        finally:
            call.stream = stream
            free.append(own)
        return _executable(graph, self._graphs.pop()[1] if len(self._graphs) == KEPT else None)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():  # this module's names are gone by then, and the driver's contexts end by themselves
            return
        for _, executable in self._graphs:
            _driver().cuGraphExecDestroy(executable)  # when it has run


def together(
    steps: Steps, addresses: Mapping[int, list[tuple[int, int]]]
) -> list[tuple[Step | Together, tuple[int, ...]]]:
    """The steps of a `Recording`, with those that one graph may hold as one."""
    made: list[tuple[Step | Together, tuple[int, ...]]] = []
    for some in _runs(steps):
        if sum(isinstance(step, Launch) for step, _ in some) < SMALLEST:
            made += some
        else:
            made.append((Together(some, addresses), ()))
    return made


def wanted(device: torch.device) -> bool:
    """Whether this call's launches are submitted together.

    Not while the current stream is captured as a whole, nor with an allocator that frees memory in a stream's order:
    it would free what the graph, submitted later, still reads.
    """
    return (
        os.environ.get("THRESHOLDNET_REPLAY") == "graph"
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
        and torch.cuda.memory.get_allocator_backend() == "native"
    )


def _runs(steps: Steps) -> Iterator[list[tuple[Step, tuple[int, ...]]]]:
    """The steps in parts: launches and what is allocated between them, and each other step alone."""
    some: list[tuple[Step, tuple[int, ...]]] = []
    for each in steps:
        if isinstance(each[0], Launch | Allocation):
            some.append(each)
            continue
        if some:
            yield some
        yield [each]
        some = []
    if some:
        yield some


@lru_cache(maxsize=1)
def _driver() -> Any:
    """CUDA's driver, which Triton launches through."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_void_p
    for name, types in {
        "cuStreamCreate": [pointer, ctypes.c_uint],
        "cuStreamBeginCapture_v2": [pointer, ctypes.c_int],
        "cuStreamEndCapture": [pointer, pointer],
        "cuGraphInstantiateWithFlags": [pointer, pointer, ctypes.c_ulonglong],
        "cuGraphExecUpdate_v2": [pointer, pointer, pointer],
        "cuGraphLaunch": [pointer, pointer],
        "cuGraphDestroy": [pointer],
        "cuGraphExecDestroy": [pointer],
    }.items():
        getattr(library, name).argtypes = types
    return library


_free_streams: dict[torch.device, list[int]] = {}  # that nobody captures on now


def _new_stream() -> int:
    """A stream of the current device to capture on."""
    made = ctypes.c_void_p()
    _check("cuStreamCreate", ctypes.byref(made), NON_BLOCKING)
    return made.value or 0


def _end(stream: int) -> Any:
    """The graph of what was launched there."""
    graph = ctypes.c_void_p()
    _check("cuStreamEndCapture", stream, ctypes.byref(graph))
    return graph


def _executable(graph: Any, earlier: Any) -> Any:
    """An executable of a graph, which it takes: `earlier`, that of another one with other addresses, or a new one."""
    found = (ctypes.c_uint64 * 3)()  # a code and two nodes: where the graphs differ
    try:
        if earlier is not None and _driver().cuGraphExecUpdate_v2(earlier, graph, found):
            _driver().cuGraphExecDestroy(earlier)
            earlier = None
        if earlier is None:
            earlier = ctypes.c_void_p()
            _check("cuGraphInstantiateWithFlags", ctypes.byref(earlier), graph, 0)
    finally:
        _check("cuGraphDestroy", graph)
    return earlier


def _check(name: str, *arguments: Any) -> None:
    """Call the driver."""
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} must return 0, got CUDA error {code}: THRESHOLDNET_REPLAY=1 does without it")
