"""Builds the CUDA sources for a CPU: csrc/emulator runs their threads as fibers, as torch.ops.thresholdnet_emulated.

Objects are kept below build/emulator under a hash of their source, all headers and the command, so that a change
compiles what it touches. THRESHOLDNET_EMULATOR_FLAGS adds flags, such as -fsanitize=address,undefined.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import setup_script

ROOT = setup_script.ROOT
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
DEFINES = ["-DTHRESHOLDNET_EMULATED", "-Dthresholdnet_csrc=thresholdnet_emulated"]


def added_flags() -> list[str]:
    """Of THRESHOLDNET_EMULATOR_FLAGS."""
    return shlex.split(os.environ.get("THRESHOLDNET_EMULATOR_FLAGS", ""))


def sources() -> list[Path]:
    """Schemas, kernels with their launchers, the emulator with its operators."""
    return [CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "emulator").glob("*.cpp"))]


def make_program(compiler: list[str], source: Path, target: Path) -> None:
    """A program of one source file that launches kernels, without torch."""
    _make(
        target,
        [*compiler, *FLAGS, DEFINES[0], *added_flags(), "-x", "c++", str(source), str(CSRC / "emulator/fibers.cpp")],
    )


def build(compiler: list[str]) -> Path:
    """The library, made again where a source changed; one process builds at a time."""
    torch = setup_script.load().torch_folder()
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        added = added_flags()
        command = [*compiler, *FLAGS, *DEFINES, *added, f"-isystem{torch / 'include'}"]
        headers = [path for ending in ("h", "cuh") for path in sorted(CSRC.rglob(f"*.{ending}"))]
        common = "".join(path.read_text() for path in headers) + shlex.join(command)
        objects = []
        for source in sources():
            target = CACHE / f"{source.name}-{_hash(source.read_text() + common)}.o"
            objects.append(target)
            if not target.is_file():
                _make(target, [*command, "-x", "c++", "-c", str(source)])
        library = CACHE / f"emulated-{_hash(''.join(map(str, objects)))}.so"
        if not library.is_file():
            linked = [*map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lpthread"]
            _make(library, [*compiler, *added, "-shared", *([] if added else ["-Wl,--no-undefined"]), *linked])
        for old in set(CACHE.iterdir()) - {*objects, library, CACHE / "lock"}:
            if not added:  # a build with other flags leaves the plain one in place
                old.unlink()
        return library


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(target: Path, command: list[str]) -> None:
    """Run a command that writes a file, which is there whole or not at all."""
    unfinished = target.with_suffix(".part")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-4000:]}"
    unfinished.rename(target)
