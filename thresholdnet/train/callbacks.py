"""What happens around the steps: checkpoints, clean stops, logs, the progress bar."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoint import link_atomic, write_atomic
from .classifier import Classifier

STOP_CHECK_STEPS = 8  # how often several processes agree on whether to stop
COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_second",
)


class TrainingInterrupted(Exception):
    """Ended by Ctrl-C or SIGTERM after saving `path`; `signum` is the signal."""

    def __init__(self, path: Path, signum: int) -> None:
        super().__init__(f"stopped; the run is saved in {path}")
        self.path, self.signum = path, signum


class StopSignal:
    """Notes Ctrl-C and SIGTERM for later; a second Ctrl-C ends at once. After `minutes` it stands as after SIGTERM."""

    def __init__(self, minutes: float | None = None) -> None:
        self._signum = 0
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._old: dict[int, Any] = {}

    @property
    def signum(self) -> int:
        """The signal that asks for a stop, 0 for none."""
        if not self._signum and time.monotonic() >= self._deadline:
            return signal.SIGTERM
        return self._signum

    def install(self) -> None:
        """Take over both signals; outside the main thread Python does not allow it, and nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            old = signal.signal(signum, self._note)
            self._old.setdefault(signum, old)

    def restore(self) -> None:
        """Put the handlers back that were found."""
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old.clear()

    def _note(self, signum: int, frame: Any) -> None:
        if self._signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signum = signum
        print("\nstopping after this batch; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


class Checkpoints(pl.Callback):
    """Saves last.ckpt after every epoch (and every `save_every` steps), best.ckpt when the test accuracy
    rises.

    Args:
        folder: where both files go.
        save_every: steps between saves in the middle of an epoch; 0 for none.
        save_seconds: an epoch that ends sooner after the last save goes without, unless it is the best or the last.
        stop: asked after each batch and epoch; when set, the run is saved and `TrainingInterrupted`
            raised.
    """

    def __init__(self, folder: Path, save_every: int, save_seconds: float, stop: StopSignal) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.save_every, self.save_seconds, self.stop = save_every, save_seconds, stop
        self.saved = -math.inf  # when, on the monotonic clock

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has set its own SIGTERM handler by now; ours replaces it."""
        self.stop.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch when it is time or a stop is asked for."""
        if trainer.is_last_batch:
            return  # the epoch's own save follows
        stop = self._agreed_stop(trainer, batch_idx)
        if stop or (self.save_every and trainer.global_step % self.save_every == 0):
            self._save(trainer, self.last)
        if stop:
            raise TrainingInterrupted(self.last, stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save. best.ckpt goes first: a kill between the two repeats the epoch and writes both."""
        module = _classifier(pl_module)
        row = module.history[-1]
        stop, ends = self._agreed_stop(trainer, 0), row["epoch"] == module.recipe.epochs
        if module.best is row:
            self._save(trainer, self.best)
            if trainer.is_global_zero:
                link_atomic(self.best, self.last)
        elif stop or ends or _agreed(trainer, int(time.monotonic() - self.saved >= self.save_seconds)):
            self._save(trainer, self.last)
        if stop and not ends:
            raise TrainingInterrupted(self.last, stop)

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self.saved = time.monotonic()

    def _agreed_stop(self, trainer: pl.Trainer, batch_idx: int) -> int:
        if trainer.world_size > 1 and batch_idx % STOP_CHECK_STEPS:
            return 0
        return _agreed(trainer, self.stop.signum)


def _agreed(trainer: pl.Trainer, value: int) -> int:
    """The largest value of all processes."""
    if trainer.world_size == 1:
        return value
    flag = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)


class EpochLog(pl.Callback):
    """One printed line per epoch, metrics.csv and TensorBoard; all from the history that checkpoints carry.

    Args:
        csv: path of metrics.csv, rewritten whole after each epoch, so that it is right after a resume, too.
        logger: Lightning's TensorBoard logger, or None.
        write: prints one line.
        echo: print the lines.
    """

    def __init__(self, csv: Path, logger: Logger | None, write: Callable[[str], None], echo: bool) -> None:
        self.csv, self.logger, self.write, self.echo = csv, logger, write, echo

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the epoch's books and report them; `Checkpoints` comes later and may end the run."""
        module = _classifier(pl_module)
        row = module.finish_epoch()
        if not trainer.is_global_zero:
            return
        lines = [
            ",".join(COLUMNS),
            *(",".join(repr(entry[key]) for key in COLUMNS) for entry in module.history),
        ]
        write_atomic(self.csv, ("\n".join(lines) + "\n").encode())
        if self.logger is not None:
            figures = {key: row[key] for key in COLUMNS if key not in ("epoch", "step")}
            self.logger.log_metrics(figures, step=int(row["epoch"]))
            self.logger.save()
        if self.echo:
            self.write(epoch_line(row, module.recipe.epochs))


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """One epoch in one line of text."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:7.2%}  "
        f"test loss {row['test_loss']:.4f} acc {row['test_accuracy']:7.2%}  "
        f"lr {row['lr']:.2e}  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )


class Bar(pl.Callback):
    """A progress bar on stderr, for terminals only."""

    def __init__(self, active: bool) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self.active = active
        self.task: Any = None

    def write(self, line: str) -> None:
        """Print a line to stdout; above the bar when both share the terminal."""
        if self.progress.live.is_started and sys.stdout.isatty():
            self.progress.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.progress.live.is_started:
            self.progress.stop()

    def _begin(self, text: str, total: int, done: int = 0) -> None:
        self.progress.start()
        if self.task is None:
            self.task = self.progress.add_task(text, total=total, completed=done, note="")
        else:
            self.progress.reset(self.task, description=text, total=total, completed=done, note="")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the bar at the first batch of an epoch, or where a resumed one goes on."""
        if self.active and trainer.is_global_zero and (self.task is None or batch_idx == 0):
            text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} train"
            self._begin(text, int(trainer.num_training_batches), batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step on; the figures every few steps only, since reading them waits for the device."""
        if self.task is None:
            return
        module = _classifier(pl_module)
        if module.device.type == "cpu" or batch_idx % 20 == 0:
            loss, correct, count = module.train_sums.tolist()
            self.progress.update(self.task, note=f"loss {loss / count:.3f}  acc {correct / count:.1%}")
        self.progress.update(self.task, completed=batch_idx + 1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the evaluation as a bar of its own."""
        if self.task is not None:
            total = sum(trainer.num_val_batches) if isinstance(trainer.num_val_batches, list) else None
            self._begin(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} test", int(total or 1))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One step on."""
        if self.task is not None:
            self.progress.update(self.task, completed=batch_idx + 1)


def _classifier(module: pl.LightningModule) -> Classifier:
    if not isinstance(module, Classifier):
        raise TypeError(f"these callbacks work with Classifier, got {type(module).__name__}")
    return module
