"""CUDA graphs: a network's kernels launched as one, for small images, where a GPU waits for the processor.

A graph replays the kernels of one call on the memory of that call, so shapes are fixed and results are overwritten by
the next call. Built on torch.cuda.make_graphed_callables (training) and torch.cuda.graph (inference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 3  # calls before a capture: libraries choose their algorithms and workspaces


class Graphed(nn.Module):
    """A model behind a graph of its call on tensors like one sample; made by `graphed`.

    Parameters, buffers and state-dict entries are the model's own, which lies in `model`: an optimizer over its
    parameters, or loading a state dict into it, works as before (in place).
    """

    def __init__(self, model: nn.Module, sample: Tensor):
        super().__init__()
        self.model = model
        self.train(model.training)
        self._sample = sample
        self._captured_training = model.training
        before = [buffer.clone() for buffer in model.buffers()]
        if model.training:
            self._call = _training_graph(model, sample)
        else:
            self._call = _inference_graph(model, sample)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)  # running statistics do not see the calls before the capture

    def forward(self, x: Tensor) -> Tensor:
        """As the model; the result is overwritten by the next call.

        Raises:
            ValueError: x differs from the sample in shape, dtype, device or strides.
            RuntimeError: the model is in another mode than it was captured in.
        """
        if _kind(x) != _kind(self._sample):
            raise ValueError(f"x must be like the sample of graphed, {_words(self._sample)}, got {_words(x)}")
        if self.model.training != self._captured_training:
            modes = {True: "train", False: "eval"}
            raise RuntimeError(
                f"a graph captured in {modes[self._captured_training]} mode cannot run in "
                f"{modes[self.model.training]} mode: call graphed(model, sample) again in that mode"
            )
        made: Tensor = self._call(x)
        return made


def graphed(model: nn.Module, sample: Tensor) -> Graphed:
    """Capture a model's call on tensors like `sample` as CUDA graphs, in the mode that the model is in.

    In train mode forward and backward become one graph each, gradients arrive in the parameters as usual; loss and
    optimizer stay outside. In eval mode the forward pass becomes a graph that records no gradients.

    Args:
        model: on a CUDA device, without hooks; its running statistics stay as they are.
        sample: a batch [N, C, H, W] as training will bring it: shape, dtype, device, memory format. It becomes the
            memory that every later batch is copied into.

    Returns:
        A module that is called like the model, with batches like `sample` alone.

    Raises:
        TypeError: not a module, not a tensor.
        RuntimeError: no CUDA device, or model or sample do not lie on one; or the model cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample must be a torch.Tensor, got {type(sample).__name__}")
    if not torch.cuda.is_available():
        raise RuntimeError("graphed needs a CUDA device: torch sees none here")
    places = {t.device for t in (sample, *model.parameters(), *model.buffers())}
    if len(places) != 1 or sample.device.type != "cuda":
        raise RuntimeError(
            f"graphed needs model and sample on one CUDA device, got {', '.join(sorted(map(str, places)))}"
        )
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise RuntimeError("graphed within autocast needs its cache off: torch.autocast('cuda', cache_enabled=False)")
    with torch.cuda.device(sample.device):
        return Graphed(model, sample)


def capture(step: Callable[[], Any], warmup: int = WARMUP) -> tuple[Callable[[], None], Any]:
    """A function without arguments as one graph: what replays it, and what the captured call returned.

    Args:
        step: works on the same memory in every call, and neither waits for the GPU nor reads from it.
        warmup: calls on a stream of their own before the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class _Body(nn.Module):
    """The model in a module whose forward may be replaced: `make_graphed_callables` replaces what it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.model(x)
        return made


def _training_graph(model: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    body = _Body(model).train()
    made: Any = torch.cuda.make_graphed_callables(body, (sample,), num_warmup_iters=WARMUP)
    return made


def _inference_graph(model: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def step() -> Tensor:
        made: Tensor = model(sample)
        return made

    replay, out = capture(step)

    def call(x: Tensor) -> Tensor:
        if x.data_ptr() != sample.data_ptr():
            sample.copy_(x)
        replay()
        made: Tensor = out
        return made

    return call


def _kind(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device, x.stride()


def _words(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}"
