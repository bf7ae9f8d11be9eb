"""Scripts of bench/ that compile for a GPU which is not there (bench/silent.py): tests skip where they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def require(name):
    """Skip a test, or its whole module, that cannot run this script."""
    pytest.importorskip("triton")
    if not (BENCH / name).is_file():
        pytest.skip("run outside a checkout", allow_module_level=True)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler", allow_module_level=True)


def python(*arguments, **environment):
    """Run Python with additions to the environment, the kernels compiled and not interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=env)
