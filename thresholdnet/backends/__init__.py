"""What can compute a fused block here: one predicate per backend, with its reason, and the choice among them.

A backend is a module with the verbs of `native.py`. "reference" is no engine: it stands for the plain modules.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from ..checks import one_of
from . import native

NAMES = ("triton", "native", "reference")
CHOICES = ("auto", *NAMES)
AUTOMATIC = ("native",)
"""What "auto" chooses among; Triton joins when a GPU has shown that it is right and faster there."""


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run here, else the reason why it cannot."""
    return {name: _reason(name) for name in NAMES}


def choose(name: str = "auto") -> str:
    """The backend that will run: the first usable one for "auto", else the one asked for.

    Raises:
        ValueError: unknown name.
        RuntimeError: asked for by name and cannot run here; the message has the reason.
    """
    if one_of("backend", name, CHOICES) == "auto":
        return next(candidate for candidate in AUTOMATIC if _reason(candidate) is None)
    reason = _reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


def load(name: str) -> ModuleType:
    """The verbs of a backend that `choose` returned."""
    if name == "triton":
        from . import triton  # needs triton, which is optional

        return triton
    return native


def _reason(name: str) -> str | None:
    if name != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests)"
    return None
