"""What compute-sanitizer looks for on a GPU, looked for in Triton's interpreter: every launch's loads and stores.

The interpreter runs programs one after the other, in one thread, on memory that ends nowhere: a kernel that reads past
a tensor, or whose programs depend on each other's order, computes right there and wrong on a GPU. After `install` a
launch ends in a `Fault` that names the kernel if

- a load or store that is not masked lies outside of all tensors that the launch was given;
- two programs store to the same bytes, or one loads what another one stores;
- one store writes the same bytes twice, or a program loads what it stored before: its threads are many.

Atomic operations are not followed: the kernels have none, and one that is met is a fault.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
import triton.runtime.interpreter as machine


class Fault(AssertionError):
    """A launch did what a GPU does not forgive."""


def _nothing(**values):
    """A program that is not chosen."""


_chosen = [lambda index, grid: True]


@contextmanager
def programs(chosen):
    """Launches run the programs alone for which chosen(index, grid) is true; what the others would write stays."""
    _chosen.append(chosen)
    try:
        yield
    finally:
        _chosen.pop()


class Launch:
    """Loads and stores of one launch: (program, number among its accesses, addresses, bytes each)."""

    def __init__(self, executor, tensors):
        self.executor, self.function, self.name = executor, executor.fn, executor.fn.__name__
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        spans = sorted((start, start + size) for start, size in storages.items() if size)
        self.starts, self.ends = (np.array(side, dtype=np.uint64) for side in zip(*spans, strict=True))
        self.program, self.time = -1, 0
        self.loads, self.stores = [], []

    def begin(self, index, grid):
        """The executor goes on with the program at `index`, and calls its `fn` next."""
        self.program, self.time = int(np.ravel_multi_index(index, grid)), 0
        self.executor.fn = self.function if _chosen[-1](index, grid) else _nothing

    def access(self, accesses, kind, pointers, mask):
        size = np.dtype(machine._get_np_dtype(pointers.get_element_ty())).itemsize
        first = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        first = first[np.broadcast_to(mask.data, first.shape)].ravel()
        self.time += 1
        if not first.size:
            return
        span = np.searchsorted(self.starts, first, side="right") - 1
        outside = (span < 0) | (first + np.uint64(size) > self.ends[span])
        if outside.any():
            raise Fault(f"{self.name}: program {self.program} {kind}s {outside.sum()} elements outside of its tensors")
        accesses.append((self.program, self.time, first, size))

    def end(self):
        """Raises what they have done to each other."""
        if not self.stores:
            return
        unit = min(size for *_, size in self.loads + self.stores)
        where, who, when = _expanded(self.stores, unit)
        order = np.lexsort((when, who, where))
        where, who, when = where[order], who[order], when[order]
        again = where[1:] == where[:-1]
        if (again & (who[1:] != who[:-1])).any():
            raise Fault(f"{self.name}: two programs store to the same bytes")
        if (again & (when[1:] == when[:-1])).any():
            raise Fault(f"{self.name}: one store writes the same bytes twice")
        first = np.insert(~again, 0, True)  # of a program's stores to a place
        where, who, when = where[first], who[first], when[first]
        low, high = where[0], where[-1]
        for program, time, addresses, size in self.loads:
            units = addresses // np.uint64(unit)
            if units.max() + np.uint64(size // unit) <= low or units.min() > high:
                continue
            units, _, _ = _expanded([(program, time, addresses, size)], unit)
            at = np.minimum(np.searchsorted(where, units), where.size - 1)
            met = where[at] == units
            if (met & (who[at] != program)).any():
                raise Fault(f"{self.name}: program {program} loads what another program stores")
            if (met & (when[at] < time)).any():
                raise Fault(f"{self.name}: program {program} loads what it stored before")


def _expanded(accesses, unit):
    """(units, programs, times) of accesses, a row a unit of memory."""
    parts = []
    for program, time, first, size in accesses:
        units = (first // np.uint64(unit))[:, None] + np.arange(size // unit, dtype=np.uint64)
        parts.append((units.ravel(), program, time))
    units, programs, times = zip(*parts, strict=True)
    counts = [u.size for u in units]
    return np.concatenate(units), np.repeat(programs, counts), np.repeat(times, counts)


def install():
    """Watch every launch of this process; a second call changes nothing."""
    executor, builder = machine.GridExecutor, machine.InterpreterBuilder
    if getattr(executor, "watched", False):
        return
    executor.watched = True
    call, place = executor.__call__, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    launches = []

    def watched_call(self, *args, **kwargs):
        bound = [*args, *kwargs.values()]
        tensors = [
            t for arg in bound for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, torch.Tensor)
        ]
        launch = Launch(self, tensors)
        launches.append(launch)
        try:
            call(self, *args, **kwargs)
        except machine.InterpreterError as error:
            if isinstance(error.__cause__, Fault):
                raise error.__cause__ from None
            raise
        finally:
            launches.pop()
        launch.end()

    def watched_place(self, *index):
        place(self, *index)
        if launches:
            launches[-1].begin(index, self.grid_dim)

    def watched_load(self, pointers, mask, *rest, **named):
        launches[-1].access(launches[-1].loads, "load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self, pointers, value, mask, *rest, **named):
        launches[-1].access(launches[-1].stores, "store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def atomic(self, *operands, **named):
        raise Fault(f"{launches[-1].name}: an atomic operation, which is not watched")

    executor.__call__ = watched_call
    builder.set_grid_idx = watched_place
    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw = builder.create_atomic_cas = atomic
