"""What the runs below a folder say, beside the paper: Markdown, JSON and a picture a part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from experiments import DESCRIPTION, history

from thresholdnet import figures, memory
from thresholdnet.blocks import ThresholdBlock
from thresholdnet.checkpoint import INFO_KEY, read_checkpoint, write_atomic
from thresholdnet.models import create_model
from thresholdnet.tables import PRINTED_RESULTS, Table, to_markdown
from thresholdnet.train import RECIPES

Row = dict[str, Any]
BATCH = 100  # the paper's; step times are those of so many images
DATA = {"VI": "cifar10", "VII": "stl10", "sweep": "cifar10"}
TITLES = {
    "VI": "Table VI. CIFAR-10",
    "VII": "Table VII. STL-10",
    "sweep": "Threshold sweep: what a larger threshold buys and costs",
}
THEIRS = "GTX 3080 Ti, PyTorch 1.1.0"
BASE = "thresholdnet_v1"
ALIKE = ("data", "root", "image_size", "limit", "recipe", "precision", "fused", "backend", "cuda_graph")
"""What runs must share to be compared, but for their epochs."""


def collect(out: Path) -> dict[str, Any]:
    """Everything below `out`: {part: {"title", "rows", "differs", "runs"}}; parts without an epoch are left out.

    Raises:
        ValueError: no run with a finished epoch.
    """
    runs = [_run(file.parent) for file in sorted(out.glob(f"*/*/*/{DESCRIPTION}")) if history(file.parent)]
    if not runs:
        raise ValueError(f"--out must hold at least one run with a finished epoch, got {out}")
    parts = {}
    for part in DATA:
        chosen = [run for run in runs if run["part"] == part]
        if chosen:
            rows = _table_rows(part, chosen) if part in PRINTED_RESULTS else _sweep_rows(chosen)
            parts[part] = {"title": TITLES[part], "rows": rows, "differs": differences(part, chosen), "runs": chosen}
    return parts


def write(parts: dict[str, Any], folder: Path) -> list[Path]:
    """report.md, report.json and a picture a part, into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, files = [], []
    for part, found in parts.items():
        picture = folder / f"{part}.png"
        title = f"{found['title']} ({_settings(found['runs'])})"
        if part == "sweep":
            figures.trade_off(found["rows"], picture, title)
        else:
            figures.beside_paper([row for row in found["rows"] if row["seeds"]], BASE, picture, title)
        text += [to_markdown(as_table(part, found)), f"![{found['title']}]({picture.name})\n"]
        files.append(picture)
    for name, content in (("report.md", "\n".join(text)), ("report.json", json.dumps(parts, indent=1) + "\n")):
        write_atomic(folder / name, content.encode())
        files.insert(0, folder / name)
    return files


def as_table(part: str, found: dict[str, Any]) -> Table:
    """A part as the package's kind of table, what differs below it."""
    return Table(found["title"], *(_sweep_table(found) if part == "sweep" else _paper_table(found)))


def _paper_table(found: dict[str, Any]) -> tuple[Any, ...]:
    header = (
        "network", "seeds", "epochs", "error % (paper)", "ours, best", "ratio", "ours, last", "step ms (paper)", "ours",
        "ratio ", f"of {BASE} (paper)", f"of {BASE} (ours)", "epoch s (paper)", "epoch s (ours)", "links", "parameters",
        "kept MiB, plain", "kept MiB, fused",
    )  # fmt: skip
    rows = []
    for row in found["rows"]:
        rows.append(
            (
                row["network"], row["seeds"], _range(row["epochs"]),
                row["paper_error"], _spread(row["errors"]), row["error_ratio"], _spread(row["last_errors"]),
                row["paper_step_ms"], _rounded(row["step_ms"], 1), row["step_ratio"],
                row["paper_of_base"], row["of_base"],
                row["paper_epoch_s"], _rounded(row["epoch_s"], 1), row["links"], row["parameters"],
                _mib(row["kept_plain"]), _mib(row["kept_fused"]),
            )
        )  # fmt: skip
    return header, tuple(rows), tuple(found["differs"])


def _sweep_table(found: dict[str, Any]) -> tuple[Any, ...]:
    header = ("pattern", "threshold", "seeds", "epochs", "error %, best", "last", "step ms",
              "links", "parameters", "kept MiB, plain", "kept MiB, fused")  # fmt: skip
    rows = tuple(
        (
            row["pattern"], str(row["threshold"]), row["seeds"], _range(row["epochs"]), _spread(row["error"]),
            _spread(row["last_error"]), _rounded(row["step_ms"], 1), row["links"], row["parameters"],
            _mib(row["kept_plain"]), _mib(row["kept_fused"]),
        )
        for row in found["rows"]
    )  # fmt: skip
    return header, rows, tuple(found["differs"])


# ---------------------------------------------------------------- reading runs


