"""Tables on a device: made at their first use, then kept, and longer by whoever captured a graph that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")

_holders: list[dict[int, Any]] = []


def device_constant(maxsize: int) -> Callable[[Callable[Arguments, Table]], Callable[Arguments, Table]]:
    """`functools.lru_cache` for a function whose result holds tensors on a device; see `holding`."""

    def decorate(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
        cached: Any = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
            table: Table = cached(*args, **kwargs)
            for held in _holders:
                held[id(table)] = table
            return table

        return get

    return decorate


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
