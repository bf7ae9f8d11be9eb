"""bench/gpu.sh without a GPU: its rehearsal in the interpreter, budgets, what is killed and what is not begun."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "bench" / "gpu.sh"
if not SCRIPT.is_file():
    pytest.skip("run outside a checkout", allow_module_level=True)


@pytest.fixture
def script(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(CHECKOUT / "bench")
    spec = importlib.util.spec_from_file_location("bench_gpu", CHECKOUT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_gpu"]


def call(script, monkeypatch, steps, *arguments):
    monkeypatch.setattr(script, "interpreter_steps", lambda out: steps)
    monkeypatch.setattr(sys, "argv", ["gpu.sh", *map(str, arguments), "--interpreter"])
    return script.main()


def step(script, name, code, seconds=20.0, **options):
    return script.Step(name, (sys.executable, "-c", code), seconds, **options)


def test_the_rehearsal_leaves_results(tmp_path):
    """The tuner's three shapes through the interpreter, by the script itself."""
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(SCRIPT), str(tmp_path / "out"), "--interpreter", "--budget", "120", "--only", "tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"summary.json", "logs.tar.gz", "tuned-cpu-sm00.json"}
    summary = json.loads((out / "summary.json").read_text())
    (found,) = summary["steps"]
    assert (found["name"], found["rc"], found["log"]) == ("tune", 0, "01-tune.log") and summary["budget"] == 120
    assert "3 shapes measured" in found["tail"] and found["seconds"] <= summary["seconds"]
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert logs.getnames() == ["01-tune.log"]
    assert len(json.loads((out / "tuned-cpu-sm00.json").read_text())["rows"]) == 3


def test_steps_run_side_by_side(script, monkeypatch, tmp_path):
    """Each of two waits for what the other writes; the one behind them waits for both."""
    wait = "import pathlib, time\nwhile not pathlib.Path({0!r}).exists(): time.sleep(0.01)"
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    steps = [
        step(script, "one", f"open({first!r}, 'w')\n{wait.format(second)}", together=1),
        step(script, "two", f"open({second!r}, 'w')\n{wait.format(first)}", together=1),
        step(script, "behind", f"import os; assert os.path.exists({second!r})"),
    ]
    assert call(script, monkeypatch, steps, tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [(row["name"], row["rc"]) for row in rows] == [("one", 0), ("two", 0), ("behind", 0)]


def test_without_a_gpu_it_says_so(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "o")], capture_output=True, text=True, env=environment, timeout=90
    )
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    assert done.stderr == "error: gpu.sh needs a CUDA device, got none: --interpreter tries it without\n"


def test_steps_fail_end_and_wait_for_time(script, tmp_path, monkeypatch, capsys):
    left = tmp_path / "left"
    child = f"import time; time.sleep(1.5); open({str(left)!r}, 'w')"
    steps = [
        step(script, "good", "print('fine')"),
        step(script, "bad one", "import sys; sys.exit('wrong')"),
        step(script, "slow", f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
             "print('began'); time.sleep(60)", 0.7),
        script.Step("absent", ("no-such-command-here",), 20.0),
        step(script, "long", "pass", 500.0, least=500.0),
        step(script, "short", "print('still done')"),
    ]  # fmt: skip
    assert call(script, monkeypatch, steps, tmp_path / "out", "--budget", "60") == 1
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [(row["name"], row["rc"]) for row in rows] == [
        ("good", 0), ("bad one", 1), ("slow", script.KILLED), ("absent", 127), ("long", None), ("short", 0)
    ]  # fmt: skip
    assert "fine" in rows[0]["tail"] and "wrong" in rows[1]["tail"] and "began" in rows[2]["tail"]
    assert 0.7 <= rows[2]["seconds"] < 10 and rows[4]["tail"] == ""
    said = capsys.readouterr().out
    assert "slow: stopped at its budget" in said and "long: not begun, too little time left" in said
    time.sleep(1.6)
    assert not left.exists(), "what a step started ends with it"


def test_a_stopped_step_is_no_failure(script, tmp_path, monkeypatch):
    steps = [step(script, "slow", "import time; time.sleep(60)", 0.3), step(script, "other", "pass")]
    assert call(script, monkeypatch, steps, tmp_path, "--only", "slow") == 0
    assert [row["name"] for row in json.loads((tmp_path / "summary.json").read_text())["steps"]] == ["slow"]


