"""A file of results as pictures: time and memory of every provider side by side, and operations under the roofline."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter, MaxNLocator

from ..figures import GREY, INK, TEST, TRAIN, _figure, _save
from .layers import OPERATIONS, PRODUCTS
from .report import case, label, tables, where
from .rounds import label_of
from .targets import BASE, OURS, Row, share

RIVAL, LOSS = "#9aa0a6", TEST
COLUMNS = 4  # panels side by side
BYTES = {"saved_bytes": "bytes kept for backward", "peak_bytes": "peak bytes"}
MARKERS = dict(zip(PRODUCTS, "os^", strict=True))
COLOURS = {"eager": "#bdc1c6", "eager_channels_last": "#5f6368", "fused_native": TRAIN, "fused_triton": "#e0a030"}


def draw(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write a picture of every kind of step that the file holds, and one of single operations.

    Args:
        results: what `results.read` returns.
        stem: path and beginning of the names: <stem>-train.png, <stem>-infer.png, <stem>-block-train.png,
            <stem>-block-infer.png, <stem>-roofline.png.

    Returns:
        The files.
    """
    files = []
    for title, chosen in tables(results["rows"]).items():
        rows = [row for row in chosen if "reason" not in row]
        if rows:
            name = f"{stem.name}{'-block' if '/' in rows[0]['model'] else ''}-{rows[0]['mode']}.png"
            files.append(stem.with_name(name))
            steps(rows, f"{title}, {where(results['machine'])}", files[-1])
    layers = [row for row in results["layers"] if row["ms_median"] is not None]
    if layers:
        files.append(stem.with_name(f"{stem.name}-roofline.png"))
        roofline(layers, results["peaks"], where(results["machine"]), files[-1])
    return files


def steps(rows: Sequence[Row], title: str, path: Path) -> None:
    """Panels of time, where there are times, above panels of memory, one a case; a bar a provider, in one place.

    Args:
        rows: of one kind of step.
        path: PNG file to write.
    """
    cases = list(dict.fromkeys(case(row) for row in rows))
    names = list(dict.fromkeys(label(row) for row in rows))
    columns = min(COLUMNS, len(cases))
    lines = math.ceil(len(cases) / columns)
    height = 0.55 + 0.195 * len(names)
    parts: list[tuple[str, Callable[[Row], tuple[float, float, float, str] | None]]] = [
        *([("time", _time)] if _any(rows, "ms_median") else []),
        *((what, functools.partial(_bytes, rows=rows, key=key)) for key, what in BYTES.items() if _any(rows, key)),
    ]
    figure = _figure(2.1 + 2.6 * columns, 1.3 + len(parts) * lines * height)
    grid = figure.subplots(len(parts) * lines, columns, squeeze=False)
    for part, (quantity, value_of) in enumerate(parts):
        for index in range(lines * columns):
            axes = grid[part * lines + index // columns, index % columns]
            if index >= len(cases):
                axes.set_axis_off()
                continue
            own = [row for row in rows if case(row) == cases[index]]
            _panel(axes, own, names, value_of, named=index % columns == 0)
            first = f"{quantity}, {BASE} = 1\n" if index == 0 else ""
            name = cases[index].replace(":", ":\n", 1).replace(", ", "\n", 1)
            axes.set_title(first + name, loc="left", fontsize=9)
    figure.suptitle(title, fontsize=11)
    handles: list[Any] = [
        Patch(color=colour, label=text)
        for colour, text in ((RIVAL, "rival"), (TRAIN, "ours"), (LOSS, "ours, above 1: a loss"))
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1, label="p20 to p80 of paired rounds"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    _save(figure, path)


def _panel(
    axes: Axes,
    rows: Sequence[Row],
    names: Sequence[str],
    value_of: Callable[[Row], tuple[float, float, float, str] | None],
    named: bool,
) -> None:
    """A bar a provider, its value behind it; nothing where it has none."""
    reach = 1.0
    for row in rows:
        found, y = value_of(row), names.index(label(row))
        if found is None:
            continue
        value, low, high, text = found
        colour = RIVAL if not row["provider"].startswith(OURS) else LOSS if value > 1 else TRAIN
        axes.barh(y, value, 0.74, color=colour, zorder=0.6)
        axes.plot([low, high], [y, y], color=INK, linewidth=1)
        axes.annotate(text, (max(value, high, 1.0), y), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        reach = max(reach, value, high)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle="--", zorder=0.7)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.62 * reach)  # room for the values
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)


