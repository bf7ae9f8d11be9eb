"""CUDA graphs: a network's kernels launched as one, for small images, where a GPU waits for the processor.

A graph replays the kernels of one call on the memory of that call, so shapes are fixed. Built on
torch.cuda.make_graphed_callables (training) and torch.cuda.graph (inference).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import sync
from .constants import holding
from .layers import hooked
from .linked import LinkedBlock
from .ops import autocast_dtype

WARMUP = 3  # calls before a capture: libraries choose their algorithms and workspaces

Call = Callable[[Tensor], Tensor]


class Graphed(nn.Module):
    """A model behind a graph of its call on batches like one sample; made by `graphed`.

    Parameters and buffers are those of the model, which lies in `model`: an optimizer over them, or a state dict loaded
    into them, works as before. Whatever the graph does not fit runs the model itself: a batch of another shape, dtype
    or device, one that wants a gradient, another autocast dtype, another mode of any module inside, parameters that
    were frozen, moved to other memory or replaced, another module in the place of one.

    Attributes:
        ran: "graph" or "model": what ran last; "" before the first call.
    """

    def __init__(self, model: nn.Module, sample: Tensor, make: Callable[[nn.Module, Tensor], Call]):
        super().__init__()
        self.training = model.training  # not train(): modules inside may be in a mode of their own
        self.model = model
        self.ran = ""
        # lists: walking the modules at every call would take longer than a small step
        self._modules_inside = list(model.modules())
        self._children = [module._modules for module in self._modules_inside if module._modules]
        self._places = [(module._parameters, name) for module in self._modules_inside for name in module._parameters]
        self._autocast = autocast_dtype(sample.device)
        own = sample.detach().clone()  # what later batches are copied into
        with _unchanged(model, sample.device), _uncached_autocast(sample.device), holding() as self._constants:
            self._call = make(model, own)
        self._shape, self._dtype, self._device = own.shape, own.dtype, own.device
        self._captured = self._state()

    def forward(self, x: Tensor) -> Tensor:
        """As the model. In eval mode a graph records no gradients."""
        if not self._fits(x):
            self.ran = "model"
            made: Tensor = self.model(x)
            return made
        self.ran = "graph"
        for parameter in self._parameters_inside() if self.training else ():
            # .grad may be the very memory that the graph's backward overwrites; here gradients are being accumulated
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        return self._call(x).clone()  # the next call overwrites what the graph returns

    def _fits(self, x: Tensor) -> bool:
        return (
            isinstance(x, Tensor)
            and (x.shape, x.dtype, x.device) == (self._shape, self._dtype, self._device)
            and not (x.requires_grad and torch.is_grad_enabled())
            and autocast_dtype(self._device) == self._autocast
            and self._state() == self._captured
        )

    def _parameters_inside(self) -> list[nn.Parameter]:
        """As the modules hold them now: `load_state_dict(assign=True)` puts others in their place."""
        return [parameter for held, name in self._places if (parameter := held.get(name)) is not None]

    def _state(self) -> tuple[list[Any], ...]:
        """What of the model a capture takes for constant: its modules, their modes, and which memory is read."""
        parameters = self._parameters_inside()
        return (
            [child for held in self._children for child in held.values()],
            [module.training for module in self._modules_inside],
            [parameter.requires_grad for parameter in parameters],
            [parameter.data_ptr() for parameter in parameters],
        )


def graphed(model: nn.Module, sample: Tensor) -> Graphed:
    """Capture a model's call on batches like `sample` as CUDA graphs, in the mode that the model is in.

    In train mode forward and backward become one graph each, and gradients arrive in the parameters as usual; loss and
    optimizer stay outside. In eval mode the forward pass becomes a graph that records no gradients. Autocast is
    captured as it is around this call. The model's buffers and the random state are afterwards what they were.

    Args:
        model: on a CUDA device, without hooks; one batch in, one tensor out; it must not read values on the host.
        sample: a batch [N, C, H, W] as later ones will be: shape, dtype, device, memory format.

    Returns:
        A module that is called like the model.

    Raises:
        TypeError: not a module, not a tensor; a model that returns something but one tensor.
        ValueError: a model with hooks, in DistributedDataParallel, with statistics shared among processes, or with a
            BatchNorm outside fused blocks whose momentum is None (torch reads its counter on the host).
        RuntimeError: no CUDA device, or model or sample do not lie on one; or the capture failed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a torch.Tensor, got {type(sample).__name__}")
    check_model(model)
    if not torch.cuda.is_available():
        raise RuntimeError("graphed needs a CUDA device, got none: torch sees no GPU here")
    places = {t.device for t in (sample, *model.parameters(), *model.buffers())}
    if len(places) != 1 or sample.device.type != "cuda":
        raise RuntimeError(
            f"model and sample must lie on one CUDA device, got {', '.join(sorted(str(place) for place in places))}"
        )
    make = _training_graph if model.training else _inference_graph
    with torch.cuda.device(sample.device):
        return Graphed(model, sample, functools.partial(_made, make))


