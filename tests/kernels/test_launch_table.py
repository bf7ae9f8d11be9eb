"""The launch table before the rules: a row's tile is taken and computes the same; the tuner measures these shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from poisoned import fill, rows
from thresholdnet.kernels import gathered_readers, launch, tuned, weight_gradients
from thresholdnet.kernels.configs import ConvolutionConfig, ReadersConfig, WeightGradientConfig
from tolerances import assert_near

import thresholdnet as tn
from thresholdnet.plan import UNITS, plan_block

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import tune

FORWARD = tuned.Shape("forward", "float32", 3, False, 24, 20, 1, 2, 4)
OTHER = {
    "forward": ConvolutionConfig(16, 16, 0, 16),
    "gradient": ConvolutionConfig(16, 32, 16, 16),
    "weight": WeightGradientConfig(16, 16, 16, programs=2),
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the interpreter's table, which the launchers then read."""
    monkeypatch.setenv("THRESHOLDNET_TUNED", str(tmp_path))

    def write(*found):
        document = {"gpu": "cpu", "capability": [0, 0], "rows": found}
        (tmp_path / tuned.file_name("cpu", (0, 0))).write_text(json.dumps(document))
        tuned.table_of.cache_clear()

    tuned.table_of.cache_clear()
    yield write
    tuned.table_of.cache_clear()


def run(dilation=1):
    """A forward convolution, its data gradient and its weight gradient."""
    torch.manual_seed(0)
    _, (a, b, out, dx) = rows(1, 2, 4, (10, 14, 20, 14), torch.float32)
    fill(a), fill(b)
    weight = torch.randn(20, 24, 3, 3) / 15
    mean, variance = launch.conv([a, b], weight, out, statistics=True, dilation=dilation)
    launch.gradient([out], [weight[:, 10:]], dx, dilation=dilation)
    return [out.clone(), mean, variance, dx.clone(), launch.weight_gradient([a, b], out, 3, dilation=dilation)]


def test_a_row_is_used_and_computes_the_same(table, monkeypatch):
    seen = []
    for module, name in ((launch, "convolution_config"), (weight_gradients, "weight_gradient_config")):
        rule = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *call, rule=rule: seen.append(call) or rule(*call))
    wanted = run()
    assert len(seen) == 3, "the rule is asked without a table"
    gradient = FORWARD._replace(kind="gradient", in_channels=20, out_channels=14)
    shapes = {"forward": FORWARD, "gradient": gradient, "weight": FORWARD._replace(kind="weight")}
    used = []
    packed = launch.device_table
    for module in (launch, weight_gradients):
        monkeypatch.setattr(module, "device_table", lambda *call: used.append(call[3]) or packed(*call))
    table(*(tuned.as_row(shape, tuned.Choice(OTHER[kind])) for kind, shape in shapes.items()))
    found = run()
    assert used == [16, 16, 16], "the tiles of the rows have chunks of 16"
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, torch.float32)
    table(*(tuned.as_row(shape._replace(batch=3), tuned.Choice(OTHER[kind])) for kind, shape in shapes.items()))
    used.clear()
    assert all(map(torch.equal, run(), wanted)) and 16 not in used, "rows of another shape are not used"


def test_rows_are_not_for_dilated_kernels(table, monkeypatch):
    """What a GPU measured, and tiles of several pixels, are for taps side by side."""
    gradient = FORWARD._replace(kind="gradient", in_channels=20, out_channels=14)
    shapes = {"forward": FORWARD, "gradient": gradient, "weight": FORWARD._replace(kind="weight")}
    table(*(tuned.as_row(shape, tuned.Choice(OTHER[kind])) for kind, shape in shapes.items()))
    used = []
    packed = launch.device_table
    for module in (launch, weight_gradients):
        monkeypatch.setattr(module, "device_table", lambda *call: used.append(call[3]) or packed(*call))
    run(dilation=2)
    assert len(used) == 3 and 16 not in used


