"""Several runs at once, a process each: a network on small images leaves most of a GPU, or of many cores, idle.

Processes take turns on a GPU, and gain nothing, unless CUDA's Multi-Process Service lets them share it: start it with
`nvidia-cuda-mps-control -d` before. A run's times then say nothing of its speed, and the report leaves them out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from typing import Any

import experiments
from experiments import Run
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from thresholdnet.train.callbacks import StopSignal

LOG = "log.txt"  # in a run's folder: what it prints, added to by each call
REFRESH = 1.0  # seconds between looks at the runs' epochs


def train_all(runs: Sequence[Run], minutes: float | None, jobs: int, say: Callable[[str], Any]) -> int:
    """`experiments.train_all` with up to `jobs` runs at a time.

    Returns:
        The signal that ended it, 0 if none did.

    Raises:
        RuntimeError: runs that failed, each with the last words of its log; the others were trained as far as asked.
    """
    experiments.check_begun(runs)
    deadline = experiments.deadline_of(minutes)
    waiting = [run for run in runs if not experiments.is_done(run)]
    spawn, begun, failed = get_context("spawn"), False, []
    active: dict[Any, Run] = {}

    def look() -> None:
        """Who has ended, and how far the others are."""
        connection.wait([process.sentinel for process in active], timeout=REFRESH)
        for process in [process for process in active if not process.is_alive()]:
            run = active.pop(process)
            if process.exitcode:
                failed.append(f"{run.name}: {_last_words(run)}")
            tell(run, "failed" if process.exitcode else "done" if experiments.is_done(run) else "stopped")
        for run in active.values():
            tell(run, None)

    stop = StopSignal()
    stop.install()
    try:
        with _bars(waiting, say) as tell:
            while not stop.signum and (active or (waiting and (not begun or time.monotonic() < deadline))):
                begun = True  # every call trains a batch at least, however short its time
                while waiting and len(active) < jobs and not stop.signum:
                    run = waiting.pop(0)
                    left = None if minutes is None else max(deadline - time.monotonic(), 0) / 60
                    process = spawn.Process(target=_train, args=(run, left, jobs), name=run.name)
                    process.start()
                    active[process] = run
                    tell(run, f"begun: {len(experiments.history(run.folder))} of {run.epochs} epochs done")
                look()
            if stop.signum == signal.SIGTERM:  # Ctrl-C reaches the runs by itself
                for process in active:
                    process.terminate()
            while active:
                look()
    finally:
        stop.restore()
    if failed:
        raise RuntimeError("; ".join(failed))
    return stop.signum


def _train(run: Run, minutes: float | None, jobs: int) -> None:
    """One run, in its process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    alone = replace(run, config=replace(run.config, progress=False, quiet=False))
    try:
        experiments.train_all([alone], minutes, print, at_once=jobs)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """A run whose parent is gone is saved and stopped, as after SIGTERM."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _bars(runs: Sequence[Run], say: Callable[[str], Any]) -> Iterator[Callable[[Run, str | None], None]]:
    """tell(run, what happened, if something did): lines, and on a terminal a bar of epochs for each run."""
    shown = any(run.config.progress and not run.config.quiet for run in runs) and sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not shown:
        yield lambda run, what: say(f"{run.name}: {what}") if what else None
        return
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {run.name: progress.add_task(run.name, total=run.epochs, start=False) for run in runs}

        def tell(run: Run, what: str | None) -> None:
            if what and what.startswith("begun"):
                progress.start_task(tasks[run.name])
            done = len(experiments.history(run.folder))
            progress.update(tasks[run.name], completed=done, description=f"{run.name} {what or ''}".rstrip())

        yield tell


def _last_words(run: Run) -> str:
    """Of a run's log."""
    lines = (run.folder / LOG).read_text().split("\n") if (run.folder / LOG).exists() else []
    said = [line for line in lines if line.strip()]
    return (said[-1].removeprefix("error: ") if said else "it said nothing") + f" (see {run.folder / LOG})"
