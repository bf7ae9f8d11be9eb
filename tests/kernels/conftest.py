"""Interpreter tests of the kernels: `TRITON_INTERPRET=1 pytest tests/kernels`, in a process of their own.

Triton reads TRITON_INTERPRET where a kernel is decorated; without it nothing here is collected.
"""

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import thresholdnet

    ROOT = Path(thresholdnet.__file__).resolve().parent.parent
    if not any((Path(place) / "kernels").is_dir() for place in thresholdnet.__path__):
        thresholdnet.__path__.append(str(ROOT))
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)
