"""What every command shares: the application, options that mean the same everywhere, tables, pairs of KEY=VALUE."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.measure import Measurement
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table as RichTable
except ImportError as error:
    sys.exit(f"error: the command line needs: pip install 'thresholdnet[train]' ({error})")

from ..checks import key_values

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="DenseNet-family networks with pruned links: train, evaluate, predict; the paper's tables and link patterns.",
    epilog="A minute to start with:  thresholdnet train --data digits --model thresholdnet_ab "
    "--model-arg width_mult=0.5 --fused --epochs 20 --batch-size 50 --out runs/first",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the data files (cifar10, stl10: torchvision's layout).")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing files below --root.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU if there is one by default.")]


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """What an option that may repeat says, see `checks.key_values`."""
    return key_values(texts or (), f"{option} must be KEY=VALUE")


def print_table(table: RichTable) -> None:
    """As wide as it is: a cell cut short with dots would be a wrong answer."""
    console = Console()
    wide = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def progress(quiet: bool) -> Progress:
    """A bar on a terminal's stderr, with a description, a share and the time since it began."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def write_or_print(text: str, out: Path | None) -> None:
    """The text into a file, or onto stdout."""
    if out is None:
        print(text, end="")
        return
    out.write_text(text)
    print(f"written: {out}")
