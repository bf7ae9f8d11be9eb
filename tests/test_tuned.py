"""Launch tables: what is written is read back, what is malformed is ignored with a warning, the CUDA forms follow."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from thresholdnet.kernels import tuned
from thresholdnet.kernels.configs import ConvolutionConfig, ReadersConfig, WeightGradientConfig

from thresholdnet.backends import cuda_launch
from thresholdnet.bench import machine

CHECKOUT = Path(__file__).resolve().parents[1]
GPU, CAPABILITY = "NVIDIA H200", (9, 0)
SHAPE = tuned.Shape("forward", "bfloat16", 3, False, 64, 24, 128, 56, 56)
WEIGHT = SHAPE._replace(kind="weight", kernel_size=1, affine=True)
ROWS = {
    SHAPE: tuned.Choice(ConvolutionConfig(128, 64, 32, group=(2, 2)), "library"),
    SHAPE._replace(batch=2): tuned.Choice(ConvolutionConfig(64, 32, splits=7)),
    SHAPE._replace(kind="gradient"): tuned.Choice(None, "wide"),
    WEIGHT: tuned.Choice(WeightGradientConfig(64, 128, 32, swapped=True, programs=6)),
    SHAPE._replace(kind="readers", kernel_size=1): tuned.Choice(ReadersConfig(128, 64, 8, 2)),
}


WEIGHT_TILE = {"rows": 64, "chunk": 64, "columns": 16}


def document(*rows, **changes):
    return {"gpu": GPU, "capability": list(CAPABILITY), "rows": list(rows)} | changes


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """Writes a table of a GPU that every device seems to be; returns its path."""
    monkeypatch.setattr(tuned, "identity", lambda device: (GPU, CAPABILITY))
    monkeypatch.setenv("THRESHOLDNET_TUNED", str(tmp_path))
    tuned.table_of.cache_clear()

    def write(found):
        path = tmp_path / tuned.file_name(GPU, CAPABILITY)
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        tuned.table_of.cache_clear()
        return path

    yield write
    tuned.table_of.cache_clear()


def test_names():
    assert tuned.file_name(GPU, CAPABILITY) == "nvidia-h200-sm90.json"
    assert tuned.file_name("NVIDIA H100 80GB HBM3", (9, 0)) == "nvidia-h100-80gb-hbm3-sm90.json"
    assert tuned.identity(torch.device("cpu")) == ("cpu", (0, 0))


def test_rows_are_read_back(on_gpu):
    path = on_gpu(document(*({**tuned.as_row(shape, row), "times": {}} for shape, row in ROWS.items())))
    assert tuned.read(path, GPU, CAPABILITY) == ROWS
    device = torch.device("cpu")
    assert all(tuned.choice(device, shape) == row for shape, row in ROWS.items())
    assert tuned.choice(device, SHAPE._replace(batch=1)) == tuned.NOTHING
    path.unlink()
    assert tuned.choice(device, SHAPE) == ROWS[SHAPE], "the file is read once"


def test_a_tile_without_splits_has_one():
    old = row()
    del old["tile"]["splits"]
    assert tuned._row(old) == (SHAPE, ROWS[SHAPE]) and ROWS[SHAPE].tile.splits == 1


def test_no_table_no_choice(on_gpu, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.table_of(torch.device("cpu")) == {}
    on_gpu(document(tuned.as_row(SHAPE, ROWS[SHAPE])))
    monkeypatch.setenv("THRESHOLDNET_TUNED", "0")
    tuned.table_of.cache_clear()
    assert tuned.table_of(torch.device("cpu")) == {}


def row(**changes):
    return tuned.as_row(SHAPE, ROWS[SHAPE]) | changes


def tile(**changes):
    return row(tile=row()["tile"] | changes)


@pytest.mark.parametrize(
    "found, words",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (document(rows=3), "TypeError"),
        (document(gpu="NVIDIA A100"), "it is of .'NVIDIA A100', .9, 0.., the GPU is .'NVIDIA H200'"),
        (document(capability=[8, 0]), "it is of"),
        (document({}), "KeyError: 'kind'"),
        (document(row(kind="backward")), "kind of a row must be one of"),
        (document(row(dtype="int8")), "dtype of a row"),
        (document(row(kernel_size=5)), "kernel_size of a row"),
        (document(row(batch=0)), "batch of a row must be at least 1, got 0"),
        (document(row(height="56")), "height of a row must be at least 1, got '56'"),
        (document(row(affine=1)), "affine of a row must be bool, got 1"),
        (document(row(form="fast")), "form of a forward row must be one of"),
        (document(row(out_channels=40, form="wide")), "form of a forward row"),
        (document(row(kind="weight", tile=WEIGHT_TILE)), "form of a weight row"),
        (document(tile(rows=48)), "rows of a tile must be a power of two from 16 to 256, got 48"),
        (document(tile(columns=512)), "columns of a tile"),
        (document(tile(columns2=8)), "columns2 of a tile"),
        (document(tile(warps=True)), "warps of a tile"),
        (document(tile(stages=0)), "stages of a tile must be 1 to 8, got 0"),
        (document(tile(splits=0)), "splits of a tile must be 1 to 32, got 0"),
        (document(tile(splits=33)), "splits of a tile must be 1 to 32, got 33"),
        (document(tile(group=[3, 1])), "group of a tile must divide"),
        (document(tile(group=[4, 4])), "group of a tile must divide"),
        (document(tile(group=[2])), "ValueError"),
        (document(tile(vector=16)), "vector of a tile must be a power of two from 4 to 8, got 16"),
        (document(row(kind="readers", form="gemm", tile={"rows": 64, "columns": 64})), "form of a readers row"),
        (
            document(row(kind="weight", form=None, tile={**WEIGHT_TILE, "programs": 0})),
            "programs of a tile must be 1 to",
        ),
        (document(tile(shape=3)), "unexpected keyword argument 'shape'"),
    ],
)
def test_a_malformed_table_is_ignored_with_one_warning(on_gpu, found, words):
    path = on_gpu(found)
    with pytest.warns(RuntimeWarning, match=rf"launch table ignored: {path} must be a launch table of .*{words}"):
        assert tuned.table_of(torch.device("cpu")) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.choice(torch.device("cpu"), SHAPE) == tuned.NOTHING


def test_the_cuda_form_comes_from_the_table(on_gpu, monkeypatch):
    monkeypatch.delenv("THRESHOLDNET_CONV", raising=False)
    on_gpu(document(*(tuned.as_row(shape, chosen) for shape, chosen in ROWS.items())))
    out = torch.empty(128, 24, 56, 56, dtype=torch.bfloat16, device="meta")
    assert cuda_launch._form("forward", 3, 64, out, False) == "library"
    assert cuda_launch._form("gradient", 3, 64, out, False) == "wide"
    assert cuda_launch._form("forward", 3, 72, out, False) == cuda_launch.convolution_form(3, 24, 56, 56) != "library"
    monkeypatch.setenv("THRESHOLDNET_CONV", "own")
    assert cuda_launch._form("forward", 3, 64, out, False) != "library"


def test_committed_tables_are_whole():
    for path in tuned.FOLDER.glob("*.json"):
        found = json.loads(path.read_text())
        assert tuned.file_name(found["gpu"], tuple(found["capability"])) == path.name
        assert tuned.read(path, found["gpu"], tuple(found["capability"]))


@pytest.mark.skipif(not (CHECKOUT / "bench" / "tune.py").is_file(), reason="run outside a checkout")
def test_the_tuner_is_not_taken_in_by_a_clock_that_rises(monkeypatch):
    """Every call is faster than the one before: who comes last looks best, and is not when both are timed in turn."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "bench"))
    import tune

    work = tune.Work(tune._shape("forward", "float32", 3, False, 12, 8, 1, 4, 4), (8, 4), "arena")
    monkeypatch.setattr(tune.Bench, "call", lambda self, launch, **options: lambda: None)
    monkeypatch.setattr(tune.Bench, "result", lambda self, call: torch.ones(1))
    calls = []

    def clock(step):
        calls.append(step)
        return 100.0 * 0.97 ** len(calls)

    monkeypatch.setattr("thresholdnet.bench.clock.clock_for", lambda device: clock)
    monkeypatch.setattr("thresholdnet.kernels.device.capability_of", lambda device: (9, 0))
    row = tune.measure(work, torch.device("cpu"), print)
    rule, *_, last = row["times"]["tile"]
    assert rule["ms"] > 1.1 * last["ms"] and row["tile"] | {"ms": rule["ms"]} == rule


