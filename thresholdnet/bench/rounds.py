"""Timing in rounds: every entrant once a round, in an order that turns.

Rounds pair the entrants: other work on the machine, the clock and the allocator meet all of them alike, and a ratio is
the median of the ratios inside single rounds.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import checks
from ..replay import no_collection
from .arithmetic import order, ratios, spread
from .baselines import Unavailable
from .clock import Clock, Neighbours, Step

BASELINES = (
    "eager", "eager_channels_last", "eager_cudnn_benchmark", "eager_folded", "compile", "compile_folded",
    "compile_frozen", "compile_max_autotune",
)  # fmt: skip
"""Providers whose times are divided by the others': a ratio above 1 is faster than they are."""

NOISY = 0.05  # share of all cores' time; where other processes took more, the rows carry a warning

Tell = Callable[[str, float], None]
"""Called with what happens now, and the share of the case that is done."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed steps of every provider; 0: none, bytes and checks alone.
        warmup: rounds before them that are not timed.
        device: "cpu", "cuda" or "cuda:1".
        cuda_graph: measure every provider also with its step captured as a CUDA graph.
    """

    rounds: int = 9
    warmup: int = 2
    device: str = "cpu"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        checks.integer("rounds", self.rounds, 0)
        checks.integer("warmup", self.warmup, 0)
        kind = self.device.partition(":")[0]
        checks.one_of("device", kind, ("cpu", "cuda"))
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that torch can use here, got {self.device!r}")
        if self.cuda_graph and kind != "cuda":
            raise ValueError(f"cuda-graph needs a device of CUDA, got {self.device!r}")

    @property
    def graphs(self) -> tuple[bool, ...]:
        """The values of `graph` among the rows of one provider."""
        return (False, True) if self.cuda_graph else (False,)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which this GPU is the current one: to that belong the events that time, streams and captures."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Entry:
    """A provider in a case.

    Attributes:
        provider, graph: which, and whether its step is captured as a CUDA graph.
        step: what is timed; None where it cannot run or is wrong.
        complain: runs the step once more and says what is wrong with it, None where nothing is.
        said: what its row says beside times; "reason" why it has none.
        times: milliseconds, one a round.
    """

    provider: str
    graph: bool
    step: Step | None = None
    complain: Callable[[], str | None] | None = None
    said: Row = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """ "eager", "eager+graph": the key of ratios."""
        return label_of(self.provider, self.graph)

    def row(self, entries: Sequence[Entry]) -> Row:
        """Its row but for what all rows of the case share; `entries`: all of the case."""
        row: Row = {"provider": self.provider, "graph": self.graph, "ms_median": None, "ms_p20": None, "ms_p80": None}
        row |= {"runs": len(self.times), "ratios": {}, **self.said}
        if self.times:
            row |= {f"ms_{name}": value for name, value in spread(self.times).items()} | {"ms": self.times}
            times = {entry.label: entry.times for entry in entries if entry.times}
            baselines = [label_of(name, graph) for name in BASELINES for graph in (False, True)]
            row["ratios"] = ratios(times, self.label, baselines)
        return row


def entries_of(providers: Sequence[str], settings: Settings) -> list[Entry]:
    """One entry for each provider, and one more with its step captured where that is asked for."""
    return [Entry(name, graph) for graph in settings.graphs for name in providers]


def run(entries: Sequence[Entry], settings: Settings, clock: Clock, tell: Tell, tidy: bool = False) -> Row:
    """Time the step of every entry once a round, behind rounds of warm-up.

    Args:
        tell: its share is that of the rounds.
        tidy: collect garbage before each round: steps of whole networks leave cycles behind.

    Returns:
        Conditions, fields of every row: load averages, what other processes took, and a warning where that is much.
    """
    running = [entry for entry in entries if entry.step is not None]
    if not running or not settings.rounds:
        return {}
    load, watched = os.getloadavg()[0], Neighbours()
    total = settings.warmup + settings.rounds
    with no_collection():
        for index in range(total):
            if tidy:
                gc.collect()
            number = index - settings.warmup
            if number == 0:
                watched = Neighbours()
            tell("warms up" if number < 0 else f"round {number + 1}", index / total)
            for position in order(len(running), index):
                entry = running[position]
                if entry.step is None:
                    continue
                try:
                    elapsed = clock(entry.step)
                except Exception as error:  # such as memory that ran out beside the others
                    entry.step, entry.times, entry.said["reason"] = None, [], reason(error)
                    continue
                if number >= 0:
                    entry.times.append(elapsed)
    others = watched.share()
    conditions: Row = {
        "warmup": settings.warmup,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "other_load": others,
    }
    if others is not None and others > NOISY:
        conditions["warning"] = f"other processes took {others:.0%} of the CPU while this case was timed"
    return conditions


def label_of(provider: str, graph: bool) -> str:
    """ "eager", "eager+graph"."""
    return f"{provider}+graph" if graph else provider


def reason(error: Exception) -> str:
    """An error in one line, as a row says why it has no time."""
    if isinstance(error, Unavailable):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:500]
