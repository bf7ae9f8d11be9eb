"""The command bench: measure, list, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import LEVELS, OPERATION_PROVIDERS, PRESETS, PROVIDERS
from ._shared import Device, JsonFlag, app, progress


def _listed(named: dict[str, str]) -> str:
    """A line for each name, with its meaning."""
    width = max(map(len, named))
    return "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in named.items())


HELP = "\n\n".join(  # typer keeps line breaks, so a paragraph is one line
    (
        "Measure steps and single operations: fused, and in plain torch, on the same weights and images.",
        "Each case is checked against plain torch first: what is wrong, or cannot run, gets a reason in place of a "
        "time. Then every round runs all providers once, in an order that turns; a ratio is the median of the "
        "rounds' own. Leave the machine alone meanwhile: what other processes took is noted.",
        "The file is written after every case. The same command goes on where it was stopped; with more providers it "
        "measures those cases again, for a ratio needs both in one round.",
        "What is measured (--level):",
        _listed(LEVELS),
        "Steps have times, bytes kept for backward and peak bytes. Operations (convolution over the linked sources, "
        "its gradients, gather, statistics, BatchNorm) run on cold caches; they have FLOP/s, GB/s and a share of the "
        "roofline.",
        f"Providers (--provider); single operations know {', '.join(OPERATION_PROVIDERS)}:",
        _listed({name: provider.what for name, provider in PROVIDERS.items()}),
        "A first try:  thresholdnet bench",
        "What would run:  thresholdnet bench --preset cpu --level block --filter 'hardnet68.* 8x224' --dry-run",
        "The CPU's table:  thresholdnet bench --preset cpu --name models",
        "One question:  thresholdnet bench --preset cpu --filter 'hardnet68 8x224.* train' "
        "--provider eager_channels_last --provider fused --rounds 15 --name hardnet",
        "The layers of one block:  thresholdnet bench --preset cpu --level layer --model thresholdnet_v1/stages.3 "
        "--image 224 --batch 8 --name layers",
        "A GPU's table, with CUDA graphs:  thresholdnet bench --preset gpu --cuda-graph --name models",
        "Tables and pictures of files:  thresholdnet bench --report bench/results/*/*-models.json",
    )
)


@app.command("bench", help=HELP)
def bench_command(
    files: Annotated[list[Path] | None, typer.Argument(help="With --report: files of results.")] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Print each file's tables, and write them and its pictures beside it."),
    ] = False,
    preset: Annotated[
        str, typer.Option(help=f"Which cases: {', '.join(PRESETS)}; the options below change it.")
    ] = "quick",
    level: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LEVELS)}; may repeat; model by default.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:KEY=VALUE,KEY=VALUE instead of the preset's, and /stages.NUMBER for a block; may repeat."
        ),
    ] = None,
    image: Annotated[list[int] | None, typer.Option(help="Side of the images in pixels; may repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images a step; may repeat.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16 or fp64; may repeat.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="train or infer; may repeat.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="A name of the list above; may repeat; the preset's by default.")
    ] = None,
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="With --level layer: all layers, not three a block.")
    ] = False,
    pattern: Annotated[
        str | None, typer.Option("--filter", help="Regular expression of cases, such as 'densenet.* 8x224.* train'.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Timed steps of each provider, one a round; 0: bytes and checks alone.")
    ] = 7,
    warmup: Annotated[int, typer.Option(help="Rounds before them that are not timed.")] = 2,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On a GPU: measure every step also as a captured graph.")
    ] = False,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for <machine>/<date>-<name>.json, or that file itself.")] = Path(
        "bench/results"
    ),
    name: Annotated[str | None, typer.Option(help="Of the run; the preset's by default.")] = None,
    machine: Annotated[str | None, typer.Option(help="Its folder's name; made from the processor by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """See `HELP`."""
    from .. import bench
    from ..checks import output_file

    if report:
        _tell_reports(files or [], as_json)
        return
    if files:
        raise ValueError(f"files must come with --report, got {files[0]} without it")
    jobs = bench.select(
        preset, levels=level or ("model",), models=model or (), images=image or (), batches=batch or (),
        dtypes=dtype or (), modes=mode or (), every_layer=every_layer, pattern=pattern,
    )  # fmt: skip
    providers = provider or PRESETS[preset].providers
    place = device or bench.default_device()
    settings = bench.Settings(rounds=rounds, warmup=warmup, device=place, cuda_graph=cuda_graph)
    here = bench.machine(machine, place)
    results = bench.Results(bench.path_for(out, here["name"], name or preset), here)
    waiting = [job for job in jobs if not bench.is_done(job, providers, settings, results)]
    if dry_run:
        if as_json:
            print(json.dumps({"file": str(results.path), "cases": [str(job) for job in waiting]}, indent=2))
            return
        for job in jobs:
            print(f"{job}: {', '.join(bench.providers_of(job, providers))}{'' if job in waiting else ' (done)'}")
        print(f"{len(waiting)} of {len(jobs)} cases to measure, file: {results.path}")
        return
    output_file("--out", results.path)
    _run_bench(waiting, providers, settings, results, quiet=as_json)
    if as_json:
        print(json.dumps(results.document, indent=2))
        return
    from ..bench.report import markdown

    print(markdown(bench.read(results.path), results.path.name))
    print(f"written: {results.path}; its pictures: thresholdnet bench --report {results.path}")


def _run_bench(jobs: Sequence[Any], providers: Sequence[str], settings: Any, results: Any, quiet: bool) -> None:
    """Measure the cases, one after the other, each written as it is done."""
    from .. import bench

    with progress(quiet) as shown:
        bar = shown.add_task("", total=len(jobs))
        for done, job in enumerate(jobs):

            def tell(text: str, share: float, done: int = done, job: Any = job) -> None:
                shown.update(bar, completed=done + share, description=f"{done + 1}/{len(jobs)} {job}: {text}")

            bench.run(job, providers, settings, results, tell)


def _tell_reports(files: Sequence[Path], as_json: bool) -> None:
    from .. import bench
    from ..bench.plots import draw
    from ..bench.report import markdown

    if not files:
        raise ValueError("report must be given at least one file of results, got none")
    made = []
    for file in files:
        results, table = bench.read(file), file.with_suffix(".md")
        text = markdown(results, file.name)
        table.write_text(text)
        pictures = [str(picture) for picture in draw(results, file.with_suffix(""))]
        made.append({"file": str(file), "markdown": text, "written": [str(table), *pictures]})
        if not as_json:
            print(f"{text}\nwritten: {', '.join([str(table), *pictures])}")
    if as_json:
        print(json.dumps(made, indent=2))
