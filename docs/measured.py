"""What was measured, as Markdown: tables made from the files of bench/results when a page is built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thresholdnet.bench import report, results
from thresholdnet.bench.targets import BASE, OURS, TARGETS, share

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

SINCE = {
    "bench/results/epyc-2core/2026-11-24-micro-v1.json": (
        "Measured before the C++ weight gradient (`csrc/cpu/weight_gradient.h`): those of 3x3 and 1x1 layers are the "
        "library's here, over gathered links."
    )
}
"""What changed after a run was measured, by its file."""


def runs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every file of `thresholdnet bench`, new ones first: how its pictures' names begin, its path, its contents."""
    files = [file for file in RESULTS.glob("*/*.json") if "machine" in json.loads(file.read_text())]
    for file in sorted(files, key=lambda file: file.name, reverse=True):
        yield f"{file.parent.name}-{file.stem}", str(file.relative_to(RESULTS.parents[1])), results.read(file)


def measured_runs(drawn: Mapping[str, Sequence[str]]) -> str:
    """A section for every run: where, the pictures, our steps with wins and losses, and all rows folded away.

    Args:
        drawn: per run, by the beginning of its pictures' names, those pictures.
    """
    return "\n\n".join(_run(drawn[begin], path, found) for begin, path, found in runs())


def _run(drawn: Sequence[str], path: str, found: Mapping[str, Any]) -> str:
    machine, rows = found["machine"], found["rows"]
    steps, operations = _timed(rows), _timed(found["layers"])
    counts = [_count(some, what) for some, what in ((steps, "steps"), (operations, "operations of layers")) if some]
    whole = report.markdown(found, Path(path).name)
    folded = re.sub("^### (.*)$", r"**\1**", whole, flags=re.MULTILINE).replace("\n", "\n    ")
    changed = " with local changes" if machine.get("dirty") else ""
    head = ("step", "case", "provider", f"speed against {BASE} (p20 to p80)", "kept", "verdict")
    return "\n".join(
        [
            f"### {machine.get('gpu') or machine['cpu']}, {Path(path).stem}",
            "",
            f"`{path}`, written by `{machine['command']}` with torch {machine['torch']} at commit "
            f"`{str(machine['commit'])[:10]}`{changed}. {' '.join(counts)}",
            "",
            *((SINCE[path], "") if path in SINCE else ()),
            *(f"![Measured: {name}](images/{name})" for name in drawn),
            "",
            *(_table(head, [_ours(row, rows) for row in steps]) if steps else ()),
            "",
            '??? note "All rows, with times, rivals and targets"',
            "",
            f"    {folded}",
        ]
    )


