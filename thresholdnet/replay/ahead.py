"""The kernels that a call is about to launch, compiled side by side instead of each when its turn comes.

A network's first step meets a hundred forms of Triton kernels, and compiling one takes a second of one core. The first
call of a kind launches as long as every kernel is there. From the first missing one on nothing is launched: the rest of
the call only says what it would, while threads compile; then the call runs once more. No value decides what it does
(see `replay.call`), so that it may do without what the launches would have written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

MOST = 16  # kernels compiled at once: memory


class Ahead:
    """Launches kernels until one of them is missing."""

    def __init__(self, triton: Any):
        self.triton = triton
        self.missing = False
        self.met: set[Any] = set()  # kernels

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch a Triton kernel, or have it compiled."""
        if isinstance(kernel, self.triton.JITFunction):  # not in the interpreter
            self.met.add(kernel)
            found = kernel.warmup(*arguments, grid=grid, **options)
            self.missing |= not isinstance(found, self.triton.compiler.CompiledKernel)
        if not self.missing:
            kernel[grid](*arguments, **options)

    def forget_failures(self) -> None:
        """What did not compile in a thread, for want of memory perhaps, may do so alone: Triton 3.8 would not try."""
        for kernel in self.met:
            for cache, *_ in kernel.device_caches.values():
                for key, found in [*cache.items()]:
                    if not isinstance(found, self.triton.compiler.CompiledKernel) and found.kernel is None:
                        del cache[key]


def compiled(call: Callable[[Ahead | None], Any]) -> Any:
    """`call(None)`, with what it launches compiled before; `call` starts kernels by the `Ahead` that it is given."""
    triton: Any = sys.modules.get("triton")
    if not hasattr(triton, "AsyncCompileMode"):
        return call(None)
    ahead = Ahead(triton)
    # A context of its own: in Triton 3.6 an interrupt while threads compile would leave the mode on.
    made = copy_context().run(_compiled_in_threads, ahead, call)
    if not ahead.missing:
        return made
    del made  # a call's memory is not held twice
    ahead.forget_failures()
    return call(None)


def _compiled_in_threads(ahead: Ahead, call: Callable[[Ahead | None], Any]) -> Any:
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(min(MOST, _cores())))
        try:  # errors come up at the launch
            stack.enter_context(ahead.triton.AsyncCompileMode(threads, ignore_errors=True))
        except RuntimeError:  # the caller has one, and compiles as it likes
            return call(None)
        return call(ahead)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
