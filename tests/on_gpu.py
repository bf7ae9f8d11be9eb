"""The mark of tests for a GPU: `pytest -m gpu` picks them; without a CUDA device they are skipped, and say why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

_SKIP = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def needs_gpu(test: Callable[..., Any]) -> Any:
    """Mark a test."""
    return pytest.mark.gpu(_SKIP(test))
