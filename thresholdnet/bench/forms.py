"""How one operation of a layer is done: in plain torch, and by the verbs of a backend; on the same operands.

Plain torch concatenates and calls the library, and backward what autograd would call. A node's gradient is that of one
convolution with all its readers' weights side by side: autograd itself sends each reader's to all its sources at once,
and adds. Ours are the calls that the engine makes, on tensors where the engine has them.

Every form is a function without arguments that gives the same list of tensors as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import backends, csrc, elementwise, engine_for, load, refusal
from ..backends.native import Place
from ..batchnorm import backward_norms, batch_norm, paired
from .baselines import Unavailable
from .layers import Operation
from .providers import without_winograd

EPS = 1e-5
aten: Any = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu_, lambda g, y: aten.threshold_backward(g, y, 0.0)),
    "relu6": (lambda x: F.hardtanh_(x, 0.0, 6.0), lambda g, y: aten.hardtanh_backward(g, y, 0.0, 6.0)),
}
"""In place, and backward from what came out."""


Form = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Operands:
    """Tensors of an operation, random but for a fixed seed.

    Attributes:
        read: what is read side by side, [N, C_i, H, W]; gradients where `Operation.from_readers`.
        weights: [O, C, k, k], one; per reader [O_r, O, k, k] where `Operation.from_readers`.
        z: what the convolution wrote, [N, O, H, W].
        gradient: of `z`, or behind the BatchNorm and the activation in norm_backward, [N, O, H, W].
        gamma, beta, mean, variance: of the BatchNorm, [`Operation.normalised`].
    """

    read: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    z: Tensor
    gradient: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor

    def to(self, dtype: torch.dtype, channels_last: bool) -> Operands:
        """Copies in a dtype and a memory format; vectors stay at least float32, as BatchNorm's statistics do."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def pixels(tensor: Tensor) -> Tensor:
            return tensor.to(dtype, memory_format=memory_format, copy=True)

        return Operands(
            tuple(pixels(tensor) for tensor in self.read), tuple(pixels(tensor) for tensor in self.weights),
            pixels(self.z), pixels(self.gradient), self.gamma.to(wide), self.beta.to(wide), self.mean.to(wide),
            self.variance.to(wide),
        )  # fmt: skip


def operands(op: Operation, dtype: torch.dtype, device: torch.device) -> Operands:
    """The operands of an operation: values that the dtype holds, NCHW."""
    generator = torch.Generator(device).manual_seed(0)
    side = op.stage.side

    def pixels(channels: int) -> Tensor:
        return torch.randn(op.batch, channels, side, side, generator=generator, device=device).to(dtype)

    def weight(written: int, read: int) -> Tensor:
        made = torch.randn(written, read, op.kernel, op.kernel, generator=generator, device=device)
        return (made / (op.read * op.kernel**2) ** 0.5).to(dtype)

    def vector(low: float, high: float) -> Tensor:
        return torch.empty(op.normalised, device=device).uniform_(low, high, generator=generator)

    readers = [(width, op.written) for width in op.widths]
    return Operands(
        tuple(pixels(width) for width in op.widths),
        tuple(weight(*shape) for shape in (readers if op.from_readers else [(op.written, op.read)])),
        pixels(op.written), pixels(op.written),
        vector(0.5, 1.5), vector(-0.5, 0.5), vector(-0.2, 0.2), vector(0.5, 2.0),
    )  # fmt: skip


# ---------------------------------------------------------------- plain torch


def plain(op: Operation, o: Operands) -> Form:
    """An operation in plain torch, in the memory format of its operands."""
    padding = op.kernel // 2
    activate, activate_backward = ACTIVATIONS[op.stage.activation]

    def normal(x: Tensor) -> Tensor:
        return activate(F.batch_norm(x, o.mean, o.variance, o.gamma, o.beta, False, 0.0, EPS))

    def read() -> Tensor:
        joined = _joined(o.read)
        return normal(joined) if op.activates else joined

    if op.operation == "convolution":
        return lambda: [F.conv2d(read(), o.weights[0], padding=padding)]
    if op.operation == "gather":
        return lambda: [read()]
    if op.operation == "statistics":
        return lambda: list(torch.batch_norm_update_stats(o.z, None, None, 0.0))  # what BatchNorm itself calls
    if op.operation == "normalise":
        return lambda: [normal(o.z)]
    if op.operation == "norm_backward":
        y, backward = _batch_norm(o.z, None, None, o.gamma, o.beta)
        y = activate(y)
        return lambda: backward(activate_backward(o.gradient, y))
    if op.operation == "weight_gradient":
        kept = read()
        return lambda: [_backward(o.gradient, kept, o.weights[0], padding, 1)]
    if not op.activates:
        arriving, weight = (o.read, torch.cat(o.weights)) if op.from_readers else ((o.gradient,), o.weights[0])
        like = o.z if op.from_readers else o.read[0]
        return lambda: [_backward(_joined(arriving), like, weight, padding, 0)]
    y, backward = _batch_norm(_joined(o.read), o.mean, o.variance, o.gamma, o.beta)
    y = activate(y)
    arrived: list[Tensor] = []

    def send() -> list[Tensor]:
        g, *sums = backward(activate_backward(_backward(o.gradient, y, o.weights[0], padding, 0), y))
        made = list(g.split(op.widths, dim=1))
        if not arrived:
            arrived.extend(made)
            return made + sums
        for before, new in zip(arrived, made, strict=True):
            before.add_(new)
        return arrived + sums

    return send


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), 1) if len(tensors) > 1 else tensors[0]


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, padding: int, of: int) -> Tensor:
    """A convolution's gradient of its input (`of` 0) or of its weight (1), as autograd asks for it."""
    made: Tensor = aten.convolution_backward(
        gradient, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [of == 0, of == 1, False]
    )[of]
    return made


