"""Pictures of a run as PNG files, drawn without any global matplotlib state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

SHEET_LIMIT = 64  # images on a contact sheet
TRAIN, TEST = "#4878a8", "#d1495b"
GREY, INK, GOOD = "#d9d9d9", "#222222", "#2a7f4f"
LINES = (TRAIN, TEST, GOOD, "#e0a030")


def curve(history: Sequence[dict[str, float]], path: str | Path, title: str = "") -> None:
    """Loss and accuracy of train and test per epoch.

    Args:
        history: rows with epoch, train_loss, train_accuracy, test_loss, test_accuracy.
        path: PNG file to write.

    Raises:
        ValueError: an empty history.
    """
    if not history:
        raise ValueError("curve needs at least one epoch, got an empty history")
    epochs = [row["epoch"] for row in history]
    figure = _figure(10, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(epochs) <= 40 else ""
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        for part, colour in (("train", TRAIN), ("test", TEST)):
            values = [row[f"{part}_{key}"] for row in history]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=part)
        axes.set_xlabel("epoch")
        axes.set_title(key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    best = max(history, key=lambda row: row["test_accuracy"])
    accuracy.axhline(best["test_accuracy"], color=TEST, linewidth=0.8, linestyle=":")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    accuracy.set_title(f"accuracy (best test {best['test_accuracy']:.2%}, epoch {best['epoch']:.0f})")
    losses = [row[f"{part}_loss"] for row in history for part in ("train", "test")]
    if min(losses) > 0 and max(losses) > 10 * float(np.median(losses)):
        loss.set_yscale("log")  # one wild early epoch (young running statistics) would flatten all the others
        loss.set_title("loss (log scale)")
    else:
        loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    if title:
        figure.suptitle(title)
    _save(figure, path)


def memory_bars(report: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Kept and peak bytes of a training step, one pair of bars a mode (see `thresholdnet.memory.account`)."""
    modes = list(report)
    figure = _figure(7, 1.2 + 0.9 * len(modes))
    axes = figure.subplots()
    for offset, what, colour in ((-0.2, "kept", TRAIN), (0.2, "peak", TEST)):
        values = [getattr(report[mode], what) / 2**30 for mode in modes]
        bars = axes.barh([i + offset for i in range(len(modes))], values, 0.38, color=colour, label=what)
        axes.bar_label(bars, [f"{v:.2f} ({v / values[0]:.0%})" for v in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(modes)), modes)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of activations")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(title)
    _save(figure, path)


