"""Training: exact resume, clean stops, several processes, clear errors."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from thresholdnet import data as data_module
from thresholdnet.checkpoint import INFO_KEY, load_checkpoint, read_checkpoint
from thresholdnet.train import TrainConfig, classifier, make_recipe, train
from thresholdnet.train.callbacks import StopSignal
from thresholdnet.train.run import advice_for

FIGURES = ("epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
TINY: dict[str, Any] = {
    "model": "thresholdnet_ab",
    "model_args": {"width_mult": 0.25},
    "data": "digits",
    "limit": 90,
    "epochs": 3,
    "batch_size": 20,
    "save_every": 2,
    "quiet": True,
    "accelerator": "cpu",
}
# A run in a process of its own; argv: config as JSON, the step to stop at, and how.
SCRIPT = """
import json, os, signal, sys
from thresholdnet.train import classifier
from thresholdnet.train import TrainConfig, train
config, step, name = TrainConfig(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
original = classifier.Classifier.on_train_batch_start
def hook(self, batch, batch_idx):
    original(self, batch, batch_idx)
    if self.global_step == step:
        os.kill(os.getpid(), getattr(signal, name))
classifier.Classifier.on_train_batch_start = hook
result = train(config)
print("RESULT", json.dumps({key: result[key] for key in ("interrupted", "signal", "epochs")}))
"""


def tiny(out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**(TINY | changes), out_dir=str(out))


def figures_of(result: dict[str, Any]) -> list[list[float]]:
    return [[row[key] for key in FIGURES] for row in result["history"]]


def run_script(out: Path, step: int, name: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    config = json.dumps(TINY | changes | {"out_dir": str(out)})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, config, str(step), name],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small gain nothing from threads, which wait on each other badly when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, train(tiny(out, ema=0.9))


def same_weights(first: Path, second: Path) -> bool:
    a, b = (read_checkpoint(out / "checkpoints" / "last.ckpt") for out in (first, second))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    moments = [c["optimizer_states"][0]["state"] for c in (a, b)]
    return all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items()) and all(
        torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0]
    )


def test_a_run_leaves_everything(unbroken: tuple[Path, dict[str, Any]]) -> None:
    out, result = unbroken
    assert not result["interrupted"] and result["epochs"] == 3
    assert result["best_accuracy"] == max(row["test_accuracy"] for row in result["history"])
    assert result["last_accuracy"] == result["history"][-1]["test_accuracy"]
    assert json.loads((out / "result.json").read_text())["parameters"] == result["parameters"]
    for name in ("config.json", "curve.png", "confusion.png", "predictions.png", "checkpoints/best.ckpt"):
        assert (out / name).stat().st_size > 0
    lines = (out / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("epoch,step,lr,train_loss")
    assert list((out / "tensorboard").glob("events*"))
    assert not list((out / "checkpoints").glob(".*")), "no temporary files are left"
    loaded = load_checkpoint(out / "checkpoints" / "best.ckpt")
    assert loaded.info["ema"] and loaded.classes == tuple("0123456789")
    assert json.loads((out / "config.json").read_text())["recipe"]["epochs"] == 3


@pytest.mark.parametrize(("seconds", "saved"), [(0.0, [1, 2, 3, 4]), (1e6, [1, 4])])
def test_epochs_close_to_the_last_save_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, saved: list[int]
) -> None:
    epochs: list[int] = []
    original, finish = classifier.Classifier.on_save_checkpoint, classifier.Classifier.finish_epoch

    def note(self: classifier.Classifier, checkpoint: dict[str, Any]) -> None:
        original(self, checkpoint)
        epochs.append(len(self.history))

    def still(self: classifier.Classifier) -> dict[str, float]:
        row = finish(self)
        self.best = self.history[0]  # no epoch is better than the first
        return row

    monkeypatch.setattr(classifier.Classifier, "on_save_checkpoint", note)
    monkeypatch.setattr(classifier.Classifier, "finish_epoch", still)
    train(tiny(tmp_path, epochs=4, save_every=0, save_seconds=seconds))
    assert epochs == saved
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")[INFO_KEY]["epoch"] == 4
    with monkeypatch.context() as patch:  # a stop saves whatever the time
        patch.setattr(StopSignal, "signum", property(lambda self: signal.SIGTERM if epochs[-1] == 1 else 0))
        epochs.clear()
        epochs.append(0)
        stopped = train(tiny(tmp_path / "stopped", epochs=4, save_every=0, save_seconds=seconds))
    assert stopped["interrupted"] and epochs[-1] == stopped["epochs"]


# 90 images make 5 batches: 7 lies in the middle of epoch 2, after a save at step 6; 5 is the first step of it;
# 1 comes before any save, so that the second call starts afresh.
@pytest.mark.parametrize("step", [1, 5, 7])
def test_resume_after_sigkill_is_bit_equal(tmp_path: Path, unbroken: tuple[Path, dict[str, Any]], step: int) -> None:
    killed = run_script(tmp_path / "run", step, "SIGKILL", ema=0.9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (step > 1)
    result = train(tiny(tmp_path / "run", ema=0.9, resume=True))
    assert figures_of(result) == figures_of(unbroken[1])
    assert same_weights(tmp_path / "run", unbroken[0])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]


def test_resume_repeats_dropout_and_adam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws from the global stream: it must not depend on what ran before in the process."""
    from thresholdnet.train import run as run_module

    def dropout_net(name: str, num_classes: int = 10, device: str | None = None, **_: Any) -> nn.Module:
        head = nn.Linear(3 * 64, num_classes, device=device)
        return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.5), head)

    monkeypatch.setattr(run_module, "create_model", dropout_net)
    monkeypatch.setattr("thresholdnet.checkpoint.create_model", dropout_net)
    whole = train(tiny(tmp_path / "a", recipe="released"))

    class Cut(Exception):
        pass

    original = classifier.Classifier.on_train_batch_start

    def cut(self: classifier.Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == 8:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Classifier, "on_train_batch_start", cut)
        with pytest.raises(Cut):
            train(tiny(tmp_path / "b", recipe="released"))
    torch.rand(17)
    resumed = train(tiny(tmp_path / "b", recipe="released", resume=True))
    assert figures_of(resumed) == figures_of(whole)


