"""What every fused block shares: a plan, parameters in modules of its own, and one call of the engine's operator."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops, packing, pixels, sync, transforms
from .backends import CHOICES, candidates, pick
from .biases import Biases, has_biases
from .checks import boolean, one_of
from .constants import compiler_constant
from .layers import hooked, states_inside
from .links import Links
from .operands import Operands, or_zeros
from .plan import BlockPlan
from .stamps import Stamp, stamp_of

Self = TypeVar("Self", bound="LinkedBlock")


class Checked(NamedTuple):
    """What a block found when it last looked through the modules inside.

    Attributes:
        forms, tensors: as `states_inside` returned them.
        fit: whether the engine computes what the modules would.
        units: see `LinkedBlock._units`; empty where they do not fit.
        biased: whether a convolution has a bias.
        operands: what the engine takes of them, where that is known to be the same at the next call.
    """

    forms: Sequence[Any] = ()
    fit: bool = True
    units: Sequence[Sequence[nn.Module]] = ()
    biased: bool = False
    tensors: Sequence[Any] = ()
    operands: Operands | None = None


NOTHING = Checked()


class LinkedBlock(nn.Module):
    """A block over a plan, fused through the engine or in plain torch.

    A subclass sets `plan`, `activation` (as in `activations`) and `drop_rate`, calls `fuse`, and says where its modules
    lie (`_units`), what it computes without the engine (`_plain_forward`), and whether its modules still have the forms
    of the plan (`_fits`): where somebody changed one, or waits for one with hooks, the block runs in plain torch.
    """

    can_fuse = True  # a subclass with other units has no fused form
    plan: BlockPlan
    activation: str
    drop_rate: float
    drop_channels = False  # whether dropout takes whole channels of an image
    _biased: tuple[Stamp | None, list[float], Any] = (None, [], None)  # tensors as they were, eps, and their `Biases`
    _checked = NOTHING

    def fuse(self: Self, fused: bool = True, backend: str = "auto", recompute: str | None = None) -> Self:
        """Switch the engine on or off; returns the block itself. Arguments and errors as in `ThresholdBlock`."""
        one_of("backend", backend, CHOICES)
        if recompute is not None:
            one_of("recompute", recompute, ("bottleneck",))
        self.fused, self.recompute = boolean("fused", fused) and self.can_fuse, recompute
        self._choice = backend if self.fused else "reference"
        self._candidates = candidates(self._choice)
        self._plan_text = self.plan.to_text()
        self._widest_row = self.plan.widest_row
        self._ran = "reference"
        return self

    @property
    def links(self) -> Links:
        """Sources of every layer."""
        return self.plan.links

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of layers 1..L."""
        return self.plan.widths

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.plan.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.plan.out_channels

    @property
    def takes_tail(self) -> bool:
        """Whether `forward` takes the weight of a convolution behind the block."""
        return self.plan.unit == "conv_bn_relu"

    @property
    def backend(self) -> str:
        """The backend that ran last: "triton", "native" or "reference" (plain torch, or not run yet).

        Calls inside a compiled graph are not noted.
        """
        return self._ran

    def forward(self, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]; [N, C, D, H, W] or [N, C, L] as the plan says.

        `tail` is the weight [O, out_channels, 1, 1] of a convolution behind a Conv-BN-ReLU block: its result
        [N, O, H, W] is returned in place of the block's output, which nobody keeps then when fused.
        """
        if symbolic(x):
            return self._plainly(x, tail)
        check_pixels("input of the block", x, self.in_channels, self.plan.spatial_dims)
        if tail is not None and not self.takes_tail:
            raise ValueError(
                f"tail must be None for unit {self.plan.unit!r}, got a weight of shape {tuple(tail.shape)}"
            )
        if self.fused and (device := next(self.parameters(), x).device) != x.device:
            raise ValueError(f"input of the block must lie on the weights' device {device}, got {x.device}")
        plain = traced() or transforms.counted() or (self.fused and not self._modules_fit())
        backend = "reference" if plain else pick(self._candidates, self._choice, x, self._widest_row)
        if not torch.compiler.is_compiling():  # to a graph it would be a state to guard: one more compilation
            self._ran = backend
        if backend != "reference":
            return self._fused_forward(x, backend, tail, NOTHING if torch.compiler.is_compiling() else self._checked)
        return self._plainly(x, tail)

    def _plainly(self, x: Tensor, tail: Tensor | None) -> Tensor:
        y = self._plain_forward(x)
        return y if tail is None else pixels.CONVOLVE[self.plan.spatial_dims](y, tail)

    def _modules_fit(self) -> bool:
        """Whether the engine computes what the modules inside would, were they called."""
        if torch.compiler.is_compiling() and any(map(hooked, itertools.islice(self.modules(), 1, None))):
            return False  # a graph asks for hooks and classes again, and keeps the attributes that it was compiled for
        return self._forms_fit()

    @compiler_constant
    def _forms_fit(self) -> bool:
        states = states_inside(self)
        if states is None:
            return False
        forms, tensors = states
        known = self._checked
        if forms != known.forms:
            fit = self._fits()
            units = self._units() if fit else ()
            self._checked = Checked(forms, fit, units, has_biases(units), tensors)
        elif tensors != known.tensors:
            self._checked = known._replace(tensors=tensors, operands=None)
        return self._checked.fit

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_checked", "_biased"):  # of these very modules
            state.pop(name, None)
        return state

    def _fused_forward(self, x: Tensor, backend: str, tail: Tensor | None, known: Checked = NOTHING) -> Tensor:
        """`known`: of the modules, as they are now."""
        units = known.units or self._units()
        operands = known.operands or Operands(units)
        if operands.own and known.units and known.operands is None:
            self._checked = known._replace(operands=operands)
        norms, fixed = operands.norms, operands.fixed
        group = shared_group([norm for norm, given in zip(norms, fixed, strict=True) if not given])
        if pixels.count(x) == 1 and not all(fixed) and group is None:
            raise ValueError(
                f"input of the block must hold more than one value per channel when training, got {tuple(x.shape)}"
            )
        signals = x.dim() == 3
        if signals:  # which are images of one row
            x = x.unsqueeze(2)
        if any(map(sharded, operands.weights)):
            raise RuntimeError(
                "a fused block reads all its weights at once: apply fully_shard to the block or to a module around it, "
                "got sharded weights inside it"
            )
        first = operands.weights[0]
        dtype = ops.autocast_dtype(x.device)
        if dtype is not None:  # as conv2d: operands cast, norm parameters left alone
            x = x.to(dtype)
        elif first.dtype != x.dtype:
            raise TypeError(f"input of the block must have the weights' dtype {first.dtype}, got {x.dtype}")
        # Triton's kernels round weights as they lay them out: no cast of each, and none of its gradient on the way back
        rounded = backend == "triton" and not transforms.active()
        biased = known.biased if known.units else has_biases(units)
        biases = self._biases(units, norms, fixed, first) if biased and norms else None
        parameters = operands.parameters(None if rounded else x.dtype, None if biases is None else biases.betas)
        if biases is not None:
            parameters += biases.of_features
        if tail is not None:
            parameters = [*parameters, tail if rounded else packing.cast(tail, x.dtype)]
        running = [or_empty(t, x) for t in operands.running]
        # a transform hides from the tensors of its inner levels that somebody differentiates further out
        save = torch.is_grad_enabled() and (transforms.active() or any(t.requires_grad for t in (x, *parameters)))
        recompute = self.recompute == "bottleneck"
        counts = None if group is None else sync.counts(x, group)
        y, statistics, _ = transforms.call(
            ops.block, x, parameters, running, self._plan_text, operands.eps, fixed, self.activation, backend, save,
            recompute, self._masks(x), counts, self.drop_rate, "" if group is None else group.group_name,
        )  # fmt: skip
        if statistics:
            statistics = statistics if biases is None else biases.noted(statistics)
            update_running(norms, statistics, sync.total(counts, pixels.count(x)))
        return y.squeeze(2) if signals else y

    def _biases(
        self, units: Sequence[Sequence[nn.Module]], norms: Sequence[Any], fixed: Sequence[bool], like: Tensor
    ) -> Biases:
        """Made once for inference with given statistics, until something is written."""
        kept = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms.active()) and all(fixed)
        modules = [module for unit in units for module in unit] if kept else []
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        eps = [norm.eps for norm in norms]
        stamp, known_eps, known = self._biased
        if kept and stamp is not None and known_eps == eps and stamp.holds(tensors):
            return known
        made = Biases(self.plan, units, norms, fixed, [or_zeros(norm, like) for norm in norms])
        if kept:
            self._biased = stamp_of(tensors), eps, made
        return made

    def _masks(self, x: Tensor) -> list[Tensor]:
        """What dropout leaves of every layer's output."""
        if not self.training or not self.drop_rate:
            return []
        masks = []
        for width in self.plan.widths:
            sides = [1] * (x.dim() - 2) if self.drop_channels else x.shape[2:]
            shape, order = (x.shape[0], width, *sides), pixels.channels_last(x)
            mask = torch.empty(shape, dtype=torch.bool, device=x.device, memory_format=order)
            masks.append(mask.bernoulli_(1 - self.drop_rate))
        return masks

    def _units(self) -> Sequence[Sequence[nn.Module]]:
        """Convolutions and BatchNorms of every layer, in forward order."""
        raise NotImplementedError

    def _plain_forward(self, x: Tensor) -> Tensor:
        """The block in plain torch."""
        raise NotImplementedError

    def _fits(self) -> bool:
        """Whether the modules have the forms of the plan, and one activation and dropout as the block says."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The structure in one line, for print(model)."""
        plan = self.plan
        seldom = {"dilations": plan.dilations, "kernel_size": plan.kernel_size if plan.kernel_size != 3 else None}
        return (
            f"{plan.in_channels} -> {plan.out_channels}, {self.links!r}, unit={plan.unit}, "
            f"widths={plan.widths}, outputs={plan.outputs}"
        ) + "".join(f", {name}={value}" for name, value in seldom.items() if value)


