"""The command as a user types it: output, JSON, exit codes, one sentence for every wrong argument."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from unittest import mock

import pytest
import torch
from PIL import Image

from thresholdnet import links
from thresholdnet.checkpoint import load_checkpoint
from thresholdnet.cli import main

SMALL = ["--data", "digits", "--model", "thresholdnet_ab", "--model-arg", "width_mult=0.25", "--limit", "100"]


def run(*arguments, code=0):
    """Run the command inside this process (a fresh one takes seconds to import torch); returns (stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["thresholdnet", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": os.environ.get("COLUMNS", "120")}),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as exit_,
    ):
        main()
    assert (exit_.value.code or 0) == code, (exit_.value.code, stdout.getvalue(), stderr.getvalue())
    return stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on a few digits: its folder and what `train` printed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    stdout, _ = run("train", *SMALL, "--epochs", 1, "--out", out)
    return out, stdout


def test_help_teaches():
    stdout, _ = run("--help")
    for command in (
        "train",
        "eval",
        "predict",
        "models",
        "tables",
        "memory",
        "links",
        "info",
        "selftest",
        "bench",
        "convert",
    ):
        assert command in stdout
    assert "--resume" in run("train", "--help")[0]
    assert run("--version")[0].startswith("thresholdnet 0.")


def test_links_prints_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, _ = run("links", "--pattern", "threshold_bc", "--layers", 16, "--threshold", 8)
    lines = [line.split() for line in stdout.splitlines()]
    assert [*lines[1:17]] == [[str(i), row] for i, row in links.threshold_bc(16, 8).rows()]
    assert lines[17] == ["links", "51"]
    assert Image.open(tmp_path / "links-threshold_bc-16.png").width > 300
    ElementTree.parse(tmp_path / "links-threshold_bc-16.svg")


def test_links_compare_and_json(tmp_path, monkeypatch):
    stdout, _ = run("links", "--compare", "--layers", 8, "--threshold", 4, "--out", tmp_path / "all.svg", "--json")
    made = json.loads(stdout)
    assert [row["pattern"] for row in made["patterns"]] == list(links.PATTERNS)
    assert made["patterns"][0]["links"] == [list(row) for row in links.dense(8)]
    ElementTree.parse(tmp_path / "all.svg")
    monkeypatch.setenv("COLUMNS", "60")
    stdout, _ = run("links", "--compare", "--no-draw")
    assert "…" not in stdout and "0-1-2-3-4-5-6-7-8-9-10-11-12-13-14-15" in stdout


def test_tables_in_every_format(tmp_path):
    assert "15,323,248" in run("tables", "VIII")[0]
    assert run("tables", "I", "--format", "markdown")[0].count("|") > 60
    assert len(json.loads(run("tables", "I", "II", "--format", "json")[0])) == 2
    assert run("tables", "III", "--format", "csv", "--out", tmp_path / "three.csv")[0].startswith("written:")
    assert "0-1-2-3-9-10-11" in (tmp_path / "three.csv").read_text()


def test_memory(tmp_path):
    report = json.loads(run("memory", "--model", "thresholdnet_v1", "--batch-size", 2, "--dtype", "fp32", "--json")[0])
    kept = {mode: entry["kept"] for mode, entry in report.items()}
    assert kept["fused, recompute"] < kept["fused"] < kept["eager"]
    stdout, _ = run("memory", "--model", "hardnet68", "--image-size", 64, "--figure", tmp_path / "bars.png")
    assert "kept in stages.0.block" in stdout and Image.open(tmp_path / "bars.png").width > 300
    pyramid = ("--model-arg", "features_only=true", "--model-arg", "out_indices=[1,2]", "--image-size", 64)
    stdout, _ = run("memory", "--model", "hardnet68", *pyramid)
    assert "kept in stages.0.block" in stdout


def test_models():
    rows = json.loads(run("models", "thresholdnet_*", "--json")[0])
    assert {row["model"]: row["parameters"] for row in rows}["thresholdnet_v1"] == 15_323_248


def test_train_says_where_everything_is(trained):
    out, stdout = trained
    assert "test accuracy" in stdout and "epoch 1/1" in stdout
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "curve.png", "confusion.png", "predictions.png"):
        assert (out / name).is_file()
        assert str(out / name) in stdout
    for name in ("curve.png", "confusion.png", "predictions.png"):
        assert min(Image.open(out / name).size) > 300
    assert json.loads((out / "result.json").read_text())["parameters"] > 0


