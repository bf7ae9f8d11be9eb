"""Who runs the step: the same weights in plain torch, compiled, checkpointed, and fused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends import backends, csrc, winograd
from ..blocks import ThresholdBlock, _join
from ..checks import one_of
from ..models import fuse_blocks


class Unavailable(Exception):
    """Why a provider cannot run a case here, in one sentence."""


class Runner:
    """A step that is ready to run.

    Args:
        model: whose gradients a training step makes.
        images: [N, 3, H, W], on the model's device, in its dtype.
        train: a training step, else an inference step.
        call: images -> logits; the model itself by default.
        within: context that every step runs in.
    """

    graph = False

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        train: bool,
        call: Callable[[Tensor], Tensor] | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.model = model.train(train)
        self.images = images
        self.train = train
        self.call = call or model
        self.within = within

    def step(self) -> Tensor:
        """Run once; returns the logits."""
        with self.within():
            if not self.train:
                with torch.no_grad():
                    return self.call(self.images)
            self.clear()
            out = self.call(self.images)
            out.sum().backward()
            return out.detach()

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)
        self.images.grad = None

    def backend(self) -> str | None:
        """The engine's backends that the fused blocks ran on last, None for a model without fused blocks."""
        ran = {block.backend for block in _blocks(self.model) if block.fused}
        return ", ".join(sorted(ran)) or None


class Graphed(Runner):
    """A runner's step captured once as a CUDA graph, in three warm-up steps on a side stream, then replayed.

    The gradients lie in the graph's memory and are written anew by each replay.
    """

    graph = True

    def __init__(self, runner: Runner):
        super().__init__(runner.model, runner.images, runner.train, runner.call, runner.within)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super().step()
        torch.cuda.current_stream().wait_stream(side)
        self.clear()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = super().step()

    def step(self) -> Tensor:
        self._graph.replay()
        return self._out


@dataclass(frozen=True)
class Provider:
    """A way to run the step.

    Attributes:
        what: in words.
        make: (plain model, images, train) -> runner; gets copies of its own and may change them.
    """

    what: str
    make: Callable[[nn.Module, Tensor, bool], Runner]


def build(name: str, model: nn.Module, images: Tensor, train: bool) -> Runner:
    """A provider's runner on copies of a plain model and of the images.

    Raises:
        Unavailable: with the reason.
    """
    copied = images.detach().clone(memory_format=torch.contiguous_format)
    return PROVIDERS[name].make(copy.deepcopy(model), copied, train)


def check_fused(runner: Runner) -> None:
    """Raise Unavailable where a fused block fell back to plain torch: its time would be eager's under another name."""
    if "reference" in (runner.backend() or ""):
        said = [f"{name}: {reason}" for name, reason in backends().items() if reason is not None]
        raise Unavailable(f"a fused block fell back to plain torch ({'; '.join(said) or 'no backend takes the input'})")


def _eager(model: nn.Module, images: Tensor, train: bool) -> Runner:
    return Runner(model, images, train)


