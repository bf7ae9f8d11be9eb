"""The command `thresholdnet`: a thin layer over the package's functions; heavy imports wait until a command runs.

Exit codes: 0 done, 2 bad input or a failed write (one sentence on stderr), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table as RichTable
except ImportError as error:
    sys.exit(f"error: the command line needs: pip install 'thresholdnet[train]' ({error})")

from . import __version__, links

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="DenseNet-family networks with pruned links: train, evaluate, predict; the paper's tables and link patterns.",
    epilog="A minute to start with:  thresholdnet train --data digits --model thresholdnet_ab "
    "--model-arg width_mult=0.5 --epochs 20 --batch-size 50 --out runs/first",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the data files (cifar10, stl10: torchvision's layout).")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing files below --root.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU if there is one by default.")]


def main() -> None:
    """Run the command line; every expected failure ends in one sentence and exit code 2."""
    try:
        app(prog_name="thresholdnet")
    except KeyboardInterrupt:
        sys.exit(130)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("THRESHOLDNET_TRACEBACK"):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _version(shown: bool) -> None:
    if shown:
        import torch

        print(f"thresholdnet {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions.")] = False,
) -> None:
    pass


@app.command("train")
def train_command(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model of the zoo; thresholdnet models lists them.")] = "thresholdnet_v1",
    model_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the model, such as threshold=4; may repeat.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Start from a released file (HarDNet, ThreshNet, torchvision DenseNet).")
    ] = None,
    data: Annotated[str, typer.Option(help="digits (embedded), cifar10, stl10 or imagefolder.")] = "cifar10",
    root: Root = None,
    download: Download = False,
    image_size: Annotated[int | None, typer.Option(help="Pixels; the data's own size by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many images of each split, for trials.")] = None,
    recipe: Annotated[
        str, typer.Option(help="released (the authors': Adam, flip only) or modern (SGD, cosine, crop, smoothing).")
    ] = "modern",
    recipe_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the recipe, such as weight_decay=1e-4; may repeat.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set; the recipe's by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step over all devices.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation, dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and pictures.")] = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --out's last checkpoint; options not given are taken from it.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between saves inside an epoch; 0: epoch ends only.")] = 0,
    precision: Annotated[str, typer.Option(help="32, or mixed: bf16, 16 (GPU).")] = "32",
    ema: Annotated[float | None, typer.Option(help="Decay of averaged weights for evaluation, such as 0.999.")] = None,
    channels_last: Annotated[bool, typer.Option(help="Memory format of weights and images.")] = True,
    fused: Annotated[
        bool, typer.Option("--fused", help="Run the blocks in the engine: same results, less memory.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Of the engine: auto, or a name that works or raises.")] = "auto",
    recompute: Annotated[
        str | None, typer.Option(help="bottleneck: make bottleneck outputs again in backward, for less memory still.")
    ] = None,
    sync_batchnorm: Annotated[bool, typer.Option("--sync-batchnorm", help="Statistics over all GPUs.")] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu or mps.")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes on this machine; torchrun's numbers win.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    workers: Annotated[int, typer.Option(help="Decoding processes for large image folders.")] = 2,
    progress: Annotated[bool, typer.Option(help="Progress bar on a terminal.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Train a network; writes checkpoints, curves, a confusion matrix and predictions below --out.

    A killed run goes on exactly where it was saved:  thresholdnet train --out runs/x --resume

    Several GPUs:  torchrun --nproc-per-node 4 -m thresholdnet train ...
    """
    from .train import TrainConfig, train

    given: dict[str, Any] = {
        "model": model, "model_args": _pairs("--model-arg", model_arg), "weights": weights, "data": data, "root": root,
        "download": download, "image_size": image_size, "limit": limit, "recipe": recipe,
        "recipe_args": _pairs("--recipe-arg", recipe_arg), "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "seed": seed, "out_dir": out, "resume": resume, "save_every": save_every, "precision": precision, "ema": ema,
        "channels_last": channels_last, "fused": fused, "backend": backend, "recompute": recompute,
        "sync_batchnorm": sync_batchnorm, "accelerator": accelerator,
        "devices": devices, "num_nodes": nodes, "workers": workers, "progress": progress, "quiet": as_json,
    }  # fmt: skip
    saved = TrainConfig.saved_in(out) if resume else None
    if saved is not None:
        typed = _typed(context, {"out": "out_dir", "nodes": "num_nodes", "model_arg": "model_args",
                                 "recipe_arg": "recipe_args", "as_json": "quiet"})  # fmt: skip
        typed |= {"out_dir", "resume", "progress", "quiet"}
        given = {key: value for key, value in given.items() if key in typed}
        config = replace(saved, **given)
    else:
        config = TrainConfig(**given)
    result = train(config)
    if result["rank"] == 0:
        print(json.dumps(result, indent=2)) if as_json else _tell_training(result)
    if result["interrupted"]:
        raise typer.Exit(128 + result["signal"])


