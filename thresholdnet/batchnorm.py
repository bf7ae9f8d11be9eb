"""BatchNorm as the engine applies it: affines and backward terms, and bookkeeping over the nodes of a bottleneck block.

Letters as in `engine.py`. A bottleneck block's readers share the statistics of what they read, but each has an affine,
an eps and a selection of channels of its own; so per-channel vectors are kept over all nodes and picked per reader.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constants import device_constant
from .plan import BlockPlan


class Norm(NamedTuple):
    """One BatchNorm as it was applied: vectors of its channels in float32 (float64 for float64 blocks)."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    fixed: bool

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift."""
        return self.scale, self.shift

    def backward_terms(self, sum_g: Tensor, sum_gx: Tensor, pixels: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, c of dz = a g + b z + c."""
        if self.fixed:
            return self.scale, torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        b = -self.scale * self.rstd * sum_gx / pixels
        return self.scale, b, -self.scale * sum_g / pixels - b * self.mean


def batch_norm(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float, fixed: bool) -> Norm:
    """A BatchNorm with these statistics."""
    rstd = torch.rsqrt(variance + eps)
    scale = gamma * rstd
    return Norm(gamma, beta, mean, rstd, scale, beta - mean * scale, fixed)


def folded(weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm behind it."""
    return (weight * norm.scale.view(-1, 1, 1, 1)).to(weight.dtype), norm.shift


class Columns:
    """The channels of some nodes, as one layer's concatenation orders them; zeros stand for nodes it does not read."""

    def __init__(self, plan: BlockPlan, layer: int, nodes: tuple[int, ...], device: torch.device):
        self.whole = nodes == plan.links[layer - 1]
        self.length = plan.link_widths[layer - 1]
        self.positions = None if self.whole else _positions(plan, layer, nodes, device)

    def vector(self, vector: Tensor) -> Tensor:
        """[channels of the layer] -> [channels of the nodes]."""
        if self.positions is None:
            return vector
        return torch.cat([vector, vector.new_zeros(1)])[self.positions]

    def weight(self, weight: Tensor) -> Tensor:
        """[O, channels of the layer, 1, 1] -> [O, channels of the nodes, 1, 1]."""
        if self.positions is None:
            return weight
        return torch.cat([weight, weight.new_zeros(weight.shape[0], 1, 1, 1)], dim=1)[:, self.positions]

    def norm(self, norm: Norm) -> Norm:
        """A BatchNorm over the layer's channels -> over the nodes'."""
        if self.whole:
            return norm
        gamma, beta, mean, rstd, scale, shift = (self.vector(v) for v in norm[:-1])
        return Norm(gamma, beta, mean, rstd, scale, shift, norm.fixed)

    def collect(self, so_far: Tensor | None, found: Tensor) -> Tensor:
        """Put sums over the nodes' channels into a vector over the layer's."""
        if self.positions is None:
            return found
        buffer = found.new_zeros(self.length + 1) if so_far is None else torch.cat([so_far, found.new_zeros(1)])
        return buffer.index_copy(0, self.positions, found)[:-1]


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
    starts = [sum(plan.node_widths[:node]) for node in range(len(plan.node_widths))]
    return torch.tensor([starts[node] + c for node in nodes for c in range(plan.node_widths[node])], device=device)


class NodeStatistics:
    """Mean and variance of every channel of every node, filled as the nodes are made."""

    def __init__(self, plan: BlockPlan, device: torch.device, dtype: torch.dtype):
        self.plan, self.device = plan, device
        self.values = torch.zeros(2, sum(plan.node_widths), dtype=dtype, device=device)

    def set(self, node: int, mean: Tensor, variance: Tensor) -> None:
        """Note what one node's channels have."""
        start = sum(self.plan.node_widths[:node])
        self.values[:, start : start + len(mean)] = torch.stack([mean, variance])

    def of(self, nodes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Of the concatenated nodes."""
        mean, variance = self.values.index_select(1, _channels(self.plan, nodes, self.device))
        return mean, variance


class SharedTerms:
    """The statistics' share of a feature's gradient: linear in its readers, so it is summed and applied once.

    df = G + Q f + R with Q = -(1 / M) sum_r scale_r rstd_r dgamma_r and R = -(1 / M) sum_r scale_r dbeta_r - Q mean,
    where G is the sum of scale_r g_r. The readers share mean, but each has its own eps and so its own rstd.
    """

    def __init__(self, plan: BlockPlan, device: torch.device, dtype: torch.dtype):
        self.plan, self.device = plan, device
        # rows: sum of scale rstd dgamma, sum of scale dbeta, mean; of every channel of every node
        self.values = torch.zeros(3, sum(plan.node_widths), dtype=dtype, device=device)
        self.nodes: set[int] = set()

    def add(self, nodes: tuple[int, ...], norm: Norm, sum_g: Tensor, sum_gx: Tensor) -> None:
        """Add one reader's share; all arguments over the concatenated channels of `nodes`."""
        channels = _channels(self.plan, nodes, self.device)
        terms = torch.stack([norm.scale * norm.rstd * sum_gx, norm.scale * sum_g])
        self.values[:2].index_add_(1, channels, terms)
        # a reader that lacks a node has zeros for its statistics
        self.values[2].index_copy_(0, channels, torch.where(norm.rstd > 0, norm.mean, self.values[2][channels]))
        self.nodes.update(nodes)

    def applied(self, verbs: Any, node: int, arriving: Tensor, feature: Tensor, pixels: int | Tensor) -> Tensor:
        """The whole gradient of a node."""
        if node not in self.nodes:
            return arriving
        start = sum(self.plan.node_widths[:node])
        linear, constant, mean = self.values[:, start : start + self.plan.node_widths[node]]
        q = -linear / pixels
        return verbs.linear(arriving, feature, None, q, -constant / pixels - q * mean)
