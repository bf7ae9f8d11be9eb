"""Who runs the step: the same weights in plain torch, compiled, checkpointed, padded, folded, and fused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import graphs
from ..backends import backends, csrc, winograd
from ..blocks import ThresholdBlock
from ..checks import one_of
from ..models import fuse_blocks
from ..packing import prepack
from ..pixels import LAYOUTS
from . import baselines
from .baselines import Unavailable, blocks
from .cases import Case

LABELS = 10  # classes that labels are taken from: no head has fewer


class Runner:
    """A step that is ready to run.

    Args:
        model: whose gradients a training step makes; a network, or a block alone, into which a fixed gradient comes and
            from which one of its input goes on.
        images: [N, C, H, W], on the model's device, in its dtype.
        train: a training step, else an inference step.
        call: images -> logits; the model itself by default.
        within: context that every step runs in.
        real: per parameter that holds more than eager's, a mask of eager's elements in it.
    """

    graph = False

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        train: bool,
        call: Callable[[Tensor], Tensor] | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        real: Mapping[str, Tensor] | None = None,
    ):
        self.model = model.train(train)
        self.alone = isinstance(model, ThresholdBlock)
        self.images = images.detach().requires_grad_(train) if self.alone else images
        self.target = _arriving(images, model.out_channels) if isinstance(model, ThresholdBlock) else _labels(images)
        self.train = train
        self.call = model if call is None else call  # no `or`: a compiled model has no truth value
        self.within = within
        self.real = real or {}

    def step(self) -> Tensor:
        """Run once; returns the logits."""
        with self.within():
            if not self.train:
                with torch.no_grad():
                    return self.call(self.images)
            self.clear()
            out = self.call(self.images)
            self.backward(out)
            return self.returned(out)

    def returned(self, out: Tensor) -> Tensor:
        """What a training step returns of the model's output."""
        return out.detach()

    def backward(self, out: Tensor) -> None:
        """From cross entropy with fixed labels, or from a fixed gradient of a block's output."""
        if self.alone:
            out.backward(self.target)
        else:
            F.cross_entropy(out.float() if out.dtype != torch.float64 else out, self.target).backward()

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)
        self.images.grad = None

    def gradients(self) -> list[Tensor]:
        """Of all parameters, in eager's order, without what a provider padded them with; and of a block's input."""
        found = [self.images.grad] if self.images.grad is not None else []
        for name, parameter in self.model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found.append(grad[self.real[name]] if name in self.real else grad)
        return found

    def backend(self) -> str | None:
        """The engine's backends that the fused blocks ran on last, None for a model without fused blocks."""
        ran = {block.backend for block in blocks(self.model) if block.fused}
        return ", ".join(sorted(ran)) or None


class Graphed(Runner):
    """A runner's step captured as a CUDA graph, then replayed; its gradients lie in the graph's memory."""

    graph = True

    def __init__(self, runner: Runner):
        super().__init__(runner.model, runner.images, runner.train, runner.call, runner.within, runner.real)
        self.images, self.target = runner.images, runner.target
        self.clear()
        torch.cuda.empty_cache()  # as the capture does: what it frees is no part of the pool
        before = torch.cuda.memory_reserved()
        self._replay, self._out = graphs.capture(super().step)
        torch.cuda.empty_cache()  # of the calls before the capture
        self.pool_bytes = torch.cuda.memory_reserved() - before

    def step(self) -> Tensor:
        self._replay()
        out: Tensor = self._out
        return out


def _labels(images: Tensor) -> Tensor:
    return torch.arange(images.shape[0], device=images.device) % LABELS


