"""The command convert: what `tn.convert` would do with somebody's model, and what it gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ._shared import Device, JsonFlag, app, pairs, print_table, progress

HELP = "\n\n".join(  # typer keeps line breaks, so a paragraph is one line
    (
        "Try tn.convert on a model of your own: which blocks it fuses, why others are left, and what that gains.",
        "The model is made by MODULE:FACTORY, with random weights or whatever the factory loads. Its steps run beside "
        "those of converted copies, in rounds: a training step is forward and the gradients of the output's mean. The "
        "converted model's output is checked first.",
        "A first try:  thresholdnet convert torchvision.models:densenet121 --shape 4 3 224 224",
        "Your own file:  thresholdnet convert models.densenet:DenseNet --path ~/project --model-arg depth=40 "
        "--shape 64 3 32 32",
        "Volumes:  thresholdnet convert monai.networks.nets:DenseNet121 --model-arg spatial_dims=3 "
        "--model-arg in_channels=1 --model-arg out_channels=2 --shape 2 1 64 64 --depth 64",
        "Signals:  thresholdnet convert monai.networks.nets:DenseNet121 --model-arg spatial_dims=1 "
        "--model-arg in_channels=12 --model-arg out_channels=2 --shape 16 12 1 4096 --signals",
        "No time spent:  thresholdnet convert torchvision.models:densenet121 --dry-run",
    )
)


@app.command("convert", help=HELP)
def convert_command(
    model: Annotated[str, typer.Argument(help="MODULE:FACTORY, such as torchvision.models:densenet121.")],
    model_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the factory; may repeat.")] = None,
    path: Annotated[Path | None, typer.Option(help="A folder in which modules are looked for first.")] = None,
    shape: Annotated[tuple[int, int, int, int], typer.Option(help="Of the images: N C H W.")] = (8, 3, 224, 224),
    depth: Annotated[int | None, typer.Option(help="Of volumes, which are N C DEPTH H W then.", min=1)] = None,
    signals: Annotated[bool, typer.Option("--signals", help="The model takes signals N C W; H is 1.")] = False,
    dtype: Annotated[str, typer.Option(help="Of weights and images: fp32, bf16, fp16 or fp64.")] = "fp32",
    rounds: Annotated[int, typer.Option(help="Timed steps of each; 0: checks and bytes alone.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is fused, and stop.")] = False,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document there as well.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """See `HELP`."""
    from .. import bench
    from ..bench import foreign
    from ..checkpoint import write_atomic
    from ..checks import output_file
    from ..convert import convert

    made = foreign.load(model, pairs("--model-arg", model_arg), path)
    if out is not None:
        output_file("--out", out)
    if dry_run:
        lines: list[str] = []
        convert(made, report=lines.append)
        print(json.dumps({"report": lines}, indent=2) if as_json else "\n".join(lines))
        return
    images: tuple[int, ...] = shape if depth is None else (*shape[:2], depth, *shape[2:])
    if signals:
        if shape[2] != 1 or depth is not None:
            given = " ".join(map(str, shape)) + ("" if depth is None else f" --depth {depth}")
            raise ValueError(f"--signals needs --shape N C 1 LENGTH and no --depth, got --shape {given}")
        images = (*shape[:2], shape[3])
    place = device or bench.default_device()
    settings = bench.Settings(rounds=rounds, warmup=min(rounds, 2), device=place)
    with progress(as_json) as shown:
        bar = shown.add_task("", total=1)
        found = foreign.compare(
            made, images, dtype, settings, lambda text, share: shown.update(bar, completed=share, description=text)
        )
    document = {"machine": bench.machine(device=place), "model": model, **found}
    text = json.dumps(document, indent=1) + "\n"
    if out is not None:
        write_atomic(out, text.encode())
    if as_json:
        print(text, end="")
        return
    print("\n".join(found["report"]))
    if found["rows"]:
        print_table(_table(found["rows"]))
        print("speed: the model's own time over this one; kept: bytes from forward to backward; peak: of the step")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "step", "of", "ms", "speed", "kept MiB", "of own", "peak MiB", "of own", box=None, header_style="bold"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        own = next(each for each in rows if each["mode"] == row["mode"])
        if "reason" in row:
            table.add_row(row["mode"], row["provider"], row["reason"])
            continue
        time = "" if row["ms_median"] is None else f"{row['ms_median']:.1f}"
        ratio = row["ratios"].get(own["provider"])
        cells = []
        for key in ("saved_bytes", "peak_bytes"):
            cells += [f"{row[key] / 2**20:.1f}", f"{row[key] / own[key]:.2f}"] if own[key] else ["", ""]
        table.add_row(row["mode"], row["provider"], time, "" if ratio is None else f"{ratio['median']:.2f}", *cells)
    return table
