"""How long Python takes to launch a training step's fused blocks on Triton's kernels, run and replayed; no GPU needed.

    python bench/host_time.py                                         ThresholdNet v1, HarDNet68 and DenseNet121, bf16
    python bench/host_time.py --model thresholdnet_v2 --out FILE      one network, and a JSON file
    python bench/host_time.py --quick                                 two small blocks, in half a minute
    python bench/host_time.py --cold                                  and the first step, with no kernel compiled before

The kernels are compiled for an H100 and launched by Triton's own launcher into a driver that does nothing
(bench/silent_driver.c), so the time is the processor's alone; tensors lie on the CPU, small ones, since their size
changes no launch's time. Torch's operations run on the CPU here: on a GPU they would be launched instead.

Both ways, and replays that are submitted as CUDA graphs (THRESHOLDNET_REPLAY=graph), must launch the same kernels with
the same numbers: "differ" counts those that do not, apart from addresses; "graphs" how many hold the launches, and
"overlapping" those that may start before their predecessor has ended (THRESHOLDNET_PDL=1). A GPU step waits for Python
where this time is longer than the kernels'. The file:

    {"machine", "rows": [{"model", "launches", "overlapping", "graphs", "run_ms", "replayed_ms" (medians), "ratio",
     "differ", "first_s", "first_ahead_s"}]}: with --cold seconds where each kernel is compiled when its turn comes, and
    ahead
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fused_calls import activation_of, fused_calls, train, training_of
from silent import Silent

MODELS = ("thresholdnet_v1", "hardnet68", "densenet121")
ROUNDS = 41
OVERLAPS = 6  # position in the driver's log
WAYS = ("0", "1")  # THRESHOLDNET_REPLAY: every call runs; calls are replayed


def blocks_of(model: str) -> list[tuple[Any, list[Any], str]]:
    """Input shape, parameter shapes and plan of each fused block of a network; "": of two small ones."""
    from torch import nn

    from thresholdnet import ThresholdBlock, create_model

    settings: dict[str, Any] = {"fused": True, "backend": "native", "device": "meta"}
    if model:
        return fused_calls(create_model(model, num_classes=10, **settings), (2, 3, 32, 32))
    first = ThresholdBlock(16, growth_rate=8, num_layers=3, threshold=2, **settings)
    second = ThresholdBlock(first.out_channels, None, 8, unit="bottleneck", num_layers=3, threshold=2, **settings)
    return fused_calls(nn.Sequential(first, second), (2, 16, 8, 8))


def step_of(blocks: list[tuple[Any, list[Any], str]], activation: str) -> Callable[[], None]:
    """Forward and backward of blocks in bf16, one after the other."""
    import torch

    calls = [training_of(block, activation, torch.bfloat16, torch.bfloat16) for block in blocks]

    @torch.no_grad()
    def step() -> None:
        for call in calls:
            train(*call)

    return step


def measure(model: str, silent: Silent, folder: Path) -> dict[str, Any]:
    """One row; "" for the small blocks."""
    from thresholdnet import replay

    step = step_of(blocks_of(model), activation_of(model))
    taken: dict[str, list[float]] = {switch: [] for switch in WAYS}
    launched = {}
    for round_ in range(-replay.FIRST["cuda"], ROUNDS):  # in pairs: a machine's pace changes over seconds
        for switch in WAYS:
            os.environ["THRESHOLDNET_REPLAY"] = switch
            began = time.perf_counter()
            step()
            if round_ >= 0:
                taken[switch].append(1e3 * (time.perf_counter() - began))
            elif round_ == -1:
                launched[switch] = silent.launches_of(step, folder)
    run_ms, replayed_ms = (statistics.median(taken[switch]) for switch in WAYS)
    ran, replayed = (launched[switch] for switch in WAYS)
    os.environ["THRESHOLDNET_REPLAY"] = "graph"  # not timed: what the capture of launches takes, the driver decides
    step()
    before = silent.library.silent_graphs()
    together = silent.launches_of(step, folder)
    return {
        "model": model or "two small blocks",
        "launches": len(ran),
        "overlapping": sum(launch[OVERLAPS] != "0" for launch in ran),
        "graphs": silent.library.silent_graphs() - before,
        "run_ms": run_ms,
        "replayed_ms": replayed_ms,
        "ratio": run_ms / replayed_ms,
        "differ": differing(ran, replayed) + differing(ran, together),
    }


def first_step(model: str, switch: str) -> float:
    """Seconds of the first step of a process, with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"THRESHOLDNET_REPLAY": switch, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--first-of", model]
        return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def differing(run: list[list[str]], replayed: list[list[str]]) -> int:
    """Numbers that two logs do not share; addresses must both be some, and equally aligned."""
    wrong = abs(len(run) - len(replayed))
    for one, other in zip(run, replayed, strict=False):
        wrong += abs(len(one) - len(other))
        for ours, theirs in zip(one, other, strict=False):
            if min(len(ours), len(theirs)) > 8:  # more than 32 bits: an address
                wrong += int(ours, 16) % 16 != int(theirs, 16) % 16
            else:
                wrong += ours != theirs
    return wrong


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What there is to read."""
    cold = any("first_s" in row for row in rows)
    head = f"{'':20} {'launches':>8} {'graphs':>6} {'run':>9} {'replayed':>9} {'ratio':>6} {'differ':>6}"
    yield head + (f" {'first':>7} {'ahead':>7}" if cold else "")
    for row in rows:
        line = (
            f"{row['model']:20} {row['launches']:8} {row['graphs']:6} {row['run_ms']:6.1f} ms "
            f"{row['replayed_ms']:6.1f} ms {row['ratio']:6.2f} {row['differ']:6}"
        )
        yield line + (f" {row['first_s']:5.1f} s {row['first_ahead_s']:5.1f} s" if cold else "")


def run(options: argparse.Namespace) -> int:
    """Measure; exit code 1 where a replay launches anything else."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: the interpreter launches nothing")
    import torch

    from thresholdnet.bench.results import machine
    from thresholdnet.checkpoint import write_atomic
    from thresholdnet.checks import output_file

    if options.out is not None:
        output_file("out", options.out)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        silent = Silent(Path(folder))
        silent.install()
        if options.first_of is not None:
            step = step_of(blocks_of(options.first_of), activation_of(options.first_of))
            began = time.perf_counter()
            step()
            print(time.perf_counter() - began)
            return 0
        for model in [""] if options.quick else options.model or MODELS:
            row = measure(model, silent, Path(folder))
            if options.cold:
                row |= {"first_s": first_step(model, "0"), "first_ahead_s": first_step(model, "1")}
            rows.append(row)
            print(*(list(table(rows))[0 if len(rows) == 1 else -1 :]), sep="\n", flush=True)
    if options.out is not None:
        head = machine(device="cpu") | {"command": shlex.join(sys.argv)}
        write_atomic(options.out, (json.dumps({"machine": head, "rows": rows}, indent=1) + "\n").encode())
    return int(any(row["differ"] for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME", help="a network of the zoo; may repeat")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file as well")
    parser.add_argument("--quick", action="store_true", help="two small blocks instead")
    parser.add_argument("--cold", action="store_true", help="also the first step with an empty cache: minutes")
    parser.add_argument("--first-of", metavar="NAME", help=argparse.SUPPRESS)  # the process that --cold times
    try:
        return run(parser.parse_args(arguments))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
