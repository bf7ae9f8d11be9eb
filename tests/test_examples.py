"""Every example runs as its first lines say, on little data."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
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


def test_their_first_lines_say_how_to_run_them():
    """ruff format takes the indent away where every line behind the first one has it."""
    for path in EXAMPLES.glob("*.py"):
        lines = ast.get_docstring(ast.parse(path.read_text()), clean=False).splitlines()
        assert any(line.startswith(f"    python examples/{path.name}") for line in lines), path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a network trained on digits, exported, and pictures: six digits, and two photographs."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("served")
    # about half of the digits right: after four epochs it told as few as two apart, another two on another machine
    run("train", *SMALL, "--epochs", 12, "--lr", 0.02, "--batch-size", 20, "--seed", 0, "--out", folder / "run")
    checkpoint = folder / "run" / "checkpoints" / "best.ckpt"
    about, _ = run("export", folder / "digits.onnx", "--checkpoint", checkpoint, "--json")
    (folder / "about.json").write_text(about)
    side = json.loads(about)["image_size"]
    for i, pixels in enumerate(load_digits().images[:6]):
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((side, side)).save(folder / f"digit{i}.png")
    for i, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"photo{i}.png")
    return folder


def serve(folder, runtime, files):
    """What the example prints for each file, in a process that cannot import torch."""
    stdout = example(
        "serve_onnx.py", folder / "digits.onnx", *files, "--about", folder / "about.json", "--runtime", runtime,
        before="sys.modules['torch'] = None",
    )  # fmt: skip
    lines = stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(file) for file in files]
    return [re.findall(r"(\S+) ([\d.]+)%", line.split(": ")[1]) for line in lines]


def test_serve_onnx_agrees_with_predict(served):
    pytest.importorskip("onnxruntime")
    files = sorted(served.glob("digit*.png"))
    rows = json.loads(run("predict", served / "run" / "checkpoints" / "best.ckpt", *files, "--json")[0])
    for best, row in zip(serve(served, "onnxruntime", files), rows, strict=True):
        assert best[0][0] == row["top"][0]["class"]


def test_serve_onnx_in_opencv(served):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("cv2")
    files = sorted(served.glob("*.png"))
    other = serve(served, "onnxruntime", files)
    for best, expected in zip(serve(served, "opencv", files), other, strict=True):
        assert [name for name, _ in best] == [name for name, _ in expected] and len(best) == 5
        for (_, a), (_, b) in zip(best, expected, strict=True):
            assert float(a) == pytest.approx(float(b), abs=0.11)  # printed with one decimal
    assert len({best[0][0] for best in other}) > 2  # the pictures are told apart


def test_segment_shapes(tmp_path):
    stdout = example(
        "segment_shapes.py", "--steps", 30, "--batch-size", 8, "--side", 32, "--out", tmp_path / "new" / "a.png"
    )
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size[0] > 500
    share = re.search(r"background ([\d.]+)%", stdout)
    assert float(share[1]) > 60, stdout


def test_classify_volumes(tmp_path):
    stdout = example(
        "classify_volumes.py", "--steps", 8, "--batch-size", 6, "--side", 20, "--out", tmp_path / "new" / "a.png"
    )
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size[0] > 500
    ours, plain = map(float, re.search(r"keep ([\d.]+) MiB, in plain torch ([\d.]+) MiB", stdout).groups())
    assert 0 < ours < 0.5 * plain
    loss, right = map(float, re.search(r"loss ([\d.]+); right ([\d.]+)%", stdout).groups())
    assert loss < 2 and 0 <= right <= 100
