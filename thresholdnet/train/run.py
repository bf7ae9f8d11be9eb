"""Train a network on images: `train(TrainConfig(model="thresholdnet_v1", data="cifar10", root="data"))`.

Lightning's Trainer is the engine (precision, several GPUs and machines); what makes a run repeatable is ours:
batches, learning rate and random stream are functions of (seed, step), and checkpoints carry the rest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from .. import __version__, checks, figures
from ..checkpoint import FORMAT, load_checkpoint, write_atomic
from ..data import ImageData, load_data
from ..inference import evaluate_data
from ..loaders import make_loader, share_sizes
from ..models import check_arguments, create_model, fuse_blocks
from ..weights import load_released
from .callbacks import Bar, Checkpoints, EpochLog, StopSignal, TrainingInterrupted
from .classifier import AtomicCheckpointIO, Classifier
from .config import PRECISIONS, TrainConfig, check_same_data, device_counts, process_counts, start_point
from .recipes import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

SHEET_IMAGES = 32  # test images on predictions.png


def train(config: TrainConfig, *, minutes: float | None = None) -> dict[str, Any]:
    """Train as `config` says, and write checkpoints, logs, figures and result.json below
    `config.out_dir`.

    Args:
        config: all settings of the run.
        minutes: stop after so long as SIGTERM would, saved and ready for resume; None for no limit.

    Returns:
        What result.json holds: best and last test accuracy and loss, seconds, images per second, epochs,
        parameter count, seed, versions, machine, paths, history. `"interrupted"` is true when Ctrl-C or
        SIGTERM ended the run early (`"signal"` says which); last.ckpt is then usable for resume, evaluation
        and prediction.

    Raises:
        TypeError, ValueError: bad settings, data or checkpoints, before any work; a loss that is no finite
            number.
        OSError: a file cannot be written; the previous checkpoint stays whole.
    """
    if minutes is not None:
        checks.number("minutes", minutes, 0)
    stop = StopSignal(minutes)  # the clock starts here: loading the data counts
    out = Path(config.out_dir)
    recipe = config.full_recipe()
    processes = process_counts(config)
    if recipe.batch_size % processes[0]:
        raise ValueError(f"batch_size must be a multiple of the {processes[0]} processes, got {recipe.batch_size}")
    start = start_point(config, out)
    check_arguments(config.model, config.model_args)  # create_model's own are settings of the run
    engine: dict[str, Any] = {"fused": config.fused, "backend": config.backend, "recompute": config.recompute}
    network = create_model(config.model, device="meta", **engine, **config.model_args)  # wrong values show here
    data = load_data(
        config.data,
        config.root,
        download=config.download,
        image_size=config.image_size,
        limit=config.limit,
    )
    if start is not None:
        check_same_data(*start, data)
    # A step never holds more images than there are, and its learning rate is that of what it holds.
    most = -(-len(data.train) // processes[0]) * processes[0]
    recipe = replace(recipe, batch_size=min(recipe.batch_size, most))
    _probe(network, data, recipe.batch_size, processes[0])
    torch.manual_seed(config.seed)
    model = create_model(config.model, num_classes=len(data.classes), **engine, **config.model_args)
    if config.weights is not None and start is None:
        load_released(model, config.weights, head=None)
    with _quiet_lightning(), _alone(out, processes[1]):
        run = _Run(config, recipe, data, model, out, processes, stop)
        return run.fit(None if start is None else start[0])


def advice_for(config: TrainConfig, device: torch.device, processes: int) -> str | None:
    """What would make a run faster, in one line; None where nothing is known."""
    if config.fused and not config.cuda_graph and device.type == "cuda" and processes == 1:
        return "--cuda-graph made v1's fused steps 2.7 times as fast on an H100 at 224x224, 16 times at 32x32"
    return None


class _Run:
    """One call of `train`: the pieces and their order."""

    def __init__(
        self,
        config: TrainConfig,
        recipe: Recipe,
        data: ImageData,
        model: nn.Module,
        out: Path,
        processes: tuple[int, int, int],
        stop: StopSignal,
    ) -> None:
        self.config, self.recipe, self.data, self.out = config, recipe, data, out
        self.rank_zero = processes[1] == 0
        self.parameters = sum(p.numel() for p in model.parameters())
        plain = (0.0,) * 3, (1.0,) * 3
        self.mean, self.std = (data.mean, data.std) if recipe.normalize else plain
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        steps = len(share_sizes(len(data.train), recipe.batch_size, processes[0]))
        self.module = Classifier(
            model, recipe, steps, self._info(), seed=config.seed, ema_decay=config.ema, cuda_graph=config.cuda_graph
        )
        self.stop = stop
        self.bar = Bar(config.progress and not config.quiet and sys.stderr.isatty())
        self.checkpoints = Checkpoints(out / "checkpoints", config.save_every, config.save_seconds, self.stop)

    def fit(self, resume_from: Path | None) -> dict[str, Any]:
        """Set up the trainer, train, and report."""
        self._prepare_folder()
        trainer = self._trainer()
        advice = advice_for(self.config, trainer.strategy.root_device, trainer.world_size)
        if advice is not None and not self.config.quiet:
            self.bar.write(advice)
        started = time.perf_counter()
        try:
            trainer.fit(
                self.module,
                self._loader(trainer, train=True),
                self._loader(trainer, train=False),
                ckpt_path=None if resume_from is None else str(resume_from),
                weights_only=True,
            )
            signum = 0
        except TrainingInterrupted as stop:
            signum = stop.signum
        except SystemExit as error:
            # Lightning turns a KeyboardInterrupt (here: the second Ctrl-C) into an exit of its own.
            raise KeyboardInterrupt from error
        finally:
            self.stop.restore()
            self.bar.close()
        return self._report(trainer, time.perf_counter() - started, signum)

    def _info(self) -> dict[str, Any]:
        plain = self.config.as_dict()
        return {
            "format": FORMAT,
            "version": __version__,
            "model": self.config.model,
            "model_args": plain["model_args"],
            "num_classes": len(self.data.classes),
            "in_chans": 3,
            "classes": list(self.data.classes),
            "image_size": self.data.image_size,
            "train_images": len(self.data.train),
            "mean": list(self.mean),
            "std": list(self.std),
            "data": self.config.data,
            "recipe": plain["recipe"],
            "seed": self.config.seed,
        }

    def _prepare_folder(self) -> None:
        moments = 2 if self.recipe.optimizer == "adam" else 1
        copies = 1 + moments + (self.config.ema is not None)
        need = 3 * copies * sum(v.numel() * v.element_size() for v in self.module.model.state_dict().values())
        # Those of a run that is resumed lie there already; the two may be one file under two names.
        there = {file.stat().st_ino: file.stat().st_size for file in (self.out / "checkpoints").glob("*.ckpt")}
        free = shutil.disk_usage(self.out).free
        if free + sum(there.values()) < need:
            raise OSError(
                f"too little room at {self.out}: three checkpoints need {need / 2**20:.0f} MiB, "
                f"{free / 2**20:.0f} MiB are free"
            )
        if self.rank_zero:
            text = json.dumps(self.config.as_dict(), indent=2) + "\n"
            write_atomic(self.out / "config.json", text.encode())

    def _trainer(self) -> pl.Trainer:
        config = self.config
        devices, nodes = device_counts(config)
        parallel = devices * nodes > 1
        self.logger = TensorBoardLogger(self.out, name="tensorboard", version="") if self.rank_zero else None
        callbacks: list[pl.Callback] = [
            self.bar,
            EpochLog(self.out / "metrics.csv", self.logger, self.bar.write, not config.quiet),
            self.checkpoints,
        ]
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if parallel else "auto",
            precision=PRECISIONS[config.precision],  # type: ignore[arg-type]  # Lightning lists the names as literals
            sync_batchnorm=config.sync_batchnorm,
            max_epochs=self.recipe.epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,  # our callback logs from the history, which survives a resume
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=self.out,
        )

    def _loader(self, trainer: pl.Trainer, train: bool) -> Any:
        return make_loader(
            self.data,
            train=train,
            batch_size=self.recipe.batch_size,
            mean=self.mean,
            std=self.std,
            flip=self.recipe.flip,
            crop_padding=self.recipe.crop_padding,
            seed=self.config.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            device=trainer.strategy.root_device,
            channels_last=self.config.channels_last,
            workers=self.config.workers,
        )

    def _report(self, trainer: pl.Trainer, wall: float, signum: int) -> dict[str, Any]:
        history, best = self.module.history, self.module.best
        last = history[-1] if history else {}
        seconds = sum(row["seconds"] for row in history)
        result: dict[str, Any] = {
            "interrupted": bool(signum),
            "rank": trainer.global_rank,
            "signal": signum,
            "model": self.config.model,
            "data": self.config.data,
            "recipe": self.recipe.name,
            "fused": self.config.fused,
            "cuda_graph": self.config.cuda_graph,
            "epochs": len(history),
            "best_epoch": best.get("epoch"),
            "best_accuracy": best.get("test_accuracy"),
            "best_loss": best.get("test_loss"),
            "last_accuracy": last.get("test_accuracy"),
            "last_loss": last.get("test_loss"),
            "last_train_loss": last.get("train_loss"),
            "seconds": seconds,
            "wall_seconds_this_call": wall,
            "images_per_second": len(self.data.train) * len(history) / seconds if seconds else None,
            "parameters": self.parameters,
            "seed": self.config.seed,
            "precision": self.config.precision,
            "processes": trainer.world_size,
            "versions": _versions(),
            "machine": _machine(trainer.strategy.root_device),
            "out_dir": str(self.out),
            "checkpoint_best": str(self.checkpoints.best) if history else None,
            "checkpoint_last": str(self.checkpoints.last),
            "files": {},
            "history": history,
        }
        if trainer.is_global_zero and history:
            result["files"] = self._draw(trainer.strategy.root_device, with_images=not signum)
        if trainer.is_global_zero:
            write_atomic(self.out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return result

    def _draw(self, device: torch.device, with_images: bool) -> dict[str, str]:
        """Figures; those of the test images come from best.ckpt as it lies on the disk."""
        files = {"curve": self.out / "curve.png"}
        title = f"{self.config.model} on {self.config.data}, recipe {self.recipe.name}"
        figures.curve(self.module.history, files["curve"], title=title)
        if with_images:
            files |= {"confusion": self.out / "confusion.png", "predictions": self.out / "predictions.png"}
            loaded = load_checkpoint(self.checkpoints.best)
            report = evaluate_data(
                loaded,
                self.data,
                batch_size=self.recipe.batch_size,
                device=device,
                workers=self.config.workers,
                keep=SHEET_IMAGES,
            )
            figures.confusion(report["confusion"], loaded.classes, files["confusion"])
            sheet = report["samples"]
            figures.contact_sheet(
                sheet["images"],
                [loaded.classes[i] for i in sheet["predicted"]],
                sheet["probability"],
                files["predictions"],
                truth=[loaded.classes[i] for i in sheet["labels"]],
            )
        return {name: str(path) for name, path in files.items()}


def _probe(network: nn.Module, data: ImageData, batch_size: int, processes: int) -> None:
    """An epoch's smallest batch through a network on the meta device: what it cannot take is refused here."""
    smallest = min(share_sizes(len(data.train), batch_size, processes))
    fuse_blocks(network, False)  # the engine runs where tensors have values
    network.eval()(torch.zeros(1, 3, data.image_size, data.image_size, device="meta"))
    try:
        network.train()(torch.zeros(smallest, 3, data.image_size, data.image_size, device="meta"))
    except ValueError as error:
        raise ValueError(
            f"batch_size must give each step more than one image for BatchNorm at {data.image_size}x{data.image_size} "
            f"pixels, got batches of {smallest} from {len(data.train)} images at batch_size {batch_size}"
        ) from error


@contextlib.contextmanager
def _alone(out: Path, rank: int) -> Iterator[None]:
    """Keep a second run out of the folder; the system lets go of the lock when the process ends, however it ends."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    if rank or fcntl is None:
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock: not inherited by workers that live on
        except OSError as error:  # any other one: a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"another run works in {out}; give another folder with --out") from error
        for left in folder.glob(".*.tmp"):  # what a kill left of a write
            left.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """No tips, no advice on workers and no version banners from Lightning; its errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*(lr_scheduler|num_workers|isinstance\(treespec).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions() -> dict[str, str]:
    return {
        "thresholdnet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
