"""BatchNorm as the engine applies it: affines and backward terms, and bookkeeping over the nodes of a bottleneck block.

Letters as in `engine/`. A bottleneck block's readers share the statistics of what they read, but each has an affine,
an eps and a selection of channels of its own; so per-channel vectors are kept over all nodes and picked per reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constants import device_constant
from .plan import BlockPlan


class Norm(NamedTuple):
    """One BatchNorm as it was applied: vectors of its channels in float32 (float64 for float64 blocks).

    share: [2, C], in backward: what BatchNorm's sums take off every pixel's gradient for each unit of sum(g) and of
    sum(g xhat): -scale / n and -scale rstd / n. None in forward, and with given statistics.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    fixed: bool
    share: Tensor | None = None

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift."""
        return self.scale, self.shift

    def backward_terms(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `verbs.linear` makes dz of, from sum(g) and sum(g xhat), [2, C]."""
        if self.share is None:
            nothing = torch.zeros_like(self.scale)
            return self.scale, nothing, nothing, None, None
        constant, linear = sums
        return self.scale, linear, constant, self.mean, self.share


def linear_terms(q: Tensor, r: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and r; with `share` [2, C] r and q are sums still, multiplied by its rows."""
    if share is not None:
        r, q = share * paired(r, q)
    return q, r


def batch_norm(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float | Tensor, fixed: bool) -> Norm:
    """A BatchNorm with these statistics, whose dtype counts; eps: a number, or one for each channel."""
    rstd = torch.rsqrt(variance + eps)
    scale = gamma * rstd
    return Norm(gamma, beta, mean, rstd, scale, torch.addcmul(beta.to(mean.dtype), mean, scale, value=-1), fixed)


def batch_norm_vectors(
    gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float | Tensor, pixels: int | Tensor
) -> Tensor:
    """What a BatchNorm is to its backward, [7, C] in mean's dtype: gamma, beta, scale, shift, rstd and `Norm.share`.

    Backends have it in one launch. Args: as in `batch_norm`; pixels: that statistics were taken over.
    """
    norm = batch_norm(gamma.to(mean.dtype), beta.to(mean.dtype), mean, variance, eps, False)
    constant = norm.scale / -pixels
    return torch.stack([norm.gamma, norm.beta, *norm.affine, norm.rstd, constant, constant * norm.rstd])


def backward_norms(
    parameters: Sequence[tuple[Tensor, Tensor]], statistics: Sequence[Tensor], eps: Sequence[float],
    fixed: Sequence[bool], pixels: int | Tensor, vectors: Callable[..., Tensor] = batch_norm_vectors,
) -> list[Norm]:  # fmt: skip
    """BatchNorms for backward, all at once: on a GPU an operation on a few channels takes its launch's time.

    Args:
        parameters: gamma and beta of each.
        statistics: mean and biased variance of each, [2, C].
        eps, fixed: of each.
        pixels: that statistics were taken over.
        vectors: a backend's `batch_norm_vectors`.
    """
    if not statistics:
        return []
    widths = [used.shape[1] for used in statistics]
    mean, variance = _joined(statistics)
    made = vectors(*_joined_parameters(parameters), mean, variance, _eps_of(eps, widths, mean), pixels)
    gamma, beta, scale, shift, rstd = made[:5]
    every = (gamma, beta, mean, rstd, scale, shift, made[5:])
    split = zip(*(vector.split(widths, dim=-1) for vector in every), strict=True)
    return [Norm._make((*own[:6], given, None if given else own[6])) for own, given in zip(split, fixed, strict=True)]


def affines(
    parameters: Sequence[tuple[Tensor, Tensor]], statistics: Sequence[tuple[Tensor, Tensor]], eps: Sequence[float],
    vectors: Callable[..., Tensor], dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """scale and shift of BatchNorms in `dtype`, all at once.

    Args: as in `backward_norms`, but statistics are mean and variance, of any dtype.
    """
    mean, variance = (_joined(each).to(dtype) for each in zip(*statistics, strict=True))
    widths = [len(own) for own, _ in statistics]
    made = vectors(*_joined_parameters(parameters), mean, variance, _eps_of(eps, widths, mean), 1)
    scale, shift = made[2:4].clone()  # without the other five, which are more than a small image's pixels
    return [*zip(scale.split(widths), shift.split(widths), strict=True)]


def _joined_parameters(parameters: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    gamma, beta = (_joined(each) for each in zip(*parameters, strict=True))
    return gamma, beta


def _eps_of(eps: Sequence[float], widths: Sequence[int], like: Tensor) -> float | Tensor:
    """One number where all are the same, else one for each channel."""
    return eps[0] if len(set(eps)) == 1 else _of_channels(tuple(eps), tuple(widths), like.dtype, like.device)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Along the channels, the last dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -1)


@device_constant(maxsize=1024)
def _of_channels(
    numbers: tuple[float, ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Each number as often as its width says."""
    every = [number for number, width in zip(numbers, widths, strict=True) for _ in range(width)]
    return torch.tensor(every, dtype=dtype, device=device)


def paired(first: Tensor, second: Tensor) -> Tensor:
    """Two vectors [C] as [2, C]: without a copy where they are the rows of one."""
    alike = first.shape == second.shape and first.dtype == second.dtype
    whole = alike and first.is_contiguous() and second.is_contiguous()
    shared = first.untyped_storage()._cdata == second.untyped_storage()._cdata
    if whole and shared and second.storage_offset() == first.storage_offset() + len(first):
        return first.as_strided((2, len(first)), (len(first), 1))
    return torch.stack([first, second])


def folded(weight: Tensor, affine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm behind it."""
    scale, shift = affine
    return (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype), shift


class Columns:
    """The channels of some nodes, as one layer's concatenation orders them; zeros stand for nodes it does not read.

    Where they are neighbours there, as in every dense block, nothing is copied.
    """

    def __init__(self, plan: BlockPlan, layer: int, nodes: tuple[int, ...], device: torch.device):
        self.start = _start(plan, layer, nodes)
        self.length = sum(plan.node_widths[node] for node in nodes)
        self.places = partial(_positions, plan, layer, nodes, device)

    def vector(self, vector: Tensor) -> Tensor:
        """[.., channels of the layer] -> [.., channels of the nodes]."""
        if self.start is not None:
            return vector.narrow(-1, self.start, self.length)
        return torch.cat([vector, vector.new_zeros(*vector.shape[:-1], 1)], -1).index_select(-1, self.places())

    def weight(self, weight: Tensor) -> Tensor:
        """[O, channels of the layer, k, k] -> [O, channels of the nodes, k, k]."""
        if self.start is not None:
            return weight.narrow(1, self.start, self.length)
        return torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1).index_select(1, self.places())

    def norm(self, norm: Norm) -> Norm:
        """A BatchNorm over the layer's channels -> over the nodes'."""
        share = None if norm.share is None else self.vector(norm.share)
        return Norm._make((*(self.vector(v) for v in norm[:6]), norm.fixed, share))


def shared_statistics(columns: Sequence[Columns], norms: Sequence[Norm]) -> tuple[Tensor, Tensor]:
    """mean and rstd of some nodes' channels, which their readers share; one that lacks a node has zeros there."""
    mean, rstd = norms[0].mean, norms[0].rstd
    if any(each.start is None for each in columns):
        for norm in norms[1:]:
            mean, rstd = torch.where(rstd > 0, mean, norm.mean), torch.where(rstd > 0, rstd, norm.rstd)
    return mean, rstd


def collected(plan: BlockPlan, layer: int, parts: Sequence[tuple[Columns, Tensor]]) -> Tensor:
    """Sums [2, channels of some nodes], in parts, -> [2, channels of the layer], zeros for what no part has."""
    length, device = plan.link_widths[layer - 1], parts[0][1].device
    ordered = sorted(parts, key=lambda part: part[0].start or 0)
    ends = [0, *(columns.start + columns.length for columns, _ in ordered if columns.start is not None)]
    if [columns.start for columns, _ in ordered] == ends[:-1] and ends[-1] == length:
        return ordered[0][1] if len(ordered) == 1 else torch.cat([sums for _, sums in ordered], 1)
    whole = torch.zeros(2, length + 1, dtype=parts[0][1].dtype, device=device)
    for columns, sums in parts:
        if columns.start is not None:
            whole[:, columns.start : columns.start + columns.length] = sums
        else:
            whole.index_copy_(1, columns.places(), sums)
    return whole[:, :-1]


@lru_cache(maxsize=4096)
def _start(plan: BlockPlan, layer: int, nodes: tuple[int, ...]) -> int | None:
    """Where the nodes stand side by side, in this order, in the layer's concatenation; None where they do not."""
    links = plan.links[layer - 1]
    if nodes[0] not in links:
        return None
    first = links.index(nodes[0])
    if links[first : first + len(nodes)] != nodes:
        return None
    return sum(plan.node_widths[source] for source in links[:first])


@device_constant(maxsize=4096)
def _positions(plan: BlockPlan, layer: int, nodes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each channel of the nodes stands in the layer's concatenation; its length where the layer lacks it."""
    starts, start = {}, 0
    for source in plan.links[layer - 1]:
        starts[source] = start
        start += plan.node_widths[source]
    places: list[int] = []
    for node in nodes:
        width = plan.node_widths[node]
        places += range(starts[node], starts[node] + width) if node in starts else [start] * width
    return torch.tensor(places, device=device)


@device_constant(maxsize=4096)
def _channels(plan: BlockPlan, nodes: tuple[int, ...], device: torch.device) -> Tensor:
    """The nodes' channels among those of all nodes of the block."""
    places = (_side_by_side(plan, node, node) for node in nodes)
    return torch.tensor([c for start, length in places for c in range(start, start + length)], device=device)


def _side_by_side(plan: BlockPlan, first: int, last: int) -> tuple[int, int]:
    """Where the channels of the nodes from `first` to `last` begin among those of all nodes, and how many they are."""
    return sum(plan.node_widths[:first]), sum(plan.node_widths[first : last + 1])


class NodeStatistics:
    """Mean and variance of every channel of every node, filled as the nodes are made."""

    def __init__(self, plan: BlockPlan, device: torch.device, dtype: torch.dtype):
        self.plan, self.device = plan, device
        self.values = torch.zeros(2, sum(plan.node_widths), dtype=dtype, device=device)

    def room(self, node: int) -> Tensor:
        """Where one node's mean and variance lie, [2, C]."""
        return self.values.narrow(1, *_side_by_side(self.plan, node, node))

    def set(self, node: int, mean: Tensor, variance: Tensor) -> None:
        """Note what one node's channels have, unless it was written there."""
        room = self.room(node)
        if room.data_ptr() != mean.data_ptr():
            room.copy_(paired(mean, variance))

    def of(self, nodes: tuple[int, ...]) -> Tensor:
        """Of the concatenated nodes, [2, C]: a tensor of its own."""
        return self.values.index_select(1, _channels(self.plan, nodes, self.device))

    def starts(self, nodes: tuple[int, ...]) -> tuple[int, ...]:
        """Where each node's channels begin in `values`."""
        return tuple(_side_by_side(self.plan, node, node)[0] for node in nodes)


class SharedTerms:
    """The statistics' share of a feature's gradient: linear in its readers, so it is summed and applied once.

    df = G + Q f + R with Q = -(1 / n) sum_r scale_r rstd_r dgamma_r and R = -(1 / n) sum_r scale_r dbeta_r - Q mean,
    where G is the sum of scale_r g_r. The readers share mean, but each has its own eps and so its own rstd.
    """

    def __init__(self, plan: BlockPlan, readers: Mapping[int, Norm], device: torch.device, dtype: torch.dtype):
        """readers: by layer, those whose BatchNorm took the batch's statistics."""
        self.plan, self.device = plan, device
        # rows: R without its last term, and Q; of every channel of every node
        self.values = torch.zeros(2, sum(plan.node_widths), dtype=dtype, device=device)
        self.nodes: set[int] = set()
        self.means: dict[int, Tensor] = {}
        for layer, norm in readers.items():
            widths = [plan.node_widths[node] for node in plan.links[layer - 1]]
            self.means |= zip(plan.links[layer - 1], norm.mean.split(widths), strict=True)

    def terms(self, nodes: tuple[int, ...], norms: Sequence[Norm]) -> tuple[Tensor, Sequence[Tensor]] | None:
        """What `verbs.send` takes to add readers' shares by itself; None where the nodes' channels lie apart.

        norms: of the readers, over the concatenated channels of `nodes`.
        """
        first, last = nodes[0], nodes[-1]
        each = [norm.share for norm in norms if norm.share is not None]
        if len(each) < len(norms) or nodes != tuple(range(first, last + 1)):
            return None
        self.nodes.update(nodes)
        return self.values.narrow(1, *_side_by_side(self.plan, first, last)), each

    def add(self, nodes: tuple[int, ...], norm: Norm, sums: Tensor) -> None:
        """Add one reader's share; all arguments over the concatenated channels of `nodes`."""
        assert norm.share is not None
        self.nodes.update(nodes)
        self.values.index_add_(1, _channels(self.plan, nodes, self.device), norm.share * sums)

    def applied(self, verbs: Any, node: int, arriving: Tensor, feature: Tensor) -> Tensor:
        """The whole gradient of a node."""
        if node not in self.nodes:
            return arriving
        constant, linear = self.values.narrow(1, *_side_by_side(self.plan, node, node))
        return verbs.linear(arriving, feature, None, linear, constant, self.means[node])
