"""The file of a run, bench/results/<machine>/<date>-<name>.json, whole after every case, and taken up where it ends.

{"machine": {...}, "rows": [...], "layers": [...], "peaks": {...}}. "machine" says what must be the same for all rows
(`SAME`): hardware and releases, commit with a digest of local changes, digests of the compiled libraries and of launch
tables, environment variables that change what runs; and all the commands. A row has
- model (with its block where that alone ran: "thresholdnet_v1/stages.3"), image, batch, dtype, mode, provider, graph;
  device, threads, backend;
- ms_median, ms_p20, ms_p80 over its runs (null without a time: none was asked for, or "reason" says why); ms, a round
  each;
- ratios {label of a baseline: {median, p20, p80}}, above 1 where the row is faster than that;
- peak_bytes and saved_bytes; peak_by and saved_by, which say how they were found;
- check (errors and their bounds); first_call_s, compile_cache_hits;
- warmup (rounds that were not timed), load_before and load_after (load averages), other_load (share of the CPU that
  other processes took while it was timed), and a warning where that is much;
- flops of its convolutions and tflops, of a block alone.

"layers" holds single operations: model with its block, image, batch, dtype, layer, kernel, operation, provider, graph,
times, ratios and load as above; side, sources (channels each), read and written (channels); flops, bytes, bound_ms (by
the roofline), tflops, gbs, roofline_share; check, one entry a result. "peaks" is the roofline by dtype: tflops, gbs and
where they are from. Files without operations lack both.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, info
from ..backends.libraries import NAMES, file_of
from ..checkpoint import write_atomic
from .cases import Case
from .layers import Operation

CHECKOUT = Path(__file__).resolve().parents[2]
SAME = (
    "name", "cpu", "cores", "threads", "instructions", "gpu", "driver", "cuda", "cudnn", "torch", "triton", "python",
    "version", "commit", "changes", "libraries", "tuned", "environment",
)  # fmt: skip
"""What must not differ between the rows of one file."""

SWITCHES = re.compile(
    "(THRESHOLDNET|TRITON|TORCHINDUCTOR|TORCH|PYTORCH|CUBLAS|CUDNN|NVIDIA_TF32|CUDA_LAUNCH|CUDA_DEVICE|CUDA_MODULE|OMP|"
    "GOMP|KMP|MKL|ONEDNN|DNNL|MALLOC)_|LD_PRELOAD$"
)
"""Beginnings of environment variables that change what runs, or how fast."""

NO_SWITCHES = re.compile("_(DIR|HOME|PATH|TRACEBACK|LOGS|ARCH_LIST)$")
"""Endings of those among them that do not."""


def machine(name: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Where and with what is measured.

    Args:
        name: of the machine; made from its processor or GPU where it is None.
    """
    cpu = info.cpu()
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    changes = _digest((_git("diff", "HEAD", "--", ":!bench/results", ":!kernels/tuned") or "").encode())
    return {
        "name": name or machine_name(gpu, cpu["model"], cpu["logical cores"]),
        "cpu": cpu["model"],
        "cores": cpu["logical cores"],
        "threads": cpu["torch threads"],
        "instructions": cpu["our instructions"],
        "gpu": gpu,
        "driver": info.driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": info.version_of("triton"),
        "python": sys.version.split()[0],
        "version": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": changes is not None,
        "changes": changes,
        "libraries": {name: _digest(file.read_bytes()) for name in NAMES if (file := file_of(name))},
        "tuned": {file.name: _digest(file.read_bytes()) for file in _launch_tables()},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if SWITCHES.match(name) and not NO_SWITCHES.search(name)
        },
        "command": shlex.join(["thresholdnet", *sys.argv[1:]]),
    }


def machine_name(gpu: str | None, cpu: str, cores: int) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"; "AMD EPYC 9R14" with 2 cores -> "epyc-2core"."""
    if gpu is not None:
        words = [word.lower() for word in re.findall(r"\w+", gpu) if word.lower() not in ("nvidia", "geforce", "tesla")]
        return next((word for word in words if re.search(r"\d", word)), words[0] if words else "gpu")
    family = re.search(r"epyc|xeon|ryzen|threadripper|core|neoverse|graviton|apple m\d", cpu.lower())
    word = family[0] if family else next(iter(re.findall(r"\w+", cpu.lower())), "cpu")
    return f"{word.replace(' ', '-')}-{cores}core"


