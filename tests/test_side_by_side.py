"""bench/paper --jobs: runs at once are the runs one by one, failures are named, what stops the command stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from thresholdnet.checkpoint import read_checkpoint

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "paper"
if not SCRIPT.is_dir():
    pytest.skip("run outside a checkout", allow_module_level=True)
SWEEP = ("sweep", "--data", "digits", "--model-arg", "width_mult=0.25", "--limit", 200, "--save-every", 1,
         "--pattern", "ab", "--threshold", 0, "--threshold", 8)  # fmt: skip


def paper(*arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(*arguments, code=0):
    process = paper(*arguments)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == code, stdout + stderr
    return stdout, stderr


def steps(out):
    """How far each run's last checkpoint is."""
    files = sorted(out.glob("sweep/*/seed0/checkpoints/last.ckpt"))
    return [read_checkpoint(file)["global_step"] for file in files]


def test_runs_at_once_are_the_runs_one_by_one(tmp_path):
    once, alone = tmp_path / "once", tmp_path / "alone"
    text, _ = done(*SWEEP, "--epochs", 2, "--out", once, "--jobs", 2)
    assert text.count(": begun: 0 of 2 epochs done") == text.count(": done") == 2
    done(*SWEEP, "--epochs", 2, "--out", alone, "--only", "T08")
    a, b = (
        read_checkpoint(out / "sweep" / "ab-T08" / "seed0" / "checkpoints" / "last.ckpt")["state_dict"]
        for out in (once, alone)
    )
    assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert "epoch 2/2" in (once / "sweep" / "ab-T00" / "seed0" / "log.txt").read_text()
    (row, _), (single,) = (
        json.loads(done("report", "--out", out, "--json")[0])["sweep"]["rows"] for out in (once, alone)
    )
    assert row["step_ms"] is None and row["epoch_s"] is None and single["step_ms"] > 0
    report = (once / "report.md").read_text()
    assert "Runs that shared the machine with others have no times here." in report
    assert "shared the machine" not in (alone / "report.md").read_text()


def test_a_run_that_fails_is_named_and_the_others_are_trained(tmp_path):
    broken = tmp_path / "sweep" / "ab-T00" / "seed0"
    broken.mkdir(parents=True)
    (broken / "checkpoints").write_text("no folder")
    _, stderr = done(*SWEEP, "--epochs", 1, "--out", tmp_path, "--jobs", 2, code=2)
    assert stderr.startswith("error: sweep/ab-T00/seed0: ") and stderr.count("\n") == 1 and "log.txt)" in stderr
    assert json.loads((tmp_path / "sweep" / "ab-T08" / "seed0" / "result.json").read_text())["epochs"] == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("way", (signal.SIGTERM, signal.SIGKILL))
def test_what_stops_the_command_stops_its_runs(tmp_path, way):
    """Each is saved; after SIGKILL the runs notice that they are alone."""
    process = paper(*SWEEP, "--epochs", 1000, "--out", tmp_path, "--jobs", 2)
    limit = time.monotonic() + 120
    while len(steps(tmp_path)) < 2:
        assert time.monotonic() < limit and process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(way)
    process.communicate(timeout=100)  # the runs hold its pipes until they end
    assert process.returncode == (143 if way == signal.SIGTERM else -way)
    results = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/seed0/result.json")]
    assert [result["interrupted"] for result in results] == [True, True]
    reached = steps(tmp_path)
    text, _ = done(*SWEEP, "--epochs", 1000, "--out", tmp_path, "--jobs", 2, "--minutes", 0)
    assert text.count("begun: ") == 2
    assert all(now > before for now, before in zip(steps(tmp_path), reached, strict=True))


def test_jobs_must_be_a_count(tmp_path):
    assert "--jobs must be at least 1, got 0" in done(*SWEEP, "--out", tmp_path, "--jobs", 0, code=2)[1]
