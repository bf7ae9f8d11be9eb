"""Whole-model steps, measured: fused blocks and their rivals on the same weights and images, in one paired run.

A step that is not right is not timed, a provider that cannot run leaves its reason, and losses are printed like wins.
"""

from .cases import PRESETS, Case, Preset, select
from .measure import Settings, default_device, measure
from .providers import PROVIDERS, known
from .report import markdown, plot
from .results import Results, machine, path_for, read

__all__ = [
    "PRESETS", "PROVIDERS", "Case", "Preset", "Results", "Settings", "default_device", "known", "machine", "markdown",
    "measure", "path_for", "plot", "read", "select",
]  # fmt: skip
