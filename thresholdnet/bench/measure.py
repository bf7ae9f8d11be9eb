"""One case, measured fairly: checked against eager first, then every provider once a round, in an order that rotates.

A time belongs to a step whose output and gradients are right. Rounds pair the providers: other work on the machine, the
clock and the allocator meet all of them alike, and a ratio is the median of the ratios inside single rounds.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..memory import dtype_of
from ..models import create_model, model_arguments
from . import check
from .cases import Case
from .providers import Graphed, Runner, Unavailable, build, check_fused, known

REFERENCES = ("eager_channels_last", "eager", "compile")
"""Providers whose times are divided by the others': a ratio above 1 is faster than they are."""

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU holds

Tell = Callable[[str, float], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed steps of every provider.
        warmup: rounds before them that are not timed.
        device: "cpu", "cuda" or "cuda:1".
        cuda_graph: measure every provider also with its step captured as a CUDA graph.
        load_seconds: how long other processes are watched before each case.
    """

    rounds: int = 7
    warmup: int = 2
    device: str = "cpu"
    cuda_graph: bool = False
    load_seconds: float = 1.0

    def __post_init__(self) -> None:
        checks.integer("rounds", self.rounds, 1)
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


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class _Entry:
    """A provider in a case: its runner where it may be timed, what its row will say, its time in each round."""

    provider: str
    graph: bool
    runner: Runner | None = None
    said: Row = field(default_factory=dict)
    times: list[float] = field(default_factory=list)


def measure(case: Case, providers: Sequence[str], settings: Settings, tell: Tell | None = None) -> list[Row]:
    """Check and time one case.

    Args:
        providers: names of `PROVIDERS`; eager is what the others are checked against, named or not.
        tell: called with what happens now and the share of the case that is done.

    Returns:
        One row for each provider (see `results.py`); without times where it cannot run or is wrong.
    """
    tell = tell or (lambda text, share: None)
    known(providers)
    device, train = torch.device(settings.device), case.mode == "train"
    common = {
        **case.fields,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "other_load": other_load(settings.load_seconds),
    }
    tell("eager's results", 0.0)
    model, images = _network(case, device), _images(case, device)
    truth = check.result(build("eager", model, images, train), with_input=True)
    entries = [_Entry(name, graph) for graph in settings.graphs for name in providers]
    for index, entry in enumerate(entries):
        tell(f"checks {_name(entry)}", 0.4 * index / len(entries))
        try:
            _admit(entry, build(entry.provider, model, images, train), truth, case.dtype, device)
        except Exception as error:  # whatever a compiler raises is the reason in that row, not the end of the run
            entry.said["reason"] = str(error) if isinstance(error, Unavailable) else _first_line(error)
    _rounds([entry for entry in entries if entry.runner is not None], settings, device, tell)
    return [common | _row(entry, entries) for entry in entries]


def _network(case: Case, device: torch.device) -> nn.Module:
    """Weights of a fixed seed and the statistics of the images; without dropout, whose masks would differ."""
    name, arguments = case.architecture()
    if "drop_rate" in model_arguments(name):
        arguments["drop_rate"] = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = create_model(name, case.classes, **arguments)
    model = model.to(device).train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(_images(case, device).float())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.to(dtype_of(case.dtype))


def _images(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.image, case.image, generator=generator)
    return images.to(device, dtype_of(case.dtype))


def _admit(entry: _Entry, runner: Runner, truth: dict[str, list[Tensor]], dtype: str, device: torch.device) -> None:
    """Run and check a provider; it may be timed afterwards. Raises what stands against it."""
    compiled = runner.call is not runner.model
    start, hits = time.perf_counter(), _cache_hits()
    runner.step()
    _synchronise(device)
    entry.said["first_call_s"] = time.perf_counter() - start
    if compiled:
        entry.said["compile_cache_hits"] = _cache_hits() - hits
    check_fused(runner)
    entry.said["backend"] = runner.backend()
    if entry.graph:
        runner = Graphed(runner)
    # compiled and captured steps are checked as they will be timed: images that need a gradient are another program
    found = check.errors(check.result(runner, with_input=not (compiled or entry.graph)), truth)
    entry.said["check"] = found
    complaint = check.complaint(found, dtype)
    if complaint is not None:
        raise Unavailable(complaint)
    if not entry.graph:
        entry.said["peak_bytes"] = check.peak_bytes(runner, device)
        entry.said["saved_bytes"] = check.saved_bytes(runner)
        runner.clear()
    entry.runner = runner


def _cache_hits() -> int:
    """How many graphs torch's compiler has found in its cache on disk; not 0 makes a first call a warm one."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"]) + int(counters["aot_autograd"]["autograd_cache_hit"])


# ---------------------------------------------------------------- time


def _rounds(entries: list[_Entry], settings: Settings, device: torch.device, tell: Tell) -> None:
    """Every provider once a round; the order rotates by one from round to round."""
    if not entries:
        return
    clock = _Clock(device)
    total = settings.warmup + settings.rounds
    with _no_collection():
        for index in range(total):
            turn = index % len(entries)
            warm = index < settings.warmup
            tell("warms up" if warm else f"round {index - settings.warmup + 1}", 0.4 + 0.6 * index / total)
            for entry in entries[turn:] + entries[:turn]:
                assert entry.runner is not None
                seconds = clock.time(entry.runner)
                if not warm:
                    entry.times.append(1e3 * seconds)
            gc.collect()


class _Clock:
    """Times one step: the wall on a CPU; on a GPU its own events, the L2 cache overwritten before."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, runner: Runner) -> float:
        """Seconds."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            runner.step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda.synchronize(self.device)
        begin.record()
        runner.step()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector runs between rounds, not inside a step."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def other_load(seconds: float) -> float | None:
    """Share of the machine's CPU time that is neither idle nor this process's, 0 to 1; None where /proc has no say."""
    before = _busy_total()
    if before is None or seconds <= 0:
        return None
    own = sum(os.times()[:2])
    time.sleep(seconds)
    after = _busy_total()
    assert after is not None
    total = after[1] - before[1]
    ticks = (sum(os.times()[:2]) - own) * os.sysconf("SC_CLK_TCK")
    return round(max(0.0, after[0] - before[0] - ticks) / total, 4) if total else None


def _busy_total() -> tuple[int, int] | None:
    """Ticks of all cores since boot: not idle (time that a hypervisor took included), and in all."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    ticks = [int(text) for text in stat.read_text().partition("\n")[0].split()[1:9]]  # guests are counted in user
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


# ---------------------------------------------------------------- rows


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratios(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Reference over times, round by round: median, p20 and p80 of these quotients."""
    quotients = [r / t for t, r in zip(times, reference, strict=True)]
    return {name: percentile(quotients, at) for name, at in (("median", 50), ("p20", 20), ("p80", 80))}


def _row(entry: _Entry, entries: Sequence[_Entry]) -> Row:
    row: Row = {"provider": entry.provider, "graph": entry.graph}
    row |= {"ms_median": None, "ms_p20": None, "ms_p80": None, "peak_bytes": None, "saved_bytes": None}
    row |= {"runs": len(entry.times), "ratios": {}, **entry.said}
    if entry.times:
        row |= {f"ms_{name}": percentile(entry.times, at) for name, at in (("median", 50), ("p20", 20), ("p80", 80))}
        row["ms"] = entry.times
        row["ratios"] = {
            other.provider: ratios(entry.times, other.times)
            for other in entries
            if other.provider in REFERENCES and other.times and other.graph == entry.graph
        }
    return row


def _name(entry: _Entry) -> str:
    return f"{entry.provider} (graph)" if entry.graph else entry.provider


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:500]