def traced() -> bool:
    """Whether torch.jit.trace or torch.onnx.export is recording: plain operations alone, for who has no such package.

    Sizes are tensors meanwhile, and a comparison of them is warned of.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.is_in_onnx_export()
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]  # public, but not exported by name


def symbolic(x: Any) -> bool:
    """Whether torch.fx records, with a stand-in for the tensor: plain operations as well, and nothing can be asked."""
    fx = sys.modules.get("torch.fx")
    return fx is not None and isinstance(x, fx.Proxy)


def check_pixels(name: str, x: Tensor, channels: int, spatial_dims: int = 2) -> None:
    """Raise TypeError or ValueError unless `x` is a floating-point tensor [N, channels, ..] of so many dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 2 + spatial_dims:
        wanted = f"{2 + spatial_dims} dimensions {pixels.LAYOUTS[spatial_dims][1]}"
        raise ValueError(f"{name} must have {wanted}, got {x.dim()} with shape {tuple(x.shape)}")
    if not traced() and x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]} with shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one where there is none: operators take no optional tensors in lists."""
    return like.new_empty(0) if tensor is None else tensor


def shared_group(norms: Sequence[_BatchNorm]) -> Any:
    """The process group over which the BatchNorms share the batch's statistics, None where they do not."""
    shared = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm) and norm.training]
    group = sync.active(shared[0].process_group) if shared else None
    if group is not None and (
        len(shared) < len(norms) or any(n.process_group is not shared[0].process_group for n in shared)
    ):
        raise ValueError(
            "a fused block's BatchNorms must all be nn.SyncBatchNorm of one process group, "
            f"or none of them, got {len(shared)} of {len(norms)}"
        )
    return group


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a process holds a part: so are FSDP2's weights until a module gathers them."""
    return hasattr(tensor, "device_mesh")


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing makes again what it did not keep.

    The rule of torch.utils.module_tracker and of FSDP2. A compiled graph cannot ask; it counts as a first forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_running(norms: Sequence[_BatchNorm], statistics: Sequence[Tensor], pixels: int | Tensor) -> None:
    """What nn.BatchNorm2d does to its buffers in training, once per call; nothing where the call is a recomputation.

    A batch without pixels is counted and has no statistics.
    """
    if recomputing():
        return
    empty = isinstance(pixels, int) and not pixels
    unbiased = pixels / (pixels - 1).clamp(min=1) if isinstance(pixels, Tensor) else pixels / max(pixels - 1, 1)
    tracked: dict[tuple[float | None, torch.dtype], list[tuple[Any, Tensor]]] = {}
    for norm, used in zip(norms, statistics, strict=True):
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            tracked.setdefault((norm.momentum, norm.running_mean.dtype), []).append((norm, used))
    if tracked:  # torch.export cannot save a program with nothing in a torch.no_grad
        _update_tracked(tracked, unbiased, empty)


