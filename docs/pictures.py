"""The documentation's pictures, each drawn from the code it explains: plans, slots, K tables, the engine's own calls.

python docs/pictures.py FOLDER [NAME ...]     write them there, to look at; mkdocs takes them through hooks.py
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from thresholdnet.kernels import slots
from thresholdnet.kernels.tables import LANES, TAP_BITS, Source, k_table, tap_shifts

import thresholdnet as tn
from thresholdnet import engine
from thresholdnet.backends import cuda_launch, slotted
from thresholdnet.diagrams import arc_diagram
from thresholdnet.figures import memory_bars
from thresholdnet.memory import Account, over_time

ROOT = Path(__file__).resolve().parents[1]
INK, FAINT, READ, WRITTEN, BOTH = "#222222", "#b8b8b8", "#4878a8", "#d9731a", "#6b3fa0"
NODES = ("#5f6368", "#4878a8", "#e0a030", "#2a7f4f", "#d1495b", "#17becf", "#b58bc8", "#8c6d31", "#7fc29b")
HATCH = {"facecolor": "white", "edgecolor": FAINT, "hatch": "////", "linewidth": 0.5}

PLAN = tn.plan_block(24, tn.links.threshold_ab(6, 3), 12)
"""The block of the pictures: six layers, dense up to the third, of widths that leave padding."""


def links(path: Path) -> None:
    """Every pattern for 16 layers."""
    arc_diagram([tn.links.make(name, 16, threshold=8, n=2) for name in tn.links.PATTERNS], path)


def memory(path: Path) -> None:
    """Kept and peak bytes of ThresholdNet v1, as `thresholdnet memory --json` wrote them."""
    report = json.loads((ROOT / "bench" / "results" / "memory" / "thresholdnet_v1-224-b128-bf16.json").read_text())
    memory_bars(
        {mode: Account(**entry) for mode, entry in report.items()}, path, "thresholdnet_v1, 128 x 224 x 224, bf16"
    )


def memory_over_time(path: Path) -> None:
    """Bytes alive after every operation of a training step of ThresholdNet v1 on the meta device."""
    shape = (128, 3, 224, 224)
    figure, (axes,) = _figure(8, 3.6)
    model = tn.create_model("thresholdnet_v1", device="meta")
    for colour, (mode, halves) in zip(NODES, over_time(model, shape).items(), strict=False):
        x = np.concatenate([np.linspace(i, i + 1, len(half)) for i, half in enumerate(halves)])
        y = np.concatenate(halves) / 2**30
        axes.plot(x, y, color=colour, linewidth=1.2, label=f"{mode}: at most {y.max():.2f} GiB")
    axes.axvline(1, color=FAINT, linewidth=1, linestyle="--")
    axes.set(xlim=(0, 2), ylim=(0, None), ylabel="GiB of activations alive", xticks=[0.5, 1.5])
    axes.set_xticklabels(["forward, operation by operation", "backward, operation by operation"])
    axes.set_title(f"thresholdnet_v1, {' x '.join(map(str, shape))}, bf16", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def slot_layouts(path: Path) -> None:
    """Where the nodes of a block lie: both layouts of an allocation, and the shared slots of inference."""
    figure, (top, bottom) = _figure(9, 6.2, rows=2, height_ratios=(1, 1.5))
    height, width = 2, 3
    for row, layout in enumerate(slots.LAYOUTS):
        laid = slots.allocate(1, PLAN.node_widths, height, width, dtype=torch.float32, device="cpu", layout=layout)
        for node, slot in enumerate(laid):
            for pixel in range(height * width):
                start = slot.storage_offset() + pixel * slot.stride(3)
                for part, first, last in (
                    ({"facecolor": NODES[node], "linewidth": 0}, start, start + slot.shape[1]),
                    (HATCH, start + slot.shape[1], start + slots.whole(slot).shape[1]),
                ):
                    if last > first:
                        top.add_patch(Rectangle((first, row), last - first, 0.7, **part))
    total = slots.row_of(PLAN.node_widths) * height * width
    top.set(xlim=(0, total), ylim=(2, -0.3), yticks=[0.35, 1.35], xlabel="element of the allocation")
    top.set_yticklabels(slots.LAYOUTS)
    top.set_title(f"One allocation for all nodes, {height} x {width} pixels", fontsize=10, loc="left")
    for node, (slot, (start, last)) in enumerate(zip(PLAN.inference_slots, PLAN.lifetimes, strict=True)):
        at = (start, slot.offset)
        bottom.add_patch(Rectangle(at, last + 1 - start, slot.width, facecolor=NODES[node], edgecolor="white"))
        if slot.padded > slot.width:
            bottom.add_patch(
                Rectangle((start, slot.offset + slot.width), last + 1 - start, slot.padded - slot.width, **HATCH)
            )
        bottom.text(start + 0.1, slot.offset + slot.width / 2, f"{node}", color="white", va="center", fontsize=9)
    bottom.axhline(PLAN.inference_channels, color=INK, linewidth=1)
    bottom.axhline(PLAN.buffer_channels, color=INK, linewidth=1, linestyle="--")
    bottom.text(0.1, PLAN.inference_channels + 2, f"inference: {PLAN.inference_channels} channels a pixel", fontsize=9)
    bottom.text(
        0.1,
        PLAN.buffer_channels + 2,
        f"training: {PLAN.buffer_channels}, a slot for every node",
        fontsize=9,
    )
    steps = PLAN.num_layers + 2
    bottom.set(xlim=(0, steps), ylim=(0, PLAN.buffer_channels * 1.12), ylabel="channel of a pixel")
    bottom.set_xticks(np.arange(steps) + 0.5, ["enter", *(f"layer {i}" for i in range(1, steps - 1)), "leave"])
    bottom.set_title("Inference: a slot is taken again once nobody reads it any more", fontsize=10, loc="left")
    names = [f"node {node}: {width}" for node, width in enumerate(PLAN.node_widths)]
    handles = [Patch(color=NODES[node], label=name) for node, name in enumerate(names)]
    figure.legend(
        handles=[*handles, Patch(**HATCH, label="padding to 8")], loc="outside lower center", ncols=4, frameon=False,
        fontsize=9, title="channels of the nodes", title_fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def k_table_of_a_layer(path: Path) -> None:
    """The K table of a layer's 3x3 convolution, decoded as a kernel does it."""
    layer, chunk, image_width = 4, 64, 10
    row = slots.row_of(PLAN.node_widths)
    nodes = PLAN.links[layer - 1]
    sources = tuple(Source(PLAN.slots[node].offset, PLAN.node_widths[node], row) for node in nodes)
    table = k_table(sources, image_width, 3, chunk)
    shifts = tap_shifts(3)
    per_chunk = chunk // LANES
    figure, (axes,) = _figure(9, 1.5 + 0.34 * table.chunks)
    for position, entry in enumerate(table.entries[: table.chunks * per_chunk]):
        line, column = divmod(position, per_chunk)
        tap = entry & (1 << TAP_BITS) - 1
        dy, dx = shifts[tap]
        channel = (entry >> TAP_BITS) * LANES - (dy * image_width + dx) * row
        node = next(n for n, s in zip(nodes, sources, strict=True) if s.offset <= channel < s.offset + s.padded)
        real = (table.weight_index[0][position * LANES : (position + 1) * LANES] >= 0).any()
        look: dict[str, Any] = {"facecolor": NODES[node], "edgecolor": "white"} if real else HATCH
        axes.add_patch(Rectangle((column, line), 1, 1, **look))
        if real:
            first = channel - PLAN.slots[node].offset
            told = f"{first}-{first + LANES - 1}, ({dy}, {dx})"
            axes.text(column + 0.5, line + 0.5, told, color="white", ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(0, per_chunk), ylim=(table.chunks, 0), xticks=[], ylabel="chunk of K")
    axes.set_yticks(np.arange(table.chunks) + 0.5, range(table.chunks))
    axes.set_title(
        f"Layer {layer} reads nodes {', '.join(map(str, nodes))}: channels of the node, (dy, dx) of the tap; "
        f"K = {table.chunks} x {chunk}",
        fontsize=10, loc="left",
    )  # fmt: skip
    handles = [Patch(color=NODES[node], label=f"node {node}") for node in nodes]
    figure.legend(
        handles=[*handles, Patch(**HATCH, label="fills the chunk: zero weights")], loc="outside lower center",
        ncols=len(nodes) + 1, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def launches(path: Path) -> None:
    """Which slots every launch of a training step reads and writes, as the engine called them."""
    calls, kinds = _recorded()
    columns = [(kind, index) for kind, indices in kinds.items() for index in indices]
    grid = np.zeros((len(calls), len(columns)), int)
    for line, (_, read, written) in enumerate(calls):
        for column, place in enumerate(columns):
            grid[line, column] = (place in read) + 2 * (place in written)
    figure, (axes,) = _figure(7, 0.9 + 0.2 * len(calls))
    axes.pcolormesh(
        grid, cmap=ListedColormap(["white", READ, WRITTEN, BOTH]), vmin=0, vmax=3, edgecolors="#e8e8e8", lw=0.5
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(calls)) + 0.5, [name for name, _, _ in calls], fontsize=7.5)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [str(index) for _, index in columns], fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    start = 0
    for kind, indices in kinds.items():
        axes.text(start + len(indices) / 2, -1.9, TITLES[kind], ha="center", fontsize=9)
        start += len(indices)
        axes.axvline(start, color=INK, linewidth=0.8)
    forward = next(i for i, (name, _, _) in enumerate(calls) if name.startswith("backward"))
    axes.axhline(forward, color=INK, linewidth=0.8)
    handles = [Patch(color=c, label=text) for c, text in ((READ, "read"), (WRITTEN, "written"), (BOTH, "both"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


TITLES = {"node": "nodes y (workspace)", "raw": "raw outputs z (kept)", "gradient": "gradients (workspace)"}


def _recorded() -> tuple[list[tuple[str, set[Any], set[Any]]], dict[str, range]]:
    """A training step of PLAN through the engine with a launcher that computes nothing and notes its operands.

    Returns each call's name, the places (kind, index) that it read and that it wrote, and the indices of every kind.
    """
    calls: list[tuple[str, set[Any], set[Any]]] = []
    phase = ["forward"]

    class Verbs(slotted.Verbs):
        def __init__(self, plan: Any, x: torch.Tensor):
            super().__init__(plan, x)
            self.launch: Any = SimpleNamespace(
                conv=self._conv, normalise=self._normalise, gradient=self._gradient, bn_backward=self._bn_backward,
                weight_gradient=self._weight_gradient, batch_norm_affine=cuda_launch.batch_norm_affine,
                batch_norm_vectors=cuda_launch.batch_norm_vectors,
            )  # fmt: skip

        def _note(self, name: str, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
            calls.append((f"{phase[0]}: {name}", set(map(self._place, read)), set(map(self._place, written))))

        def _place(self, tensor: torch.Tensor) -> tuple[str, int]:
            for kind, tensors in self.arenas.items():
                for i, slot in enumerate(tensors):
                    if slot.data_ptr() == tensor.data_ptr():
                        return kind, i + (kind == "raw")
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} lies in no slot")

        def _conv(self, sources: Any, weight: Any, out: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self._note(f"convolve {self._place(out)[1]}", sources, [out])
            return torch.zeros(out.shape[1]), torch.ones(out.shape[1])

        def _normalise(self, z: torch.Tensor, scale: Any, shift: Any, out: torch.Tensor, activation: str) -> None:
            self._note(f"normalise {self._place(z)[1]}", [z], [out])

        def _gradient(self, dz: Any, weights: Any, out: torch.Tensor, *, add: bool, mask: Any, **_: Any) -> Any:
            read = [*dz, *([out] if add else []), *([] if mask is None else [mask[0]])]
            self._note(f"gather gradient {self._place(out)[1]}", read, [out])
            return None if mask is None else (torch.zeros(out.shape[1]), torch.zeros(out.shape[1]))

        def _bn_backward(self, g: torch.Tensor, z: torch.Tensor, *_: Any) -> None:
            self._note(f"BatchNorm's share {self._place(g)[1]}", [g, z], [g])

        def _weight_gradient(self, sources: Any, dz: torch.Tensor, size: int, **_: Any) -> torch.Tensor:
            self._note(f"weight gradient {self._place(dz)[1]}", [*sources, dz], [])
            return torch.zeros(dz.shape[1], sum(source.shape[1] for source in sources), size, size)

    module = SimpleNamespace(
        Verbs=Verbs, output_holds_features=slotted.output_holds_features, needs_input=slotted.needs_input
    )
    x = torch.zeros(1, PLAN.in_channels, 2, 2)
    parameters: list[torch.Tensor] = []
    for wide, read in zip(PLAN.widths, PLAN.link_widths, strict=True):
        parameters += [torch.zeros(wide, read, 3, 3), torch.ones(wide), torch.zeros(wide)]
    layers = PLAN.num_layers
    spec = engine.Spec(PLAN, [1e-5] * layers, [False] * layers, "relu", "recorded", True)
    with mock.patch.object(engine.call, "load", lambda name: module):
        out, statistics, saved = engine.forward(spec, x, parameters, [])
        phase[0] = "backward"
        engine.backward(spec, torch.zeros_like(out), x, parameters, statistics, saved, [True] * (1 + len(parameters)))
    return calls, {"node": range(layers + 1), "raw": range(1, layers + 1), "gradient": range(layers + 1)}


def operands() -> list[tuple[str, str, list[str], list[str]]]:
    """File, kernel, pointers that it loads from, and pointers that it stores to, read off the sources in kernels/.

    A helper's loads and stores count for the kernel that calls it; a pointer keeps its parameter's name.
    """
    found = []
    for file in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(file.read_text())
        kernels = [f for f in tree.body if isinstance(f, ast.FunctionDef) and "triton.jit" in _decorators(f)]
        uses = {f.name: _uses(f) for f in kernels}
        for f in kernels:
            read, written = (set(part) for part in uses[f.name])
            for call in (
                node for node in ast.walk(f) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            ):
                if call.func.id in uses and call.func.id != f.name:
                    helper = next(k for k in kernels if k.name == call.func.id)
                    names = {
                        p.arg: a.id
                        for p, a in zip(helper.args.args, call.args, strict=False)
                        if isinstance(a, ast.Name)
                    }
                    read |= {names[p] for p in uses[helper.name][0] if p in names}
                    written |= {names[p] for p in uses[helper.name][1] if p in names}
            order = [a.arg for a in f.args.args]
            if written and not f.name.startswith("_"):
                found.append((file.name, f.name, *([n for n in order if n in part] for part in (read, written))))
    return found


def _decorators(function: ast.FunctionDef) -> str:
    return " ".join(map(ast.unparse, function.decorator_list))


def _uses(function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Parameters behind the addresses of tl.load and of tl.store; local names are followed to what they are made of."""
    parameters = {a.arg for a in function.args.args}
    made_of: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made_of.setdefault(node.targets[0].id, []).append(node.value)

    def base(expression: ast.expr, seen: frozenset[str] = frozenset()) -> set[str]:
        """The pointer leads a sum: it is the leftmost name."""
        while isinstance(expression, (ast.BinOp, ast.Subscript)):  # one of several pointers is a subscript
            expression = expression.left if isinstance(expression, ast.BinOp) else expression.value
        if not isinstance(expression, ast.Name) or expression.id in seen:
            return set()
        if expression.id in parameters:
            return {expression.id}
        return set().union(*(base(value, seen | {expression.id}) for value in made_of.get(expression.id, [])), set())

    read, written = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            (read if node.func.attr == "load" else written).update(base(node.args[0]))
    return read, written


PICTURES: dict[str, Callable[[Path], None]] = {
    "links.svg": links, "memory.png": memory, "memory-over-time.svg": memory_over_time, "slots.svg": slot_layouts,
    "k-table.svg": k_table_of_a_layer, "launches.svg": launches,
}  # fmt: skip


def _figure(width: float, height: float, rows: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, squeeze=False, gridspec_kw=grid or None)[:, 0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or PICTURES:
        PICTURES[name](folder / name)
        print(folder / name)
