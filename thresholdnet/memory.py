"""What a training step keeps, needs and moves: counted on the meta device, without computing and without a GPU.

The step really runs, forward and backward, on tensors that have a shape but no content; every storage that an operation
makes is followed until nothing holds it any more. Fused blocks run their engine, so its own workspaces count.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import ops
from .checks import one_of
from .counting import checked_shape
from .layers import Unlike, meta_copy
from .linked import LinkedBlock
from .models import fuse_blocks
from .pixels import channels_last
from .places import floating_dtype
from .recognise import Found, recognise

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Account:
    """One training step in one mode, in bytes; parameters, their gradients and the images themselves are not counted.

    Attributes:
        kept: activations (and statistics) held between forward and backward.
        peak: most bytes of activations, gradients of activations and workspaces alive at once.
        moved: bytes of all operands and results of all operations, each once an operation; of the native backend, whose
            elementwise steps are operations of their own, when fused.
        blocks: what each `ThresholdBlock` adds to `kept`, by its name.
    """

    kept: int
    peak: int
    moved: int
    blocks: dict[str, int]


def account(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Account]:
    """Bytes of a training step, by mode: "eager" (plain modules), "fused", "fused, recompute" (bottlenecks made again).

    A model with blocks that `tn.convert` would fuse is counted as it is, in every mode, and a warning says so.

    Args:
        model: a network or a `ThresholdBlock`; neither moved nor changed. It may return several tensors in a list or a
            dict, as feature pyramids do: backward starts from all of them.
        input_shape: [N, C, H, W] of the images, [N, C, D, H, W] of volumes or [N, C, L] of signals.
        dtype: of weights and images.

    Raises:
        TypeError, ValueError: not a module, a bad shape, a shape that the model refuses, or an output without a tensor
            that requires a gradient.
    """
    return {name: _step(*prepared)[0] for name, prepared in _modes(model, input_shape, dtype)}


def over_time(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[list[int], list[int]]]:
    """Bytes alive after each operation of a training step, forward and backward, by mode.

    Arguments, modes and errors as in `account`; the largest number is its `peak`.
    """
    return {name: _step(*prepared)[1] for name, prepared in _modes(model, input_shape, dtype)}


def kept(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """The `kept` of `account`, by mode, from the forward pass alone: much sooner. Arguments and errors as there."""
    return {name: sum(_forward(*prepared)[1].values()) for name, prepared in _modes(model, input_shape, dtype)}


def as_dict(report: Mapping[str, Account]) -> dict[str, dict[str, Any]]:
    """JSON-ready."""
    return {name: asdict(entry) for name, entry in report.items()}


def dtype_of(name: str) -> torch.dtype:
    """The dtype behind "bf16", "fp16", "fp32" or "fp64"."""
    return DTYPES[one_of("dtype", name, DTYPES)]


def _modes(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[str, tuple[nn.Module, Tensor, set[int]]]]:
    """Every mode with a meta copy of the model in it, images, and the keys of the storages that are not counted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    shape = checked_shape(input_shape)
    floating_dtype(dtype)
    if foreign := _unconverted(model):
        warnings.warn(
            f"model must be converted (tn.convert) to be counted fused, got a {foreign} as it is: fused counts it in "
            "plain torch",
            stacklevel=3,
        )
    return _prepared(model, shape, dtype)


def _prepared(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[str, tuple[nn.Module, Tensor, set[int]]]]:
    modes: dict[str, dict[str, Any]] = {
        "eager": {"fused": False},
        "fused": {"fused": True, "backend": "native"},
        "fused, recompute": {"fused": True, "backend": "native", "recompute": "bottleneck"},
    }
    for name, options in modes.items():
        twin = meta_copy(model).to(dtype).train()
        fuse_blocks(twin, **options)
        images = torch.empty(shape, dtype=dtype, device="meta")
        images = images.to(memory_format=channels_last(images))
        yield name, (twin, images, {_key(t) for t in (*twin.parameters(), *twin.buffers(), images)})


def _unconverted(model: nn.Module) -> str:
    """The kind and name of the first block that `convert` would fuse, empty where there is none."""
    inside = {part for block in model.modules() if isinstance(block, LinkedBlock) for part in block.modules()}
    for name, module in model.named_modules():
        try:
            found: Found | None = None if module in inside else recognise(module)
        except Unlike:
            continue
        if found is not None:
            return f"{found.kind} {name!r}" if name else found.kind
    return ""