def _run(folder: Path) -> Row:
    """What one run's folder says: its description, its figures, what its network costs."""
    about = json.loads((folder / DESCRIPTION).read_text())
    config = json.loads((folder / "config.json").read_text())
    epochs = history(folder)
    info = read_checkpoint(folder / "checkpoints" / "best.ckpt")[INFO_KEY]
    recipe = config["recipe"]
    return {
        **about,
        **{
            key: config[key]
            for key in ("model", "model_args", "data", "limit", "precision", "seed", "fused", "backend")
        },
        "cuda_graph": config.get("cuda_graph", False),  # older runs had none
        "root": Path(config["root"]).name if config["root"] else None,
        "image_size": info["image_size"],
        "classes": info["num_classes"],
        "recipe": recipe,
        "epochs": len(epochs),
        "error": 100 * (1 - max(row["test_accuracy"] for row in epochs)),
        "last_error": 100 * (1 - epochs[-1]["test_accuracy"]),
        **_times(epochs, about.get("at_once", 1)),
        **costs(info["model"], info["model_args"], info["num_classes"], info["image_size"]),
    }


def _times(epochs: Sequence[dict[str, float]], at_once: int) -> dict[str, float | None]:
    """None where other runs shared the machine."""
    if at_once > 1:
        return {"step_ms": None, "epoch_s": None}
    return {
        "step_ms": median(1e3 * BATCH / row["images_per_second"] for row in epochs),
        "epoch_s": median(row["seconds"] for row in epochs),
    }


@lru_cache
def _kept(model: str, model_args: str, classes: int, side: int) -> dict[str, int]:
    """Counted once for all seeds; arguments as JSON, which can be a key."""
    network = create_model(model, num_classes=classes, device="meta", **json.loads(model_args))
    return memory.kept(network, (BATCH, 3, side, side), torch.float32)


def costs(model: str, model_args: dict[str, Any], classes: int, side: int) -> Row:
    """Links of all blocks (None where there are none), parameters, and the bytes that a step keeps for backward.

    The step has `BATCH` float32 images and is counted on the meta device, plain (with concatenation) and fused.
    Networks without our blocks have no fused form.
    """
    network = create_model(model, num_classes=classes, device="meta", **model_args)
    blocks = [module for module in network.modules() if isinstance(module, ThresholdBlock)]
    kept = _kept(model, json.dumps(model_args), classes, side)
    return {
        "links": sum(block.links.total for block in blocks) or None,
        "parameters": sum(p.numel() for p in network.parameters()),
        "kept_plain": kept["eager"],
        "kept_fused": kept["fused"] if blocks else None,
    }


def _table_rows(part: str, runs: Sequence[Row]) -> list[Row]:
    base = next(printed for printed in PRINTED_RESULTS[part] if printed.model == BASE)
    base_runs = [run for run in runs if run["label"] == BASE]
    base_step = _mean([run["step_ms"] for run in base_runs])
    rows = []
    for printed in PRINTED_RESULTS[part]:
        labels = [label for label in dict.fromkeys(run["label"] for run in runs)
                  if label in (printed.model, f"{printed.model}-small")]  # fmt: skip
        for label in labels or [printed.model]:
            same = [run for run in runs if run["label"] == label]
            ours = _averaged(same)
            rows.append(
                {
                    "network": printed.name + (", 3x3 stem" if label.endswith("-small") else ""),
                    "paper_error": printed.error,
                    "paper_step_ms": printed.step_ms,
                    "paper_epoch_s": printed.epoch_s,
                    "paper_of_base": round(printed.step_ms / base.step_ms, 3),
                    "errors": [run["error"] for run in same],
                    "last_errors": [run["last_error"] for run in same],
                    **ours,
                    "error_ratio": _over(ours["error"], printed.error),
                    "step_ratio": _over(ours["step_ms"], printed.step_ms),
                    "of_base": _over(ours["step_ms"], base_step),
                }
            )
    return rows


def _sweep_rows(runs: Sequence[Row]) -> list[Row]:
    rows = []
    for label in dict.fromkeys(run["label"] for run in runs):
        same = [run for run in runs if run["label"] == label]
        lists = {key: [run[key] for run in same] for key in ("error", "last_error")}
        name = same[0]["model"].removeprefix("thresholdnet_")
        rows.append({"pattern": name, "threshold": same[0]["model_args"]["threshold"], **_averaged(same), **lists})
    return rows


def _averaged(runs: Sequence[Row]) -> Row:
    """A row's figures over its seeds; None where there is no run yet."""
    if not runs:
        empty = ("error", "last_error", "step_ms", "epoch_s", "links", "parameters", "kept_plain", "kept_fused")
        return {"seeds": 0, "epochs": [], **dict.fromkeys(empty)}
    averages = {key: _mean([run[key] for run in runs]) for key in ("error", "last_error", "step_ms", "epoch_s")}
    fixed = {key: runs[0][key] for key in ("links", "parameters", "kept_plain", "kept_fused")}
    return {"seeds": len(runs), "epochs": [run["epochs"] for run in runs], **averages, **fixed}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


