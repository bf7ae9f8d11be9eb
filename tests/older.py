"""Tests of a file once more, where the C++ library uses older instructions than the machine has."""

import os
import subprocess
import sys


def assert_passes(file: str, instructions: str, keyword: str) -> None:
    """In a process of its own: the library chooses its loops once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", keyword]
    environment = {**os.environ, "THRESHOLDNET_CPU": instructions}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
