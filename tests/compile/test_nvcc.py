"""nvcc compiles csrc/cuda for sm_80, sm_90 and sm_100 with the flags of setup.py; no kernel spills registers.

What nvcc prints is kept below build/nvcc under a hash of its input, so that only what changed is compiled again.
"""

import hashlib
import re
import subprocess

import pytest
import setup_script

SCRIPT = setup_script.load()
CSRC = setup_script.ROOT / "csrc"
CACHE = setup_script.ROOT / "build" / "nvcc"
ARCHITECTURES = ["8.0", "9.0", "10.0"]
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
BINDINGS = sorted(CSRC.glob("*_binding.cpp"))


@pytest.fixture(scope="session")
def nvcc():
    """The CUDA compiler; tests are skipped without one, or with one that does not know an architecture."""
    try:
        compiler = SCRIPT.nvcc()
    except SCRIPT.Missing as cause:
        pytest.skip(f"csrc/cuda is not compiled: {cause}")
    known = SCRIPT.output([compiler, "--list-gpu-code"]).split()
    unknown = [name for name in ARCHITECTURES if f"sm_{SCRIPT.number(name)}" not in known]
    if unknown:
        pytest.skip(f"csrc/cuda is not compiled: {compiler} does not know compute capability {', '.join(unknown)}")
    return compiler


def ptxas(compiler, source):
    """What nvcc and ptxas print about a source."""
    command = [compiler, *SCRIPT.nvcc_flags(ARCHITECTURES), "-Xptxas", "-v", "-Werror", "all-warnings"]
    headers = sorted(path for ending in ("h", "cuh") for path in CSRC.rglob(f"*.{ending}"))
    read = [str(command), SCRIPT.output([compiler, "--version"]), *(path.read_text() for path in [source, *headers])]
    log = CACHE / f"{source.name}-{hashlib.sha256(''.join(read).encode()).hexdigest()[:16]}.log"
    if not log.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.name}-*"):
            old.unlink()
        done = subprocess.run([*command, "-c", str(source), "-o", "/dev/null"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        log.write_text(done.stderr)
    return log.read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_without_spills(nvcc, source):
    kernels = KERNEL.findall(ptxas(nvcc, source))
    for name in ARCHITECTURES:
        assert any(architecture == f"sm_{SCRIPT.number(name)}" for _, architecture, *_ in kernels)
    for name, architecture, stack, stores, loads, registers in kernels:
        where = f"{name} on {architecture} with {registers} registers"
        assert (stores, loads) == ("0", "0"), f"spills: {where}"
        assert stack == "0", f"arrays in local memory: {where}"


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.name)
def test_bindings_need_torchs_headers_alone(source):
    """The stable ABI: no CUDA toolkit, no ATen."""
    try:
        compiler, torch = SCRIPT.cxx(), SCRIPT.torch_folder()
    except SCRIPT.Missing as cause:
        pytest.skip(f"csrc is not compiled: {cause}")
    command = [*compiler, *SCRIPT.cxx_flags(), "-Werror", f"-isystem{torch / 'include'}", "-fsyntax-only", str(source)]
    done = subprocess.run([*command, "-H"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ATen/" not in done.stderr
    assert "cuda_runtime.h" not in done.stderr
