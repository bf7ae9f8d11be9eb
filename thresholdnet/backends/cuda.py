"""The engine's verbs on the CUDA operators of csrc/: what "native" means for half formats on a GPU.

The name is the engine's own (`backends.engine_for`); users choose, and blocks report, "native".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.operands import MAX_ELEMENTS
from ..pixels import count
from ..plan import BlockPlan
from . import csrc, cuda_launch, slotted
from .slotted import kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features", "takes"]

DTYPES = (torch.bfloat16, torch.float16)


class Verbs(slotted.Verbs):
    """See `slotted.Verbs`."""

    launch = cuda_launch

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        super().__init__(plan, x)
        self.readers_at_once = 1  # every reader is a convolution and a pass of its own: groups would save nothing


def takes(plan: BlockPlan, x: Tensor) -> bool:
    """Whether these verbs run a block on GPU tensors like this one; "native" gathers where they do not."""
    return fits(plan, x) and csrc.takes(x)


def fits(plan: BlockPlan, x: Tensor) -> bool:
    """Whether the kernels have the dtype, and every offset between slots fits into 31 bits."""
    elements = count(x) * plan.widest_row
    return x.dtype in DTYPES and x.numel() > 0 and elements < MAX_ELEMENTS
