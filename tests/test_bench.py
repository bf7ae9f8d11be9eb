"""The bench command for real on tiny steps: rows, a second call that finds them done, the report, bad input."""

import json
import os
import subprocess
import sys

import pytest

from thresholdnet.bench.providers import PROVIDERS
from thresholdnet.bench.report import COLOURS
from thresholdnet.bench.targets import OURS

TINY = [
    "--preset", "quick", "--model", "thresholdnet_ab:width_mult=0.25", "--image", "32", "--batch", "2", "--rounds", "2",
    "--warmup", "1", "--provider", "eager", "--provider", "eager_channels_last", "--provider", "checkpoint",
    "--provider", "fused",
]  # fmt: skip


def run(*arguments):
    """Exit code, stdout, stderr of the command."""
    command = [sys.executable, "-m", "thresholdnet", "bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    return done.returncode, done.stdout, done.stderr


def test_rows_resume_and_report(tmp_path):
    file = tmp_path / "tiny.json"
    code, out, error = run(*TINY, "--out", file, "--json")
    assert code == 0, error
    found = json.loads(file.read_text())
    assert json.loads(out)["rows"] == found["rows"]
    assert {row["mode"] for row in found["rows"]} == {"train", "infer"}
    for row in found["rows"]:
        if (row["provider"], row["mode"]) == ("checkpoint", "infer"):
            continue  # nothing to keep, nothing to check-point
        assert row["runs"] == 2 and 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"], row
    kept = {row["provider"]: row["saved_bytes"] for row in found["rows"] if row["mode"] == "train"}
    assert kept["fused"] < 0.5 * kept["eager"]

    assert run(*TINY, "--out", file)[0] == 0
    assert json.loads(file.read_text())["rows"] == found["rows"]  # nothing was timed again

    code, out, error = run("--report", file)
    assert code == 0, error
    assert out.count("| fused |") == 2 and file.with_suffix(".png").stat().st_size > 10_000


def test_dry_run_lists_the_cases():
    code, out, _ = run("--preset", "cpu", "--dry-run", "--filter", "hardnet68")
    assert code == 0 and "hardnet68" in out and "densenet121" not in out


def test_every_provider_can_be_drawn():
    assert PROVIDERS.keys() <= COLOURS.keys()
    assert {name for name in PROVIDERS if name.startswith("fused")} == set(OURS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--provider", "eagre"], "eager"), (["--rounds", "0"], "got 0"), (["--model", "no_such_model"], "no_such_model")],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    code, _, error = run("--preset", "quick", "--out", tmp_path / "x.json", *arguments)
    assert code == 2 and message in error and "Traceback" not in error
