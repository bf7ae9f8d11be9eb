"""What can compute a fused block here: one predicate per backend, with its reason, and the choice among them.

A choice by name works or raises. "auto" takes the first backend that can run here and takes the input; where none does,
the plain modules compute, with one warning a process and cause.

An engine is a module with the verbs of `native.py`; behind the backend "native" stands `cuda.py` too. "reference" is no
engine: it stands for the plain modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..checks import one_of
from ..constants import compiler_constant
from ..pixels import LAYOUTS, count
from ..plan import BlockPlan
from . import csrc, native, signals, volumes, winograd

NAMES = ("triton", "native", "reference")
CHOICES = ("auto", *NAMES)
AUTOMATIC = ("triton", "native")
"""What "auto" chooses among, best first: Triton's kernels on a GPU in half formats, as an H100 measured them
(bench/results/h100; of units "bn_relu_conv" and "conv_relu", and of dilated layers, that is a prediction), the rest
natively."""

HALF = (torch.bfloat16, torch.float16)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_told: set[str] = set()  # causes for which this process has fallen back


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run here, else the reason why it cannot."""
    return {name: _reason(name) for name in NAMES}


def details() -> dict[str, str]:
    """What every backend that can run here runs on, in words."""
    usable = {name for name, reason in backends().items() if reason is None}
    said = {"native": _native_details(), "reference": "the plain modules in torch's own operations"}
    if "triton" in usable:
        interpreted = " in the interpreter, on the CPU" if _interpreted() else ""
        said["triton"] = f"Triton {importlib.import_module('triton').__version__}{interpreted}"
    return {name: said[name] for name in NAMES if name in usable}


def candidates(choice: str = "auto") -> tuple[str, ...]:
    """What may run on this machine for a choice, best first.

    Raises:
        ValueError: unknown name.
        RuntimeError: asked for by name and cannot run here; the message has the reason.
    """
    if one_of("backend", choice, CHOICES) == "auto":
        usable = (name for name in AUTOMATIC if _reason(name) is None)
        return tuple(name for name in usable if name != "triton" or not _interpreted())
    reason = _reason(choice)
    if reason is not None:
        raise RuntimeError(f"backend {choice!r} cannot run here: {reason}")
    return (choice,)


def pick(names: Sequence[str], choice: str, x: Tensor, row: int = 0) -> str:
    """The first of `candidates(choice)` that takes tensors like x; "reference", aloud, where "auto" finds none.

    row: elements that a pixel takes in the largest allocation of the call.

    Raises:
        RuntimeError: asked for by name and does not take x; the message has the reason.
    """
    causes = []
    for name in names:
        cause = refusal(name, x)
        if cause is None and choice == "auto" and name == "triton":
            cause = _automatic_refusal(x, row)
        if cause is None:
            return name
        causes.append(f"{name} {cause}")
    if choice != "auto":
        raise RuntimeError(f"backend {choice!r} cannot run here: it {refusal(choice, x)}")
    _tell("; ".join(causes) or "no engine can run here")
    return "reference"


def choose(choice: str = "auto", x: Tensor | None = None, row: int = 0) -> str:
    """The backend that will run, on tensors like x where it is given. Errors as in `candidates` and `pick`."""
    names = candidates(choice)
    return names[0] if x is None else pick(names, choice, x, row)


def refusal(name: str, x: Tensor) -> str | None:
    """None where a backend takes tensors of x's layout, dtype and device, else what it takes and what came."""
    if name == "reference":
        return None
    if x.layout != torch.strided:
        return f"takes strided tensors, got layout {x.layout}"
    if name == "triton" and x.dim() in (3, 5):
        what, _ = LAYOUTS[x.dim() - 2]
        return f"takes images [N, C, H, W], got {what} of shape {tuple(x.shape)}"
    if x.dtype not in DTYPES:
        return f"takes float16, bfloat16, float32 and float64, got {x.dtype}"
    if name == "triton" and x.device.type != ("cpu" if _interpreted() else "cuda"):
        return f"takes tensors on {'the CPU, in its interpreter' if _interpreted() else 'a GPU'}, got {x.device}"
    return None


def _automatic_refusal(x: Tensor, row: int) -> str | None:
    """None where "auto" may take Triton for x, else the reason."""
    from ..kernels.operands import MAX_ELEMENTS
    from .triton import MOST_PIXELS  # needs triton, which is a candidate

    if x.dtype not in HALF:
        return "was measured in half formats alone: it is taken by name"
    pixels = count(x)
    if pixels > MOST_PIXELS or pixels * row >= MAX_ELEMENTS:
        return f"takes at most {MOST_PIXELS} pixels and fewer than 2^31 elements, got {pixels} of {row} elements"
    return None


def engine_for(name: str, plan: BlockPlan, x: Tensor) -> str:
    """The engine behind a backend that `choose` returned: "native" has its own for volumes, for signals, for half
    formats on a GPU, and for Winograd.

    A function of the arguments' shapes, dtype and device: fake tensors and backward find what forward found. Only
    `winograd.use` may change it, between engines that keep the same.
    """
    if name != "native":
        return name
    if plan.spatial_dims != 2:
        return "signals" if plan.spatial_dims == 1 else "volumes"
    if x.device.type == "cuda":
        from . import cuda

        return "cuda" if cuda.takes(plan, x) else name
    return "winograd" if winograd.enabled() else name


def load(name: str) -> ModuleType:
    """The verbs of an engine that `engine_for` returned."""
    if name == "triton":
        from . import triton  # needs triton, which is optional

        return triton
    if name == "cuda":
        from . import cuda

        return cuda
    return {"winograd": winograd, "volumes": volumes, "signals": signals}.get(name, native)


def _reason(name: str) -> str | None:
    return _triton_reason() if name == "triton" else None  # the other two are torch's own operations at the least


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests)"
    found = (torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    best = max(found, default=(0, 0))
    if best < (8, 0):
        return f"its kernels need a GPU of compute capability 8.0 or newer, got {best[0]}.{best[1]}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _native_details() -> str:
    reason = csrc.reason()
    passes = f"torch operations ({reason})" if reason else f"C++ ({csrc.instructions()})"
    said = f"on a CPU torch's convolution, weight gradients and passes over pixels in {passes}"
    if torch.cuda.is_available():
        reason = csrc.cuda_reason()
        said += f"; on a GPU {f'torch operations ({reason})' if reason else 'our CUDA kernels'}"
    return said


@compiler_constant  # so that a fallback in a compiled model is told as well
def _tell(cause: str) -> None:
    if cause not in _told:
        _told.add(cause)
        warnings.warn(f"fused=True falls back to the plain modules: {cause}", RuntimeWarning, stacklevel=3)
