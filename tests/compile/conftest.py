"""Compile tests: `pytest tests/compile`, without TRITON_INTERPRET; no GPU is needed."""

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