@pytest.mark.skipif(not (CHECKOUT / "bench" / "tune.py").is_file(), reason="run outside a checkout")
def test_the_tuner_goes_on_with_the_same_code_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(CHECKOUT / "bench"))
    import tune

    file = tmp_path / "table.json"
    monkeypatch.setattr(tuned, "identity", lambda device: (GPU, CAPABILITY))
    head = {key: machine()[key] for key in tune.CODE}
    asked = ["--model", "hardnet68", "--size", "1x64", "--limit", "1", "--dry-run", "--out", str(file)]
    for change, code in (({}, 0), ({"commit": "another"}, 2)):
        file.write_text(json.dumps(document() | head | change))
        assert tune.main(asked) == code
    assert "was measured with commit 'another', now it is" in capsys.readouterr().err


@pytest.mark.skipif(not (CHECKOUT / "bench" / "tune.py").is_file(), reason="run outside a checkout")
def test_the_tuner_times_the_best_in_turn_with_the_rule(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKOUT / "bench"))
    import tune

    def clock(step):
        clock.drift *= 0.97
        return step() * clock.drift

    for other, faster in ((1.0, False), (0.99, False), (0.9, True)):
        clock.drift = 1.0
        assert tune.stays_faster(lambda: 1.0, lambda other=other: other, clock, 20) == faster