def trade_off(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Error against what a network costs, one line a pattern through its thresholds.

    Args:
        rows: mappings with pattern, threshold, error (%, a list: one a seed), kept_plain and kept_fused (bytes),
            step_ms, parameters; any order.
        path: PNG file to write.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("trade_off needs at least one row, got none")
    costs = [("kept_plain", 2**20, "kept for backward, MiB (hollow: fused)"), ("step_ms", 1, "training step, ms"),
             ("parameters", 1e6, "parameters, millions")]  # fmt: skip
    costs = [cost for cost in costs if all(row[cost[0]] is not None for row in rows)]
    figure = _figure(13, 4.4)
    panels = figure.subplots(1, len(costs), sharey=True)
    for index, pattern in enumerate(dict.fromkeys(row["pattern"] for row in rows)):
        colour = LINES[index % len(LINES)]
        chosen = sorted((row for row in rows if row["pattern"] == pattern), key=lambda row: row["threshold"])
        mean = np.array([np.mean(row["error"]) for row in chosen])
        low, high = (np.array([pick(row["error"]) for row in chosen]) for pick in (min, max))
        for axes, (key, unit, label) in zip(panels, costs, strict=True):
            x = [row[key] / unit for row in chosen]
            axes.errorbar(x, mean, [mean - low, high - mean], fmt="o-", color=colour, capsize=2, label=pattern)
            for row, across, up in zip(chosen, x, mean, strict=True):
                note = {
                    "xytext": (5, 5 - 16 * (index % 2)),
                    "textcoords": "offset points",
                    "fontsize": 8,
                    "color": colour,
                }
                axes.annotate(f"T={row['threshold']}", (across, up), **note)
            axes.set_xlabel(label)
        fused = [row["kept_fused"] / 2**20 for row in chosen]
        panels[0].plot(fused, mean, "o:", color=colour, markerfacecolor="white")
    for axes in panels:
        axes.margins(x=0.12, y=0.15)
        axes.grid(color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test error of the best epoch, %")
    panels[-1].legend(frameon=False, title="pattern")
    if title:
        figure.suptitle(title)
    _save(figure, path)


def beside_paper(rows: Sequence[Mapping[str, Any]], base: str, path: str | Path, title: str = "") -> None:
    """The paper's errors and step times beside ours, two bars a network; times as multiples of one network's.

    Args:
        rows: mappings with network, paper_error and error (%), paper_of_base and of_base (step times over the base's;
            None where there is none).
        base: name of that network, for the axis.
        path: PNG file to write.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("beside_paper needs at least one row, got none")
    figure = _figure(12, 1.6 + 0.55 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    labels = ("test error of the best epoch, %", f"training step, times that of {base} on the same machine")
    for axes, key, label in zip(panels, ("error", "of_base"), labels, strict=True):
        for offset, what, colour, name in ((-0.2, f"paper_{key}", GREY, "paper"), (0.2, key, TRAIN, "ours")):
            shown = [(i + offset, row[what]) for i, row in enumerate(rows) if row[what] is not None]
            if shown:
                bars = axes.barh(*zip(*shown, strict=True), 0.38, color=colour, label=name)
                axes.bar_label(bars, [f"{value:.2f}" for _, value in shown], padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["network"] for row in rows])
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.12), ncols=2)
    if title:
        figure.suptitle(title)
    _save(figure, path)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], path: str | Path) -> None:
    """Confusion matrix, rows true and columns predicted, coloured by the share of each row.

    Args:
        matrix: counts, one row per true class.
        classes: names in the same order.
        path: PNG file to write.

    Raises:
        ValueError: sizes that do not match.
    """
    counts = np.asarray(matrix)
    number = len(classes)
    if counts.shape != (number, number):
        raise ValueError(f"confusion needs {number}x{number} counts for {number} classes, got {counts.shape}")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4.0 + 0.42 * number, 13)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    # Names while they stay readable, every few classes beyond.
    every = max(1, math.ceil(number / 50))
    ticks = list(range(0, number, every))
    font = float(np.clip(260 / number, 5, 10))
    names = [_short(classes[i]) for i in ticks]
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, fontsize=font, **(slanted if max(map(len, names)) > 2 else {}))
    axes.set_yticks(ticks, names, fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    accuracy = counts.trace() / max(int(counts.sum()), 1)
    axes.set_title(f"accuracy {accuracy:.2%} of {int(counts.sum())} images")
    if number <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.5 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("share of the true class")
    _save(figure, path)


def contact_sheet(
    images: Tensor,
    predicted: Sequence[str],
    probability: Sequence[float],
    path: str | Path,
    *,
    truth: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Images in a grid with predicted class and probability; wrong ones in a red frame with the true class.

    Args:
        images: uint8 [n, 3, H, W]; the first 64 are shown.
        predicted, probability: one per image.
        path: PNG file to write.
        truth: true classes, when known.
        captions: a further line per image (file names).

    Raises:
        ValueError: no images, or lists of other lengths.
    """
    number = len(images)
    lengths = {len(values) for values in (predicted, probability, truth, captions) if values is not None}
    if number == 0 or lengths != {number}:
        raise ValueError(f"contact_sheet needs images and one label for each, got {number} images")
    shown = min(number, SHEET_LIMIT)
    columns = min(8, shown)
    rows = math.ceil(shown / columns)
    figure = _figure(max(1.5 * columns, 2.4), 1.9 * rows + 0.1)
    for i, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        axes.set_xticks([])
        axes.set_yticks([])
        if i >= shown:
            axes.set_axis_off()
            continue
        axes.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        wrong = truth is not None and truth[i] != predicted[i]
        colour = TEST if wrong else GOOD if truth is not None else GREY
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2.5 if wrong else 1.5)
        ink = TEST if wrong else INK
        axes.set_title(f"{_short(predicted[i])} {probability[i]:.0%}", fontsize=9, color=ink, pad=3)
        below = f"true: {_short(truth[i])}" if wrong and truth is not None else ""
        if captions is not None and not wrong:
            below = _short(captions[i])
        axes.set_xlabel(below, fontsize=8, color=ink, labelpad=2)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    # "tight" because the constrained layout forgets an axis label beside an image of fixed aspect
    options: dict[str, Any] = {"format": "png", "facecolor": "white", "bbox_inches": "tight", "pad_inches": 0.12}
    figure.savefig(str(path), **options)


def _short(name: str) -> str:
    """A name as matplotlib can write it: no formula between dollars, no bytes that are no text."""
    shown = name if len(name) <= 14 else name[:13] + "…"
    return shown.encode(errors="replace").decode().replace("$", r"\$")