def _arriving(x: Tensor, channels: int) -> Tensor:
    """A gradient of a block's output: numbers that every dtype holds, in the memory format of the block's input."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-4, 5, (x.shape[0], channels, *x.shape[2:]), generator=generator) / 4
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return values.to(x.device, x.dtype).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Provider:
    """A way to run the step.

    Attributes:
        what: in words.
        make: (plain model, images, case) -> runner; gets copies of its own and may change them.
    """

    what: str
    make: Callable[[nn.Module, Tensor, Case], Runner]


def build(name: str, model: nn.Module, images: Tensor, case: Case) -> Runner:
    """A provider's runner on copies of a plain model and of the images.

    Raises:
        Unavailable: with the reason.
    """
    copied = images.detach().clone(memory_format=torch.contiguous_format)
    return PROVIDERS[name].make(copy.deepcopy(model), copied, case)


def check_fused(runner: Runner) -> None:
    """Raise Unavailable where a fused block fell back to plain torch: its time would be eager's under another name."""
    if "reference" in (runner.backend() or ""):
        said = [f"{name}: {reason}" for name, reason in backends().items() if reason is not None]
        raise Unavailable(f"a fused block fell back to plain torch ({'; '.join(said) or 'no backend takes the input'})")


def _train(case: Case) -> bool:
    return case.mode == "train"


def _eager(model: nn.Module, images: Tensor, case: Case) -> Runner:
    return Runner(model, images, _train(case))


def _channels_last(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)


def _eager_channels_last(model: nn.Module, images: Tensor, case: Case) -> Runner:
    return Runner(*_channels_last(model, images), _train(case))


def _eager_padded(model: nn.Module, images: Tensor, case: Case) -> Runner:
    wide, real = baselines.padded(model)
    return Runner(*_channels_last(wide, images), _train(case), real=real)


def _eager_folded(model: nn.Module, images: Tensor, case: Case) -> Runner:
    _inference_only(case)
    return Runner(*_channels_last(baselines.folded(model), images), False)


def _eager_benchmarked(model: nn.Module, images: Tensor, case: Case) -> Runner:
    if images.device.type != "cuda":
        raise Unavailable("cuDNN runs on a GPU alone")
    return Runner(*_channels_last(model, images), _train(case), within=_cudnn_benchmark)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _compiled(
    model: nn.Module, images: Tensor, case: Case, mode: str | None = None, folded: bool = False, frozen: bool = False
) -> Runner:
    if folded:
        _inference_only(case)
        model = baselines.folded(model)
    model, images = _channels_last(model, images)
    options: dict[str, Any] = {"options": {"freezing": True}} if frozen else {"mode": mode}
    # fullgraph: pieces, or eager after too many recompilations, would be timed as less than the compiler can
    return Runner(model, images, _train(case), call=torch.compile(model, fullgraph=True, **options))


def _inference_only(case: Case) -> None:
    if _train(case):
        raise Unavailable("BatchNorm folds into weights in inference alone")


def _checkpointed(model: nn.Module, images: Tensor, case: Case) -> Runner:
    if not _train(case):
        raise Unavailable("checkpoints save memory in training alone")
    name, _ = case.architecture()
    return Runner(*_channels_last(baselines.checkpointed(model, name, case.classes), images), True)


def _fused(
    model: nn.Module,
    images: Tensor,
    case: Case,
    backend: str = "auto",
    recompute: str | None = None,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
    prepacked: bool = False,
) -> Runner:
    units = {block.plan.unit for block in blocks(model)}
    if not units:
        raise Unavailable("the model has no blocks of ours to fuse")
    if recompute == "bottleneck" and "bottleneck" not in units:
        raise Unavailable("the model has no bottleneck units to recompute")
    if recompute is not None and not _train(case):
        raise Unavailable("inference keeps nothing that could be recomputed")
    reason = None if backend == "auto" else backends()[backend]
    if reason is not None:
        raise Unavailable(f"backend {backend} cannot run here: {reason}")
    if prepacked:
        _inference_only(case)
    if prepacked and images.device.type != "cpu":
        raise Unavailable("weights are packed for a CPU alone")
    fuse_blocks(model, True, backend, recompute)
    model, images = _channels_last(model, images)
    return Runner(prepack(model) if prepacked else model, images, _train(case), within=within)


def _fused_winograd(model: nn.Module, images: Tensor, case: Case, prepacked: bool = False) -> Runner:
    reason = winograd_refusal(images)
    if reason is not None:
        raise Unavailable(reason)
    return _fused(model, images, case, "native", within=with_winograd, prepacked=prepacked)


