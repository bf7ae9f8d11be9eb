"""What can compute a fused block here: one predicate per backend, with its reason, and the choice among them.

A backend is a module with the verbs of `native.py`. "reference" is no engine: it stands for the plain modules.
"""

from __future__ import annotations

from types import ModuleType

from ..checks import one_of
from . import native

NAMES = ("triton", "native", "reference")
CHOICES = ("auto", *NAMES)


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
        return next(candidate for candidate in NAMES if _reason(candidate) is None)
    reason = _reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


def load(name: str) -> ModuleType:
    """The verbs of a backend that `choose` returned."""
    return {"native": native}[name]


def _reason(name: str) -> str | None:
    if name == "triton":
        return "its kernels are not joined to the engine in this version"
    return None