@torch.no_grad()
def _update_tracked(
    tracked: dict[tuple[float | None, torch.dtype], list[tuple[Any, Tensor]]], unbiased: float | Tensor, empty: bool
) -> None:
    """BatchNorms with what their batch had, by momentum and dtype."""
    alone = torch.compiler.is_compiling() or transforms.active()
    for (momentum, _), some in tracked.items():
        counters = [norm.num_batches_tracked for norm, _ in some if norm.num_batches_tracked is not None]
        if alone or momentum is None or isinstance(unbiased, Tensor) or not counters:
            for norm, used in some:
                _update_one(norm, used, unbiased, empty)
            continue
        torch._foreach_add_(counters, 1)
        if empty:
            continue
        means, variances = zip(*(used for _, used in some), strict=True)
        found = [*means, *torch._foreach_mul(list(variances), unbiased)]
        _average([norm.running_mean for norm, _ in some] + [norm.running_var for norm, _ in some], found, momentum)


def _update_one(norm: Any, used: Tensor, unbiased: float | Tensor, empty: bool) -> None:
    mean, variance = used  # float32 at least: half buffers are rounded once
    counter = norm.num_batches_tracked
    if counter is not None:
        counter.add_(1)
    if empty or (counter is None and norm.momentum is None):
        return
    rate: float | Tensor = 1 / counter.to(mean.dtype) if norm.momentum is None else norm.momentum
    norm.running_mean.copy_((1 - rate) * norm.running_mean.to(mean.dtype) + rate * mean)
    norm.running_var.copy_((1 - rate) * norm.running_var.to(mean.dtype) + rate * (variance * unbiased))


def _average(buffers: list[Tensor], found: list[Tensor], rate: float) -> None:
    """buffer = (1 - rate) buffer + rate found, all at once: on a GPU every small operation is a launch."""
    half = buffers[0].dtype != found[0].dtype
    wide = [torch.empty_like(each) for each in found] if half else buffers
    if half:
        torch._foreach_copy_(wide, buffers)
    torch._foreach_lerp_(wide, found, rate)
    if half:
        torch._foreach_copy_(buffers, wide)
