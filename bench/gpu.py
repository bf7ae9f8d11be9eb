"""What a GPU is wanted for, most valuable first, in at most ten minutes and without network; all results below OUT.

    bench/gpu.sh OUT                 build, check, sanitize, measure, tune, ask
    bench/gpu.sh OUT --list          the steps with their seconds, and stop
    bench/gpu.sh OUT --only bench    the steps whose name holds this; may repeat
    bench/gpu.sh OUT --kit FOLDER    with what bench/gpu_kit.py made elsewhere: kernels, and libraries: no build
    bench/gpu.sh OUT --interpreter   what of it runs on a CPU, Triton's interpreter in the GPU's place, on tiny shapes

A step has a budget and is killed at its end; what it wrote by then counts. No step is begun that the time left does not
hold. OUT gets a few plain files, as a machine that is lent for minutes returns them:

    summary.json    {"machine", "seconds", "budget", "steps": [{"name", "rc", "seconds", "log", "tail"}]}; rc null: not
                    begun, -9: killed at its budget; log: its name in logs.tar.gz; tail: the end of it
    logs.tar.gz     everything that the steps printed
    bench.json, bench-compile.json   `thresholdnet bench`, read by `thresholdnet bench --report`
    bench-together.json   the same with replays whose launches are submitted as graphs
    bench-overlap.json    the same with kernels that start while their predecessors end
    questions.json  the answers of bench/questions.py
    tuned-<gpu>-sm<NN>.json   the launch table of bench/tune.py; goes to kernels/tuned/ once somebody has looked at it

The exit code is 1 if a step failed; one that its budget ended has not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_kit

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 570.0  # seconds: a lent machine ends a command after 600
RESERVE = 5.0  # of them, for packing
MODELS = ("thresholdnet_v1", "hardnet68", "densenet121")  # whose compilers' caches are filled first
GRAPH = ("--cuda-graph", "--rounds", "7", "--warmup", "2")
TAIL = 3000  # characters of a log in the summary
KILLED = -9


@dataclass(frozen=True)
class Step:
    """A command with the seconds that it may take and, less than which left, it is not worth beginning.

    together: it runs side by side with its neighbours of the same number, 0 alone: what is no measurement keeps many
    cores busy, as far as the GPU's memory holds it all.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    together: int = 0


