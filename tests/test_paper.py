"""bench/paper: slices add up to the unbroken run; the report's columns against counts of their own; wrong arguments."""

import contextlib
import importlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from saved import saved_tensors, storage_bytes
from test_data import write_folders

import thresholdnet as tn
from thresholdnet import figures
from thresholdnet.checkpoint import read_checkpoint
from thresholdnet.train.classifier import Classifier

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "paper"
SWEEP = (
    "sweep",
    "--data",
    "digits",
    "--model-arg",
    "width_mult=0.25",
    "--limit",
    200,
    "--epochs",
    2,
    "--save-every",
    1,
)
TIMES = ("seconds", "images_per_second")


def run(*arguments, code=0):
    """Run the script inside this process; returns (stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["paper", *map(str, arguments)]),
        mock.patch.object(sys, "path", [*sys.path]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as exit_,
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (exit_.value.code or 0) == code, (exit_.value.code, stdout.getvalue(), stderr.getvalue())
    return stdout.getvalue(), stderr.getvalue()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A whole small sweep: its folder and what the command printed as JSON."""
    out = tmp_path_factory.mktemp("sweep")
    stdout, _ = run(*SWEEP, "--threshold", 8, "--threshold", 0, "--out", out, "--seed", 0, "--only", "ab|T08", "--json")
    return out, json.loads(stdout)


@pytest.fixture(scope="module")
def reported(swept):
    """Its report."""
    out, _ = swept
    return json.loads(run("report", "--out", out, "--json")[0])


def _curve(folder):
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    return [[v for name, v in zip(names, row.split(","), strict=True) if name not in TIMES] for row in rows]


def _same(first, second):
    """Whether two runs ended alike: every figure but the times, and every weight."""
    a, b = (read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (first, second))
    return _curve(first) == _curve(second) and all(torch.equal(a[key], b[key]) for key in a | b)


