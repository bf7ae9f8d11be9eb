"""What is found once: tables on a device, kept longer by whoever captured a graph that reads them; results in a graph.

Tables are made in a thread of their own, with the caller's stream: what the caller's thread is in must not reach what
outlives it. torch.compile(mode="reduce-overhead") runs a first call with a memory pool that may hold its results alone,
inference mode would mark tables as its own, and a dispatch mode would see how they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")
Function = TypeVar("Function", bound=Callable[..., Any])

_holders: list[dict[int, Any]] = []


def compiler_constant(function: Function) -> Function:
    """Mark a function that torch.compile calls while it records, and whose result its graph keeps.

    As torch.compiler.assume_constant_result does, which would import the compiler, for seconds.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def device_constant(maxsize: int) -> Callable[[Callable[Arguments, Table]], Callable[Arguments, Table]]:
    """`functools.lru_cache` for a function whose result holds tensors on a device; see `holding`."""

    def decorate(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
        cached: Any = lru_cache(maxsize)(_aside(make))

        @wraps(make)
        def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
            table: Table = cached(*args, **kwargs)
            for held in _holders:
                held[id(table)] = table
            return table

        return get

    return decorate


def _aside(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """`make` in another thread, where it makes tensors on a GPU and nobody captures what this thread launches."""

    @wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        device = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)), None)
        if device is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return make(*args, **kwargs)
        stream = torch.cuda.current_stream(device)

        def on_stream() -> Table:
            with torch.cuda.stream(stream):
                return make(*args, **kwargs)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(on_stream).result()

    return made


@contextmanager
def holding() -> Iterator[dict[int, Any]]:
    """Note every constant that is used within, in any thread.

    A CUDA graph reads the memory of its capture at every replay: it must keep what this yields, or a table that falls
    out of its cache meanwhile would be overwritten.
    """
    held: dict[int, Any] = {}
    _holders.append(held)
    try:
        yield held
    finally:
        _holders[:] = [other for other in _holders if other is not held]


def hold(tables: dict[int, Any]) -> None:
    """Note constants that are used without being asked for: what `holding` yielded around the call that asked."""
    for held in _holders:
        held.update(tables)