def test_eval(trained, tmp_path):
    out, _ = trained
    best = out / "checkpoints" / "best.ckpt"
    report = json.loads(run("eval", best, "--json", "--figure", tmp_path / "c.png")[0])
    assert report["images"] == 360 and sum(map(sum, report["confusion"])) == 360
    assert report["accuracy"] == pytest.approx(sum(report["confusion"][i][i] for i in range(10)) / 360)
    assert Image.open(tmp_path / "c.png").width > 300
    assert "accuracy" in run("eval", best, "--limit", 50)[0]


def test_predict(trained, tmp_path):
    out, _ = trained
    best = out / "checkpoints" / "best.ckpt"
    (tmp_path / "in").mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA")):
        Image.new(mode, (40 + i, 50)).save(tmp_path / "in" / f"{i}.png")
    rows = json.loads(run("predict", best, tmp_path / "in", "--top-k", 3, "--json")[0])
    assert [len(row["top"]) for row in rows] == [3, 3, 3]
    assert all(0 < row["top"][0]["probability"] <= 1 for row in rows)
    stdout, _ = run("predict", best, tmp_path / "in" / "0.png", "--figure", tmp_path / "sheet.png")
    assert "0.png: " in stdout and Image.open(tmp_path / "sheet.png").width > 100


def test_resume_takes_its_settings_from_the_run(tmp_path):
    out = tmp_path / "run"
    run("train", *SMALL, "--epochs", 3, "--recipe", "released", "--out", out, "--limit", 60)
    again = json.loads(run("train", "--out", out, "--resume", "--epochs", 4, "--json")[0])
    assert (again["model"], again["epochs"], again["recipe"]) == ("thresholdnet_ab", 4, "released")


