"""The engine's verbs on Triton kernels."""

from __future__ import annotations

from ..kernels import launch
from . import slotted
from .slotted import kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]


class Verbs(slotted.Verbs):
    """See `slotted.Verbs`."""

    launch = launch
