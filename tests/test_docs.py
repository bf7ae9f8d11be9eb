"""The documentation builds without a warning, and its notebook runs."""

import html
import json
import re
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
    assert {
        "install", "tutorial", "convert", "tools", "serving", "design", "kernels", "performance", "extending", "api",
    } <= pages  # fmt: skip
    tutorial = (tmp_path / "tutorial" / "index.html").read_text()
    assert "fused features.denseblock4" in tutorial  # cells were executed
    assert 'class="jp-RenderedImage' in tutorial  # and drew
    assert "ThresholdBlock" in (tmp_path / "api" / "index.html").read_text()
    _check_pictures(tmp_path)
    _check_figures((tmp_path / "performance" / "index.html").read_text())
    kernels = (tmp_path / "kernels" / "index.html").read_text()
    assert "<code>gather_readers</code>" in kernels and "{{" not in kernels
    extending = re.sub("<[^>]*>", "", (tmp_path / "extending" / "index.html").read_text())
    assert "\ndef _harmonic(i" in html.unescape(
        extending
    ) and "device_norm.normalise, (cdiv(pixels, rows)" in html.unescape(extending)


def _check_pictures(site):
    """Every picture that a page shows was drawn."""
    shown = 0
    for page in site.rglob("index.html"):
        for source in re.findall(r'<img[^>]*src="([^"]*images/[^"]*)"', page.read_text()):
            picture = page.parent / source
            assert picture.stat().st_size > 5000, source
            shown += 1
    assert shown >= 7


def _check_figures(page):
    """The page holds what the files say, of losses too."""
    for file in (ROOT / "bench" / "results").glob("*/*.json"):
        rows = json.loads(file.read_text()).get("rows", [])
        speeds = [row["ratios"]["eager_channels_last"] for row in rows if row["provider"] == "fused" and row["ratios"]]
        for speed in speeds:
            assert "{median:.2f} ({p20:.2f} to {p80:.2f})".format(**speed) in page, file
    assert "<strong>slower</strong>" in page
    assert "Of 95 timed operations of layers of ours, 37 are faster" in page and "Of 0 timed" not in page
    assert "before the C++ weight gradient" in page and "with local changes" in page
    account = json.loads((ROOT / "bench" / "results" / "memory" / "hardnet68-224-b128-bf16.json").read_text())
    assert (
        f"{account['fused']['kept'] / 2**20:,.0f} ({account['fused']['kept'] / account['eager']['kept']:.2f})" in page
    )
    steps = json.loads((ROOT / "bench" / "results" / "h100" / "2026-11-26-steps.json").read_text())["rows"]
    eager, ours = (
        next(
            row["peak_bytes"]
            for row in steps
            if (row["model"], row["mode"], row["provider"], row["graph"]) == ("hardnet68", "train", provider, False)
        )
        for provider in ("eager_channels_last", "fused_triton")
    )
    assert f"{ours / 2**20:,.0f} ({ours / eager:.2f})" in page


def test_the_code_of_the_page_on_patterns_runs():
    (code,) = re.findall(r"```python\n(import.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)
    names = {}
    exec(code, names)
    assert names["block"].links[6] == (6, 3, 0)
    assert names["kept"] > 0


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook["cells"])
