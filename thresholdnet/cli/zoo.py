"""Commands that look at networks without running them: models, tables, memory, links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable

from .. import links
from ._shared import JsonFlag, app, pairs, print_table, write_or_print


@app.command("models")
def models_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'densenet*'.")] = "*",
    as_json: JsonFlag = False,
) -> None:
    """The zoo: names, parameters with 1000 classes, and the arguments that --model-arg takes."""
    from ..models import create_model, list_models, model_arguments

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
    from .. import tables
    from ..checks import one_of, output_file

    render = tables.FORMATS[one_of("--format", style, tables.FORMATS)]
    if out is not None:
        output_file("--out", out)
    chosen = [tables.table(name) for name in names or tables.TABLES]
    if style == "json":
        text = json.dumps([json.loads(render(table)) for table in chosen], indent=2)
    else:
        text = "\n".join(render(table).rstrip("\n") + "\n" for table in chosen)
    write_or_print(text.rstrip("\n") + "\n", out)


@app.command("memory")
def memory_command(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "thresholdnet_v1",
    model_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the model; may repeat.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images, or volumes, in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
    figure: Annotated[Path | None, typer.Option(help="Write a bar chart there as a PNG.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bytes that a training step keeps and needs at its peak: eager, fused, and fused with recomputed bottlenecks.

    Counted by running the step without computing it (torch's meta device): no GPU is needed and no time is spent.
    """
    from .. import figures, memory
    from ..checks import output_file
    from ..models import create_model

    network = create_model(model, device="meta", **pairs("--model-arg", model_arg))
    if figure is not None:
        output_file("--figure", figure)
    sides = [image_size] * getattr(network, "spatial_dims", 2)
    shape = (batch_size, getattr(network, "in_chans", 3), *sides)
    report = memory.account(network, shape, memory.dtype_of(dtype))
    if figure is not None:
        at = "x".join(map(str, sides))
        figures.memory_bars(report, figure, f"{model}, batch {batch_size} at {at}, {dtype}")
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
    print_table(table)
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
        from ..checks import output_file
        from ..diagrams import arc_diagram

        stem = Path(f"links-{'compare' if compare else names[0]}-{layers}")
        files = [out] if out is not None else [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        for file in files:
            arc_diagram(made, output_file("--out", file), names)
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
    print_table(table)
    for file in files:
        print(f"drawn: {file}")
