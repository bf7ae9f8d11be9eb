"""Train the experiments of the ThresholdNet paper and report them beside its figures.

    python bench/paper tables --root DATA              Tables VI and VII: 11 networks each, 200 epochs
    python bench/paper tables VI --root DATA --precision bf16 --cuda-graph      the same on one GPU, Table VI alone
    python bench/paper sweep --root DATA --epochs 10   thresholds 0, 4, 8, 12, 16 of ThresholdNet-ab and -bc
    python bench/paper report                          what there is so far: report.md, report.json, pictures

Exit codes as those of `thresholdnet`: 0 done or time up, 2 bad input (one sentence), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import experiments
import report as reports
import side_by_side
import typer
from experiments import Experiment, Run, Settings

from thresholdnet.checks import integer, output_folder
from thresholdnet.cli import main
from thresholdnet.cli._shared import JsonFlag, pairs
from thresholdnet.tables import Table, to_text

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train the experiments of the ThresholdNet paper, in slices, and report them beside its figures.",
    epilog="A minute to start with:  python bench/paper sweep --data digits --threshold 0 --threshold 8 --pattern ab "
    "--model-arg width_mult=0.25 --limit 500 --epochs 3 --out runs/try && python bench/paper report --out runs/try",
)

Out = Annotated[Path, typer.Option(help="Folder of all runs, one folder each: <part>/<network>/seed<n>.")]
Root = Annotated[Path | None, typer.Option(help="Folder of cifar-10-batches-py and stl10_binary.")]
Data = Annotated[
    str | None, typer.Option(help="Another data set in place of the paper's, for trials: digits needs no files.")
]
Epochs = Annotated[int | None, typer.Option(help="The recipe's by default (200); more may be asked for later.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many images of each split, for trials.")]
Seed = Annotated[list[int] | None, typer.Option(help="0 by default; may repeat, and the report gives mean and range.")]
Recipe = Annotated[str, typer.Option(help="released (the authors') or modern.")]
Precision = Annotated[str, typer.Option(help="32, or mixed: bf16, 16 (GPU).")]
Device = Annotated[str, typer.Option(help="auto, cpu, gpu or mps.")]
Fused = Annotated[
    bool, typer.Option("--fused/--plain", help="Run our blocks in the engine; baselines are plain torch.")
]
Backend = Annotated[str, typer.Option(help="Of the engine: auto, or a name that works or raises.")]
Minutes = Annotated[
    float | None, typer.Option(help="Stop cleanly after so long; the same command then goes on exactly.")
]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Steps as CUDA graphs: 32x32 pixels are launch-bound on a GPU.")
]
SaveEvery = Annotated[
    int | None,
    typer.Option(help="Steps between saves inside an epoch: what a kill costs. CPU: 100; GPU: epochs, a minute apart."),
]
Jobs = Annotated[
    int,
    typer.Option(
        help="Runs at a time, a process each: of use on small images, where a GPU idles, with "
        "'nvidia-cuda-mps-control -d' started before. Their times are then left out of the report."
    ),
]
Only = Annotated[str, typer.Option(help="Regular expression of runs, such as 'VI/thresholdnet' or 'T08'.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs and what is done, and stop.")]
ShowBar = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bar on a terminal.")]
OUT = Path("runs/paper")


@app.command("tables")
def tables_command(
    names: Annotated[list[str] | None, typer.Argument(help="VI (CIFAR-10), VII (STL-10); both by default.")] = None,
    out: Out = OUT,
    root: Root = None,
    stand_in: Annotated[
        Path | None,
        typer.Option(
            help="Image folder (train/, val/) for Table VII where --root holds no STL-10; the report says so."
        ),
    ] = None,
    data: Data = None,
    epochs: Epochs = None,
    limit: Limit = None,
    seed: Seed = None,
    recipe: Recipe = "released",
    precision: Precision = "32",
    device: Device = "auto",
    fused: Fused = True,
    backend: Backend = "auto",
    cuda_graph: CudaGraph = False,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    save_every: SaveEvery = None,
    only: Only = "",
    dry_run: DryRun = False,
    progress: ShowBar = True,
    as_json: JsonFlag = False,
) -> None:
    """Train the rows of Tables VI and VII at native size, batch 100.

    DenseNet, ResNet, ResNeXt and WideResNet are trained with ImageNet's stem and, as NAME-small, with a 3x3 stem of
    stride 1 without a pool: the paper does not say which it had. A WideResNet run takes 1.6 GB of disk, others less.
    """
    settings = Settings(
        out, root, stand_in, data, epochs, limit, tuple(seed or (0,)), recipe, precision, device, fused, backend,
        cuda_graph, save_every, progress, as_json,
    )  # fmt: skip
    chosen = [one for name in names or ("VI", "VII") for one in experiments.of_table(name)]
    _go(chosen, settings, only, minutes, jobs, dry_run)


@app.command("sweep")
def sweep_command(
    pattern: Annotated[list[str] | None, typer.Option(help="ab or bc; both by default.")] = None,
    threshold: Annotated[list[int] | None, typer.Option(help="0, 4, 8, 12 and 16 by default; may repeat.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the networks, such as width_mult=0.5 or width_rule=harmonic; may repeat."),
    ] = None,
    out: Out = OUT,
    root: Root = None,
    data: Data = None,
    epochs: Epochs = None,
    limit: Limit = None,
    seed: Seed = None,
    recipe: Recipe = "released",
    precision: Precision = "32",
    device: Device = "auto",
    fused: Fused = True,
    backend: Backend = "auto",
    cuda_graph: CudaGraph = False,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    save_every: SaveEvery = None,
    only: Only = "",
    dry_run: DryRun = False,
    progress: ShowBar = True,
    as_json: JsonFlag = False,
) -> None:
    """Train ThresholdNet-ab and -bc over thresholds on CIFAR-10: the trade-off that the paper announces.

    Every layer has width k unless --model-arg width_rule=harmonic asks for the zoo's own rule, under which widths
    change with the threshold, too.
    """
    settings = Settings(
        out, root, None, data, epochs, limit, tuple(seed or (0,)), recipe, precision, device, fused, backend,
        cuda_graph, save_every, progress, as_json,
    )  # fmt: skip
    chosen = experiments.of_sweep(
        pattern or experiments.PATTERNS, threshold or experiments.THRESHOLDS, pairs("--model-arg", model_arg)
    )
    _go(chosen, settings, only, minutes, jobs, dry_run)


@app.command("report")
def report_command(
    out: Out = OUT,
    to: Annotated[
        Path | None, typer.Option(help="Folder for report.md, report.json and pictures; --out by default.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Set the runs so far beside the paper: errors, times, links, parameters, kept bytes, and what differs."""
    output_folder("--out" if to is None else "--to", to or out)
    parts = reports.collect(out)
    files = reports.write(parts, to or out)
    if as_json:
        print(json.dumps(parts | {"files": [str(file) for file in files]}, indent=1))
        return
    for part, found in parts.items():
        print(to_text(reports.as_table(part, found)))
    for file in files:
        print(f"written: {file}")


