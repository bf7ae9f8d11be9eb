"""One thread a process: the tests' networks are tiny, and `make test` runs two workers on two cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter
    import watched

    interpreter.install()
    watched.install()


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """A test may replace what a call of another one was recorded with."""
    from thresholdnet import replay

    replay.forget()
