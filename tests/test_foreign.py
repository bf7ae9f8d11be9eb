"""`thresholdnet convert`: what it says of a model of one's own, its rows and file, and one sentence when it cannot."""

import json
import sys
from pathlib import Path

import pytest
import torch
from foreign import HarDBlock, InOneRow, dense_row
from test_cli import run
from torch import nn

import thresholdnet.bench.foreign as compared
from thresholdnet.backends import csrc
from thresholdnet.bench import Settings

HERE = Path(__file__).parent
WINOGRAD = ["converted_winograd"] if csrc.reason() is None else []
SMALL = ("--path", HERE, "--shape", 4, 12, 8, 8, "--model-arg", "read=12", "--model-arg", "k=6")


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """`--path` is for one command."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_it_says_what_is_fused():
    stdout, _ = run("convert", "torchvision.models:densenet121", "--dry-run")
    assert stdout.count("fused features.denseblock") == 4 and "transitions" in stdout
    said = json.loads(run("convert", "foreign:HarDNet68", "--path", HERE, "--dry-run", "--json")[0])["report"]
    assert [line.partition(":")[0] for line in said] == [f"fused base.{i}" for i in (3, 6, 8, 11, 14)]
    stdout, _ = run(
        "convert", "torch.nn:Linear", "--model-arg", "in_features=2", "--model-arg", "out_features=2", "--dry-run"
    )
    assert stdout.startswith("nothing to fuse")


def test_steps_are_measured_beside_the_models_own(tmp_path):
    file = tmp_path / "found.json"
    stdout, _ = run("convert", "foreign:NewFirst", *SMALL, "--rounds", 2, "--out", file)
    assert stdout.startswith("fused the model: dense block, 1 layers, 1 links\n") and "of own" in stdout
    found = json.loads(file.read_text())
    assert found["model"] == "foreign:NewFirst" and found["blocks"] == 1 and "--rounds 2" in found["machine"]["command"]
    rows = {(row["mode"], row["provider"]): row for row in found["rows"]}
    own, both = "eager_channels_last", ("eager_channels_last", "converted", *WINOGRAD)
    assert set(rows) == {("train", "converted_recompute"), ("infer", "converted_prepacked"),
                         *((mode, provider) for mode in ("train", "infer") for provider in both)}  # fmt: skip
    for row in rows.values():
        assert len(row["ms"]) == 2 and row["check"]["output"]["error"] <= row["check"]["output"]["bound"]
        assert ("eager_channels_last" in row["ratios"]) == (row["provider"] != own) and row["peak_bytes"] > 0
    kept = [rows["train", name]["saved_bytes"] for name in (own, "converted", "converted_recompute")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_bytes_alone_and_nothing_to_fuse():
    said = json.loads(run("convert", "foreign:PlainLayer", *SMALL, "--rounds", 0, "--json")[0])
    assert {row["provider"] for row in said["rows"]} == {
        "eager_channels_last", "converted", "converted_prepacked", *WINOGRAD
    }  # fmt: skip
    assert all(row["ms_median"] is None and row["ratios"] == {} for row in said["rows"])
    said = json.loads(run("convert", "torchvision.models:resnet18", "--shape", 2, 3, 32, 32, "--json")[0])
    assert said["blocks"] == 0 and said["rows"] == []


def test_volumes_have_a_depth():
    said = json.loads(
        run("convert", "test_volumes:DenseNet", "--path", HERE, "--shape", 2, 1, 16, 12, "--depth", 20, "--rounds", 1,
            "--json")[0]
    )  # fmt: skip
    assert said["blocks"] == 2 and {row["provider"] for row in said["rows"]} == {
        "eager_channels_last", "converted", "converted_recompute", "converted_prepacked",
    }  # fmt: skip
    assert all(row["shape"] == [2, 1, 20, 16, 12] and "reason" not in row for row in said["rows"])


def test_signals_are_of_one_row():
    model = ["convert", "test_volumes:DenseNet", "--model-arg", "dims=1", "--path", HERE, "--signals", "--shape", 2, 1]
    said = json.loads(run(*model, 1, 90, "--rounds", 1, "--json")[0])
    assert said["blocks"] == 2 and {row["provider"] for row in said["rows"]} == {
        "eager", "converted", "converted_recompute", "converted_prepacked",
    }  # fmt: skip
    assert all(row["shape"] == [2, 1, 90] and "reason" not in row for row in said["rows"])
    _, error = run(*model, 2, 90, code=2)
    assert "--signals needs --shape N C 1 LENGTH and no --depth, got --shape 2 1 2 90" in error


class Several(nn.Module):
    """Two maps in a dict, beside a number, from a block and a dropout."""

    def __init__(self):
        super().__init__()
        self.block, self.wired, self.drop = dense_row(InOneRow, 12, 6, 3), HarDBlock(30, 6, 1.6, 4), nn.Dropout(0.5)

    def forward(self, x):
        y = self.block(x)
        return {"fine": y, "coarse": self.drop(self.wired(y)), "count": 2}


def test_a_model_with_several_outputs():
    model = Several()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    found = compared.compare(
        model, (2, 12, 8, 8), "fp64", Settings(rounds=1, warmup=0), lambda *said: told.append(said)
    )
    assert found["blocks"] == 2 and all("reason" not in row and row["ms_median"] > 0 for row in found["rows"])
    assert [share for _, share in told] == sorted(share for _, share in told) and told[-1][1] <= 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_step_that_is_wrong_has_no_time(monkeypatch):
    def wrong(model):
        with torch.no_grad():
            next(model.parameters()).add_(1)

    monkeypatch.setattr(compared, "prepack", wrong)
    found = compared.compare(Several(), (2, 12, 8, 8), "fp64", Settings(rounds=1, warmup=0))
    (row,) = (row for row in found["rows"] if row["provider"] == "converted_prepacked")
    assert row["reason"].startswith("wrong: output off by") and row["ms_median"] is None


def test_the_readme_says_what_the_files_say():
    root = HERE.parent
    if not (root / "bench").is_dir():
        pytest.skip("run outside a checkout")
    files = sorted((root / "bench" / "results").glob("*/convert/*.json"))
    found = {
        file.stem.split("-", 3)[3]: {
            (row["mode"], row["provider"]): row for row in json.loads(file.read_text())["rows"]
        }
        for file in files
    }

    def own(name, mode):
        return next(row for (its, _), row in found[name].items() if its == mode and not row["ratios"])

    def speeds(names, mode, provider="converted"):
        return [found[name][mode, provider]["ratios"][own(name, mode)["provider"]]["median"] for name in names]

    def shares(names, provider="converted", mode="train", of="saved_bytes"):
        return [found[name][mode, provider][of] / own(name, mode)[of] for name in names]

    residual, volumes = ("torchsr-rdn", "spandrel-esrgan"), ("monai-densenet121-volumes",)
    single = ("monai-densenet121-one-volume",)
    signals, half, alone, short = (
        (f"monai-densenet121-{name}",) for name in ("signals", "signals-bf16", "one-signal", "short-signal")
    )
    dilated = ("densenet121-stride-8", "ahdrnet-drdb")
    others = (*residual, *volumes, *single, *dilated, *signals, *half, *alone, *short)
    dense = [name for name in found if name not in others]
    again, packed = "converted_recompute", "converted_prepacked"
    said = {
        "train {:.2f} to {:.2f} times": sorted(speeds(dense, "train"))[:: len(dense) - 1],
        "keep {:.2f} to {:.2f} of": sorted(shares(dense))[:: len(dense) - 1],
        "answer {:.2f} to {:.2f} times": sorted(speeds(dense, "infer"))[:: len(dense) - 1],
        "keep {:.2f} and {:.2f} of theirs": shares(residual),
        "train at {:.2f} of their speed": [min(speeds(residual, "train"))],
        "at {:.2f} and {:.2f} times it": speeds(residual, "train", "converted_winograd"),
        "train {:.2f} and {:.2f} times as fast and keep {:.2f} and {:.2f}": [
            *speeds(dilated, "train"), *shares(dilated)
        ],
        'keeps {:.2f} of its bytes ({:.2f} with `recompute="bottleneck"`)': shares(volumes) + shares(volumes, again),
        "needs {:.2f} ({:.2f}) of its peak": [
            *shares(volumes, of="peak_bytes"), *shares(volumes, again, of="peak_bytes")
        ],
        "trains {:.2f} ({:.2f}) times as fast": speeds(volumes, "train") + speeds(volumes, "train", again),
        "is {:.2f} times as fast with {:.2f} of the peak": [
            *speeds(volumes, "infer"), *shares(volumes, mode="infer", of="peak_bytes")
        ],
        "trains {:.2f} times as fast and answers {:.2f} times as fast, prepacked {:.2f}": [
            *speeds(single, "train"), *speeds(single, "infer"), *speeds(single, "infer", packed)
        ],
        '4096, keeps {:.2f} of its bytes ({:.2f} with `recompute="bottleneck"`), needs {:.2f} ({:.2f}) of its peak': [
            *shares(signals), *shares(signals, again), *shares(signals, of="peak_bytes"),
            *shares(signals, again, of="peak_bytes"),
        ],
        "and trains {:.2f} ({:.2f}) times as fast, in bf16 {:.2f} ({:.2f});": [
            speed for names in (signals, half) for of in ("converted", again) for speed in speeds(names, "train", of)
        ],
        "inference is {:.2f} times as fast, prepacked {:.2f}, in bf16 {:.2f} and {:.2f}.": [
            speed for names in (signals, half) for of in ("converted", packed) for speed in speeds(names, "infer", of)
        ],
        "A single signal trains {:.2f} times as fast and answers {:.2f} times as fast, prepacked {:.2f};": [
            *speeds(alone, "train"), *speeds(alone, "infer"), *speeds(alone, "infer", packed)
        ],
        "**trains at {:.2f} of its speed** and answers at {:.2f}, prepacked {:.2f}.": [
            *speeds(short, "train"), *speeds(short, "infer"), *speeds(short, "infer", packed)
        ],
    }  # fmt: skip
    assert round(min(speeds(residual, "train")), 2) == round(max(speeds(residual, "train")), 2)
    text = " ".join((root / "README.md").read_text().split())
    for words, values in said.items():
        assert words.format(*values) in text, words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("densenet121",), "model must be MODULE:FACTORY, such as torchvision.models:densenet121, got 'densenet121'"),
        (("torchvision.models:nothing",), "model must be one that can be imported, got 'torchvision.models:nothing'"),
        (("no.such.module:thing",), "model must be one that can be imported, got 'no.such.module:thing'"),
        (
            ("torchvision.models:densenet",),
            "model must be a class or a function that makes one, got a module at 'torch",
        ),
        (("json:dumps", "--model-arg", "obj=3"), "model must be an nn.Module, got str from json:dumps"),
        (("foreign:NewFirst", "--path", HERE), "NewFirst.__init__() missing 2 required positional arguments"),
        (("foreign:NewFirst", *SMALL, "--shape", 2, 3, 8, 8), "model must take images of shape (2, 3, 8, 8)"),
        (("foreign:NewFirst", *SMALL, "--dtype", "fp8"), "dtype 'fp8' is unknown"),
        (("foreign:NewFirst", *SMALL, "--rounds", -1), "rounds must"),
        (("foreign:NewFirst", *SMALL, "--out", HERE), "--out"),
    ],
)
def test_one_sentence_for_what_is_wrong(arguments, sentence):
    stdout, stderr = run("convert", *arguments, code=2)
    assert sentence in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1 and not stdout
