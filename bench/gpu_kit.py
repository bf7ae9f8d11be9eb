"""What a GPU's first minutes would go into, made where there is none, for bench/gpu.sh OUT --kit FOLDER there.

    python bench/gpu_kit.py FOLDER                      the kit
    python bench/gpu_kit.py FOLDER --only hardnet68     with some of the sets of kernels; may repeat
    python bench/gpu_kit.py FOLDER --list               the sets, and stop

FOLDER/kit.tar.xz gets all that travels: Triton's compiled kernels for the steps that bench/gpu.sh measures and for the
rows of Table VI, and the C++ and CUDA libraries of this checkout. What is compiled stays in FOLDER, so that a run that
was stopped goes on.

Triton finds its kernels where its own files (libtriton.so is another one for each Python) and the package's sources are
the same: run this with the other machine's Python, torch and triton, in an environment of their own (with rich;
PYTHONPATH=. stands for an install). The libraries run in any torch from 2.10 on (`make abi`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tune import MODELS

ROOT = Path(__file__).resolve().parent.parent
KIT = "kit.tar.xz"
KEY = "triton.key"  # of the Triton that compiled: it finds no kernels under another one
OVERLAP = {"THRESHOLDNET_PDL": "1"}


@dataclass(frozen=True)
class Kernels:
    """One call of bench/precompile.py."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def sets() -> list[Kernels]:
    """In the order in which gpu.sh and then the tables want them."""
    large, small = ("--batch", "128", "--image", "224"), ("--batch", "100", "--image", "32")
    v1 = ("--model", MODELS[0])
    return [
        Kernels(f"{MODELS[0]} 224", (*v1, *large)),
        Kernels(f"{MODELS[0]} 32", (*v1, *small)),
        *(Kernels(f"{model} 224", ("--model", model, *large)) for model in MODELS[1:]),
        Kernels("densenet40 32", ("--model", "densenet40", "--batch", "64", "--image", "32")),
        Kernels(f"overlap {MODELS[0]} 224", (*v1, *large), OVERLAP),
        Kernels(f"overlap {MODELS[0]} 32", (*v1, *small), OVERLAP),
        *(Kernels(f"tables {model} 32", ("--model", model, *small, "--parameters", "float32")) for model in MODELS),
    ]


def compile_kernels(kernels: Kernels, cache: Path, capability: str) -> None:
    """Run precompile.py; raises RuntimeError with its words where it failed."""
    command = [sys.executable, str(ROOT / "bench" / "precompile.py"), "--cache", str(cache), "--capability", capability]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | kernels.environment
    done = subprocess.run(
        [*command, *kernels.arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{kernels.name}: {(done.stderr.strip() or 'no word').splitlines()[-1]}")


def pack(folder: Path) -> tuple[Path, list[str]]:
    """FOLDER/kit.tar.xz of the compiled kernels and this checkout's libraries; its path and the libraries' names."""
    from thresholdnet.checkpoint import write_atomic

    libraries = sorted((ROOT / "thresholdnet").glob("_csrc*.so"))
    key, packed = triton_key().encode(), io.BytesIO()
    entry = tarfile.TarInfo(KEY)
    entry.size = len(key)
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        archive.add(folder / "triton", "triton")
        archive.addfile(entry, io.BytesIO(key))
        for library in libraries:
            archive.add(library, f"thresholdnet/{library.name}")
    write_atomic(folder / KIT, packed.getbuffer())
    return folder / KIT, [library.name for library in libraries]


def unpack(kit: Path, folder: Path) -> Path:
    """Put a kit's libraries into this checkout and its kernels into `folder`; where Triton finds them, if it does.

    Raises:
        OSError, tarfile.TarError: it is not there, or no kit.
    """
    with tarfile.open(kit / KIT) as archive:
        archive.extractall(folder, filter="data")
    for library in (folder / "thresholdnet").glob("_csrc*.so"):
        (ROOT / "thresholdnet" / library.name).write_bytes(library.read_bytes())
    for group in (folder / "triton").glob("*/__grp__*.json"):  # Triton notes a kernel's files with their whole paths
        files = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in files}}))
    if (folder / KEY).read_text() != triton_key():
        print("the kit's kernels are compiled again: they were made by another build of Triton", file=sys.stderr)
    return folder / "triton"


def triton_key() -> str:
    """What Triton's files here are to its cache."""
    from triton.runtime import cache

    key: str = cache.triton_key()
    return key


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for what is compiled, and for the kit")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="sets whose name holds this")
    parser.add_argument("--capability", default="9.0", metavar="N.N", help="of the GPU (9.0, of an H100)")
    parser.add_argument("--list", action="store_true", help="print the sets and stop")
    options = parser.parse_args(arguments)
    chosen = [each for each in sets() if not options.only or any(name in each.name for name in options.only)]
    if options.list:
        print("\n".join(each.name for each in chosen))
        return 0
    try:
        if not chosen:
            raise ValueError(f"only must name some of {', '.join(each.name for each in sets())}, got {options.only}")
        (options.folder / "triton").mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(chosen, start=1):
            began = time.monotonic()
            compile_kernels(each, options.folder / "triton", options.capability)
            print(f"{number}/{len(chosen)} {each.name}: {time.monotonic() - began:.0f} s", flush=True)
        kit, libraries = pack(options.folder)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"written: {kit} ({kit.stat().st_size / 2**20:.1f} MiB), {' and '.join(libraries) or 'no library: not built'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