@pytest.mark.parametrize("name,step", [("SIGINT", 6), ("SIGTERM", 9)])
def test_stop_signals_leave_a_usable_checkpoint(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any]], name: str, step: int
) -> None:
    stopped = run_script(tmp_path / "run", step, name, ema=0.9, save_every=0)
    assert stopped.returncode == 0, stopped.stderr
    result = json.loads(stopped.stdout.split("RESULT", 1)[1])
    # Step 6 stops inside epoch 2; step 9 is the last batch of it, whose epoch is closed first.
    assert result == {"interrupted": True, "signal": getattr(signal, name), "epochs": 1 if step == 6 else 2}
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").info["step"] == step + 1
    resumed = train(tiny(tmp_path / "run", ema=0.9, resume=True, save_every=0))
    assert figures_of(resumed) == figures_of(unbroken[1])


def test_minutes_stop_the_run_as_a_signal_would(tmp_path: Path, unbroken: tuple[Path, dict[str, Any]]) -> None:
    """No time at all is one batch a call; what then goes on without a limit is the unbroken run."""
    for step in (1, 2):
        result = train(tiny(tmp_path / "run", ema=0.9, resume=True, save_every=0), minutes=0)
        assert (result["interrupted"], result["signal"], result["epochs"]) == (True, signal.SIGTERM, 0)
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").info["step"] == step
    result = train(tiny(tmp_path / "run", ema=0.9, resume=True, save_every=0), minutes=10)
    assert not result["interrupted"] and figures_of(result) == figures_of(unbroken[1])
    assert same_weights(tmp_path / "run", unbroken[0])
    for minutes, error in ((-1, ValueError), ("8", TypeError)):
        with pytest.raises(error, match="minutes must be"):
            train(tiny(tmp_path / "no"), minutes=minutes)


def test_second_interrupt_ends_at_once() -> None:
    stop = StopSignal()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore()


