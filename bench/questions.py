"""Questions about the kernels that only a GPU answers, each by variants of the same work, timed in turn.

    python bench/questions.py --out FILE                  all questions, on an idle GPU: the zoo, bf16, batch 128
    python bench/questions.py --list                      the cases, and stop
    python bench/questions.py --out FILE --filter halo    cases whose text holds this regular expression
    python bench/questions.py --out FILE --budget 90      no case is begun after so many seconds
    python bench/questions.py --out FILE --interpreter    on a CPU: tiny shapes in Triton's interpreter, a rehearsal

`variants.py` holds the questions:

    l2          bytes a second out of the L2 cache, and out of memory
    vector      copies of 8 elements against 4
    grouping    2x2 pixels a row of the product against one, by growth
    halo        the CUDA convolutions against Triton's
    readers     the gradient of 1x1 readers in groups of 1, 2, 4
    layout      a tensor for each slot against pixel rows of all slots
    alignment   slots padded to 8, 16, 64 channels
    activated   BatchNorm and activation before a 3x3: a pass, or on load

What is not asked, because the package has no such form: a gathered gradient of 1x1 readers over slots of different rows
(it takes "rows" alone), and the own CUDA kernels with an affine in front of a 3x3 (the library convolves there).

A variant is checked before it is timed; one that is wrong or cannot run leaves its reason and no time. Every round runs
all variants of a case, each behind an overwritten cache, on a GPU as a CUDA graph. The file is written after each case:

    {"machine", "interpreter", "records": [{"question", "case", "variant", "device", "ms" (the median), "ms_low" and
    "ms_high" (percentiles 20 and 80), "rate", "unit", "ratio", "error", "bound", "reason"}]}

ratio: the base's time, that of a case's first variant, over this one's, paired by round; above 1 is faster. error: the
one nearest to its bound, root mean square relative to the truth's. "device" tells times of the interpreter apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 41


def measure(comparison: Any, device: Any) -> list[dict[str, Any]]:
    """The records of one case."""
    import torch

    from thresholdnet.bench import Settings, micro, rounds
    from thresholdnet.bench.arithmetic import paired_ratio, spread
    from thresholdnet.bench.clock import clock_for

    gpu = device.type == "cuda"
    with torch.no_grad():
        truth, allowed, variants = comparison.ask(device)
        entries = [rounds.Entry(name, graph=gpu) for name in variants]
        for entry in entries:
            try:
                micro.admit(entry, variants[entry.provider], truth, allowed)
            except Exception as error:  # whatever a compiler raises is the reason in that record
                entry.said["reason"] = rounds.reason(error)
        settings = Settings(ROUNDS if gpu else 1, 3 if gpu else 0, device.type)
        conditions = rounds.run(entries, settings, clock_for(device, cold=gpu), lambda text, share: None)
    records = []
    for entry in entries:
        checks = entry.said.get("check", [])
        worst = max(checks, key=_nearness, default={"error": None, "bound": None})
        if worst["error"] is not None and not math.isfinite(worst["error"]):
            worst = worst | {"error": None}  # JSON has no NaN
        record: dict[str, Any] = {
            "question": comparison.question, "case": comparison.case, "variant": entry.provider,
            "device": torch.cuda.get_device_name(device) if gpu else "Triton's interpreter",
            "ms": None, "ms_low": None, "ms_high": None, "rate": None, "unit": comparison.unit, "ratio": None,
            **worst, "reason": entry.said.get("reason"), **conditions,
        }  # fmt: skip
        if entry.times:
            found = spread(entry.times)
            record |= {"ms": found["median"], "ms_low": found["p20"], "ms_high": found["p80"]}
            record["rate"] = comparison.work / found["median"]
            if entries[0].times:
                record["ratio"] = paired_ratio(entries[0].times, entry.times)["median"]
        records.append(record)
    return records


def _nearness(found: dict[str, float]) -> tuple[bool, float]:
    """Orders errors by how near they are to their bounds; one beyond it, NaN too, is the nearest."""
    return not found["error"] <= found["bound"], found["error"] - found["bound"]


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A case as text: its name, and a line for each variant."""
    text = [f"{records[0]['question']}: {records[0]['case']} ({records[0]['device']})"]
    for record in records:
        if record["ms"] is None:
            text.append(f"  {record['variant']:24} no time: {record['reason']}")
            continue
        ratio = "" if record["ratio"] is None else f"x{record['ratio']:.2f}"
        spread = f"{record['ms']:.4g} ms ({record['ms_low']:.4g} to {record['ms_high']:.4g})"
        text.append(
            f"  {record['variant']:24} {spread:32} {record['rate']:8.4g} {record['unit']:8} {ratio:7} "
            f"error {record['error']:.1e}"
        )
    return text


def answer(options: argparse.Namespace) -> int:
    """Measure what was asked; returns the exit code, 1 where a variant is wrong or a case failed."""
    if options.out is None and not options.list:
        raise ValueError("out must name a file, got none")
    if options.interpreter:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import variants

    from thresholdnet.bench import rounds
    from thresholdnet.bench.results import machine
    from thresholdnet.checkpoint import write_atomic
    from thresholdnet.checks import output_file

    sizes = variants.TINY if options.interpreter else variants.GPU
    asked = [case for question in variants.QUESTIONS for size in sizes for case in question(size)]
    try:
        asked = [case for case in asked if re.search(options.filter, str(case))]
    except re.error as error:
        raise ValueError(f"filter must be a regular expression, got {options.filter!r}: {error}") from None
    if options.list:
        print(*asked, sep="\n")
        return 0
    if not asked:
        raise ValueError(f"filter must leave a case, got {options.filter!r}: --list prints them")
    if not (options.interpreter or torch.cuda.is_available()):
        raise RuntimeError("questions need a CUDA device, got none: --interpreter tries the tool without")
    device, started, failed = torch.device("cpu" if options.interpreter else "cuda"), time.monotonic(), False
    head = {"machine": machine(device=device.type) | {"command": shlex.join(sys.argv)}}
    head["interpreter"] = options.interpreter
    if options.interpreter:
        print("Times of Triton's interpreter on a CPU: they say nothing about a GPU.")
    records: list[dict[str, Any]] = []
    output_file("out", options.out)
    for index, case in enumerate(asked):
        if time.monotonic() - started > options.budget:
            print(f"the budget of {options.budget:g} s is spent: {len(asked) - index} of {len(asked)} cases left")
            break
        try:
            found = measure(case, device)
        except Exception as error:  # such as memory that runs out: the other cases are worth their time
            print(f"{case}\n  no answer: {rounds.reason(error)}", flush=True)
            failed = True
            continue
        failed |= any((record["reason"] or "").startswith("wrong") for record in found)
        records += found
        print(*lines(found), sep="\n", flush=True)
        write_atomic(options.out, (json.dumps(head | {"records": records}, indent=1) + "\n").encode())
    print(f"{len(records)} records: {options.out}")
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file")
    parser.add_argument("--filter", default="", metavar="RE", help="cases, as --list prints them, that hold this")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="no case is begun after them")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--interpreter", action="store_true", help="tiny shapes on the CPU in Triton's interpreter")
    options = parser.parse_args(arguments)
    try:
        return answer(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