def _batch_norm(
    x: Tensor, mean: Tensor | None, variance: Tensor | None, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """BatchNorm, with the batch's statistics where none are given; and its backward, by torch's choice of library."""
    train = mean is None
    vectors = (gamma, mean, variance)
    y, *kept, reserve, library = aten._batch_norm_impl_index(
        x, gamma, beta, mean, variance, train, 0.0, EPS, torch.backends.cudnn.enabled
    )

    def backward(gradient: Tensor) -> list[Tensor]:
        return list(
            aten._batch_norm_impl_index_backward(
                library, x, gradient, *vectors, *kept, train, EPS, [True, True, True], reserve
            )
        )

    return y, backward


# ---------------------------------------------------------------- a backend


def ours(backend: str, op: Operation, o: Operands) -> Form:
    """An operation by a backend's verbs; operands in channels_last order.

    Raises:
        Unavailable: the backend cannot run here or has no such operation.
    """
    cause = backends()[backend] or refusal(backend, o.z)
    if cause is not None:
        raise Unavailable(f"backend {backend} cannot run here: {cause}")
    if op.operation == "gather":
        return _gather(backend, op, o)
    plan, layer, activation = op.stage.plan, op.layer, op.stage.activation
    with without_winograd():  # whose transforms serve several layers: it is measured in whole blocks
        verbs: Any = load(engine_for(backend, plan, o.z)).Verbs(plan, o.z)
    weight, width = o.weights[0], op.written
    # where the engine has what the convolution wrote, its gradient, and what is made of either
    inner = op.activates and plan.unit == "bottleneck"
    written: Place = ("inner" if inner else "node" if plan.pre_activation else "raw", layer)
    arriving: Place = ("waiting", 0) if inner else ("gradient", layer)
    activated: Place = ("scratch", width) if inner else ("node", layer)
    reads: list[Place] = [("gradient" if op.from_readers else "node", node) for node in op.nodes]
    if op.operation in ("statistics", "normalise", "norm_backward"):
        z = verbs.arrive(o.z, written)
        if op.operation == "statistics":
            return lambda: list(verbs.moments(z))
        if op.operation == "normalise":
            affine = batch_norm(o.gamma, o.beta, o.mean, o.variance, EPS, True).affine
            return lambda: [verbs.normalise(z, affine, activation, into=activated)]
        return _norm_backward(op, o, verbs, z, arriving)
    read = [verbs.arrive(t, place) for t, place in zip(o.read, reads or [("scratch", op.read)], strict=True)]
    norm = batch_norm(o.gamma, o.beta, o.mean, o.variance, EPS, True) if op.activates else None
    affine_read = None if norm is None else norm.affine
    if op.operation == "convolution":
        return lambda: [verbs.conv(read, weight, into=written, affine=affine_read, activation=activation)[0]]
    if op.from_readers:
        return lambda: [verbs.gradient(read, o.weights, None, into=arriving)[0]]
    dz = verbs.arrive(o.gradient, arriving)
    if op.operation == "weight_gradient":

        def weight_gradient() -> list[Tensor]:
            made = verbs.weight_gradient(read, dz, op.kernel, affine=affine_read, activation=activation)
            verbs.settle()
            return [made]

        return weight_gradient
    if norm is None:
        return lambda: [verbs.gradient([dz], [weight], None, into=("waiting", 0))[0]]
    arrived: list[Tensor | None] = [None] * len(read)

    def send() -> list[Tensor]:
        sent, sum_g, sum_gx = verbs.send(
            [dz], [weight], op.nodes, read, [norm], (norm.mean, norm.rstd), arrived, activation
        )
        if arrived[0] is None:
            arrived[:] = sent
        return [*sent, sum_gx[0], sum_g[0]]

    return send


def _gather(backend: str, op: Operation, o: Operands) -> Form:
    if backend != "native":
        raise Unavailable(f"backend {backend} reads links where they lie and gathers nothing")
    passes = csrc if csrc.takes(o.z) else elementwise
    scratch = o.z.new_empty(op.read * op.pixels)
    affine = batch_norm(o.gamma, o.beta, o.mean, o.variance, EPS, True).affine if op.activates else None
    return lambda: [passes.gather(o.read, affine, op.stage.activation, scratch)]


def _norm_backward(op: Operation, o: Operands, verbs: Any, z: Tensor, into: Place) -> Form:
    """Mask and sums as of a layer that only the block's output has, then the affine part."""
    mean, variance = verbs.moments(z)
    (norm,) = backward_norms([(o.gamma, o.beta)], [torch.stack([mean, variance])], [EPS], [False], op.pixels)
    masked = (z, norm.affine, norm.mean, norm.rstd)

    def form() -> list[Tensor]:
        g, sum_g, sum_gx = verbs.gradient([], [], o.gradient, into=into, masked=masked, activation=op.stage.activation)
        return [verbs.linear(g, z, *norm.backward_terms(paired(sum_g, sum_gx))), sum_gx, sum_g]

    return form