def _timed(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Our rows that were timed beside plain torch."""
    return [row for row in rows if row["provider"].startswith(OURS) and report.base(row) in (row["ratios"] or {})]


def _count(timed: Sequence[Mapping[str, Any]], what: str) -> str:
    ratios = [row["ratios"][report.base(row)] for row in timed]
    won, close = sum(ratio["median"] > 1 for ratio in ratios), sum(map(report.in_the_noise, ratios))
    return (
        f"Of {len(timed)} timed {what} of ours, {won} are faster than {BASE} and {len(timed) - won} are not; of "
        f"{close}, 1 lies between p20 and p80 of the rounds."
    )


def _ours(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    speed, kept = row["ratios"][report.base(row)], share(row, rows, "saved_bytes")
    verdicts = [report.verdict(row)]
    for target in TARGETS:
        value = target.got(row, rows) if target.means(row) else None
        if value is not None:
            verdicts.append(f"{target.what.removesuffix('_bytes')}: {target.verdict(value)}")
    return [
        row["mode"],
        report.case(row),
        report.label(row),
        f"{speed['median']:.2f} ({speed['p20']:.2f} to {speed['p80']:.2f})",
        "-" if kept is None else f"{kept:.2f}",
        ", ".join(verdicts),
    ]


PROVIDERS = {"eager": BASE, "fused": f"{OURS}_triton", "fused, recompute": f"{OURS}_triton_recompute"}
"""Who of the bench ran what an account of memory counts, on a GPU."""


def memory() -> str:
    """Bytes kept by every account of bench/results/memory, and the peaks that a GPU measured of the same steps."""
    lines = []
    for file in sorted((RESULTS / "memory").glob("*.json")):
        modes = json.loads(file.read_text())
        for mode, entry in modes.items():
            if mode == "fused, recompute" and entry == modes["fused"]:
                continue  # no bottleneck units
            kept = f"{entry['kept'] / 2**20:,.0f} ({entry['kept'] / modes['eager']['kept']:.2f})"
            lines.append([f"`{file.stem}`", mode, kept, *_peak(file.stem, PROVIDERS[mode])])
    return "\n".join(_table(("case", "mode", "kept, counted", "peak, measured on a GPU", "in"), lines))


def _peak(case: str, provider: str) -> tuple[str, str]:
    """Of a case as accounts of memory are named, the peak of its step and the newest run that has it."""
    model, image, batch, dtype = case.rsplit("-", 3)
    wanted = {"model": model, "image": int(image), "batch": int(batch.removeprefix("b")), "dtype": dtype}
    wanted |= {"mode": "train", "device": "cuda", "provider": provider, "graph": False}
    for _, path, found in runs():
        for row in found["rows"]:
            part = share(row, found["rows"], "peak_bytes") if wanted.items() <= row.items() else None
            if part is not None:
                return f"{row['peak_bytes'] / 2**20:,.0f} ({part:.2f})", f"`{Path(path).stem}`"
    return "-", "-"


def compiled() -> str:
    """What the compile tables say, a line a version of Triton."""
    lines = []
    for file in sorted((RESULTS / "compile").glob("*.json")):
        found = json.loads(file.read_text())
        forms = found["forms"].values()
        lines.append(
            [
                f"`{file.name}`",
                f"{len(forms)}",
                f"{sum(bool(form['faults']) for form in forms)}",
                f"{max(form['registers'] for form in forms)}",
                f"{max(form['stack'] for form in forms)}",
                f"{max(form['shared'] for form in forms) / 1024:.0f}",
            ]
        )
    return "\n".join(_table(("file", "forms", "with faults", "registers", "stack bytes", "shared KiB"), lines))


def host_time() -> str:
    """What Python takes to launch a training step, run and replayed: the newest file of bench/host_time.py."""
    file = max(RESULTS.glob("*/host-time/*.json"), key=lambda file: file.name)
    found = json.loads(file.read_text())
    lines = [
        [
            f"`{row['model']}`",
            f"{row['launches']}",
            f"{row['graphs']}",
            f"{row['run_ms']:.1f}",
            f"{row['replayed_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['first_s']:.1f}",
            f"{row['first_ahead_s']:.1f}",
        ]
        for row in found["rows"]
    ]
    head = (
        "blocks of", "launches a step", "in graphs", "run, ms", "replayed, ms", "ratio", "first step, s",
        "compiled side by side, s",
    )  # fmt: skip
    machine = found["machine"]
    where = (
        f"*`{file.relative_to(RESULTS.parents[1])}`: {machine['cores']} cores of {machine['cpu']}, "
        f"Triton {machine['triton']}; the first step with an empty cache of kernels.*"
    )
    return "\n".join([*_table(head, lines), "", where])


def converted() -> str:
    """What `thresholdnet convert` measured of other people's models, all files of bench/results."""
    lines, machines = [], set()
    for file in sorted(RESULTS.glob("*/convert/*.json")):
        found = json.loads(file.read_text())
        machine, own = found["machine"], {row["mode"]: row for row in found["rows"] if not row["ratios"]}
        machines.add(f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}")
        for row in (row for row in found["rows"] if row["ratios"]):
            base = own[row["mode"]]
            speed = row["ratios"][base["provider"]]
            kept = base["saved_bytes"] and f"{row['saved_bytes'] / base['saved_bytes']:.2f}"
            lines.append(
                [
                    f"`{file.stem}`: `{found['model']}`",
                    f"{row['mode']} {'x'.join(map(str, row['shape']))}",
                    row["provider"].replace("_", ", "),
                    f"{speed['median']:.2f} ({speed['p20']:.2f} to {speed['p80']:.2f})",
                    kept or "-",
                    f"{row['peak_bytes'] / base['peak_bytes']:.2f}",
                ]
            )
    head = ("file and model", "step", "of", "speed (p20 to p80)", "kept", "peak")
    where = f"*Its own time over that of its converted copy, and bytes of its own; {'; '.join(sorted(machines))}.*"
    return "\n".join([*_table(head, lines), "", where])


def trained() -> str:
    """Every training run of bench/results."""
    lines = []
    for file in sorted(RESULTS.glob("*/*/result.json")):
        run = json.loads(file.read_text())
        lines.append(
            [
                f"`{file.parent.relative_to(RESULTS)}`",
                run["model"],
                run["data"],
                run["recipe"],
                f"{run['epochs']}",
                f"{run['last_accuracy']:.2%}",
            ]
        )
    return "\n".join(_table(("folder", "model", "data", "recipe", "epochs", "test accuracy"), lines))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
