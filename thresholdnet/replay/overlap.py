"""Kernels that start while their predecessors end, see `kernels/dependent.py`.

A step on small images is a chain of some 700 kernels of a few microseconds each, and a GPU starts each one when all of
the last has ended. THRESHOLDNET_PDL=1 overlaps start and end, on sm_90 and newer, in CUDA graphs too. It is off until a
GPU has measured it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from .recording import tensors_in

OLDEST = (9, 0)  # compute capability


def launch_options(arguments: Sequence[Any]) -> dict[str, Any]:
    """What a launch of a Triton kernel takes besides, from its arguments."""
    if not wanted() or not able(next(tensors_in(list(arguments))).device):
        return {}
    return {"PDL": True, "launch_pdl": True}


def wanted() -> bool:
    """Whether somebody asks for it."""
    return os.environ.get("THRESHOLDNET_PDL") == "1"


@lru_cache(maxsize=64)
def able(device: torch.device) -> bool:
    """Whether kernels can there."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST
