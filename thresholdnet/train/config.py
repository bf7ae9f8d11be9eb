"""Settings of a run, and the checks that come before any work."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..checkpoint import INFO_KEY, read_checkpoint
from ..data import ImageData
from .recipes import Recipe, make_recipe

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
# What shapes the curve: a resumed run must have the same values, or it would not be the same run.
_FIXED = (
    "model",
    "model_args",
    "data",
    "image_size",
    "limit",
    "recipe",
    "seed",
    "precision",
    "ema",
    "channels_last",
    "sync_batchnorm",
)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Fields set to None take the recipe's or the data set's own value.

    Attributes:
        model, model_args: for `thresholdnet.create_model`.
        weights: start from this released file (`thresholdnet.weights.load_released`); the head stays fresh where the
            file has another number of classes.
        data, root, download, image_size, limit: for `thresholdnet.data.load_data`.
        recipe: name of a recipe, or a `Recipe`.
        epochs, batch_size, lr: replace the recipe's values; `batch_size` counts all devices together.
        recipe_args: replaces any other field of the recipe.
        seed: of weights, order, augmentation and dropout.
        out_dir: where everything is written.
        resume: go on from `out_dir`'s last checkpoint if there is one.
        precision: `"32"`, `"bf16"` or `"16"` (mixed).
        ema: decay of averaged weights, which evaluation then uses; None for none.
        channels_last: memory format of weights and images.
        fused, backend, recompute: run the blocks in the engine, as in `thresholdnet.create_model`; a run may be
            resumed either way.
        sync_batchnorm: batch statistics over all GPUs.
        cuda_graph: a whole step, optimizer and loss included, as one CUDA graph, and so a step of evaluation, for small
            images on one GPU; a run may be resumed either way.
        accelerator: `"auto"`, `"cpu"`, `"gpu"` or `"mps"`.
        devices: processes on this machine; under torchrun its own numbers count.
        num_nodes: machines.
        workers: decoding processes for large image folders.
        save_every: steps between checkpoints inside an epoch; 0 saves at epoch ends only.
        save_seconds: an epoch that ends sooner than this after the last save is not saved, unless it is the best so
            far or the last; for epochs of a few seconds.
        progress: show a bar when stderr is a terminal.
        quiet: print no lines.
    """

    model: str = "thresholdnet_v1"
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | Path | None = None
    data: str = "cifar10"
    root: str | Path | None = None
    download: bool = False
    image_size: int | None = None
    limit: int | None = None
    recipe: str | Recipe = "modern"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    recipe_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    out_dir: str | Path = "runs/train"
    resume: bool = False
    precision: str = "32"
    ema: float | None = None
    channels_last: bool = True
    fused: bool = False
    backend: str = "auto"
    recompute: str | None = None
    sync_batchnorm: bool = False
    cuda_graph: bool = False
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    workers: int = 2
    save_every: int = 0
    save_seconds: float = 0.0
    progress: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        checks.one_of("precision", self.precision, PRECISIONS)
        checks.one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        checks.integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("devices", "num_nodes"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("workers", "save_every"):
            checks.integer(name, getattr(self, name), 0)
        checks.number("save_seconds", self.save_seconds, 0)
        if self.ema is not None and checks.number("ema", self.ema, 0, 1) == 1:
            raise ValueError("ema must be below 1, got 1: such an average would never move")

    @classmethod
    def saved_in(cls, out_dir: str | Path) -> TrainConfig | None:
        """The settings of the run in `out_dir`, set to resume; None where there is none.

        Raises:
            ValueError: its config.json is damaged.
        """
        file = Path(out_dir) / "config.json"
        if not file.exists():
            return None
        try:
            plain = json.loads(file.read_text())
            own = {"recipe": Recipe(**plain["recipe"]), "out_dir": out_dir, "resume": True}
            return cls(**(plain | own))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cannot resume: {file} is damaged") from error

    def full_recipe(self) -> Recipe:
        """The recipe with this config's own epochs, batch size, learning rate and other fields."""
        own = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        return make_recipe(
            self.recipe, **self.recipe_args | {key: value for key, value in own.items() if value is not None}
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields, with the full recipe in place of its parts."""
        plain = asdict(self) | {"recipe": self.full_recipe().as_dict()}
        for part in ("epochs", "batch_size", "lr", "recipe_args"):
            del plain[part]
        return json.loads(json.dumps(plain, default=str))


def start_point(config: TrainConfig, out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from with what it says of its run, or None for a new one; refuses whatever would lose or
    mix runs.
    """
    # best.ckpt stands alone after a kill between the two in the first epoch, or where somebody made room
    files = [out / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    checks.output_folder("out_dir", out)
    found = next((file for file in files if file.exists()), None)
    if found is None:
        return None
    if not config.resume:
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or give another folder with --out")
    check_same_run(config, out)
    return found, read_checkpoint(found)[INFO_KEY]


def check_same_run(config: TrainConfig, out: Path) -> None:
    """Raise ValueError unless the run saved in `out` has this config's settings (more epochs may be fine)."""
    try:
        saved = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume: {out / 'config.json'} is missing or damaged") from error
    wanted = config.as_dict()
    for name in _FIXED:
        old, new = saved.get(name), wanted[name]
        if name == "recipe":
            _same_recipe(old or {}, new)
        elif old != new:
            raise ValueError(f"cannot resume with another {name}: the run in {out} has {old!r}, given {new!r}")


def _same_recipe(old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        # More epochs may be added where the schedule does not stretch with them.
        if key in ("epochs", "name") and new["schedule"] != "cosine":
            continue
        if old.get(key) != value:
            had = old.get(key)
            raise ValueError(f"cannot resume with another recipe {key}: the run has {had!r}, given {value!r}")


def check_same_data(resume_from: Path, info: dict[str, Any], data: ImageData) -> None:
    """Raise ValueError unless a checkpoint says it was trained on images of the same classes, and as many of them."""
    count = info.get("train_images", len(data.train))  # older checkpoints do not say
    if tuple(info["classes"]) != data.classes or count != len(data.train):
        raise ValueError(
            f"cannot resume with other data: {resume_from} was trained on {count} images of "
            f"{', '.join(info['classes'][:5])}, given {len(data.train)} of {', '.join(data.classes[:5])}"
        )


def process_counts(config: TrainConfig) -> tuple[int, int, int]:
    """(processes, rank, local rank) under torchrun or Lightning's own launcher, else of this config."""
    devices, nodes = device_counts(config)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["gpu"] = any(here.values())
    if not here.get(config.accelerator, True):
        raise ValueError(f"accelerator must be one that this machine has, got {config.accelerator}; auto finds one")
    on_cpu = config.accelerator == "cpu" or not (torch.cuda.is_available() or config.accelerator != "auto")
    if config.sync_batchnorm and on_cpu:
        raise ValueError("sync_batchnorm needs GPUs: torch has no synchronised batch norm on the CPU")
    if config.precision == "16" and on_cpu:
        raise ValueError("precision 16 needs a GPU; use bf16 or 32 on the CPU")
    if config.cuda_graph and (not torch.cuda.is_available() or config.accelerator in ("cpu", "mps")):
        raise ValueError("cuda_graph needs a CUDA GPU, got none to train on")
    if config.cuda_graph and devices * nodes > 1:
        raise ValueError(f"cuda_graph needs one process, got {devices * nodes}")
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    return devices * nodes, rank, int(os.environ.get("LOCAL_RANK", "0"))


def device_counts(config: TrainConfig) -> tuple[int, int]:
    """(processes per machine, machines); torchrun's environment wins."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return config.devices, config.num_nodes