def gpu_steps(out: Path) -> list[Step]:
    """The steps on a GPU, in order of value."""
    import torch
    from thresholdnet.kernels import tuned

    python = sys.executable
    gpu, capability = tuned.identity(torch.device("cuda"))
    architecture = {"TORCH_CUDA_ARCH_LIST": f"{capability[0]}.{capability[1]}", "THRESHOLDNET_FORCE_CUDA": "1"}
    command = (python, "-m", "thresholdnet")
    bench = (*command, "bench", "--preset", "gpu")
    ours = ("fused_native", "fused_triton", "fused_triton_recompute")
    table = out / f"tuned-{tuned.file_name(gpu, capability)}"
    tune = (python, "bench/tune.py", "--out", str(table), "--json")
    questions = (python, "bench/questions.py", "--out", str(out / "questions.json"))
    few = {"OMP_NUM_THREADS": "2"}
    side_by_side = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    # Without its caching, each tensor is an allocation of its own: a step past its end is seen.
    bare = few | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_DISABLE_LINE_INFO": "0"}

    def measured(pattern: str, providers: tuple[str, ...], *more: str, file: str = "bench.json") -> tuple[str, ...]:
        named = (part for name in providers for part in ("--provider", name))
        return (*bench, "--out", str(out / file), "--filter", pattern, *named, *more)

    def warm(pattern: str, provider: str, together: int, how: str = "", **environment: str) -> Step:
        """Fills the caches of a compiler, and checks what it made."""
        name = f"warm{how} {provider} {re.sub('[^a-z0-9_]+', ' ', pattern)}"
        file = Path(tempfile.gettempdir()) / f"{name.replace(' ', '-')}-{os.getpid()}.json"  # nobody reads it
        made = measured(pattern, (provider,), "--rounds", "0", file=str(file))
        seconds = 170 if provider == "compile" else 90  # 100 were too few for torch.compile, three at once
        return Step(name, made, seconds, environment=few | environment, together=together)

    checks = [
        Step("info", (*command, "info"), 30),
        # said one by one: what has passed when the budget ends counts
        Step("tests", (python, "-m", "pytest", "-vv", "-m", "gpu", "--no-header", *side_by_side, *gpu_tests()), 170),
        *(
            Step(f"selftest {name} {dtype}", (*command, "selftest", "--json", "--backend", name, "--dtype", dtype), 90)
            for name in ("native", "triton")
            for dtype in ("bf16", "fp16", "fp32")
        ),
        *(
            Step(f"{tool} {name}", ("compute-sanitizer", "--tool", tool, python, "bench/one_block.py", name), 90)
            for tool in ("memcheck", "racecheck")
            for name in ("native", "triton")
        ),
    ]
    steps = [
        Step("machine", ("nvidia-smi",), 20),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 180, 30, architecture),
        *(
            replace(step, environment=bare if "compute-sanitizer" in step.command else few, together=1)
            for step in checks
        ),
        *(warm(rf"{model} 128x224.* train", "compile", 1) for model in MODELS),
        warm(rf"{MODELS[0]} 128x224.* infer", "compile", 1),
        *(warm(rf"{model} 128x224.* train", "fused_triton", 2) for model in MODELS),
        warm(rf"{MODELS[0]} 100x32.* train", "fused_triton", 2),
        warm(rf"{MODELS[0]} (128x224|100x32).* train", "fused_triton", 2, " overlap", THRESHOLDNET_PDL="1"),
        Step("bench train 224 v1", measured(r"v1 128x224.* train", ("eager_channels_last", *ours), *GRAPH), 60, 20),
        Step("bench train 32 v1", measured(r"v1 100x32.* train", ("eager_channels_last", *ours[:2]), *GRAPH), 50, 20),
        *(
            Step(
                f"bench {name}",
                measured(
                    r"v1 (128x224|100x32).* train", ("eager_channels_last", "fused_triton"), *GRAPH,
                    file=f"bench-{name}.json",
                ),
                60, 20, environment,
            )
            for name, environment in (
                ("together", {"THRESHOLDNET_REPLAY": "graph"}), ("overlap", {"THRESHOLDNET_PDL": "1"}),
            )
        ),
        Step(
            "bench train 224",
            measured(r"(v2|hardnet68|densenet121) 128x224.* train", ("eager_channels_last", *ours), *GRAPH), 120, 20,
        ),
        Step(
            "bench infer",
            measured(r"v1 128x224.* infer", ("eager_channels_last", "eager_folded", "compile", *ours[:2]), *GRAPH),
            50, 20,
        ),
        # in a file of their own: a case that is measured again takes the place of its earlier rows
        *(
            Step(
                f"bench compile {model}",
                measured(
                    rf"{model} 128x224.* train", ("eager_channels_last", "compile", "fused_triton"), *GRAPH,
                    file="bench-compile.json",
                ),
                60, 25,
            )
            for model in MODELS
        ),
        Step(
            "bench train 32 densenet40",  # layers without bottlenecks
            measured(
                "train", ("eager_channels_last", *ours[:2]), *GRAPH,
                "--model", "densenet40", "--batch", "64", "--image", "32",
            ),
            60, 20,
        ),
        *(
            Step(
                f"convert {name}",  # residual dense blocks: layers without BatchNorm
                (
                    *command, "convert", f"foreign:{name}", "--path", "tests", "--shape", "16", "64", "64", "64",
                    *given, "--dtype", "bf16", "--rounds", "7", "--out", str(out / f"convert-{name}.json"),
                ),
                50, 25,
            )
            for name, given in (
                ("ResidualFused", ("--model-arg", "read=64", "--model-arg", "k=64", "--model-arg", "depth=8")),
                ("ResidualDense", ("--model-arg", "read=64", "--model-arg", "k=32")),
            )
        ),
        Step(
            "convert volumes",  # in cuDNN's convolutions, our passes around them
            (
                *command, "convert", "thresholdnet:create_model", "--model-arg", "name=densenet121",
                "--model-arg", "spatial_dims=3", "--model-arg", "in_chans=1", "--shape", "4", "1", "96", "96",
                "--depth", "96", "--dtype", "bf16", "--rounds", "7", "--out", str(out / "convert-volumes.json"),
            ),
            60, 25,
        ),
        # what eager gains by cuDNN's own measuring, which takes its time
        Step(
            "bench cudnn",
            measured(
                r"v1 (128x224|100x32).* train", ("eager_channels_last", "eager_cudnn_benchmark", "fused_triton"),
                *GRAPH, file="bench-cudnn.json",
            ),
            120, 40,
        ),
        Step("questions", (*questions, "--budget", "45"), 55, 20),
        # grouping or not, table kernel or gather + library, halo or implicit product: at the widths that decide it
        Step("tune 224 v1", (*tune, "--model", "thresholdnet_v1", "--size", "128x224", "--budget", "60"), 75, 20),
        Step("tune", (*tune, "--budget", "100"), 115, 20),
    ]  # fmt: skip
    if shutil.which("compute-sanitizer") is None:
        steps = [step for step in steps if step.command[0] != "compute-sanitizer"]
    return steps


