"""bench/host_time.py: replays through Triton's own launcher, into a driver that notes what arrives; no GPU needed."""

import json
from functools import partial

import pytest
from without_gpu import BENCH, python, require

require("host_time.py")
run = partial(python, BENCH / "host_time.py")


def test_replays_launch_what_calls_launch(tmp_path):
    done = run("--quick", "--out", tmp_path / "times.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "times.json").read_text())
    (row,) = found["rows"]
    assert row["differ"] == 0 and row["launches"] > 60  # both directions of six layers
    assert row["overlapping"] == 0
    assert 2 <= row["graphs"] <= 4  # of two blocks, each direction in one but where few launches are apart
    assert row["ratio"] == pytest.approx(row["run_ms"] / row["replayed_ms"]) and row["replayed_ms"] > 0
    assert found["machine"]["triton"] and done.stdout.splitlines()[1].startswith("two small blocks")


def test_launches_overlap(tmp_path):
    done = run("--quick", "--out", tmp_path / "times.json", THRESHOLDNET_PDL="1")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert row["differ"] == 0 and row["overlapping"] == row["launches"] > 60


def test_a_difference_is_found():
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import host_time
one = "7 1 1 1 128 0 0 7f0000001000 10 3".split()
same, moved, odd, other, short = (text.split() for text in (
    "7 1 1 1 128 0 0 7f0000002000 10 3", "7 2 1 1 128 0 0 7f0000001000 10 3", "7 1 1 1 128 0 0 7f0000001008 10 3",
    "7 1 1 1 128 0 0 7f0000001000 10 4", "7 1 1 1 128 0 0 7f0000001000 10"))
print([host_time.differing([one], [line]) for line in (same, moved, odd, other, short)], host_time.differing([one], []))
"""
    done = python("-c", code)
    assert done.stdout.strip() == "[0, 1, 1, 1, 1] 1"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--model", "thresholdnet_v9"), {}, "error: "),
        (("--quick", "--out", f"{__file__}/times.json"), {}, "error: out must lead to a folder, got "),
        ((), {"TRITON_INTERPRET": "1"}, "error: TRITON_INTERPRET must not be 1"),
    ],
)
def test_errors(arguments, environment, message):
    done = run(*arguments, **environment)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
