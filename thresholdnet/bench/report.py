"""A file of results as a Markdown table and as a picture. Losses stand there like wins, and are marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .targets import BASE, OURS, Target, target_of

Row = Mapping[str, Any]
COLOURS = {
    "eager": "#9aa0a6", "eager_channels_last": "#5f6368", "compile": "#e0a030", "compile_max_autotune": "#b07818",
    "checkpoint": "#b58bc8", "fused": "#4878a8", "fused_recompute": "#2a7f4f", "fused_winograd": "#d1495b",
    "fused_native": "#76a5cf", "fused_triton": "#17becf", "eager_padded8": "#bdc1c6", "eager_folded": "#3c4043",
    "compile_folded": "#f2c879", "fused_native_recompute": "#7fc29b", "fused_triton_recompute": "#0e7c86",
}  # fmt: skip
SHORT = {"fp32": "", "bf16": "\nbf16", "fp16": "\nfp16", "fp64": "\nfp64"}


def markdown(results: Mapping[str, Any], name: str = "") -> str:
    """One table a mode: time, ratios, kept bytes, the target, what became of it; below, who has no time and why.

    Args:
        results: what `results.read` returns.
        name: of the file, for the title.
    """
    machine, rows = results["machine"], results["rows"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    dirty = " with changes" if machine.get("dirty") else ""
    lines = [f"**{name or 'bench'}**: {where}, torch {machine['torch']}, commit {str(machine['commit'])[:10]}{dirty}"]
    for mode, title in (("train", "Training step"), ("infer", "Inference step")):
        chosen = [row for row in rows if row["mode"] == mode]
        if chosen:
            lines += ["", f"{title}", "", *_table(chosen, rows)]
    lines += [
        "",
        "Times are medians (p20 to p80) in ms; speed is the reference's time over the row's, the median of paired "
        f"rounds (p20 to p80): above 1 is faster. Kept: from forward to backward, as a share of {BASE}'s. "
        f"Targets: must / aim, of the speed against {BASE} and of that share.",
    ]
    lines += _without_time(rows)
    loads = [row["other_load"] for row in rows if row.get("other_load") is not None]
    if loads:
        lines.append(f"\nOther processes used up to {max(loads):.0%} of the machine's CPU while a case was timed.")
    return "\n".join(lines) + "\n"


def _table(chosen: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    header = ("case", "provider", "ms", f"speed against {BASE}", "against eager", "against compile", "kept MB (share)",
              "target: speed", "target: kept", "verdict")  # fmt: skip
    lines = [_line(header), _line(["---", "---", *["---:"] * 5, "---", "---", "---"])]
    for row in chosen:
        if row["ms_median"] is None:
            continue
        target = target_of(row)
        share = kept_share(row, rows)
        kept = "-" if not row["saved_bytes"] else f"{row['saved_bytes'] / 1e6:,.0f} ({_or_dash(share)})"
        cells = [
            _case(row),
            provider_name(row),
            f"{row['ms_median']:,.1f} ({row['ms_p20']:,.1f} to {row['ms_p80']:,.1f})",
        ]
        cells += [_speed(row["ratios"].get(reference)) for reference in (BASE, "eager", "compile")]
        speed, bytes_ = (target.speed, target.kept) if target else (None, None)
        lines.append(_line([*cells, kept, _pair(speed), _pair(bytes_), verdict(row, share, target)]))
    return lines


def verdict(row: Row, share: float | None, target: Target | None) -> str:
    """ "faster" or "**slower**" than the base, and how the row stands to its target; empty for rivals."""
    ratio = row["ratios"].get(BASE, {}).get("median")
    if row["provider"] not in OURS or ratio is None:
        return ""
    words = ["faster" if ratio > 1 else "**slower**"]
    if target is not None and target.speed is not None:
        words.append(_against("speed", ratio, target.speed, more=True))
    if target is not None and target.kept is not None and share is not None:
        words.append(_against("kept", share, target.kept, more=False))
    return ", ".join(words)


def _against(what: str, value: float, bounds: tuple[float, float], more: bool) -> str:
    reached = [value >= bound if more else value <= bound for bound in bounds]
    return f"{what}: aim met" if reached[1] else f"{what}: must met" if reached[0] else f"{what}: **missed**"


def kept_share(row: Row, rows: Sequence[Row]) -> float | None:
    """Kept bytes over those of the base in the same case."""
    base = _same_case(row, rows, BASE)
    if base is None or not base["saved_bytes"] or row["saved_bytes"] is None:
        return None
    return float(row["saved_bytes"] / base["saved_bytes"])


def _same_case(row: Row, rows: Sequence[Row], provider: str) -> Row | None:
    keys = ("model", "image", "batch", "dtype", "mode")
    same = (other for other in rows if other["provider"] == provider and all(other[k] == row[k] for k in keys))
    return next((other for other in same if not other["graph"]), None)


def _without_time(rows: Sequence[Row]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["ms_median"] is None:
            reasons.setdefault((provider_name(row), row["reason"]), []).append(f"{_case(row)} {row['mode']}")
    if not reasons:
        return []
    return ["", "Without a time:", ""] + [
        f"- {provider}, {'; '.join(cases)}: {reason}" for (provider, reason), cases in reasons.items()
    ]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time of a training step and of an inference step, and bytes that training keeps; the base is 1.

    Args:
        results: what `results.read` returns.
        path: PNG file to write.
    """
    rows = results["rows"]
    panels = [
        ("train", "ms_median", "training step: time"), ("infer", "ms_median", "inference step: time"),
        ("train", "saved_bytes", "training step: bytes kept for backward"),
    ]  # fmt: skip
    shown = [panel for panel in panels if any(row["mode"] == panel[0] and row[panel[1]] for row in rows)]
    names = list(dict.fromkeys(provider_name(row) for row in rows if row["ms_median"] is not None))
    groups = list(dict.fromkeys(_group(row) for row in rows))
    width = min(max(7.0, 1.6 + 0.27 * len(groups) * (len(names) + 1.5)), 24)
    figure = Figure(figsize=(width, 0.9 + 2.9 * max(len(shown), 1)), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(max(len(shown), 1), 1, squeeze=False)[:, 0]
    for axes, (mode, key, title) in zip(all_axes, shown, strict=False):
        _panel(axes, [row for row in rows if row["mode"] == mode], key, groups, names)
        axes.set_title(f"{title}, {BASE} = 1", fontsize=10, loc="left")
    handles: list[Any] = [Axes.bar(all_axes[0], 0, 0, color=_colour(name), hatch=_hatch(name)) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False, fontsize=9)
    figure.savefig(str(path), format="png", facecolor="white", bbox_inches="tight", pad_inches=0.12)


def _panel(axes: Axes, rows: Sequence[Row], key: str, groups: Sequence[str], names: Sequence[str]) -> None:
    bar = 0.84 / len(names)
    for row in rows:
        base = _same_case(row, rows, BASE)
        if base is None or not base[key] or not row[key]:
            continue
        ratio = row["ratios"].get(BASE)
        value = 1 / ratio["median"] if key == "ms_median" and ratio else row[key] / base[key]
        name = provider_name(row)
        x = groups.index(_group(row)) + (names.index(name) - (len(names) - 1) / 2) * bar
        axes.bar(x, value, bar * 0.92, color=_colour(name), hatch=_hatch(name))
        if key == "ms_median" and ratio:
            low, high = 1 / ratio["p80"], 1 / ratio["p20"]
            axes.plot([x, x], [low, high], color="#222222", linewidth=0.9)
            value = max(value, high)
        axes.annotate(f"{1 / ratio['median'] if key == 'ms_median' and ratio else value:.2f}", (x, value), (0, 2),
                      textcoords="offset points", ha="center", va="bottom", rotation=90, fontsize=7)  # fmt: skip
    axes.axhline(1, color="#222222", linewidth=0.9, linestyle="--", zorder=0.5)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.16)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def provider_name(row: Row) -> str:
    """With its graph treatment."""
    return f"{row['provider']} + graph" if row["graph"] else str(row["provider"])


def _colour(name: str) -> str:
    return COLOURS[name.removesuffix(" + graph")]


def _hatch(name: str) -> str:
    return "///" if name.endswith(" + graph") else ""


def _group(row: Row) -> str:
    return f"{row['model'].replace(':', chr(10))}\n{row['batch']} x {row['image']}²{SHORT[row['dtype']]}"


def _case(row: Row) -> str:
    return f"{row['model']}, {row['batch']}x{row['image']}², {row['dtype']}"


def _speed(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _pair(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:g} / {values[1]:g}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