def interpreter_steps(out: Path) -> list[Step]:
    """What of the steps a CPU can run, with Triton's interpreter in the GPU's place, on tiny shapes."""
    python = sys.executable
    command = (python, "-m", "thresholdnet")
    interpreted = {"TRITON_INTERPRET": "1"}
    tune = (python, "bench/tune.py", "--interpreter", "--out", str(out / "tuned-cpu-sm00.json"), "--json")
    bench = (*command, "bench", "--preset", "quick", "--mode", "infer", "--rounds", "1", "--warmup", "0")
    questions = (python, "bench/questions.py", "--interpreter", "--out", str(out / "questions.json"))
    providers = ("--provider", "eager", "--provider", "fused_native", "--out", str(out / "bench.json"))
    return [
        Step("info", (*command, "info"), 60),
        Step("tune", tune, 90, environment=interpreted),
        Step("bench", (*bench, *providers), 90),
        Step("questions", questions, 180),
        Step("tests", (python, "-m", "pytest", "-m", "gpu", "--no-header", *gpu_tests()), 90),
    ]


def gpu_tests() -> list[str]:
    """The files that hold tests for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if "needs_gpu" in file.read_text()]


def run(step: Step, seconds: float, log: Path) -> int:
    """A step's exit code; its whole process group is killed after `seconds`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | step.environment
    with log.open("w") as to:
        print("$", *step.command, flush=True, file=to)
        try:
            process = subprocess.Popen(
                step.command, stdout=to, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            print(f"error: {error}", file=to)
            return 127
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return KILLED
        finally:  # also what a step left running, and at Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for all results")
    parser.add_argument("--interpreter", action="store_true", help="on a CPU, in Triton's interpreter, on tiny shapes")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="steps whose name holds this")
    parser.add_argument("--kit", type=Path, metavar="FOLDER", help="of bench/gpu_kit.py: nothing is built here")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    options = parser.parse_args()
    started = time.monotonic()
    out: Path = options.out.resolve()
    sys.path.insert(0, str(ROOT))
    if not options.interpreter:
        import torch

        if not torch.cuda.is_available():
            print("error: gpu.sh needs a CUDA device, got none: --interpreter tries it without", file=sys.stderr)
            return 2
    steps = interpreter_steps(out) if options.interpreter else gpu_steps(out)
    steps = [step for step in steps if not options.only or any(name in step.name for name in options.only)]
    if options.kit:
        steps = [step for step in steps if step.name != "build"]
    if options.list:
        for step in steps:
            print(f"{step.name}: {step.seconds:g} s")
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as unpacked:
        if options.kit:
            try:
                os.environ["TRITON_CACHE_DIR"] = str(gpu_kit.unpack(options.kit, Path(unpacked)))
            except (OSError, tarfile.TarError) as error:
                print(f"error: kit must be a folder of bench/gpu_kit.py, got {options.kit} ({error})", file=sys.stderr)
                return 2
        out.mkdir(parents=True, exist_ok=True)
        numbers = {id(step): number for number, step in enumerate(steps, start=1)}

        def done(step: Step) -> dict[str, Any]:
            log = Path(folder) / f"{numbers[id(step)]:02}-{re.sub('[^a-z0-9_]+', '-', step.name)}.log"
            left = options.budget - RESERVE - (time.monotonic() - started)
            begun, code = time.monotonic(), None
            if left >= min(step.least, step.seconds):
                code = run(step, min(step.seconds, left), log)
            seconds = time.monotonic() - begun
            text = log.read_text(errors="replace") if log.exists() else ""
            print(f"{step.name}: {_said(code)}, {seconds:.1f} s", flush=True)
            return {"name": step.name, "rc": code, "seconds": round(seconds, 1), "log": log.name, "tail": text[-TAIL:]}

        for together, some in itertools.groupby(steps, key=lambda step: step.together):
            group = list(some)
            with ThreadPoolExecutor(len(group) if together else 1) as pool:
                for row in pool.map(done, group):
                    rows.append(row)
                    _write(out, Path(folder), rows, options.budget, time.monotonic() - started)
    print(f"written: {out / 'summary.json'}")
    return int(any(row["rc"] not in (0, None, KILLED) for row in rows))


def _said(code: int | None) -> str:
    return {None: "not begun, too little time left", 0: "ok", KILLED: "stopped at its budget"}.get(code, f"rc {code}")


def _write(out: Path, logs: Path, rows: list[dict[str, Any]], budget: float, seconds: float) -> None:
    """Summary and logs, after every step: whoever stops this script keeps what there is."""
    from thresholdnet.checkpoint import write_atomic

    machine = {"python": sys.version.split()[0], "node": os.uname().nodename, "cpus": os.cpu_count()}
    summary = {"machine": machine, "seconds": round(seconds, 1), "budget": budget, "steps": rows}
    write_atomic(out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    packed = out / "logs.tar.gz.tmp"
    with tarfile.open(packed, "w:gz") as archive:
        for log in sorted(logs.iterdir()):
            archive.add(log, log.name)
    packed.replace(out / "logs.tar.gz")


if __name__ == "__main__":
    sys.exit(main())
