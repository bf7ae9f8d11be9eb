"""The command bench: measure, list, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ._shared import Device, JsonFlag, app


@app.command("bench")
def bench_command(
    files: Annotated[list[Path] | None, typer.Argument(help="With --report: files of results.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print each file's Markdown table and draw its picture beside it.")
    ] = False,
    preset: Annotated[str, typer.Option(help="Which cases: cpu, gpu or quick; the options below change it.")] = "quick",
    model: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:KEY=VALUE,KEY=VALUE instead of the preset's; may repeat.")
    ] = None,
    image: Annotated[list[int] | None, typer.Option(help="Side of the images in pixels; may repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images a step; may repeat.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16, fp16 or fp64; may repeat.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="train or infer; may repeat.")] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, eager_channels_last, compile, compile_max_autotune, checkpoint, fused, fused_recompute, "
            "fused_winograd, fused_native, fused_triton; may repeat."
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--filter", help="Regular expression of cases, such as 'densenet.* 8x224.* train'.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each provider, one a round.")] = 7,
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
    """Measure training and inference steps: eager, compiled, checkpointed and fused, on the same weights and images.

    Every provider is checked against eager first and timed only if it is right. Each round then runs all of them once,
    in an order that rotates; ratios are medians over rounds. Leave the machine alone meanwhile.

    The file is written after every case; the same command goes on where it was stopped.

    The CPU table:  thresholdnet bench --preset cpu --name models

    One question:  thresholdnet bench --preset cpu --filter 'hardnet68 8x224.* train' --provider eager_channels_last
    --provider fused --rounds 15 --name hardnet

    The report:  thresholdnet bench --report bench/results/*/*-models.json
    """
    from .. import bench

    if report:
        _tell_reports(files or [], as_json)
        return
    if files:
        raise ValueError(f"files must come with --report, got {files[0]} without it")
    cases = bench.select(
        preset, models=model or (), images=image or (), batches=batch or (), dtypes=dtype or (), modes=mode or (),
        pattern=pattern,
    )  # fmt: skip
    providers = list(dict.fromkeys(provider or bench.PRESETS[preset].providers))
    place = device or bench.default_device()
    settings = bench.Settings(rounds=rounds, warmup=warmup, device=place, cuda_graph=cuda_graph)
    here = bench.machine(machine, place)
    results = bench.Results(bench.path_for(out, here["name"], name or preset), here)
    waiting = [case for case in cases if not results.has(case, bench.known(providers), settings.graphs)]
    if dry_run:
        if as_json:
            print(json.dumps({"file": str(results.path), "cases": [str(case) for case in waiting]}, indent=2))
            return
        for case in cases:
            print(f"{case}: {', '.join(providers)}{'' if case in waiting else ' (done)'}")
        print(f"{len(waiting)} of {len(cases)} cases to measure, file: {results.path}")
        return
    _run_bench(waiting, providers, settings, results, quiet=as_json)
    document = {"machine": results.machine, "rows": results.rows}
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(bench.markdown(document, results.path.name))
    print(f"written: {results.path}; its picture: thresholdnet bench --report {results.path}")


def _run_bench(cases: Sequence[Any], providers: Sequence[str], settings: Any, results: Any, quiet: bool) -> None:
    """Measure the cases, one after the other, each written as it is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import bench

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):

            def tell(text: str, share: float, done: int = done, case: Any = case) -> None:
                progress.update(bar, completed=done + share, description=f"{done + 1}/{len(cases)} {case}: {text}")

            results.add(case, bench.measure(case, providers, settings, tell))


def _tell_reports(files: Sequence[Path], as_json: bool) -> None:
    from .. import bench

    if not files:
        raise ValueError("report must be given at least one file of results, got none")
    made = []
    for file in files:
        results, picture = bench.read(file), file.with_suffix(".png")
        bench.plot(results, picture)
        made.append({"file": str(file), "markdown": bench.markdown(results, file.name), "figure": str(picture)})
        if not as_json:
            print(f"{made[-1]['markdown']}\ndrawn: {picture}")
    if as_json:
        print(json.dumps(made, indent=2))