def _both(earlier: str | None, now: str) -> str:
    """The commands that a file is from, as one line of a shell."""
    if earlier is None or now in earlier.split(" && "):
        return earlier or now
    return f"{earlier} && {now}"


def path_for(out: Path, machine_folder: str, name: str) -> Path:
    """`out` itself where it is a .json file, else the file of today's run `name` below it."""
    for what, text in (("name", name), ("machine", machine_folder)):
        if not re.fullmatch(r"[\w.+-]+", text):
            raise ValueError(f"{what} must hold letters, digits and . _ + - alone, got {text!r}")
    return out if out.suffix == ".json" else out / machine_folder / f"{datetime.date.today()}-{name}.json"


class Results:
    """A run's file.

    Args:
        path: the JSON file; read where it exists.
        machine: see `machine`.

    Raises:
        ValueError: the file is none of ours, or its rows come from another machine, torch, code or environment.
    """

    def __init__(self, path: Path, machine: dict[str, Any]):
        self.path = path
        self.machine = machine
        self.rows: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.peaks: dict[str, dict[str, Any]] = {}
        if path.exists():
            found = read(path)
            for key in SAME:
                if found["machine"].get(key) != machine[key]:
                    raise ValueError(
                        f"{path} was measured with {key} {found['machine'].get(key)!r}, now it is {machine[key]!r}: "
                        "give this run another --name"
                    )
            self.rows, self.layers, self.peaks = found["rows"], found["layers"], found["peaks"]
            self.machine = machine | {"command": _both(found["machine"].get("command"), machine["command"])}

    def has(self, job: Case | Operation, providers: Iterable[str], graphs: Iterable[bool], timed: bool = True) -> bool:
        """Whether a step or an operation is finished for all of these providers.

        Args:
            timed: a row without a time is finished only where it says why it has none.
        """
        done = {
            (row["provider"], row["graph"])
            for row in self.of(job)
            if not timed or row["ms_median"] is not None or "reason" in row
        }
        return done.issuperset((name, graph) for name in providers for graph in graphs)

    def of(self, job: Case | Operation) -> list[dict[str, Any]]:
        """Rows of a step or an operation."""
        return [row for row in self._table(job) if job.fields.items() <= row.items()]

    def add(self, job: Case | Operation, rows: Sequence[dict[str, Any]]) -> None:
        """Put these rows in place of the job's earlier ones and write the file: whole, or not at all."""
        earlier, table = self.of(job), self._table(job)
        table[:] = [row for row in table if row not in earlier] + list(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(self.document, indent=1) + "\n").encode())

    @property
    def document(self) -> dict[str, Any]:
        """What the file holds."""
        layers = {"layers": self.layers, "peaks": self.peaks} if self.layers else {}
        return {"machine": self.machine, "rows": self.rows, **layers}

    def _table(self, job: Case | Operation) -> list[dict[str, Any]]:
        table: list[dict[str, Any]] = getattr(self, job.table)
        return table


def read(path: Path) -> dict[str, Any]:
    """A file of results; tables that an older one lacks are empty.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text())
        rows = [(row["provider"], row["model"], row["mode"]) for row in found["rows"]]
        found = {"layers": [], "peaks": {}, **found, "machine": dict(found["machine"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a file that thresholdnet bench wrote, got something else") from error
    if not rows and not found["layers"]:
        raise ValueError(f"{path} must hold at least one row, got none")
    return found


def _digest(content: bytes) -> str | None:
    """A few characters that tell contents apart, None for nothing."""
    return hashlib.sha256(content).hexdigest()[:12] if content else None


def _launch_tables() -> list[Path]:
    """What launches may be chosen by; files that git need not know."""
    from thresholdnet.kernels import tuned

    folder = tuned.folder()
    return [] if folder is None else sorted(folder.glob("*.json"))


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this package lies in, None for an installed one."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