# ---------------------------------------------------------------- what differs from the paper


def differences(part: str, runs: Sequence[Row]) -> list[str]:
    """What stands between these runs and the paper's, a sentence each."""
    recipe = RECIPES["released"]
    epochs = sorted({run["epochs"] for run in runs})
    found = []
    if part == "sweep":
        found.append("The paper announces this trade-off and prints no figures for it.")
    for data, root, side in dict.fromkeys((run["data"], run["root"], run["image_size"]) for run in runs):
        if data != DATA[part]:
            name = f"{data} {root}" if root else data
            found.append(
                f"Data: {name} at {side}x{side} stands in for {DATA[part]}; errors compare only within this table."
            )
    for limit in dict.fromkeys(run["limit"] for run in runs):
        if limit is not None:
            found.append(f"Limit: {limit:,} images of each split at most.")
    if epochs != [recipe.epochs]:
        found.append(f"Epochs: {_range(epochs)}, the released recipe has {recipe.epochs}.")
    if len(epochs) > 1:
        found.append("Some runs have more epochs than others: their errors do not compare.")
    mixed = [key for key in ALIKE if len({json.dumps(run[key]) for run in runs}) > 1]
    if mixed:
        found.append(f"Runs differ in {', '.join(mixed)}: what they have in one row or column does not compare.")
    if len({_machine(m) for run in runs for m in run["machines"]}) > 1:
        found.append("Runs were made on several machines or by several commits: their times do not compare.")
    for name in dict.fromkeys(run["recipe"]["name"] for run in runs):
        if name != recipe.name:
            found.append(f"Recipe: {name}, not the released one.")
    precisions = ", ".join(dict.fromkeys(run["precision"] for run in runs))
    engine = {f"fused ({run['backend']})" if run["fused"] else "plain" for run in runs}
    found.append(f"Precision: {precisions} (the paper names none); our blocks run {' and '.join(sorted(engine))}.")
    if any(run["cuda_graph"] for run in runs):
        found.append("Steps: CUDA graphs, optimizer included, which PyTorch 1.1.0 had not.")
    if part in PRINTED_RESULTS and any(run["label"].endswith("-small") for run in runs):
        found.append("The paper names no stem; '3x3 stem' is stride 1 without a pool, in place of ImageNet's 7x7.")
    if any(run["model_args"].get("width_rule") == "constant" for run in runs):
        found.append("Every layer has width k: nothing but the links changes with the threshold.")
    others = [
        ", ".join(
            f"{key} {value}" for key, value in run["model_args"].items() if key not in ("width_rule", "threshold")
        )
        for run in runs
    ]
    if part == "sweep" and any(others):
        found.append(f"Networks: {'; '.join(text or 'as in the zoo' for text in dict.fromkeys(others))}.")
    if any(run.get("at_once", 1) > 1 for run in runs):
        found.append("Runs that shared the machine with others have no times here.")
    for text in dict.fromkeys(_machine(m) for run in runs for m in run["machines"]):
        found.append(f"Machine: {text}; the paper's: {THEIRS}.")
    found.append(
        "Best is the lowest test error of the epochs, chosen on the test set as the released code does; last is the "
        "last epoch's. With several seeds: mean (lowest to highest)."
    )
    found.append(
        f"Step: training time of {BATCH} images, median of the epochs, slowed by whatever else the machine did; epoch: "
        "with its test. Kept: activations from forward to backward, float32, counted on the meta device."
    )
    return found


def _machine(machine: Row) -> str:
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    dirty = " with changes" if machine["dirty"] else ""
    return f"{where}, torch {machine['torch']}, commit {str(machine['commit'])[:10]}{dirty}"


def _settings(runs: Sequence[Row]) -> str:
    """The few words that a picture needs to stand alone."""
    data = "/".join(dict.fromkeys(run["data"] for run in runs))
    words = [data, f"epochs: {_range(run['epochs'] for run in runs)}", runs[0]["recipe"]["name"] + " recipe"]
    limits = {run["limit"] for run in runs} - {None}
    return ", ".join([*words, *(f"{limit} images" for limit in sorted(limits))])


# ---------------------------------------------------------------- cells


def _over(ours: float | None, paper: float | None) -> float | None:
    return None if ours is None or paper is None else round(ours / paper, 3)


def _rounded(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _mib(value: int | None) -> str | None:
    return None if value is None else f"{value / 2**20:,.1f}"


def _spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    return f"{mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def _range(values: Iterable[int]) -> str | None:
    known = sorted(set(values))
    if not known:
        return None
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
