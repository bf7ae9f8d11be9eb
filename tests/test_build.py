"""What setup.py decides, nearly without compiling: which libraries, which flags, and what a failure leaves behind."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or newer")
if not (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    pytest.skip("run outside a checkout", allow_module_level=True)

import setup_script

SCRIPT = setup_script.load()
SWITCHES = ("THRESHOLDNET_SKIP_CUDA", "THRESHOLDNET_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "NVCC",
            "CUDA_HOME", "CUDA_PATH", "CXXFLAGS", "LDFLAGS")  # fmt: skip


@pytest.fixture
def clean(monkeypatch):
    """No switch is set."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def tree(tmp_path):
    """A source tree as small as it may be: the library of the CPU is its build record alone."""
    root = tmp_path / "tree"
    for name in ("thresholdnet", "kernels"):
        shutil.copytree(setup_script.ROOT / name, root / name, ignore=shutil.ignore_patterns("_csrc*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc/build_record.cpp"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(setup_script.ROOT / name, root / name)
    return root


def build(tree, command=("bdist_wheel",), code=0, python=sys.executable, **environment):
    """Run setup.py; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    done = subprocess.run(
        [str(python), "setup.py", "--quiet", *command], cwd=tree, text=True, env=clean | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def wheel_of(tree):
    """Name of the wheel and contents of its files of libraries: None for a binary."""
    (wheel,) = (tree / "dist").glob("*.whl")
    modules = {file.relative_to(tree).as_posix() for file in (tree / "thresholdnet").rglob("*.py")}
    modules |= {f"thresholdnet/{file.relative_to(tree).as_posix()}" for file in (tree / "kernels").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        assert len(modules) > 100 and modules <= {*archive.namelist()}
        files = {Path(name).name: name for name in archive.namelist()}
        found = {
            name: archive.read(path).decode().strip() if name.endswith(".missing") else None
            for name, path in files.items()
            if name.startswith("_csrc")
        }
    return wheel.name, found


@pytest.fixture
def python_without_torch(tmp_path):
    """An environment that holds setuptools alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, text=True, stdout=subprocess.PIPE).stdout.strip())
    setuptools = Path(importlib.util.find_spec("setuptools").origin).parent
    for part in (
        setuptools,
        setuptools.with_name("_distutils_hack"),
        *setuptools.parent.glob("setuptools-*.dist-info"),
    ):
        (site / part.name).symlink_to(part)
    return python


def test_without_torch_the_wheel_is_pure_python(tree, python_without_torch):
    log = build(tree, python=python_without_torch)
    cause = "torch 2.11 or newer is not installed beside this Python: install it, then thresholdnet again"
    assert f"warning: thresholdnet is built without its C++ library: {cause}\n" in log
    name, found = wheel_of(tree)
    assert name.endswith("-py3-none-any.whl")
    assert found == {"_csrc.missing": cause, "_csrc_cuda.missing": cause}


def test_a_failing_compiler_is_named_and_leaves_a_pure_wheel(tree):
    log = build(tree, CXX="/bin/false", THRESHOLDNET_SKIP_CUDA="1")
    name, found = wheel_of(tree)
    assert name.endswith("-py3-none-any.whl") and set(found) == {"_csrc.missing", "_csrc_cuda.missing"}
    assert found["_csrc.missing"] == "/bin/false failed on build/csrc/_csrc/csrc/build_record.cpp.o and said nothing"
    assert f"warning: thresholdnet is built without its C++ library: {found['_csrc.missing']}" in log
    assert found["_csrc_cuda.missing"] == "THRESHOLDNET_SKIP_CUDA was set when thresholdnet was installed"


def test_the_compilers_own_error_is_the_cause(tree):
    (tree / "csrc/build_record.cpp").write_text("int broken( { return 0; }\n")
    build(tree, THRESHOLDNET_SKIP_CUDA="1")
    assert re.match(r"csrc/build_record\.cpp:1:\d+: error: ", wheel_of(tree)[1]["_csrc.missing"])


