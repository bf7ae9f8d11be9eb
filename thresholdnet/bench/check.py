"""Whether a provider's step is right, and what it keeps: both found before any time is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .providers import Runner

BOUNDS = {
    "fp64": {"output": 1e-9, "gradients": 1e-7, "input": 1e-7},
    "fp32": {"output": 1e-3, "gradients": 5e-2, "input": 5e-2},
    "bf16": {"output": 1e-1, "gradients": 5e-1, "input": 5e-1},
    "fp16": {"output": 2e-2, "gradients": 2e-1, "input": 2e-1},
}


def result(runner: Runner, with_input: bool) -> dict[str, list[Tensor]]:
    """What one step gives: its "output"; the parameters' "gradients" and the images' ("input") where it makes them."""
    made = {}
    with_input = with_input and runner.train
    runner.images.requires_grad_(with_input)
    try:
        made["output"] = [runner.step().clone()]
        if runner.train:
            made["gradients"] = [_gradient(parameter).clone() for parameter in runner.model.parameters()]
        if with_input:
            made["input"] = [_gradient(runner.images)]
    finally:
        runner.images.requires_grad_(False)
    return made


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def errors(made: dict[str, list[Tensor]], truth: dict[str, list[Tensor]]) -> dict[str, float]:
    """Root mean square of the difference over that of the truth, for each quantity that was made.

    All gradients of parameters are one vector: a parameter whose own gradient is mere rounding is no reason to fail.
    """
    return {what: _rms(tensors, truth[what]) for what, tensors in made.items()}


def _rms(made: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(made, truth, strict=True)]
    difference = sum((a - b).square().sum().item() for a, b in pairs)
    size = sum(b.square().sum().item() for _, b in pairs)
    return float((difference / max(size, 1e-300)) ** 0.5)


def complaint(found: dict[str, float], dtype: str) -> str | None:
    """What is wrong with these errors in one sentence, None where nothing is."""
    for what, bound in BOUNDS[dtype].items():
        if what in found and not found[what] <= bound:  # a NaN is wrong as well
            return f"wrong: {what} off by {found[what]:.1e} of eager's root mean square, where {bound:.0e} is allowed"
    return None


def saved_bytes(runner: Runner) -> int:
    """Bytes of all storages that autograd holds between forward and backward; parameters, buffers, images left out."""
    if not runner.train:
        return 0
    own = {_key(t) for t in (*runner.model.parameters(), *runner.model.buffers(), runner.images)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:  # autograd holds the tensor itself, so no other one gets its address
        if _key(tensor) not in own:
            kept[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    runner.clear()
    with runner.within(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = runner.call(runner.images)
    out.sum().backward()
    return sum(kept.values())


def peak_bytes(runner: Runner, device: torch.device) -> int | None:
    """Most bytes that a step needs beyond weights and images, gradients included; None where no allocator counts."""
    if device.type != "cuda":
        return None
    runner.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