def _typed(context: typer.Context, renamed: dict[str, str]) -> set[str]:
    """Names of the options that stood on the command line, as TrainConfig calls them."""
    typed = (name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE"))
    return {renamed.get(name, name) for name in typed}


def _tell_training(result: dict[str, Any]) -> None:
    if result["interrupted"]:
        print(f"stopped; go on with: thresholdnet train --out {result['out_dir']} --resume")
        return
    print(
        f"test accuracy {result['last_accuracy']:.2%} after {result['epochs']} epochs "
        f"(best {result['best_accuracy']:.2%} in epoch {result['best_epoch']}), "
        f"{result['parameters']:,} parameters, {result['seconds']:.0f} s, {result['images_per_second']:.0f} images/s"
    )
    files = {"best checkpoint": result["checkpoint_best"], "last checkpoint": result["checkpoint_last"]}
    for name, path in (files | result["files"]).items():
        print(f"  {name:<16} {path}")


@app.command("eval")
def eval_command(
    checkpoint: Annotated[Path, typer.Argument(help="best.ckpt or last.ckpt of a run.")],
    data: Annotated[str | None, typer.Option(help="Data set; the one it was trained on by default.")] = None,
    root: Root = None,
    download: Download = False,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Use at most so many test images.")] = None,
    device: Device = None,
    figure: Annotated[Path | None, typer.Option(help="Write the confusion matrix there as a PNG.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Accuracy, a table per class and the confusion matrix of a checkpoint on a test set."""
    from .inference import evaluate

    report = evaluate(
        checkpoint, data, root, download=download, batch_size=batch_size, limit=limit, device=device,
        figure=figure, progress=not as_json,
    )  # fmt: skip
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = RichTable("class", "precision", "recall", "images", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report["classes"]:
        shown = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("precision", "recall")]
        table.add_row(row["name"], *shown, str(row["support"]))
    _print_table(table)
    print(
        f"accuracy {report['accuracy']:.2%}, loss {report['loss']:.4f} on {report['images']} images, "
        f"{report['images_per_second']:.0f} images/s"
    )
    if figure is not None:
        print(f"confusion matrix: {figure}")


@app.command("predict")
def predict_command(
    checkpoint: Annotated[Path, typer.Argument(help="best.ckpt or last.ckpt of a run.")],
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top_k: Annotated[int, typer.Option(help="Classes to list per image.")] = 5,
    figure: Annotated[Path | None, typer.Option(help="Write a contact sheet there as a PNG.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 100,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Classes with probabilities for image files."""
    from .inference import predict

    rows = predict(
        checkpoint, paths, top_k=top_k, figure=figure, batch_size=batch_size, device=device, progress=not as_json
    )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['path']}: " + ", ".join(f"{top['class']} {top['probability']:.1%}" for top in row["top"]))
    if figure is not None:
        print(f"contact sheet: {figure}")


@app.command("export")
def export_command(
    out: Annotated[Path, typer.Argument(help="The file to write: .onnx, or .pt2 for torch.export.")],
    checkpoint: Annotated[Path | None, typer.Option(help="best.ckpt or last.ckpt of a run.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A folder of save_pretrained, or a Hub repository.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the zoo, with random weights.")] = None,
    to: Annotated[str | None, typer.Option(help="onnx or pt2; by default what the file's name ends in.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels; a run's own, or 224.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """A network as a file for onnxruntime, OpenCV, TensorRT or torch.export: plain operations, BatchNorms folded.

    Any batch size, float32. A checkpoint's mean and standard deviation are printed: images are prepared with them.
    """
    from .export import export

    given = {"--checkpoint": checkpoint, "--pretrained": pretrained, "--model": model}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) != 1:
        raise ValueError(f"one of {', '.join(given)} must be given, got {', '.join(sources) or 'none'}")
    told: dict[str, Any] = {}
    if checkpoint is not None:
        from .checkpoint import load_checkpoint

        loaded = load_checkpoint(checkpoint)
        network, side = loaded.model, image_size or loaded.image_size
        told = {"classes": loaded.classes, "mean": loaded.mean, "std": loaded.std}
    else:
        from .models import create_model, from_pretrained

        network = create_model(model) if model is not None else from_pretrained(str(pretrained))
        side = image_size or 224
    path = export(network, out, to, image_size=side)
    told = {"path": str(path), "bytes": path.stat().st_size, "image_size": side, **told}
    if as_json:
        print(json.dumps(told, indent=2))
        return
    print(f"{path}: {told['bytes'] / 2**20:,.1f} MiB, images [N, 3, {side}, {side}]")
    if checkpoint is not None:
        print(f"prepare images as (image / 255 - mean) / std, mean {told['mean']}, std {told['std']}")


@app.command("models")
def models_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'densenet*'.")] = "*",
    as_json: JsonFlag = False,
) -> None:
    """The zoo: names, parameters with 1000 classes, and the arguments that --model-arg takes."""
    from .models import create_model, list_models, model_arguments

    names = list_models(pattern)
    if not names:
        raise ValueError(f"pattern must match a model ({', '.join(list_models())}), got {pattern!r}")
    rows = []
    for name in names:
        parameters = sum(p.numel() for p in create_model(name, device="meta").parameters())
        arguments = model_arguments(name)
        rows.append({"model": name, "parameters": parameters, "arguments": arguments})
        if not as_json:
            takes = ", ".join(f"{key}={value}" for key, value in arguments.items())
            print(f"{name:<20}{parameters:>13,}  {takes}".rstrip())
    if as_json:
        print(json.dumps(rows, indent=2))


@app.command("tables")
def tables_command(
    names: Annotated[list[str] | None, typer.Argument(help="I II III IV V VIII; all by default.")] = None,
    style: Annotated[str, typer.Option("--format", help="text, markdown, csv or json.")] = "text",
    out: Annotated[Path | None, typer.Option(help="Write there instead of printing.")] = None,
) -> None:
    """The paper's tables beside ours: links, architecture, parameters, FLOPS and MAdds."""
    from . import tables
    from .checks import one_of

    render = tables.FORMATS[one_of("--format", style, tables.FORMATS)]
    chosen = [tables.table(name) for name in names or tables.TABLES]
    if style == "json":
        text = json.dumps([json.loads(render(table)) for table in chosen], indent=2)
    else:
        text = "\n".join(render(table).rstrip("\n") + "\n" for table in chosen)
    _write_or_print(text.rstrip("\n") + "\n", out)


@app.command("memory")
def memory_command(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "thresholdnet_v1",
    model_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the model; may repeat.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
    figure: Annotated[Path | None, typer.Option(help="Write a bar chart there as a PNG.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bytes that a training step keeps and needs at its peak: eager, fused, and fused with recomputed bottlenecks.

    Counted by running the step without computing it (torch's meta device): no GPU is needed and no time is spent.
    """
    from . import figures, memory
    from .models import create_model

    network = create_model(model, device="meta", **_pairs("--model-arg", model_arg))
    report = memory.account(network, (batch_size, 3, image_size, image_size), memory.dtype_of(dtype))
    if figure is not None:
        figures.memory_bars(report, figure, f"{model}, batch {batch_size} at {image_size}x{image_size}, {dtype}")
    if as_json:
        print(json.dumps(memory.as_dict(report), indent=2))
        return
    table = RichTable("", *report, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    eager = report["eager"]
    for name in eager.blocks:
        table.add_row(f"kept in {name}", *(_mib(account.blocks[name]) for account in report.values()))
    for what in ("kept", "peak", "moved"):
        values = [getattr(account, what) for account in report.values()]
        table.add_row(f"{what} in all", *map(_mib, values), style="bold")
        table.add_row("  of eager", *(f"{value / values[0]:.2f}" for value in values))
    _print_table(table)
    print(
        "MiB of activations. kept: from forward to backward; peak: of the step; moved: read and written by operations"
    )
    if figure is not None:
        print(f"drawn: {figure}")


def _mib(value: int) -> str:
    return f"{value / 2**20:,.1f}"


@app.command("links")
def links_command(
    pattern: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(links.PATTERNS)}; several with --compare.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the block.")] = 16,
    threshold: Annotated[int, typer.Option(help="Last layer on the dense side (threshold_ab, threshold_bc).")] = 8,
    above: Annotated[str, typer.Option(help="Rule above it: even_log (the paper's tables) or harmonic.")] = "even_log",
    n: Annotated[int, typer.Option(help="Nodes kept at either end (sparse_dense).")] = 2,
    compare: Annotated[
        bool, typer.Option("--compare", help="Several patterns side by side: those given, or all seven.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Picture file (.png or .svg); links-<pattern>-<layers>.png and .svg by default.")
    ] = None,
    draw: Annotated[bool, typer.Option(help="Draw the arc diagram.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """A link pattern as the paper's table and as an arc diagram."""
    names = list(pattern or (links.PATTERNS if compare else ["threshold_ab"]))
    if len(names) > 1 and not compare:
        raise ValueError(f"--pattern must be given once unless --compare is set, got {len(names)}")
    made = [links.make(name, layers, threshold=threshold, above=above, n=n) for name in names]
    files: list[Path] = []
    if draw:
        from .diagrams import arc_diagram

        stem = Path(f"links-{'compare' if compare else names[0]}-{layers}")
        files = [out] if out is not None else [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        for file in files:
            arc_diagram(made, file, names)
    if as_json:
        rows = [
            {"pattern": name, "threshold": pattern.threshold, "links": pattern, "total": pattern.total}
            for name, pattern in zip(names, made, strict=True)
        ]
        print(json.dumps({"patterns": rows, "files": [str(file) for file in files]}, indent=2))
        return
    table = RichTable("layer", *names, box=None, header_style="bold")
    table.columns[0].justify = "right"
    for i, row in enumerate(zip(*(pattern.rows() for pattern in made), strict=True), start=1):
        table.add_row(str(i), *(text for _, text in row))
    table.add_row("links", *(str(pattern.total) for pattern in made), style="bold")
    _print_table(table)
    for file in files:
        print(f"drawn: {file}")


@app.command("info")
def info_command(as_json: JsonFlag = False) -> None:
    """Versions, backends with their reasons, how the libraries were built, the machine, environment variables."""
    from . import info

    report = info.collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = RichTable(box=None, show_header=False)
    for name, value in info.rows(report):
        table.add_row(f"[bold]{name}[/bold]" if value is None else f"  {name}", "" if value is None else escape(value))
    _print_table(table)


@app.command("selftest")
def selftest_command(
    backend: Annotated[str, typer.Option(help="all, or one engine: triton or native.")] = "all",
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp64, fp32, bf16 or fp16; may repeat; all by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The first layers of each block only.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check every backend of this machine on blocks of the zoo against the reference; exit code 1 on any miss.

    Output, statistics, gradients and inference, in each dtype: what to run after an installation.
    """
    from rich.progress import track

    from . import selftest

    cases = selftest.cases(backend, dtype or (), quick)
    shown = track(cases, "checking", console=Console(stderr=True), transient=True, disable=as_json)
    results = [selftest.check(case) for case in shown]
    if as_json:
        print(json.dumps([result.as_dict() for result in results], indent=2))
    else:
        _tell_selftest(results)
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def _tell_selftest(results: Sequence[Any]) -> None:
    """One row a case: the quantity nearest to its bound, or furthest beyond."""
    from .backends import backends, details

    table = RichTable("backend", "device", "dtype", "block", "worst", "error", "bound", "", "s", box=None)
    for column in ("error", "bound", "s"):
        next(c for c in table.columns if c.header == column).justify = "right"
    for result in results:
        case = result.case
        worst = ("raised", "", "") if result.cause else result.worst
        name, error, bound = (part if isinstance(part, str) else f"{part:.1e}" for part in worst)
        verdict = "[green]ok[/green]" if result.ok else "[bold red]FAIL[/bold red]"
        table.add_row(
            case.backend, case.device, case.dtype, case.text, name, error, bound, verdict, f"{result.seconds:.1f}"
        )
    _print_table(table)
    for result in results:
        if result.cause:
            print(f"{result.case.backend}, {result.case.dtype}, {result.case.text}: {result.cause}")
    tested = {result.case.backend for result in results}
    for name, reason in backends().items():
        if name in tested:
            print(f"{name}: {details()[name]}")
        elif reason is not None:
            print(f"{name} is not here: {reason}")
    failed = sum(not result.ok for result in results)
    print(f"{len(results) - failed} of {len(results)} checks passed")


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
    from . import bench

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

    from . import bench

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):

            def tell(text: str, share: float, done: int = done, case: Any = case) -> None:
                progress.update(bar, completed=done + share, description=f"{done + 1}/{len(cases)} {case}: {text}")

            results.add(case, bench.measure(case, providers, settings, tell))


def _tell_reports(files: Sequence[Path], as_json: bool) -> None:
    from . import bench

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


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """["threshold=4", "above=harmonic"] -> {"threshold": 4, "above": "harmonic"}; values are JSON where they parse."""
    pairs: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{option} must be KEY=VALUE, got {text!r}")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


def _print_table(table: RichTable) -> None:
    """As wide as it is: a cell cut short with dots would be a wrong answer."""
    console = Console()
    wide = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _write_or_print(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    out.write_text(text)
    print(f"written: {out}")