def test_the_steps_of_a_gpu(script, tmp_path, monkeypatch):
    """Their commands exist, and their budgets leave room: the first ones fit in the ten minutes of a lent machine."""
    from thresholdnet.kernels import tuned

    from thresholdnet import bench

    monkeypatch.setattr(tuned, "identity", lambda device: ("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    steps = script.gpu_steps(tmp_path)
    assert [s.name for s in steps][:5] == ["machine", "build", "info", "tests", "selftest native bf16"]
    assert {s.command[2] for s in steps if s.command[0] == "compute-sanitizer"} == {"memcheck", "racecheck"}
    assert "tests/test_graphs.py" in script.gpu_tests()
    for s in steps:
        if "--filter" not in s.command:
            continue
        pattern = s.command[s.command.index("--filter") + 1]
        assert bench.select("gpu", pattern=pattern), s.name
        named = [b for a, b in zip(s.command, s.command[1:], strict=False) if a == "--provider"]
        assert set(named) <= set(bench.PROVIDERS), s.name
    names = [s.name for s in steps]
    first = steps[: names.index("bench train 32 v1") + 1]
    alone = sum(s.seconds for s in first if not s.together)
    groups = {s.together for s in first} - {0}
    assert alone + sum(max(s.seconds for s in first if s.together == group) for group in groups) <= script.BUDGET
    assert not any(s.together for s in steps if s.name.startswith(("bench", "tune", "questions", "build")))
    assert names.index("questions") < names.index("tune 224 v1") < names.index("tune")
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    assert not [s for s in script.gpu_steps(tmp_path) if s.command[0] == "compute-sanitizer"]


def test_a_kit_takes_the_place_of_building(script, tmp_path, monkeypatch, capsys):
    """Libraries come into the checkout, kernels where Triton looks for them, and nothing is built."""
    pytest.importorskip("triton")
    checkout, kit = tmp_path / "checkout", tmp_path / "kit"
    (checkout / "thresholdnet").mkdir(parents=True)
    (kit / "triton" / "key").mkdir(parents=True)
    (kit / "triton" / "key" / "conv.cubin").write_text("a kernel")
    there = json.dumps({"child_paths": {"conv.cubin": str(kit / "triton" / "key" / "conv.cubin")}})
    (kit / "triton" / "key" / "__grp__conv.json").write_text(there)
    monkeypatch.setattr(script.gpu_kit, "ROOT", checkout)
    library = checkout / "thresholdnet" / "_csrc.abi3.so"
    library.write_text("a library")
    assert script.gpu_kit.pack(kit) == (kit / "kit.tar.xz", ["_csrc.abi3.so"])
    assert sorted(path.name for path in kit.iterdir()) == ["kit.tar.xz", "triton"]
    library.unlink()
    code = """import json, os, pathlib
key = pathlib.Path(os.environ["TRITON_CACHE_DIR"], "key")
(file,) = json.loads((key / "__grp__conv.json").read_text())["child_paths"].values()
assert file == str(key / "conv.cubin")
print(pathlib.Path(file).read_text())"""
    steps = [step(script, "build", "raise SystemExit('nothing to build')"), step(script, "use", code)]
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # put back behind the test
    assert call(script, monkeypatch, steps, tmp_path / "out", "--kit", kit) == 0
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert row["name"] == "use" and "a kernel" in row["tail"] and library.read_text() == "a library"
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert logs.getnames() == ["01-use.log"]
    assert "another build of Triton" not in capsys.readouterr().err
    monkeypatch.setattr(script.gpu_kit, "triton_key", lambda: "another")
    assert call(script, monkeypatch, steps, tmp_path / "out", "--kit", kit) == 0
    assert "made by another build of Triton" in capsys.readouterr().err
    (kit / "kit.tar.xz").write_text("no archive")
    for wrong in (kit, tmp_path):
        assert call(script, monkeypatch, steps, tmp_path / "none", "--kit", wrong) == 2
        assert f"error: kit must be a folder of bench/gpu_kit.py, got {wrong} (" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