def _go(
    chosen: Iterable[Experiment], settings: Settings, only: str, minutes: float | None, jobs: int, dry_run: bool
) -> None:
    """Train what is to be trained, then list all of it."""
    runs = _matching(experiments.with_seeds(chosen, settings), only)
    say: Any = (lambda _: None) if settings.quiet else print
    signum = 0
    if not dry_run and integer("--jobs", jobs, 1) > 1:
        signum = side_by_side.train_all(runs, minutes, jobs, say)
    elif not dry_run:
        signum = experiments.train_all(runs, minutes, say)
    states = [_state(run) for run in runs]
    done = sum(state["state"] == "done" for state in states)
    if settings.quiet:
        print(json.dumps({"done": done, "runs": states}, indent=2))
    else:
        print(to_text(_listed(states, settings.out)), end="")
        if done < len(runs):
            print("The same command goes on." if not dry_run else "Nothing was trained.")
    if signum:
        raise typer.Exit(128 + signum)


def _matching(runs: Sequence[Run], only: str) -> list[Run]:
    try:
        found = [run for run in runs if re.search(only, run.name)]
    except re.error as error:
        raise ValueError(f"--only must be a regular expression, got {only!r} ({error})") from error
    if not found:
        raise ValueError(f"--only must match a run ({', '.join(run.name for run in runs)}), got {only!r}")
    return found


def _state(run: Run) -> dict[str, Any]:
    epochs = experiments.history(run.folder)
    begun = (run.folder / "config.json").exists()
    return {
        "name": run.name,
        "state": "done" if experiments.is_done(run) else "begun" if begun else "to do",
        "epochs": len(epochs),
        "of": run.epochs,
        "best_error": 100 * (1 - max(row["test_accuracy"] for row in epochs)) if epochs else None,
        "data": run.config.data,
        "folder": str(run.folder),
    }


def _listed(states: Sequence[dict[str, Any]], out: Path) -> Table:
    rows = [
        (state["name"], state["data"], f"{state['epochs']} of {state['of']}", state["state"],
         None if state["best_error"] is None else f"{state['best_error']:.2f}")
        for state in states
    ]  # fmt: skip
    return Table(f"Runs below {out}", ("run", "data", "epochs", "state", "best error %"), tuple(rows))


if __name__ == "__main__":
    main(app, "python bench/paper")
