"""What a run of the command has to do, and how one job is done: a step of a network or a block, or an operation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..checks import one_of
from . import micro
from .cases import PRESETS, Case
from .layers import Operation, operations
from .measure import measure
from .peaks import Peak, peak
from .providers import known
from .results import Results
from .rounds import Settings, Tell, current
from .stages import stages

LEVELS = {
    "model": "steps of whole networks",
    "block": "steps of each of their blocks alone",
    "layer": "single operations of their blocks' layers",
}
"""What may be measured of a model, in words."""

Job = Case | Operation


def select(
    preset: str,
    *,
    levels: Sequence[str] = ("model",),
    models: Sequence[str] = (),
    images: Sequence[int] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
    every_layer: bool = False,
    pattern: str | None = None,
) -> list[Job]:
    """The jobs of a preset; a list that is given takes the place of the preset's own.

    Args:
        levels: of `LEVELS`.
        models: see `Case.model`; one that names a block is meant alone at every level.
        images, batches: every image size with every batch; one of them alone replaces that half of the preset's sizes.
        every_layer: operations of every layer, not of the first, the middle and the last one of each block alone.
        pattern: a regular expression that a job's text must hold: "hardnet68 8x224x224 fp32 train",
            "hardnet68/stages.2 8x224x224 fp32 train", "hardnet68/stages.2 8x224x224 fp32 layer 4 3x3 convolution".

    Raises:
        ValueError: an unknown name, a number out of range, a broken expression, or nothing left to measure.
    """
    chosen = PRESETS[one_of("preset", preset, PRESETS)]
    sizes: Mapping[tuple[int, int], None] = dict.fromkeys(
        (new_image, new_batch)
        for image, batch in chosen.sizes
        for new_image in images or (image,)
        for new_batch in batches or (batch,)
    )
    rows = itertools.product(models or chosen.models, sizes, dtypes or chosen.dtypes, modes or chosen.modes)
    cases = [Case(model, image, batch, dtype, mode) for model, (image, batch), dtype, mode in rows]
    for case in cases:
        if case.stage is not None:
            stages(case)  # raises where the network has no such block
    jobs: list[Job] = []
    for level in dict.fromkeys(one_of("level", level, LEVELS) for level in levels):
        if level == "model":
            jobs += cases
        elif level == "block":
            jobs += [replace(case, model=f"{case.network}/{stage.name}") for case in cases for stage in stages(case)]
        else:  # an operation belongs to no mode
            alike = dict.fromkeys(replace(case, mode="train") for case in cases)
            jobs += [op for case in alike for op in operations(case, every_layer)]
    jobs = list(dict.fromkeys(jobs))
    try:
        kept = [job for job in jobs if re.search(pattern or "", str(job))]
    except re.error as error:
        raise ValueError(f"filter must be a regular expression, got {pattern!r} ({error})") from error
    if not kept:
        raise ValueError(f"filter must match one of {len(jobs)} cases, such as {str(jobs[0])!r}, got {pattern!r}")
    return kept


def providers_of(job: Job, names: Sequence[str]) -> list[str]:
    """Which of these providers a job is measured with: operations have few.

    Raises:
        ValueError: an unknown provider, or none that does operations.
    """
    wanted = known(list(dict.fromkeys(names)))
    if isinstance(job, Case):
        return wanted
    able = [name for name in wanted if name in micro.PROVIDERS]
    if not able:
        raise ValueError(
            f"provider must be one of {', '.join(micro.PROVIDERS)} for single operations, got {', '.join(wanted)}"
        )
    return able


def is_done(job: Job, names: Sequence[str], settings: Settings, results: Results) -> bool:
    """Whether a file of results holds a job's rows for all of these providers."""
    return results.has(job, providers_of(job, names), settings.graphs, timed=settings.rounds > 0)


def run(job: Job, names: Sequence[str], settings: Settings, results: Results, tell: Tell) -> None:
    """Measure one job and write the file: again with the providers that it holds for the job, which are its rounds.

    As graphs too where the file holds those: the job's rows take the place of the earlier ones.
    """
    held = results.of(job)
    providers = list(dict.fromkeys([*providers_of(job, names), *(row["provider"] for row in held)]))
    settings = replace(settings, cuda_graph=settings.cuda_graph or any(row["graph"] for row in held))
    with current(torch.device(settings.device)):
        if isinstance(job, Case):
            results.add(job, measure(job, providers, settings, tell))
            return
        if job.dtype not in results.peaks:
            tell("copy and matrix product of this machine", 0.0)
            results.peaks[job.dtype] = peak(settings.device, job.dtype).fields
        roof = Peak(**results.peaks[job.dtype])
        results.add(job, micro.measure_operation(job, providers, settings, roof, tell))
