"""A file of results as Markdown. Every ratio comes from rows of that one file; losses stand there like wins, marked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .rounds import label_of
from .targets import BASE, OURS, TARGETS, Row, share

STEPS = {"train": "Training step", "infer": "Inference step"}
AGAINST = (BASE, "eager", "compile")
NAMED = 8  # cases that share a reason, by name


def markdown(results: Mapping[str, Any], name: str = "") -> str:
    """Tables of networks, blocks and single operations, of targets, and of who has no time, with the reason.

    Args:
        results: what `results.read` returns.
        name: of the file, for the title.
    """
    rows, layers = results["rows"], results["layers"]
    lines = [f"**{name or 'bench'}**: {where(results['machine'])}, commit {_commit(results['machine'])}"]
    for title, chosen in tables(rows).items():
        measured = [row for row in chosen if "reason" not in row]
        if measured:
            lines += ["", f"### {title}", "", *_steps(measured, rows)]
    if rows:
        lines += [
            "",
            "Times are medians (p20 to p80) of the rounds in ms. Against another: its time over the row's, the median "
            "of paired rounds (p20 to p80), with the same graph treatment; above 1 is faster. Kept: from forward to "
            "backward; peak: of the step beyond weights, gradients and images, and of a graph its pool, gradients "
            f"included; shares are of {BASE}'s with the same graph treatment. In the noise: 1 lies between p20 and "
            "p80.",
        ]
    lines += _targets(rows) + _layers(results) + _without_time([*rows, *layers])
    loads = [row["other_load"] for row in (*rows, *layers) if row.get("other_load") is not None]
    if loads:
        lines += ["", f"Other processes used up to {max(loads):.0%} of the machine's CPU while a case was timed."]
    return "\n".join(lines) + "\n"


def where(machine: Mapping[str, Any]) -> str:
    """ "AMD EPYC, 2 of 2 cores, torch 2.14.1"."""
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    return f"{place}, torch {machine['torch']}"


def _commit(machine: Mapping[str, Any]) -> str:
    return f"{str(machine['commit'])[:10]}{' with changes' if machine.get('dirty') else ''}"


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by what they are steps of, titles in words: whole networks and blocks, training and inference."""
    made = {}
    for alone, of in ((False, ""), (True, " of a block alone")):
        for mode, title in STEPS.items():
            chosen = [row for row in rows if row["mode"] == mode and ("/" in row["model"]) == alone]
            if chosen:
                made[f"{title}{of}"] = chosen
    return made


