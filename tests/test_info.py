"""`thresholdnet info`: complete, honest about what is missing, and in step with the documents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from thresholdnet import info
from thresholdnet.backends import csrc, libraries

INSTALL = Path(__file__).resolve().parents[1] / "docs" / "install.md"


def test_json():
    report = json.loads(run("info", "--json")[0])
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["backends"]) == ["triton", "native", "reference"]
    for state in report["backends"].values():
        assert state["usable"] == (state["reason"] is None) == (state["details"] is not None)
    assert list(report["libraries"]) == list(libraries.NAMES)
    for state in report["libraries"].values():
        assert state["loaded"] == (state["reason"] is None)
    assert report["cpu"]["torch threads"] >= 1 and report["cpu"]["model"]
    assert len(report["gpus"]) == torch.cuda.device_count()


def test_table_says_everything(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setattr(csrc, "reason", lambda: "it was not built: [no] compiler")
    stdout, _ = run("info")
    assert torch.__version__ in stdout and "not loaded: it was not built: [no] compiler" in stdout
    assert f"3  ({info.ENVIRONMENT['MAX_JOBS']})" in stdout and "…" not in stdout
    monkeypatch.delenv("MAX_JOBS")
    for name in info.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert "no variable that thresholdnet looks at is set" in run("info")[0]


def test_without_library_and_triton():
    """In a process of its own, as on a machine that has neither, and without the command's packages."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'rich', 'typer']));"
        "import importlib.util as u; found = u.find_spec;"
        "u.find_spec = lambda name, *more: None if name == 'triton' else found(name, *more);"
        "import runpy; runpy.run_module('thresholdnet.info', run_name='__main__')"
    )
    environment = {**os.environ, "THRESHOLDNET_CSRC": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["Triton"] is None
    assert report["backends"]["triton"]["reason"].startswith("triton is not installed")
    assert report["libraries"]["_csrc"]["reason"] == "THRESHOLDNET_CSRC=0 is set"
    assert "THRESHOLDNET_CSRC=0 is set" in report["backends"]["native"]["details"]
    assert report["environment"]["THRESHOLDNET_CSRC"] == "0"


def test_a_broken_package_is_reported(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libfirst.so: no such file\\nsecond line')")
    monkeypatch.syspath_prepend(tmp_path)
    assert info.version_of("broken_package") == "does not import: libfirst.so: no such file"
    assert info.version_of("no_such_package") is None


def test_the_documents_list_the_same_variables():
    if not INSTALL.is_file():
        pytest.skip("run outside a checkout")
    text = INSTALL.read_text()
    for name, meaning in info.ENVIRONMENT.items():
        assert f"| `{name}` | {meaning} |" in text