def _forward(
    model: nn.Module, images: Tensor, own: set[int], inside: Sequence[str] = ()
) -> tuple[Tensor, dict[int, int], dict[int, str]]:
    """The output, the bytes of every storage kept for backward, and the block of `inside` that each was kept in."""
    kept, owners = {}, {}

    def pack(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in own and key not in kept:
            kept[key] = tensor.untyped_storage().nbytes()
            owners[key] = inside[-1] if inside else ""
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    return out, kept, owners


def _step(model: nn.Module, images: Tensor, own: set[int]) -> tuple[Account, tuple[list[int], list[int]]]:
    """The account, and the bytes alive after each operation of forward and of backward."""
    inside: list[str] = []
    names = {module: name or "block" for name, module in model.named_modules() if isinstance(module, LinkedBlock)}
    for module, name in names.items():
        _announce(module, name, inside)
    tracker = _Tracker(own)
    with tracker:
        out, kept, owners = _forward(model, images, own, inside)
        total, by_block = sum(kept.values()), dict.fromkeys(names.values(), 0)
        for key, size in kept.items():
            if owners[key]:
                by_block[owners[key]] += size
        forward = tracker.operations
        torch.autograd.backward([result.sum() for result in _differentiable(out)])
    alive = tracker.alive({_key(p.grad) for p in model.parameters() if p.grad is not None})
    return Account(total, max(alive, default=0), tracker.moved, by_block), (alive[:forward], alive[forward:])


def _differentiable(out: Any) -> list[Tensor]:
    """The tensors in a model's output, which may be a list or a dict of maps, from which backward starts."""
    found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise ValueError(f"model must return a tensor that requires a gradient, got {type(out).__name__} without one")
    return found


def _announce(module: nn.Module, name: str, inside: list[str]) -> None:
    """Note the name while the module runs. By a class, not hooks: they would part a block from its transition."""
    kind = type(module)

    def announced(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(name)
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            inside.pop()

    module.__class__ = type(kind.__name__, (kind,), {"forward": announced})


class _Tracker(TorchDispatchMode):
    """Follows every storage that an operation makes; runs the engine inside fused operators to see their workspaces."""

    def __init__(self, own: set[int]):
        super().__init__()
        self.own = own
        self.live: dict[int, tuple[StorageWeakRef, int, int]] = {}  # its bytes, and since which operation
        self.moved = 0
        self.operations = 0
        self.changes: list[tuple[int, int]] = []  # at an operation, of the bytes alive behind it

    def alive(self, gradients: set[int]) -> list[int]:
        """Bytes after each operation, but for the storages that became gradients of parameters: no activations."""
        changes = [0] * self.operations
        for operation, size in self.changes:
            changes[operation] += size
        for key in gradients.intersection(self.live):
            storage, size, since = self.live[key]
            if not storage.expired():
                changes[since] -= size
        return list(itertools.accumulate(changes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ENGINE:
            with self:
                return _ENGINE[func](*args)
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        views = {_key(t) for t in operands}
        if any(_key(t) not in views for t in tensors) or str(func).split(".")[1].endswith("_"):
            self.moved += sum(t.numel() * t.element_size() for t in (*tensors, *operands))
        self._follow(tensors)
        return result

    def _follow(self, tensors: list[Tensor]) -> None:
        for key in [key for key, (storage, *_) in self.live.items() if storage.expired()]:
            self.changes.append((self.operations, -self.live.pop(key)[1]))
        for tensor in tensors:
            key = _key(tensor)
            if key not in self.own and key not in self.live:
                storage = tensor.untyped_storage()
                self.live[key] = StorageWeakRef(storage), storage.nbytes(), self.operations
                self.changes.append((self.operations, storage.nbytes()))
        self.operations += 1


_ENGINE: dict[Any, Callable[..., Any]] = {
    torch.ops.thresholdnet.block.default: ops.run_block,
    torch.ops.thresholdnet.block_backward.default: ops.run_block_backward,
    torch.ops.thresholdnet.transition.default: ops.run_transition,
    torch.ops.thresholdnet.transition_backward.default: ops.run_transition_backward,
}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
