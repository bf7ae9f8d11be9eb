"""Where the time of a step goes on a GPU, kernel by kernel: the step as a CUDA graph, its kernels as CUPTI times them.

    python bench/kernel_times.py --out FILE                              v1, 128 images of 224 pixels, bf16, training
    python bench/kernel_times.py --out FILE --case 'hardnet68 128x224 train' --case 'thresholdnet_v1 100x32 infer'
    python bench/kernel_times.py --out FILE --provider fused_triton      providers of `thresholdnet bench`; may repeat
    python bench/kernel_times.py --read FILE                             the tables of a file, nothing measured

Nothing is checked here: `thresholdnet bench` and `thresholdnet selftest` do. The file, written after every step:

    {"machine", "rows": [{"model", "image", "batch", "dtype", "mode", "provider", "graph" (false, with "why", where the
    step could not be captured and ran as it is), "ms" (the median), "busy_ms" (its kernels' times together),
    "kernels": [{"name", "calls", "us"}, slowest first], "launches": [[number in "kernels", start in us, us, grid,
    block], ...], "reason" (why there is no time)}]}
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 15
PROVIDERS = ("eager_channels_last", "fused_native", "fused_triton")
LONGEST = 110  # characters of a kernel's name in a table


def measure(case: Any, provider: str) -> dict[str, Any]:
    """One row."""
    import torch

    from thresholdnet.bench import providers, rounds
    from thresholdnet.bench.clock import EventClock
    from thresholdnet.bench.measure import images_of, network

    device = torch.device("cuda")
    runner = providers.build(provider, network(case, device), images_of(case, device), case)
    runner.step()
    providers.check_fused(runner)
    why = None
    try:
        runner = providers.Graphed(runner)
    except RuntimeError as error:  # a step that cannot be captured has kernels too
        why = rounds.reason(error)
    clock = EventClock(device)
    times = [clock(runner.step) for _ in range(ROUNDS + 3)][3:]
    launches = launches_of(runner.step)
    found: dict[str, list[float]] = {}
    for launch in launches:
        found.setdefault(launch["name"], []).append(launch["us"])
    names = sorted(found, key=lambda name: -sum(found[name]))
    number = {name: index for index, name in enumerate(names)}
    return {
        "graph": why is None,
        "why": why,
        "ms": statistics.median(times),
        "busy_ms": sum(launch["us"] for launch in launches) / 1e3,
        "kernels": [{"name": name, "calls": len(found[name]), "us": round(sum(found[name]), 1)} for name in names],
        "launches": [
            [number[each["name"]], each["start"], each["us"], each["grid"], each["block"]] for each in launches
        ],
    }


def launches_of(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels and copies of one call in the order of their starts."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda event: event["ts"])
    first = events[0]["ts"] if events else 0.0
    return [
        {
            "name": event["name"],
            "start": round(event["ts"] - first, 1),
            "us": event["dur"],
            "grid": event["args"].get("grid", []),
            "block": event["args"].get("block", []),
        }
        for event in events
    ]


def table(row: dict[str, Any], longest: int) -> list[str]:
    """A row as text, its slowest kernels first."""
    head = f"{row['model']} {row['batch']}x{row['image']} {row['dtype']} {row['mode']} {row['provider']}: "
    if row["reason"]:
        return [head + f"no time: {row['reason']}"]
    calls = sum(kernel["calls"] for kernel in row["kernels"])
    lines = [head + f"{row['ms']:.3f} ms, {calls} launches, busy {row['busy_ms']:.3f} ms"]
    if not row["graph"]:
        lines.append(f"  not as a graph: {row['why']}")
    for kernel in row["kernels"][:longest]:
        share = kernel["us"] / max(row["busy_ms"], 1e-9) / 10
        lines.append(f"  {kernel['us']:9.1f} us {share:5.1f} % {kernel['calls']:5} x {kernel['name'][:LONGEST]}")
    return lines


def case_of(text: str, dtype: str) -> Any:
    """ "MODEL BATCHxSIDE MODE" as a case."""
    from thresholdnet.bench.cases import Case

    try:
        model, size, mode = text.split()
        batch, side = map(int, size.split("x"))
    except ValueError:
        raise ValueError(f"case must be 'MODEL BATCHxSIDE MODE', got {text!r}") from None
    return Case(model, side, batch, dtype, mode)


def run(options: argparse.Namespace) -> int:
    """Measure, or read."""
    if options.read is not None:
        for found in json.loads(options.read.read_text())["rows"]:
            print(*table(found, options.longest), sep="\n")
        return 0
    import torch

    from thresholdnet.bench import rounds
    from thresholdnet.bench.providers import known
    from thresholdnet.bench.results import machine
    from thresholdnet.checkpoint import write_atomic
    from thresholdnet.checks import output_file

    if options.out is None:
        raise ValueError("out must name a file, got none")
    cases = [case_of(text, options.dtype) for text in options.case or ["thresholdnet_v1 128x224 train"]]
    providers = known(options.provider or PROVIDERS)
    if not torch.cuda.is_available():
        raise RuntimeError("kernel times need a CUDA device, got none")
    output_file("out", options.out)
    rows: list[dict[str, Any]] = []
    head = {"machine": machine(device="cuda") | {"command": shlex.join(sys.argv)}}
    for case in cases:
        for provider in providers:
            row: dict[str, Any] = {**case.fields, "provider": provider, "reason": None}
            try:
                row |= measure(case, provider)
            except Exception as error:  # whatever a compiler or the GPU raises is the reason in that row
                row["reason"] = rounds.reason(error)
            rows.append(row)
            print(*table(row, options.longest), sep="\n", flush=True)
            write_atomic(options.out, (json.dumps(head | {"rows": rows}, separators=(",", ":")) + "\n").encode())
            torch.cuda.empty_cache()
    return int(any(row["reason"] for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file")
    parser.add_argument("--read", type=Path, metavar="FILE", help="print the tables of this file, and stop")
    parser.add_argument("--case", action="append", metavar="TEXT", help="MODEL BATCHxSIDE MODE; may repeat")
    parser.add_argument("--provider", action="append", metavar="NAME", help="may repeat")
    parser.add_argument("--dtype", default="bf16", help="of weights and images")
    parser.add_argument("--longest", type=int, default=12, metavar="N", help="kernels in a table")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