def test_readers_take_their_row(table, monkeypatch):
    torch.manual_seed(0)
    _, (dz, out, raw) = rows(1, 2, 4, (8, 12, 12), torch.float32)
    fill(dz), fill(raw)
    one = torch.ones(12)
    call = [dz], [torch.randn(8, 12, 1, 1)], [out], [raw], [one], [one], one, one
    wanted = [*launch.gradient_of_readers(*call, add=False), out.clone()]
    used = []
    columns = gathered_readers.device_columns
    monkeypatch.setattr(gathered_readers, "device_columns", lambda *a: used.append(a[2]) or columns(*a))
    table(
        tuned.as_row(tuned.Shape("readers", "float32", 1, False, 8, 12, 1, 2, 4), tuned.Choice(ReadersConfig(16, 32)))
    )
    found = [*launch.gradient_of_readers(*call, add=False), out.clone()]
    assert used == [32], "the row's columns"
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, torch.float32)


@pytest.mark.parametrize("unit", UNITS)
def test_the_tuner_measures_what_a_block_convolves(unit, monkeypatch):
    asked = set()
    for module in (launch, weight_gradients, gathered_readers):
        monkeypatch.setattr(module, "choice", lambda device, shape: asked.add(tuple(shape)) or tuned.NOTHING)
    links = tn.links.threshold_ab(5, 1)
    block = tn.ThresholdBlock(6, links, growth_rate=4, unit=unit, fused=True, backend="triton")
    x, tail = torch.randn(1, 6, 2, 2, requires_grad=True), None
    if block.takes_tail:
        tail = torch.randn(5, block.out_channels, 1, 1, requires_grad=True)
    block(x, tail=tail).sum().backward()
    plan = plan_block(6, links, 4, unit=unit)
    found = tune._convolutions(plan, 0 if tail is None else 5)
    asked = {shape for shape in asked if shape[4]}  # a node without readers convolves nothing
    assert asked == {
        (kind, "float32", size, affine, sum(read), wrote, 1, 2, 2) for kind, size, affine, read, wrote, _ in found
    }


@pytest.mark.parametrize(("side", "splits"), ((2, {1, 2, 4, 8, 16}), (56, {1})))
def test_the_tuner_tries_splits_of_small_images(side, splits):
    shape = tuned.Shape("forward", "bfloat16", 3, False, 288, 40, 100, side, side)
    found = tune.tiles(tune.Work(shape, (288,), "rows"), (9, 0))
    assert {tile.splits for tile in found} - {found[0].splits} == splits - {found[0].splits}


def test_the_tuner_goes_on_where_it_was_stopped(tmp_path, capsys):
    out = tmp_path / "table.json"
    assert tune.main(["--interpreter", "--out", str(out), "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"better_than_rule": 0} == {
        "file": str(out), "measured": 1, "left": 0, "better_than_rule": 0
    }  # fmt: skip
    first = json.loads(out.read_text())["rows"]
    assert tune.main(["--interpreter", "--out", str(out), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes"] == [
        "weight 1x1 12->8 1x4x4 float32 affine", "readers 1x1 16->12 1x4x4 float32"
    ]  # fmt: skip
    assert tune.main(["--interpreter", "--out", str(out), "--budget", "0"]) == 0
    assert "the budget of 0 s is spent" in capsys.readouterr().err
    assert tune.main(["--interpreter", "--out", str(out)]) == 0
    second = json.loads(out.read_text())["rows"]
    assert second[0] == first[0] and len(second) == 3
    assert all(entry["ms"] > 0 for row in second for entry in row["times"]["tile"])
    table = tuned.read(out, "cpu", (0, 0))
    assert {shape.kind for shape in table} == {"forward", "weight", "readers"} and all(
        row.tile for row in table.values()
    )
    out.write_text("{}")
    assert tune.main(["--interpreter", "--out", str(out)]) == 2 and out.read_text() == "{}"


def test_a_wrong_or_broken_candidate_is_out(tmp_path, monkeypatch, capsys):
    work = tune.Work(tuned.Shape("forward", "float32", 3, False, 6, 8, 1, 2, 2), (6,), "rows")
    good, wrong, broken = (ConvolutionConfig(16, 16, 0, chunk) for chunk in (16, 32, 64))
    monkeypatch.setattr(tune, "tiles", lambda work, capability: [good, wrong, broken])
    conv = launch.conv

    def sabotaged(sources, weight, out, config, **options):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        conv(sources, weight, out, config=config, **options)
        if config == wrong:
            out += 1

    monkeypatch.setattr(launch, "conv", sabotaged)
    said = []
    row = tune.measure(work, torch.device("cpu"), said.append)
    assert [entry["ms"] is not None for entry in row["times"]["tile"]] == [True, False, False]
    assert row["tile"]["chunk"] == 16 and "not the rule's" in said[0] and "shared memory" in said[1]
