"""Link patterns drawn as arcs, in the manner of the paper's Figures 1 and 3.

Node 0, the block's input, is at the top and the last layer at the bottom; every link is one arc from a source down to
the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .links import Links, custom
from .plan import plan_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
MAX_LAYERS = 128
"""Most layers that a picture holds: more would not be told apart."""
MAX_PANELS = 12
"""Most patterns side by side."""

DPI = 150
DENSE_COLOUR, HARMONIC_COLOUR = "#2f6db5", "#d9731a"  # blue and orange: told apart by the colour-blind too
INK, FAINT = "#222222", "#8a8a8a"
DASHES = (0, (4, 3))

# Inches. A panel is: node labels, the line of nodes, the arcs bulging to the right.
LABELS, MARGIN, GAP = 0.45, 0.2, 0.2
TITLE, LEGEND_ROW, LEGEND_PAD = 0.75, 0.24, 0.2
MAX_BULGE_ALONE, MAX_BULGE_BESIDE = 4.0, 1.9
MIN_PANEL = 2.3  # room for a title such as "sparse_dense, 16 layers"


def arc_diagram(
    links_list: Links | Sequence[Iterable[Iterable[int]]], path: str | Path, names: Sequence[str] | None = None
) -> Path:
    """Draw one or several link patterns side by side and write them as PNG or SVG.

    Arcs and nodes of layers up to the threshold (the dense side) are blue, those after it orange; a dashed line marks
    the threshold where it lies inside the block. Full nodes are the outputs of a block of conv_bn_relu units (see
    `thresholdnet.plan.plan_block`), hollow ones stay inside. In an SVG the arc from node 3 to layer 7 of the first
    pattern has the id "link-0-3-7".

    Args:
        links_list: a pattern of `thresholdnet.links`, or a sequence of patterns or plain tuples of source tuples.
        path: file to write; its suffix, .png or .svg, chooses the format.
        names: one title a pattern; None takes each pattern's own name.

    Returns:
        The path written.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: another suffix; no pattern, more than `MAX_PANELS`, or one of more than `MAX_LAYERS` layers; links
            that are not a pattern; names that are not one a pattern.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    target = _checked_path(path)
    patterns = _checked_patterns(links_list)
    titles = _checked_names(names, patterns)
    figure = _draw(patterns, titles)
    # SVG carries a date by default; without it equal calls write equal files
    metadata: dict[str, Any] = {"Date": None} if target.suffix.lower() == ".svg" else {}
    figure.savefig(target, format=target.suffix.lower()[1:], metadata=metadata)
    return target


def _checked_path(path: str | Path) -> Path:
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be a string or a Path, got {type(path).__name__}")
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, got suffix {target.suffix!r} in {str(target)!r}")
    return target


def _checked_patterns(links_list: Links | Sequence[Iterable[Iterable[int]]]) -> list[Links]:
    if isinstance(links_list, str) or not isinstance(links_list, Sequence):
        raise TypeError(f"links_list must be a pattern or a sequence of patterns, got {type(links_list).__name__}")
    patterns = [links_list] if isinstance(links_list, Links) else [custom(rows) for rows in links_list]
    if not 1 <= len(patterns) <= MAX_PANELS:
        raise ValueError(f"links_list must hold from 1 to {MAX_PANELS} patterns, got {len(patterns)}")
    for pattern in patterns:
        if len(pattern) > MAX_LAYERS:
            raise ValueError(f"links to draw must have at most {MAX_LAYERS} layers, got {len(pattern)}")
    return patterns


def _checked_names(names: Sequence[str] | None, patterns: Sequence[Links]) -> list[str]:
    if names is None:
        return [pattern.pattern for pattern in patterns]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of strings, got {names!r}")
    if len(names) != len(patterns):
        raise ValueError(f"names must hold one title for each of the {len(patterns)} patterns, got {len(names)}")
    return list(names)


def _has_threshold(pattern: Links) -> bool:
    """Whether the threshold lies inside the block, so that both sides exist."""
    return 0 < pattern.threshold < len(pattern)