def _channels_last(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out


def _eager_channels_last(model: nn.Module, images: Tensor, train: bool) -> Runner:
    return Runner(*_channels_last(model, images), train)


def _compiled(model: nn.Module, images: Tensor, train: bool, mode: str = "default") -> Runner:
    # cached code of earlier cases counts towards dynamo's limit for one forward; beyond it, it silently stays eager
    torch._dynamo.reset()
    model, images = _channels_last(model, images)
    return Runner(model, images, train, call=torch.compile(model, mode=mode))


def _checkpointed(model: nn.Module, images: Tensor, train: bool) -> Runner:
    if not train:
        raise Unavailable("checkpoints save memory in training alone")
    blocks = list(_blocks(model))
    if not blocks:
        raise Unavailable("the model has no blocks of ours to checkpoint")
    for block in blocks:
        block.forward = functools.partial(_forward_in_checkpoints, block)  # type: ignore[method-assign]  # this copy only
    return Runner(*_channels_last(model, images), train)


def _forward_in_checkpoints(block: ThresholdBlock, x: Tensor) -> Tensor:
    """The plain block; backward concatenates and computes each layer again, as torchvision's memory_efficient does."""
    nodes = [x]
    for sources, layer in zip(block.links, block.layers, strict=True):
        run = functools.partial(_layer, layer)
        read = [nodes[k] for k in sources]
        nodes.append(checkpoint(run, *read, use_reentrant=False, preserve_rng_state=False))
    return _join([nodes[k] for k in block.plan.outputs])


def _layer(layer: nn.Module, *read: Tensor) -> Tensor:
    return layer(_join(list(read)))


def _fused(
    model: nn.Module,
    images: Tensor,
    train: bool,
    backend: str = "auto",
    recompute: str | None = None,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Runner:
    units = {block.plan.unit for block in _blocks(model)}
    if not units:
        raise Unavailable("the model has no blocks of ours to fuse")
    if recompute == "bottleneck" and "bottleneck" not in units:
        raise Unavailable("the model has no bottleneck units to recompute")
    if recompute is not None and not train:
        raise Unavailable("inference keeps nothing that could be recomputed")
    reason = None if backend == "auto" else backends()[backend]
    if reason is not None:
        raise Unavailable(f"backend {backend} cannot run here: {reason}")
    fuse_blocks(model, True, backend, recompute)
    return Runner(*_channels_last(model, images), train, within=within)


def _fused_winograd(model: nn.Module, images: Tensor, train: bool) -> Runner:
    if images.device.type != "cpu" or images.dtype != torch.float32:
        raise Unavailable(f"Winograd takes float32 on a CPU, not {images.dtype} on {images.device.type}")
    if csrc.reason() is not None:
        raise Unavailable(f"Winograd needs the C++ library: {csrc.reason()}")
    if all(block.plan.unit != "conv_bn_relu" for block in _blocks(model)):
        raise Unavailable("the model has no conv_bn_relu units, which alone have a Winograd form")
    return _fused(model, images, train, "native", within=_winograd)


@contextmanager
def _winograd() -> Iterator[None]:
    before = winograd.enabled()
    winograd.use(True)
    try:
        yield
    finally:
        winograd.use(before)


def _blocks(model: nn.Module) -> Iterator[ThresholdBlock]:
    return (module for module in model.modules() if isinstance(module, ThresholdBlock))


def _with(make: Callable[..., Runner], **options: Any) -> Callable[[nn.Module, Tensor, bool], Runner]:
    return functools.partial(make, **options)


PROVIDERS: dict[str, Provider] = {
    "eager": Provider("plain torch, NCHW", _eager),
    "eager_channels_last": Provider("plain torch, NHWC", _eager_channels_last),
    "compile": Provider("torch.compile, NHWC", _compiled),
    "compile_max_autotune": Provider(
        "torch.compile with mode max-autotune-no-cudagraphs, NHWC", _with(_compiled, mode="max-autotune-no-cudagraphs")
    ),
    "checkpoint": Provider("plain torch, NHWC, each layer of a block in torch.utils.checkpoint", _checkpointed),
    "fused": Provider("fused blocks, best backend", _fused),
    "fused_recompute": Provider("the same with bottleneck outputs recomputed", _with(_fused, recompute="bottleneck")),
    "fused_winograd": Provider("fused blocks on the native backend, Winograd convolutions", _fused_winograd),
    "fused_native": Provider("fused blocks on the native backend", _with(_fused, backend="native")),
    "fused_triton": Provider("fused blocks on the Triton backend", _with(_fused, backend="triton")),
}
"""Every provider by its name."""


def known(names: Sequence[str]) -> list[str]:
    """The names themselves.

    Raises:
        ValueError: one is none of `PROVIDERS`.
    """
    return [one_of("provider", name, PROVIDERS) for name in names]