def test_a_build_and_what_the_next_one_makes_again(tree):
    SCRIPT.cxx()
    first = build(tree, THRESHOLDNET_SKIP_CUDA="1", MAX_JOBS="1")
    name, found = wheel_of(tree)
    assert re.search(r"-cp310-abi3-\w+\.whl$", name) and found.keys() == {"_csrc.abi3.so", "_csrc_cuda.missing"}
    assert "build_record.cpp" in first
    shutil.rmtree(tree / "dist")
    again = build(tree, THRESHOLDNET_SKIP_CUDA="1")
    assert "build_record.cpp" not in again and wheel_of(tree)[1].keys() == found.keys()  # nothing was to be done
    shutil.rmtree(tree / "dist")
    assert "-DMORE" in build(tree, THRESHOLDNET_SKIP_CUDA="1", CXXFLAGS="-DMORE")  # other flags: compiled again
    (made,) = (tree / "build").glob("lib*/thresholdnet/_csrc.abi3.so")
    assert b"thresholdnet build record\ntorch " in made.read_bytes() and b"-DMORE" in made.read_bytes()
    # a later failure leaves no library of an earlier build, neither in a wheel nor in the checkout
    build(tree, ["build_ext", "--inplace"], THRESHOLDNET_SKIP_CUDA="1")
    assert (tree / "thresholdnet/_csrc.abi3.so").is_file()
    shutil.rmtree(tree / "dist")
    build(tree, CXX="/bin/false", THRESHOLDNET_SKIP_CUDA="1")
    assert "_csrc.abi3.so" not in wheel_of(tree)[1]
    build(tree, ["build_ext", "--inplace"], CXX="/bin/false", THRESHOLDNET_SKIP_CUDA="1")
    left = {file.name for file in (tree / "thresholdnet").glob("_csrc*")}
    assert left == {"_csrc.missing", "_csrc_cuda.missing"}


def test_force_cuda_makes_a_missing_compiler_an_error(tree):
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/nothing.cu").write_text("")
    torch = SCRIPT.torch_folder()
    if not list((torch / "lib").glob("*torch_cuda.*")):
        pytest.skip("torch was built without CUDA")
    log = build(tree, code=1, THRESHOLDNET_FORCE_CUDA="1", NVCC="/no/such/nvcc", CXX="c++")
    assert log.splitlines()[-1] == (
        "error: THRESHOLDNET_FORCE_CUDA is set, but nvcc was not found in NVCC, CUDA_HOME, the PATH or /usr/local/cuda"
    )
    log = build(tree, code=1, THRESHOLDNET_FORCE_CUDA="1", NVCC="/bin/false", TORCH_CUDA_ARCH_LIST="7.5")
    assert "but the CUDA kernels need capability 8.0 or newer, got 7.5" in log


def test_switches(monkeypatch):
    for value, on in (("1", True), ("0", False), ("", False), ("yes", True)):
        monkeypatch.setenv("THRESHOLDNET_FORCE_CUDA", value)
        assert SCRIPT.switch("THRESHOLDNET_FORCE_CUDA") == on


def test_architectures(clean, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho sm_75\necho sm_80\necho sm_90\n")
    compiler.chmod(0o755)
    assert SCRIPT.architectures(str(compiler)) == ["8.0", "9.0+PTX"]  # this nvcc does not know 10.0, which runs the PTX
    clean.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;9.0a,10.0+PTX")
    names = SCRIPT.architectures(str(compiler))
    assert names == ["8.6", "9.0a", "10.0+PTX"]
    assert [flag for flag in SCRIPT.nvcc_flags(names) if "gencode" in flag] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    clean.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SCRIPT.Missing, match=r"TORCH_CUDA_ARCH_LIST must hold capabilities .*, got 'Hopper'"):
        SCRIPT.architectures(str(compiler))


def test_no_fast_math_and_no_instructions_that_the_machine_may_lack():
    flags = " ".join([*SCRIPT.cxx_flags(), *SCRIPT.nvcc_flags(["8.0"])])
    assert not re.search(r"fast[-_]math|march|use_fast", flags)


def test_tools_that_are_missing(clean, tmp_path):
    clean.setenv("CXX", "/no/such/compiler -x")
    with pytest.raises(SCRIPT.Missing, match="'/no/such/compiler', named in CXX, was not found"):
        SCRIPT.cxx()
    clean.delenv("CXX")
    clean.setenv("PATH", str(tmp_path))
    with pytest.raises(SCRIPT.Missing, match="no C\\+\\+ compiler was found: install "):
        SCRIPT.cxx()
    clean.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SCRIPT.Missing, match="ninja was not found: pip install ninja"):
        SCRIPT.ninja()


def test_a_wrong_number_of_jobs_is_the_cause(tree):
    build(tree, MAX_JOBS="many", THRESHOLDNET_SKIP_CUDA="1")
    assert wheel_of(tree)[1]["_csrc.missing"] == "MAX_JOBS must be a positive integer, got 'many'"


def test_the_sdist_holds_what_a_build_needs(tree):
    (tree / "csrc/cpu").mkdir()
    (tree / "csrc/cpu/rows.h").write_text("")
    (tree / "thresholdnet/_csrc.missing").write_text("left by a build")
    build(tree, ["sdist", "--formats=zip"])
    (archive,) = (tree / "dist").glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "csrc/build_record.cpp", "csrc/cpu/rows.h", "kernels/conv.py",
            "thresholdnet/backends/native.py", "LICENSE", "README.md"} <= names  # fmt: skip
    assert "thresholdnet/_csrc.missing" not in names