class _Scale:
    """Sizes in inches that depend on what is drawn; all panels share them."""

    def __init__(self, patterns: Sequence[Links]):
        self.layers = max(map(len, patterns))
        self.panels = len(patterns)
        self.step = min(0.36, max(0.15, 11 / self.layers))  # between nodes: 128 layers still fit a tall page
        self.longest = max(i - k for rows in patterns for i, row in enumerate(rows, start=1) for k in row)
        most = MAX_BULGE_ALONE if self.panels == 1 else MAX_BULGE_BESIDE
        self.bulge = max(self.step / 2, min(most, self.longest * self.step / 2))  # of the longest arc
        self.panel = max(MIN_PANEL, LABELS + self.bulge + GAP)
        self.width = 2 * MARGIN + self.panels * self.panel
        self.legend_columns = 5 if self.width >= 8 else 2 if self.width >= 3.9 else 1
        self.legend_rows = -(-len(_legend_entries(patterns)) // self.legend_columns)
        self.legend = self.legend_rows * LEGEND_ROW + LEGEND_PAD
        self.body = (self.layers + 1) * self.step  # half a step above node 0 and below the last layer
        self.height = TITLE + self.body + self.legend
        self.font = min(9.0, self.step * 72 * 0.62)  # points: labels of neighbouring nodes stay apart
        self.node = min(0.085, self.step * 0.3)  # radius

    def reach(self, span: int) -> float:
        """How far an arc over `span` nodes bulges."""
        return self.bulge * span / self.longest


def _draw(patterns: Sequence[Links], titles: Sequence[str]) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: pip install 'thresholdnet[cli]' ({error})") from error

    scale = _Scale(patterns)
    figure = Figure(figsize=(scale.width, scale.height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for index, (pattern, title) in enumerate(zip(patterns, titles, strict=True)):
        box = (
            (MARGIN + index * scale.panel) / scale.width,
            scale.legend / scale.height,
            scale.panel / scale.width,
            scale.body / scale.height,
        )
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.set_xlim(-LABELS, scale.panel - LABELS)  # data units are inches; the nodes stand at x = 0
        axes.set_ylim((scale.layers + 0.5) * scale.step, -0.5 * scale.step)  # downwards
        _draw_panel(axes, index, pattern, scale)
        left = MARGIN + index * scale.panel + 0.12
        _draw_title(figure, left / scale.width, title, pattern, scale)
    _draw_legend(figure, patterns, scale)
    return figure


def _draw_title(figure: Figure, left: float, title: str, pattern: Links, scale: _Scale) -> None:
    room = 72 * (scale.panel - 0.15) / 0.68  # in units of a letter at 1 point: bold letters are 0.68 em wide
    size = min(10.5, max(6.0, room / max(1, len(title))))
    fits = int(room / size)
    shown = title if len(title) <= fits else title[: fits - 1] + "\N{HORIZONTAL ELLIPSIS}"
    top = 1 - 0.2 / scale.height
    figure.text(left, top, shown, va="top", fontsize=size, fontweight="bold", color=INK, parse_math=False)
    parts = [_plural(pattern.total, "link"), _plural(len(pattern), "layer")]
    if _has_threshold(pattern):
        parts.append(f"T = {pattern.threshold}")
    figure.text(left, top - 0.22 / scale.height, ", ".join(parts), va="top", fontsize=9, color=INK)


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _draw_panel(axes: Axes, index: int, pattern: Links, scale: _Scale) -> None:
    from matplotlib.patches import Circle, PathPatch

    crowd = pattern.total / len(pattern)  # where many arcs cross, thin ones that shine through stay apart
    alpha, line = min(0.85, max(0.3, 5 / crowd)), min(1.4, max(0.5, 9 / crowd))
    for layer, sources in enumerate(pattern, start=1):
        for source in sources:
            axes.add_patch(
                PathPatch(
                    _arc(source * scale.step, layer * scale.step, scale.reach(layer - source)),
                    facecolor="none",
                    edgecolor=_colour(pattern, layer),
                    linewidth=line,
                    alpha=alpha,
                    gid=f"link-{index}-{source}-{layer}",
                    zorder=1,
                )
            )
    outputs = plan_block(1, pattern, 1).outputs
    for node in range(len(pattern) + 1):
        y, colour = node * scale.step, _colour(pattern, node)
        face = colour if node in outputs else "white"
        axes.add_patch(
            Circle(
                (0, y), scale.node, facecolor=face, edgecolor=colour, linewidth=1, gid=f"node-{index}-{node}", zorder=3
            )
        )
        axes.text(-scale.node - 0.06, y, str(node), ha="right", va="center", fontsize=scale.font, color=INK)
    if _has_threshold(pattern):
        y = (pattern.threshold + 0.5) * scale.step
        ends = [-LABELS + 0.12, scale.panel - LABELS - GAP / 2]
        axes.plot(ends, [y, y], color=FAINT, linewidth=1, linestyle=DASHES, zorder=2, gid=f"threshold-{index}")


def _arc(top: float, bottom: float, reach: float) -> Any:
    """Half an ellipse from (0, top) to (0, bottom), bulging by `reach` to the right."""
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import Affine2D

    half = (bottom - top) / 2
    return Outline.arc(-90, 90).transformed(Affine2D().scale(reach, half).translate(0, (top + bottom) / 2))


def _colour(pattern: Links, node: int) -> str:
    """Of a node and of the links that it reads; the input has no side."""
    if node == 0:
        return INK
    return DENSE_COLOUR if node <= pattern.threshold else HARMONIC_COLOUR


def _legend_entries(patterns: Sequence[Links]) -> list[tuple[str, dict[str, Any]]]:
    """(label, line properties) of the signs that occur."""
    entries: list[tuple[str, dict[str, Any]]] = []
    if any(pattern.threshold for pattern in patterns):
        entries.append(("links of the dense side", {"color": DENSE_COLOUR, "linewidth": 2}))
    if any(pattern.threshold < len(pattern) for pattern in patterns):
        entries.append(("links of the harmonic side", {"color": HARMONIC_COLOUR, "linewidth": 2}))
    if any(map(_has_threshold, patterns)):
        entries.append(("threshold T", {"color": FAINT, "linewidth": 1, "linestyle": DASHES}))
    dot = {"marker": "o", "linestyle": "", "markeredgecolor": INK, "markersize": 6}
    entries.append(("output of the block", {**dot, "markerfacecolor": INK}))
    entries.append(("stays inside", {**dot, "markerfacecolor": "white"}))
    return entries


def _draw_legend(figure: Figure, patterns: Sequence[Links], scale: _Scale) -> None:
    from matplotlib.lines import Line2D

    entries = _legend_entries(patterns)
    figure.legend(
        [Line2D([], [], **style) for _, style in entries],
        [label for label, _ in entries],
        loc="lower left",
        bbox_to_anchor=((MARGIN + 0.05) / scale.width, 0.08 / scale.height),
        ncol=scale.legend_columns,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0,
        handlelength=1.8,
        columnspacing=1.2,
    )
