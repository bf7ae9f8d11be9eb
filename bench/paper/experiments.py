"""What is trained: rows of Tables VI and VII and the threshold sweep, a folder each that a later call goes on with."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thresholdnet.bench.results import SAME, machine
from thresholdnet.checkpoint import write_atomic
from thresholdnet.checks import integer, number, one_of
from thresholdnet.tables import PRINTED_RESULTS
from thresholdnet.train import TrainConfig, train
from thresholdnet.train.config import check_same_run

# Families with ImageNet's 7x7 stem. The paper names no stem, and its times speak for both (tables.PRINTED_RESULTS).
TWO_STEMS = ("densenet", "resnet", "resnext", "wide_resnet")
PATTERNS = ("ab", "bc")
THRESHOLDS = (0, 4, 8, 12, 16)
LARGE = 96  # pixels of STL-10, and of what stands in for it
DESCRIPTION = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """One network of one part: "VI", "VII" or "sweep"; `label` is unique within it."""

    part: str
    label: str
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What all runs of a call share; the fields are the command's options."""

    out: Path
    root: Path | None = None
    stand_in: Path | None = None
    data: str | None = None
    epochs: int | None = None
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    recipe: str = "released"
    precision: str = "32"
    device: str = "auto"
    fused: bool = True
    backend: str = "auto"
    cuda_graph: bool = False
    save_every: int | None = None
    progress: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Run:
    """An experiment with one seed."""

    experiment: Experiment
    config: TrainConfig

    @property
    def name(self) -> str:
        """Folder below --out, and what --only looks at."""
        return f"{self.experiment.part}/{self.experiment.label}/seed{self.config.seed}"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.config.out_dir)

    @property
    def epochs(self) -> int:
        """Wanted ones."""
        return self.config.full_recipe().epochs


def of_table(part: str) -> Iterator[Experiment]:
    """The rows of Table VI or VII; networks of doubtful stem twice, ImageNet's stem first."""
    for row in PRINTED_RESULTS[one_of("table", part, PRINTED_RESULTS)]:
        yield Experiment(part, row.model, row.model)
        if row.model.startswith(TWO_STEMS):
            yield Experiment(part, f"{row.model}-small", row.model, {"small_stem": True})


def of_sweep(
    patterns: Sequence[str], thresholds: Iterable[int], model_args: Mapping[str, Any] | None = None
) -> Iterator[Experiment]:
    """ThresholdNet-ab and -bc at each threshold.

    Every layer has width k unless `model_args` says otherwise, so that nothing but the links changes.
    """
    for pattern in patterns:
        one_of("pattern", pattern, PATTERNS)
        for threshold in sorted(set(thresholds)):
            integer("threshold", threshold, 0)
            arguments = {"width_rule": "constant", **(model_args or {}), "threshold": threshold}
            yield Experiment("sweep", f"{pattern}-T{threshold:02}", f"thresholdnet_{pattern}", arguments)


def with_seeds(experiments: Iterable[Experiment], settings: Settings) -> list[Run]:
    """Every experiment with every seed, seed by seed: one seed of everything says more than all seeds of one row.

    Raises:
        ValueError: bad settings, or no data for Table VII.
    """
    experiments = list(experiments)
    return [Run(e, _config(e, seed, settings)) for seed in dict.fromkeys(settings.seeds) for e in experiments]


def _config(experiment: Experiment, seed: int, settings: Settings) -> TrainConfig:
    data, root = _data(experiment, settings)
    return TrainConfig(
        model=experiment.model,
        model_args=experiment.model_args,
        data=data,
        root=root,
        image_size=LARGE if experiment.part == "VII" or data == "imagefolder" else None,
        limit=settings.limit,
        recipe=settings.recipe,
        epochs=settings.epochs,
        seed=seed,
        out_dir=settings.out / experiment.part / experiment.label / f"seed{seed}",
        resume=True,
        precision=settings.precision,
        fused=settings.fused,
        backend=settings.backend,
        cuda_graph=settings.cuda_graph,
        accelerator=settings.device,
        **_saves(settings),
        progress=settings.progress,
        quiet=settings.quiet,
    )