@pytest.mark.skipif(not (CHECKOUT / "bench" / "tune.py").is_file(), reason="run outside a checkout")
def test_the_tuner_lists_shapes_and_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command sets it
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    import tune

    common = ["--model", "hardnet68", "--size", "2x64", "--json"]
    assert tune.main([*common, "--dry-run"]) == 0
    shapes = json.loads(capsys.readouterr().out)["shapes"]
    assert len(set(shapes)) == len(shapes)
    assert "forward 3x3 64->14 2x16x16 bfloat16" in shapes  # its first linked layer
    assert {text.split()[0] for text in shapes} == {"forward", "gradient", "weight"}
    bottleneck = ["--model", "thresholdnet_v1", "--size", "2x64", "--dry-run", "--filter", "readers.*16x16", "--json"]
    assert tune.main(bottleneck) == 0
    found = json.loads(capsys.readouterr().out)["shapes"]
    # six layers in groups of two: a layer sends to its partner, both to what both read
    assert set(found) == {f"readers 1x1 {read}->{wrote} 2x16x16 bfloat16"
                          for read, wrote in ((128, 32), (256, 192), (256, 128), (256, 64))}  # fmt: skip
    assert any(" 1x1 " in text for text in shapes), "convolutions behind a block are linked ones too"
    assert tune.main([*common, "--dry-run", "--filter", "weight 3x3 64->14"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes"] == ["weight 3x3 64->14 2x16x16 bfloat16"]
    assert tune.main(["--size", "big", "--dry-run"]) == 2
    assert "size must be BATCHxSIDE, such as 128x224, got 'big'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2 and "tune needs a CUDA device, got none" in capsys.readouterr().err
    assert tune.main(["--interpreter"]) == 2 and "out must be given with --interpreter" in capsys.readouterr().err
    monkeypatch.setattr(tune, "measure", None)
    assert tune.main(["--interpreter", "--out", f"{__file__}/tuned.json"]) == 2
    assert f"out must lead to a folder, got {__file__}: {__file__} is a file" in capsys.readouterr().err
    sys.modules.pop("tune")


def test_noise_does_not_pick(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    tune = pytest.importorskip("tune")
    assert tune.pick({"rule": 1.0, "other": 0.99}) == "rule"
    assert tune.pick({"rule": 1.0, "other": 0.97, "best": 0.96}) == "best"
    assert tune.pick({"rule": None, "other": 2.0}) == "other"
    assert tune.pick({"rule": None}) is None and tune.pick({}) is None
