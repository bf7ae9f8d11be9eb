"""The fused block over a plan: forward, backward, and what is kept between them. Knows verbs, no device.

Kept for backward: the input, each layer's raw convolution output once, per-channel statistics. Activated values live in
a workspace; backward makes them again. No concatenation is kept, and with `recompute` no bottleneck output either.

Letters: y_i = act(z_i * scale_i + shift_i) is node i of a conv_bn_relu block, z_i its raw convolution output. In a
bottleneck block node i is the raw feature f_i; its readers r normalise it each with an affine of their own over
statistics that all of them share: a_r = act(f * s_r + t_r), z_r = W1_r a_r, f_r = W2_r act(z_r * scale_r + shift_r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import load
from .plan import BlockPlan


class Spec(NamedTuple):
    """Everything about a call but its tensors.

    Attributes:
        plan: the block's structure.
        eps: one a BatchNorm, in forward order.
        fixed: per BatchNorm, True where it normalises with given statistics (eval mode) and not with the batch's.
        activation: "relu" or "relu6".
        backend: a name that `backends.choose` returned.
        save: keep what backward needs.
        recompute: do not keep bottleneck outputs; backward makes them again.
    """

    plan: BlockPlan
    eps: Sequence[float]
    fixed: Sequence[bool]
    activation: str
    backend: str
    save: bool
    recompute: bool = False


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

    def backward_terms(self, sum_g: Tensor, sum_gx: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, c of dz = a g + b z + c."""
        if self.fixed:
            return self.scale, torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        b = -self.scale * self.rstd * sum_gx / pixels
        return self.scale, b, -self.scale * sum_g / pixels - b * self.mean


