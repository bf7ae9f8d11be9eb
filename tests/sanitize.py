"""Address and undefined-behaviour sanitizers over the C++ library and the emulated CUDA kernels: `make sanitize`.

The package and its tests are copied into a temporary folder, where setup.py builds the library with the sanitizers. The
tests of the operators, the engine's native backend, the transitions and the fuzz test run there, once for every
instruction set that the machine has, then those of the emulator. A report ends its process, and the run with it;
the last line sums up.

Python is not built with sanitizers, so their libraries are loaded in front of it. Leaks are not looked for: Python and
torch keep much until the process ends, which counts as leaked.

    python tests/sanitize.py [--keep FOLDER] [--only library|emulator]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "kernels", "tests", "thresholdnet", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FLAGS = "-fsanitize=address -fsanitize=undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # the last, or asan finds no __cxa_throw to watch
INSTRUCTIONS = ("baseline", "avx2", "avx512", "avx512_bf16")
REPORT = re.compile(r"^.*(?:ERROR: AddressSanitizer|runtime error:).*$", re.MULTILINE)
CPU_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("weight_gradient", "few_pixels", "fuzz", "engine", "chain", "volumes", "winograd")
)
SLOW = "triton or compiles or gradcheck or steps_of_training or models or whole_networks or bytes"  # no new loop there
LOADED = (
    "from thresholdnet.backends import csrc, libraries; "
    "print(csrc.reason(), csrc.instructions(), libraries.record('_csrc')['flags'])"
)

BUILT = "import emulated_library, setup_script; print(emulated_library.build(setup_script.load().cxx()))"


class Failure(Exception):
    """What went wrong, in one sentence."""


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Output of a command, shown as well.

    Raises:
        Failure: an exit code other than 0, or a report.
    """
    print(f"$ {' '.join(command)}", flush=True)
    with subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    output = "".join(lines)
    report = REPORT.search(output)
    if report is not None:
        raise Failure(report[0].strip())
    if process.returncode:
        raise Failure(f"exit code {process.returncode} of {' '.join(command)}")
    return output


def runtimes(compiler: list[str]) -> str:
    """The sanitizers' libraries, for LD_PRELOAD."""
    found = [subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip() for name in RUNTIMES]
    missing = [name for name, path in zip(RUNTIMES, found, strict=True) if not Path(path).is_file()]
    if missing:
        raise Failure(f"{compiler[0]} has no {', '.join(missing)}: use g++ with its sanitizers")
    return ":".join(str(Path(path).resolve()) for path in found)


def instructions() -> list[str]:
    """The sets that this machine has."""
    flags = Path("/proc/cpuinfo").read_text().split()
    needed = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512bw"}, "avx512_bf16": {"avx512_bf16"}}
    return [name for name in INSTRUCTIONS if needed[name] <= set(flags)]


def copy_package(folder: Path) -> None:
    """The sources and tests; nothing that was built, and the kernels where an import from the copy finds them."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("_csrc*", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copytree(folder / "kernels", folder / "thresholdnet" / "kernels")


def options(compiler: list[str]) -> dict[str, str]:
    """The environment of Python with sanitizers."""
    return {
        "LD_PRELOAD": runtimes(compiler),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",  # loops are shared out, so that one thread's range ends inside a tensor
    }


# capture=sys: what pytest captures of the process's stderr, a report too, would end with the process
PYTEST = [sys.executable, "-m", "pytest", "-x", "--capture=sys", "-p", "no:cacheprovider", "-o", "timeout=0"]


def sanitize_library(folder: Path, environment: dict[str, str]) -> list[str]:
    """The C++ library with each instruction set; what was run, in words."""
    build = {"THRESHOLDNET_SKIP_CUDA": "1", "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS}
    run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder, build)
    done = []
    for name in instructions():
        chosen = {**environment, "THRESHOLDNET_CPU": name}
        loaded = run([sys.executable, "-c", LOADED], folder, chosen)
        if not loaded.startswith(f"None {name} ") or "-fsanitize=address" not in loaded:
            raise Failure(f"the library with sanitizers does not run with {name} instructions: {loaded.strip()}")
        run([*PYTEST, *CPU_TESTS, "-k", f"not ({SLOW})"], folder, chosen)
        done.append(f"the library with {name} instructions")
    return done


def sanitize_emulator(folder: Path, environment: dict[str, str]) -> list[str]:
    """The emulated CUDA kernels; what was run, in words."""
    build = {"THRESHOLDNET_EMULATOR_FLAGS": f"{FLAGS} -Wno-error", "PYTHONPATH": "tests:tests/emulator"}
    run([sys.executable, "-c", BUILT], folder, build)  # before the tests, whose compilers would run with sanitizers
    run([*PYTEST, "tests/emulator"], folder, {**environment, **build})
    return ["the emulated CUDA kernels"]


PARTS = {"library": sanitize_library, "emulator": sanitize_emulator}


def main(folder: Path, parts: list[str]) -> list[str]:
    """Run these parts; what was run, in words."""
    copy_package(folder)
    sys.path.insert(0, str(folder / "tests"))
    import setup_script

    environment = options(setup_script.load().cxx())
    return [line for part in parts for line in PARTS[part](folder, environment)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sanitizers over the C++ library and the emulated CUDA kernels.")
    parser.add_argument("--only", choices=list(PARTS), help="one of the two parts")
    parser.add_argument("--keep", type=Path, help="copy into this new folder, and leave it there")
    arguments = parser.parse_args()
    keep, parts = arguments.keep, [arguments.only] if arguments.only else list(PARTS)
    room = Path(tempfile.mkdtemp(prefix="thresholdnet-sanitize-")) if keep is None else keep.resolve()
    room.mkdir(parents=True, exist_ok=True)
    try:
        print(f"sanitize: clean: {', '.join(main(room, parts))}")
    except Failure as failure:
        sys.exit(f"sanitize: FAILED: {failure}")
    finally:
        if keep is None:
            shutil.rmtree(room)
