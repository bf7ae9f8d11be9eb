"""One step, measured fairly: checked first, then timed in rounds beside the others.

A time belongs to a step whose output and gradients are right, before the rounds and behind them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..memory import dtype_of
from ..models import create_model, model_arguments
from ..replay import first_replay
from ..selftest import full_precision
from . import check, footprint, rounds
from .baselines import Unavailable
from .cases import Case
from .clock import clock_for
from .providers import Graphed, Runner, build, check_fused, known
from .rounds import Entry, Row, Settings, Tell
from .stages import stages

SHIFT = 2.0  # of every BatchNorm, see `network`


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
    entries = rounds.entries_of(providers, settings)
    try:
        tell("plain torch's results", 0.0)
        model, images = network(case, device), images_of(case, device)
        truth, allowed = _truth(case, model, images)
    except Exception as error:  # such as images too small for the model: nobody can run the case
        for entry in entries:
            entry.said["reason"] = f"plain torch itself: {rounds.reason(error)}"
    else:
        for index, entry in enumerate(entries):
            tell(f"checks {entry.label}", 0.4 * index / len(entries))
            try:
                _admit(entry, build(entry.provider, model, images, case), truth, allowed, device)
            except Exception as error:  # whatever a compiler raises is the reason in that row, not the end of the run
                entry.said["reason"] = rounds.reason(error)
    conditions = rounds.run(
        entries, settings, clock_for(device), lambda text, share: tell(text, 0.4 + 0.6 * share), tidy=True
    )
    for entry in entries:
        if entry.times:  # of steps that were right to the last: caches and recordings come with the calls
            _check_again(entry)
    common = {**case.fields, "device": device.type, "threads": torch.get_num_threads(), **conditions}
    rows = [common | {"peak_bytes": None, "saved_bytes": None} | entry.row(entries) for entry in entries]
    if case.stage is not None:
        (stage,) = stages(case)
        flops = stage.flops(case.batch, case.mode == "train")
        for row in rows:
            row |= {"flops": flops, "tflops": row["ms_median"] and flops / row["ms_median"] / 1e9}
    return rows


def _plain(case: Case) -> nn.Module:
    """The model, or its block, without dropout, whose masks would differ."""
    name, arguments = case.architecture()
    if "drop_rate" in model_arguments(name):
        arguments["drop_rate"] = 0.0
    model = create_model(name, case.classes, **arguments)
    return model if case.stage is None else model.get_submodule(f"{case.stage}.block")


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
        several = replace(case, batch=max(case.batch, 2))  # the last map of one small image may be one value
        model(images_of(several, device, torch.float32))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.to(dtype_of(case.dtype))


def images_of(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A case's images, the same at every call; of a block alone, what goes into it."""
    channels, side = 3, case.image
    if case.stage is not None:
        (stage,) = stages(case)
        channels, side = stage.plan.in_channels, stage.side
    images = torch.randn(case.batch, channels, side, side, generator=torch.Generator().manual_seed(1))
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


def _admit(entry: Entry, runner: Runner, truth: check.Result, allowed: dict[str, float], device: torch.device) -> None:
    """Run and check a provider; it may be timed afterwards. Raises what stands against it."""
    hits, start = _cache_hits(), time.perf_counter()
    runner.step()
    _synchronise(device)
    entry.said["first_call_s"] = time.perf_counter() - start
    if runner.call is not runner.model:
        entry.said["compile_cache_hits"] = _cache_hits() - hits
    check_fused(runner)
    entry.said["backend"] = runner.backend()
    if entry.said["backend"] is not None:
        for _ in range(first_replay(device) or 0):  # every later step of a run is a replay
            runner.step()
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
    entry.step = runner.step
    entry.complain = lambda: check.complaint(check.errors(check.result(runner), truth), allowed)


def _check_again(entry: Entry) -> None:
    """Take the times of a step away that is wrong by now."""
    try:
        complaint = entry.complain and entry.complain()
    except Exception as error:
        complaint = rounds.reason(error)
    if complaint:
        entry.times, entry.said["reason"] = [], f"{complaint}, after the rounds"


def _cache_hits() -> int:
    """How many graphs torch's compiler has found in its cache on disk; not 0 makes a first call a warm one."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"]) + int(counters["aot_autograd"]["autograd_cache_hit"])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
