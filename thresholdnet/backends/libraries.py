"""The libraries of csrc/ inside the package: where they lie, how they were built, why one is missing or refused.

A library holds a record of its build as text (csrc/build_record.cpp). It is read from the file, so that a library that
torch refuses to load can still say which torch it was built against.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch

NAMES = ("_csrc", "_csrc_cuda")
"""For the CPU, with all schemas; CUDA's kernels for the same operators."""

_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = re.compile(rb"thresholdnet build record\n(.*?)\0", re.DOTALL)


def file_of(name: str) -> Path | None:
    """A library's file; None where it was not built."""
    files = [file for suffix in ("so", "pyd") for file in sorted(_PACKAGE.glob(f"{name}.*{suffix}"))]
    return files[0] if files else None


def record(name: str) -> dict[str, str]:
    """How a library was built: torch, compiler, flags; nvcc and architectures. Empty where there is none."""
    file = file_of(name)
    found = None if file is None else _RECORD.search(file.read_bytes())
    return {} if found is None else dict(line.split(" ", 1) for line in found[1].decode().splitlines())


@lru_cache(maxsize=len(NAMES))
def load(name: str) -> str | None:
    """None where a library is loaded, else the sentence that says why it is not; the first call loads it."""
    file = file_of(name)
    if file is None:
        cause = _PACKAGE / f"{name}.missing"
        return f"it was not built: {cause.read_text().strip() if cause.is_file() else 'thresholdnet is not installed'}"
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        built, why = record(name).get("torch", "of unknown version"), str(error).strip().splitlines()[0]
        return (
            f"{file.name}, built against torch {built}, does not load in torch {torch.__version__} ({why}): "
            "install thresholdnet again to rebuild it"
        )
    return None