def test_resume_of_a_finished_run_changes_nothing(unbroken: tuple[Path, dict[str, Any]]) -> None:
    out, result = unbroken
    before = (out / "checkpoints" / "last.ckpt").read_bytes()
    again = train(tiny(out, ema=0.9, resume=True))
    assert figures_of(again) == figures_of(result)
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == before


def test_mixing_runs_is_refused(unbroken: tuple[Path, dict[str, Any]]) -> None:
    out, _ = unbroken
    with pytest.raises(ValueError, match=r"already holds a run; go on with it by --resume.*--out"):
        train(tiny(out, ema=0.9))
    for changes, words in (
        ({"seed": 1}, "another seed: the run in .* has 0, given 1"),
        ({"model": "thresholdnet_v1", "model_args": {}}, "another model:"),
        ({"epochs": 4}, "another recipe epochs: the run has 3, given 4"),
        ({"ema": None}, "another ema"),
        ({"limit": 50}, "another limit"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume with {words}"):
            train(tiny(out, **({"ema": 0.9, "resume": True} | changes)))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="precision '8' is unknown"):
        TrainConfig(precision="8")
    with pytest.raises(ValueError, match="ema must be below 1"):
        TrainConfig(ema=1.0)
    with pytest.raises(TypeError, match="devices must be an integer"):
        TrainConfig(devices="two")
    with pytest.raises(ValueError, match="sync_batchnorm needs GPUs"):
        train(TrainConfig(accelerator="cpu", sync_batchnorm=True))
    with pytest.raises(ValueError, match="precision 16 needs a GPU"):
        train(TrainConfig(accelerator="cpu", precision="16"))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 100"):
        train(TrainConfig(accelerator="cpu", devices=3))


def test_bad_model_data_and_size_come_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="'thresholdnet_v3' is unknown; did you mean"):
        train(tiny(out, model="thresholdnet_v3", model_args={}))
    with pytest.raises(ValueError, match="did you mean digits"):
        train(tiny(out, data="digit"))
    with pytest.raises(ValueError, match="16"):
        train(tiny(out, image_size=16))
    assert not out.exists()


def test_no_room_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match=r"too little room at .*: three checkpoints need \d+ MiB, 1 MiB are free"):
        train(tiny(tmp_path / "run"))


