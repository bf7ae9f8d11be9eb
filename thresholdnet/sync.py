"""BatchNorm statistics shared among processes, as nn.SyncBatchNorm shares them: one collective a BatchNorm and pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import pixels


def total(counts: Tensor | None, own: int) -> int | Tensor:
    """Pixels of all ranks, or this process's own."""
    return own if counts is None else counts.sum()


def merge(moments: tuple[Tensor, Tensor], counts: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of this rank -> those over the pixels of all ranks.

    Args:
        counts: pixels of every rank [ranks], None for one process alone.
        group: the process group's name.
    """
    if counts is None:
        return moments
    own = torch.stack(moments)
    every = own.new_empty(len(counts), *own.shape)
    dist.all_gather(list(every), own, group=_group(group))
    share = (counts / counts.sum()).to(own.dtype)[:, None]
    every = torch.where(share[..., None] > 0, every, torch.zeros_like(every))  # a rank without pixels has NaN
    mean = (share * every[:, 0]).sum(0)
    variance = (share * (every[:, 1] + (every[:, 0] - mean).square())).sum(0)
    return mean, variance


def add(sums: Tensor, group: str) -> Tensor:
    """Sums [2, C] of this rank -> those over all ranks; with no group as they are."""
    if not group:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=_group(group))
    return total


def active(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group itself, or the default one for None; None where there is nobody to share with."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def counts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Pixels of every rank [ranks], float64, for this rank's batch x [N, C, ...]: one small collective."""
    own = torch.full(
        (1,), float(pixels.count(x)), dtype=torch.float64, device=x.device
    )  # filled there: a CUDA graph takes no copy
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return torch.cat(every)


def _group(name: str) -> dist.ProcessGroup:
    from torch.distributed import distributed_c10d  # missing in a torch built without distributed

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]  # operators carry plain strings