def forward(
    spec: Spec, x: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a block.

    Args:
        spec: see `Spec`.
        x: [N, C, H, W].
        parameters: as in `reference.block_forward`.
        running: mean and variance of every BatchNorm in forward order; read only where it is fixed.

    Returns:
        The output (channels_last), the statistics used by each BatchNorm as [2, C] (mean, biased variance), and what
        backward needs beyond inputs and statistics (empty unless spec.save).
    """
    run = _Bottleneck if spec.plan.unit == "bottleneck" else _ConvBNReLU
    return run(spec, x, parameters).forward(running)


def backward(
    spec: Spec,
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x and of every parameter, in order; an empty tensor where `needs` is False.

    Args:
        grad: gradient of the output.
        statistics, saved: as `forward` returned them.
        needs: for x and each parameter.
    """
    run = _Bottleneck if spec.plan.unit == "bottleneck" else _ConvBNReLU
    block = run(spec, x, parameters)
    grads = block.backward(grad.contiguous(memory_format=torch.channels_last), statistics, saved, needs)
    made: list[Tensor] = []
    for like, found, needed in zip((x, *parameters), grads, needs, strict=True):
        if not needed:
            made.append(x.new_empty(0))
        elif found is None:  # nothing that leaves the block depends on it
            made.append(torch.zeros_like(like))
        elif found.untyped_storage().nbytes() > found.nbytes or found.data_ptr() == grad.data_ptr():
            # an operator may return neither its input nor parts of one tensor
            made.append(found.to(like.dtype, copy=True))
        else:
            made.append(found.to(like.dtype))
    return made


class _Block:
    """What both units share: the tensors of one call, and statistics."""

    per_layer: int  # parameters a layer
    norms: tuple[int, ...]  # positions of the BatchNorm weights among them

    def __init__(self, spec: Spec, x: Tensor, parameters: Sequence[Tensor]):
        self.spec, self.plan, self.parameters = spec, spec.plan, parameters
        self.act = spec.activation
        self.verbs: Any = load(spec.backend).Verbs(spec.plan, x)
        self.x = x
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.pixels = x.shape[0] * x.shape[2] * x.shape[3]
        self.used: list[Tensor] = []

    def weight(self, layer: int, position: int) -> Tensor:
        """A parameter of layer 1..L."""
        return self.parameters[(layer - 1) * self.per_layer + position]

    def norm(self, layer: int, which: int, mean: Tensor, variance: Tensor) -> Norm:
        """BatchNorm number `which` of a layer with these statistics."""
        position, index = self.norms[which], (layer - 1) * len(self.norms) + which
        gamma, beta = (self.weight(layer, position + i).to(self.wide) for i in (0, 1))
        rstd = torch.rsqrt(variance + self.spec.eps[index])
        scale = gamma * rstd
        return Norm(gamma, beta, mean, rstd, scale, beta - mean * scale, self.spec.fixed[index])

    def norm_of(self, statistics: Sequence[Tensor], layer: int, which: int) -> Norm:
        """The same from the statistics that forward returned."""
        mean, variance = statistics[(layer - 1) * len(self.norms) + which].to(self.wide)
        return self.norm(layer, which, mean, variance)

    def fixed(self, layer: int, which: int) -> bool:
        return self.spec.fixed[(layer - 1) * len(self.norms) + which]

    def given(self, running: Sequence[Tensor], layer: int, which: int) -> tuple[Tensor, Tensor]:
        index = 2 * ((layer - 1) * len(self.norms) + which)
        return running[index].to(self.wide), running[index + 1].to(self.wide)

    def note(self, mean: Tensor, variance: Tensor) -> None:
        self.used.append(torch.stack([mean, variance]))

    def lowest_needed(self, needs: Sequence[bool]) -> int:
        """First node whose gradient somebody asked for: backward stops there."""
        if needs[0]:
            return 0
        return next(i for i, needed in enumerate(needs[1:]) if needed) // self.per_layer + 1

    def output_gradients(self, grad: Tensor) -> dict[int, Tensor]:
        widths = [self.plan.node_widths[node] for node in self.plan.outputs]
        return dict(zip(self.plan.outputs, grad.split(widths, dim=1), strict=True))

    def release(self, nodes: list[Tensor | None], step: int) -> None:
        """Drop the nodes that no layer after `step` reads."""
        for node, (_, last) in enumerate(self.plan.lifetimes[: step + 1]):
            if last <= step:
                nodes[node] = None


def _live(nodes: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
    return [tensor for node in wanted if (tensor := nodes[node]) is not None]


class _ConvBNReLU(_Block):
    """Conv3x3 - BN - act; parameters a layer: weight, gamma, beta."""

    per_layer, norms = 3, (1,)

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs = self.plan, self.verbs
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        raw: list[Tensor] = []
        for i, sources in enumerate(plan.links, start=1):
            read, weight, fixed = _live(nodes, sources), self.weight(i, 0), self.fixed(i, 0)
            if fixed and not self.spec.save:  # inference: BatchNorm folded into the weight
                mean, variance = self.given(running, i, 0)
                norm = self.norm(i, 0, mean, variance)
                folded = (weight * norm.scale.view(-1, 1, 1, 1)).to(weight.dtype)
                y, _ = verbs.conv(read, folded, into=("node", i), bias=norm.shift, activation=self.act)
            else:
                z, moments = verbs.conv(read, weight, into=("raw", i), statistics=not fixed)
                mean, variance = self.given(running, i, 0) if fixed else moments
                y = verbs.normalise(z, self.norm(i, 0, mean, variance).affine, self.act, into=("node", i))
                if self.spec.save:
                    raw.append(z)
            self.note(mean, variance)
            nodes.append(y)
            self.release(nodes, i)
        return verbs.leave(_live(nodes, plan.outputs)), self.used, verbs.keep("raw", raw) if self.spec.save else []

    def backward(
        self, grad: Tensor, statistics: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan, verbs = self.plan, self.verbs
        raw, _ = verbs.kept("raw", saved)
        norms = [self.norm_of(statistics, i, 0) for i in range(1, plan.num_layers + 1)]
        nodes = [verbs.enter(self.x)]
        for i, (z, norm) in enumerate(zip(raw, norms, strict=True), start=1):
            nodes.append(verbs.normalise(z, norm.affine, self.act, into=("node", i)))
        incoming = self.output_gradients(grad)
        dz: list[Tensor | None] = [None] * (plan.num_layers + 1)
        grads: list[Tensor | None] = [None] * len(needs)
        for node in range(plan.num_layers, self.lowest_needed(needs) - 1, -1):
            readers = [i for i in plan.readers[node] if dz[i] is not None]
            if not readers and node not in incoming:
                continue  # a dead end
            weights = [self._slice(i, node) for i in readers]
            add, into = incoming.pop(node, None), ("gradient", node)
            if node == 0:
                dx, _, _ = verbs.gradient(_live(dz, readers), weights, add, into=into)
                grads[0] = verbs.leave([dx])
                break
            z, norm = raw[node - 1], norms[node - 1]
            masked = (z, norm.affine, norm.mean, norm.rstd)
            g, sum_g, sum_gx = verbs.gradient(
                _live(dz, readers), weights, add, into=into, masked=masked, activation=self.act
            )
            dz[node] = verbs.linear(g, z, *norm.backward_terms(sum_g, sum_gx, self.pixels))
            first = 1 + (node - 1) * self.per_layer
            if needs[first]:
                grads[first] = verbs.weight_gradient(_live(nodes, plan.links[node - 1]), dz[node], 3)
            grads[first + 1], grads[first + 2] = sum_gx, sum_g
        return grads

    def _slice(self, layer: int, node: int) -> Tensor:
        """The part of a layer's weight that reads `node`."""
        sources, widths = self.plan.links[layer - 1], self.plan.node_widths
        start = sum(widths[k] for k in sources[: sources.index(node)])
        return self.weight(layer, 0)[:, start : start + widths[node]]


class _Bottleneck(_Block):
    """BN - act - Conv1x1 - BN - act - Conv3x3; parameters a layer: gamma1, beta1, W1, gamma2, beta2, W2."""

    per_layer, norms = 6, (0, 3)

    def forward(self, running: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        plan, verbs, save = self.plan, self.verbs, self.spec.save
        nodes: list[Tensor | None] = [verbs.enter(self.x)]
        moments = {}  # of each feature, once for all readers that use the batch's
        if self._read_by_batch_norm(0):
            moments[0] = verbs.moments(nodes[0])
        features: list[Tensor] = []
        inners: list[Tensor] = []
        for i, sources in enumerate(plan.links, start=1):
            read = _live(nodes, sources)
            if self.fixed(i, 0):
                mean, variance = self.given(running, i, 0)
            else:
                mean, variance = (torch.cat([moments[node][part] for node in sources]) for part in (0, 1))
            self.note(mean, variance)
            affine, batch = self.norm(i, 0, mean, variance).affine, not self.fixed(i, 1)
            inner, found = self._inner(i, read, affine, statistics=batch)
            mean, variance = found if batch else self.given(running, i, 1)
            self.note(mean, variance)
            into = ("scratch", self.plan.bottleneck_widths[i - 1])
            activated = verbs.normalise(inner, self.norm(i, 1, mean, variance).affine, self.act, into=into)
            wanted = self._read_by_batch_norm(i)
            feature, found = verbs.conv([activated], self.weight(i, 5), into=("node", i), statistics=wanted)
            if wanted:
                moments[i] = found
            if save:
                features.append(feature)
                inners.append(inner)
            nodes.append(feature)
            self.release(nodes, i)
        saved: list[Tensor] = []
        if save:
            saved = verbs.keep("node", features) + ([] if self.spec.recompute else verbs.keep("inner", inners))
        return verbs.leave(_live(nodes, plan.outputs)), self.used, saved

    def _inner(self, layer: int, read: list[Tensor], affine: tuple[Tensor, Tensor], statistics: bool = False) -> Any:
        """The bottleneck output of a layer, and its moments."""
        kept = self.spec.save and not self.spec.recompute
        into = ("inner", layer) if kept else ("scratch inner", self.plan.bottleneck_widths[layer - 1])
        return self.verbs.conv(
            read, self.weight(layer, 2), into=into, affine=affine, activation=self.act, statistics=statistics
        )

    def _read_by_batch_norm(self, node: int) -> bool:
        return any(not self.fixed(reader, 0) for reader in self.plan.readers[node])

    def backward(
        self, grad: Tensor, statistics: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        plan, verbs = self.plan, self.verbs
        features, saved = verbs.kept("node", saved)
        inners, _ = ([], saved) if self.spec.recompute else verbs.kept("inner", saved)
        nodes = [verbs.enter(self.x), *features]
        arriving = {node: verbs.arrive(g, node) for node, g in self.output_gradients(grad).items()}
        shared = [_SharedTerms() for _ in plan.node_widths]
        grads: list[Tensor | None] = [None] * len(needs)
        for i in range(plan.num_layers, max(self.lowest_needed(needs), 1) - 1, -1):
            if i not in arriving:
                continue  # a dead end
            sources = plan.links[i - 1]
            read = _live(nodes, sources)
            outer, norm = self.norm_of(statistics, i, 0), self.norm_of(statistics, i, 1)
            dfeature = shared[i].applied(verbs, arriving.pop(i), nodes[i], self.pixels)
            inner = self._inner(i, read, outer.affine)[0] if self.spec.recompute else inners[i - 1]
            first, width = 1 + (i - 1) * self.per_layer, plan.bottleneck_widths[i - 1]
            if needs[first + 5]:
                activated = verbs.normalise(inner, norm.affine, self.act, into=("scratch", width))
                grads[first + 5] = verbs.weight_gradient([activated], dfeature, 3)
            masked = (inner, norm.affine, norm.mean, norm.rstd)
            g, sum_g, sum_gx = verbs.gradient(
                [dfeature], [self.weight(i, 5)], None, into=("scratch", width), masked=masked, activation=self.act
            )
            dinner = verbs.linear(g, inner, *norm.backward_terms(sum_g, sum_gx, self.pixels))
            grads[first + 3], grads[first + 4] = sum_gx, sum_g
            if needs[first + 2]:
                grads[first + 2] = verbs.weight_gradient(read, dinner, 1, affine=outer.affine, activation=self.act)
            before = [arriving.get(node) for node in sources]
            sent, sum_g, sum_gx = verbs.reader_gradient(
                dinner, self.weight(i, 2), read, sources, outer, before, self.act
            )
            grads[first], grads[first + 1] = sum_gx, sum_g
            start = 0
            for node, now in zip(sources, sent, strict=True):
                arriving[node] = now
                end = start + plan.node_widths[node]
                if not outer.fixed:
                    shared[node].add(outer, sum_g, sum_gx, slice(start, end))
                start = end
        if needs[0] and 0 in arriving:
            grads[0] = verbs.leave([shared[0].applied(verbs, arriving[0], nodes[0], self.pixels)])
        return grads


class _SharedTerms:
    """The statistics' share of a feature's gradient: linear in its readers, so it is summed and applied once.

    df = G + Q f + R with Q = -(1 / M) sum_r scale_r rstd_r dgamma_r and R = -(1 / M) sum_r scale_r dbeta_r - Q mean,
    where G is the sum of scale_r g_r. The readers share mean, but each has its own eps and so its own rstd.
    """

    def __init__(self) -> None:
        self.linear: Tensor | None = None  # sum of scale rstd dgamma
        self.constant: Tensor | None = None  # sum of scale dbeta
        self.mean: Tensor | None = None

    def add(self, norm: Norm, sum_g: Tensor, sum_gx: Tensor, span: slice) -> None:
        linear = (norm.scale * norm.rstd * sum_gx)[span]
        constant = (norm.scale * sum_g)[span]
        self.mean = norm.mean[span]
        self.linear = linear if self.linear is None else self.linear + linear
        self.constant = constant if self.constant is None else self.constant + constant

    def applied(self, verbs: Any, arriving: Tensor, feature: Tensor, pixels: int) -> Tensor:
        if self.linear is None or self.constant is None or self.mean is None:
            return arriving
        q = -self.linear / pixels
        return verbs.linear(arriving, feature, None, q, -self.constant / pixels - q * self.mean)