def test_full_disk_in_the_middle_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = 0
    original = classifier.save_atomic

    def save(content: Any, path: Any) -> None:
        nonlocal saves
        saves += 1
        if saves < 3:
            original(content, path)
            return
        monkeypatch.setattr(os, "fsync", full)
        original(content, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(classifier, "save_atomic", save)
    with pytest.raises(OSError, match=r"cannot write .*best\.ckpt \(No space left on device\)"):
        train(tiny(tmp_path / "run"))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").info["step"] == 4
    assert train(tiny(tmp_path / "run", resume=True))["epochs"] == 3


def test_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = classifier.Classifier.on_train_batch_start

    def poison(self: classifier.Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == 6:
            batch[0].fill_(math.nan)

    monkeypatch.setattr(classifier.Classifier, "on_train_batch_start", poison)
    with pytest.raises(ValueError, match=r"no finite number at epoch 2, step 6 \(learning rate .*\)"):
        train(tiny(tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").info["step"] <= 6


def test_who_waits_for_python_is_told() -> None:
    gpu, fused = torch.device("cuda"), TrainConfig(fused=True)
    assert "--cuda-graph" in (advice_for(fused, gpu, 1) or "")
    plain = replace(fused, fused=False)
    assert advice_for(plain, gpu, 1) is None and advice_for(fused, torch.device("cpu"), 1) is None
    assert advice_for(replace(fused, cuda_graph=True), gpu, 1) is None and advice_for(fused, gpu, 2) is None


def test_weight_decay_spares_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, plain = classifier.split_decay(model)
    assert [p.ndim for p in decayed] == [4, 2] and len(plain) == 4


def test_recipes_choose_their_optimizers() -> None:
    """Adam, whose decay is none, and SGD with Nesterov momentum and decay of weights alone."""

    def optimizer(name: str) -> torch.optim.Optimizer:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        return classifier.Classifier(model, make_recipe(name), 500, {}).configure_optimizers()

    released, modern = optimizer("released"), optimizer("modern")
    assert type(released) is torch.optim.Adam and type(modern) is torch.optim.SGD
    assert [group["lr"] for group in released.param_groups] == [1e-3] * 2
    assert released.defaults["betas"] == (0.9, 0.999) and released.defaults["eps"] == 1e-8
    assert modern.defaults["nesterov"] and modern.defaults["momentum"] == 0.9
    decays = [[group["weight_decay"] for group in each.param_groups] for each in (released, modern)]
    assert decays == [[0, 0], [make_recipe("modern").weight_decay, 0]]


def test_labels_are_smoothed_in_training_alone() -> None:
    model, images, labels = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([0, 3, 1, 1, 2])
    module = classifier.Classifier(model, make_recipe("modern", label_smoothing=0.3), 1, {})
    smoothed, plain = (nn.functional.cross_entropy(model(images), labels, label_smoothing=s) for s in (0.3, 0.0))
    torch.testing.assert_close(module.loss_of(images, labels), smoothed)
    module.judge(images, labels)
    assert module.test_sums[0].item() == pytest.approx(5 * plain.item())


def test_average_follows_the_model() -> None:
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    classifier.update_average(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5] and int(average.num_batches_tracked) == 7


def test_bf16_and_released_recipe_train(tmp_path: Path) -> None:
    result = train(tiny(tmp_path / "run", precision="bf16", recipe="released", epochs=1, quiet=False))
    assert result["epochs"] == 1 and math.isfinite(result["last_loss"])
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").mean == (0.0, 0.0, 0.0)


def test_image_folder_on_disk_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_data import write_folders

    monkeypatch.setattr(
        data_module.load_data, "__kwdefaults__", data_module.load_data.__kwdefaults__ | {"in_memory_bytes": 0}
    )
    root = write_folders(tmp_path / "images", each=6)
    config = tiny(tmp_path / "run", data="imagefolder", root=str(root), image_size=32, batch_size=6, limit=None)
    result = train(replace(config, epochs=1, workers=1))
    assert result["epochs"] == 1 and (tmp_path / "run" / "confusion.png").exists()


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    """Two gloo processes share each batch, count every test image once, and agree on the result."""
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    config = TINY | {"out_dir": str(tmp_path / "run"), "limit": 61, "epochs": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, json.dumps(config), "-1", "SIGINT"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["processes"] == 2 and result["epochs"] == 2
    for row in result["history"]:
        # Exactly 61 test images counted: accuracy is a whole number of them.
        assert (row["test_accuracy"] * 61) == pytest.approx(round(row["test_accuracy"] * 61), abs=1e-9)
    assert result["history"][-1]["step"] == 2 * math.ceil(61 / 20)


def test_fused_and_plain_training_keep_the_same_curve(tmp_path: Path) -> None:
    """30 steps on the digits from the same start in fp32: losses agree to 1e-4, each checkpoint goes on as the other.

    A gentle net and rate: with maps of 1x1 pixels, or Adam, rounding grows so fast that plain torch leaves its own
    curve when only the memory format changes (tests/test_engine.py holds 30 steps in fp64 on such a net).
    """
    gentle = {"layers": [8], "growth_rates": [8], "transitions": [24], "threshold": 4}
    common = TINY | {"model": "thresholdnet_bc", "model_args": gentle, "limit": 1000, "batch_size": 100, "lr": 0.001}
    common |= {"save_every": 0, "recipe_args": {"schedule": "constant"}}  # constant: a resumed run may add epochs
    plain = train(TrainConfig(**common, out_dir=tmp_path / "plain"))
    fused = train(TrainConfig(**common, fused=True, out_dir=tmp_path / "fused"))
    assert plain["history"][-1]["step"] == fused["history"][-1]["step"] == 30
    assert fused["fused"] and not plain["fused"]
    for a, b in zip(plain["history"], fused["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    again = TrainConfig(**(common | {"epochs": 4}), fused=True, resume=True, out_dir=tmp_path / "plain")
    other = TrainConfig(**(common | {"epochs": 4}), resume=True, out_dir=tmp_path / "fused")
    assert train(again)["last_train_loss"] == pytest.approx(train(other)["last_train_loss"], rel=1e-4)
