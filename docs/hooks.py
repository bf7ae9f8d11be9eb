"""MkDocs hooks: when the site is built, pictures are drawn and tables filled in, from the code and from bench/results.

A page whose first lines say `filled: true` is a Jinja template over the functions of FILLED.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import measured
import pictures
from mkdocs.structure.files import File, Files

from thresholdnet.bench import plots


def kernel_operands() -> str:
    """The table of what every kernel loads and stores."""
    lines = ["| file | kernel | loads | stores |", "|---|---|---|---|"]
    for file, kernel, *operands in pictures.operands():
        loads, stores = (", ".join(f"`{name}`" for name in names) for names in operands)
        lines.append(f"| `{file}` | `{kernel}` | {loads} | {stores} |")
    return "\n".join(lines)


def source(file: str, *functions: str) -> str:
    """A block of code: functions as they stand in a file of the repository."""
    text = (pictures.ROOT / file).read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    parts = []
    for name in functions:
        node = found[name]
        first = min(part.lineno for part in (node, *node.decorator_list))
        parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "```python\n" + "\n\n\n".join(parts) + "\n```"


DRAWN: dict[str, list[str]] = {}
"""Of every run the names of its pictures; filled by `on_files`, which comes first."""


def measured_runs() -> str:
    """See `measured.measured_runs`."""
    return measured.measured_runs(DRAWN)


FILLED = {
    "kernel_operands": kernel_operands, "measured_runs": measured_runs, "memory": measured.memory,
    "compiled": measured.compiled, "trained": measured.trained, "host_time": measured.host_time,
    "converted": measured.converted, "source": source,
}  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = {}
        for name, draw in pictures.PICTURES.items():
            draw(Path(folder) / name)
            drawn[name] = (Path(folder) / name).read_bytes()
        for begin, _, found in measured.runs():
            files_of_run = plots.draw(found, Path(folder) / begin)
            DRAWN[begin] = [file.name for file in files_of_run]
            drawn |= {file.name: file.read_bytes() for file in files_of_run}
    for name, content in drawn.items():
        files.append(File.generated(config, f"images/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables."""
    if not page.meta.get("filled"):
        return markdown
    return jinja2.Template(markdown, undefined=jinja2.StrictUndefined).render(FILLED)
