"""Address and undefined-behaviour sanitizers over the C++ library and the emulated CUDA kernels: `make sanitize`.

The package and its tests are copied into a temporary folder, where setup.py builds the library with the sanitizers. The
tests of the operators, the engine's native backend, the transitions and the fuzz test run there, once for every
instruction set that the machine has, then those of the emulator. The first report ends a run; the last line sums up.

Python is not built with sanitizers, so their libraries are loaded in front of it. Leaks are not looked for: Python and
torch keep much until the process ends, which counts as leaked.

    python tests/sanitize.py [--keep FOLDER]
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
INSTRUCTIONS = ("baseline", "avx2", "avx512")
REPORT = re.compile(r"^.*(?:ERROR: AddressSanitizer|runtime error:|AddressSanitizer: CHECK failed).*$", re.MULTILINE)
CPU_TESTS = ("tests/test_fuzz.py", "tests/test_engine.py", "tests/test_chain.py", "tests/test_winograd.py")
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
    has = {"baseline": True, "avx2": {"avx2", "fma"} <= set(flags), "avx512": "avx512bw" in flags}
    return [name for name in INSTRUCTIONS if has[name]]


def copy_package(folder: Path) -> None:
    """The sources and tests; nothing that was built, and the kernels where an import from the copy finds them."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("_csrc*", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copytree(folder / "kernels", folder / "thresholdnet" / "kernels")


def main(folder: Path) -> list[str]:
    """Run everything; what was run, in words."""
    copy_package(folder)
    sys.path.insert(0, str(folder / "tests"))
    import setup_script

    compiler = setup_script.load().cxx()
    options = {
        "LD_PRELOAD": runtimes(compiler),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",  # loops are shared out, so that one thread's range ends inside a tensor
    }
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]

    run(
        [*python, "setup.py", "--quiet", "build_ext", "--inplace"],
        folder,
        {"THRESHOLDNET_SKIP_CUDA": "1", "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS},
    )
    done = []
    for name in instructions():
        chosen = {**options, "THRESHOLDNET_CPU": name}
        loaded = run([*python, "-c", LOADED], folder, chosen)
        if not loaded.startswith(f"None {name} ") or "-fsanitize=address" not in loaded:
            raise Failure(f"the library with sanitizers does not run with {name} instructions: {loaded.strip()}")
        run([*pytest, *CPU_TESTS, "-k", "not triton and not compiles"], folder, chosen)
        done.append(f"the library with {name} instructions")

    flags = {"THRESHOLDNET_EMULATOR_FLAGS": f"{FLAGS} -Wno-error", "PYTHONPATH": "tests:tests/emulator"}
    run([*python, "-c", BUILT], folder, flags)  # before the tests, whose compilers would run with sanitizers
    run([*pytest, "tests/emulator"], folder, {**options, **flags})
    return [*done, "the emulated CUDA kernels"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sanitizers over the C++ library and the emulated CUDA kernels.")
    parser.add_argument("--keep", type=Path, help="copy into this new folder, and leave it there")
    keep = parser.parse_args().keep
    room = Path(tempfile.mkdtemp(prefix="thresholdnet-sanitize-")) if keep is None else keep.resolve()
    room.mkdir(parents=True, exist_ok=True)
    try:
        print(f"sanitize: clean: {', '.join(main(room))}")
    except Failure as failure:
        sys.exit(f"sanitize: FAILED: {failure}")
    finally:
        if keep is None:
            shutil.rmtree(room)