def _time(row: Row) -> tuple[float, float, float, str] | None:
    """The row's time over the base's with the same graph treatment, its spread, and both in words."""
    base = label_of(BASE, row["graph"])
    if row["ms_median"] is None:
        return None
    ratio = {"median": 1.0, "p20": 1.0, "p80": 1.0} if label(row) == base else row["ratios"].get(base)
    if ratio is None:
        return None
    value, ms = 1 / ratio["median"], row["ms_median"]
    return (
        value,
        1 / ratio["p80"],
        1 / ratio["p20"],
        f"{value:.2f}  {ms:,.{0 if ms >= 100 else 1 if ms >= 1 else 3}f} ms",
    )


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row[key] for row in rows)


def _bytes(row: Row, rows: Sequence[Row], key: str) -> tuple[float, float, float, str] | None:
    value = share(row, rows, key)
    if value is None:
        return None
    megabytes = row[key] / 1e6
    return value, value, value, f"{value:.2f}  {megabytes:,.{0 if megabytes >= 10 else 1}f} MB"


def roofline(rows: Sequence[Row], peaks: Mapping[str, Any], title: str, path: Path) -> None:
    """Products on the roofline of their dtype, and how near every operation comes to its own bound.

    Args:
        rows: of operations, with times.
        peaks: by dtype, as a file of results has them.
        path: PNG file to write.
    """
    figure = _figure(12, 5.4)
    left, right = figure.subplots(1, 2, width_ratios=[6, 5])
    names = list(dict.fromkeys(label(row) for row in rows))
    products = [row for row in rows if row["flops"]]
    if products:
        _products(left, products, peaks)
    left.set(xscale="log", yscale="log", xlabel="intensity: FLOP per byte, operands and result moved once",
             ylabel="GFLOP/s")  # fmt: skip
    for axis in (left.xaxis, left.yaxis):  # 60, not 6 x 10^1
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    left.set_title("products: measured, under the roofline", fontsize=10)
    shown = [name for name in OPERATIONS if any(row["operation"] == name for row in rows)]
    offsets = np.linspace(-0.27, 0.27, len(names)) if len(names) > 1 else np.zeros(1)
    for name, offset in zip(names, offsets, strict=True):
        own = [row for row in rows if label(row) == name]
        places = [shown.index(row["operation"]) + offset for row in own]
        right.plot([row["roofline_share"] for row in own], places, _marker(name), color=_colour(name), alpha=0.6)
    right.axvline(1, color=INK, linewidth=1.2, zorder=0.8)
    right.set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
    right.set_ylim(len(shown) - 0.5, -0.5)
    right.set_xlim(0, 1.05 * max(1.0, *(row["roofline_share"] for row in rows)))
    right.set_xlabel("share of the roofline: least time over measured time")
    right.set_title("every operation, a point a layer", fontsize=10)
    for axes in (left, right):
        axes.grid(color=GREY, linewidth=0.6, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], marker=_marker(name), linestyle="", color=_colour(name), label=name) for name in names]
    handles += [
        Line2D([], [], marker=MARKERS[name], linestyle="", color=INK, fillstyle="none", label=name.replace("_", " "))
        for name in PRODUCTS
        if any(row["operation"] == name for row in products)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(f"Operations of single layers, cold caches, {title}", fontsize=11)
    _save(figure, path)


def _products(axes: Axes, rows: Sequence[Row], peaks: Mapping[str, Any]) -> None:
    intensity = [row["flops"] / row["bytes"] for row in rows]
    shown = [*intensity, *(1e3 * peak["tflops"] / peak["gbs"] for peak in peaks.values())]  # the roofs' edges too
    reach = np.geomspace(min(shown) / 2, max(shown) * 2, 200)
    for dtype, peak in peaks.items():
        bound = 1e3 * np.minimum(peak["gbs"] / 1e3 * reach, peak["tflops"])
        axes.plot(reach, bound, color=INK, linewidth=1.2, zorder=0.8)
        axes.annotate(f"{dtype}: {peak['gbs']:,.0f} GB/s, {1e3 * peak['tflops']:,.0f} GFLOP/s", (reach[-1], bound[-1]),
                      (0, 4), textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    for row, x in zip(rows, intensity, strict=True):
        axes.plot(x, 1e3 * row["tflops"], MARKERS[row["operation"]], color=_colour(label(row)), alpha=0.7,
                  fillstyle="none" if row["graph"] else "full")  # fmt: skip


def _colour(name: str) -> str:
    return COLOURS[name.removesuffix("+graph")]


def _marker(name: str) -> str:
    return "x" if name.endswith("+graph") else "o"