class GraphedStep:
    """A step that works in place, as one CUDA graph: say, forward, backward, optimizer and sums of one batch.

    Every call does the step's work once. The first ones run it as it is, in which libraries choose their algorithms and
    an optimizer makes its state; the next one captures it, which runs nothing, and replays that from then on.

    Args:
        step: takes tensors whose shapes, dtypes and devices are those of the first call. What else it reads or writes
            stays in its memory, and it neither waits for the GPU nor reads from it.
    """

    def __init__(self, step: Callable[..., None]):
        self._step = step
        self._warm = 0
        self._own: list[Tensor] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Run or replay the step; raises RuntimeError where it cannot be captured."""
        if self._warm < WARMUP:
            self._warm += 1
            with _uncached_autocast(tensors[0].device):
                self._step(*tensors)
            return
        if self._replay is None:
            self._own = [tensor.detach().clone() for tensor in tensors]
            self._replay = self._captured()
        else:
            for own, tensor in zip(self._own, tensors, strict=True):
                own.copy_(tensor)
        self._replay()

    def _captured(self) -> Callable[[], None]:
        with _uncached_autocast(self._own[0].device), _sentence("the step"):
            return capture(lambda: self._step(*self._own), warmup=0)[0]


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot be captured, wherever it lies; see `graphed`."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model must not be in DistributedDataParallel: graphs are for one process")
    fused = {
        id(m) for block in model.modules() if isinstance(block, LinkedBlock) and block.fused for m in block.modules()
    }
    for name, module in model.named_modules():
        if hooked(module):
            raise ValueError(f"model must have no hooks, which a graph does not call, got some on {name or 'itself'!r}")
        if not isinstance(module, _BatchNorm) or not module.training:
            continue
        if isinstance(module, nn.SyncBatchNorm) and sync.active(module.process_group) is not None:
            raise ValueError(f"model must not share batch statistics among processes, got nn.SyncBatchNorm at {name!r}")
        if module.momentum is None and module.track_running_stats and id(module) not in fused:
            raise ValueError(
                f"momentum of a BatchNorm outside fused blocks must be a number, got None at {name!r}: torch reads its "
                "counter on the host"
            )


def capture(step: Callable[[], Any], warmup: int = WARMUP) -> tuple[Callable[[], None], Any]:
    """A function without arguments as one graph: what replays it, and what the captured call returned.

    Args:
        step: works on the same memory in every call, and neither waits for the GPU nor reads from it.
        warmup: calls on a stream of their own before the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with holding() as constants:
        with torch.cuda.stream(side):
            for _ in range(warmup):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = step()
    return functools.partial(_replay, graph, constants), result


def _replay(graph: torch.cuda.CUDAGraph, constants: Any) -> None:
    """Replay a graph; whoever holds this function holds the tables that the graph reads."""
    graph.replay()


def _made(make: Callable[[nn.Module, Tensor], Call], model: nn.Module, own: Tensor) -> Call:
    with _sentence(type(model).__name__):
        return make(model, own)


@contextmanager
def _sentence(what: str) -> Iterator[None]:
    """One line of what a failed capture raises."""
    try:
        yield
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"graphed could not capture {what}: {line}") from error


class _Body(nn.Module):
    """The model in a module whose forward may be replaced: `make_graphed_callables` replaces what it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return _one_tensor(self.model(x))


def _training_graph(model: nn.Module, own: Tensor) -> Call:
    made: Any = torch.cuda.make_graphed_callables(
        _Body(model), (own,), num_warmup_iters=WARMUP, allow_unused_input=True
    )
    call: Call = made.forward  # the function alone: a module would become one of Graphed's own
    return call


def _inference_graph(model: nn.Module, own: Tensor) -> Call:
    @torch.no_grad()
    def step() -> Tensor:
        return _one_tensor(model(own))

    replay, out = capture(step)

    def call(x: Tensor) -> Tensor:
        own.copy_(x)
        replay()
        made: Tensor = out
        return made

    return call


def _one_tensor(made: Any) -> Tensor:
    if not isinstance(made, Tensor):
        raise TypeError(f"model must return one tensor to be graphed, got {type(made).__name__}")
    return made


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers (running statistics, counters) and the random state are afterwards what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def _uncached_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it is here, without its cache: weights that were cast before the capture would be read again."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)