def _steps(chosen: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    products = any(row.get("tflops") for row in chosen)
    header = ["case", "provider", "ms", *(f"against {name}" for name in AGAINST), "kept MB (share)", "peak MB (share)"]
    lines = _head([*header, *(["GFLOP/s"] if products else []), "verdict"], left=2)
    for row in chosen:
        cells = [case(row), label(row), _time(row)]
        cells += [_ratio(row["ratios"].get(label_of(name, row["graph"]))) for name in AGAINST]
        cells += [_bytes(row, rows, "saved_bytes"), _bytes(row, rows, "peak_bytes")]
        cells += [f"{1e3 * row['tflops']:,.1f}"] if products else []
        lines.append(_line([*cells, verdict(row)]))
    return lines


def base(row: Row) -> str:
    """What a row is held against: plain torch with the same graph treatment."""
    return label_of(BASE, row["graph"])


def verdict(row: Row) -> str:
    """ "faster" or "**slower**" than the base with the same graph treatment; empty for rivals."""
    ratio = row["ratios"].get(base(row))
    if not row["provider"].startswith(OURS) or ratio is None:
        return ""
    return ("faster" if ratio["median"] > 1 else "**slower**") + (", in the noise" if in_the_noise(ratio) else "")


def in_the_noise(ratio: Mapping[str, float]) -> bool:
    """Whether the middle 60 % of a ratio's rounds lie on both sides of 1."""
    return ratio["p20"] <= 1 <= ratio["p80"] and ratio["p20"] < ratio["p80"]


def _targets(rows: Sequence[Row]) -> list[str]:
    lines = []
    for target in TARGETS:
        for row in rows:
            value = target.got(row, rows) if target.means(row) else None
            if value is not None:
                bounds = [f"{bound:g}" for bound in target.bounds]
                lines.append(_line([target.text, row["provider"], *bounds, f"{value:.3g}", target.verdict(value)]))
    if not lines:
        return []
    return ["", "### Targets", "", *_head(["quantity", "provider", "must", "aim", "got", "verdict"], left=2), *lines]


def _layers(results: Mapping[str, Any]) -> list[str]:
    timed = [row for row in results["layers"] if row["ms_median"] is not None]
    if not timed:
        return []
    lines = ["", "### Operations of single layers", "", *_summary(timed), ""]
    header = [
        "layer",
        "operation",
        "provider",
        "ms",
        f"against {BASE}",
        "GFLOP/s",
        "GB/s",
        "of the roofline",
        "verdict",
    ]
    lines += _head(header, left=3)
    for row in timed:
        gflops = f"{1e3 * row['tflops']:,.1f}" if row["flops"] else "-"
        cells = [layer(row), row["operation"], label(row), _time(row)]
        cells += [_ratio(row["ratios"].get(base(row))), gflops, f"{row['gbs']:,.1f}"]
        lines.append(_line([*cells, f"{row['roofline_share']:.2f}", verdict(row)]))
    lines += [
        "",
        "Caches are cold. GB/s count operands and results once each. Of the roofline: the least time that bytes and "
        "FLOPs allow, over the measured one.",
    ]
    for dtype, peak in results["peaks"].items():
        lines.append(
            f"Roofline of {dtype}: {1e3 * peak['tflops']:,.0f} GFLOP/s, {peak['gbs']:,.1f} GB/s ({peak['source']})."
        )
    return lines


def _summary(timed: Sequence[Row]) -> list[str]:
    """Every operation's typical speed and share, over all layers that were measured."""
    lines = _head(
        ["operation", "provider", "layers", f"against {BASE}, geometric mean", "of the roofline, median"], left=2
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in timed:
        groups.setdefault((row["operation"], label(row)), []).append(row)
    for (operation, name), rows in groups.items():
        found = [row["ratios"].get(base(row)) for row in rows]
        speeds = [ratio["median"] for ratio in found if ratio is not None]
        speed = f"{statistics.geometric_mean(speeds):.2f}" if speeds else "-"
        typical = f"{statistics.median(row['roofline_share'] for row in rows):.2f}"
        lines.append(_line([operation, name, str(len(rows)), speed, typical]))
    return lines


def _without_time(rows: Sequence[Row]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            what = f"{layer(row)} {row['operation']}" if "operation" in row else f"{case(row)} {row['mode']}"
            reasons.setdefault((label(row), row["reason"]), []).append(what)
    if not reasons:
        return []
    return ["", "Without a time:", ""] + [
        f"- {provider}: {reason} ({_few(cases)})" for (provider, reason), cases in reasons.items()
    ]


def _few(cases: Sequence[str]) -> str:
    more = len(cases) - NAMED
    return "; ".join(cases[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def label(row: Row) -> str:
    """ "eager", "eager+graph"."""
    return label_of(row["provider"], row["graph"])


def case(row: Row) -> str:
    """ "hardnet68, 8x224², fp32"."""
    return f"{row['model']}, {row['batch']}x{row['image']}², {row['dtype']}"


def layer(row: Row) -> str:
    """ "hardnet68/stages.2 layer 4 3x3, 202 to 34, 8x28², fp32"."""
    channels = f"{row['read']} to {row['written']}"
    kernel = f"{row['kernel']}x{row['kernel']}"
    return f"{row['model']} layer {row['layer']} {kernel}, {channels}, {row['batch']}x{row['side']}², {row['dtype']}"


def _time(row: Row) -> str:
    if row["ms_median"] is None:
        return "-"
    digits = 1 if row["ms_median"] >= 10 else 3
    return f"{row['ms_median']:,.{digits}f} ({row['ms_p20']:,.{digits}f} to {row['ms_p80']:,.{digits}f})"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _bytes(row: Row, rows: Sequence[Row], key: str) -> str:
    if not row[key]:
        return "-"
    part = share(row, rows, key)
    return f"{row[key] / 1e6:,.1f}" + ("" if part is None else f" ({part:.3f})")


def _head(cells: Sequence[str], left: int) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(cells) - left - 1) + ["---"]
    return [_line(cells), _line(rule)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
