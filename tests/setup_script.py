"""setup.py as a module, for tests that compile with its compilers and flags."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load():
    """A new module; it builds nothing."""
    spec = importlib.util.spec_from_file_location("thresholdnet_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
