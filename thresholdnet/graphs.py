"""CUDA graphs: a step's kernels launched as one, for small images, where a GPU waits for the processor.

A graph replays the kernels of one call on the memory of that call, so shapes are fixed and results are overwritten by
the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3  # calls before a capture: libraries choose their algorithms and workspaces


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
