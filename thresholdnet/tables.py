"""The paper's Tables I to V and VIII beside what this package builds, as data and as text, Markdown, CSV or JSON.

The printed values stand at the top, each once; ours are computed from the link patterns and from the models when a
table is asked for. Tables VI and VII are results of training: what is printed stands here, ours come from bench/paper.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from . import links as link_patterns
from .blocks import ConvBNAct, ThresholdBlock
from .checks import one_of
from .counting import count
from .models import Network, create_model

Cell = str | int | float | None

SIDE = 224  # pixels: the image side of Tables V and VIII
SAME = "same"


@dataclass(frozen=True)
class Table:
    """A table as data.

    Attributes:
        title: what it shows.
        header: names of the columns, all different.
        rows: one tuple of cells a row, as long as the header; None where there is no value.
        notes: sentences that belong under the table.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- what the paper prints


@dataclass(frozen=True)
class PrintedLinks:
    """Table I, II or III: the threshold, the sources of layers 1 to 16, and the total that the text gives."""

    threshold: int
    rows: tuple[str, ...]
    total_in_text: int


PRINTED_LINKS = {
    "I": PrintedLinks(
        4,
        (
            "0", "0-1", "0-1-2", "0-1-2-3", "4", "4-5", "6", "0-4-6-7", "8", "2-6-8-9", "10", "4-8-10-11", "12",
            "6-10-12-13", "14", "0-8-12-14-15",
        ),
        38,
    ),
    "II": PrintedLinks(
        8,
        (
            "0", "0-1", "0-1-2", "0-1-2-3", "0-1-2-3-4", "0-1-2-4-5", "0-1-2-5-6", "0-1-2-6-7", "8", "2-6-8-9", "10",
            "4-8-10-11", "12", "6-10-12-13", "14", "0-8-12-14-15",
        ),
        51,
    ),
    "III": PrintedLinks(
        12,
        (
            "0", "0-1", "0-1-2", "0-1-2-3", "0-1-2-3-4", "0-1-2-3-4-5", "0-1-2-3-4-5-6", "0-1-2-3-5-6-7",
            "0-1-2-3-6-7-8", "0-1-2-3-7-8-9", "0-1-2-3-8-9-10", "0-1-2-3-9-10-11", "12", "6-10-12-13", "14",
            "0-8-12-14-15",
        ),
        74,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PrintedSplit:
    """A row of Table IV: a DenseNet block's depth, the two depths that replace it, and the network it happens in."""

    dense: int
    split: tuple[int, int]
    model: str


DENSE_FORMULA = "x_i = H([x_0, ..., x_(i-1)])"
HARMONIC_FORMULA = "odd i: H(x_(i-1)), even i: H([x_0, ..., x_(i-2^m)])"
PRINTED_SPLITS = (
    PrintedSplit(24, (12, 16), "thresholdnet_v1"),
    PrintedSplit(32, (16, 16), "thresholdnet_v2"),
)


@dataclass(frozen=True)
class PrintedStage:
    """A line of Table V: its layer, output side in pixels, and what it says for v1 and v2 (None: no such line).

    `part` says which module of ours it is: (stage, name), the stem being stage 0 and the head (6, "pool" or "head").
    """

    layer: str
    side: int | None
    v1: str | None
    v2: str | None
    part: tuple[int, str]


PRINTED_STAGES = (
    PrintedStage("Convolution", 112, "3x3 conv", "3x3 conv", (0, "conv1")),
    PrintedStage("Convolution", 112, "3x3 conv", "3x3 conv", (0, "conv2")),
    PrintedStage("Pooling", 56, "3x3 max pool", "3x3 max pool", (1, "pool")),
    PrintedStage("Threshold Block (1)", 56, "[3x3 conv] x 6", "[3x3 conv] x 6", (1, "block")),
    PrintedStage("Transition Layer (1)", 56, "1x1 conv", "1x1 conv", (1, "transition")),
    PrintedStage("Transition Layer (1)", 28, "2x2 max pool", "2x2 max pool", (2, "pool")),
    PrintedStage("Threshold Block (2)", 28, "[3x3 conv] x 8", "[3x3 conv] x 12", (2, "block")),
    PrintedStage("Transition Layer (2)", 28, "1x1 conv", "1x1 conv", (2, "transition")),
    PrintedStage("Transition Layer (2)", 14, "2x2 max pool", "2x2 max pool", (3, "pool")),
    PrintedStage("Threshold Block (3)", 14, "[3x3 conv] x 12", "[3x3 conv] x 16", (3, "block")),
    PrintedStage("Transition Layer (3)", 14, "1x1 conv", "1x1 conv", (3, "transition")),
    PrintedStage("Threshold Block (4)", 14, "[3x3 conv] x 16", "[3x3 conv] x 16", (4, "block")),
    PrintedStage("Transition Layer (4)", 14, "1x1 conv", "1x1 conv", (4, "transition")),
    PrintedStage("Transition Layer (4)", 7, "2x2 max pool", "2x2 max pool", (5, "pool")),
    PrintedStage("Threshold Block (5)", 7, "[3x3 conv] x 4", "[3x3 conv] x 4", (5, "block")),
    PrintedStage("Transition Layer (5)", None, None, None, (5, "transition")),
    PrintedStage("Classification Layer", 1, "1x1 average pool", "1x1 average pool", (6, "pool")),
    PrintedStage(
        "Classification Layer", 1, "1000D fully-connected, softmax", "1000D fully-connected, softmax", (6, "head")
    ),
)


@dataclass(frozen=True)
class PrintedNetwork:
    """A row of Table VIII, figures as printed; `meant_madds` corrects a slip, `slip` names it."""

    name: str
    model: str
    depths: str
    parameters: str
    madds: str
    flops: str
    meant_madds: str | None = None
    slip: str = ""


REPEATED = "slip: #MAdds repeats #FLOPS"
PRINTED_NETWORKS = (
    PrintedNetwork("DenseNet121", "densenet121", "6,12,24,16", "7.97M", "2.88G", "2.88G", "5.74G", REPEATED),
    PrintedNetwork("DenseNet169", "densenet169", "6,12,32,32", "14.15M", "3.42G", "3.42G", "6.81G", REPEATED),
    PrintedNetwork("DenseNet201", "densenet201", "6,12,48,32", "20.01M", "8.70G", "4.37G"),
    PrintedNetwork("DenseNet161", "densenet161", "6,12,36,24", "28.68M", "15.6G", "7.82G"),
    PrintedNetwork("ResNet50", "resnet50", "3,4,6,3", "25.55M", "8.22G", "4.12G"),
    PrintedNetwork("ResNet101", "resnet101", "3,4,23,3", "44.55M", "15.66G", "7.84G"),
    PrintedNetwork("HarDNet68", "hardnet68", "8,16,16,16,4", "17.57M", "8.51G", "4.26G"),
    PrintedNetwork("ThresholdNet_v1", "thresholdnet_v1", "6,8,12,16,4", "15.32M", "6.90G", "3.46G"),
    PrintedNetwork("ThresholdNet_v2", "thresholdnet_v2", "6,12,16,16,4", "17.14M", "8.12G", "4.07G"),
    PrintedNetwork("ResNeXt50_32x4d", "resnext50_32x4d", "3,4,6,3", "25.03M", "8.51G", "4.27G"),
    PrintedNetwork(
        "ResNeXt101_32x8d", "resnext101_32x8d", "3,4,23,3", "88.79M", "3293", "16.49G", "32.93G",
        "slip: 3293 lost its point and unit (32.93G)",
    ),
    PrintedNetwork("Wide_ResNet50_2", "wide_resnet50_2", "3,4,6,3", "68.88M", "22.85G", "11.43G"),
    PrintedNetwork("Wide_ResNet101_2", "wide_resnet101_2", "3,4,23,3", "126.89M", "45.58G", "22.81G"),
)  # fmt: skip


@dataclass(frozen=True)
class PrintedResult:
    """A row of Table VI or VII: the network, its error in %, the time of a batch of 100 in ms and of an epoch in s.

    `slow` marks the rows that take about 15 times the work expected of the network at this size, which a 3x3 stem
    without a pool explains.
    """

    name: str
    model: str
    error: float
    step_ms: float
    epoch_s: float
    slow: bool = False


PRINTED_RESULTS = {
    "VI": (
        PrintedResult("DenseNet121", "densenet121", 7.35, 119, 59.13, slow=True),
        PrintedResult("ResNet50", "resnet50", 9.89, 102, 50.37, slow=True),
        PrintedResult("ThresholdNet_v1", "thresholdnet_v1", 13.66, 47, 24.21),
        PrintedResult("ThresholdNet_v2", "thresholdnet_v2", 13.31, 54, 27.25),
        PrintedResult("HarDNet68", "hardnet68", 14.66, 57, 27.98),
        PrintedResult("ResNeXt50_32x4d", "resnext50_32x4d", 16.96, 52, 24.81),
        PrintedResult("Wide_ResNet50_2", "wide_resnet50_2", 17.31, 55, 27.86),
    ),
    "VII": (
        PrintedResult("DenseNet121", "densenet121", 25.53, 175, 8.77),
        PrintedResult("ResNet18", "resnet18", 23.62, 186, 9.61, slow=True),
        PrintedResult("ThresholdNet_v1", "thresholdnet_v1", 24.95, 87, 4.41),
        PrintedResult("ThresholdNet_v2", "thresholdnet_v2", 24.30, 115, 5.39),
        PrintedResult("HarDNet68", "hardnet68", 24.98, 113, 4.79),
        PrintedResult("ResNeXt50_32x4d", "resnext50_32x4d", 36.35, 110, 5.30),
        PrintedResult("Wide_ResNet50_2", "wide_resnet50_2", 32.23, 132, 6.39),
    ),
}
"""Tables VI (CIFAR-10) and VII (STL-10), lost decimal points put back (the scan has 2421 and 1331 for some)."""


# ---------------------------------------------------------------- the tables


def table(name: str) -> Table:
    """Make a table of the paper beside ours.

    Args:
        name: one of `TABLES`: "I", "II", "III" (links of 16 layers), "IV" (architecture comparison), "V" (layers of
            v1 and v2 at 224x224) or "VIII" (parameters and operations of 13 networks).

    Raises:
        TypeError, ValueError: no such table.
    """
    return _TABLES[one_of("table", name, TABLES)](name)


def _links_table(name: str) -> Table:
    printed = PRINTED_LINKS[name]
    rule = link_patterns.threshold_ab if name == "I" else link_patterns.threshold_bc
    ours = rule(len(printed.rows), printed.threshold)
    rows: list[tuple[Cell, ...]] = []
    differ: list[str] = []
    for (layer, sources), paper in zip(ours.rows(), printed.rows, strict=True):
        difference = _links_difference(paper, sources)
        rows.append((layer, paper, sources, difference))
        if difference != SAME:
            differ.append(f"Row {layer} is a slip of the paper: it prints {paper}, the rule gives {sources}.")
    total = sum(row.count("-") + 1 for row in printed.rows)
    rows.append(("total", total, ours.total, SAME if total == ours.total else f"{ours.total - total:+d}"))
    text = f"The printed rows sum to {total} links; the paper's text says {printed.total_in_text}."
    return Table(
        f"Table {name}. Links of 16 layers at threshold {printed.threshold}: {ours.pattern} with even_log above",
        ("layer", "paper", "ours", "difference"),
        tuple(rows),
        (*differ, text),
    )


def _links_difference(paper: str, ours: str) -> str:
    printed, built = paper.split("-"), ours.split("-")
    added = [f"+{node}" for node in built if node not in printed]
    missing = [f"-{node}" for node in printed if node not in built]
    return " ".join([*added, *missing]) or SAME


def _split_table(name: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for printed in PRINTED_SPLITS:
        network = _network(printed.model)
        built = [_block(network, stage) for stage in (3, 4)]
        whole = link_patterns.dense(printed.dense)
        kept = sum(block.links.total for block in built)
        depths = tuple(len(block.links) for block in built)
        rows.append(
            (
                printed.model,
                f"{printed.dense} layers, {DENSE_FORMULA}",
                f"{printed.split[0]} layers, {DENSE_FORMULA}",
                f"{printed.split[1]} layers, {HARMONIC_FORMULA}",
                " + ".join(f"{len(block.links)} {block.links.pattern}" for block in built),
                SAME if depths == printed.split else f"ours {depths}",
                whole.total,
                kept,
                round(kept / whole.total, 3),
            )
        )
    return Table(
        f"Table {name}. Architecture comparison: one dense block becomes a dense and a harmonic one",
        (
            "network", "DenseNet (paper)", "first block (paper)", "second block (paper)", "blocks 3, 4 (ours)",
            "depths", "DenseNet links", "our links", "ratio",
        ),
        tuple(rows),
        (
            "The paper's text also calls the split of 24 layers '8 and 16'; its tables and its numbers are 12 + 16.",
            "The paper's formula for the second block leaves open which even layers read which 2^m; the released "
            "networks, and ours, read i - 2^m where 2^m divides i (harmonic).",
            "DenseNet121 has the block of 24 layers, DenseNet169 the one of 32.",
        ),
    )  # fmt: skip


def _stages_table(name: str) -> Table:
    networks = [_network("thresholdnet_v1"), _network("thresholdnet_v2")]
    sides = [_output_sides(network) for network in networks]
    rows: list[tuple[Cell, ...]] = []
    for printed in PRINTED_STAGES:
        side, other = (found[printed.part] for found in sides)
        size = _size(side) if side == other else f"{_size(side)}, {_size(other)}"
        parts = [_part(network, printed.part) for network in networks]
        ours = [_described(part) for part in parts]
        difference = _stage_difference(printed, parts, (side, other))
        rows.append(
            (
                printed.layer, _size(printed.side), size, printed.v1, ours[0], printed.v2, ours[1], difference,
            )
        )  # fmt: skip
    return Table(
        f"Table {name}. Layers of ThresholdNet v1 and v2 at {SIDE}x{SIDE}",
        ("layer", "size (paper)", "size (ours)", "v1 (paper)", "v1 (ours)", "v2 (paper)", "v2 (ours)", "difference"),
        tuple(rows),
        (
            "An arrow gives output channels. Every 1x1 and 3x3 convolution outside the bottleneck units is followed "
            "by BatchNorm and ReLU.",
            "Ours are the released networks; plain 3x3 layers in blocks 1 to 3 give 15,497,392 and 17,847,472 "
            "parameters, where Table VIII prints 15.32M and 17.14M.",
        ),
    )


def _stage_difference(printed: PrintedStage, parts: Sequence[nn.Module], sides: tuple[int, ...]) -> str:
    if printed.v1 is None:
        return "not in the paper's table"
    found = [f"output {_size(side)}" for side in dict.fromkeys(sides) if side != printed.side]
    for part, paper in zip(parts, (printed.v1, printed.v2), strict=True):
        if _layers(part) != paper:
            found.append(_reason(part))
    return "; ".join(dict.fromkeys(found)) or SAME


def _reason(part: nn.Module) -> str:
    """Why a line of ours reads otherwise than the paper's."""
    if isinstance(part, ThresholdBlock) and part.plan.unit == "bottleneck":
        return "bottleneck units, not plain 3x3"
    if isinstance(part, nn.Linear):
        return "softmax is left to the loss"
    return f"ours is {_layers(part)}"


def _counts_table(name: str) -> Table:
    notes = [
        "#MAdds and #FLOPS of ours follow the rule behind the paper's table (torchstat's; see thresholdnet.counting); "
        "MACs are the plain multiply-accumulates of convolutions and linear layers.",
        "Ratios are ours over the paper's, its slips corrected; DenseNet121 and ResNet50 print parameters cut short, "
        "not rounded.",
    ]
    rows: list[tuple[Cell, ...]] = []
    for printed in PRINTED_NETWORKS:
        row, problem = _counts_row(printed)
        rows.append(row)
        if problem and problem not in notes:
            notes.append(problem)
    return Table(
        f"Table {name}. Parameters and operations of one {SIDE}x{SIDE} image, 1000 classes",
        (
            "network", "block depths",
            "#Params (paper)", "#Params (ours)", "#Params ratio",
            "#MAdds (paper)", "#MAdds (ours)", "#MAdds ratio",
            "#FLOPS (paper)", "#FLOPS (ours)", "#FLOPS ratio",
            "MACs (ours)", "note",
        ),
        tuple(rows),
        tuple(notes),
    )  # fmt: skip


def _counts_row(printed: PrintedNetwork) -> tuple[tuple[Cell, ...], str]:
    """A row of Table VIII, and why ours is missing from it ("" where it is not)."""
    try:
        model = create_model(printed.model, device="meta")
    except RuntimeError as error:  # torchvision's model without torchvision
        blank: tuple[Cell, ...] = (None, None)
        figures = (printed.parameters, *blank, printed.madds, *blank, printed.flops, *blank, None)
        note = "; ".join(filter(None, (printed.slip, "ours needs torchvision")))
        return (printed.name, printed.depths, *figures, note), f"Not counted: {error}"
    ours = count(model, (1, 3, SIDE, SIDE))
    figures = (
        printed.parameters, ours.parameters, _ratio(ours.parameters, printed.parameters),
        printed.madds, ours.madds, _ratio(ours.madds, printed.meant_madds or printed.madds),
        printed.flops, ours.flops, _ratio(ours.flops, printed.flops),
        ours.macs,
    )  # fmt: skip
    return (printed.name, printed.depths, *figures, printed.slip), ""


def _ratio(ours: int, printed: str) -> float:
    """Ours over a printed figure such as "7.97M" or "2.88G"."""
    return round(ours / (float(printed[:-1]) * {"M": 1e6, "G": 1e9}[printed[-1]]), 4)


_TABLES: dict[str, Callable[[str], Table]] = {
    "I": _links_table,
    "II": _links_table,
    "III": _links_table,
    "IV": _split_table,
    "V": _stages_table,
    "VIII": _counts_table,
}
TABLES: tuple[str, ...] = tuple(_TABLES)
"""The names that `table` takes."""


# ---------------------------------------------------------------- reading the built networks


def _network(name: str) -> Network:
    network = create_model(name, device="meta").eval()
    assert isinstance(network, Network)
    return network


def _block(network: Network, stage: int) -> ThresholdBlock:
    block = _part(network, (stage, "block"))
    assert isinstance(block, ThresholdBlock)
    return block


def _part(network: Network, part: tuple[int, str]) -> nn.Module:
    """The module that a line of Table V speaks of; the functional global pool is stood for by an Identity."""
    stage, name = part
    if stage > len(network.stages):
        return network.head if name == "head" else nn.Identity()
    owner = network.stages[stage - 1] if stage else network.stem
    return owner.get_submodule(name)


def _output_sides(network: Network) -> dict[tuple[int, str], int]:
    """Output side in pixels of every line of Table V, by running the network on the meta device."""
    last = len(network.stages) + 1
    sides = {(last, "pool"): 1, (last, "head"): 1}  # [N, C]: one pixel
    handles = []
    for part in (printed.part for printed in PRINTED_STAGES):
        if part not in sides:

            def note(_module: nn.Module, _inputs: object, output: Tensor, part: tuple[int, str] = part) -> None:
                sides[part] = output.shape[-1]

            handles.append(_part(network, part).register_forward_hook(note))
    with torch.no_grad():
        network(torch.empty(1, network.in_chans, SIDE, SIDE, device="meta"))
    for handle in handles:
        handle.remove()
    return sides


def _layers(module: nn.Module) -> str:
    """A module in the words of Table V."""
    if isinstance(module, ThresholdBlock):
        unit = "1x1, 3x3 conv" if module.plan.unit == "bottleneck" else "3x3 conv"
        return f"[{unit}] x {len(module.links)}"
    if isinstance(module, nn.MaxPool2d):
        return f"{module.kernel_size}x{module.kernel_size} max pool"
    if isinstance(module, nn.Linear):
        return f"{module.out_features}D fully-connected"
    if isinstance(module, nn.Identity):
        return "1x1 average pool"
    conv = _convolution(module)
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} conv"


def _described(module: nn.Module) -> str:
    """`_layers` with what Table V leaves out: the links of a block, and output channels."""
    if isinstance(module, ThresholdBlock):
        return f"{_layers(module)}, {module.links.pattern} -> {module.out_channels}"
    if isinstance(module, ConvBNAct):
        return f"{_layers(module)} -> {_convolution(module).out_channels}"
    return _layers(module)


def _convolution(module: nn.Module) -> nn.Conv2d:
    return next(part for part in module.modules() if isinstance(part, nn.Conv2d))


def _size(side: int | None) -> str | None:
    return None if side is None else f"{side}x{side}"


# ---------------------------------------------------------------- formats


def to_text(source: Table, width: int | None = None) -> str:
    """The table framed for a terminal; `width` in characters wraps it, None lets it be as wide as it is.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as Frame
        from rich.text import Text
    except ImportError as error:
        raise ImportError(f"text tables need rich: pip install 'thresholdnet[cli]' ({error})") from error

    frame = Frame(box=SIMPLE_HEAD, pad_edge=False)
    for name, column in zip(source.header, _columns(source), strict=True):
        numeric = all(isinstance(cell, int | float | None) for cell in column)
        frame.add_column(name, justify="right" if numeric else "left", overflow="fold")  # no digit is ever cut
    for row in source.rows:
        frame.add_row(*(Text(_shown(cell)) for cell in row))  # Text: brackets are no markup
    sink = io.StringIO()
    console = Console(file=sink, width=width or 10_000, color_system=None, highlight=False)
    console.print(Text(source.title))
    console.print(frame)
    for note in source.notes:
        console.print(Text(note))
    lines = [line.rstrip() for line in sink.getvalue().splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def to_markdown(source: Table) -> str:
    """The table in GitHub's Markdown, its title in bold above it and its notes as a list below."""
    lines = [f"**{source.title}**", "", _markdown_row(source.header)]
    numeric = (all(isinstance(cell, int | float | None) for cell in column) for column in _columns(source))
    lines.append(_markdown_row("---:" if right else "---" for right in numeric))
    lines.extend(_markdown_row(_shown(cell) for cell in row) for row in source.rows)
    if source.notes:
        lines += ["", *(f"- {note}" for note in source.notes)]
    return "\n".join(lines) + "\n"


def to_csv(source: Table) -> str:
    """Header and rows in CSV, numbers in full, missing values empty; title and notes are left out."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(source.header)
    writer.writerows(source.rows)
    return sink.getvalue()


def to_json(source: Table) -> str:
    """The table as a JSON object with title, header, rows and notes; missing values are null."""
    return json.dumps(asdict(source), indent=2, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""Every format by its name on the command line."""


def _columns(source: Table) -> Iterable[Sequence[Cell]]:
    return zip(*source.rows, strict=True)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(cell: Cell) -> str:
    """A cell for the eye: thousands apart, ratios with three digits, a dash where there is none."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