def test_slices_and_a_crash_are_the_unbroken_run(swept, tmp_path):
    whole, listed = swept
    assert [(row["name"], row["state"], row["epochs"]) for row in listed["runs"]] == [
        (f"sweep/{name}/seed0", "done", 2) for name in ("ab-T00", "ab-T08", "bc-T08")
    ]
    name, options = "sweep/ab-T08/seed0", (*SWEEP, "--threshold", 8, "--only", "ab", "--out", tmp_path)
    text, _ = run(*options, "--minutes", 0)
    assert "0 of 2" in text and "begun" in text and "The same command goes on." in text
    assert json.loads(run(*options, "--minutes", 0, "--json")[0])["runs"][0]["epochs"] == 1  # two batches an epoch

    original = Classifier.on_train_batch_start

    def crash(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.global_step == 3:
            raise RuntimeError("the power is gone")

    with mock.patch.object(Classifier, "on_train_batch_start", crash):
        assert "the power is gone" in run(*options, code=2)[1]
    assert read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert "1 of 2 epochs done" in run(*options)[0]
    assert _same(tmp_path / name, whole / name)
    before = (tmp_path / name / "checkpoints" / "last.ckpt").read_bytes()
    assert "epochs done" not in run(*options)[0]  # nothing is left to train
    assert (tmp_path / name / "checkpoints" / "last.ckpt").read_bytes() == before


def _counted_by_hand(bc, threshold):
    """Links and parameters of ThresholdNet-ab or -bc at a quarter of the width, every layer k wide."""
    links, parameters = 0, 0

    def convolution(inputs, outputs, side):
        return inputs * outputs * side * side + 2 * outputs

    parameters += convolution(3, 8, 3) + convolution(8, 16, 3)
    width = 16
    stages = zip((6, 8, 12, 16, 4), (4, 4, 4, 10, 40), (32, 48, 72, 120, 240), strict=True)
    for layers, k, transition in stages:
        n = max(1, threshold // 4)
        for i in range(1, layers + 1):
            if i > threshold:
                sources = {i - 2**e for e in range(6) if 2**e <= i} if i % 2 == 0 else {i - 1}
            elif bc:
                sources = {node for node in range(i) if node <= n or node >= i - n}
            else:
                sources = set(range(i))
            links += len(sources)
            parameters += convolution(sum(width if node == 0 else k for node in sources), k, 3)
        outputs = [i for i in range(1, layers + 1) if i <= threshold or i % 2 or i == layers]
        parameters += convolution(len(outputs) * k, transition, 1)
        width = transition
    return links, parameters + 240 * 10 + 10


def _really_kept(model, x):
    """Bytes that autograd saves in a real forward pass, but for parameters, buffers and the images."""
    own = {t.untyped_storage().data_ptr() for t in (*model.buffers(), x)}
    return storage_bytes(t for t in saved_tensors(model, x) if t.untyped_storage().data_ptr() not in own)


def test_sweep_report(swept, reported):
    out, _ = swept
    part = reported["sweep"]
    assert [(row["pattern"], row["threshold"], row["seeds"]) for row in part["rows"]] == [
        ("ab", 0, 1), ("ab", 8, 1), ("bc", 8, 1),
    ]  # fmt: skip
    x = torch.rand(100, 3, 32, 32).to(memory_format=torch.channels_last)
    for row in part["rows"]:
        bc, name = row["pattern"] == "bc", f"{row['pattern']}-T{row['threshold']:02}"
        assert (row["links"], row["parameters"]) == _counted_by_hand(bc, row["threshold"])
        for fused, key in ((False, "kept_plain"), (True, "kept_fused")):
            model = tn.create_model(
                f"thresholdnet_{row['pattern']}", num_classes=10, threshold=row["threshold"], width_mult=0.25,
                width_rule="constant", fused=fused, backend="native",
            ).to(memory_format=torch.channels_last)  # fmt: skip
            assert row[key] == pytest.approx(_really_kept(model, x), rel=0.01), (name, key)
        result = json.loads((out / "sweep" / name / "seed0" / "result.json").read_text())
        assert row["error"] == [pytest.approx(100 * (1 - result["best_accuracy"]))]
        assert row["last_error"] == [pytest.approx(100 * (1 - result["last_accuracy"]))]
        speeds = [epoch["images_per_second"] for epoch in result["history"]]
        assert row["step_ms"] == pytest.approx(50_000 * sum(1 / speed for speed in speeds))  # the middle of two
    text = (out / "report.md").read_text()
    assert "| ab | 8 | 1 | 2 |" in text and "![" in text
    differs = ("digits at 32x32 stands in for cifar10", "Limit: 200 images", "Epochs: 2, the released recipe has 200",
               "Precision: 32", "fused (auto)", f"torch {torch.__version__}")  # fmt: skip
    for sentence in differs:
        assert sentence in text
    assert json.loads((out / "report.json").read_text())["sweep"]["rows"] == part["rows"]
    assert min(Image.open(out / "sweep.png").size) > 300


def test_runs_that_do_not_compare_are_named(swept, monkeypatch, tmp_path):
    out, _ = swept
    copied = shutil.copytree(out, tmp_path / "runs")
    differs = json.loads(run("report", "--out", copied, "--json")[0])["sweep"]["differs"]
    assert not [text for text in differs if "do not compare" in text or "does not compare" in text or "graphs" in text]
    for folder, change in (("ab-T00", {"cuda_graph": True, "precision": "bf16"}), ("ab-T08", {"backend": "native"})):
        file = copied / "sweep" / folder / "seed0" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    file = copied / "sweep" / "bc-T08" / "seed0" / "experiment.json"
    about = json.loads(file.read_text())
    about["machines"].append(about["machines"][0] | {"commit": "another"})
    file.write_text(json.dumps(about))
    differs = json.loads(run("report", "--out", copied, "--json")[0])["sweep"]["differs"]
    for sentence in (
        "Runs differ in precision, backend, cuda_graph: what they have in one row or column does not compare.",
        "Runs were made on several machines or by several commits: their times do not compare.",
        "Steps: CUDA graphs, optimizer included, which PyTorch 1.1.0 had not.",
    ):
        assert sentence in differs


def test_tables_beside_the_paper(tmp_path):
    common = ("--epochs", 1, "--limit", 8, "--out", tmp_path / "runs", "--no-progress")
    run("tables", "VI", "--data", "digits", "--only", "v1|resnet50-small/seed0", "--seed", 0, "--seed", 1, *common)
    folders = write_folders(tmp_path / "pictures", each=6)
    run("tables", "VII", "--stand-in", folders, "--only", "VII/resnet18/", "--plain", *common)
    stdout, _ = run("report", "--out", tmp_path / "runs", "--to", tmp_path / "report")
    assert "173" in stdout and "14,371,858" in stdout  # links and parameters of v1 with 10 classes
    parts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(parts) == ["VI", "VII"]
    rows = {row["network"]: row for row in parts["VI"]["rows"]}
    v1, resnet, missing = rows["ThresholdNet_v1"], rows["ResNet50, 3x3 stem"], rows["HarDNet68"]
    assert (v1["seeds"], v1["paper_error"], v1["paper_step_ms"], v1["paper_epoch_s"]) == (2, 13.66, 47, 24.21)
    assert v1["error"] == pytest.approx(sum(v1["errors"]) / 2) and len(v1["errors"]) == 2
    assert v1["error_ratio"] == pytest.approx(v1["error"] / 13.66, abs=1e-3) and v1["of_base"] == 1
    assert resnet["of_base"] == pytest.approx(resnet["step_ms"] / v1["step_ms"], rel=0.01)
    assert (resnet["links"], resnet["kept_fused"], resnet["paper_of_base"]) == (None, None, round(102 / 47, 3))
    assert (missing["seeds"], missing["error"], missing["error_ratio"]) == (0, None, None)
    assert "stands in for stl10" in " ".join(parts["VII"]["differs"]) and "plain" in " ".join(parts["VII"]["differs"])
    assert parts["VII"]["runs"][0]["image_size"] == 96 and parts["VII"]["runs"][0]["classes"] == 2
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "VI.png", "VII.png", "report.json", "report.md",
    ]  # fmt: skip


def test_dry_run_lists_and_trains_nothing(tmp_path):
    made = json.loads(run("tables", "--root", tmp_path, "--stand-in", tmp_path, "--dry-run", "--json")[0])
    names = [row["name"] for row in made["runs"]]
    assert made["done"] == 0 and len(set(names)) == 22 and "VII/resnet18-small/seed0" in names
    (tmp_path / "stl10_binary").mkdir()
    rows = json.loads(run("tables", "VII", "--root", tmp_path, "--dry-run", "--json")[0])["runs"]
    assert {row["data"] for row in rows} == {"stl10"} and {row["of"] for row in rows} == {200}
    text, _ = run("sweep", "--dry-run", "--out", tmp_path / "runs")
    assert text.count("sweep/") == 10 and "Nothing was trained." in text and not (tmp_path / "runs").exists()


WRONG = [
    (["tables", "VIII"], "table 'VIII' is unknown"),
    (["tables", "VII"], "Table VII needs stl10_binary/ below --root, or an image folder with --stand-in"),
    (["tables", "VI"], "cifar10 needs a root folder"),
    (["sweep", "--pattern", "cd"], "pattern 'cd' is unknown"),
    (["sweep", "--threshold", "-4"], "threshold must be at least 0, got -4"),
    (["sweep", "--only", "T99"], "--only must match a run (sweep/ab-T00/seed0, "),
    (["sweep", "--only", "("], "--only must be a regular expression"),
    (["sweep", "--data", "digit"], "did you mean digits"),
    (["sweep", "--data", "digits", "--minutes", "-1"], "--minutes must be at least 0, got -1"),
    (["sweep", "--data", "digits", "--device", "abacus"], "accelerator 'abacus' is unknown"),
    (["sweep", "--data", "digits", "--backend", "natif"], "did you mean native"),
    (["sweep", "--model-arg", "width"], "--model-arg must be KEY=VALUE"),
    (
        ["report", "--out", "nothing", "--to", f"{__file__}/report"],
        f"--to must lead to a folder, got {__file__}/report",
    ),
    (["report", "--out", "nothing"], "--out must hold at least one run with a finished epoch, got nothing"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[" ".join(a)[:40] for a, _ in WRONG])
def test_wrong_arguments_get_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, stderr = run(*arguments, code=2)
    assert sentence in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_other_settings_are_refused_before_anything_is_trained(swept):
    out, _ = swept
    _, stderr = run(*SWEEP[:-4], "--limit", 100, "--out", out, code=2)
    assert "cannot resume with another limit" in stderr and stderr.count("\n") == 1
    assert not (out / "sweep" / "ab-T04").exists()


def test_help_teaches():
    assert all(word in run("--help")[0] for word in ("tables", "sweep", "report", "digits"))
    text, _ = run("sweep", "--help")
    assert "--minutes" in text and "width_rule=harmonic" in text


def test_figures_say_which_epochs_errors_they_show(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    row = {"pattern": "ab", "threshold": 0, "error": [9.0], "kept_plain": 2, "kept_fused": 1, "step_ms": 3.0,
           "parameters": 4}  # fmt: skip
    figures.trade_off([row], tmp_path / "a.png")
    row = {"network": "v1", "paper_error": 9.0, "error": 9.0, "paper_of_base": 1.0, "of_base": 1.0}
    figures.beside_paper([row], "v1", tmp_path / "b.png")
    assert drawn[0].axes[0].get_ylabel() == drawn[1].axes[0].get_xlabel() == "test error of the best epoch, %"


def test_figures_refuse_nothing(tmp_path):
    for draw, arguments in ((figures.trade_off, ()), (figures.beside_paper, ("thresholdnet_v1",))):
        with pytest.raises(ValueError, match="needs at least one row, got none"):
            draw([], *arguments, tmp_path / "a.png")


def test_how_often_a_gpu_saves(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT))
    experiments = importlib.import_module("experiments")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def saves(**options):
        settings = experiments.Settings(Path("runs"), **options)
        config = experiments.with_seeds(experiments.of_table("VI"), settings)[0].config
        return config.save_every, config.save_seconds, config.cuda_graph

    assert saves(cuda_graph=True) == (0, 60, True)
    assert saves(device="cpu") == (100, 0, False)
    assert saves(save_every=7) == (7, 0, False)