def test_ctrl_c_ends_with_a_usable_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "thresholdnet", "train", *SMALL, "--epochs", "200", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert f"thresholdnet train --out {out} --resume" in stdout
    loaded = load_checkpoint(out / "checkpoints" / "last.ckpt")
    assert loaded.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_released_weights_can_be_fine_tuned(tmp_path):
    from released import fill, threshnet_shapes

    state = fill(threshnet_shapes("thresholdnet_v1", classes=10), dtype=torch.float32)
    torch.save(state, tmp_path / "threshnet79.pth")
    result = json.loads(
        run("train", "--data", "digits", "--model", "thresholdnet_v1", "--weights", tmp_path / "threshnet79.pth",
            "--limit", 40, "--epochs", 1, "--lr", 1e-9, "--out", tmp_path / "run", "--json")[0]
    )  # fmt: skip
    trained = load_checkpoint(result["checkpoint_last"]).model
    torch.testing.assert_close(trained.stem.conv1.conv.weight, state["base.0.conv.weight"], atol=1e-5, rtol=1e-3)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG = [
    (["train", "--model", "thresholdnet_v3"], "did you mean thresholdnet_v"),
    (["train", "--data", "digits", "--model-arg", "threshold=4"], "model thresholdnet_v1 takes drop_rate"),
    (["train", "--data", "digits", "--model-arg", "threshold"], "--model-arg must be KEY=VALUE"),
    (["train", "--data", "digits", "--model", "thresholdnet_ab", "--model-arg", "threshold=-1"], "at least 0, got -1"),
    (["train", "--data", "cifar"], "did you mean cifar10"),
    (["train", "--data", "cifar10", "--root", "nowhere"], "root nowhere is no folder"),
    (["train", "--data", "digits", "--recipe", "moderm"], "did you mean modern"),
    (["train", "--data", "digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
    (["train", "--data", "digits", "--image-size", "20"], "images must be at least 29x29 pixels"),
    (["train", "--data", "digits", "--precision", "64"], "precision '64' is unknown"),
    (["train", "--data", "digits", "--weights", "none.pth"], "weights must be an existing file, got none.pth"),
    (["eval", "nothing.ckpt"], "checkpoint nothing.ckpt cannot be read"),
    (["memory", "--dtype", "int8"], "dtype 'int8' is unknown"),
    (["memory", "--image-size", "16"], "images must be at least 29x29"),
    (["train", "--data", "digits", "--fused", "--backend", "triton"], "backend 'triton' cannot run here"),
    (["train", "--data", "cifar10", "--backend", "tritton"], "did you mean triton"),
    (["train", "--data", "digits", "--backend", "native"], "--backend needs --fused, got --backend native without it"),
    (["train", "--recompute", "bottleneck"], "recompute needs fused=True, got recompute='bottleneck' without it"),
    (
        ["train", "--fused", "--model", "hardnet39ds", "--recompute", "bottleneck"],
        "hardnet39ds, which has no bottleneck",
    ),
    (["links", "--pattern", "harmonik"], "did you mean harmonic"),
    (["links", "--layers", "0"], "layers must be from 1 to 1024, got 0"),
    (["links", "--threshold", "-3"], "threshold must be at least 0, got -3"),
    (["links", "--out", "arcs.jpg"], ".jpg"),
    (["tables", "VI"], "VI"),
    (["tables", "--format", "html"], "--format 'html' is unknown"),
    (["models", "vgg*"], "must match a model"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[" ".join(a)[:40] for a, _ in WRONG])
def test_wrong_arguments_get_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout, stderr = run(*arguments, code=2)
    assert sentence in stderr and stderr.startswith("error: ")
    assert stderr.count("\n") == 1 and stdout == "" and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_wrong_files_get_one_sentence_and_exit_code_2(trained, tmp_path):
    out, _ = trained
    best = out / "checkpoints" / "best.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(best.read_bytes())
    _cut(cut)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    for arguments, sentence in (
        (["eval", cut], "is cut off"),
        (["eval", foreign], "is no checkpoint of thresholdnet"),
        (["predict", best, tmp_path / "empty"], "is empty"),
        (["predict", best, tmp_path / "broken.png"], "broken.png is no readable image"),
        (["predict", best, tmp_path / "none.png"], "does not exist"),
        (["train", *SMALL, "--out", out], "--resume"),
        (["train", "--data", "imagefolder", "--root", tmp_path / "empty", "--out", tmp_path / "o"], "must hold train/"),
    ):
        _, stderr = run(*arguments, code=2)
        assert sentence in stderr and stderr.count("\n") == 1, stderr


def _writers(best, image, folder):
    """A command line for every option that names a file or folder to write, and the work that must not come first."""
    small = ("--model", "hardnet39ds", "--image-size", 64)
    return (
        (["eval", best, "--limit", 9, "--figure", folder / "e.png"], "thresholdnet.inference.evaluate_data"),
        (["predict", best, image, "--figure", folder / "p.png"], "thresholdnet.inference.pick_device"),
        (["memory", *small, "--batch-size", 2, "--figure", folder / "m.png"], "thresholdnet.memory.account"),
        (["tables", "I", "--out", folder / "t.txt"], "thresholdnet.tables.table"),
        (["links", "--out", folder / "l.svg"], "thresholdnet.diagrams.arc_diagram"),
        (["export", folder / "n.pt2", *small], "thresholdnet.export._unfolded"),
        (["train", *SMALL, "--epochs", 1, "--limit", 40, "--out", folder / "run"], "thresholdnet.train.run.load_data"),
        (["bench", "--rounds", 0, "--provider", "eager", "--device", "cpu", "--out", folder / "b.json"],
         "thresholdnet.bench.run"),
    )  # fmt: skip


def test_folders_of_outputs_are_made(trained, tmp_path):
    Image.new("RGB", (40, 50)).save(tmp_path / "in.png")
    folder = tmp_path / "new" / "folder"
    best = trained[0] / "checkpoints" / "best.ckpt"
    for arguments, _ in _writers(best, tmp_path / "in.png", folder):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        run(*arguments)
        assert len(list(folder.iterdir())) == 1, arguments


def test_outputs_without_a_place_are_refused_before_any_work(trained, tmp_path):
    Image.new("RGB", (40, 50)).save(tmp_path / "in.png")
    (tmp_path / "file").touch()
    best = trained[0] / "checkpoints" / "best.ckpt"
    for arguments, work in _writers(best, tmp_path / "in.png", tmp_path / "file"):
        with mock.patch(work, side_effect=AssertionError("too late")):
            _, stderr = run(*arguments, code=2)
        assert f"{tmp_path / 'file'} is a file" in stderr and stderr.count("\n") == 1, stderr
    with mock.patch("thresholdnet.inference.evaluate_data", side_effect=AssertionError("too late")):
        _, stderr = run("eval", best, "--figure", tmp_path, code=2)
        assert f"figure must be a file, got the folder {tmp_path}" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "file"}


def test_typer_usage_errors_have_code_2_too():
    assert "--epochs" in run("train", "--epochs", "many", code=2)[1]


def test_as_a_module_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-m", "thresholdnet", "links", "--no-draw"], capture_output=True, text=True)
    assert done.returncode == 0 and "0-1-2-3-4-5-6-7" in done.stdout
