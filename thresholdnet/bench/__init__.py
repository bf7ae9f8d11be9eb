"""Steps of networks and of blocks, and single operations, measured: ours and its rivals on the same tensors.

What is not right is not timed, a provider that cannot run leaves its reason, and losses are printed like wins.
"""

from .cases import PRESETS, Case, Preset
from .jobs import LEVELS, is_done, providers_of, run, select
from .layers import OPERATIONS, Operation, operations
from .measure import measure
from .micro import PROVIDERS as OPERATION_PROVIDERS
from .micro import measure_operation
from .peaks import Peak, peak
from .providers import PROVIDERS
from .results import Results, machine, path_for, read
from .rounds import Settings, default_device

__all__ = [
    "LEVELS", "OPERATIONS", "OPERATION_PROVIDERS", "PRESETS", "PROVIDERS", "Case", "Operation", "Peak",
    "Preset", "Results", "Settings", "default_device", "is_done", "machine", "measure", "measure_operation",
    "operations", "path_for", "peak", "providers_of", "read", "run", "select",
]  # fmt: skip
