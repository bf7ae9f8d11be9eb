"""Commands that look at this machine: info, selftest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from ._shared import JsonFlag, app, print_table


@app.command("info")
def info_command(as_json: JsonFlag = False) -> None:
    """Versions, backends with their reasons, how the libraries were built, the machine, environment variables."""
    from .. import info

    report = info.collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = RichTable(box=None, show_header=False)
    for name, value in info.rows(report):
        table.add_row(f"[bold]{name}[/bold]" if value is None else f"  {name}", "" if value is None else escape(value))
    print_table(table)


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

    from .. import selftest

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
    from ..backends import backends, details

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
    print_table(table)
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