def _saves(settings: Settings) -> dict[str, Any]:
    """How often: a minute of work may be lost. On a CPU an epoch takes minutes, on a GPU seconds, less than to save."""
    if settings.save_every is not None:
        return {"save_every": settings.save_every}
    return {"save_seconds": 60.0} if _on_gpu(settings.device) else {"save_every": 100}


def _on_gpu(device: str) -> bool:
    return torch.cuda.is_available() and device != "cpu"


def _data(experiment: Experiment, settings: Settings) -> tuple[str, Path | None]:
    if settings.data is not None:
        return settings.data, settings.root
    if experiment.part != "VII":
        return "cifar10", settings.root
    if settings.root is not None and (settings.root / "stl10_binary").is_dir():
        return "stl10", settings.root
    if settings.stand_in is not None:
        return "imagefolder", settings.stand_in
    raise ValueError(
        f"Table VII needs stl10_binary/ below --root, or an image folder with --stand-in, got --root {settings.root}"
    )


def history(folder: Path) -> list[dict[str, float]]:
    """The epochs that a run has finished, whether it ended, was stopped or was killed."""
    file = folder / "metrics.csv"
    if not file.exists():
        return []
    header, *rows = file.read_text().splitlines()
    return [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]


def is_done(run: Run) -> bool:
    """Whether the run has its epochs and its result is written."""
    file = run.folder / "result.json"
    if not file.exists():
        return False
    result = json.loads(file.read_text())
    return not result["interrupted"] and result["epochs"] >= run.epochs


def deadline_of(minutes: float | None) -> float:
    """When so many minutes from now are over, on the monotonic clock."""
    return math.inf if minutes is None else time.monotonic() + 60 * number("--minutes", minutes, 0)


def check_begun(runs: Sequence[Run]) -> None:
    """Check all runs before hours are spent on the first.

    Raises:
        ValueError: one was begun with other settings.
    """
    for run in runs:
        if (run.folder / "config.json").exists():
            check_same_run(run.config, run.folder)


def train_all(runs: Sequence[Run], minutes: float | None, say: Any, at_once: int = 1) -> int:
    """Train what is not done, in order, until the time is up.

    Args:
        minutes: of wall time for all runs together, from now on; None for no limit.
        say: prints one line.
        at_once: how many runs share the machine, which the report has to know.

    Returns:
        The signal that ended it, 0 if none did.
    """
    deadline = deadline_of(minutes)
    check_begun(runs)
    begun = False
    for index, run in enumerate(runs, 1):
        if is_done(run):
            continue
        left = deadline - time.monotonic()
        if left <= 0 and begun:  # every call trains a batch at least, however short its time
            break
        begun = True
        say(f"[{index}/{len(runs)}] {run.name}: {len(history(run.folder))} of {run.epochs} epochs done")
        _describe(run, at_once)
        result = train(run.config, minutes=None if minutes is None else max(left, 0) / 60)
        if result["interrupted"] and time.monotonic() < deadline:
            return int(result["signal"])
    return 0


def _describe(run: Run, at_once: int) -> None:
    """Say in the run's folder what it is, where it has run, and beside how many others at most, for the report."""
    file = run.folder / DESCRIPTION
    here = machine(device="cuda" if _on_gpu(run.config.accelerator) else "cpu")
    del here["command"]  # of `thresholdnet bench`; config.json says all that was asked for
    known = json.loads(file.read_text()) if file.exists() else {}
    machines = known.get("machines", [])
    if all(any(before.get(key) != here[key] for key in SAME) for before in machines):
        machines.append(here)
    run.folder.mkdir(parents=True, exist_ok=True)
    at_once = max(at_once, known.get("at_once", 1))
    text = {"part": run.experiment.part, "label": run.experiment.label, "machines": machines, "at_once": at_once}
    write_atomic(file, (json.dumps(text, indent=2) + "\n").encode())