def winograd_refusal(images: Tensor) -> str | None:
    """Why "native" has no Winograd convolutions of these images; None where it has."""
    if images.device.type != "cpu" or images.dtype != torch.float32:
        return f"Winograd takes float32 on a CPU, not {images.dtype} on {images.device.type}"
    if images.dim() != 4:
        return f"Winograd takes images [N, C, H, W], not {LAYOUTS[images.dim() - 2][0]} of shape {tuple(images.shape)}"
    return None if csrc.reason() is None else f"Winograd needs the C++ library: {csrc.reason()}"


def with_winograd() -> AbstractContextManager[None]:
    """A context in which "native" takes Winograd convolutions where they pay, whatever the environment says."""
    return _winograd(True)


def without_winograd() -> AbstractContextManager[None]:
    """A context in which "native" is the library's convolution, whatever the environment says."""
    return _winograd(False)


@contextmanager
def _winograd(on: bool) -> Iterator[None]:
    before = winograd.enabled()
    winograd.use(on)
    try:
        yield
    finally:
        winograd.use(before)


def _with(make: Callable[..., Runner], **options: Any) -> Callable[[nn.Module, Tensor, Case], Runner]:
    return functools.partial(make, **options)


PROVIDERS: dict[str, Provider] = {
    "eager": Provider("plain torch, NCHW", _eager),
    "eager_channels_last": Provider("plain torch, NHWC", _eager_channels_last),
    "eager_cudnn_benchmark": Provider(
        "plain torch, NHWC, convolutions chosen by torch.backends.cudnn.benchmark (GPU)", _eager_benchmarked
    ),
    "eager_padded8": Provider("plain torch, NHWC, widths padded to multiples of 8", _eager_padded),
    "eager_folded": Provider("plain torch, NHWC, BatchNorm folded into weights (inference)", _eager_folded),
    "compile": Provider("torch.compile, NHWC", _compiled),
    "compile_folded": Provider("torch.compile, NHWC, BatchNorm folded (inference)", _with(_compiled, folded=True)),
    "compile_frozen": Provider(
        "the same with weights frozen, which inductor lays out once (inference)",
        _with(_compiled, folded=True, frozen=True),
    ),
    "compile_max_autotune": Provider(
        "torch.compile with mode max-autotune-no-cudagraphs, NHWC", _with(_compiled, mode="max-autotune-no-cudagraphs")
    ),
    "checkpoint": Provider("plain torch, NHWC, layers recomputed in backward (training)", _checkpointed),
    "fused": Provider("fused blocks, best backend", _fused),
    "fused_recompute": Provider("the same with bottleneck outputs recomputed", _with(_fused, recompute="bottleneck")),
    "fused_native": Provider(
        "fused blocks on the native backend", _with(_fused, backend="native", within=without_winograd)
    ),
    "fused_native_recompute": Provider(
        "the same with bottleneck outputs recomputed",
        _with(_fused, backend="native", recompute="bottleneck", within=without_winograd),
    ),
    "fused_native_prepacked": Provider(
        "the same with weights folded and packed once (inference, CPU)",
        _with(_fused, backend="native", prepacked=True, within=without_winograd),
    ),
    "fused_winograd": Provider("fused blocks on the native backend, Winograd convolutions", _fused_winograd),
    "fused_winograd_prepacked": Provider(
        "the same with weights folded and packed once (inference)", _with(_fused_winograd, prepacked=True)
    ),
    "fused_triton": Provider("fused blocks on the Triton backend", _with(_fused, backend="triton")),
    "fused_triton_recompute": Provider(
        "the same with bottleneck outputs recomputed", _with(_fused, backend="triton", recompute="bottleneck")
    ),
}
"""Every provider by its name."""


def known(names: Sequence[str]) -> list[str]:
    """The names themselves.

    Raises:
        ValueError: one is none of `PROVIDERS`.
    """
    return [one_of("provider", name, PROVIDERS) for name in names]
