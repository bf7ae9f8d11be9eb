"""The command `thresholdnet`: a thin layer over the package's functions; heavy imports wait until a command runs.

Exit codes: 0 done, 2 bad input or a failed write (one sentence on stderr), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

# isort: off
from ._shared import app  # first: it says what to install where typer is missing
from . import training, zoo, foreign, machine, bench  # noqa: F401  # in the order that --help lists their commands

import typer

from .. import __version__


def main(application: typer.Typer = app, name: str = "thresholdnet") -> None:
    """Run a command line, by default ours; every expected failure ends in one sentence and exit code 2."""
    try:
        application(prog_name=name)
    except KeyboardInterrupt:
        sys.exit(130)
    except (TypeError, ValueError, OSError, RuntimeError, AssertionError) as error:
        foreign = isinstance(error, AssertionError) and "not compiled" not in str(error)  # torch says so of a device
        if foreign or os.environ.get("THRESHOLDNET_TRACEBACK"):
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
