"""What `thresholdnet info` prints: versions, backends with their reasons, libraries, the machine, the environment.

`python -m thresholdnet.info` prints the same as JSON, where the command's own packages are not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .backends import backends, csrc, details, libraries

ENVIRONMENT = {
    "THRESHOLDNET_CSRC": "0: the C++ library stays unused, the native backend runs in torch's operations",
    "THRESHOLDNET_CPU": "avx512, avx2 or baseline: the C++ library uses no newer instructions than these",
    "THRESHOLDNET_WINOGRAD": "1: wide 3x3 layers on a CPU in Winograd's form: faster, less exact",
    "THRESHOLDNET_TRACEBACK": "1: the command shows the traceback behind an error",
    "THRESHOLDNET_CONV": "own or library: every convolution of the CUDA engine by our kernels, or by torch's library",
    "THRESHOLDNET_TUNED": "0: no measured launch tables; else the folder that holds them, instead of the package's own",
    "THRESHOLDNET_REPLAY": (
        "0: every call of a fused operator runs, none is replayed; "
        "1: replayed from the third on, in Triton's interpreter too; graph: its launches submitted at once"
    ),
    "THRESHOLDNET_PDL": "1: on sm_90 and newer Triton's kernels start while their predecessors end; off until measured",
    "TRITON_INTERPRET": "1: the Triton backend runs in the interpreter, on the CPU, slowly",
    "OMP_NUM_THREADS": "threads on a CPU",
    "CUDA_VISIBLE_DEVICES": "GPUs that torch sees",
    "THRESHOLDNET_SKIP_CUDA": "at installation, 1: without the CUDA library",
    "THRESHOLDNET_FORCE_CUDA": "at installation, 1: a CUDA library that cannot be built is an error",
    "TORCH_CUDA_ARCH_LIST": "at installation: compute capabilities of the CUDA library, such as 8.0;9.0a;10.0+PTX",
    "MAX_JOBS": "at installation: compilers at once",
    "CXX": "at installation: the C++ compiler",
    "CXXFLAGS": "at installation: more flags for it",
    "LDFLAGS": "at installation: more flags for the linker",
    "NVCC": "at installation: the CUDA compiler",
    "CUDA_HOME": "at installation: the folder of the CUDA toolkit",
}
"""Every environment variable that thresholdnet or its installation looks at, and its meaning."""


def collect() -> dict[str, Any]:
    """Everything, as JSON-able values; what is missing is None or says why."""
    return {
        "versions": versions(),
        "backends": {
            name: {"usable": reason is None, "reason": reason, "details": details().get(name)}
            for name, reason in backends().items()
        },
        "libraries": {name: library(name) for name in libraries.NAMES},
        "cpu": cpu(),
        "gpus": gpus(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str | None]]:
    """A report as lines of a table: name and value; a value of None opens a section."""
    made: list[tuple[str, str | None]] = [("versions", None)]
    made += [(name, value or "-") for name, value in report["versions"].items()]
    made.append(("backends", None))
    for name, state in report["backends"].items():
        made.append((name, state["details"] if state["usable"] else f"not here: {state['reason']}"))
    for name, state in report["libraries"].items():
        made += [
            (f"library {name}", None),
            ("state", "loaded" if state["loaded"] else f"not loaded: {state['reason']}"),
        ]
        made += [(key.replace("_", " "), value) for key, value in state["build"].items()]
    made.append(("CPU", None))
    made += [(name, "-" if value is None else str(value)) for name, value in report["cpu"].items()]
    for index, gpu in enumerate(report["gpus"]):
        made += [(f"GPU {index}", None), *((name, str(value)) for name, value in gpu.items())]
    made.append(("environment", None))
    made += [(name, f"{value}  ({ENVIRONMENT[name]})") for name, value in report["environment"].items()]
    return made if report["environment"] else [*made, ("-", "no variable that thresholdnet looks at is set")]


def versions() -> dict[str, str | None]:
    """Of thresholdnet and of what it stands on; None for what is not there."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "thresholdnet": __version__,
        "installed in": str(Path(__file__).resolve().parent),
        "Python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "cuDNN": None if cudnn is None else str(cudnn),
        "NVIDIA driver": driver(),
        "Triton": version_of("triton"),
        "NumPy": version_of("numpy"),
        "system": platform.platform(),
    }


def version_of(module: str) -> str | None:
    """Of an importable module; the error's text where it does not import, None where it is not installed."""
    try:
        return str(importlib.import_module(module).__version__)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a broken package is what the report is for
        return f"does not import: {str(error).strip().splitlines()[0]}"


def driver() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


def library(name: str) -> dict[str, Any]:
    """State of one library of csrc/, and the record of its build."""
    file = libraries.file_of(name)
    reason = csrc.reason() if name == "_csrc" else csrc.cuda_reason()
    return {"file": None if file is None else str(file), "loaded": reason is None, "reason": reason} | {
        "build": libraries.record(name)
    }


def cpu() -> dict[str, Any]:
    """The processor, what torch uses of it, and the instructions that our library chose."""
    return {
        "model": _processor(),
        "logical cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch instructions": torch.backends.cpu.get_cpu_capability(),
        "our instructions": None if csrc.reason() else csrc.instructions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def gpus() -> list[dict[str, Any]]:
    """Those that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory in MiB": properties.total_memory // 2**20,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2))
