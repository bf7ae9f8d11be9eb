"""Bytes of a step, measured: what autograd keeps between forward and backward, and the most that is alive at once."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .providers import Graphed, Runner

SAVED_BY = "saved_tensors_hooks"


def saved_bytes(runner: Runner) -> int:
    """Bytes of all storages that autograd holds between forward and backward; parameters, buffers, images left out."""
    if not runner.train:
        return 0
    own = {_key(t) for t in (*runner.model.parameters(), *runner.model.buffers(), runner.images, runner.target)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:  # autograd holds the tensor itself, so no other one gets its address
        if _key(tensor) not in own:
            kept[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    runner.clear()
    with runner.within():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = runner.call(runner.images)
        runner.backward(out)
    runner.clear()
    return sum(kept.values())


def peak_bytes(runner: Runner) -> tuple[int, str]:
    """Most bytes that a step has alive beyond weights, their gradients and the images; and how that was found.

    Gradients lie ready and are added to, so that what is counted is activations, their gradients and workspaces. On a
    GPU torch's allocator counts; on a CPU the profiler reports every allocation of torch's, and the largest running sum
    is taken (what a library allocates by itself is not seen). A captured step owns a pool, whose size is given: it
    holds gradients, too, so it compares with other pools alone.
    """
    if isinstance(runner, Graphed):
        return runner.pool_bytes, "size of the graph's memory pool, gradients included"
    if runner.train:
        for parameter in runner.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()  # what earlier steps left in cycles would be freed within this one, and taken off its peak
    try:
        return _on_gpu(runner) if runner.images.device.type == "cuda" else _on_cpu(runner)
    finally:
        runner.clear()


def _on_gpu(runner: Runner) -> tuple[int, str]:
    device = runner.images.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _accumulate(runner)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"


def _on_cpu(runner: Runner) -> tuple[int, str]:
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        _accumulate(runner)
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most, "the profiler's allocation events"


def _accumulate(runner: Runner) -> None:
    """A step that adds to the gradients that are there."""
    with runner.within(), torch.set_grad_enabled(runner.train):
        out = runner.call(runner.images)
        if runner.train:
            runner.backward(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library logs to stderr whatever it is told; nothing else writes there meanwhile."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
