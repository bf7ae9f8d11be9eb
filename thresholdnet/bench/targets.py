"""What the project wants to reach, as data: for each quantity what it must, and what it aims at.

A target speaks of rows of whole networks and names what they are measured against in the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rounds import label_of

Row = Mapping[str, Any]

BASE = "eager_channels_last"
OURS = "fused"
"""What the names of our providers begin with."""

CPU = {"device": "cpu", "image": 224, "batch": 8, "dtype": "fp32"}
GPU = {"device": "cuda", "image": 224, "batch": 128, "dtype": "bf16"}
SMALL = {"device": "cuda", "image": 32, "batch": 100, "dtype": "bf16"}
NAMES = {"thresholdnet_v1": "v1", "thresholdnet_v2": "v2", "hardnet68": "HarDNet68", "densenet121": "DenseNet121"}

Pair = tuple[float, float]
"""What must be, and the aim: at least for speeds, at most for bytes."""


@dataclass(frozen=True)
class Target:
    """One quantity.

    Attributes:
        what: "speed" (ratio of paired rounds), or "saved_bytes" or "peak_bytes" (share of the baseline's).
        setting: image, batch, dtype and device.
        model, mode, graph: of the rows that are meant.
        recompute: whether providers are meant that recompute bottleneck outputs, or those that do not.
        baseline: label of what it is measured against.
        bounds: what must be, and the aim.
    """

    what: str
    setting: Mapping[str, Any]
    model: str
    mode: str
    graph: bool
    recompute: bool
    baseline: str
    bounds: Pair

    @property
    def text(self) -> str:
        """In words: "training step, v1, against compile, 224x224 batch 128 bf16"."""
        step = {"train": "training step", "infer": "inference step"}[self.mode]
        what = {"speed": step, "saved_bytes": f"bytes kept by a {step}", "peak_bytes": f"peak bytes of a {step}"}
        setting = "{image}x{image} batch {batch} {dtype}".format(**self.setting)
        graphed = ", graphed" if self.graph else ""
        return f"{what[self.what]}{graphed}, {NAMES[self.model]}, against {self.baseline}, {setting}"

    def means(self, row: Row) -> bool:
        """Whether a row of results is one that the target speaks of."""
        wanted = {**self.setting, "model": self.model, "mode": self.mode, "graph": self.graph}
        found = {"device": "cpu", **row}  # older files are of CPUs and do not say so
        ours = row["provider"].startswith(OURS) and row["provider"].endswith("_recompute") == self.recompute
        return ours and wanted.items() <= found.items()

    def got(self, row: Row, rows: Sequence[Row]) -> float | None:
        """The row's value; None where the file has nothing to compare it with."""
        if "reason" in row:
            return None
        if self.what != "speed":
            return share(row, rows, self.what, self.baseline)
        ratio = row["ratios"].get(self.baseline)
        return None if ratio is None else float(ratio["median"])

    def verdict(self, value: float) -> str:
        """What became of it."""
        must, aim = (value >= bound if self.what == "speed" else value <= bound for bound in self.bounds)
        return "aim met" if aim else "must met" if must else "**missed**"


def share(row: Row, rows: Sequence[Row], key: str, baseline: str = BASE) -> float | None:
    """The row's bytes over those of another provider in the same case, both as graphs or neither: a graph's are its
    pool's. None without both, or where one is wrong."""
    keys = ("model", "image", "batch", "dtype", "mode", "graph")
    same = (other for other in rows if other["provider"] == baseline and all(other[k] == row[k] for k in keys))
    base = next(same, None)
    if base is None or "reason" in base or "reason" in row or not base[key] or row[key] is None:
        return None
    return float(row[key] / base[key])


def _speed(setting: Mapping[str, Any], mode: str, baseline: str, bounds: Mapping[str, Pair]) -> list[Target]:
    """Of several models, and for a GPU with both sides as graphs too."""
    graphs = (False, True) if setting["device"] == "cuda" else (False,)
    return [
        Target("speed", setting, model, mode, graph, False, label_of(baseline, graph), pair)
        for graph in graphs
        for model, pair in bounds.items()
    ]


def _bytes(what: str, setting: Mapping[str, Any], recompute: bool, bounds: Mapping[str, Pair]) -> list[Target]:
    return [Target(what, setting, model, "train", False, recompute, BASE, pair) for model, pair in bounds.items()]


TARGETS: tuple[Target, ...] = (
    *_speed(
        CPU, "train", BASE, {"thresholdnet_v1": (1.05, 1.15), "hardnet68": (1.0, 1.25), "densenet121": (1.06, 1.15)}
    ),
    *_speed(
        CPU, "infer", BASE, {"thresholdnet_v1": (1.08, 1.2), "hardnet68": (1.03, 1.3), "densenet121": (1.15, 1.25)}
    ),
    *_bytes(
        "saved_bytes", CPU, False,
        {"thresholdnet_v1": (0.32, 0.29), "hardnet68": (0.33, 0.26), "densenet121": (0.27, 0.23)},
    ),
    *_bytes("saved_bytes", CPU, True, {"thresholdnet_v1": (0.16, 0.13), "densenet121": (0.11, 0.083)}),
    *_speed(
        GPU, "train", BASE,
        {
            "thresholdnet_v1": (1.5, 2.0), "thresholdnet_v2": (1.5, 2.0), "hardnet68": (1.2, 1.6),
            "densenet121": (1.9, 2.6),
        },
    ),
    *_speed(
        GPU, "train", "compile",
        {
            "thresholdnet_v1": (1.25, 1.6), "thresholdnet_v2": (1.25, 1.6), "hardnet68": (1.0, 1.4),
            "densenet121": (1.4, 2.0),
        },
    ),
    *_speed(GPU, "infer", BASE, {"thresholdnet_v1": (1.5, 2.2)}),
    *_speed(GPU, "infer", "compile", {"thresholdnet_v1": (1.2, 1.6)}),
    *(
        Target("speed", SMALL, model, "train", True, False, baseline, pair)
        for model in NAMES
        for baseline, pair in ((BASE, (4.0, 8.0)), (label_of(BASE, True), (1.6, 2.2)))
    ),
    # the aims of networks with bottlenecks are for what recomputes them
    *_bytes(
        "peak_bytes", GPU, False,
        {
            "thresholdnet_v1": (0.33, 0.16), "thresholdnet_v2": (0.33, 0.16), "hardnet68": (0.36, 0.31),
            "densenet121": (0.27, 0.11),
        },
    ),
    *_bytes(
        "peak_bytes", GPU, True,
        {"thresholdnet_v1": (0.33, 0.16), "thresholdnet_v2": (0.33, 0.16), "densenet121": (0.27, 0.11)},
    ),
)  # fmt: skip
"""Every one, the CPU's first; of the first call's seconds a file cannot say whether the compiler's cache was cold."""
