"""bench/precompile.py: kernels for a GPU that is not there, where a later process finds them."""

from functools import partial

import pytest
from without_gpu import BENCH, python, require

require("precompile.py")
run = partial(python, BENCH / "precompile.py")


def compiled(cache):
    """When each kernel was made."""
    return {file: file.stat().st_mtime_ns for file in cache.rglob("*.cubin")}


def test_a_later_process_finds_the_kernels(tmp_path):
    small = ("--cache", tmp_path, "--model", "densenet121", "--batch", 2, "--image", 32)
    done = run(*small)
    assert done.returncode == 0, done.stderr
    made = compiled(tmp_path)
    assert done.stdout.startswith(f"{len(made)} kernels in ") and len(made) > 20 and not done.stderr
    assert {b"sm_90" in file.with_suffix(".ptx").read_bytes() for file in made} == {True}
    assert run(*small).returncode == 0 and compiled(tmp_path) == made
    assert run(*small, "--parameters", "float32").returncode == 0
    more = compiled(tmp_path)
    assert len(more) > len(made) and {file: more[file] for file in made} == made


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--model", "thresholdnet_v9"), {}, "error: "),
        (("--model", "thresholdnet_v1", "--batch", 0), {}, "error: batch must be at least 1, got 0"),
        (("--model", "thresholdnet_v1", "--capability", "7.5"), {}, "error: capability must be 8.0 or newer, such as"),
        (("--model", "thresholdnet_v1", "--cache", __file__), {}, "error: cache must lead to a folder, got "),
        (("--model", "thresholdnet_v1"), {"TRITON_INTERPRET": "1"}, "error: TRITON_INTERPRET must not be 1"),
    ],
)
def test_errors(arguments, environment, message, tmp_path):
    done = run("--cache", tmp_path, *arguments, **environment)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
