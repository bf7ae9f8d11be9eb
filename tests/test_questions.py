"""bench/questions.py rehearsed in Triton's interpreter: every question on two shapes; what is wrong has no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "bench" / "questions.py"
if not SCRIPT.is_file():
    pytest.skip("run outside a checkout", allow_module_level=True)

FIELDS = {"question", "case", "variant", "device", "ms", "ms_low", "ms_high", "rate", "unit", "ratio", "error", "bound",
          "reason"}  # fmt: skip
VARIANTS = {
    "l2": {"L2", "memory"},
    "vector": {"8", "4", "8, not grouped", "4, not grouped"},
    "grouping": {"2x2", "none"},
    "halo": {"triton", "cuda wide", "cuda upright", "cuda gemm", "cuda library"},
    "readers": {"1", "2", "4"},
    "layout": {"rows", "arena"},
    "alignment": {"8", "16", "64"},
    "activated": {"pass", "on load", "on load, not grouped"},
}
SABOTAGE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, "bench")
from thresholdnet.kernels import launch
import questions
conv = launch.conv
def wrong(sources, weight, out, config=None, **options):
    found = conv(sources, weight, out, config=config, **options)
    if config.group == (1, 1):
        out[..., -1].mul_(1.1)
    return found
launch.conv = wrong
sys.exit(questions.main(sys.argv[1:]))
"""


def call(*arguments):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKOUT, timeout=300)


def test_every_question_is_rehearsed(tmp_path):
    out = tmp_path / "folder" / "questions.json"
    done = call(SCRIPT, "--interpreter", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "Times of Triton's interpreter on a CPU: they say nothing about a GPU."
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "interpreter", "records"} and found["interpreter"] is True
    by_question = {}
    for record in found["records"]:
        assert set(record) >= FIELDS and record["device"] == "Triton's interpreter"
        by_question.setdefault(record["question"], {}).setdefault(record["case"], []).append(record)
        if record["variant"].startswith("cuda"):
            assert record["ms"] is record["ratio"] is None and "CUDA kernels cannot run here" in record["reason"]
            continue
        assert record["ms_low"] <= record["ms"] <= record["ms_high"] and record["rate"] > 0 and record["ratio"] > 0
        assert record["error"] <= record["bound"] and record["reason"] is None
    assert list(by_question) == list(VARIANTS)
    for question, cases in by_question.items():
        assert len(cases) >= 2, "two shapes"
        assert set().union(*({r["variant"] for r in records} for records in cases.values())) == VARIANTS[question]
        assert all(records[0]["ratio"] == 1 for records in cases.values())


def test_a_wrong_kernel_has_no_time(tmp_path):
    out = tmp_path / "questions.json"
    done = call("-c", SABOTAGE, "--interpreter", "--out", out, "--filter", "grouping.*growth 16")
    assert done.returncode == 1, done.stdout + done.stderr
    for record in json.loads(out.read_text())["records"]:
        right = record["variant"] == "2x2"
        assert (record["ms"] is not None) == right and (record["reason"] is None) == right
    lines = [line for line in done.stdout.splitlines() if line.startswith("  none")]
    assert len(lines) == 2 and all("no time: wrong: result 1 of 1 off by" in line for line in lines)
    assert not any(" ms " in line for line in lines)


def test_what_it_needs_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import questions

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command sets it
    out = str(tmp_path / "questions.json")
    for arguments, words in (
        (("--out", out), "questions need a CUDA device, got none: --interpreter tries the tool without"),
        (("--interpreter",), "out must name a file, got none"),
        (("--out", out, "--filter", "no such"), "filter must leave a case, got 'no such': --list prints them"),
        (("--list", "--filter", "("), "filter must be a regular expression, got '('"),
    ):
        assert questions.main(list(arguments)) == 2 and words in capsys.readouterr().err
    blocked = ["--out", f"{__file__}/questions.json"]
    with monkeypatch.context() as patched:
        patched.setattr(questions, "measure", None)  # what fails in it is said of one case, and the others go on
        assert questions.main(["--interpreter", *blocked]) == 2
        assert f"out must lead to a folder, got {__file__}: {__file__} is a file" in capsys.readouterr().err
    assert questions.main(["--list"]) == 0
    assert {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} == set(VARIANTS)
    assert questions.main(["--interpreter", "--out", out, "--budget", "0", "--filter", "activated"]) == 0
    assert "the budget of 0 s is spent: 2 of 2 cases left" in capsys.readouterr().out
