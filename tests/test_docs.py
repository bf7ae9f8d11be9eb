"""The documentation builds without a warning, and its notebook runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocs")


def test_documentation_builds(tmp_path):
    shutil.rmtree(ROOT / ".cache" / "mkdocs-jupyter", ignore_errors=True)  # outputs of another version of the package
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING -" not in done.stderr
    pages = {path.parent.name for path in tmp_path.rglob("index.html")}
    assert {"tutorial", "convert", "tools", "serving", "design", "kernels", "extending", "api"} <= pages
    tutorial = (tmp_path / "tutorial" / "index.html").read_text()
    assert "fused features.denseblock4" in tutorial  # cells were executed
    assert 'class="jp-RenderedImage' in tutorial  # and drew
    assert "ThresholdBlock" in (tmp_path / "api" / "index.html").read_text()


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook["cells"])
