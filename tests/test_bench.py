"""`thresholdnet bench` on tiny networks: real steps, checked before they are timed; blocks; resuming; bad input."""

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_cli import run

from thresholdnet import bench
from thresholdnet.backends import native
from thresholdnet.bench import arithmetic, baselines, footprint, providers
from thresholdnet.bench.clock import Neighbours, ProcessorClock, largest_cache
from thresholdnet.bench.measure import network
from thresholdnet.bench.stages import stages
from thresholdnet.models import Network

TINY = "thresholdnet_ab:width_mult=0.25,layers=[2,3],transitions=[16,16],growth_rates=[6,10],threshold=2"
FEW = ("eager", "eager_channels_last", "fused_native")
ONCE = bench.Settings(rounds=1, warmup=0)


def one_case(mode, model=TINY, image=32, batch=4, dtype="fp32"):
    return bench.Case(model, image, batch, dtype, mode)


def by_provider(rows):
    return {row["provider"]: row for row in rows}


def options(*providers):
    return [part for name in providers for part in ("--provider", name)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The command on the tiny network, train and infer: its file's content and path, and what it printed."""
    file = tmp_path_factory.mktemp("bench") / "run.json"
    stdout, _ = run("bench", "--model", TINY, "--rounds", 2, "--warmup", 1, "--out", file)
    return json.loads(file.read_text()), file, stdout


def test_rows_have_the_fixed_format(measured):
    content, _, stdout = measured
    machine = content["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert {"cpu", "gpu", "driver", "triton", "cuda", "commit", "dirty", "python", "command"} <= set(machine)
    assert {row["mode"] for row in content["rows"]} == {"train", "infer"}
    for row in content["rows"]:
        keys = {"model", "image", "batch", "dtype", "mode", "provider", "graph", "ms_median", "ms_p20", "ms_p80",
                "peak_bytes", "saved_bytes", "runs"}  # fmt: skip
        assert keys <= set(row) and row["graph"] is False and row["model"] == TINY
        if row["ms_median"] is None:
            assert row["runs"] == 0 and row["reason"] and row["reason"] in stdout
            continue
        assert row["runs"] == len(row["ms"]) == 2
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert all(entry["error"] <= entry["bound"] for entry in row["check"].values())
        assert row["peak_bytes"] > 0 and row["peak_by"]


def test_who_can_run_did_and_the_others_say_why(measured):
    rows = {(row["provider"], row["mode"]): row for row in measured[0]["rows"]}
    timed = {key for key, row in rows.items() if row["ms_median"] is not None}
    for name in ("eager", "eager_channels_last", "eager_padded8", "fused_native"):
        assert {(name, "train"), (name, "infer")} <= timed
    assert ("checkpoint", "train") in timed and ("eager_folded", "infer") in timed
    assert rows["fused_native_recompute", "train"]["reason"] == "the model has no bottleneck units to recompute"
    assert rows["checkpoint", "infer"]["reason"] == "checkpoints save memory in training alone"
    assert rows["fused_native", "train"]["backend"] == "native" and rows["eager", "train"]["backend"] is None
    kept = {name: rows[name, "train"]["saved_bytes"] for name in ("eager_channels_last", "checkpoint", "fused_native")}
    assert kept["fused_native"] < kept["checkpoint"] < kept["eager_channels_last"]


def test_ratios_are_those_of_the_rows_own_times(measured):
    rows = measured[0]["rows"]
    for row in rows:
        for name, ratio in row["ratios"].items():
            other = next(r for r in rows if r["provider"] == name and r["mode"] == row["mode"])
            quotients = sorted(b / a for a, b in zip(row["ms"], other["ms"], strict=True))
            assert ratio["median"] == pytest.approx(sum(quotients) / 2)
            assert quotients[0] <= ratio["p20"] <= ratio["p80"] <= quotients[1]


def test_a_finished_file_is_left_alone(measured):
    _, file, _ = measured
    before = file.read_text()
    run("bench", "--model", TINY, "--rounds", 2, "--warmup", 1, "--out", file)
    assert file.read_text() == before


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Ctrl-C in the second case: the file is whole and holds the first; the same command adds the rest alone."""
    file = tmp_path / "run.json"
    arguments = ("bench", "--model", TINY, *options("eager", "eager_channels_last"), "--rounds", 1, "--warmup", 0,
                 "--out", file)  # fmt: skip
    measure = bench.jobs.measure

    def stopped(case, *others):
        if case.mode == "infer":
            raise KeyboardInterrupt
        return measure(case, *others)

    monkeypatch.setattr(bench.jobs, "measure", stopped)
    run(*arguments, code=130)
    half = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in half] == ["train", "train"]
    monkeypatch.setattr(bench.jobs, "measure", measure)
    run(*arguments)
    whole = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in whole] == ["train", "train", "infer", "infer"] and whole[:2] == half
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_more_providers_measure_a_case_again_as_a_whole(tmp_path):
    file = tmp_path / "run.json"
    common = ("bench", "--model", TINY, "--mode", "infer", "--rounds", 1, "--warmup", 0, "--out", file)
    run(*common, *options("eager", "eager_channels_last"))
    first = by_provider(json.loads(file.read_text())["rows"])
    run(*common, *options("fused_native"))
    second = by_provider(json.loads(file.read_text())["rows"])
    assert set(second) == set(FEW) and second["eager"]["ms"] != first["eager"]["ms"]
    assert set(second["fused_native"]["ratios"]) == {"eager", "eager_channels_last"}


def test_without_rounds_there_are_bytes_and_no_times(tmp_path):
    file = tmp_path / "run.json"
    run("bench", "--model", TINY, "--mode", "train", "--rounds", 0, *options(*FEW), "--out", file)
    rows = by_provider(json.loads(file.read_text())["rows"])
    for row in rows.values():
        assert row["ms_median"] is None and row["runs"] == 0 and row["ratios"] == {} and "reason" not in row
        assert row["saved_bytes"] > 0 and row["peak_bytes"] > 0 and row["check"]
    _, text = run("bench", "--report", file)
    assert "Without a time" not in text
    assert (
        f"| fused_native | - | - | - | - | {rows['fused_native']['saved_bytes'] / 1e6:,.1f} ("
        in file.with_suffix(".md").read_text()
    )
    assert file.with_name("run-train.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("torch", "1.1.0"), ("instructions", "none"), ("cuda", "1.0"), ("changes", "0123456789ab"),
        ("libraries", {"_csrc": "0123456789ab"}), ("environment", {"THRESHOLDNET_CPU": "baseline"}),
    ],
)  # fmt: skip
def test_another_machine_or_code_does_not_go_on_in_the_same_file(key, other, measured, tmp_path):
    content, _, _ = measured
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content | {"machine": content["machine"] | {key: other}}))
    assert f"was measured with {key} {other!r}, now it is" in run("bench", "--out", file, "--dry-run", code=2)[1]


def test_switches_of_the_environment_are_noted(monkeypatch):
    for name, value in (("THRESHOLDNET_WINOGRAD", "1"), ("TORCHINDUCTOR_FREEZING", "1"), ("TRITON_CACHE_DIR", "x")):
        monkeypatch.setenv(name, value)
    found = bench.machine()["environment"]
    assert found["THRESHOLDNET_WINOGRAD"] == found["TORCHINDUCTOR_FREEZING"] == "1" and "TRITON_CACHE_DIR" not in found


def test_launch_tables_are_noted(monkeypatch, tmp_path):
    monkeypatch.setenv("THRESHOLDNET_TUNED", str(tmp_path))
    found = []
    for text in ("", "1", "2"):
        if text:
            (tmp_path / "a-gpu.json").write_text(text)
        found.append(bench.machine()["tuned"])
    assert found[0] == {} and list(found[1]) == ["a-gpu.json"] and found[1] != found[2]


def test_a_file_keeps_all_of_its_commands(tmp_path, monkeypatch):
    here, row = bench.machine(), {"provider": "eager", "model": TINY, "mode": "train"}
    (tmp_path / "run.json").write_text(json.dumps({"machine": here | {"command": "thresholdnet first"}, "rows": [row]}))
    for command in ("thresholdnet second", "thresholdnet first", "thresholdnet second"):
        found = bench.Results(tmp_path / "run.json", here | {"command": command})
        found.add(one_case("infer"), [])
    assert found.machine["command"] == "thresholdnet first && thresholdnet second"


def test_bytes_alone_are_no_times(tmp_path):
    """A run without rounds, then one with rounds into the same file."""
    arguments = ("bench", "--model", TINY, "--mode", "train", *options("eager"), "--out", tmp_path / "run.json")
    for rounds in (0, 1):
        run(*arguments, "--rounds", rounds, "--warmup", 0)
        (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
        assert row["runs"] == rounds
    assert row["warmup"] == 0


def test_rows_of_graphs_stay_when_others_are_added(tmp_path, monkeypatch):
    """What is measured again without --cuda-graph is measured as graphs, too, where the file holds graphs."""
    asked, current = [], [None]

    def measure(case, providers, settings, tell):
        asked.append((settings.cuda_graph, current[-1]))
        return [{**case.fields, "provider": name, "graph": graph} for graph in settings.graphs for name in providers]

    monkeypatch.setattr(bench.jobs, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: (current.append(device.index), nullcontext())[1])
    results, case = bench.Results(tmp_path / "run.json", bench.machine()), one_case("train")
    graphed, plain = (bench.Settings(device="cuda:1", cuda_graph=graph) for graph in (True, False))
    bench.run(case, ["eager"], graphed, results, print)
    bench.run(case, ["fused_native"], plain, results, print)
    assert asked == [(True, 1)] * 2 and len(results.rows) == 4  # on the second GPU, which events are of while it is
    bench.run(one_case("infer"), ["eager"], plain, results, print)
    assert asked[-1] == (False, 1)


# ---------------------------------------------------------------- blocks alone


def test_a_block_alone_is_a_case_of_its_own():
    case = one_case("train", model=f"{TINY}/stages.1")
    (stage,) = stages(case)
    assert str(case) == f"{TINY}/stages.1 4x32x32 fp32 train" and case.network == TINY
    providers = (*FEW, "eager_padded8", "checkpoint", "fused_winograd", "compile_folded")
    rows = by_provider(bench.measure(case, providers, ONCE))
    for name in (*FEW, "checkpoint", "fused_winograd"):
        row = rows[name]
        assert row["ms_median"] > 0 and row["model"] == case.model and set(row["check"]) == {"output", "gradients"}
        macs = sum(9 * read * written for read, written in zip(stage.plan.link_widths, stage.plan.widths, strict=True))
        assert row["flops"] == 3 * 2 * macs * 4 * stage.side**2
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms_median"] / 1e9)
    assert rows["fused_native"]["saved_bytes"] < 0.5 * rows["eager"]["saved_bytes"]
    assert rows["eager_padded8"]["reason"].startswith("a block alone has no 1x1 transition behind it")


def test_the_gradient_of_a_blocks_input_is_checked(monkeypatch):
    leave = native.Verbs.leave

    def wrong(self, nodes):  # one node leaves alone in backward: the input's gradient
        return leave(self, nodes) * (1.5 if len(nodes) == 1 else 1.0)

    monkeypatch.setattr(native.Verbs, "leave", wrong)
    row = by_provider(bench.measure(one_case("train", model=f"{TINY}/stages.1"), FEW, ONCE))["fused_native"]
    assert row["ms_median"] is None and row["reason"].startswith("wrong: gradients off by")


def test_levels_are_listed(tmp_path):
    arguments = ("bench", "--preset", "cpu", "--model", "hardnet68", "--image", 224, "--dry-run", "--out",
                 tmp_path / "x.json")  # fmt: skip
    blocks = run(*arguments, "--level", "block", "--filter", "stages.2 8x.* train")[0]
    assert "hardnet68/stages.2 8x224x224 fp32 train: eager, eager_channels_last" in blocks and "1 of 1 cases" in blocks
    layers = run(*arguments, "--level", "layer", "--filter", "stages.2 8x.* layer 16")[0]
    assert "hardnet68/stages.2 8x224x224 fp32 layer 16 3x3 gather: eager, eager_channels_last, fused_native\n" in layers
    both = run(*arguments, "--level", "layer", "--level", "model", "--filter", "layer 16|train")[0]
    assert "hardnet68 8x224x224 fp32 train: " in both and "layer 16 3x3 convolution" in both
    every = json.loads(run(*arguments, "--level", "layer", "--every-layer", "--json")[0])["cases"]
    three = json.loads(run(*arguments, "--level", "layer", "--json")[0])["cases"]
    assert set(three) < set(every) and any("layer 5" in case for case in every)
    assert not (tmp_path / "x.json").exists()


# ---------------------------------------------------------------- right before fast


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_broken_provider_gets_no_time(mode, monkeypatch):
    name = {"train": "normalise", "infer": "leave"}[mode]
    right = getattr(native.Verbs, name)

    def wrong(*arguments, **named):
        made = right(*arguments, **named)
        made[:, 0] *= 1.5  # of one channel: BatchNorm behind the block would undo a factor of all
        return made

    monkeypatch.setattr(native.Verbs, name, wrong)
    rows = by_provider(bench.measure(one_case(mode), FEW, ONCE))
    broken = rows["fused_native"]
    assert broken["ms_median"] is None and broken["runs"] == 0 and "ms" not in broken and broken["ratios"] == {}
    assert broken["reason"].startswith("wrong: ")
    assert rows["eager"]["runs"] == 1 and "fused_native" not in rows["eager"]["ratios"]


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(native.Verbs, "leave", lambda self, nodes: torch.cat(list(nodes), 1) * float("nan"))
    row = by_provider(bench.measure(one_case("infer"), FEW, ONCE))["fused_native"]
    assert row["ms_median"] is None and "output off by nan" in row["reason"]


def test_who_fails_in_a_round_leaves_its_reason(monkeypatch):
    calls = []
    right = native.Verbs.leave

    def fails_later(self, nodes):
        calls.append(1)
        if len(calls) > 2 * 3:  # three calls of two blocks each before the rounds: first, peak, check
            raise RuntimeError("out of memory\nand more")
        return right(self, nodes)

    monkeypatch.setattr(native.Verbs, "leave", fails_later)
    settings = replace(ONCE, rounds=2)
    rows = by_provider(bench.measure(one_case("infer"), FEW, settings))
    assert rows["fused_native"]["ms_median"] is None and rows["fused_native"]["reason"] == "RuntimeError: out of memory"
    assert rows["eager"]["runs"] == 2


def test_a_network_compiled_in_pieces_is_no_rival(monkeypatch):
    forward = Network.forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(Network, "forward", broken)
    rows = by_provider(bench.measure(one_case("infer"), ("eager_channels_last", "compile"), replace(ONCE, rounds=0)))
    assert rows["compile"]["reason"].startswith("Unsupported: ") and "check" in rows["eager_channels_last"]


def test_cudnn_measures_its_convolutions_for_one_provider_alone(monkeypatch):
    (row,) = bench.measure(one_case("train"), ["eager_cudnn_benchmark"], ONCE)
    assert row["reason"] == "cuDNN runs on a GPU alone"
    monkeypatch.setattr(providers, "Runner", lambda *made, within: within)
    monkeypatch.setattr(providers, "_channels_last", lambda *given: given)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with providers.PROVIDERS["eager_cudnn_benchmark"].make(None, on_gpu, one_case("train"))():
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


def test_frozen_weights_are_compiled_with_batch_norms_folded(monkeypatch):
    """Inductor lays frozen weights out itself: the rival of prepacked ones."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: (asked.append(options), model)[1])
    (row,) = bench.measure(one_case("infer"), ["compile_frozen"], ONCE)
    assert row["ms_median"] > 0 and asked == [{"fullgraph": True, "options": {"freezing": True}}]
    (row,) = bench.measure(one_case("train"), ["compile_frozen"], ONCE)
    assert row["reason"] == "BatchNorm folds into weights in inference alone"


def test_what_earlier_steps_left_is_not_taken_off_a_peak(monkeypatch):
    """On a GPU, where a peak is the difference of two numbers; a cycle from before ends within the step."""

    class Left:
        """5000 bytes, as long as it is there."""

    left = Left()
    left.itself, alive = left, weakref.ref(left)
    del left
    peak = 0

    def call(images):
        nonlocal peak
        gc.collect()
        peak = (5000 if alive() else 0) + 3000

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5000 if alive() else 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    runner = SimpleNamespace(
        train=False, images=SimpleNamespace(device=torch.device("cuda")), within=nullcontext, call=call,
        clear=lambda: None,
    )  # fmt: skip
    assert footprint.peak_bytes(runner)[0] == 3000


def test_a_graphs_pool_is_what_the_capture_allocated(monkeypatch):
    """Not what the calls before it left in the allocator's cache."""
    reserved = {"cached": 7, "pool": 0}

    def capture(step):
        reserved.update(cached=50, pool=1000)
        return (lambda: None), step()

    monkeypatch.setattr(providers.graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.update(cached=0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: sum(reserved.values()))
    runner = providers.Runner(torch.nn.Flatten(), torch.zeros(2, 10), False)
    assert footprint.peak_bytes(providers.Graphed(runner))[0] == 1000


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_who_is_wrong_in_later_calls_gets_no_time(how, monkeypatch):
    calls, right = [], native.Verbs.leave
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")

    def later(self, nodes):
        calls.append(1)
        if len(calls) <= 2 * 4:  # of two blocks each: first, peak, check and the round
            return right(self, nodes)
        if how == "raises":
            raise RuntimeError("no more")
        return right(self, nodes) * 2

    monkeypatch.setattr(native.Verbs, "leave", later)
    rows = by_provider(bench.measure(one_case("infer"), FEW, ONCE))
    row = rows["fused_native"]
    assert row["ms_median"] is None and row["ratios"] == {} and row["reason"].endswith(", after the rounds")
    assert "fused_native" not in rows["eager"]["ratios"] and rows["eager"]["runs"] == 1


def test_one_small_image_has_statistics():
    """Of a last map of one value a channel; plain torch refuses it in training, and so does the case."""
    deep = "thresholdnet_ab:width_mult=0.25,layers=[2,2,2],transitions=[16,16,16],growth_rates=[6,6,10],threshold=2"
    for mode, reason in (("infer", None), ("train", "Expected more than 1 value per channel")):
        rows = by_provider(bench.measure(one_case(mode, deep, 16, 1), FEW, ONCE))
        assert all(row["runs"] == int(reason is None) for row in rows.values()), rows
        assert reason is None or all(reason in row["reason"] for row in rows.values()), rows


def test_padding_keeps_the_weights():
    model = network(one_case("train"), torch.device("cpu"))
    wide, real = baselines.padded(network(one_case("train"), torch.device("cpu")))
    assert all(width % 8 == 0 for block in baselines.blocks(wide) for width in block.widths)
    ours, theirs = dict(model.named_parameters()), dict(wide.named_parameters())
    assert list(ours) == list(theirs) and real
    for name, parameter in ours.items():
        grown = theirs[name]
        if name in real:
            assert torch.equal(grown[real[name]].view_as(parameter), parameter)
            assert grown[~real[name]].count_nonzero() == 0
        else:
            assert torch.equal(grown, parameter)


# ---------------------------------------------------------------- arithmetic and clocks


def test_percentiles_and_ratios():
    assert arithmetic.spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    with pytest.raises(ValueError, match="at least one value"):
        arithmetic.spread([])
    # by round 2, 2, 2, although the medians' ratio is another: a slow round slows both
    assert arithmetic.paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert arithmetic.paired_ratio([3.0, 20.0, 40.0], [1.0, 10.0, 40.0])["median"] == 2.0
    with pytest.raises(ValueError, match="as many times on both sides, got 1 and 2"):
        arithmetic.paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_order_turns_and_alternates(count):
    orders = [arithmetic.order(count, index) for index in range(2 * count)]
    assert all(sorted(made) == list(range(count)) for made in orders)
    for place in range(count):  # over 2 n rounds everybody was twice in every place
        assert sorted(made[place] for made in orders) == sorted([*range(count)] * 2)


def test_the_clock_flushes_before_it_starts():
    clock = ProcessorClock(flush=4096)
    seen = []
    assert clock(lambda: (seen.append(int(clock.flush[0])), time.sleep(0.002))) >= 2.0
    assert seen == [1] and clock.flush.numel() == 1024
    assert ProcessorClock().flush.numel() == 0
    assert 2**15 <= largest_cache() <= 2**33


def test_other_processes_are_noticed():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watched = Neighbours()
        time.sleep(1.0)
        share = watched.share()
    finally:
        busy.kill()
        busy.wait()
    if share is None:
        pytest.skip("this system has no /proc/stat")
    assert 0.2 / (os.cpu_count() or 1) < share <= 1.0


# ---------------------------------------------------------------- the command


def test_help_names_every_provider_and_level():
    text = " ".join(run("bench", "--help")[0].split())
    for name, provider in bench.PROVIDERS.items():
        assert f"{name} {provider.what}" in text
    for name, meaning in bench.LEVELS.items():
        assert f"{name} {meaning}" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--preset", "cpus"), "preset 'cpus' is unknown; did you mean cpu"),
        (("--filter", "nothing like it"), "filter must match one of 2 cases, such as 'thresholdnet_ab"),
        (("--filter", "("), "filter must be a regular expression, got '('"),
        (("--provider", "fussed"), "provider 'fussed' is unknown; did you mean fused"),
        (("--level", "layers"), "level 'layers' is unknown; did you mean layer"),
        (("--level", "layer", "--provider", "compile"), "for single operations, got compile"),
        (
            ("--level", "block", "--model", "resnet50"),
            "must have linked blocks where they are measured alone, got 'res",
        ),
        (("--model", "densenet12"), "model 'densenet12' is unknown; did you mean densenet121"),
        (("--model", "densenet121:growth=4"), "model densenet121 takes drop_rate, small_stem, got 'growth'"),
        (("--model", "densenet121:4"), "model must be NAME or NAME:KEY=VALUE,KEY=VALUE, got 'densenet121:4'"),
        (("--model", "densenet121/3"), "model must name its block as NAME/stages.NUMBER, got 'densenet121/3'"),
        (
            ("--model", "hardnet68/stages.9", "--level", "block"),
            "has the blocks stages.0, stages.1, stages.2, stages.3",
        ),
        (("--rounds", "-1"), "rounds must be at least 0, got -1"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--mode", "test"), "mode 'test' is unknown; known: train, infer"),
        (("--name", "a/b"), "name must hold letters, digits and . _ + - alone, got 'a/b'"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("file.json",), "files must come with --report, got file.json without it"),
        (("--report",), "report must be given at least one file of results, got none"),
        (("--report", "missing.json"), "missing.json: No such file or directory"),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, stderr = run("bench", "--dry-run", *arguments, code=2)
    assert sentence in stderr and stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    assert "device must be one that torch can use here, got 'cuda'" in run("bench", "--device", "cuda", code=2)[1]
    assert "cuda-graph needs a device of CUDA, got 'cpu'" in run("bench", "--cuda-graph", code=2)[1]
