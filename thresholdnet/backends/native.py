"""The engine's verbs on the library's convolution, for every device: gather the links into a scratch, call the library.

The passes over pixels are torch's own operations (`elementwise.py`), or C++ on a CPU (`csrc.py`), which also has
weight gradients that read the links where they lie, and convolutions of few pixels. Without it, and with more pixels,
images of at most 2 x 2 have products of their own (`taps.py`).

Letters: N batch, C channels, H x W pixels; M = N H W; z raw convolution output, y = act(z * scale + shift), g gradient
of y, dz gradient of z. Tensors of pixels are [N, C, H, W] in channels_last order. Per-channel vectors are float32
(float64 for float64 tensors). Sources are lists: what a layer reads, in link order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..activations import activate_, number
from ..batchnorm import NodeStatistics, linear_terms, paired
from ..pixels import count
from ..plan import BlockPlan
from . import csrc, elementwise, taps
from .elementwise import Affine

Moments = tuple[Tensor, Tensor]
"""mean and biased variance per channel."""

Place = tuple[str, int]
"""Kind and index of a result."""


LARGE = 4
"""Elements of dz for each of a weight, from which turning the weight costs nothing (it took 1 % at 4, 20 % at 1/3)."""


class Packed(NamedTuple):
    """A weight [O, C, k, k], its shape, in the order in which one kind of convolution reads it."""

    tensor: Tensor
    shape: torch.Size


class ReaderNorm(Protocol):
    """A BatchNorm as it was applied, per channel."""

    gamma: Tensor
    beta: Tensor
    scale: Tensor
    shift: Tensor


class Verbs:
    """The verbs of one call of a block.

    `into` names a result's place, (kind, index), for backends that lay tensors out side by side; here every result is a
    tensor of its own. Kinds: "node" (activated values, or raw features), "raw" and "inner" (convolution outputs that
    backward needs), "gradient", "scratch".
    """

    readers_at_once = 1
    """Readers that `send` is best given together."""

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        """`plan`: None for a single convolution; `x`: any tensor with the call's pixels, dtype and device."""
        self.plan, self.like = plan, x
        self.passes: ModuleType = csrc if csrc.takes(x) else elementwise
        self.images = (x.shape[0], x.shape[2], x.shape[3])
        self.pixels = count(x)
        self.scratch: Tensor | None = None  # what a convolution reads, gathered: fresh pages at each would cost faults
        self.foreign: set[int] = set()  # storages that came from outside: never written into

    def enter(self, x: Tensor) -> Tensor:
        """Node 0 from the block's input."""
        return x.contiguous(memory_format=torch.channels_last)

    def conv(
        self,
        sources: Sequence[Tensor],
        weight: Tensor | Packed,
        *,
        into: Place,
        affine: Affine | None = None,
        bias: Tensor | None = None,
        activation: str = "relu",
        statistics: bool = False,
        moments: Tensor | None = None,
        dilation: int = 1,
    ) -> tuple[Tensor, Moments | None]:
        """conv2d over the concatenated sources, as large as they; with `statistics` also the moments of the result.

        `affine` normalises and activates what is read (pre-activation units); `bias` adds to the result and activates
        it (BatchNorm folded into the weight, inference). `weight` may be `packed`. `moments`, [2, C], is where a
        backend may write those that it returns. `dilation`: pixels between two taps of a 3x3 kernel, which pads as
        much.
        """
        z = self._linked_conv(sources, weight, affine, bias, activation, dilation)
        return z, self.moments(z) if statistics else None

    def _linked_conv(
        self, sources: Sequence[Tensor], weight: Tensor | Packed, affine: Affine | None, bias: Tensor | None,
        activation: str, dilation: int,
    ) -> Tensor:  # fmt: skip
        if not isinstance(weight, Packed):
            weight = weight.contiguous(memory_format=torch.channels_last)
            if csrc.convolves(sources[0], weight, dilation):
                return csrc.linked_conv2d(sources, weight, affine, bias, activation)
        return _convolved(self._gathered(sources, affine, activation), weight, bias, activation, dilation)

    def way(self, layer: int, weight: Tensor, dilation: int = 1) -> str:
        """How `conv` runs for this weight of a layer (0: behind the block), as far as it matters to `packed`."""
        few = csrc.convolves(self.like, weight, dilation) or taps.takes(self.like, weight.shape[2], dilation)
        return "library" if activates_in_library(weight) and self.pixels and not few else ""

    def packed(self, way: str, weight: Tensor, dilation: int = 1) -> Tensor | Packed:
        """The weight for `conv` where it goes this way."""
        weight = weight.contiguous(memory_format=torch.channels_last)
        if way != "library":
            return weight
        batch, height, width = self.images
        return laid_out(weight, (batch, weight.shape[1], height, width), dilation)

    def prepared(
        self, weights: Sequence[Any], read: Sequence[Sequence[int]] | None = None, affine: Sequence[bool] | None = None,
        dilations: Sequence[int] = (),
    ) -> Sequence[Any]:  # fmt: skip
        """Weights as `conv` takes them, of layers that `read` these widths, or lists of them as `gradient` does.

        `affine` says whether each `conv` takes one, made by `affine_of_nodes`; None where none does. `dilations`: of
        each of their 3x3 kernels; empty where all are 1. A pass asks for all of its own at once, for backends that pack
        them; here they stay as they are.
        """
        return weights

    def _gathered(self, sources: Sequence[Tensor], affine: Affine | None, activation: str) -> Tensor:
        """The (activated) sources side by side, until the next call."""
        if self.plan is not None and self.passes is csrc:
            needed = sum(source.shape[1] for source in sources) * self.pixels
            if self.scratch is None or self.scratch.numel() < needed:
                self.scratch = sources[0].new_empty(max(needed, max(self.plan.link_widths) * self.pixels))
        read: Tensor = self.passes.gather(sources, affine, activation, self.scratch)
        return read

    def affine(self, gamma: Tensor, beta: Tensor, moments: Moments, eps: float) -> Affine:
        """scale and shift [C] of a BatchNorm with these statistics, in their dtype."""
        scale, shift = self.passes.batch_norm_affine(gamma, beta, *moments, eps)
        return scale, shift

    def batch_norm_vectors(
        self, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float | Tensor, pixels: int | Tensor
    ) -> Tensor:
        """See `batchnorm.batch_norm_vectors`."""
        made: Tensor = self.passes.batch_norm_vectors(gamma, beta, mean, variance, eps, pixels)
        return made

    def affine_of_nodes(
        self, weight: Any, gamma: Tensor, beta: Tensor, statistics: NodeStatistics, nodes: tuple[int, ...], eps: float
    ) -> tuple[Any, Tensor]:
        """`affine` of a BatchNorm over these nodes, in front of `conv` with this weight as `prepared` gave it.

        Also returns the statistics that it has, [2, C], a tensor of its own.
        """
        mean, variance = used = statistics.of(nodes)
        return self.affine(gamma, beta, (mean, variance), eps), used

    def moments(self, z: Tensor) -> Moments:
        """Mean and biased variance over all pixels."""
        mean, variance = self.passes.moments(z)
        return mean, variance

    def normalise(self, z: Tensor, affine: Affine, activation: str, *, into: Place) -> Tensor:
        """act(z * scale + shift), rounded once."""
        y: Tensor = self.passes.gather([z], affine, activation)
        return y

    def gradient(
        self,
        readers: Sequence[Tensor],
        weights: Sequence[Tensor],
        add: Tensor | None,
        *,
        into: Place,
        masked: tuple[Tensor, Affine, Tensor, Tensor] | None = None,
        activation: str = "relu",
        dilation: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of one node, gathered from all its readers with the transposed link table.

        Args:
            readers: dz of every layer that reads the node.
            weights: of each of them, the slice of its weight that reads the node, [O, C, k, k].
            add: gradient of the node as a block output, or None; with no readers it must be given.
            masked: (z, affine, mean, rstd) of the node: apply its activation's mask and return BatchNorm's sums.
            dilation: of all these readers.

        Returns:
            The gradient g of the node's activated value behind the mask (or of the value itself), sum(g) and
            sum(g * xhat) (empty without `masked`).
        """
        own = bool(readers)
        if own:
            joined = self._gathered(readers, None, activation)
            g = self._data_gradient(joined, torch.cat(list(weights)) if len(weights) > 1 else weights[0], dilation)
        else:
            assert add is not None
            g, add = add, None
        return self._masked(g, add, masked, activation, own)

    def _data_gradient(self, dz: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
        """The gradient of a convolution's input, [N, C, H, W] in channels_last order."""
        padding = _padding(weight.shape, dilation)
        if taps.takes(dz, weight.shape[2], dilation):
            return taps.data_gradient(dz, weight.contiguous(memory_format=torch.channels_last))
        if not any(padding) or dz.numel() >= LARGE * weight.numel():  # as fast, and nothing is made like the result
            turned = weight.flip(2, 3) if any(padding) else weight
            turned = turned.transpose(0, 1).contiguous(memory_format=torch.channels_last)
            g = F.conv2d(dz, turned, padding=padding, dilation=dilation)
            # one channel is in either order, and leads the library
            return g.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        like = torch.empty(  # for its shape and order; never touched
            (dz.shape[0], weight.shape[1], *dz.shape[2:]),
            dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last,
        )  # fmt: skip
        g = torch.ops.aten.convolution_backward(
            dz, like, weight, None, [1, 1], padding, [dilation] * 2, False, [0, 0], 1, [True, False, False]
        )[0]
        return g.contiguous(memory_format=torch.channels_last)

    def _masked(
        self,
        g: Tensor,
        add: Tensor | None,
        masked: tuple[Tensor, Affine, Tensor, Tensor] | None,
        activation: str,
        own: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The end of `gradient`: g + add behind the mask, and the sums; `own`: g may be written into."""
        if masked is None:
            if add is not None:
                g.add_(add)
            elif not own:
                g = g.clone(memory_format=torch.channels_last)
            return g, g.new_empty(0), g.new_empty(0)
        z, affine, mean, rstd = masked
        g, sum_g, sum_gx = self.passes.mask_sums(g, add, z, affine, mean, rstd, activation, own)
        return g, sum_g, sum_gx

    def arrive(self, grad: Tensor, place: Place) -> Tensor:
        """Take up a gradient that comes from outside the block."""
        self.foreign.add(grad.untyped_storage()._cdata)
        return grad

    def arrive_output(self, grad: Tensor, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """The same for the gradient of the block's output; parts: its views by node."""
        return {node: self.arrive(part, ("gradient", node)) for node, part in parts.items()}

    def _owns(self, tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.untyped_storage()._cdata not in self.foreign

    def send(
        self,
        dz: Sequence[Tensor],
        weights: Sequence[Tensor],
        nodes: Sequence[int],
        features: Sequence[Tensor],
        norms: Sequence[ReaderNorm],
        statistics: tuple[Tensor, Tensor],
        arriving: Sequence[Tensor | None],
        activation: str,
        terms: tuple[Tensor, Sequence[Tensor]] | None = None,
        dilation: int = 1,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What pre-activation readers (BN - act - convolution) send to raw features, added to what arrived.

        Args:
            dz: per reader, the gradient of its convolution's output.
            weights: per reader, over the concatenated features, [O, C, k, k]; zeros for those that it does not read.
            nodes, features: the numbers of the raw features, and themselves.
            norms: per reader, its BatchNorm over the same channels, with the same zeros.
            statistics: mean and rstd of the features, which the readers share.
            arriving: per feature, what other readers and the output sent so far, or None.
            terms: [2, C], and each reader's share [2, C]: that times its two sums is added to the former.
            dilation: of all these readers.

        Returns:
            Per feature the new sum of scale * g, the part that does not pass through the batch statistics; per reader
            sum(g) and sum(g * xhat) over the concatenated channels.
        """
        sums, sent = [], list(arriving)
        for reader, (d, weight, norm) in enumerate(zip(dz, weights, norms, strict=True)):
            g = self._data_gradient(d, weight, dilation)
            affine, owned = (norm.scale, norm.shift), [self._owns(before) for before in sent]
            sent, *found = self.passes.send(g, features, affine, *statistics, sent, owned, activation)
            sums.append(found)
            if terms is not None:
                terms[0].addcmul_(terms[1][reader], paired(*found))
        return [s for s in sent if s is not None], [g for g, _ in sums], [gx for _, gx in sums]

    def linear(
        self, g: Tensor, z: Tensor, a: Tensor | None, q: Tensor, r: Tensor, mean: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """a * g + q * (z - mean) + r per channel: the affine part of BatchNorm's backward; may reuse g.

        a None stands for 1, mean None for 0; with `share` [2, C] r and q are sums still, multiplied by its rows.
        """
        made: Tensor = self.passes.linear(g, z, a, *linear_terms(q, r, share), mean, self._owns(g))
        return made

    def weight_gradient(
        self,
        sources: Sequence[Tensor],
        dz: Tensor,
        kernel_size: int,
        *,
        affine: Affine | None = None,
        activation: str = "relu",
        like: Tensor | None = None,
        dilation: int = 1,
    ) -> Tensor:
        """[O, C, k, k]: the weight's gradient over the concatenated (and, with `affine`, activated) sources.

        like: the weight, whose dtype and layout a caller would like best; it copies where a backend made another.
        dilation: as in `conv`.
        """
        return self._linked_weight_gradient(sources, dz, kernel_size, affine, activation, like, dilation)

    def _linked_weight_gradient(
        self, sources: Sequence[Tensor], dz: Tensor, kernel_size: int, affine: Affine | None, activation: str,
        like: Tensor | None, dilation: int,
    ) -> Tensor:  # fmt: skip
        kernel = self._kernel(kernel_size)
        if self.passes is csrc and csrc.correlates(dz, kernel_size):
            return csrc.weight_gradient(sources, dz, kernel, affine, activation, dilation)
        read = self._gathered(sources, affine, activation)
        if taps.takes(read, kernel[0], dilation):
            return taps.weight_gradient(read, dz)
        shape = [dz.shape[1], read.shape[1], *kernel]
        return conv2d_weight(read, shape, dz, padding=_padding(shape, dilation), dilation=dilation)

    def _kernel(self, kernel_size: int) -> tuple[int, int]:
        """Height and width of a kernel, in taps."""
        return kernel_size, kernel_size

    def settle(self) -> None:
        """Finish the weight gradients that were returned, which a backend may leave for later until then."""

    def leave(self, nodes: Sequence[Tensor]) -> Tensor:
        """Nodes side by side, in channels_last memory of their own."""
        self.scratch = None  # the last step of a pass: as large as the result, and nothing is gathered into it any more
        if len(nodes) == 1:
            return nodes[0].clone(memory_format=torch.channels_last)
        joined: Tensor = self.passes.gather(nodes, None, "relu")
        return joined

    def kept_nodes(self, x: Tensor, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All nodes of a block that kept those of its layers, from the front of `saved`; and the rest of it."""
        features, rest = self.kept("node", saved)
        return [self.enter(x), *features], rest

    def nodes_of(self, output: Tensor) -> list[Tensor]:
        """The nodes in the output of a block that returns all of them."""
        assert self.plan is not None
        parts = output.split(self.plan.output_widths, dim=1)
        return [parts[self.plan.outputs.index(node)] for node in range(len(parts))]

    def keep(self, kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What an operator returns of layers 1..L's tensors of one kind, for backward."""
        return list(tensors)

    def kept(self, kind: str, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Those tensors again, from the front of `saved`; and the rest of it."""
        assert self.plan is not None
        count = self.plan.num_layers
        return list(saved[:count]), saved[count:]


def _convolved(read: Tensor, weight: Tensor | Packed, bias: Tensor | None, activation: str, dilation: int) -> Tensor:
    """The convolution of one tensor with a weight, packed or in channels_last order; with a bias it activates."""
    padding = _padding(weight.shape, dilation)
    if isinstance(weight, Packed):
        return in_library(read, weight.tensor, bias, activation, padding, dilation)
    if taps.takes(read, weight.shape[2], dilation):
        z = taps.conv(read, weight)
        return z if bias is None else activate_(z.add_(bias.to(weight.dtype)[:, None, None]), activation)
    if bias is None:
        return F.conv2d(read, weight, padding=padding, dilation=dilation)
    if activates_in_library(read):
        return in_library(read, weight, bias, activation, padding, dilation)
    return activate_(F.conv2d(read, weight, bias.to(weight.dtype), padding=padding, dilation=dilation), activation)


def activates_in_library(x: Tensor) -> bool:
    """Whether oneDNN's convolution can apply an activation as it stores: one pass over the pixels less."""
    return x.device.type == "cpu" and x.numel() > 0 and x.dtype in _activating_dtypes()


def in_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, padding: Sequence[int], dilation: int
) -> Tensor:
    """oneDNN's convolution of x with a weight, packed or not; with a bias it activates."""
    attribute, scalars = ("none", []) if bias is None else _attribute(activation)
    sides = x.dim() - 2
    z: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, [1] * sides, [dilation] * sides, 1, attribute, scalars, ""
    )
    return z


def laid_out(weight: Tensor, read: Sequence[int], dilation: int) -> Packed:
    """A weight in oneDNN's order for convolutions of pixels of the shape `read`."""
    sides = weight.dim() - 2
    made = torch.ops.mkldnn._reorder_convolution_weight(
        weight, _padding(weight.shape, dilation), [1] * sides, [dilation] * sides, 1, list(read)
    )
    return Packed(made, weight.shape)


def _padding(weight: Sequence[int], dilation: int) -> list[int]:
    """What leaves pixels as large as they are, for each side of the kernel of a weight of this shape."""
    return [dilation * (side // 2) for side in weight[2:]]


def _attribute(activation: str) -> tuple[str, list[float]]:
    """The library's name of an activation, and its numbers."""
    if activation == "relu":
        return "relu", []
    return ("hardtanh", [0, 6]) if activation == "relu6" else ("leaky_relu", [number(activation)])


@lru_cache(maxsize=1)
def _activating_dtypes() -> tuple[torch.dtype, ...]:
    """Those of the pixels that oneDNN convolves, with biases in float32, and activates on this machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def output_holds_features(plan: BlockPlan) -> bool:
    """Whether backward can read the features out of the output of a block that returns all of them."""
    return True


def needs_input(plan: BlockPlan) -> bool:
    """Whether backward needs the block's input beside what was kept."""
    return True


def kept_like(plan: BlockPlan, x: Tensor, kinds: Sequence[str]) -> list[Tensor]:
    """Empty tensors of the shapes that `Verbs.keep` returns for tensors of these kinds, for fake tensors."""

    def pixels(channels: int) -> Tensor:
        shape = (x.shape[0], channels, x.shape[2], x.shape[3])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    widths = {"node": plan.widths, "raw": plan.widths, "inner": plan.bottleneck_widths}
    return [pixels(width) for kind in kinds for width in widths[kind]]
