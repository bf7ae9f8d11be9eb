"""One case, measured fairly: checked first, then every provider once a round, in an order that turns.

A time belongs to a step whose output and gradients are right. Rounds pair the providers: other work on the machine, the
clock and the allocator meet all of them alike, and a ratio is the median of the ratios inside single rounds.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..memory import dtype_of
from ..models import create_model, model_arguments
from ..selftest import full_precision
from . import check, footprint
from .arithmetic import order, ratios, spread
from .baselines import Unavailable
from .cases import Case
from .clock import Neighbours, clock_for, no_collection
from .providers import Graphed, Runner, build, check_fused, known

BASELINES = ("eager", "eager_channels_last", "eager_folded", "compile", "compile_folded", "compile_max_autotune")
"""Providers whose times are divided by the others': a ratio above 1 is faster than they are."""

SHIFT = 2.0  # of every BatchNorm, see `_network`
NOISY = 0.05  # share of all cores' time; where other processes took more, the rows carry a warning

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
    """

    rounds: int = 9
    warmup: int = 2
    device: str = "cpu"
    cuda_graph: bool = False

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

    @property
    def label(self) -> str:
        return label(self.provider, self.graph)


def label(provider: str, graph: bool) -> str:
    """ "eager", "eager+graph": the key of ratios."""
    return f"{provider}+graph" if graph else provider


def measure(case: Case, providers: Sequence[str], settings: Settings, tell: Tell | None = None) -> list[Row]:
    """Check and time one case.

    Args:
        providers: names of `PROVIDERS`; plain torch is what they are checked against, named or not.
        tell: called with what happens now and the share of the case that is done.

    Returns:
        One row for each provider (see `results.py`); without times where it cannot run or is wrong.
    """
    tell = tell or (lambda text, share: None)
    known(providers)
    device = torch.device(settings.device)
    # cached code of earlier cases counts towards dynamo's limit for one forward; beyond it, it silently stays eager
    torch._dynamo.reset()
    entries = [_Entry(name, graph) for graph in settings.graphs for name in providers]
    try:
        tell("plain torch's results", 0.0)
        model, images = network(case, device), _images(case, device)
        truth, allowed = _truth(case, model, images)
    except Exception as error:  # such as images too small for the model: nobody can run the case
        for entry in entries:
            entry.said["reason"] = f"plain torch itself: {_first_line(error)}"
    else:
        for index, entry in enumerate(entries):
            tell(f"checks {entry.label}", 0.4 * index / len(entries))
            try:
                _admit(entry, build(entry.provider, model, images, case), truth, allowed, device)
            except Exception as error:  # whatever a compiler raises is the reason in that row, not the end of the run
                entry.said["reason"] = str(error) if isinstance(error, Unavailable) else _first_line(error)
    conditions = _rounds([entry for entry in entries if entry.runner is not None], settings, device, tell)
    common = {**case.fields, "device": device.type, "threads": torch.get_num_threads(), **conditions}
    return [common | _row(entry, entries) for entry in entries]


def _plain(case: Case) -> nn.Module:
    """The model without dropout, whose masks would differ."""
    name, arguments = case.architecture()
    if "drop_rate" in model_arguments(name):
        arguments["drop_rate"] = 0.0
    return create_model(name, case.classes, **arguments)


def network(case: Case, device: torch.device) -> nn.Module:
    """Weights of a fixed seed and the statistics of the images.

    BatchNorms shift by `SHIFT`: with most values above an activation's kink, errors of rounding stay errors of rounding
    (unshifted, bf16's gradients of plain torch itself are off by more than their size), and the check can see.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = _plain(case).to(device).train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.bias.fill_(SHIFT)
            norm.momentum = 1.0
        model(_images(case, device, torch.float32))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.to(dtype_of(case.dtype))


def _images(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.image, case.image, generator=generator)
    return images.to(dtype_of(case.dtype)).to(device, dtype)


def _truth(case: Case, model: nn.Module, images: Tensor) -> tuple[check.Result, dict[str, float]]:
    """Plain torch's results in fp32 or fp64, and what errors a provider may have."""
    exact = torch.float64 if case.dtype == "fp64" else torch.float32
    with full_precision():
        runner = build("eager", model, images, case)
        wide = Runner(runner.model.to(exact), images.to(exact), runner.train)
        truth = check.result(wide)
    own = check.errors(check.result(build("eager_channels_last", model, images, case)), truth)
    return truth, check.bounds(own, case.dtype)


def _admit(entry: _Entry, runner: Runner, truth: check.Result, allowed: dict[str, float], device: torch.device) -> None:
    """Run and check a provider; it may be timed afterwards. Raises what stands against it."""
    hits, start = _cache_hits(), time.perf_counter()
    runner.step()
    _synchronise(device)
    entry.said["first_call_s"] = time.perf_counter() - start
    if runner.call is not runner.model:
        entry.said["compile_cache_hits"] = _cache_hits() - hits
    check_fused(runner)
    entry.said["backend"] = runner.backend()
    if not entry.graph:
        entry.said["saved_bytes"], entry.said["saved_by"] = footprint.saved_bytes(runner), footprint.SAVED_BY
    else:
        runner = Graphed(runner)
    entry.said["peak_bytes"], entry.said["peak_by"] = footprint.peak_bytes(runner)
    found = check.errors(check.result(runner), truth)
    entry.said["check"] = {what: {"error": error, "bound": allowed[what]} for what, error in found.items()}
    complaint = check.complaint(found, allowed)
    if complaint is not None:
        raise Unavailable(complaint)
    entry.runner = runner


def _cache_hits() -> int:
    """How many graphs torch's compiler has found in its cache on disk; not 0 makes a first call a warm one."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"]) + int(counters["aot_autograd"]["autograd_cache_hit"])


def _rounds(entries: list[_Entry], settings: Settings, device: torch.device, tell: Tell) -> Row:
    """Every provider once a round; returns the conditions it was measured under."""
    if not entries:
        return {}
    clock = clock_for(device)
    load = os.getloadavg()[0]
    watched = Neighbours()
    total = settings.warmup + settings.rounds
    with no_collection():
        for index in range(total):
            if index == settings.warmup:
                watched = Neighbours()
            number = index - settings.warmup
            tell("warms up" if number < 0 else f"round {number + 1}", 0.4 + 0.6 * index / total)
            for position in order(len(entries), index):
                entry = entries[position]
                if entry.runner is None:
                    continue
                try:
                    elapsed = clock(entry.runner.step)
                except Exception as error:  # such as memory that ran out beside the others
                    entry.runner, entry.times = None, []
                    entry.said["reason"] = _first_line(error)
                    continue
                if number >= 0:
                    entry.times.append(elapsed)
            gc.collect()
    others = watched.share()
    conditions: Row = {"load_before": load, "load_after": os.getloadavg()[0], "other_load": others}
    if others is not None and others > NOISY:
        conditions["warning"] = f"other processes took {others:.0%} of the CPU while this case was timed"
    return conditions


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(entry: _Entry, entries: Sequence[_Entry]) -> Row:
    row: Row = {"provider": entry.provider, "graph": entry.graph}
    row |= {"ms_median": None, "ms_p20": None, "ms_p80": None, "peak_bytes": None, "saved_bytes": None}
    row |= {"runs": len(entry.times), "ratios": {}, **entry.said}
    if entry.times:
        row |= {f"ms_{name}": value for name, value in spread(entry.times).items()}
        row["ms"] = entry.times
        times = {other.label: other.times for other in entries if other.times}
        labels = [label(name, graph) for name in BASELINES for graph in (False, True)]
        row["ratios"] = ratios(times, entry.label, labels)
    return row


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:500]
