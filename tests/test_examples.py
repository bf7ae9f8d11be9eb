"""Every example runs as its first lines say, on little data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from test_cli import SMALL, run

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name, *arguments, before="pass"):
    """Run an example in a process of its own; `before` is executed first."""
    path, argv = str(EXAMPLES / name), [name, *map(str, arguments)]
    code = f"import runpy, sys; {before}; sys.argv = {argv!r}; runpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_tested():
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))


def test_finetune_densenet():
    options = {"--weights": "none", "--epochs": 1, "--limit": 40, "--side": 32, "--batch-size": 16}
    stdout = example("finetune_densenet.py", *(part for pair in options.items() for part in pair))
    assert stdout.count("fused features.denseblock") == 4
    assert "epoch 1: loss" in stdout


def test_serve_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    run("train", *SMALL, "--epochs", 4, "--lr", 0.02, "--batch-size", 20, "--seed", 0, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    about, _ = run("export", tmp_path / "digits.onnx", "--checkpoint", checkpoint, "--json")
    (tmp_path / "digits.json").write_text(about)
    files = []
    for i, pixels in enumerate(load_digits().images[:6]):
        files.append(tmp_path / f"{i}.png")
        side = json.loads(about)["image_size"]
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((side, side)).save(files[-1])
    served = example(
        "serve_onnx.py", tmp_path / "digits.onnx", *files, "--about", tmp_path / "digits.json",
        before="sys.modules['torch'] = None",  # an import of it would fail
    )  # fmt: skip
    rows = json.loads(run("predict", checkpoint, *files, "--json")[0])
    for line, row in zip(served.splitlines(), rows, strict=True):
        assert line.startswith(f"{row['path']}: {row['top'][0]['class']} ")


def test_segment_shapes(tmp_path):
    stdout = example("segment_shapes.py", "--steps", 30, "--batch-size", 8, "--side", 32, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    share = re.search(r"background ([\d.]+)%", stdout)
    assert float(share[1]) > 60, stdout
