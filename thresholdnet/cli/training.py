"""Commands that make and use trained networks: train, eval, predict, export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as RichTable

from ._shared import Device, Download, JsonFlag, Root, app, pairs, print_table


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
    save_seconds: Annotated[
        float,
        typer.Option(help="Not to save an epoch that ends sooner after the last save, but the best and the last."),
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="32, or mixed: bf16, 16 (GPU).")] = "32",
    ema: Annotated[float | None, typer.Option(help="Decay of averaged weights for evaluation, such as 0.999.")] = None,
    channels_last: Annotated[bool, typer.Option(help="Memory format of weights and images.")] = True,
    fused: Annotated[
        bool, typer.Option("--fused", help="Run the blocks in the engine: equal up to rounding, less memory.")
    ] = False,
    backend: Annotated[str, typer.Option(help="With --fused: auto, or a name that works or raises.")] = "auto",
    recompute: Annotated[
        str | None,
        typer.Option(
            help="With --fused, bottleneck: make bottleneck outputs again in backward, for less memory still."
        ),
    ] = None,
    sync_batchnorm: Annotated[bool, typer.Option("--sync-batchnorm", help="Statistics over all GPUs.")] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Training and test steps as CUDA graphs: for small images on one GPU.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu or mps.")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes on this machine; torchrun's numbers win.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    workers: Annotated[int, typer.Option(help="Decoding processes for large image folders.")] = 2,
    progress: Annotated[bool, typer.Option(help="Progress bar on a terminal.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Train a network; writes checkpoints, curves, a confusion matrix and predictions below --out.

    In plain torch unless --fused is given.  On one GPU:  thresholdnet train --fused --precision bf16 --cuda-graph ...

    A killed run goes on exactly where it was saved:  thresholdnet train --out runs/x --resume

    Several processes:  torchrun --nproc-per-node 4 -m thresholdnet train ...  (tested on a CPU, not on several GPUs)
    """
    from ..backends import CHOICES
    from ..checks import one_of
    from ..train import TrainConfig, train

    given: dict[str, Any] = {
        "model": model, "model_args": pairs("--model-arg", model_arg), "weights": weights, "data": data, "root": root,
        "download": download, "image_size": image_size, "limit": limit, "recipe": recipe,
        "recipe_args": pairs("--recipe-arg", recipe_arg), "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "seed": seed, "out_dir": out, "resume": resume, "save_every": save_every, "save_seconds": save_seconds,
        "precision": precision, "ema": ema,
        "channels_last": channels_last, "fused": fused, "backend": backend, "recompute": recompute,
        "sync_batchnorm": sync_batchnorm, "cuda_graph": cuda_graph, "accelerator": accelerator,
        "devices": devices, "num_nodes": nodes, "workers": workers, "progress": progress, "quiet": as_json,
    }  # fmt: skip
    saved = TrainConfig.saved_in(out) if resume else None
    if saved is not None:
        typed = _typed(context, {"out": "out_dir", "nodes": "num_nodes", "model_arg": "model_args",
                                 "recipe_arg": "recipe_args", "as_json": "quiet"})  # fmt: skip
        typed |= {"out_dir", "resume", "progress", "quiet"}
        if recipe == saved.full_recipe().name:
            typed.discard("recipe")  # the run's own, whose epochs and other fields are not to fall back to the defaults
        given = {key: value for key, value in given.items() if key in typed}
        config = replace(saved, **given)
    else:
        config = TrainConfig(**given)
    if one_of("backend", config.backend, CHOICES) != "auto" and not config.fused:
        raise ValueError(f"--backend needs --fused, got --backend {config.backend} without it")
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
    from ..inference import evaluate

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
    print_table(table)
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
    from ..inference import predict

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
    out: Annotated[Path, typer.Argument(help="The file to write: .onnx, .pt2 (torch.export) or .pt (TorchScript).")],
    checkpoint: Annotated[Path | None, typer.Option(help="best.ckpt or last.ckpt of a run.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A folder of save_pretrained, or a Hub repository.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of the zoo, with random weights.")] = None,
    to: Annotated[
        str | None,
        typer.Option(help="onnx, pt2, torchscript, or aoti (.pt2, compiled); by default what the file's name ends in."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels; a run's own, or 224.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """A network as a file for onnxruntime, OpenCV, TensorRT or torch: plain operations, BatchNorms folded.

    Any batch size, float32. A checkpoint's mean and standard deviation are printed: images are prepared with them.
    """
    from ..export import export

    given = {"--checkpoint": checkpoint, "--pretrained": pretrained, "--model": model}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) != 1:
        raise ValueError(f"one of {', '.join(given)} must be given, got {', '.join(sources) or 'none'}")
    told: dict[str, Any] = {}
    if checkpoint is not None:
        from ..checkpoint import load_checkpoint

        loaded = load_checkpoint(checkpoint)
        network, side = loaded.model, loaded.image_size if image_size is None else image_size
        told = {"classes": loaded.classes, "mean": loaded.mean, "std": loaded.std}
    else:
        from ..models import create_model, from_pretrained

        network = create_model(model) if model is not None else from_pretrained(str(pretrained))
        side = 224 if image_size is None else image_size
    path = export(network, out, to, image_size=side)
    told = {"path": str(path), "bytes": path.stat().st_size, "image_size": side, **told}
    if as_json:
        print(json.dumps(told, indent=2))
        return
    print(f"{path}: {told['bytes'] / 2**20:,.1f} MiB, images [N, 3, {side}, {side}]")
    if checkpoint is not None:
        print(f"prepare images as (image / 255 - mean) / std, mean {told['mean']}, std {told['std']}")
