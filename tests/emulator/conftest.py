"""The CUDA sources run on the CPU, in csrc/emulator; no GPU and no nvcc is needed, a C++ compiler is."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import emulated_library
import setup_script


@pytest.fixture(scope="session")
def emulated_compiler():
    """The command of the C++ compiler; without one, tests are skipped."""
    setup = setup_script.load()
    if sys.platform != "linux":
        pytest.skip("the emulator needs Linux: its threads are ucontext fibers")
    try:
        return setup.cxx()
    except setup.Missing as cause:
        pytest.skip(f"the emulator is not built: {cause}")


@pytest.fixture(scope="session")
def emulated(emulated_compiler):
    """The operators of the emulated library."""
    torch.ops.load_library(str(emulated_library.build(emulated_compiler)))
    return torch.ops.thresholdnet_emulated
